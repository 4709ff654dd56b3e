"""Text streams as whole characters, joins up to what the tokenizer says, and ends before a stop string."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
from conftest import EXAMPLE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retnet_export.runtime.bundle.bundle import open_bundle, record_files, write_manifest
from retnet_export.runtime.bundle.manifest import TokenizerSpec
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.text import LONGEST_WAIT, StopStrings
from retnet_export.runtime.generate.tokenizer import Tokenizer
from retnet_export.runtime.model import load

TOKENIZER = Tokenizer(EXAMPLE / "tokenizer.json", TokenizerSpec("tokenizer.json"))
VOCABULARY = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")).get_vocab()
BYTES = {VOCABULARY[f"<0x{byte:02X}>"]: byte for byte in range(256)}


def streamed(tokens, context=()) -> list[str]:
    decoder = TOKENIZER.decoder(context)
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


@given(st.text(max_size=60).filter(lambda text: "▁" not in text and "\ufffd" not in text))
@settings(max_examples=200, deadline=None)
def test_any_text_round_trips_and_streams_in_whole_characters(text):
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    pieces = streamed(tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


# Many U+FFFD in a row are cut somewhere, as a text of broken bytes is.
@given(st.text(min_size=1, max_size=20).filter(lambda text: text.count("\ufffd") < 4), st.text(max_size=20))
@example("\ufffd", "")
@example("\ufffd", "x")
@example("\ufffd" * 3, "\ufffd")
@settings(max_examples=100, deadline=None)
def test_text_joins_on_to_what_was_read_before(before, after):
    context, tokens = TOKENIZER.encode(before), TOKENIZER.encode(after)
    assert "".join(streamed(tokens, context)) == TOKENIZER.decode(context + tokens)[len(TOKENIZER.decode(context)) :]


def test_a_character_that_the_context_began_is_given_whole():
    tokens = TOKENIZER.encode("🎉!")
    assert "".join(streamed(tokens[2:], tokens[:2])) == "🎉!"


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    tokens = TOKENIZER.encode("🎉!")
    pieces = streamed(tokens)
    assert pieces[:4] == ["", "", "", "🎉"]


def test_bytes_that_never_form_a_character_do_not_wait_for_ever():
    broken = next(token for token, byte in BYTES.items() if byte == 0xFF)
    pieces = streamed([broken] * 3 * LONGEST_WAIT)
    assert any(pieces[:LONGEST_WAIT])
    assert set("".join(pieces)) == {"\ufffd"}


def test_an_unfinished_character_at_the_end_is_given_as_a_replacement():
    assert "".join(streamed(TOKENIZER.encode("é")[:-1] or [next(iter(BYTES))])).strip("\x00") in ("\ufffd", "")


@pytest.mark.parametrize("text", ["a\ud800b", "\udcff"])
def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(UserError, match="not valid Unicode"):
        TOKENIZER.encode(text)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
@settings(max_examples=300, deadline=None)
def test_stop_strings_cut_before_the_first_whatever_the_pieces(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    filtered, given = StopStrings(stops), ""
    for piece in pieces:
        given += filtered.push(piece)
        if filtered.hit:
            break
    else:
        given += filtered.end("")
    # The first stop to be complete ends the text, as it would if each character came alone.
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    if not found:
        assert given == text
        assert not filtered.hit
    else:
        assert filtered.hit
        assert not any(stop in given for stop in stops)
        assert text.startswith(given)
        assert len(given) in {start for _, start in found}


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop has an empty text"):
        StopStrings([""])


def test_generated_text_ends_before_a_stop_string_that_spans_tokens(writer):
    session = writer.session()
    session.feed("In the beginning")
    whole = "".join(session.generate(temperature=0.0, max_new_tokens=40))
    stop = whole[10:17]
    session = writer.session()
    session.feed("In the beginning")
    generation = session.pieces(temperature=0.0, max_new_tokens=40, stop=stop)
    assert "".join(piece.text for piece in generation) == whole[: whole.index(stop)]
    assert generation.finish == "stop"


def test_generated_text_is_what_the_tokenizer_makes_of_all_tokens(writer):
    session = writer.session()
    session.feed("And it came to pass")
    pieces = list(session.pieces(temperature=1.2, seed=4, max_new_tokens=60))
    assert "".join(piece.text for piece in pieces) == writer.tokenizer.decode([piece.token for piece in pieces if piece.token])


@pytest.mark.parametrize(("first", "length"), [(0, 1), (0, 6), (2, 3), (5, 9), (10, 7), (13, 1), (24, 3)])
def test_a_session_stands_before_the_stop_string(writer, first, length):
    session = writer.session(keep=2)
    session.feed("In the")
    whole = "".join(session.generate(temperature=0.0, max_new_tokens=10))
    stop = whole[first : first + length]
    session = writer.session(keep=2)
    session.feed("In the")
    generation = session.pieces(temperature=0.0, max_new_tokens=10, stop=stop)
    text = "".join(piece.text for piece in generation)
    assert (text, generation.finish) == (whole[: whole.index(stop)], "stop")
    assert session.position == len(session.tail)
    assert writer.tokenizer.decode(session.tail) == "In the" + text
    assert session.kept == 1
    other = writer.session()
    other.feed(session.tail)
    np.testing.assert_allclose(session.logits, other.logits, rtol=0, atol=1e-3)


def test_the_token_that_ends_a_text_is_told_and_not_read(writer):
    session = writer.session()
    session.feed("In the")
    position = session.position
    generation = session.pieces(logit_bias={7: 1000.0}, stop_tokens=[7])
    assert list(generation) == []
    assert (generation.finish, generation.ended_by, session.position) == ("stop", 7, position)


@pytest.mark.parametrize("parts", [("In the", " beginning"), ("In", " the begin", "ning"), ("In the beginning",)])
def test_several_feeds_and_a_saved_state_are_one_text(writer, parts, tmp_path):
    session = writer.session()
    for part in parts:
        session.feed(part)
        session.snapshot().save(tmp_path / "part.state")
        session = writer.session()
        session.restore(Snapshot.load(tmp_path / "part.state"))
    assert writer.tokenizer.decode(session.tail) == "In the beginning"


def test_spaces_that_a_tokenizer_drops_are_read_with_what_follows(example_bundle, tmp_path):
    bundle = shutil.copytree(example_bundle.path, tmp_path / "b.retnet")
    document = json.loads((bundle / "tokenizer.json").read_text())
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    document["normalizer"] = {"type": "Sequence", "normalizers": [strip, document["normalizer"]]}
    (bundle / "tokenizer.json").write_text(json.dumps(document))
    manifest = open_bundle(example_bundle.path).manifest
    write_manifest(bundle, replace(manifest, files=record_files(bundle)))
    model = load(bundle, "onnxruntime", threads=1)
    session = model.session()
    session.feed("In the ")
    snapshot = session.snapshot()
    snapshot.save(tmp_path / "s.state")
    session = model.session()
    session.restore(Snapshot.load(tmp_path / "s.state"))
    assert session.feed("  ") == 0
    session.feed("beginning")
    assert model.tokenizer.decode(session.tail).split() == ["In", "the", "beginning"]
