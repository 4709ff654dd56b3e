"""The kernels for batches and prompts compile for every GPU they are meant for, without a GPU, and fit each."""

import re

import numpy as np
import pytest
import tiny

from retnet_export.quantize.pipeline import QuantizeOptions, quantize_bundle
from retnet_export.runtime.backends.cuda import pieces
from retnet_export.runtime.backends.cuda.compiler import compile_text, compiler_version, supported_capabilities
from retnet_export.runtime.backends.cuda.many_model import many_source
from retnet_export.runtime.backends.cuda.plan import DeviceLimits
from retnet_export.runtime.backends.cuda.weights import DeviceWeights
from retnet_export.runtime.errors import MissingExtraError, UserError

LIMITS = {
    "Orin Nano": DeviceLimits((8, 7), 8, 163 << 10),
    "RTX 4060": DeviceLimits((8, 9), 24, 99 << 10),
    "H100": DeviceLimits((9, 0), 132, 227 << 10),
    "RTX 5090": DeviceLimits((12, 0), 170, 99 << 10),
}
"""Of one GPU of each compute capability: multiprocessors, and shared memory that a block may have (CUDA's programming guide)."""
MOST_SPILLED = 256
"""Bytes; of the widest tiles of integers."""


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("RETNET_EXPORT_CACHE", str(tmp_path / "kernels"))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "int4", "other")]
    wide = tiny.config(hidden_size=256, head_key_dim=64, head_value_dim=128, ffn_size=512)
    plain = tiny.bundle(folders[0], wide, precision="fp16")
    return {
        "fp16": plain,
        "int4": quantize_bundle(plain, folders[1] / "int4.retnet", QuantizeOptions(weights="int4", head="int8")),
        "fp32": tiny.bundle(folders[2], tiny.CONFIGS["torchscale, deepnorm, layer norms"]),
    }


@pytest.mark.parametrize("width", [0, 8, 256])
@pytest.mark.parametrize(
    ("device", "variant"),
    [("Orin Nano", "fp16"), ("Orin Nano", "int4"), ("RTX 4060", "fp32"), ("H100", "fp16"), ("RTX 5090", "int4")],
)
def test_kernels_of_many_rows_compile_and_fit(device, variant, width, bundles):
    try:
        compiler_version()
    except (MissingExtraError, UserError) as error:
        pytest.skip(str(error))
    limits = LIMITS[device]
    if limits.capability not in supported_capabilities():
        pytest.skip(f"NVRTC {compiler_version()} does not know compute capability {limits.capability}")
    source = many_source(DeviceWeights.of(bundles[variant]), limits)
    text = source.text(width)
    log = compile_text("many", text, limits.capability).log
    assert max(int(found) for found in re.findall(r"(\d+) bytes spill stores", log)) <= MOST_SPILLED
    kernels = re.findall(r"entry function '(\w+)'", log)
    assert kernels
    if width:
        assert set(kernels) == {source.product_name(name, width) for name in source.layouts if name != "embedding.weight"}


def test_pieces_cover_every_row_once_and_keep_drafts_together():
    random = np.random.default_rng(0)
    for _ in range(200):
        lengths = random.integers(0, 3000, 5)
        needed = lengths + random.integers(0, 2, 5) * random.integers(0, 20, 5)
        cut = pieces.takes(lengths, needed, 1, 1024)
        assert (sum(cut, np.zeros(5, np.int64)) == needed).all()
        drafts = needed > lengths
        assert all(((piece == needed) | (piece == 0))[drafts].all() for piece in cut)
        assert all(piece[~drafts].sum() <= 1024 for piece in cut)


def test_tokens_that_were_kept_have_no_row():
    tokens, lengths = np.array([[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]]), np.array([3, 2])
    rows = np.array([[2, 3, 4], [1, 2, 2]])
    drafts = [np.array([5, 6, 8]), np.array([1, 9])]
    kept = pieces.still_right(drafts, tokens, np.array([2, 1]))
    assert kept.tolist() == [2, 1]
    assert pieces.still_right(drafts, tokens, np.array([1, 0])).tolist() == [1, 0]
    (piece,) = pieces.cut(tokens, lengths, rows, kept, 1024)
    assert piece.tokens.tolist() == [7, 8, 9, 2, 3]
    assert piece.index_of.tolist() == [2, 3, 4, 1, 2]  # in the slot's text, for the rotation
    assert (piece.lengths.tolist(), piece.needed.tolist(), piece.starts.tolist()) == ([3, 2], [3, 2], [0, 3])
    assert piece.picked.tolist() == [0, 1, 2, 3, 4, 4]


def test_one_sequence_alone_is_cut_as_it_is_among_others():
    random = np.random.default_rng(1)
    for _ in range(100):
        length, drafts = int(random.integers(0, 9)), int(random.integers(1, 9))
        tokens = random.integers(0, 99, (1, length + drafts))
        rows = max(length - 1, 0) + np.minimum(np.arange(drafts + 1), drafts)[None]
        rows = np.minimum(rows, tokens.shape[1] - 1)
        kept = np.array([int(random.integers(0, 1 + max(0, min(length, rows.min()))))])
        (alone,) = pieces.cut(tokens, np.array([length]), rows, kept, 1024)
        both = [np.concatenate([array, array]) for array in (tokens, np.array([length]), rows, kept)]
        (among,) = pieces.cut(*both, 1024)
        count = len(alone.tokens)
        for name in ("tokens", "slot_of", "index_of"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(among, name)[:count], err_msg=name)
        for name in ("lengths", "needed", "starts", "kept"):
            np.testing.assert_array_equal(getattr(alone, name), getattr(among, name)[:1], err_msg=name)
        np.testing.assert_array_equal(alone.picked, among.picked[: len(alone.picked)])
        np.testing.assert_array_equal(alone.places[1], among.places[1][: len(alone.places[1])])
