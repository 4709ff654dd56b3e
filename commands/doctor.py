"""`retnet-export doctor`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import typer

from retnet_export.commands.options import Json
from retnet_export.commands.output import print_json, print_table

WRITE = ("onnx", "onnx_ir", "ml_dtypes")
"""Modules that write graphs."""
NEEDS: Mapping[str, tuple[str, ...]] = {
    "export": WRITE,
    "export (from .pt, .pth, .bin or .ckpt files)": (*WRITE, "torch"),
    "export (tokenizers other than tokenizer.json)": (*WRITE, "transformers", "sentencepiece", "tiktoken"),
    "export (from the Hugging Face Hub)": (*WRITE, "huggingface_hub"),
    "verify": (*WRITE, "torch", "onnxruntime"),
    "quantize": WRITE,
    "quantize (--method gptq, --activations, --evaluate)": (*WRITE, "onnxruntime"),
    "evaluate": ("onnxruntime",),
    "compile (--target tensorrt-rtx)": ("tensorrt_rtx",),
    "generate": ("onnxruntime",),
    "chat": ("onnxruntime",),
    "chat (with the bundle's chat template)": ("onnxruntime", "jinja2"),
    "serve": ("onnxruntime", "starlette", "uvicorn", "prometheus_client", "pydantic"),
    "triton": ("onnx",),
    "tokenize": (),
    "inspect": (),
    "bench": ("onnxruntime",),
    "compare": (*WRITE, "onnxruntime", "matplotlib"),
    "compare (--peer llama.cpp)": (*WRITE, "onnxruntime", "matplotlib", "gguf"),
    "plan": (),
    "doctor": (),
    "demo": (*WRITE, "onnxruntime", "torch", "matplotlib"),
}
"""The optional modules of each command and of its optional features, on the CPU. GPUs have separate rows."""


def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Show what works on this machine, and for everything else the command that fixes it."""
    from retnet_export.runtime.device.doctor import examine

    report, commands = examine(), commands_that_work(_registered(ctx))
    if as_json:
        print_json({**report, "commands": commands})
        return
    print_table("machine", [(name, str(value)) for name, value in report["machine"].items()])
    for title, facts in (("GPU", report["gpu"]), ("Jetson", report["jetson"])):
        if facts:
            print_table(f"\n{title}", list(facts.items()))
    print_table("\npackages", [(name, str(value)) for name, value in report["packages"].items()])
    for title, rows in (("commands", commands), ("backends", report["works"])):
        print_table(f"\n{title}", [(name, "yes" if fix is None else f"no: {fix}") for name, fix in rows.items()])


def _registered(ctx: typer.Context) -> list[str]:
    """The names of all commands."""
    assert ctx.parent is not None
    group = ctx.parent.command
    assert isinstance(group, typer.core.TyperGroup)
    return group.list_commands(ctx.parent)


def commands_that_work(names: Iterable[str]) -> dict[str, str | None]:
    """For each command and optional feature: None if it works, or what to install."""
    from retnet_export.runtime.errors import what_is_missing

    names = list(names)
    return {use: what_is_missing(modules) for use, modules in NEEDS.items() if use.partition(" ")[0] in names}
