"""The model card of a bundle, README.md: what the Hugging Face Hub shows of it, and what its reader needs to run it.

Rule: everything in it comes from the manifest. It is not in the manifest, so a publisher can edit
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from retnet_export.runtime.bundle.bundle import CARD
from retnet_export.runtime.bundle.manifest import Manifest
from retnet_export.runtime.bundle.weights import parameters
from retnet_export.runtime.hub import NAME


def write_card(folder: Path, manifest: Manifest) -> None:
    """Write README.md into a bundle's folder."""
    (folder / CARD).write_text(card(manifest), encoding="utf-8")


def card(manifest: Manifest) -> str:
    """The card: YAML for the Hub between two lines of dashes, then Markdown."""
    parts = [
        _front_matter(manifest),
        f"# {manifest.name}",
        _introduction(manifest),
        _table("", [*facts(manifest), ("graphs", ", ".join(manifest.variants))]),
    ]
    if (quality := _quality(manifest)) is not None:
        parts += ["## What quantization costs", quality]
    parts += ["## Run it", _usage(manifest)]
    return "\n\n".join(parts) + "\n"


def _base_model(manifest: Manifest) -> str | None:
    """The repository on the Hub that it was exported from, if it was one: "user/name"."""
    match = NAME.fullmatch(str(manifest.provenance.get("checkpoint", "")))
    return match["repository"] if match is not None and match["revision"] is not None else None


def _front_matter(manifest: Manifest) -> str:
    lines = ["library_name: retnet-export", "pipeline_tag: text-generation"]
    if (base := _base_model(manifest)) is not None:
        lines.append(f"base_model: {base}")
        if manifest.quantization is not None:
            lines.append("base_model_relation: quantized")
    lines += ["tags:", *(f"- {tag}" for tag in ("retnet", "onnx", "retnet-export", *_formats(manifest)))]
    return "\n".join(["---", *lines, "---"])


def _formats(manifest: Manifest) -> list[str]:
    return [] if manifest.quantization is None else [str(manifest.quantization["weights"])]


def _introduction(manifest: Manifest) -> str:
    base, checkpoint = _base_model(manifest), manifest.provenance.get("checkpoint")
    made_from = f"[{base}](https://huggingface.co/{base})" if base else f"`{checkpoint}`"
    how = "" if manifest.quantization is None else f", its weights rounded to {manifest.precision.weights}"
    return (
        f"A RetNet as recurrent ONNX graphs with explicit state, made from {made_from}{how} by retnet-export. "
        "It runs without PyTorch; its state has the same size after one token and after a million."
    )


def facts(manifest: Manifest) -> list[tuple[str, str]]:
    """Sizes and number formats, as text."""
    config, precision, record = manifest.model, manifest.precision, manifest.quantization
    heads = f"{config.num_heads} heads of {config.head_key_dim} × {config.head_value_dim}"
    rows = [
        ("parameters", f"{parameters(config):,}"),
        ("architecture", f"{config.num_layers} layers, width {config.hidden_size}, {heads}, vocabulary {config.vocab_size:,}"),
        ("weights", f"{precision.weights}, {manifest.weights_bytes / 1e6:,.1f} MB"),
        ("products", precision.compute),
        ("state", f"{precision.state}, {manifest.state_bytes / 1e6:,.2f} MB a sequence, at any length"),
    ]
    if record is not None:
        group = record.get("group_size")
        scales = f"a scale for {group} inputs" if group else "a scale for each output"
        rows.append(("quantized", f"by {record['method']}, {scales}; embedding {record['embedding']}, head {record['head']}"))
        if record.get("activations"):
            rows.append(("activations", str(record["activations"])))
        if isinstance(text := record.get("calibration"), Mapping):
            rows.append(("calibrated on", f"{text['sequences'] * text['length']:,} tokens of {text['file']}"))
    return rows


def _quality(manifest: Manifest) -> str | None:
    """A table of what was measured against the float bundle; None if nothing was."""
    record: Any = (manifest.quantization or {}).get("evaluation")
    if record is None:
        return None
    rows = [("perplexity a token", f"{record['perplexity']:.3f}"), ("bits per byte", f"{record['bits_per_byte']:.4f}")]
    if (pair := record.get("comparison")) is not None:
        rows += [
            (f"perplexity of {pair['against']}", f"{pair['perplexity']:.3f} ({100 * (pair['perplexity_ratio'] - 1):+.2f} %)"),
            ("KL divergence, nats per token", f"{pair['kl_mean']:.2e}"),
            ("same best token", f"{100 * pair['agreement']:.2f} %"),
        ]
    return _table(f"On {record['tokens']:,} tokens of `{record['text']}`:", rows)


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*([title, ""] if title else []), *lines])


def _usage(manifest: Manifest) -> str:
    name = f"USER/{manifest.name}"
    if manifest.tokenizer is None:
        run = f'from retnet_export.runtime import load\n\nmodel = load("{name}")  # no tokenizer: token ids in, token ids out'
        return f"```sh\npip install 'retnet-export[cpu,hub]'\n```\n\n```python\n{run}\n```"
    return (
        "```sh\n"
        "pip install 'retnet-export[cpu,hub]'\n"
        f"retnet-export generate {name} --prompt 'Once upon a time'\n"
        f"retnet-export chat {name}\n"
        "```\n\n"
        f"`{name}` is the repository's name, or the path of the folder. To publish it: `hf upload {name} {manifest.name}.retnet`."
    )
