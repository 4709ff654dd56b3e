"""Tokenizers of every kind that checkpoints bring, trained on a page in a moment: what a tokenizer.json of theirs says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from conftest import EXAMPLE
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GPT4_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@cache
def page() -> tuple[str, ...]:
    """Text to train on."""
    text = (EXAMPLE / "held-out.txt").read_text()[:60_000]
    return (*(part + "\n\n" for part in text.split("\n\n")), "日本語 Привет, мир! 12 345 6789\n" * 20)


def _bpe(tokenizer: Tokenizer, special: list[str], **options: object) -> Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(page(), trainer)
    return tokenizer


def _with_plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The trainers take the bytes as special tokens only; in a checkpoint's file they are entries of the vocabulary."""
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(document))


def byte_level(pattern: str | None = None, prefix_space: bool = False) -> Tokenizer:
    """GPT-2's kind; with a pattern, GPT-4's and Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    return _bpe(tokenizer, SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def llama(legacy: bool) -> Tokenizer:
    """BPE with byte fallback; the space at the start by a normalizer (`legacy`) or by Metaspace, at the very start only."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)  # for training: words
    tokenizer = _with_plain_bytes(_bpe(tokenizer, [*SPECIAL, *BYTES]))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = metaspace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    """Words that begin with ▁, at the start `always`, at the `first` one or `never`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = _with_plain_bytes(_bpe(tokenizer, [*SPECIAL, *BYTES]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme=scheme)]
        if scheme == "never"
        else [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram(strip: bool) -> Tokenizer:
    """SentencePiece's kind; `strip`: without extra spaces, as its default is."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=[*SPECIAL, *BYTES], unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(page(), trainer)
    document = json.loads(trained.to_str())
    document["model"] |= {"unk_id": 0, "byte_fallback": True}
    tokenizer = _with_plain_bytes(Tokenizer.from_str(json.dumps(document)))
    if strip:
        spaces = [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


KINDS: Mapping[str, Callable[[], Tokenizer]] = {
    "classics": lambda: Tokenizer.from_file(str(EXAMPLE / "tokenizer.json")),
    "byte-level": byte_level,
    "byte-level, space at the start": lambda: byte_level(prefix_space=True),
    "byte-level, digits by three": lambda: byte_level(GPT4_PATTERN),
    "llama, legacy": lambda: llama(legacy=True),
    "llama": lambda: llama(legacy=False),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, never": lambda: metaspace("never"),
    "unigram": lambda: unigram(strip=False),
    "unigram, extra spaces removed": lambda: unigram(strip=True),
}


def write(kind: str, folder: Path) -> Path:
    """Its tokenizer.json."""
    path = folder / "tokenizer.json"
    KINDS[kind]().save(str(path))
    return path
