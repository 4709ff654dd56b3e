"""Train the bundled model: a 5.6M-parameter RetNet on English classics, in the parallel form.

    python examples/train.py --train train.txt --valid valid.txt --test test.txt -o examples/classics

The text is any plain UTF-8; the committed model saw Shakespeare's works, Milton's poems and the King James Bible, with
whole works held out (examples/classics/README.md). One minute an attempt on an H100; a CPU works too, in some hours.
The result is a Hugging Face folder in flash-linear-attention's format: config.json, model.safetensors, tokenizer.json.

Small models on little text overfit, so several dropout rates are tried and the text held out for validation chooses the
rate and the step; the test text is read once, at the end.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F

from retnet_export.export.checkpoints.fla import file_name
from retnet_export.export.model import RetNet
from retnet_export.runtime.bundle.config import ModelConfig

VOCAB_SIZE = 4096


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train."""

    epochs: float
    batch: int
    length: int
    learning_rate: float
    weight_decay: float
    dropout: float


@dataclass(frozen=True)
class Text:
    """A text as tokens, and its size, so that loss per token becomes bits per byte."""

    tokens: Tensor
    size_bytes: int


def train_tokenizer(text: str) -> Tokenizer:
    """Byte-pair encoding with byte fallback: any text can be encoded, and what the merges miss becomes bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # A word takes the space before it; line ends and punctuation stand alone.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|▁?[\p{L}']+|▁?\p{N}|▁?[^\s▁\p{L}\p{N}']+|▁+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=bytes_, show_progress=False)
    tokenizer.train_from_iterator((part + "\n\n" for part in text.split("\n\n")), trainer)
    # The trainer can only add the bytes as special tokens; as such, the text "<0x41>" would become a byte.
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(description))


def read(path: Path, tokenizer: Tokenizer) -> Text:
    raw = path.read_bytes()
    return Text(torch.tensor(tokenizer.encode(raw.decode()).ids), len(raw))


def bits_per_byte(model: RetNet, text: Text, chunk: int = 1024) -> float:
    """The text's cost under the model, read once from beginning to end with the state carried (chunkwise form)."""
    tokens = text.tokens.to(model.embedding.weight.device)
    state, nats = model.initial_state(1), 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, chunk):
            part = tokens[start : start + chunk]
            logits, state = model.chunk(part[None], state)
            targets = tokens[start + 1 : start + 1 + chunk]
            nats += F.cross_entropy(logits[0, : len(targets)].float(), targets, reduction="sum").item()
    return nats / math.log(2) / text.size_bytes


def initialise(model: RetNet) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            deviation = 0.02 / math.sqrt(2 * model.config.num_layers) if name.endswith(("out.weight", "down.weight")) else 0.02
            torch.nn.init.normal_(parameter, std=deviation)


def train(config: ModelConfig, recipe: Recipe, train_text: Text, valid_text: Text, device: str) -> tuple[dict[str, Tensor], float]:
    """One attempt: the weights with the lowest validation cost, and that cost in bits per byte."""
    torch.manual_seed(0)
    model = RetNet(config, recipe.dropout).to(device)
    initialise(model)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    tokens = train_text.tokens.to(device)
    steps = int(recipe.epochs * len(tokens) / (recipe.batch * recipe.length))
    warmup = max(1, steps // 20)
    best: dict[str, Tensor] = {}
    best_cost = math.inf
    began = time.monotonic()
    offsets = torch.arange(recipe.length + 1, device=device)
    for step in range(1, steps + 1):
        rate = min(step / warmup, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        starts = torch.randint(len(tokens) - recipe.length, (recipe.batch,), device=device)
        batch = tokens[starts[:, None] + offsets]
        with torch.autocast(device, torch.bfloat16):
            logits = model.parallel(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // 20) == 0 or step == steps:
            model.eval()
            cost = bits_per_byte(model, valid_text)
            model.train()
            if cost < best_cost:
                best_cost = cost
                best = {name: value.detach().half().cpu().clone() for name, value in model.state_dict().items()}
            print(
                f"dropout {recipe.dropout:.2f}  step {step:5d}/{steps}  train loss {loss.item():.3f} nats/token  "
                f"valid {cost:.4f} bits/byte  {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return best, best_cost


def fla_config(config: ModelConfig) -> dict[str, object]:
    """config.json as flash-linear-attention's RetNetConfig reads it."""
    return {
        "architectures": ["RetNetForCausalLM"],
        "model_type": "retnet",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_heads": config.num_heads,
        "expand_k": config.key_size / config.hidden_size,
        "expand_v": config.value_size / config.hidden_size,
        "intermediate_size": config.ffn_size,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": "float16",
    }


def main(
    train_file: Annotated[Path, typer.Option("--train", help="training text, UTF-8")],
    valid_file: Annotated[Path, typer.Option("--valid", help="text that chooses dropout and step")],
    test_file: Annotated[Path, typer.Option("--test", help="text for the reported figure")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write")],
    epochs: Annotated[float, typer.Option(help="passes over the training text, per attempt")] = 30.0,
    dropout: Annotated[list[float] | None, typer.Option(help="dropout rates to try")] = None,
    batch: Annotated[int, typer.Option(help="sequences a step")] = 32,
    length: Annotated[int, typer.Option(help="tokens a sequence")] = 512,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    """Train the tokenizer and the model, and write a Hugging Face folder."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(train_file.read_text(encoding="utf-8"))
    texts = {name: read(path, tokenizer) for name, path in (("train", train_file), ("valid", valid_file), ("test", test_file))}
    for name, text in texts.items():
        print(f"{name}: {len(text.tokens):,} tokens, {text.size_bytes / len(text.tokens):.2f} bytes a token")
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        num_layers=5,
        num_heads=4,
        num_kv_heads=4,
        head_key_dim=64,
        head_value_dim=128,
        ffn_size=512,
        tied_embeddings=True,
    )
    attempts = []
    for rate in dropout or [0.1, 0.2, 0.3]:
        recipe = Recipe(epochs, batch, length, learning_rate=2e-3, weight_decay=0.1, dropout=rate)
        attempts.append((*train(config, recipe, texts["train"], texts["valid"], device), recipe))
    weights, _, recipe = min(attempts, key=lambda attempt: attempt[1])

    model = RetNet.from_weights(config, lambda name: np.asarray(weights[name])).to(device)
    report = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "valid_bits_per_byte": round(bits_per_byte(model, texts["valid"]), 4),
        "test_bits_per_byte": round(bits_per_byte(model, texts["test"]), 4),
        "recipe": vars(recipe),
        "attempts": {str(tried.dropout): round(cost, 4) for _, cost, tried in attempts},
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "torch": torch.__version__,
    }
    save_file(
        {file_name(name, fused_norm=True): value.contiguous() for name, value in weights.items()},
        output / "model.safetensors",
        {"format": "pt"},
    )
    (output / "config.json").write_text(json.dumps(fla_config(config), indent=2) + "\n")
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    tokenizer.save(str(output / "tokenizer.json"))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    typer.run(main)
