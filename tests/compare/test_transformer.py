"""The baseline is a Llama: against transformers' own, and matched to the RetNet it stands beside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from llama import CONFIGS, GOLDEN, TOKENS

from retnet_export.compare.baseline import Baseline, write
from retnet_export.compare.engines import TransformerEngine
from retnet_export.compare.transformer import PARAMETER_MATCH, TransformerConfig, count_parameters, transformer_like
from retnet_export.graph.weights import weight_shapes
from retnet_export.runtime.config import ModelConfig
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.numerics import TOLERANCES, measure


def written(folder: Path, config: TransformerConfig, **changes: str) -> Baseline:
    baseline = Baseline(
        folder, config, **({"compute": "float32", "weights": "float32", "cache": "compute", "capacity": 64} | changes)
    )
    write(baseline)
    return baseline


def opened(baseline: Baseline, batch: int = 1) -> TransformerEngine:
    engine = TransformerEngine(baseline, threads=1)
    engine.open(batch, context=0, tokens=64)
    return engine


@pytest.fixture(params=CONFIGS)
def golden(request, tmp_path):
    """A baseline, and the logits that transformers' Llama gives with its weights."""
    return written(tmp_path, CONFIGS[request.param]), np.load(GOLDEN)[request.param]


def assert_close(actual, reference, tolerance="onnxruntime-float32"):
    assert measure(actual, reference).relative <= TOLERANCES[tolerance].relative


def test_decoding_token_by_token_gives_the_logits_of_transformers_llama(golden):
    baseline, reference = golden
    engine = opened(baseline)
    assert_close(np.concatenate([engine.read(np.array([[token]]))[:, 0].copy() for token in TOKENS]), reference)


@pytest.mark.parametrize("piece", [16, 5])
def test_a_prompt_read_in_pieces_gives_the_logits_after_its_last_token(golden, piece):
    baseline, reference = golden
    engine = opened(baseline)
    for start in range(0, len(TOKENS), piece):
        logits = engine.read(TOKENS[None, start : start + piece])
    assert_close(logits[:, 0], reference[-1:])


def test_sequences_of_a_batch_do_not_see_each_other(golden):
    baseline, reference = golden
    engine = opened(baseline, batch=3)
    others = np.random.default_rng(0).integers(0, baseline.config.vocab_size, (2, len(TOKENS)))
    for column in np.vstack([others[:1], TOKENS[None], others[1:]]).T:
        logits = engine.read(column[:, None])
    assert_close(logits[1], reference[-1:])


def test_the_graph_for_onnxruntime_genai_computes_the_same_from_a_mask(golden):
    baseline, reference = golden
    session = onnxruntime.InferenceSession(str(baseline.genai_graph), providers=["CPUExecutionProvider"])
    config = baseline.config
    empty = np.zeros((1, config.num_kv_heads, 0, config.head_dim), np.float32)
    caches = {spec.name: empty for spec in session.get_inputs() if spec.name.startswith("past")}
    (logits,) = session.run(
        ["logits"], {"input_ids": TOKENS[None], "attention_mask": np.ones((1, len(TOKENS)), np.int64), **caches}
    )
    assert_close(logits[:, 0], reference[-1:])


def test_an_int8_cache_costs_a_little_accuracy_and_no_more(tmp_path):
    baseline = written(tmp_path, CONFIGS["multi-head"], cache="int8")
    engine = opened(baseline)
    logits = np.concatenate([engine.read(np.array([[token]]))[:, 0].copy() for token in TOKENS])
    assert_close(logits, np.load(GOLDEN)["multi-head"], "int8-cache")


def test_the_golden_file_is_what_transformers_computes_here():
    pytest.importorskip("transformers", reason="transformers is not installed; the golden file stands for it")
    from llama import llama_logits

    for name, config in CONFIGS.items():
        assert_close(np.load(GOLDEN)[name], llama_logits(config), "torch-float64")


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(ModelConfig(32000, 768, 12, 3, 256, 512, 1536, 3), id="148M"),
        pytest.param(ModelConfig(32000, 2048, 24, 8, 256, 512, 4096, 8), id="1.3B"),
        pytest.param(ModelConfig(32000, 4096, 32, 16, 256, 512, 8192, 16), id="6.7B"),
        pytest.param(ModelConfig(4096, 256, 5, 4, 64, 128, 512, 4, tied_embeddings=True), id="bundled model"),
        *(pytest.param(model, id=name) for name, model in tiny.CONFIGS.items()),
    ],
)
def test_the_baseline_has_the_retnets_width_depth_vocabulary_and_parameters(model):
    baseline = transformer_like(model)
    assert (baseline.hidden_size, baseline.num_layers, baseline.vocab_size) == (
        model.hidden_size,
        model.num_layers,
        model.vocab_size,
    )
    wanted = count_parameters(weight_shapes(model))
    assert abs(baseline.parameters - wanted) <= PARAMETER_MATCH * wanted


def test_key_value_heads_that_do_not_divide_the_query_heads_are_refused():
    with pytest.raises(UserError, match=r"--kv-heads is 5, expected a divisor of the baseline's 12 query heads: 1, 2, 3, 4, 6, 12"):
        transformer_like(ModelConfig(32000, 768, 12, 3, 256, 512, 1536, 3), kv_heads=5)


def test_a_retnet_smaller_than_its_transformers_attention_has_no_fair_baseline():
    with pytest.raises(UserError, match="nothing fair to compare with"):
        transformer_like(ModelConfig(50, 64, 2, 1, 2, 2, 2, 1, output_gate=False))
