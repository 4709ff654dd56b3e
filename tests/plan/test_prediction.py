from __future__ import annotations

import pytest
import tiny

from retnet_export.plan.devices import DEVICES, find_device, formats_of
from retnet_export.plan.outlook import outlook
from retnet_export.plan.prediction import check_against_measurements, fit, predict
from retnet_export.plan.preflight import largest_batch, nearest_fit, needed_bytes
from retnet_export.plan.sizes import sizes_of_bundle, sizes_of_model
from retnet_export.runtime.bundle.anatomy import Anatomy
from retnet_export.runtime.errors import UserError

SIZES = sizes_of_model(tiny.config(hidden_size=2048, num_layers=24, num_heads=8, head_key_dim=256, head_value_dim=512), "float16")


@pytest.mark.parametrize(("row", "predicted"), check_against_measurements(), ids=lambda value: getattr(value, "model", ""))
def test_every_prediction_is_within_a_quarter_of_its_measurement(row, predicted):
    assert predicted == pytest.approx(row.milliseconds, rel=0.25)


def test_a_row_left_out_of_the_fit_is_still_predicted(monkeypatch):
    """The constants are not made of the rows one by one: without any of Jetson's devices the others predict it."""
    from retnet_export.plan import prediction

    for device in ("agx-orin-64gb", "orin-nx-16gb", "orin-nano-8gb"):
        rows = [row for row in prediction.MEASUREMENTS if row.runtime == "tensorrt"]
        fit.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(prediction, "MEASUREMENTS", tuple(row for row in rows if row.device != device))
            constants = fit("tensorrt")
        for row in rows:
            if row.device == device:
                predicted = constants.milliseconds(DEVICES[device].bandwidth_gbs, row.matrix_bytes, row.layers, 1)
                assert predicted == pytest.approx(row.milliseconds, rel=0.25)
    fit.cache_clear()


def test_the_range_holds_the_prediction():
    result = predict(SIZES, find_device("orin-nano-8gb"))
    assert result.low <= result.tokens_per_second <= result.high


def test_a_transformer_slows_with_its_context_and_we_do_not():
    result = predict(SIZES, find_device("agx-orin-64gb"))
    rates = [rate for rate in result.transformer.values() if rate is not None]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > result.tokens_per_second > rates[-1]


@pytest.mark.parametrize(("device", "sets"), [("orin-nano-8gb", 2), ("h100", 1), ("cpu-2-cores", 1)])
def test_states_are_in_memory_as_often_as_the_runtime_holds_them(device, sets):
    one, three = (outlook(SIZES, find_device(device), batch, 256, ("float16",)).at_rest for batch in (1, 3))
    assert three - one == 2 * (sets * SIZES.state_bytes + 4 * SIZES.config.vocab_size)


def test_the_largest_batch_fits_and_the_next_does_not():
    available = find_device("orin-nano-8gb").usable_bytes
    batch = largest_batch(SIZES, available, 256)
    assert needed_bytes(SIZES, batch, 256) <= available < needed_bytes(SIZES, batch + 1, 256)


def test_what_does_not_fit_says_how_much_is_missing():
    huge = sizes_of_model(tiny.config(hidden_size=8192, num_layers=64, ffn_size=16384), "float16")
    result = outlook(huge, find_device("orin-nano-8gb"), 1, 256, ("float16",))
    assert not result.fits
    assert result.largest_batch == 0
    assert "6.25 are usable" in (result.why_not or "")


def test_formats_that_a_gpu_lacks_are_refused():
    result = outlook(SIZES, find_device("orin-nano-8gb"), 1, 256, ("float8",))
    assert result.why_not == "float8 needs compute capability 8.9, this GPU has 8.7"
    assert formats_of("8.7") == ("float32", "float16", "bfloat16", "int8", "int4")


def test_the_nearest_fit_is_a_smaller_batch_then_smaller_weights(tmp_path):
    manifest = tiny.bundle(tmp_path, tiny.config(vocab_size=8192, hidden_size=512), chunk=8).manifest
    sizes = sizes_of_bundle(manifest)
    assert nearest_fit(manifest, needed_bytes(sizes, 3, 8), 9) == "it fits with max_batch=3"
    smaller = nearest_fit(manifest, needed_bytes(sizes, 1, 8) - sizes.weights_bytes / 3, 1)
    assert smaller.startswith("export it with precision=fp16: 0.6")
    assert nearest_fit(manifest, 1e6, 1).startswith("no weight format makes it fit")


def test_an_unknown_device_is_answered_with_the_known_ones():
    with pytest.raises(UserError, match=r"no device 'nano'; the planner knows orin-nano-4gb, .*h100"):
        find_device("nano")


def counted(kernels, *, weights=1.0e9, state=2.0e8, other=1e7):
    return Anatomy(
        role="decode",
        tokens=1,
        kernels=kernels,
        layers=24,
        weight_bytes=int(weights),
        state_bytes=int(state),
        other_bytes=int(other),
        state_passes=2.0,
        floor_bytes=int(weights + state),
        excess=(),
        source="builder's log",
    )


def test_an_engines_bytes_and_kernels_are_what_is_predicted_from():
    device = find_device("agx-orin-64gb")
    lean, wasteful = predict(SIZES, device, step=counted(220)), predict(SIZES, device, step=counted(440, state=6e8))
    assert (lean.bytes_per_step, lean.kernels) == (1.21e9, 220)
    assert predict(SIZES, device, 4, counted(220)).bytes_per_step == 1.0e9 + 4 * 2.1e8
    constants = fit("tensorrt")
    expected = 1.21e9 / 205e6 / constants.efficiency + 22 * constants.overhead_ms
    assert lean.tokens_per_second == pytest.approx(1e3 / expected)
    assert wasteful.tokens_per_second < 0.7 * lean.tokens_per_second


def test_what_a_tensorrt_engine_does_says_nothing_of_another_runtime():
    result = outlook(SIZES, find_device("h100"), 1, 256, ("float16",), counted(220))
    assert result.prediction.kernels is None
    assert outlook(SIZES, find_device("agx-orin-64gb"), 1, 256, ("float16",), counted(220)).prediction.kernels == 220
