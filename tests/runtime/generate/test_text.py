"""Text streams as whole characters, joins up to what the tokenizer says, and ends before a stop string."""

from __future__ import annotations

import pytest
from conftest import EXAMPLE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retnet_export.runtime.bundle.manifest import TokenizerSpec
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.text import LONGEST_WAIT, StopStrings, Tokenizer

TOKENIZER = Tokenizer(EXAMPLE / "tokenizer.json", TokenizerSpec("tokenizer.json"))
BYTES = {TOKENIZER._tokenizer.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}


def streamed(tokens, context=()) -> list[str]:
    stream = TOKENIZER.stream(context)
    return [*(stream.push(token) for token in tokens), stream.flush()]


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
    with pytest.raises(UserError, match="a stop string is empty"):
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
