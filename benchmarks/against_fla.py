"""A checkpoint of 1.35B parameters in flash-linear-attention, with transformers' `generate`, and as a bundle on the backend `cuda`.

    pip install torch flash-linear-attention              beside 'retnet-export[cuda,export]'
    python benchmarks/against_fla.py                      the table of docs/lab/against-fla.md; two minutes on an H100

The shape is that of fla-hub/retnet-1.3B-100B; weights are random. Both open the same folder, in fp16: a prompt of 32 tokens, then
greedy tokens. The time of `generate` is its whole time less that of a call for one token; ours is that of the greedy loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from retnet_export.export.checkpoints import open_checkpoint
from retnet_export.export.pipeline import ExportOptions, export_bundle
from retnet_export.runtime.backends.cuda.backend import CudaBackend
from retnet_export.runtime.device import cuda
from retnet_export.runtime.numerics import measure

PROMPT = 32
REPEATS = 3


def seconds(call: Callable[[], object]) -> float:
    """The median of some calls; the first, in which kernels are compiled and tuned, does not count."""
    times = []
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def make_checkpoint(folder: Path) -> None:
    """Random weights on the GPU, written as any checkpoint is."""
    from fla.models import RetNetConfig, RetNetForCausalLM

    config = RetNetConfig(
        hidden_size=2048, num_hidden_layers=24, num_heads=8, expand_k=1, expand_v=2, hidden_ratio=2, vocab_size=32_000
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = RetNetForCausalLM(config)
    parameters = sum(each.numel() for each in model.parameters())
    model.to(torch.float16).save_pretrained(folder)
    print(f"{parameters / 1e9:.2f}B parameters", flush=True)


def of_fla(
    folder: Path, prompts: dict[int, NDArray[np.int64]], new: int
) -> tuple[dict[int, float], NDArray[np.float32], NDArray[np.float32]]:
    """Tokens a second by batch, and the logits after the first prompt, in float16 and in float32."""
    from fla.models import RetNetForCausalLM

    model = RetNetForCausalLM.from_pretrained(folder, dtype=torch.float16).cuda().eval()
    rates = {}
    for batch, prompt in prompts.items():
        ids = torch.from_numpy(prompt).cuda()

        def generate(count: int, ids: torch.Tensor = ids) -> object:
            limits = {"max_new_tokens": count, "min_new_tokens": count}
            return model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, pad_token_id=0, **limits
            )

        rates[batch] = batch * (new - 1) / (seconds(lambda: generate(new)) - seconds(lambda: generate(1)))
        print(f"flash-linear-attention, batch {batch}: {rates[batch]:,.0f} tokens/s", flush=True)
    first = torch.from_numpy(prompts[min(prompts)]).cuda()
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        narrow, wide = (kind()(first).logits[:, -1].float().cpu().numpy() for kind in (model.half, model.float))
    return rates, narrow, wide


def of_ours(folder: Path, prompts: dict[int, NDArray[np.int64]], new: int) -> tuple[dict[int, float], NDArray[np.float32]]:
    bundle = export_bundle(open_checkpoint(folder), folder / "bundle.retnet", ExportOptions(precision="fp16"))
    backend = CudaBackend(bundle)
    rates, first = {}, None
    for batch, prompt in prompts.items():
        runner = backend.open_runner(batch)
        runner.prefill(prompt, np.full(batch, prompt.shape[1]))
        first = runner.logits().copy() if first is None else first

        def steps(runner: object = runner) -> None:
            tokens = runner.top(1)[0][:, 0]  # type: ignore[attr-defined]
            for _ in range(new):
                runner.step(tokens)  # type: ignore[attr-defined]
                tokens = runner.top(1)[0][:, 0]  # type: ignore[attr-defined]

        rates[batch] = batch * new / seconds(steps)
        print(f"retnet-export, batch {batch}: {rates[batch]:,.0f} tokens/s", flush=True)
    assert first is not None
    return rates, first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens of a call")
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    prompts = {int(batch): draw.integers(0, 32_000, (int(batch), PROMPT)) for batch in options.batches.split(",")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder)
        torch.cuda.empty_cache()
        ours, our_logits = of_ours(folder, prompts, options.tokens)
        theirs, their_logits, wide = of_fla(folder, prompts, options.tokens)
    versions = ", ".join(f"{each} {version(each)}" for each in ("fla-core", "transformers", "torch", "triton"))
    print(f"{cuda.device().name}; {versions}; Python {sys.version.split()[0]}")
    ours_off, theirs_off = (measure(each, wide).relative for each in (our_logits, their_logits))
    print(
        f"logits after the prompt, against fla in float32: ours {ours_off:.1e} of their deviation, fla in float16 {theirs_off:.1e}"
    )
    print("| batch | flash-linear-attention, tokens/s | backend cuda, tokens/s | |")
    print("|---|---|---|---|")
    for batch in prompts:
        print(f"| {batch} | {theirs[batch]:,.0f} | {ours[batch]:,.0f} | {ours[batch] / theirs[batch]:.0f} × |")


if __name__ == "__main__":
    main()
