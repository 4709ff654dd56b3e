"""Golden files of the syncdoth/RetNet checkpoint family (a Hugging Face port of torchscale), made with its own code.

syncdoth/RetNet is a GitHub repository, not a package; none of its code is here. Give the script a checkout:

    git clone https://github.com/syncdoth/RetNet source && git -C source checkout 083360cc55d9
    python3 -m venv venv && venv/bin/pip install torch==2.13.0 "numpy<2" transformers==4.35.2 safetensors
    venv/bin/python make_syncdoth.py --source source -o tests/golden

transformers must be as old as that: the repository imports `top_k_top_p_filtering`, which later releases removed. Its
import of timm's `drop_path` is met by a placeholder where timm is missing; a model in eval mode never calls it.

Each case is a folder `syncdoth-<case>/` with `config.json`, the weights, `expected.npz` (tokens and logits) and
`meta.json`. The committed files were made with torch 2.13.0 (CPU), numpy 1.26.4, transformers 4.35.2, Python 3.11,
from the classes that compute the logits in `retnet/{configuration,modeling}_retnet.py` of commit 083360cc55d9, copied
by hand from a public index of GitHub (without the generation helpers, the optional apex and xformers branches).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB = 19
BATCH, LENGTH = 2, 64
CHUNK = 16
MAX_FOLDER_BYTES = 150_000
COMMIT = "083360cc55d9051a0e449baf95271e6a9806894a"

SMALL = {
    "vocab_size": VOCAB,
    "decoder_embed_dim": 16,
    "decoder_value_embed_dim": 20,
    "decoder_ffn_embed_dim": 18,
    "decoder_layers": 2,
    "decoder_retention_heads": 2,
}


@dataclass(frozen=True)
class Case:
    """One golden folder: `settings` are RetNetConfig's arguments, `weights` the form the tensors are saved in."""

    name: str
    note: str
    settings: dict[str, object] = field(default_factory=dict)
    weights: str = "safetensors"
    dtype: torch.dtype = torch.float32
    seed: int = 0


CASES = (
    Case(
        "default",
        "RetNetConfig's defaults: pre-norm, GLU with gelu, embeddings not scaled. Dk 8, Dv 12; pytorch_model.bin.",
        {"decoder_value_embed_dim": 24},
        weights="bin",
    ),
    Case(
        "lm-decay",
        "use_lm_decay: 1 - exp(linspace(log 1/32, log 1/512, heads)). Three heads, Dk 6, Dv 7, in shards.",
        {
            "use_lm_decay": True,
            "decoder_embed_dim": 18,
            "decoder_value_embed_dim": 21,
            "decoder_retention_heads": 3,
        },
        weights="sharded",
    ),
    Case(
        "ffn",
        "use_glu=False with subln (the default): biased FFN with a LayerNorm before fc2.",
        {"use_glu": False},
    ),
    Case(
        "ffn-rms-fp16",
        "use_glu=False, use_ffn_rms_norm=True, relu; saved in fp16, the buffers angle and decay too.",
        {"use_glu": False, "use_ffn_rms_norm": True, "activation_fn": "relu"},
        dtype=torch.float16,
    ),
    Case(
        "embedding",
        "layernorm_embedding after embeddings scaled by sqrt(width); swish; an eps of 1e-5.",
        {"layernorm_embedding": True, "no_scale_embedding": False, "activation_fn": "swish", "layernorm_eps": 1e-5},
    ),
    Case(
        "deepnorm",
        "deepnorm=True: post-norm, residual times (2 layers)^(1/4), no layer_norm. Without GLU, so without subln.",
        {"deepnorm": True, "use_glu": False},
    ),
    Case(
        "tied",
        "tie_word_embeddings, with embeddings scaled by sqrt(width): lm_head.weight is not in the safetensors file.",
        {"tie_word_embeddings": True, "no_scale_embedding": False},
        seed=3,
    ),
)


