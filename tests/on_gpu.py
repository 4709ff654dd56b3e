"""A pytest plugin: the session's models run on the GPU through ONNX Runtime, whatever backend a test asks for.

pytest -p on_gpu tests/runtime/test_session.py tests/runtime/test_batching.py

A bundle runs in the GPU's dialect where that leaves its state as it is, so that snapshots fit the bundle that a test made.
"""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def on_the_gpu(tmp_path_factory):
    from retnet_export.export.convert import convert_bundle
    from retnet_export.runtime import backends, model

    patch = pytest.MonkeyPatch()
    open_backend = backends.open_backend

    def open_converted(name, bundle, threads=None, low_memory=None):
        if bundle.manifest.dialect == "portable":
            made = convert_bundle(bundle, Path(tmp_path_factory.mktemp("gpu")) / "made.retnet", "onnxruntime-cuda")
            bundle = made if made.manifest.state == bundle.manifest.state else bundle
        return open_backend("onnxruntime-cuda", bundle, low_memory=low_memory)

    patch.setattr(model, "open_backend", open_converted)
    yield
    patch.undo()
