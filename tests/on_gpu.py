"""A pytest plugin: the session's models run on the GPU with the backend `cuda`, whatever backend a test asks for.

pytest -p on_gpu tests/runtime/generate/test_session.py tests/runtime/generate/test_batching.py
"""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def on_the_gpu():
    from retnet_export.runtime import backends, model

    patch = pytest.MonkeyPatch()
    open_backend = backends.open_backend
    patch.setattr(model, "open_backend", lambda name, bundle, threads=None, low_memory=None: open_backend("cuda", bundle))
    yield
    patch.undo()
