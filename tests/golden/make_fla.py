"""Golden files of the fla family (flash-linear-attention, Hugging Face `model_type: retnet`), made with fla itself.

fla's kernels are written in Triton, so this needs an NVIDIA GPU:

    python3 -m pip install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0  # torch, triton, transformers 5 too
    python3 make_fla.py -o DIR

Each case is a folder `fla-<case>/` with `config.json`, the weights as safetensors, `expected.npz` and `meta.json`
(versions, device, precision). `expected.npz` has `tokens` (2, 64) and two sets of logits (2, 64, V), float32:
- `recurrent`: one token a call with fla's cache, mode `fused_recurrent`. Its kernel has no matrix product, so nothing
  in it can be TF32: this is the reference.
- `parallel`: all tokens in one call, mode `chunk`. fla chooses `fused_recurrent` up to 64 tokens unless gradients are
  enabled, so they are. Triton's float32 products are asked to be exact (TRITON_F32_DEFAULT=ieee); `meta.json` has the
  difference that remains.
All folders go into DIR/fla-golden.tar as well.

`--also FOLDER --tokens FILE.npy` loads an existing checkpoint (of either form of `mlp.gate_proj`) and writes its logits
on the first 64 tokens of the file to DIR/also-<name>.npz. `--build-only` makes checkpoints without logits, on any
machine.

The committed files name their versions in `meta.json`; the script was written against fla 0.6.0.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import platform
import tarfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from safetensors.torch import load_file, save_file

# Tuning tries hundreds of kernel variants for minutes; any one of them computes the same function.
_autotune = triton.autotune
triton.autotune = lambda configs, key, **rest: _autotune(configs[:1], key, **rest)

VOCAB = 19
BATCH, LENGTH = 2, 64
INDEX = "model.safetensors.index.json"

SMALL = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "expand_v": 1.0,
    "intermediate_size": 24,
    "vocab_size": VOCAB,
}


@dataclass(frozen=True)
class Case:
    """One golden folder.

    `settings` are RetNetConfig's arguments, `dtype` what the weights are rounded to; `packed` rewrites the FFN as files
    of before 2025-02-09 have it; `shards` is how many safetensors files the weights are spread over.
    """

    name: str
    note: str
    settings: dict[str, object] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    packed: bool = False
    shards: int = 1
    seed: int = 0


CASES = (
    Case("default", "fla's defaults but for sizes, in float32. Dk 16, Dv 24.", {"expand_v": 1.5}, dtype=torch.float32),
    Case(
        "unfused",
        "fuse_norm=False and fuse_swiglu=False: the head norm is attn.g_norm.",
        {"fuse_norm": False, "fuse_swiglu": False},
    ),
    Case(
        "tied",
        "tie_word_embeddings: the file has no lm_head.weight. Dv 24.",
        {"tie_word_embeddings": True, "expand_v": 1.5},
    ),
    Case(
        "kv-heads",
        "Four query heads share two key/value heads (num_kv_heads=2); expand_k 2, so Dk 16, Dv 16.",
        {"num_heads": 4, "num_kv_heads": 2, "expand_k": 2.0, "expand_v": 2.0},
    ),
    Case("no-gate", "use_output_gate=False: no attn.g_proj, and attn.g_norm.", {"use_output_gate": False}),
    Case(
        "no-affine",
        "elementwise_affine=False (no weight in the head norm), norm_eps 1e-5, three heads with Dk 16, Dv 16.",
        {"elementwise_affine": False, "norm_eps": 1e-5, "num_heads": 3, "expand_k": 1.5, "expand_v": 1.5},
    ),
    Case(
        "packed-sharded",
        "mlp.gate_proj holds gate and up rows (files of before 2025-02-09), in two shards with an index; float16.",
        {},
        dtype=torch.float16,
        packed=True,
        shards=2,
    ),
)


def package_version(name: str) -> str:
    """Returns an installed package's version, or a word that it has none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@torch.no_grad()
def randomise(model: Any, seed: int) -> None:
    """Gives every parameter random values, norms too. Drawn on the CPU, so every machine makes the same checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name == "model.embeddings.weight":
            parameter.normal_(0, 1, generator=generator)
        elif parameter.ndim == 2:
            parameter.normal_(0, 1.2 * parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    # The final norm's output has a mean square of about mean(weight²) = 13/12; this makes the logits' std about 1.
    if model.config.tie_word_embeddings:
        model.model.norm.weight.mul_((13 / 12 * model.config.hidden_size) ** -0.5)
    else:
        model.lm_head.weight.div_(1.2 * (13 / 12) ** 0.5)


def pack_gates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Writes gate and up projection as one: rows of the gate first, as fla did before 2025-02-09."""
    packed = {}
    for name, tensor in state.items():
        if name.endswith("mlp.gate_proj.weight"):
            packed[name] = torch.cat([tensor, state[name.replace("gate_proj", "up_proj")]])
        elif not name.endswith("mlp.up_proj.weight"):
            packed[name] = tensor
    return packed