def import_source(source: Path) -> tuple[Any, Any]:
    """Returns RetNetConfig and RetNetForCausalLM of a checkout of syncdoth/RetNet."""
    if not (source / "retnet" / "modeling_retnet.py").is_file():
        raise SystemExit(f"{source} has no retnet/modeling_retnet.py: --source takes a checkout of syncdoth/RetNet")
    try:
        importlib.import_module("timm.models.layers")
    except ImportError:
        for name in ("timm", "timm.models", "timm.models.layers"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["timm.models.layers"].drop_path = None  # type: ignore[attr-defined]
    sys.path.insert(0, str(source))
    config = importlib.import_module("retnet.configuration_retnet").RetNetConfig
    model = importlib.import_module("retnet.modeling_retnet").RetNetForCausalLM
    return config, model


@torch.no_grad()
def randomise(model: Any, tokens: torch.Tensor, seed: int) -> None:
    """Gives every parameter random values (norms and biases too), such that the logits have a std of about 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "model.embed_tokens.weight":
            parameter.normal_(0, model.model.embed_scale**-1, generator=generator)
        elif parameter.ndim == 2:
            parameter.normal_(0, 1.2 * parameter.shape[1] ** -0.5, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, 0.3, generator=generator)
    base = model.model
    final = base.layer_norm if base.layer_norm is not None else base.layers[-1].final_layer_norm
    target = final.weight if model.lm_head.weight is base.embed_tokens.weight else model.lm_head.weight
    target /= model(tokens, forward_impl="parallel").logits.std()


@torch.no_grad()
def run_recurrent(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits (B, T, V) of the recurrent form, one token a step with `past_key_values`."""
    past, steps = None, []
    for n in range(tokens.shape[1]):
        result = model(tokens[:, : n + 1], forward_impl="recurrent", past_key_values=past, use_cache=True)
        past = result.past_key_values
        steps.append(result.logits[:, -1])
    return torch.stack(steps, dim=1).numpy()


@torch.no_grad()
def run_whole(model: Any, tokens: torch.Tensor, form: str) -> np.ndarray:
    """Returns the logits (B, T, V) of the parallel or chunkwise form."""
    return model(tokens, forward_impl=form, recurrent_chunk_size=CHUNK).logits.numpy()


def make_case(case: Case, out: Path, config_class: Any, model_class: Any) -> str:
    """Writes one golden folder. Returns a line for the summary."""
    folder = out / f"syncdoth-{case.name}"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(1, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2000 + case.seed))
    config = config_class(**{**SMALL, **case.settings})
    model = model_class(config).eval()
    randomise(model, tokens, seed=case.seed + 11)
    shard = "12KB" if case.weights == "sharded" else "10GB"
    model.to(case.dtype).save_pretrained(folder, safe_serialization=case.weights != "bin", max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        path.chmod(0o644)

    # The expected values come from the saved files, loaded by transformers and computed in float32.
    model, info = model_class.from_pretrained(folder, torch_dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise RuntimeError(f"{folder}: {kind} after loading: {info[kind]}")
    model.eval()
    arrays = {"parallel": run_whole(model, tokens, "parallel"), "recurrent": run_recurrent(model, tokens)}
    chunkwise = run_whole(model, tokens, "chunkwise")
    if case.dtype != torch.float32:
        exact = model_class(config)
        model.model.retnet_rel_pos.load_state_dict(exact.model.retnet_rel_pos.state_dict())
        arrays["recurrent_exact_buffers"] = run_recurrent(model, tokens)
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy(), **arrays)

    difference = float(np.abs(arrays["parallel"] - arrays["recurrent"]).max())
    meta = {
        "case": case.name,
        "note": case.note,
        "package": "syncdoth/RetNet",
        "package_version": COMMIT,
        "package_copied_by_hand": True,
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "files": sorted(path.name for path in folder.iterdir() if path.name not in ("expected.npz", "meta.json")),
        "saved_dtype": str(case.dtype).removeprefix("torch."),
        "logits_std": float(arrays["recurrent"].std()),
        "max_abs_parallel_minus_recurrent": difference,
        "max_abs_chunkwise_minus_recurrent": float(np.abs(chunkwise - arrays["recurrent"]).max()),
        "chunk_size": CHUNK,
        "settings": {**SMALL, **case.settings},
    }
    if case.dtype != torch.float32:
        meta["max_abs_saved_buffers_minus_exact_buffers"] = float(
            np.abs(arrays["recurrent_exact_buffers"] - arrays["recurrent"]).max()
        )
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > MAX_FOLDER_BYTES:
        raise RuntimeError(f"{folder} has {size} bytes; at most {MAX_FOLDER_BYTES} are wanted: make the model smaller")
    std = meta["logits_std"]
    return f"{folder.name:36} {size / 1000:6.1f} kB  logits std {std:.2f}  parallel-recurrent {difference:.1e}"


def main() -> None:
    """Makes every case, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder that gets the syncdoth-… folders")
    parser.add_argument("--source", type=Path, required=True, help="checkout of github.com/syncdoth/RetNet")
    parser.add_argument("cases", nargs="*", help="names of cases; all when left out")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    config_class, model_class = import_source(options.source.resolve())
    for case in CASES:
        if not options.cases or case.name in options.cases:
            print(make_case(case, options.out, config_class, model_class), flush=True)


if __name__ == "__main__":
    main()
