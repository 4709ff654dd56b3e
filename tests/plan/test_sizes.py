from __future__ import annotations

import dataclasses

import pytest
import tiny

from retnet_export.graph.weights import weight_shapes
from retnet_export.plan.sizes import sizes_of_bundle, sizes_of_model


@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_sizes_from_the_configuration_are_those_of_the_exported_bundle(tmp_path, family, precision):
    # Large enough for what the file holds besides, constants and alignment, to be small.
    sizes = {"vocab_size": 2048, "hidden_size": 512, "ffn_size": 1024, "head_key_dim": 64, "head_value_dim": 128}
    config = dataclasses.replace(tiny.CONFIGS[family], **sizes)
    manifest = tiny.bundle(tmp_path, config, precision=precision).manifest
    planned, real = sizes_of_model(config, manifest.precision.weights), sizes_of_bundle(manifest)
    assert planned.weights_bytes == pytest.approx(manifest.weights_bytes, rel=0.02)
    assert planned.state_bytes == real.state_bytes == manifest.state_bytes
    assert planned.embedding_bytes == real.embedding_bytes


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_parameters_are_those_of_the_weight_table(family):
    import math

    config = tiny.CONFIGS[family]
    assert sizes_of_model(config).parameters == sum(math.prod(shape) for shape in weight_shapes(config).values())


def test_a_step_reads_the_embedding_by_rows_and_the_state_twice():
    config = tiny.config(vocab_size=1000)
    sizes = sizes_of_model(config, "float32")
    assert sizes.bytes_per_step(3) - sizes.bytes_per_step(2) == pytest.approx(4 * config.hidden_size + 2 * sizes.state_bytes)
    assert sizes.bytes_per_step(1) < sizes.weights_bytes


def test_four_bits_with_groups_take_what_they_should():
    config = tiny.config(hidden_size=128, ffn_size=256, vocab_size=64)
    plain, grouped = (sizes_of_model(config, "int4", group_size=group) for group in (None, 64))
    matrices = sizes_of_model(config, "float16").matrix_bytes / 2
    assert grouped.matrix_bytes > matrices * (0.5 + 2 / 64) * 0.99
    assert plain.matrix_bytes < grouped.matrix_bytes < matrices * 0.6
