"""Golden files of the torchscale (and fairseq) checkpoint family, made with torchscale itself.

Each case is a folder `torchscale-<case>/` with the checkpoint in the form users have it, `expected.npz` (tokens and the
logits torchscale computed from that checkpoint) and `meta.json` (versions, settings, how the file was made).

Run it in an environment of its own (this repository never imports torchscale):

    python3 -m venv venv && venv/bin/pip install torch==2.13.0 "numpy<2" fairscale==0.4.13
    venv/bin/pip install --no-deps torchscale==0.3.0
    venv/bin/python make_torchscale.py -o tests/golden

The committed files were made with torchscale 0.3.0, fairscale 0.4.13, torch 2.13.0 (CPU), numpy 1.26.4, Python 3.11.

Two places where torchscale 0.3.0 does not do everything alone:
- timm: torchscale imports one function of it, `drop_path`, which a model in eval mode never calls. Where timm cannot
  be imported (it needs a torchvision built for the same torch), a placeholder that raises takes its place.
- The `old-…` cases have the modules RetNets had before 2023-09-28 (never released on PyPI: 0.2.0 has no RetNet). They
  are 0.3.0's decoder with those modules put in: LayerNorm for RMSNorm, biased projections, a LayerNorm without weights
  after the heads, and 0.3.0's own FeedForwardNetwork for the GLU. The forward pass is 0.3.0's.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import types
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

VOCAB = 19
BATCH, LENGTH = 2, 64
CHUNK = 16
MAX_FOLDER_BYTES = 150_000


def provide_drop_path() -> bool:
    """Lets torchscale be imported without timm. Returns whether the placeholder was needed."""
    try:
        import timm.models.layers  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("timm", "timm.models", "timm.models.layers"):
            sys.modules[name] = types.ModuleType(name)

        def drop_path(*_args: object) -> None:
            raise NotImplementedError("timm is not installed, and golden models have drop_path_rate 0")

        sys.modules["timm.models.layers"].drop_path = drop_path  # type: ignore[attr-defined]
        return True
    return False


TIMM_PLACEHOLDER = provide_drop_path()

RetNetConfig = import_module("torchscale.architecture.config").RetNetConfig
RetNetDecoder = import_module("torchscale.architecture.retnet").RetNetDecoder
FeedForwardNetwork = import_module("torchscale.component.feedforward_network").FeedForwardNetwork

SMALL = {
    "decoder_embed_dim": 16,
    "decoder_value_embed_dim": 20,
    "decoder_ffn_embed_dim": 18,
    "decoder_layers": 2,
    "decoder_retention_heads": 2,
    "vocab_size": VOCAB,
}


@dataclass(frozen=True)
class Case:
    """One golden folder.

    `settings` are RetNetConfig's arguments, `override` the fairseq arguments that RetNetConfig.override applies after
    them; `layout` is how the checkpoint is stored; `dtype` what the tensors are rounded to; `old` selects the modules
    of before 2023-09-28.
    """

    name: str
    note: str
    settings: dict[str, object] = field(default_factory=dict)
    override: dict[str, object] = field(default_factory=dict)
    layout: str = "plain"
    dtype: torch.dtype = torch.float32
    old: bool = False
    chunkwise: bool = False
    seed: int = 0


# What fairseq's LanguageConfig and retnet_base_architecture (torchscale/examples/fairseq/models/retnet.py) set, where
# it differs from RetNetConfig's own defaults.
FAIRSEQ = {
    "activation_fn": "swish",
    "dropout": 0.1,
    "decoder_normalize_before": True,
    "no_scale_embedding": False,
    "subln": False,
    "deepnorm": False,
}

# The fields of LanguageConfig that reach a checkpoint. It has none for vocab_size, layernorm_eps or multiway; before
# 2023-09-28 it had none for decoder_value_embed_dim either (values were twice as wide as the embedding).
FAIRSEQ_FIELDS = (
    "activation_fn",
    "dropout",
    "activation_dropout",
    "decoder_embed_dim",
    "decoder_value_embed_dim",
    "decoder_ffn_embed_dim",
    "decoder_layers",
    "decoder_retention_heads",
    "decoder_normalize_before",
    "share_decoder_input_output_embed",
    "layernorm_embedding",
    "no_scale_embedding",
    "checkpoint_activations",
    "moe_freq",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_top1_expert",
    "use_xmoe",
    "chunkwise_recurrent",
    "recurrent_chunk_size",
    "max_target_positions",
    "deepnorm",
    "subln",
)

CASES = (
    Case(
        "default",
        "RetNetConfig's defaults: pre-norm, GLU with gelu, embeddings not scaled. Four heads, Dk 8, Dv 9.",
        {
            "decoder_embed_dim": 32,
            "decoder_value_embed_dim": 36,
            "decoder_ffn_embed_dim": 20,
            "decoder_retention_heads": 4,
        },
        chunkwise=True,
    ),
    Case(
        "three-heads",
        "Head sizes that are no powers of two: three heads, Dk 6, Dv 7; relu.",
        {"decoder_embed_dim": 18, "decoder_value_embed_dim": 21, "decoder_retention_heads": 3, "activation_fn": "relu"},
    ),
    Case(
        "layernorm-embedding",
        "RMSNorm after the embedding (which is scaled first), and an eps of 1e-5.",
        {"layernorm_embedding": True, "no_scale_embedding": False, "layernorm_eps": 1e-5},
    ),
    Case(
        "shared-scaled-embedding",
        "Output projection tied to the embedding, and embeddings multiplied by sqrt(width) at the input only.",
        {"share_decoder_input_output_embed": True, "no_scale_embedding": False},
    ),
    Case("deepnorm", "deepnorm=True in RetNetConfig: post-norm, residual times (2 layers)^(1/4).", {"deepnorm": True}),
    Case(
        "postnorm",
        "Post-norm without deepnorm (subln=False and decoder_normalize_before=False).",
        {"subln": False, "decoder_normalize_before": False},
    ),
    Case(
        "fairseq",
        "A fairseq checkpoint with fairseq's defaults (swish, scaled embeddings), saved with its settings as a "
        "Namespace in `args` and again as a dict in `cfg`.",
        override=FAIRSEQ,
        layout="fairseq",
    ),
    Case(
        "fairseq-deepnorm",
        "deepnorm set through fairseq: RetNetConfig.override runs after __init__, so the model stays pre-norm with "
        "layer_norm, and only the residual factor (2 layers)^(1/4) is applied.",
        override={**FAIRSEQ, "deepnorm": True},
        layout="fairseq-cfg",
    ),
    Case(
        "old-subln",
        "Modules of before 2023-09-28 with subln: biased projections and FFN, LayerNorm everywhere, ffn_layernorm.",
        {"decoder_value_embed_dim": 32, "activation_fn": "gelu"},
        old=True,
    ),
    Case(
        "old-fairseq",
        "Modules of before 2023-09-28 as fairseq trained them (subln False, swish, scaled embeddings, layernorm_embedding).",
        {"decoder_value_embed_dim": 32},
        {**FAIRSEQ, "layernorm_embedding": True},
        layout="fairseq-cfg",
        old=True,
    ),
    Case("fp16", "Saved in fp16, the buffers angle and decay too.", dtype=torch.float16, seed=5),
    Case("bf16", "Saved in bf16, the buffers angle and decay too.", dtype=torch.bfloat16, seed=5),
)


def build_model(case: Case) -> tuple[RetNetDecoder, RetNetConfig]:
    """Builds a case's decoder, uninitialised, as torchscale and its fairseq example build it."""
    config = RetNetConfig(**{**SMALL, **case.settings})
    config.override(argparse.Namespace(**case.override))
    embedding = nn.Embedding(VOCAB, config.decoder_embed_dim, padding_idx=1 if case.layout != "plain" else None)
    model = RetNetDecoder(config, embed_tokens=embedding)
    if case.old:
        put_in_old_modules(model, config)
    return model.eval(), config


