"""llama.cpp's `llama-bench` on the baseline, written as a GGUF file with the same random weights.

Rule: every matrix has GGUF's nearest format to that of the bundle's: an INT4 bundle with an INT8 head becomes Q4_0 with a
head of Q8_0. llama.cpp has a fast layout for both on CPUs, which llama-bench uses. It measures in a run of its own, so its
figures stand beside the others but did not take turns with them. It keeps its cache in float16.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.compare.baseline import Baseline
from retnet_export.compare.measure import timing
from retnet_export.compare.results import LLAMA_CPP, Cell, Measurement
from retnet_export.compare.transformer import RandomWeights, TransformerConfig, weight_shapes
from retnet_export.runtime.errors import MissingExtraError, UserError

PROGRAM = "llama-bench"
REPEATS = 5
TOKENS_PER_REPEAT = 48
MOST_CONTEXT = 8192
"""It fills its cache by reading, so longer contexts would take minutes."""
FORMATS = {"float32": "F32", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
"""GGUF's nearest format: blocks of 32 with float16 scales for the integers, as many bits a weight."""
NAMES = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "layers": "blk",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}


def unavailable() -> str | None:
    """What to do to have it, or None if it is here."""
    if shutil.which(PROGRAM) is None:
        return f"{PROGRAM} is not on the PATH: install llama.cpp"
    return None


def measure_llama_cpp(baseline: Baseline, cells: Sequence[Cell], threads: int) -> tuple[Measurement, ...]:
    """Run llama-bench on the cells it can do: single sequences, contexts that it can fill in reasonable time.

    Raises:
        UserError: it is not on the PATH, or it failed.
    """
    if (missing := unavailable()) is not None:
        raise UserError(missing)
    path = baseline.folder / "transformer.gguf"
    write_gguf(baseline, path)
    possible = [cell for cell in cells if cell.batch == 1 and cell.context <= MOST_CONTEXT]
    measured: dict[Cell, Measurement] = {}
    for kind, sizes in (("decode", ["-p", "0", "-n", str(TOKENS_PER_REPEAT)]), ("prefill", ["-n", "0", "-p", "{tokens}"])):
        of_kind = [cell for cell in possible if cell.kind == kind]
        if not of_kind:
            continue
        wanted = ",".join(str(cell.tokens if kind == "prefill" else cell.context) for cell in of_kind)
        arguments = [size.format(tokens=wanted) for size in sizes] + (["-d", wanted] if kind == "decode" else [])
        output = _run([PROGRAM, "-m", str(path), "-t", str(threads), "-r", str(REPEATS), "-o", "json", *arguments])
        measured |= dict(zip(of_kind, parse(output, of_kind), strict=True))
    return tuple(
        measured.get(cell)
        or Measurement(LLAMA_CPP, cell, note="llama-bench runs one sequence, and contexts it can fill by reading")
        for cell in cells
    )


def parse(output: str, cells: Sequence[Cell]) -> list[Measurement]:
    """Measurements from llama-bench's JSON, an object for each of `cells` in their order.

    Raises:
        UserError: the output is not what is expected; another version may write it differently.
    """
    try:
        found = []
        for cell, entry in zip(cells, json.loads(output), strict=True):
            steps = entry["n_gen"] if cell.kind == "decode" else 1
            reached = entry["n_depth"] if cell.kind == "decode" else entry["n_prompt"]
            if reached != (cell.context if cell.kind == "decode" else cell.tokens):
                raise ValueError(f"asked for {cell.name}, found {reached}")
            times = [[nanoseconds / 1e6 / steps] for nanoseconds in entry["samples_ns"]]
            note = (
                f"build {entry['build_commit']}, {entry['model_type']}, {entry['type_k']} cache; means of {steps} tokens"
                if steps > 1
                else None
            )
            found.append(Measurement(LLAMA_CPP, cell, timing(times), note=note))
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{PROGRAM} wrote something unexpected ({error!r}); is it another version?") from error
    return found


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        last = (error.stderr or "").strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"{PROGRAM} failed with exit code {error.returncode}: {last[0]}") from error
    return done.stdout


def write_gguf(baseline: Baseline, path: Path) -> None:
    """Write the baseline as GGUF, with names for tokens: llama-bench needs none, llama-server does not start without.

    Raises:
        UserError: the package `gguf` is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", "compare", "writing the baseline for llama.cpp") from error
    config = baseline.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(baseline.capacity)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    names, kinds = zip(*token_names(config.vocab_size), strict=True)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_scores([0.0] * config.vocab_size)
    read = RandomWeights(config)
    for name in weight_shapes(config):
        array = gguf_array(config, name, read(name))
        # Vectors stay float32, and so does a matrix whose rows are not whole blocks.
        whole = array.ndim == 2 and array.shape[1] % 32 == 0
        stored = gguf.GGMLQuantizationType[gguf_format(baseline, name) if whole else "F32"]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def token_names(vocab_size: int) -> list[tuple[str, int]]:
    """Names and GGUF's types of so many tokens: three special ones, every byte (text may have any), and numbered words."""
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    text_bytes = [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    words = [(f"▁{number}", 1) for number in range(vocab_size)]
    return [*special, *text_bytes, *words][:vocab_size]


def gguf_name(name: str) -> str:
    """GGUF's name of a weight."""
    parts = name.split(".")
    layer = [NAMES["layers"], parts[1]] if parts[0] == "layers" else []
    return ".".join([*layer, NAMES[".".join(parts[2:-1] if layer else parts[:-1])], parts[-1]])


def gguf_format(baseline: Baseline, name: str) -> str:
    """GGUF's format of a matrix: of embedding and head by what the bundle chose for them."""
    chosen = (baseline.quantization or {}).get(name.split(".")[0], baseline.weights)
    return FORMATS[baseline.compute if chosen == "keep" else str(chosen)]


def gguf_array(config: TransformerConfig, name: str, array: NDArray[np.float32]) -> NDArray[np.float32]:
    """The weight as llama.cpp wants it: rotary pairs of q and k side by side instead of half a head apart."""
    if not name.endswith(("attention.q.weight", "attention.k.weight")):
        return array
    split = array.reshape(-1, 2, config.head_dim // 2, array.shape[1])  # (heads, half, pair, inputs)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(array.shape)
