"""Tokenizers of every kind: what is encoded is what was given, and a text in parts is the text."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from conftest import EXAMPLE
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFace
from tokenizers import decoders, models, normalizers, pre_tokenizers
from tokenizers_made import KINDS, write

from retnet_export.runtime.bundle.manifest import TokenizerSpec
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.slot import TAIL
from retnet_export.runtime.generate.tokenizer import Tokenizer

PASSAGES = (
    "In the beginning God created the heaven. 12345 67 8901!\n\nAnd  the earth   was\twithout form,\r\n 'tis \"void\"; it's ",
    " 日本語 Привет 🎉é\n  end <|user|> x\n<|user|>y </s>\n<|user|> Hello, world \n\n\n",
    "x = [1, 22, 333]\n    if (a<b): return f'{a}_{b}'\n\t# né  \n",
)


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(write(kind, Path(mkdtemp())), TokenizerSpec("tokenizer.json"))


def read_in_parts(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    """What a session reads of parts that are fed one after another; it remembers as much."""
    tokens: list[int] = []
    unread = ""
    for part in parts:
        text = unread + part
        context = tokens[-TAIL:]
        tokens += tokenizer.encode_after(context, text, whole=len(context) == len(tokens))
        unread = tokenizer.dropped_end(text)
    return tokens


def made(folder: Path, tokenizer: HuggingFace, **changes: object) -> Tokenizer:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | changes))
    return Tokenizer(path, TokenizerSpec("tokenizer.json"))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_text_in_parts_decodes_to_the_text(kind, data):
    text = data.draw(st.sampled_from(PASSAGES))
    within = {place for found in re.finditer(r"<\|user\|>|</s>", text) for place in range(found.start() + 1, found.end())}
    cuts = sorted(data.draw(st.sets(st.sampled_from(sorted(set(range(1, len(text))) - within)), max_size=7)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    one = tokenizer(kind)
    assert one.decode(read_in_parts(one, parts), special=True) == one.decode(one.encode(text), special=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", PASSAGES)
def test_a_text_cut_between_tokens_has_the_same_tokens(kind, text):
    one = tokenizer(kind)
    whole = one.encode(text)
    # A place between tokens: what stands before it is encoded as the beginning of the whole.
    places = [place for place in range(1, len(text)) if (before := one.encode(text[:place])) == whole[: len(before)]]
    assert len(places) > len(whole) / 2
    for place in places:
        assert read_in_parts(one, [text[:place], text[place:]]) == whole, (text[:place], text[place:])


def test_two_feeds_are_one_text_with_a_prepending_normalizer(tmp_path):
    vocabulary = {piece: index for index, piece in enumerate(["▁", "▁Hello", "▁world", "Hello", "world", *"Helowrd"])}
    plain = HuggingFace(models.WordLevel(vocabulary, unk_token="▁"))
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    plain.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    one = made(tmp_path, plain)
    assert read_in_parts(one, ["Hello", " world"]) == one.encode("Hello world") == [1, 2]


def test_a_word_that_is_cut_is_refused_where_the_tokenizer_ends_every_word(tmp_path):
    plain = HuggingFace(models.BPE({"a": 0, "b": 1, "a</w>": 2, "b</w>": 3}, [], end_of_word_suffix="</w>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.decoder = decoders.BPEDecoder("</w>")
    one = made(tmp_path, plain)
    assert one.decode(read_in_parts(one, ["ab ", "ba"])) == "ab ba"
    with pytest.raises(UserError, match="in the middle of a word, after 'ab'"):
        read_in_parts(one, ["ab", "ba"])


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    plain = HuggingFace.from_file(str(EXAMPLE / "tokenizer.json"))
    expected = plain.encode("In the beginning God created the heaven and the earth.").ids
    assert len(expected) > 8
    plain.enable_truncation(8)
    plain.enable_padding(length=64)
    assert made(tmp_path, plain).encode("In the beginning God created the heaven and the earth.") == expected


def test_dropout_is_off(tmp_path):
    document = json.loads((EXAMPLE / "tokenizer.json").read_text())
    model = document["model"] | {"dropout": 0.9}
    one = made(tmp_path, HuggingFace.from_file(str(EXAMPLE / "tokenizer.json")), model=model)
    expected = tokenizer("classics").encode("In the beginning God created")
    assert all(one.encode("In the beginning God created") == expected for _ in range(20))


def test_an_unknown_character_of_a_unigram_model_is_refused(tmp_path):
    one = made(tmp_path, HuggingFace(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)))
    assert one.encode("aa") == [1, 1]
    with pytest.raises(UserError, match=r"does not know '日' \(character 1 of the text\)"):
        one.encode("a日a")
    with pytest.raises(UserError, match=r"does not know '日' \(character 1 of the text\)"):
        one.encode_after([1, 1, 1], "a日a", whole=True)


def test_a_unigram_model_without_a_token_for_the_unknown_refuses_too(tmp_path):
    one = made(tmp_path, HuggingFace(models.Unigram([("b", 0.0), ("a", -1.0)])))
    with pytest.raises(UserError, match="cannot be encoded"):
        one.encode("a日a")


def test_characters_that_bpe_would_leave_out_are_refused(tmp_path):
    plain = HuggingFace(models.BPE({"a": 0, "b": 1, "ab": 2, "é": 3}, [("a", "b")]))
    plain.normalizer = normalizers.NFC()
    assert plain.encode("a日ab").ids == [0, 2]  # without a word
    one = made(tmp_path, plain)
    assert one.encode("abae\u0301") == [2, 0, 3]
    with pytest.raises(UserError, match=r"does not know '日' \(character 1 of the text\)"):
        one.encode("a日ab")


def test_the_text_unk_is_the_token_and_no_fault(tmp_path):
    one = tokenizer("llama, legacy")
    expected = HuggingFace.from_file(str(write("llama, legacy", tmp_path))).encode("a <unk> b", add_special_tokens=False).ids
    assert one.encode("a <unk> b") == expected
    assert 0 in expected