def put_in_old_modules(model: RetNetDecoder, config: RetNetConfig) -> None:
    """Replaces modules by those of torchscale before 2023-09-28.

    Source: microsoft/torchscale, torchscale/component/multiscale_retention.py at e2db7ae123e1 (biases, the head norm
    and its fixed eps of 1e-6); the LayerNorms and the FFN of architecture/retnet.py as in syncdoth/RetNet's first port.
    """
    width, eps = config.decoder_embed_dim, config.layernorm_eps
    value_width = config.decoder_value_embed_dim
    for layer in model.layers:
        layer.retention_layer_norm = nn.LayerNorm(width, eps=eps)
        layer.final_layer_norm = nn.LayerNorm(width, eps=eps)
        layer.ffn = FeedForwardNetwork(width, config.decoder_ffn_embed_dim, config.activation_fn, 0.0, 0.0, eps, config.subln)
        retention = layer.retention
        retention.q_proj, retention.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        retention.v_proj, retention.g_proj = nn.Linear(width, value_width), nn.Linear(width, value_width)
        retention.out_proj = nn.Linear(value_width, width)
        retention.group_norm = nn.LayerNorm(retention.head_dim, eps=1e-6, elementwise_affine=False)
    if model.layer_norm is not None:
        model.layer_norm = nn.LayerNorm(width, eps=eps)
    if model.layernorm_embedding is not None:
        model.layernorm_embedding = nn.LayerNorm(width, eps=eps)


