"""A device's constants follow from reports; a file that is not a report is refused."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from retnet_export.cli import app
from retnet_export.plan.calibration import FORMAT_VERSION, MARK, Observation, calibrate, read_report
from retnet_export.plan.devices import DEVICES
from retnet_export.plan.prediction import fit
from retnet_export.runtime.errors import UserError

ORIN = DEVICES["orin-nano-8gb"]


def observed(efficiency, overhead_ms, matrix_bytes, layers, backend=ORIN.runtime, state_bytes=1e8):
    moved = matrix_bytes + 2 * state_bytes
    milliseconds = moved / ORIN.bandwidth_gbs / 1e6 / efficiency + layers * overhead_ms
    return Observation(backend, layers, matrix_bytes, state_bytes, 1, milliseconds)


def test_two_sizes_give_both_constants_back():
    rows = [observed(0.7, 0.05, 3e9, 24), observed(0.7, 0.05, 0.8e9, 24), observed(0.7, 0.05, 4e9, 32)]
    found = calibrate(rows, ORIN)
    assert found.efficiency == pytest.approx(0.7, rel=1e-6)
    assert found.overhead_ms == pytest.approx(0.05, rel=1e-6)
    assert (found.slowest, found.fastest) == pytest.approx((1, 1))


def test_one_size_scales_what_is_known():
    known = fit(ORIN.runtime)
    (row,) = rows = [observed(known.efficiency / 2, 2 * known.overhead_ms, 3e9, 24)]
    found = calibrate(rows, ORIN)
    assert found.efficiency == pytest.approx(known.efficiency / 2)
    assert found.milliseconds(ORIN.bandwidth_gbs, row.bytes_moved(ORIN.runtime), 24, 1) == pytest.approx(row.milliseconds)


def test_reports_of_another_backend_are_refused_by_name():
    with pytest.raises(UserError, match=r"no decode speed of the backend 'tensorrt'.*found: onnxruntime"):
        calibrate([observed(0.7, 0.05, 3e9, 24, backend="onnxruntime")], ORIN)


def report(tmp_path, **changes):
    rates = {"pp512": (512, 0, 900.0), "tg128": (0, 128, 40.0)}
    results = [
        {"backend": "tensorrt", "test": test, "prompt_tokens": prompt, "new_tokens": new, "batch": 1, "tokens_per_second": rate}
        for test, (prompt, new, rate) in rates.items()
    ]
    model = {"layers": 24, "matrix_bytes": 8e8, "state_bytes": 1e8}
    document = {"format": MARK, "format_version": FORMAT_VERSION, "bench": [{"model": model, "results": results}, None], **changes}
    path = tmp_path / "report.txt"
    path.write_text(f"=== board\nOrin\n{json.dumps(document)}\n\n0 steps failed\n")
    return path


def test_a_report_gives_its_decode_speeds(tmp_path):
    assert read_report(report(tmp_path)) == [Observation("tensorrt", 24, 8e8, 1e8, 1, 25.0)]


@pytest.mark.parametrize(("content", "said"), [("no json\n", "no line of JSON"), (f'{{"format": "{MARK}"}}\n', "damaged")])
def test_a_file_that_is_not_a_report_is_refused(tmp_path, content, said):
    path = tmp_path / "report.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        read_report(path)


def test_the_command_predicts_from_reports(tmp_path):
    model = ["plan", "--layers", "24", "--width", "2048", "--weights", "int4", "--json"]
    plain, calibrated = (
        json.loads(CliRunner().invoke(app, [*model, "--device", ORIN.key, *more]).stdout)["devices"][0]["tokens_per_second"]
        for more in ([], ["--calibrate", str(report(tmp_path))])
    )
    assert calibrated != plain
    refused = CliRunner().invoke(app, [*model, "--devices", "--calibrate", str(report(tmp_path))])
    assert refused.exit_code == 2
    assert "exactly one --device" in refused.output


@pytest.mark.parametrize(("given", "missing"), [("--layers", "--width"), ("--width", "--layers")])
def test_half_of_a_models_sizes_is_refused_by_the_flag_that_is_missing(given, missing):
    refused = CliRunner().invoke(app, ["plan", given, "512", "--device", ORIN.key])
    assert refused.exit_code == 2
    assert f"{missing} is missing" in refused.output
