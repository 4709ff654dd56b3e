"""What engines do at every step, counted on real builds: two layers of a realistic width, for compute capability 8.6 and 12.0."""

from __future__ import annotations

import functools
import json

import onnx_ir as ir
import pytest
import tiny

from retnet_export.export.tensorrt import CompileOptions, compile_bundle
from retnet_export.export.tensorrt_forms import tensorrt_forms
from retnet_export.export.tensorrt_probe import ask
from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.bundle.bundle import Bundle
from retnet_export.runtime.bundle.engines import EngineRecord, read_engines

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

SIZES = {"hidden_size": 1024, "num_heads": 4, "num_kv_heads": 4, "head_key_dim": 256, "head_value_dim": 512, "ffn_size": 2048}
BOTH = CompileOptions("tensorrt-rtx", ("8.6", "12.0"))
FORMATS = ("fp32", "fp16", "int8", "int4")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The bundle and record of a format, built once."""

    @functools.cache
    def float_bundle(precision: str, tied: bool) -> Bundle:
        config = tiny.config(**SIZES, vocab_size=2048, tied_embeddings=tied)
        return tiny.bundle(tmp_path_factory.mktemp("float"), config, precision=precision, chunk=128)

    @functools.cache
    def build(form: str, tied: bool) -> tuple[Bundle, EngineRecord]:
        bundle = float_bundle(form if form.startswith("fp") else "fp16", tied)
        if not form.startswith("fp"):
            bundle = quantize_bundle(bundle, tmp_path_factory.mktemp("small") / "small.retnet", QuantizeOptions(form))
        return bundle, compile_bundle(bundle, BOTH)

    return build


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_step_moves_what_it_must_and_little_else(built, form, tied):
    bundle, record = built(form, tied)
    step = record.anatomy_of("decode")
    assert step.state_passes == pytest.approx(2, abs=0.01)
    assert step.kernels <= 10 * step.layers + 4  # beside layers: embedding, head, candidates, position
    assert step.over_floor <= 1.12
    # No matrix is written out as floats: the smallest has 1,024 × 2,048 weights.
    assert all(excess.bytes < 1024 * 2048 for excess in step.excess)
    fp16 = built("fp16", tied)[1]
    assert record.part("decode").activation_bytes <= (1.2 if form != "fp32" else 2) * fp16.part("decode").activation_bytes
    assert record.weights_bytes < 1.02 * bundle.manifest.weights_bytes + (2048 * 1024 if tied and form.startswith("int") else 0)
    assert len(record.files) == 1


def test_the_record_beside_the_engine_says_what_was_returned(built):
    bundle, record = built("int4", False)
    assert read_engines(bundle) == [record]
    written = json.loads((bundle.path / "engines" / f"{record.stem}.json").read_text())
    assert written["anatomy"][0]["kernels"] == record.anatomy[0].kernels


def test_the_portable_read_out_writes_the_state_a_second_time(built, monkeypatch):
    """What the form saves, so that a TensorRT that no longer needs it shows."""
    from retnet_export.graph.tensorrt import readout

    bundle, record = built("int4", False)
    monkeypatch.setattr(readout.ReadOutAsSumPass, "call", lambda self, model: ir.passes.PassResult(model, modified=False))
    plain = compile_bundle(bundle, BOTH).anatomy_of("decode")
    assert plain.state_passes == pytest.approx(4, abs=0.1)
    assert plain.bytes > record.anatomy_of("decode").bytes + 2 * 1024 * 2048


def test_planes_are_read_once_and_written_never(built, monkeypatch):
    """The form for a TensorRT that writes INT8 weights out as floats; this one is asked not to say that it does not."""
    from retnet_export.export import tensorrt
    from retnet_export.runtime.bundle.engines import Probe

    bundle, record = built("int8", False)
    monkeypatch.setattr(tensorrt, "ask", lambda *arguments, **more: Probe(joined=True, int8_fused=None))
    planes = compile_bundle(bundle, BOTH)
    step, plain = planes.anatomy_of("decode"), record.anatomy_of("decode")
    assert (planes.int8, record.int8) == ("planes", "fused")
    assert step.state_passes == pytest.approx(2, abs=0.01)
    assert step.over_floor <= 1.12
    assert step.weight_bytes < 1.04 * plain.weight_bytes
    assert planes.part("decode").activation_bytes <= 1.2 * record.part("decode").activation_bytes


def test_the_probe_sees_what_a_fixed_batch_does_to_int8_weights(monkeypatch):
    from retnet_export.export import tensorrt_probe

    assert ask(trt, ("8.6",), False).int8_fused is True
    profile = tensorrt_probe.optimization_profile

    def fixed(builder, graphs, wanted, max_batch):
        made = profile(builder, graphs, wanted, max_batch)
        if wanted.role == "decode":
            made.set_shape("decode.x", *[(1, tensorrt_probe.INPUTS)] * 3)
        return made

    monkeypatch.setattr(tensorrt_probe, "optimization_profile", fixed)
    assert ask(trt, ("8.6",), False).int8_fused is False


def test_a_chunk_whose_sizes_the_log_leaves_open_is_refused(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config(), chunk=8)
    record = compile_bundle(bundle, CompileOptions("tensorrt-rtx", ("8.6",), max_batch=4))
    assert record.anatomy_of("prefill") is None
    assert "the log leaves sizes of a chunk open" in record.anatomy_missing


def test_the_forms_are_gone_after_a_build_and_after_a_failed_one(tmp_path):
    bundle = tiny.bundle(tmp_path, tiny.config())
    with pytest.raises(RuntimeError, match="on the way"), tensorrt_forms(bundle, join=True, planes=True):
        raise RuntimeError("on the way")
    assert not (bundle.path / "engines").exists()
