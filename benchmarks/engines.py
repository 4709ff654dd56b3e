"""What TensorRT engines of large models move through memory at every step, from engines of one and two layers.

Every layer costs the same, so a model of N layers moves what an engine of one layer moves and N - 1 times what a second layer adds.
Nothing is run: TensorRT-RTX builds on a machine without a GPU, and the builder's log lists kernels and tensors
(export/tensorrt_anatomy.py).

    python benchmarks/engines.py --width 2048 --layers 24 --weights fp16,int8,int4 [--form prefill]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from common import retnet

from retnet_export.export.checkpoints.base import Checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.export.tensorrt import CompileOptions, compile_bundle
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.anatomy import Anatomy
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.engines import Form

COUNTED = ("kernels", "weight_bytes", "state_bytes", "other_bytes", "floor_bytes")


def bundle(folder: Path, model: ModelConfig, weights: str, head: str, chunk: int) -> Bundle:
    """Random weights, drawn as they are asked for; quantized without a search, which changes no byte count."""
    from retnet_export.graph.weights import weight_shapes

    shapes, generator = weight_shapes(model), np.random.default_rng(0)

    def read(name: str) -> np.ndarray:
        return (generator.standard_normal(shapes[name], np.float32) * 0.02).astype(np.float16)

    source = Checkpoint(path=folder, family="random", config=model, weight=read, files=())
    floats = export_bundle(source, folder / "f.retnet", ExportOptions(precision="fp16", chunk=chunk))
    if weights == "fp16":
        return floats
    return quantize_bundle(floats, folder / "q.retnet", QuantizeOptions(weights, head=head))


def anatomies(model: ModelConfig, weights: str, head: str, chunk: int, form: Form | None) -> dict[str, Anatomy]:
    with tempfile.TemporaryDirectory() as folder:
        made = bundle(Path(folder), model, weights, head, chunk)
        record = compile_bundle(made, CompileOptions("tensorrt-rtx", ("8.6",), form=form))
    if record.anatomy_missing:
        raise SystemExit(record.anatomy_missing)
    return {each.role: each for each in record.anatomy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--weights", default="fp16,int8,int4")
    parser.add_argument("--head", default="int8")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--form", choices=["joined", "prefill", "separate"])
    options = parser.parse_args()
    for weights in options.weights.split(","):
        one, two = (
            anatomies(
                retnet(layers, options.width, options.width // 256, 2 * options.width, options.vocabulary),
                weights,
                options.head,
                options.chunk,
                options.form,
            )
            for layers in (1, 2)
        )
        for role in one:
            first, second = (each[role] for each in (one, two))
            total = {
                name: getattr(first, name) + (options.layers - 1) * (getattr(second, name) - getattr(first, name))
                for name in COUNTED
            }
            total["bytes"] = sum(total[name] for name in ("weight_bytes", "state_bytes", "other_bytes"))
            row = {"weights": weights, "role": role, "tokens": first.tokens, "state_passes": second.state_passes, **total}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
