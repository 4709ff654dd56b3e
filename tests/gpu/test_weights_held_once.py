"""Both graphs of a bundle read the weights from one place on the device."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle

pytestmark = pytest.mark.usefixtures("onnxruntime_cuda")
CONFIG = tiny.config(
    vocab_size=8000,
    hidden_size=2048,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_key_dim=256,
    head_value_dim=512,
    ffn_size=4096,
)
USED = """
import gc, json, sys
import numpy as np
from retnet_export.runtime.device import cuda
from retnet_export.runtime.backends import device_weights
from retnet_export.runtime.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from retnet_export.runtime.bundle.bundle import open_bundle

def used():
    before = cuda.memory_info().free
    backend = OnnxRuntimeCudaBackend(open_bundle(sys.argv[1], check_hashes=False))
    stream = backend.open_stream(1)
    stream.prefill(np.zeros((1, 64), np.int64), np.array([64]))
    stream.step(np.zeros(1, np.int64))
    stream.logits()
    return before - cuda.memory_info().free

used()  # kernels are loaded and stay
gc.collect()
together = used()
gc.collect()
device_weights.SMALLEST = 1 << 60  # nothing is shared
print(json.dumps([together, used()]))
"""
WORKSPACE = 256 << 20
"""Of two sessions: cuBLAS takes 32 MiB each on a Hopper; the rest is activations, and matrices made floats for a product."""


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_decode_and_prefill_together_hold_the_weights_once(tmp_path, weights):
    bundle = tiny.bundle(tmp_path, CONFIG, chunk=64, precision="fp16", variants=("onnxruntime-cuda",))
    if weights != "fp16":
        bundle = quantize_bundle(bundle, tmp_path / "small.retnet", QuantizeOptions(weights, group_size=32))
    result = subprocess.run([sys.executable, "-c", USED, str(bundle.path)], check=True, capture_output=True, text=True)
    together, apart = json.loads(result.stdout)
    held, states = bundle.manifest.weights_bytes, 2 * bundle.manifest.state_bytes
    print(f"{weights}: {together / 1e6:.0f} MB, apart {apart / 1e6:.0f}; weights {held / 1e6:.0f}, states {states / 1e6:.0f}")
    assert together <= 1.15 * held + states + WORKSPACE
    assert apart - together > 0.9 * held
