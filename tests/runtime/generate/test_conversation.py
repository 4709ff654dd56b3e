"""A conversation: a message and its reply happen, or they did not; branches do not meet; rewinding takes back what it says."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from retnet_export.runtime.bundle.bundle import write_manifest
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.conversation import Conversation
from retnet_export.runtime.generate.generation import Options
from retnet_export.runtime.model import load

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
    with pytest.raises(UserError, match="cannot remove 9 messages: 2 are kept, at most 3"):
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
    # It is stopped between two pieces of the prompt, whose size is the backend's.
    assert reply(talk, "word " * 3 * talk.session.chunk, stopped=lambda: True) == ""
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


class Turns:
    """A template in the style of the marked ones, that trims what was said before or keeps it."""

    def __init__(self, trim: bool = False) -> None:
        self.trim = trim

    def render(self, messages, *, add_generation_prompt=True) -> str:
        text = "".join(f"{m['role']}:\n{m['content'].strip() if self.trim else m['content']}\n\n" for m in messages)
        return text + ("assistant:\n" if add_generation_prompt else "")


def reads(talk: Conversation, message: str) -> tuple[str, int]:
    """The reply, and how many tokens were read for it."""
    return reply(talk, message), talk.stats.prompt_tokens


@pytest.mark.parametrize("trim", [False, True])
def test_the_model_sees_what_the_template_says_and_reads_only_what_is_new(writer, trim):
    talk = Conversation(writer, OPTIONS, template=Turns(trim))
    said = []
    for message in ("Who art thou?", "And whence?", "Speak!"):
        said.append({"role": "user", "content": message})
        text = Turns(trim).render(said)
        answer, count = reads(talk, message)
        session = writer.session()
        session.feed(text, prefix=False)
        assert answer == "".join(session.generate(OPTIONS))
        # Trimmed, the last reply is read again, and nothing before it.
        new = len(writer.tokenizer.encode(f"\n\nuser:\n{message}\n\nassistant:\n")) + (OPTIONS.max_new_tokens if trim else 0)
        assert count <= new + 2
        said.append({"role": "assistant", "content": answer})
    assert list(talk.messages) == said


def test_a_conversation_on_a_template_is_saved_with_what_was_said(writer, tmp_path):
    talk = Conversation(writer, OPTIONS, template=Turns())
    talk.begin_with("Be brief.")
    reply(talk, "Who art thou?")
    talk.save(tmp_path / "talk.state")
    expected = reads(talk, "And whence?")
    other = Conversation(writer, OPTIONS, template=Turns())
    other.load(tmp_path / "talk.state")
    assert reads(other, "And whence?") == expected
    assert other.messages == talk.messages
    other.rewind(2)
    assert other.messages == ()
    changed = Conversation(writer, OPTIONS, template=Turns(trim=True))
    changed.load(tmp_path / "talk.state")
    reply(changed, "And whence?")
    assert changed.messages[:4] == talk.messages[:4]


def test_a_reply_that_stops_leaves_the_state_before_the_stop(writer):
    whole = reply(Conversation(writer, replace(OPTIONS, max_new_tokens=20)), "Who art thou?")
    stop = whole[6:12]
    talk = Conversation(writer, replace(OPTIONS, max_new_tokens=20, stop=stop))
    text = reply(talk, "Who art thou?")
    assert text == whole[: whole.index(stop)]
    session = writer.session()
    session.feed("Who art thou?\n")
    session.feed(text + ("" if text.endswith("\n") else "\n") + "And whence?\n")
    talk.options = OPTIONS
    assert reply(talk, "And whence?") == "".join(session.generate(OPTIONS))


def test_the_end_that_the_model_chose_is_read_before_the_next_message(example_bundle, tmp_path):
    bundle = shutil.copytree(example_bundle.path, tmp_path / "b.retnet")
    write_manifest(bundle, replace(example_bundle.manifest, eos_ids=(5,)))
    model = load(bundle, "onnxruntime", threads=1)
    talk = Conversation(model, replace(OPTIONS, logit_bias={5: 1000.0}))
    assert reply(talk, "Who art thou?") == ""
    talk.options = OPTIONS
    session = model.session()
    session.feed([*model.tokenizer.encode("Who art thou?\n"), 5, *model.tokenizer.encode("And whence?\n")])
    talk.save(tmp_path / "talk.state")
    expected = "".join(session.generate(OPTIONS))
    assert reply(talk, "And whence?") == expected
    other = Conversation(model, OPTIONS)
    other.load(tmp_path / "talk.state")
    assert reply(other, "And whence?") == expected
