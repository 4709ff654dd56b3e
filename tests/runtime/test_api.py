"""The Python API feels native: names, `with`, `repr`, a version."""

from __future__ import annotations

import pytest

import retnet_export
from retnet_export import runtime
from retnet_export.runtime.errors import UserError


def test_every_name_can_be_imported_from_the_runtime():
    for name in runtime.__all__:
        assert getattr(runtime, name).__name__ == name
    assert {"Prompt", "Conversation", "UserError", "Snapshot", "load"} <= set(dir(runtime))
    assert retnet_export.__version__


def test_a_closed_model_opens_no_more_sessions(example_bundle):
    with runtime.load(example_bundle.path, "onnxruntime", threads=1) as model:
        session = model.session()
        session.feed("In the")
        assert "<Model classics on onnxruntime" in repr(model)
        assert repr(session) == "<Session at token 2 of classics>"
        assert "<Snapshot at token 2 of model" in repr(session.snapshot())
    with pytest.raises(UserError, match="the model was closed; load it again"):
        model.session()
    assert "".join(session.generate(max_new_tokens=2, temperature=0.0))
