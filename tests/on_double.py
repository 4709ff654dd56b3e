"""A pytest plugin: the session's models run on the TensorRT double, whatever backend a test asks for.

pytest -p on_double tests/runtime/generate/test_session.py tests/runtime/generate/test_batching.py
"""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(scope="session", autouse=True)
def on_the_double():
    import tensorrt_double

    from retnet_export.export.tensorrt import CompileOptions, compile_bundle
    from retnet_export.runtime import backends, model

    # The double must do without the real library, before it is taken away and after: not every machine has it.
    sys.modules["cuda.bindings"] = None  # type: ignore[assignment]
    patch = pytest.MonkeyPatch()
    tensorrt_double.install(patch)
    open_backend = backends.open_backend

    def open_compiled(name, bundle, threads=None, low_memory=None):
        compile_bundle(bundle, CompileOptions(max_batch=16))
        return open_backend("tensorrt", bundle)

    patch.setattr(model, "open_backend", open_compiled)
    yield
    patch.undo()
