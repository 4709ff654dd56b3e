"""Decode speed on the CPU: tokens per second, flat in context, and where a token's time goes.

    python benchmarks/decode.py [--size 148M] [--tokens 1500] [--threads 2] [--formats fp32,int8,int4]

Three questions, one run each on the bundled model and on a random one:
1. How fast is a step, and what share of it is the graph, the sampling, the rest?
2. How does that compare with the floor: every weight and the state read once, the state written once, at the machine's
   measured read bandwidth?
   Quantized weights are measured in both variants that a CPU runs.
3. Is the last thousand of the tokens as fast as the first? A RetNet's step does not depend on what was read.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from common import ROOT, describe_machine, parameters, random_bundle, read_bandwidth

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import export_bundle
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.element_types import ELEMENT_TYPES
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.model import Model
from retnet_export.runtime.timing import Sample

BLOCK = 1000
"""Tokens per block when looking for drift."""


def generate(bundle: Bundle, variant: str | None, tokens: int, threads: int) -> Stats:
    """Generate `tokens` tokens after a prompt of one and say where the time went."""
    session = Model(bundle, OnnxRuntimeBackend(bundle, threads, variant=variant)).session()
    session.feed([1])
    options = Options(temperature=0.8, top_p=0.95, seed=0)
    for _ in session.generate_tokens(options, max_new_tokens=50):
        pass  # warm-up
    stats = Stats()
    for _ in session.generate_tokens(options, max_new_tokens=tokens, stats=stats):
        pass
    return stats


def bytes_per_token(bundle: Bundle) -> int:
    """The least a step must move: every matrix once, the state in and out. Of an untied embedding it reads one row."""
    manifest = bundle.manifest
    model = manifest.model
    element = 1 if manifest.quantization else ELEMENT_TYPES[manifest.precision.weights].bits // 8
    table = 0 if model.tied_embeddings else element * model.vocab_size * model.hidden_size
    return manifest.weights_bytes - table + 2 * manifest.state_bytes


def report(name: str, bundle: Bundle, tokens: int, threads: int, bandwidth: float, variant: str | None = None) -> float:
    """Print one bundle's figures; returns milliseconds per token (median)."""
    stats = generate(bundle, variant, tokens, threads)
    graph, sampling, total = (np.array(part) for part in (stats.graph_ms, stats.sampling_ms, stats.total_ms))
    rest = total - graph - sampling
    manifest = bundle.manifest
    moved = bytes_per_token(bundle)
    blocks = [float(np.median(total[start : start + BLOCK])) for start in range(0, len(total), BLOCK)]
    print(f"\n{name}: {parameters(manifest.model) / 1e6:.1f}M parameters, {manifest.precision.weights}, {len(total)} tokens")
    print(f"  per token      {Sample(total)} ms  (median [10 %, 90 %])  = {1e3 / np.median(total):.1f} tokens/s")
    for label, part in (("graph", graph), ("sampling", sampling), ("rest", rest)):
        print(f"    {label:9s}    {np.median(part):.3f} ms  {100 * part.sum() / total.sum():.1f} %")
    floor = 1e3 * moved / bandwidth
    share = 100 * floor / np.median(graph)
    print(f"  floor          {floor:.2f} ms: {moved / 1e6:.0f} MB a token at {bandwidth / 1e9:.1f} GB/s; graph at {share:.0f} %")
    drift = 100 * (blocks[-1] / blocks[0] - 1)
    print(f"  flat           first {BLOCK} tokens {blocks[0]:.3f} ms, last {blocks[-1]:.3f} ms: {drift:+.1f} %")
    print(f"                 blocks of {BLOCK} between {min(blocks):.3f} and {max(blocks):.3f} ms")
    return float(np.median(total))


def main(
    size: Annotated[str, typer.Option(help="the random model: 148M, 1.5B, …")] = "148M",
    tokens: Annotated[int, typer.Option(help="tokens to generate with each random bundle; the bundled model makes 20,000")] = 1500,
    threads: Annotated[int, typer.Option(help="threads")] = 2,
    formats: Annotated[str, typer.Option(help="of the random model, separated by commas")] = "fp32,int8,int4",
) -> None:
    """Measure decode on the CPU."""
    print(describe_machine())
    bandwidth = read_bandwidth(threads)
    medians = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        classics = export_bundle(open_checkpoint(ROOT / "examples" / "classics"), folder / "classics.retnet")
        report("bundled model", classics, 20_000, threads, bandwidth)
        source = random_bundle(size)
        for form in formats.split(","):
            if form == "fp32":
                medians[form] = report(f"random {size}, {form}", source, tokens, threads, bandwidth)
                continue
            bundle = quantize_bundle(source, folder / f"{form}.retnet", QuantizeOptions(weights=form))
            for variant in bundle.manifest.variants:
                name = f"{form}, {variant}"
                medians[name] = report(f"random {size}, {name}", bundle, tokens, threads, bandwidth, variant)
    if "fp32" in medians:
        ratios = ", ".join(f"{form} {medians['fp32'] / median:.2f} times" for form, median in medians.items())
        print(f"\ntokens/s over fp32's: {ratios}")


if __name__ == "__main__":
    typer.run(main)
