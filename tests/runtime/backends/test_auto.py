"""What "auto" takes, by what the registrations say; the backends themselves are not run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retnet_export.runtime import backends
from retnet_export.runtime.errors import BackendWarning, UserError


def registered(monkeypatch, **changes):
    """Replace what backends say of themselves; on a machine without a GPU no other than the CPU's works."""
    real, absent = backends.registered, {"unavailable": lambda: "not here"}
    said = {"cuda": absent | changes.get("cuda", {})}
    monkeypatch.setattr(backends, "registered", lambda name: replace(real(name), **said.get(name, {})))


def refuse(*arguments):
    raise UserError("the weights do not fit")


def test_the_first_that_works_is_taken_and_told_low_memory(example_bundle, monkeypatch):
    opened = {"unavailable": lambda: None, "open": lambda *arguments: arguments}
    registered(monkeypatch, cuda=opened)
    assert backends.open_backend("auto", example_bundle, None, True) == (example_bundle, None, True)
    assert backends.open_backend("auto", example_bundle, threads=1).name == "onnxruntime"


def test_a_gpu_that_is_passed_over_is_named(example_bundle, monkeypatch):
    registered(monkeypatch, cuda={"unavailable": lambda: None, "open": refuse})
    with pytest.warns(BackendWarning, match="the weights do not fit. It runs on the CPU"):
        assert backends.open_backend("auto", example_bundle).name == "onnxruntime"


def test_without_a_gpu_it_is_the_cpu(example_bundle, monkeypatch):
    registered(monkeypatch)
    assert backends.open_backend("auto", example_bundle).name == "onnxruntime"