@torch.no_grad()
def randomise(model: RetNetDecoder, tokens: torch.Tensor, seed: int) -> None:
    """Gives every parameter random values (norms and biases too), such that the logits have a std of about 1."""
    generator = torch.Generator().manual_seed(seed)
    embedding_std = model.embed_scale**-1
    for name, parameter in model.named_parameters():
        if name == "embed_tokens.weight":
            parameter.normal_(0, embedding_std, generator=generator)
        elif parameter.ndim == 2:
            parameter.normal_(0, 1.2 * parameter.shape[1] ** -0.5, generator=generator)
        elif "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0, 0.3, generator=generator)
    final = model.layer_norm if model.layer_norm is not None else model.layers[-1].final_layer_norm
    tied = model.output_projection.weight is model.embed_tokens.weight
    target = final.weight if tied else model.output_projection.weight
    target /= model(tokens)[0].std()


@torch.no_grad()
def run_parallel(model: RetNetDecoder, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits (B, T, V) of the parallel form."""
    return model(tokens)[0].numpy()


@torch.no_grad()
def run_recurrent(model: RetNetDecoder, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits (B, T, V) of the recurrent form, one token a step with `incremental_state`."""
    state: dict[object, object] = {}
    steps = [model(tokens[:, : n + 1], incremental_state=state)[0][:, -1] for n in range(tokens.shape[1])]
    return torch.stack(steps, dim=1).numpy()


@torch.no_grad()
def run_chunkwise(model: RetNetDecoder, tokens: torch.Tensor) -> np.ndarray:
    """Returns the logits (B, T, V) of the chunkwise form."""
    other = copy.deepcopy(model)
    other.chunkwise_recurrent = True
    other.recurrent_chunk_size = other.retnet_rel_pos.recurrent_chunk_size = CHUNK
    return other(tokens)[0].numpy()


def save_checkpoint(folder: Path, case: Case, config: RetNetConfig, state: dict[str, torch.Tensor]) -> list[str]:
    """Writes a case's checkpoint in its layout. Returns the names of the files."""
    settings = dict(vars(config))
    if case.layout == "plain":
        torch.save(state, folder / "model.pt")
        (folder / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
        return ["model.pt", "args.json"]
    settings = {name: settings[name] for name in FAIRSEQ_FIELDS}
    if case.old:
        del settings["decoder_value_embed_dim"]
    nested = {
        "model": {f"decoder.{key}": value for key, value in state.items()},
        "optimizer_history": [],
        "extra_state": {"epoch": 1},
        "last_optimizer_state": None,
    }
    cfg = {"_name": None, "model": {"_name": "retnet_base", **settings}, "task": {"_name": "language_modeling"}}
    torch.save({"args": None, "cfg": cfg, **nested}, folder / "checkpoint_cfg.pt")
    if case.layout == "fairseq-cfg":
        return ["checkpoint_cfg.pt"]
    namespace = argparse.Namespace(arch="retnet_base", task="language_modeling", **settings)
    torch.save({"args": namespace, "cfg": None, **nested}, folder / "checkpoint_namespace.pt")
    return ["checkpoint_cfg.pt", "checkpoint_namespace.pt"]


def describe_weights_only(path: Path) -> dict[str, str]:
    """Says what torch.load(weights_only=True) makes of a file, without and with argparse.Namespace allowed."""

    def attempt() -> str:
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # noqa: BLE001 - the kind of failure is what is recorded
            first_sentence = str(error).split(". ")[0]
            return f"{type(error).__name__}: {first_sentence[:120]}"
        return "loads"

    plain = attempt()
    with torch.serialization.safe_globals([argparse.Namespace]):
        return {"weights_only": plain, "weights_only with safe_globals([argparse.Namespace])": attempt()}


def make_case(case: Case, out: Path) -> str:
    """Writes one golden folder. Returns a line for the summary."""
    folder = out / f"torchscale-{case.name}"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = torch.randint(2, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1000 + case.seed))
    model, config = build_model(case)
    randomise(model, tokens, seed=case.seed + 1)
    state = {name: tensor.detach().to(case.dtype) for name, tensor in model.state_dict().items()}
    if config.share_decoder_input_output_embed:
        state["output_projection.weight"] = state["embed_tokens.weight"]
    files = save_checkpoint(folder, case, config, state)

    # The expected values come from the file's tensors, in a freshly built model, computed in float32.
    loaded = torch.load(folder / files[0], weights_only=True)
    loaded = {k.removeprefix("decoder."): v for k, v in loaded.get("model", loaded).items()}
    model, _ = build_model(case)
    model.load_state_dict(loaded, strict=True)
    arrays = {"parallel": run_parallel(model, tokens), "recurrent": run_recurrent(model, tokens)}
    chunkwise = run_chunkwise(model, tokens)
    if case.chunkwise:
        arrays["chunkwise"] = chunkwise
    if case.dtype != torch.float32:
        exact, _ = build_model(case)
        model.retnet_rel_pos.load_state_dict(exact.retnet_rel_pos.state_dict())
        arrays["recurrent_exact_buffers"] = run_recurrent(model, tokens)
    np.savez_compressed(folder / "expected.npz", tokens=tokens.numpy(), **arrays)

    difference = float(np.abs(arrays["parallel"] - arrays["recurrent"]).max())
    meta = {
        "case": case.name,
        "note": case.note,
        "package": "torchscale",
        "package_version": version("torchscale"),
        "old_modules_put_in": case.old,
        "torch_version": torch.__version__,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "timm_placeholder": TIMM_PLACEHOLDER,
        "fairseq_run": False,
        "files": files,
        "saved_dtype": str(case.dtype).removeprefix("torch."),
        "logits_std": float(arrays["recurrent"].std()),
        "max_abs_parallel_minus_recurrent": difference,
        "max_abs_chunkwise_minus_recurrent": float(np.abs(chunkwise - arrays["recurrent"]).max()),
        "chunk_size": CHUNK,
        "settings": vars(config),
        "torch_load": {name: describe_weights_only(folder / name) for name in files if name.endswith(".pt")},
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
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder that gets the torchscale-… folders")
    parser.add_argument("cases", nargs="*", help="names of cases; all when left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        if not options.cases or case.name in options.cases:
            print(make_case(case, options.out), flush=True)


if __name__ == "__main__":
    main()
