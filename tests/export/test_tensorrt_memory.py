"""The prediction of a build's peak memory is right."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tiny

from retnet_export.plan.preflight import BUILD_BASE, build_bytes
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MEASURE = """
import sys, threading
from retnet_export.export.tensorrt import CompileOptions, compile_bundle
from retnet_export.runtime.bundle.bundle import open_bundle
from retnet_export.runtime.backends.tensorrt_api import load_module

load_module("tensorrt-rtx")
bundle = open_bundle(sys.argv[1], check_hashes=False)

def anonymous():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) * 1024

before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
compile_bundle(bundle, CompileOptions("tensorrt-rtx", ("8.6",)))
done.set()
watcher.join()
print(peak[0] - before)
"""


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_a_builds_peak_is_predicted_within_a_fifth(tmp_path, weights):
    model = tiny.config(
        hidden_size=1024, num_heads=4, num_kv_heads=4, head_key_dim=256, head_value_dim=512, ffn_size=2048, num_layers=4
    )
    bundle = tiny.bundle(tmp_path, model, precision="fp16")
    if weights != "fp16":
        bundle = quantize_bundle(bundle, tmp_path / "small.retnet", QuantizeOptions(weights))
    run = subprocess.run([sys.executable, "-c", MEASURE, str(bundle.path)], capture_output=True, text=True, check=True)
    measured, predicted = int(run.stdout.split()[-1]), build_bytes(bundle.manifest)
    assert predicted > 1.3 * BUILD_BASE
    assert predicted == pytest.approx(measured, rel=0.2)
