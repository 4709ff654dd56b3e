"""Models for the server: one of random weights, and the bundled one, which reads and writes text."""

from __future__ import annotations

import pytest
import tiny
from random_weights import random_weights

from retnet_export.runtime.model import Model, load


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Model:
    """Random weights, a vocabulary of 50, no tokenizer."""
    folder = tmp_path_factory.mktemp("tokens")
    tiny.bundle(folder, tiny.config(), chunk=8)
    return load(folder / "tiny.retnet", "onnxruntime", threads=1)


@pytest.fixture(scope="session")
def writer(example_bundle) -> Model:
    """The bundled model."""
    return load(example_bundle.path, "onnxruntime", threads=1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory) -> Model:
    """The same architecture with other weights."""
    folder = tmp_path_factory.mktemp("other")
    tiny.bundle(folder, tiny.config(), random_weights(tiny.config(), seed=1), chunk=8)
    return load(folder / "tiny.retnet", "onnxruntime", threads=1)
