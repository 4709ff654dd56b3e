"""A conversation: a message and its reply happen, or they did not; branches do not meet; rewinding takes back what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.conversation import Conversation
from retnet_export.runtime.generate.generation import Options

OPTIONS = Options(temperature=0.0, max_new_tokens=8)


@pytest.fixture
def talk(writer) -> Conversation:
    return Conversation(writer, OPTIONS, keep=3)


def reply(talk: Conversation, message: str, **options) -> str:
    return "".join(talk.say(message, **options))


def test_a_message_begins_on_a_line_of_its_own(talk, writer):
    first = reply(talk, "Who art thou?")
    session = writer.session()
    session.feed("Who art thou?\n")
    assert first == "".join(session.generate(OPTIONS))
    session.feed(("" if first.endswith("\n") else "\n") + "And whence?\n")
    assert reply(talk, "And whence?") == "".join(session.generate(OPTIONS))


def test_rewind_takes_back_a_message_and_its_reply(talk):
    reply(talk, "Who art thou?")
    position = talk.session.position
    second = reply(talk, "And whence?")
    talk.rewind()
    assert talk.session.position == position
    assert reply(talk, "And whence?") == second
    with pytest.raises(UserError, match="cannot take back 9 messages: 2 are kept, of at most 3"):
        talk.rewind(9)


def test_a_stopped_reply_keeps_what_was_said(talk, writer):
    pieces: list[str] = []
    for piece in talk.say("Who art thou?", stopped=lambda: len(pieces) == 3):
        pieces.append(piece)
    assert len(pieces) == 3
    assert talk.session.position == len(writer.tokenizer.encode("Who art thou?\n")) + len(talk.stats.total_ms)
    assert reply(talk, "And whence?")


def test_a_message_stopped_while_it_is_read_never_happened(talk):
    reply(talk, "Who art thou?")
    position, kept = talk.session.position, talk.kept
    assert reply(talk, "word " * 400, stopped=lambda: True) == ""
    assert (talk.session.position, talk.kept) == (position, kept)


def test_a_message_whose_reply_is_not_finite_is_taken_back(talk):
    reply(talk, "Who art thou?")
    position = talk.session.position
    snapshot = talk.session.snapshot()
    broken = np.full_like(snapshot.state["state.002"], np.nan)
    talk.session.restore(replace(snapshot, state={**snapshot.state, "state.002": broken}))
    with pytest.raises(UserError, match="of layer 2"):
        reply(talk, "And whence?")
    assert talk.session.position == position


def test_a_message_that_cannot_be_encoded_costs_nothing(talk):
    for message in ("a", "b", "c"):
        reply(talk, message)
    position = talk.session.position
    with pytest.raises(UserError, match="not valid Unicode"):
        reply(talk, "\ud800")
    assert talk.session.position == position


def test_a_branch_and_its_origin_go_on_apart(talk):
    reply(talk, "Who art thou?")
    alone = talk.session.position
    talk.fork()
    reply(talk, "Something else")
    assert talk.session.position > alone
    talk.switch(0)
    assert talk.session.position == alone
    with pytest.raises(UserError, match="no branch 3; there are 1 to 2"):
        talk.switch(2)


def test_reset_comes_back_to_the_beginning_it_was_given(talk):
    talk.begin_with("ROMEO and JULIET.\n")
    position = talk.session.position
    reply(talk, "Who art thou?")
    talk.reset()
    assert talk.session.position == position > 0
    assert talk.kept == 0


def test_a_loaded_state_can_be_taken_back_and_a_wrong_one_changes_nothing(talk, tmp_path, model):
    reply(talk, "Who art thou?")
    talk.save(tmp_path / "talk.state")
    position = talk.session.position
    talk.reset()
    talk.load(tmp_path / "talk.state")
    assert talk.session.position == position
    talk.rewind()
    assert talk.session.position == 0
    model.session().snapshot().save(tmp_path / "other.state")
    with pytest.raises(UserError, match="of another model"):
        talk.load(tmp_path / "other.state")
    assert talk.kept == 0
