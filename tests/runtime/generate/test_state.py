"""Saved states: what was saved comes back, on any session of the model; everything else is refused by name."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.model import load

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OPTIONS = Options(temperature=1.0, seed=2, max_new_tokens=20, repetition_penalty=1.3)


@pytest.fixture
def session(model):
    session = model.session()
    session.feed(PROMPT)
    return session


@pytest.fixture
def saved(session, tmp_path):
    path = tmp_path / "prompt.state"
    session.snapshot().save(path)
    return path


def test_a_loaded_state_goes_on_as_the_saved_one(model, session, saved):
    expected = list(session.generate_tokens(OPTIONS))
    other = model.session()
    other.restore(Snapshot.load(saved))
    assert other.position == len(PROMPT)
    assert list(other.generate_tokens(OPTIONS)) == expected


def test_every_array_survives_the_file_bit_by_bit(session, saved):
    before, after = session.snapshot(), Snapshot.load(saved)
    assert after.state.keys() == before.state.keys()
    for name, array in before.state.items():
        assert after.state[name].dtype == array.dtype
        assert (after.state[name] == array).all()
    assert (after.logits == before.logits).all()
    assert (after.read == before.read).all()
    assert after.tail == before.tail == tuple(PROMPT)


def test_the_start_of_a_sequence_can_be_saved_too(model, tmp_path):
    model.session().snapshot().save(tmp_path / "start")
    session = model.session()
    session.feed(PROMPT)
    session.restore(Snapshot.load(tmp_path / "start"))
    assert session.position == 0
    assert session.logits is None


def test_its_size_does_not_depend_on_what_was_read(model, session):
    longer = model.session()
    longer.feed(PROMPT * 30)
    assert longer.snapshot().bytes == session.snapshot().bytes == model.bundle.manifest.state_bytes


def test_any_flipped_bit_is_noticed(saved, tmp_path):
    content = saved.read_bytes()
    generator = np.random.default_rng(0)
    for place in [*range(0, 1200, 37), *generator.integers(1200, len(content), 60).tolist()]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(generator.integers(8))
        path = tmp_path / "damaged.state"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged\.state: "):
            Snapshot.load(path)


def test_a_truncated_file_is_refused(saved):
    content = saved.read_bytes()
    for size in (0, 7, 100, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"prompt\.state: not a saved state, or a damaged one"):
            Snapshot.load(saved)


def test_a_header_that_claims_the_world_is_refused_without_allocating_it(tmp_path):
    (tmp_path / "huge").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(UserError, match="not a saved state"):
        Snapshot.load(tmp_path / "huge")


def test_other_files_are_told_apart(tmp_path, model):
    save_file({"x": np.zeros(3, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="not a saved state but another safetensors file"):
        Snapshot.load(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=r"absent\.state: .*(No such file|not found)"):
        Snapshot.load(tmp_path / "absent.state")
    with pytest.raises(UserError, match=r"cannot be read|not a saved state"):
        Snapshot.load(tmp_path)


def test_a_state_of_another_model_is_refused_by_name_and_changes_nothing(other_model, saved):
    session = other_model.session()
    session.feed([1])
    with pytest.raises(UserError, match=r"prompt\.state: a state of another model"):
        session.restore(Snapshot.load(saved))
    assert session.position == 1


def test_a_state_of_another_precision_is_refused_by_its_type(saved, tmp_path):
    tiny.bundle(tmp_path, tiny.config(), chunk=8, state="fp16")
    half = load(tmp_path / "tiny.retnet", "onnxruntime", threads=1)
    with pytest.raises(UserError, match=r"prompt\.state: state\.000 is float32\[1, 4, 8, 12\], this bundle's state is float16"):
        half.session().restore(Snapshot.load(saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("state.001"), "lacks the state tensor 'state.001'"),
        (lambda state: state.update({"state.009": state["state.001"]}), "has an unknown state tensor 'state.009'"),
        (lambda state: state.update({"state.001": state["state.001"][:, :1]}), r"state\.001 is float32\[1, 1, 8, 12\]"),
        (lambda state: state.update({"position": np.array([-1])}), "position -1"),
        (lambda state: state.update({"position": np.array([0])}), "position 0 with logits"),
    ],
)
def test_a_file_whose_tensors_do_not_fit_is_refused(model, session, tmp_path, change, message):
    snapshot = session.snapshot()
    change(snapshot.state)
    snapshot.save(tmp_path / "odd.state")
    with pytest.raises(UserError, match=message):
        model.session().restore(Snapshot.load(tmp_path / "odd.state"))


def test_a_full_disk_leaves_the_old_file(session, saved, monkeypatch):
    before = saved.read_bytes()
    session.feed([1, 2])

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"prompt\.state: the state cannot be saved: No space left on device"):
        session.snapshot().save(saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["prompt.state"]


def test_a_folder_that_does_not_exist_is_named(session, tmp_path):
    with pytest.raises(UserError, match=r"absent/prompt\.state: the state cannot be saved: No such file"):
        session.snapshot().save(tmp_path / "absent" / "prompt.state")