def unpack_gates(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Splits projections that `pack_gates` (or an old fla) wrote; other checkpoints are returned as they are."""
    unpacked = dict(state)
    for name, tensor in state.items():
        up = name.replace("gate_proj", "up_proj")
        if name.endswith("mlp.gate_proj.weight") and up not in state:
            unpacked[name], unpacked[up] = tensor.chunk(2)
    return unpacked


def save_weights(folder: Path, state: dict[str, torch.Tensor], shards: int) -> list[str]:
    """Writes safetensors files as transformers names them. Returns their names, the index too."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return ["model.safetensors"]
    names = list(state)
    files, weight_map = [], {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        files.append(f"model-{i + 1:05d}-of-{shards:05d}.safetensors")
        save_file({name: state[name] for name in part}, folder / files[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, files[-1]))
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*files, INDEX]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Reads a folder's tensors, sharded or not, safetensors or pytorch_model.bin."""
    files = sorted(folder.glob("*.safetensors"))
    state: dict[str, torch.Tensor] = {}
    for file in files:
        state.update(load_file(file))
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        state.update(torch.load(file, weights_only=True, map_location="cpu"))
    if not state:
        raise FileNotFoundError(f"{folder} has neither *.safetensors nor pytorch_model*.bin")
    return unpack_gates(state)


def load_model(folder: Path, device: str) -> Any:
    """Builds a checkpoint's model in float32 with fla's registered class, and loads every tensor of it."""
    import fla  # noqa: F401 - registers RetNet with transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(load_weights(folder), strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise RuntimeError(f"{folder}: missing {sorted(set(missing) - tied)}, unexpected {unexpected}")
    model.tie_weights()
    return model.to(device=device, dtype=torch.float32).eval().requires_grad_(False)


def run_chunk(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits (B, T, V) of one call in mode `chunk`, which fla takes while gradients are enabled."""
    with torch.enable_grad():
        return model(input_ids=tokens, use_cache=False).logits.detach().float().cpu().numpy()


@torch.no_grad()
def run_fused_recurrent(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits (B, T, V) of one call in mode `fused_recurrent`, which fla takes for up to 64 tokens."""
    return model(input_ids=tokens, use_cache=False).logits.float().cpu().numpy()


@torch.no_grad()
def run_steps(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits (B, T, V) of one token a call, with fla's cache."""
    past, steps = None, []
    for n in range(tokens.shape[1]):
        result = model(input_ids=tokens[:, n : n + 1], past_key_values=past, use_cache=True)
        past = result.past_key_values
        steps.append(result.logits[:, -1])
    return torch.stack(steps, dim=1).float().cpu().numpy()


def run_all(model: Any, tokens: torch.Tensor) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Runs every form. Returns the arrays of expected.npz, and what meta.json says of them.

    Where stepping with the cache or mode `chunk` fails, the one-call recurrent form stands in, and meta.json says so.
    """
    whole = run_fused_recurrent(model, tokens)
    facts: dict[str, object] = {}

    def attempt(name: str, form: str, function: Callable[[Any, torch.Tensor], np.ndarray]) -> np.ndarray:
        facts[f"{name}_from"] = form
        try:
            return function(model, tokens)
        except Exception as error:  # noqa: BLE001 - one form that fails must not lose the others
            traceback.print_exc()
            facts[f"{name}_from"] = f"one fused_recurrent call, since this failed: {form}: {error!r}"
            return whole

    recurrent = attempt("recurrent", "one token a call, with fla's cache", run_steps)
    parallel = attempt("parallel", "one call, mode chunk", run_chunk)
    facts |= {
        "logits_std": float(recurrent.std()),
        "max_abs_parallel_minus_recurrent": float(np.abs(parallel - recurrent).max()),
        "max_abs_one_call_recurrent_minus_steps": float(np.abs(whole - recurrent).max()),
    }
    return {"parallel": parallel, "recurrent": recurrent}, facts


def describe_machine(device: str) -> dict[str, object]:
    """Returns the versions, the device and the precision that a run has."""
    packages = ("fla-core", "flash-linear-attention", "torch", "triton", "transformers", "numpy", "safetensors")
    return {
        "package": "flash-linear-attention",
        "package_version": package_version("flash-linear-attention"),
        "versions": {name: package_version(name) for name in packages},
        "python_version": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "compute_dtype": "float32",
        "torch_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "triton_f32_default": os.environ["TRITON_F32_DEFAULT"],
    }


def build_case(case: Case, folder: Path) -> dict[str, object]:
    """Writes a case's config and weights. Returns meta.json's first part."""
    from fla.models import RetNetConfig, RetNetForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = RetNetConfig(**{**SMALL, **case.settings})
    model = RetNetForCausalLM(config).float()
    randomise(model, seed=case.seed + 21)
    state = {name: tensor.detach().to(case.dtype) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    if case.packed:
        state = pack_gates(state)
    config.architectures = ["RetNetForCausalLM"]
    config.dtype = case.dtype
    config.save_pretrained(folder)
    return {
        "case": case.name,
        "note": case.note,
        "files": ["config.json", *save_weights(folder, state, case.shards)],
        "saved_dtype": str(case.dtype).removeprefix("torch."),
        "packed_gate_proj": case.packed,
        "settings": {**SMALL, **case.settings},
    }


def make_case(case: Case, out: Path, device: str | None) -> str:
    """Writes one golden folder; without logits if there is no device. Returns a line for the summary."""
    folder = out / f"fla-{case.name}"
    meta = build_case(case, folder)
    line = f"{folder.name:24} {sum(path.stat().st_size for path in folder.iterdir()) / 1000:6.1f} kB"
    if device is None:
        load_model(folder, "cpu")
    else:
        tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3000 + case.seed))
        arrays, facts = run_all(load_model(folder, device), tokens.to(device))
        np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy(), **arrays)
        meta |= {**describe_machine(device), **facts}
        line += (
            f"  logits std {facts['logits_std']:.2f}  parallel-recurrent "
            f"{facts['max_abs_parallel_minus_recurrent']:.1e}  one call-steps "
            f"{facts['max_abs_one_call_recurrent_minus_steps']:.1e}"
        )
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    return line


def make_also(checkpoint: Path, tokens_file: Path, out: Path, device: str) -> str:
    """Writes an existing checkpoint's logits on the first 64 tokens of a file. Returns a line for the summary."""
    tokens = np.load(tokens_file).astype(np.int64).reshape(-1)[:LENGTH][None]
    arrays, facts = run_all(load_model(checkpoint, device), torch.from_numpy(tokens).to(device))
    # The recurrent logits alone: 64 x 32,000 floats are 8 MB.
    name = checkpoint.resolve().name
    np.savez_compressed(out / f"also-{name}.npz", tokens=tokens, recurrent=arrays["recurrent"])
    (out / f"also-{name}.json").write_text(json.dumps({**describe_machine(device), **facts}, indent=1) + "\n")
    return f"{checkpoint}: {json.dumps(facts)}"


def main() -> int:
    """Makes every case; a case that fails is reported and the others are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder that gets the fla-… folders and the tar")
    parser.add_argument("--also", type=Path, help="an existing checkpoint folder, whose logits are saved as well")
    parser.add_argument("--tokens", type=Path, help="token ids (.npy) for --also")
    parser.add_argument("--build-only", action="store_true", help="make checkpoints only, without logits (no GPU)")
    parser.add_argument("cases", nargs="*", help="names of cases; all when left out")
    options = parser.parse_args()
    if (options.also is None) != (options.tokens is None):
        parser.error("--also and --tokens go together")
    if not options.build_only and not torch.cuda.is_available():
        parser.error("fla's kernels need a CUDA device, and torch sees none; --build-only makes checkpoints without one")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    device = None if options.build_only else "cuda"
    options.out.mkdir(parents=True, exist_ok=True)

    failures, start = [], time.monotonic()

    def attempt(name: str, function: Any, *arguments: object) -> None:
        try:
            print(f"{time.monotonic() - start:6.1f} s  {function(*arguments)}", flush=True)
        except Exception:  # noqa: BLE001 - one case must not lose the others; the traceback is printed
            failures.append(name)
            print(f"{time.monotonic() - start:6.1f} s  {name} FAILED\n{traceback.format_exc()}", flush=True)

    for case in CASES:
        if not options.cases or case.name in options.cases:
            attempt(case.name, make_case, case, options.out, device)
    with tarfile.open(options.out / "fla-golden.tar", "w") as tar:
        for folder in sorted(options.out.glob("fla-*/")):
            tar.add(folder, arcname=folder.name)
    if options.also is not None and device is not None:
        attempt("also", make_also, options.also, options.tokens, options.out, device)
    print(json.dumps(describe_machine(device or "cpu")))
    print(f"failed: {', '.join(failures) or 'none'}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
