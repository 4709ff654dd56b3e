"""A whole comparison of a tiny model: every cell measured or refused with a reason, and a report that stands alone."""

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
import tiny

from retnet_export.compare.comparison import CompareOptions, compare, retnet_model
from retnet_export.compare.report import write_report
from retnet_export.compare.results import GENAI, RETNET, TRANSFORMER, Cell, Comparison
from retnet_export.runtime.backends.onnxruntime import OnnxRuntimeBackend
from retnet_export.runtime.bundle.schema import decode
from retnet_export.runtime.errors import UserError

QUICK = CompareOptions(contexts=(0, 16), prompts=(8,), batches=(1, 2), batch_context=16, seconds=0.05, threads=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny.bundle(tmp_path_factory.mktemp("bundle"), tiny.CONFIGS["fla"])


@pytest.fixture(scope="module")
def comparison(bundle):
    return compare(bundle, QUICK)


def test_both_models_are_timed_in_every_cell(comparison):
    expected = {Cell("decode", 0, 1), Cell("decode", 16, 1), Cell("decode", 16, 2), Cell("prefill", 0, 1, 8)}
    for engine in (RETNET, TRANSFORMER):
        timed = {m.cell for m in comparison.measurements if m.engine == engine and m.timing is not None}
        assert timed == expected


def test_a_timing_has_a_median_for_each_round_and_a_95th_percentile_above_the_median(comparison):
    for measurement in comparison.measurements:
        assert len(measurement.timing.rounds_ms) == 5
        assert 0 < measurement.timing.median_ms <= measurement.timing.p95_ms


def test_each_process_has_its_own_memory_measured(comparison):
    for measurement in comparison.measurements:
        assert 0 < measurement.steady_bytes <= measurement.peak_bytes


@pytest.mark.parametrize("state", ["fp32", "fp16"])
def test_sets_of_states_are_counted_as_the_backend_holds_them(tmp_path, state):
    made, batch = tiny.bundle(tmp_path, tiny.CONFIGS["fla"], state=state), 2000
    backend = OnnxRuntimeBackend(made)
    tracemalloc.start()
    runner = backend.open_runner(batch)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert runner.batch == batch
    held -= 4 * batch * made.manifest.model.vocab_size  # logits
    assert retnet_model(made).buffers == round(held / (batch * made.manifest.state_bytes))


def test_the_report_says_what_it_was_measured_on(comparison):
    assert {"processor", "cores", "memory", "date"} <= comparison.machine.keys()
    assert {"onnxruntime", "numpy"} <= comparison.versions.keys()


def test_the_baseline_leaves_nothing_behind(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    compare(bundle, CompareOptions(contexts=(0,), prompts=(), batches=(), seconds=0.05, threads=1))
    assert list(tmp_path.iterdir()) == []


def test_report_json_reads_back_as_the_comparison(comparison, tmp_path):
    write_report(comparison, tmp_path)
    read = decode(Comparison, json.loads((tmp_path / "report.json").read_text()), "report.json")
    assert read.measurements == comparison.measurements
    assert (read.retnet, read.transformer) == (comparison.retnet, comparison.transformer)


def test_the_page_needs_nothing_but_itself(comparison, tmp_path):
    write_report(comparison, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    # Names of XML formats and references within the page are all there is of addresses.
    assert not re.findall(r'<(?:script|link|img|iframe|object)\b|url\((?!#)|@import|(?:src|href)="(?!#)', page)


def test_every_figure_is_a_png_file_too(comparison, tmp_path):
    write_report(comparison, tmp_path)
    figures = {path.stem for path in tmp_path.glob("*.png")}
    assert figures == {"latency", "memory", "throughput", "batch_memory", "prefill"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_a_cell_that_would_not_fit_is_reported_and_not_attempted(bundle):
    options = CompareOptions(contexts=(0, 1 << 20), prompts=(), batches=(), seconds=0.05, threads=1, memory_budget=100_000_000)
    result = compare(bundle, options)
    refused = result.find(TRANSFORMER, Cell("decode", 1 << 20, 1))
    assert refused.timing is None
    assert re.fullmatch(r"needs about 0\.\d GB, the memory budget is 0\.1 GB: not attempted", refused.note)
    assert result.find(RETNET, Cell("decode", 1 << 20, 1)).timing is not None


def test_a_budget_smaller_than_the_weights_is_refused(bundle):
    with pytest.raises(
        UserError, match=r"the memory budget is 0 MB, but the weights of .*tiny\.retnet alone are 0 MB; give a larger"
    ):
        compare(bundle, CompareOptions(memory_budget=1000))


def test_onnxruntime_genai_takes_turns_with_the_others(bundle):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    result = compare(bundle, CompareOptions(contexts=(0, 8), prompts=(4,), batches=(), seconds=0.05, threads=1, peers=(GENAI,)))
    assert all(m.timing is not None for m in result.measurements if m.engine == GENAI)
    assert result.engines == (RETNET, TRANSFORMER, GENAI)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": (-1,)}, "contexts holds -1, expected 0 to 1,048,576"),
        ({"contexts": (1 << 21,)}, "contexts holds 2,097,152, expected 0 to 1,048,576"),
        ({"contexts": ()}, "contexts is empty, expected at least one, as in contexts=0,2048"),
        ({"batches": (0,)}, "batches holds 0, expected 1 to 1,048,576"),
        ({"prompts": (0,)}, "prompts holds 0, expected 1 to 1,048,576"),
        ({"cache": "fp8"}, "cache is 'fp8', expected compute or int8"),
        ({"seconds": 0.0}, "seconds is 0, expected 0.05 to 600"),
        ({"backend": "gpu"}, "backend is 'gpu', expected auto, cuda, onnxruntime"),
        ({"peers": ("vllm",)}, "peers is 'vllm', expected onnxruntime-genai or llama.cpp"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        CompareOptions(**options)


def test_a_peer_that_is_not_here_is_refused_before_anything_is_measured(bundle, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"peer llama\.cpp: llama-bench is not on the PATH: install llama\.cpp"):
        compare(bundle, CompareOptions(peers=("llama.cpp",)))
