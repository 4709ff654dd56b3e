"""What `doctor` says of versions."""

import pytest

from retnet_export.runtime.backends.onnxruntime_api import slow_when_quantized
from retnet_export.runtime.device.doctor import examine


@pytest.mark.parametrize("version", ["1.20.1", "1.24.4", "1.24.0.dev20260101"])
def test_an_old_onnxruntime_is_slow_with_quantized_weights(version):
    assert f"ONNX Runtime {version} turns 8-bit weights into floats" in str(slow_when_quantized(version))


@pytest.mark.parametrize("version", ["1.25.0", "1.32.0", "2.0", "not installed"])
def test_a_new_or_unknown_one_is_not_blamed(version):
    assert slow_when_quantized(version) is None


def test_the_report_has_a_line_for_it():
    assert "run quantized bundles fast on the CPU" in examine()["works"]
