"""The kernels compile for every GPU they are meant for, without a GPU, and fit each: registers, spills, shared memory."""

import re
from dataclasses import replace

import pytest
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.cuda.compiler import compile_kernels, compiler_version, supported_capabilities
from retnet_export.runtime.backends.cuda.plan import DeviceLimits, plan_step
from retnet_export.runtime.backends.cuda.weights import DeviceWeights
from retnet_export.runtime.errors import MissingExtraError, UserError

LIMITS = {
    "Orin Nano": DeviceLimits((8, 7), 8, 163 << 10),
    "A100": DeviceLimits((8, 0), 108, 163 << 10),
    "RTX 4060": DeviceLimits((8, 9), 24, 99 << 10),
    "H100": DeviceLimits((9, 0), 132, 227 << 10),
    "Thor": DeviceLimits((11, 0), 20, 227 << 10),
    "RTX 5090": DeviceLimits((12, 0), 170, 99 << 10),
}
"""Of one GPU of each compute capability: multiprocessors, and shared memory that a block may have (CUDA's programming guide)."""
MOST_REGISTERS = 128
"""Of a thread, where 512 share a multiprocessor's 65,536."""
MOST_SPILLED = 256
"""Bytes; a few values that are seldom needed."""


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    try:
        compiler_version()
    except (MissingExtraError, UserError) as error:
        pytest.skip(str(error))
    monkeypatch.setenv("RETNET_EXPORT_CACHE", str(tmp_path / "kernels"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """The three ways the code differs most: plain fp16, INT4 with an INT8 head, and every other setting in float32."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "float", "other")]
    wide = tiny.config(hidden_size=256, head_key_dim=64, head_value_dim=128, ffn_size=512)
    plain = tiny.bundle(folders[0], wide, precision="fp16")
    return {
        "fp16": plain,
        "int4": quantize_bundle(plain, folders[1] / "int4.retnet", QuantizeOptions(weights="int4", head="int8")),
        "fp32": tiny.bundle(folders[2], tiny.CONFIGS["torchscale, deepnorm, layer norms"]),
    }


def plan(bundle, limits):
    weights = DeviceWeights.of(bundle)
    config, precision = bundle.manifest.model, bundle.manifest.precision
    vectors = weights.layer_vectors, weights.model_vectors
    return plan_step(config, precision.compute, weights.sources.layouts, weights.sources.embedding.layout, *vectors, limits)


@pytest.mark.parametrize("variant", ["fp16", "int4", "fp32"])
@pytest.mark.parametrize("device", LIMITS)
def test_the_step_compiles_and_fits(device, variant, bundles):
    limits = LIMITS[device]
    if limits.capability not in supported_capabilities():
        pytest.skip(f"NVRTC {compiler_version()} does not know compute capability {limits.capability}")
    made = plan(bundles[variant], limits)
    assert made.shared_bytes <= limits.shared_bytes
    log = compile_kernels("step.cu", made.constants, limits.capability).log
    assert int(re.search(r"Used (\d+) registers", log)[1]) <= MOST_REGISTERS
    assert int(re.search(r"(\d+) bytes spill stores", log)[1]) <= MOST_SPILLED
    assert int(re.search(r"(\d+) bytes smem", log)[1] if "bytes smem" in log else 0) == 0  # all of it is asked for at the launch


def test_loading_compiles_too():
    assert not compile_kernels("load.cu", {}, (8, 7)).cached


def test_a_kernel_is_compiled_once_and_a_damaged_one_again(tmp_path):
    first = compile_kernels("load.cu", {}, (8, 7))
    assert compile_kernels("load.cu", {}, (8, 7)).cached
    (path,) = (tmp_path / "kernels").iterdir()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="the compiled kernel is damaged, compiling it again"):
        again = compile_kernels("load.cu", {}, (8, 7))
    assert (again.cached, again.image) == (False, first.image)
    assert compile_kernels("load.cu", {}, (8, 7)).cached


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RETNET_EXPORT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot be (read|kept)"):
        assert compile_kernels("load.cu", {}, (8, 7)).image


def test_other_constants_are_another_kernel(bundles):
    made = plan(bundles["fp16"], LIMITS["Orin Nano"])
    compile_kernels("step.cu", made.constants, (8, 7))
    other = {**made.constants, "NORM_EPS": "2.0e-6f"}
    assert not compile_kernels("step.cu", other, (8, 7)).cached


def test_a_gpu_that_the_compiler_does_not_know_is_named():
    with pytest.raises(UserError, match=r"NVRTC \d+\.\d+ compiles for compute capability .*not for this GPU's 99\.0"):
        compile_kernels("load.cu", {}, (99, 0))


def test_a_gpu_with_too_little_shared_memory_is_refused_with_numbers(bundles):
    with pytest.raises(UserError, match=r"needs [\d,]+ bytes of shared memory a block for this model, the GPU has 49,152"):
        plan(bundles["fp16"], replace(LIMITS["A100"], shared_bytes=48 << 10))


def test_a_gpu_that_is_too_old_is_refused(bundles):
    with pytest.raises(UserError, match=r"needs compute capability 8\.0 or later, this GPU has 7\.5"):
        plan(bundles["fp16"], replace(LIMITS["A100"], capability=(7, 5)))
