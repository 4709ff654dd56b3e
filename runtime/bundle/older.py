"""What to do with a bundle of another format: the commands that make it anew, from what its manifest still says.

Rule: nothing here is believed. A field that is not what it was in any version is left out, and the option with it.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from retnet_export.runtime.element_types import ELEMENT_TYPES


def advice(document: dict[str, Any], path: Path, version: int) -> str:
    """What a user does with a bundle whose manifest, `document`, is of another format than `version`.

    Args:
        document: the manifest's JSON.
        path: the bundle's folder.
        version: the format that is read here.
    """
    found = document.get("format_version")
    if isinstance(found, int) and found > version:
        return "it comes from a newer version: pip install --upgrade retnet-export"
    quantization = document.get("quantization")
    if not isinstance(quantization, dict):
        return f"make it again: {_export(document, str(path))}"
    between = f"{str(path).removesuffix('.retnet')}-{_precision(document)}.retnet"
    return f"make it again: {_export(document, between)} and then {_quantize(quantization, between, str(path))}"


def _export(document: dict[str, Any], target: str) -> str:
    graphs = document.get("graphs")
    variants = document.get("variants")  # from format 3 on
    portable = variants.get("portable") if isinstance(variants, dict) else None
    graphs = portable.get("graphs") if isinstance(portable, dict) else graphs
    prefill = graphs.get("prefill") if isinstance(graphs, dict) else None
    chunk = prefill.get("chunk_size") if isinstance(prefill, dict) else None
    options = ["--precision", _precision(document)]
    if _of(document, "precision", "state") == "float16":
        options += ["--state", "fp16"]
    if isinstance(chunk, int):
        options += ["--chunk", str(chunk)]
    return f"retnet-export export CHECKPOINT -o {shlex.quote(target)} --force {' '.join(options)}"


def _quantize(quantization: dict[str, Any], source: str, target: str) -> str:
    options = []
    for name in ("weights", "group_size", "method", "embedding", "head", "activations"):
        value = quantization.get(name)
        if isinstance(value, (str, int)) and str(value).isalnum():
            options += [f"--{name.replace('_', '-')}", str(value)]
    calibrated = isinstance(quantization.get("calibration"), dict)
    options += ["--calibration", "FILE"] if calibrated else []
    return f"retnet-export quantize {shlex.quote(source)} -o {shlex.quote(target)} --force {' '.join(options)}"


def _precision(document: dict[str, Any]) -> str:
    return ELEMENT_TYPES.get(str(_of(document, "precision", "compute")), ELEMENT_TYPES["float32"]).short


def _of(document: dict[str, Any], name: str, field: str) -> object:
    inner = document.get(name)
    return inner.get(field) if isinstance(inner, dict) else None
