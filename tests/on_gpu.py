"""A pytest plugin: the session's models run on the GPU through ONNX Runtime, whatever backend a test asks for.

pytest -p on_gpu tests/runtime/test_session.py tests/runtime/test_batching.py

Bundles get the GPU's variant of their graphs, too.
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def on_the_gpu():
    from retnet_export.graph import variants
    from retnet_export.runtime import backends, model

    patch = pytest.MonkeyPatch()
    open_backend = backends.open_backend
    patch.setattr(variants, "ALWAYS", (*variants.ALWAYS, "onnxruntime-cuda"))
    patch.setattr(
        model,
        "open_backend",
        lambda name, bundle, threads=None, low_memory=None: open_backend("onnxruntime-cuda", bundle, low_memory=low_memory),
    )
    yield
    patch.undo()
