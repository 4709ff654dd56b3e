"""llama.cpp beside the others: the file it gets is the baseline, and what llama-bench writes is understood.

llama_bench.json is what llama-bench of build 0c1e570 wrote for a baseline of 66 million parameters in Q4_0.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama import CONFIGS

from retnet_export.compare.baseline import Baseline
from retnet_export.compare.peers.llama_cpp import PROGRAM, gguf_array, gguf_format, measure_llama_cpp, parse, write_gguf
from retnet_export.compare.results import LLAMA_CPP, Cell
from retnet_export.compare.transformer import RandomWeights, TransformerConfig, weight_shapes
from retnet_export.runtime.errors import UserError

OUTPUT = Path(__file__).with_name("llama_bench.json").read_text()
CELLS = [Cell("decode", 0, 1), Cell("decode", 512, 1)]


def test_llama_benchs_output_becomes_times_per_token():
    for cell, found in zip(CELLS, parse(OUTPUT, CELLS), strict=True):
        assert (found.engine, found.cell, found.timing.runs) == (LLAMA_CPP, cell, 3)
        assert found.timing.median_ms < found.timing.p95_ms
        assert found.note == "build 0c1e570, llama ?B (guessed) Q4_0, f16 cache; means of 24 tokens"


def test_output_for_other_contexts_is_refused():
    with pytest.raises(UserError, match="llama-bench wrote something unexpected"):
        parse(OUTPUT, [Cell("decode", 0, 1), Cell("decode", 2048, 1)])


def test_output_that_is_not_llama_benchs_is_refused():
    with pytest.raises(UserError, match="llama-bench wrote something unexpected"):
        parse("no JSON", CELLS)


def test_rotary_pairs_are_put_side_by_side():
    config = CONFIGS["multi-head"]
    rows = np.repeat(np.arange(config.num_heads * config.head_dim, dtype=np.float32)[:, None], config.hidden_size, 1)
    moved = gguf_array(config, "layers.0.attention.q.weight", rows)[:, 0]
    assert list(moved[:6]) == [0, 8, 1, 9, 2, 10]
    assert list(moved[16:20]) == [16, 24, 17, 25]


def baseline(folder: Path, weights: str, config: TransformerConfig = CONFIGS["multi-head"]) -> Baseline:
    return Baseline(folder, config, "float32", weights, "compute", 64)


def test_the_gguf_file_holds_every_weight_of_the_baseline(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    write_gguf(baseline(tmp_path, "float32"), tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    config = CONFIGS["multi-head"]
    assert len(tensors) == len(weight_shapes(config))
    read = RandomWeights(config)
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"].data, read("layers.1.ffn.down.weight"))
    np.testing.assert_array_equal(tensors["output_norm.weight"].data, read("norm.weight"))


def test_embedding_and_head_have_the_formats_that_the_bundle_chose_for_them(tmp_path):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    config = TransformerConfig(64, 64, 1, num_heads=1, num_kv_heads=1, head_dim=64, ffn_size=96)
    chosen = {"weights": "int4", "group_size": 64, "embedding": "keep", "head": "int8"}
    mixed = replace(baseline(tmp_path, "int4", config), quantization=chosen)
    write_gguf(mixed, tmp_path / "model.gguf")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (found["token_embd.weight"], found["output.weight"], found["blk.0.ffn_up.weight"]) == ("F32", "Q8_0", "Q4_0")
    assert gguf_format(baseline(tmp_path, "int8"), "head.weight") == "Q8_0"


@pytest.mark.parametrize("weights", ["float32", "float16", "int8", "int4"])
def test_llama_bench_runs_the_file(tmp_path, weights):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    if shutil.which(PROGRAM) is None:
        pytest.skip("llama-bench is not on the PATH")
    config = TransformerConfig(64, 64, 1, num_heads=1, num_kv_heads=1, head_dim=64, ffn_size=96)
    cells = [Cell("decode", 0, 1), Cell("prefill", 0, 1, 4), Cell("decode", 0, 2)]
    decode, prefill, batched = measure_llama_cpp(baseline(tmp_path, weights, config), cells, threads=1)
    assert decode.timing is not None
    assert prefill.timing is not None
    assert batched.note == "llama-bench runs one sequence, and contexts it can fill by reading"
