"""Other tokenizers become a tokenizer.json that reads a page of many scripts as the original does, token by token."""

from __future__ import annotations

import base64
import json
import shutil

import pytest
from conftest import EXAMPLE
from tokenizers import Tokenizer
from tokenizers_made import KINDS

from retnet_export.export.text import read_text_settings
from retnet_export.export.tokenizers import GPT4_PATTERN, PAGE, converted
from retnet_export.runtime.errors import CheckpointWarning, UserError

TEXTS = [*PAGE.split("\n"), PAGE]
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TRAINING = (EXAMPLE / "held-out.txt").read_text()[:60_000] + PAGE * 20


def encode(content: str, text: str) -> list[int]:
    return Tokenizer.from_str(content).encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    file = tmp_path_factory.mktemp("training") / "text.txt"
    file.write_text(TRAINING)
    return file


def sentencepiece_model(training, folder, **options):
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("transformers")
    prefix = folder / "made"
    sentencepiece.SentencePieceTrainer.train(
        input=str(training), model_prefix=str(prefix), vocab_size=1000, minloglevel=2, hard_vocab_limit=False, **options
    )
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model"), folder / "made.model"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {"byte_fallback": True},
        {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"user_defined_symbols": ["<|user|>"], "split_digits": True},
    ],
    ids=["default", "as Llama", "symbols"],
)
def test_sentencepiece(training, tmp_path, kind, options):
    original, model = sentencepiece_model(training, tmp_path, model_type=kind, **options)
    (tmp_path / "in").mkdir()
    shutil.move(model, tmp_path / "in" / "tokenizer.model")
    config = {"bos_token": "<s>", "add_bos_token": True, "eos_token": "</s>"}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(config))
    text = read_text_settings(tmp_path / "in", {}, 1000)
    for part in TEXTS:
        assert encode(text.tokenizer, part) == original.encode(part)
    assert (text.prefix_ids, text.eos_ids) == ((original.bos_id(),), (original.eos_id(),))


