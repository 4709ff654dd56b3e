"""The baseline is a Llama, compared with transformers' own, and has the RetNet's size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from llama import CONFIGS, GOLDEN, TOKENS

from retnet_export.compare.baseline import Baseline, baseline_for, write
from retnet_export.compare.engines import TransformerEngine
from retnet_export.compare.transformer import PARAMETER_MATCH, TransformerConfig, transformer_like
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.config import ModelConfig
from retnet_export.runtime.bundle.weights import parameters
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


def logits_as_written(path: Path, config: TransformerConfig) -> np.ndarray:
    """Logits (1, 1, V) after TOKENS of the graph that takes a mask, with ONNX Runtime's optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    empty = np.zeros((1, config.num_kv_heads, 0, config.head_dim), np.float32)
    caches = {spec.name: empty for spec in session.get_inputs() if spec.name.startswith("past")}
    return session.run(["logits"], {"input_ids": TOKENS[None], "attention_mask": np.ones((1, len(TOKENS)), np.int64), **caches})[0]


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
    wanted = parameters(model)
    assert abs(baseline.parameters - wanted) <= PARAMETER_MATCH * wanted


@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_a_baseline_whose_groups_allow_no_match_is_the_closest_there_is(group):
    """The bundled model quantized as the README says: its groups of 64 have no width within 1 %."""
    model = ModelConfig(4096, 256, 5, 4, 64, 128, 512, 4, tied_embeddings=True)
    baseline, wanted = transformer_like(model, group=group), parameters(model)
    assert baseline.ffn_size % group == 0
    others = [replace(baseline, ffn_size=baseline.ffn_size + step) for step in (-group, group)]
    if abs(baseline.parameters - wanted) > PARAMETER_MATCH * wanted:
        assert all(abs(baseline.parameters - wanted) <= abs(other.parameters - wanted) for other in others if other.ffn_size > 0)


def test_key_value_heads_that_do_not_divide_the_query_heads_are_refused():
    with pytest.raises(UserError, match=r"kv_heads is 5, expected a divisor of the baseline's 12 query heads: 1, 2, 3, 4, 6, 12"):
        transformer_like(ModelConfig(32000, 768, 12, 3, 256, 512, 1536, 3), kv_heads=5)


def test_a_retnet_smaller_than_its_transformers_attention_has_no_fair_baseline():
    with pytest.raises(UserError, match="A fair comparison is not possible"):
        transformer_like(ModelConfig(50, 64, 2, 1, 2, 2, 2, 1, output_gate=False))


def test_the_graph_for_onnxruntime_genai_computes_the_same_from_a_mask(golden):
    baseline, reference = golden
    assert_close(logits_as_written(baseline.genai_graph, baseline.config)[:, 0], reference[-1:])


@pytest.mark.parametrize(("weights", "group_size"), [("int8", None), ("int4", 16)])
def test_a_quantized_baseline_computes_what_its_integers_say(tmp_path, weights, group_size):
    quantization = {"weights": weights, "group_size": group_size, "embedding": "int8", "head": "int8"}
    baseline = Baseline(tmp_path, CONFIGS["grouped-query, tied"], "float32", weights, "compute", 64, quantization)
    write(baseline)
    reference = logits_as_written(baseline.genai_graph, baseline.config)
    assert_close(opened(baseline).read(TOKENS[None]), reference, "onnxruntime-quantized")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_the_baseline_takes_the_formats_of_a_quantized_bundle(tmp_path, weights):
    model = tiny.config(hidden_size=64, ffn_size=256, head_value_dim=16)
    bundle = quantize_bundle(
        tiny.bundle(tmp_path, model),
        tmp_path / "q.retnet",
        QuantizeOptions(weights=weights, group_size=32 if weights == "int4" else None),
    )
    baseline = baseline_for(bundle, tmp_path / "baseline", capacity=64)
    baseline.folder.mkdir()
    write(baseline)
    # The same formats and almost the same parameters: almost the same bytes, but for the table of angles.
    assert baseline.weights == weights
    angles = 2 * 64 * baseline.config.head_dim // 2 * 4
    assert abs(baseline.weights_bytes - angles - bundle.manifest.weights_bytes) < 0.1 * bundle.manifest.weights_bytes
