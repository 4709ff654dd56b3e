"""The judge of the baseline: logits of transformers' LlamaForCausalLM in torch, on the baseline's random weights.

Run as a program (with torch and transformers) it writes compare/llama.npz, so that the tests need neither.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from retnet_export.compare.transformer import RandomWeights, TransformerConfig, weight_shapes

GOLDEN = Path(__file__).parent / "compare" / "llama.npz"
TOKENS = np.array([7, 3, 11, 0, 42, 42, 5, 63, 20, 1, 9, 33, 2, 58, 17, 4])
CONFIGS = {
    "multi-head": TransformerConfig(64, 32, 2, num_heads=2, num_kv_heads=2, head_dim=16, ffn_size=40),
    "grouped-query, tied": TransformerConfig(
        64, 48, 3, num_heads=4, num_kv_heads=2, head_dim=16, ffn_size=64, norm_eps=1e-5, tied_embeddings=True
    ),
}
MODULES = {
    "embedding": "model.embed_tokens",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "q": "q_proj",
    "k": "k_proj",
    "v": "v_proj",
    "out": "o_proj",
    "ffn": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}


def llama_logits(config: TransformerConfig) -> np.ndarray:
    """Logits (T, V) after each of TOKENS, float64."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rotary_base,
            tie_word_embeddings=config.tied_embeddings,
            max_position_embeddings=64,
        )
    ).eval()
    read = RandomWeights(config)
    weights = {
        ".".join(MODULES.get(part, part) for part in name.split(".")): torch.from_numpy(read(name))
        for name in weight_shapes(config)
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - ({"lm_head.weight"} if config.tied_embeddings else set()):
        raise ValueError(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
    with torch.no_grad():
        return model.double()(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


if __name__ == "__main__":
    import transformers

    np.savez_compressed(
        GOLDEN, made_with=f"transformers {transformers.__version__}", **{name: llama_logits(c) for name, c in CONFIGS.items()}
    )