def test_added_tokens_survive(training, tmp_path):
    original, model = sentencepiece_model(training, tmp_path, model_type="bpe", byte_fallback=True)
    shutil.move(model, tmp_path / "spiece.model")
    size = original.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|a|>": size}))
    decoder = {str(size): {"content": "<|a|>", "special": True}, str(size + 1): {"content": "<b>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    content = converted(tmp_path)
    assert {size, size + 1} <= set(encode(content, "x<|a|>y<b>z"))
    assert Tokenizer.from_str(content).decode([size, size + 1], skip_special_tokens=True) == "<b>"
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|c|>": size + 9}))
    with pytest.raises(UserError, match=r"'<\|c\|>' is .* but the vocabulary gives it"):
        converted(tmp_path)


def ranks_of(kind: str) -> tuple[dict[bytes, int], dict, list]:
    """Bytes by rank of a byte-level tokenizer, its vocabulary and its merges."""
    from tokenizers import decoders

    document = json.loads(KINDS[kind]().to_str())
    special = len(document["added_tokens"])
    # Each character of a byte-level piece is a byte; the alphabet comes first, and merges follow in order.
    alphabet = {character: byte for byte, character in enumerate(_bytes_to_unicode())}
    assert decoders.ByteLevel().decode(["Ġ"]) == " "
    vocabulary = {piece: token - special for piece, token in document["model"]["vocab"].items() if token >= special}
    ranks = {bytes(alphabet[character] for character in piece): rank for piece, rank in vocabulary.items()}
    return ranks, vocabulary, [tuple(merge) for merge in document["model"]["merges"]]


def _bytes_to_unicode() -> list[str]:
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize("pattern", [None, GPT2_PATTERN])
def test_tiktoken(tmp_path, pattern):
    tiktoken = pytest.importorskip("tiktoken")
    pytest.importorskip("transformers")
    ranks, _, _ = ranks_of("byte-level, digits by three")
    lines = (f"{base64.b64encode(piece).decode()} {rank}" for piece, rank in ranks.items())
    (tmp_path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    config = {"added_tokens_decoder": {str(len(ranks)): {"content": "<|end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | ({} if pattern is None else {"pat_str": pattern})))
    original = tiktoken.Encoding("x", pat_str=pattern or GPT4_PATTERN, mergeable_ranks=ranks, special_tokens={})
    if pattern is None:
        with pytest.warns(CheckpointWarning, match="does not say how a text is split before BPE"):
            content = converted(tmp_path)
    else:
        content = converted(tmp_path)
    for text in TEXTS:
        assert encode(content, text) == original.encode_ordinary(text)
    assert encode(content, "<|end|>") == [len(ranks)]


def gpt2_files(folder, names: tuple[str, str]):
    ranks, vocabulary, merges = ranks_of("byte-level")
    (folder / names[0]).write_text(json.dumps(vocabulary))
    (folder / names[1]).write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return ranks


def test_vocabulary_and_merges(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = gpt2_files(tmp_path, ("vocab.json", "merges.txt"))
    original = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    content = converted(tmp_path)
    for text in TEXTS:
        assert encode(content, text) == original.encode_ordinary(text)
        assert Tokenizer.from_str(content).decode(encode(content, text)) == text


def test_a_dictionary_of_fairseq_with_the_bpe_of_gpt2(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = gpt2_files(tmp_path, ("encoder.json", "vocab.bpe"))
    shuffled = [(7 * number + 3) % len(ranks) for number in range(len(ranks))]
    assert len(set(shuffled)) == len(ranks)
    (tmp_path / "dict.txt").write_text("".join(f"{number} 100\n" for number in shuffled))
    original = tiktoken.Encoding("x", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    content = converted(tmp_path)
    for text in TEXTS:
        assert encode(content, text) == [4 + shuffled.index(token) for token in original.encode_ordinary(text)]
    assert encode(content, "</s>") == [2]


def test_a_dictionary_of_fairseq_with_codes_of_subword_nmt(training, tmp_path):
    learn, apply = pytest.importorskip("subword_nmt.learn_bpe"), pytest.importorskip("subword_nmt.apply_bpe")
    with training.open() as text, (tmp_path / "bpecodes").open("w") as codes:
        learn.learn_bpe(text, codes, 800)
    with (tmp_path / "bpecodes").open() as codes:
        original = apply.BPE(codes)
    words = dict.fromkeys(" ".join(original.process_line(line) for line in [" ".join(TRAINING.split())]).split())
    (tmp_path / "dict.txt").write_text("".join(f"{word} 9\n" for word in reversed(words)))
    ids = {word: 4 + index for index, word in enumerate(reversed(words))}
    content = converted(tmp_path)
    for text in (" ".join(line.split()) for line in PAGE.split("\n")):
        expected = [ids[piece] for piece in original.process_line(text).split()]
        assert encode(content, text) == expected
        assert Tokenizer.from_str(content).decode(expected) == text
    (tmp_path / "bpecodes").write_text("a b</w>\n")
    with pytest.raises(UserError, match=r"before its version 0\.2"):
        converted(tmp_path)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_dictionary_of_fairseq_with_sentencepiece(training, tmp_path, kind):
    original, model = sentencepiece_model(training, tmp_path, model_type=kind, byte_fallback=True)
    pieces = [original.id_to_piece(token) for token in range(3, original.get_piece_size())]
    (tmp_path / "in").mkdir()
    shutil.move(model, tmp_path / "in" / "sentencepiece.bpe.model")
    (tmp_path / "in" / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in [*reversed(pieces), "madeupword0000"]))
    content = converted(tmp_path / "in")
    for text in TEXTS:
        assert encode(content, text) == [4 + len(pieces) - 1 - (token - 3) for token in original.encode(text)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"dict.txt": "a 1\n"}, "a dictionary without its BPE; add"),
        ({"dict.txt": "a\n", "bpecodes": "#version: 0.2\n"}, "line 1 is 'a', expected a token and its count"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "not byte-level"),
        ({"vocab.json": '{"Ġ": 0}', "merges.txt": "a b c d\n"}, "is not a merge"),
        ({"vocab.json": '{"Ġ": 0}', "merges.txt": "a b\n"}, "does not belong to the vocabulary"),
        ({"tokenizer.model": "garbage"}, "not a SentencePiece model that transformers can convert"),
    ],
)
def test_files_that_cannot_be_converted_are_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        converted(tmp_path)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert converted(tmp_path) is None
    assert read_text_settings(tmp_path, {"eos_token_id": 3}, 10).tokenizer is None
