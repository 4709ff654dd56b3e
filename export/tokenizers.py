"""Tokenizers that are no tokenizer.json become one: SentencePiece, vocab.json with merges.txt, tiktoken, fairseq's dict.txt.

Rule: the conversion is that of transformers or of tokenizers itself, and what it gives is compared with the original package on a
page of many scripts, token by token, before it is exported. What differs is refused.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_export.export.checkpoints.files import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER_CONFIG
from retnet_export.export.checkpoints.sources import read_json
from retnet_export.runtime.bundle.files import read_text
from retnet_export.runtime.errors import CheckpointWarning, MissingExtraError, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "source.spm")
BYTE_LEVEL = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
FAIRSEQ_CODES = ("bpecodes", "codes", "code", "codes.txt", "bpe.codes")
FAIRSEQ_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
"""The first tokens of every fairseq dictionary, which its dict.txt leaves out."""
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How cl100k, Llama 3 and most others with a tiktoken file cut a text before BPE; the file does not say it."""
PAGE = """\
In the beginning God created the heaven and the earth. It's 12,345.67 dollars -- isn't it? "Yes," she said; (no) [maybe] {never}!
  Two  spaces,\ttabs\t\tand\r\nlines\n\n\nthat end.   \nÉtait-ce l'été ? Größe, naïve façade, señor, Łódź, İstanbul, Þórr.
Ἐν ἀρχῇ ἦν ὁ λόγος. В начале было Слово, и Слово было у Бога. בְּרֵאשִׁית בָּרָא אֱלֹהִים. في البدء كان الكلمة.
आदि में वचन था। ในเริ่มแรกนั้น 太初有道,道與神同在。初めに言があった。태초에 말씀이 계시니라. Ban đầu có Ngôi Lời.
def f(x: int) -> str:\n    return f"{x!r:>10}" + 'a\\n' if x != 0 else None  # 100 % ∑∫≈∞ ½ ﬁ ① Ａ
🎉 👩‍👩‍👧 🇫🇷 e\u0301 \u200b<html>&amp;</html> https://example.org/a?b=c&d=e_f user@example.org
"""
"""Text in many scripts, with what tokenizers treat specially."""


def converted(folder: Path) -> str | None:
    """The content of a tokenizer.json for the tokenizer in a folder; None if there is none.

    Raises:
        UserError: the files contradict one another, are of no kind that is known, or cannot be converted exactly.
    """
    config = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    tokenizer = _converted(folder, config)
    if tokenizer is None:
        return None
    _add_tokens(tokenizer, folder, config)
    _add_prefix(tokenizer, config)
    return tokenizer.to_str()


def _converted(folder: Path, config: Mapping[str, Any]) -> Tokenizer | None:
    model = next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    model = model or next(iter(sorted(folder.glob("*.tiktoken"))), None)
    byte_level = next((pair for pair in BYTE_LEVEL if all((folder / name).is_file() for name in pair)), None)
    dictionary = folder / "dict.txt"
    if dictionary.is_file():
        return _from_fairseq(folder, dictionary, model, byte_level)
    if model is not None:
        return _from_tiktoken(model, config) if _is_tiktoken(model) else _from_sentencepiece(model, folder)
    if byte_level is not None:
        return _from_byte_level(read_json(folder / byte_level[0]), folder / byte_level[1], config)
    return None


def _from_sentencepiece(model: Path, folder: Path) -> Tokenizer:
    transformers, sentencepiece = _import("transformers"), _import("sentencepiece")
    _import("google.protobuf")
    with tempfile.TemporaryDirectory() as temporary:
        # Only what the tokenizer needs, under the name that transformers looks for.
        shutil.copyfile(model, Path(temporary) / "tokenizer.model")
        for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(temporary) / name)
        try:
            original = sentencepiece.SentencePieceProcessor(model_file=str(model))
            tokenizer: Tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(temporary).backend_tokenizer
        except Exception as error:  # both packages raise whatever they meet
            raise UserError(f"{model}: not a SentencePiece model that transformers can convert: {error}") from error
    _check(tokenizer, original.encode, model)
    return tokenizer


def _is_tiktoken(model: Path) -> bool:
    """Whether a file has lines of a token in base64 and its rank."""
    with model.open("rb") as file:
        parts = file.readline(1024).split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], validate=True))
    except ValueError:
        return False


def _from_tiktoken(model: Path, config: Mapping[str, Any]) -> Tokenizer:
    _import("transformers")
    tiktoken, load = _import("tiktoken"), _import("tiktoken.load")
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pattern = config.get("pat_str") or config.get("pattern")
    if not isinstance(pattern, str):
        pattern = GPT4_PATTERN
        warnings.warn(
            f"{model}: it does not say how a text is split before BPE; it is split as in cl100k and Llama 3. If that is wrong, put "
            f"the right pattern into {TOKENIZER_CONFIG} as pat_str",
            CheckpointWarning,
            stacklevel=2,
        )
    try:
        tokenizer: Tokenizer = TikTokenConverter(vocab_file=str(model), pattern=pattern).converted()  # type: ignore[no-untyped-call]
        ranks = load.load_tiktoken_bpe(str(model))
        original = tiktoken.Encoding(model.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except Exception as error:  # both packages raise whatever they meet
        raise UserError(f"{model}: not a tiktoken file that transformers can convert: {error}") from error
    from tokenizers import processors

    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _check(tokenizer, original.encode_ordinary, model)
    return tokenizer


def _from_byte_level(vocabulary: Mapping[str, Any], merges: Path, config: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's kind, by tokenizers itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if "Ġ" not in "".join(vocabulary):
        raise UserError(
            f"{merges.parent}: its vocabulary is not byte-level as GPT-2's, the only kind that can be read from vocab.json and "
            "merges.txt; save it with transformers as tokenizer.json"
        )
    try:
        tokenizer = Tokenizer(models.BPE(dict(vocabulary), _merges(merges)))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{merges}: it does not belong to the vocabulary in the same folder: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of a merges file, with or without a third column of counts; the first line may be a comment on the version."""
    lines = read_text(path).split("\n")
    pairs = [line.split(" ") for line in (lines[1:] if lines[0].startswith("#version") else lines) if line.strip()]
    if wrong := next((pair for pair in pairs if len(pair) not in (2, 3)), None):
        raise UserError(f"{path}: {' '.join(wrong)!r} is not a merge; expected two pieces per line")
    return [(pair[0], pair[1]) for pair in pairs]


def _from_fairseq(folder: Path, dictionary: Path, model: Path | None, byte_level: tuple[str, str] | None) -> Tokenizer:
    ids = _fairseq_ids(dictionary)
    codes = next((folder / name for name in FAIRSEQ_CODES if (folder / name).is_file()), None)
    if model is not None:
        return _renumbered(_from_sentencepiece(model, folder), ids, dictionary)
    if byte_level is not None:
        encoder = read_json(folder / byte_level[0])
        if missing := [piece for piece, number in encoder.items() if str(number) not in ids]:
            raise UserError(
                f"{dictionary}: it lacks {len(missing)} pieces of {byte_level[0]}, as {missing[0]!r}; this is not its dictionary"
            )
        vocabulary = {token: ids[token] for token in FAIRSEQ_SPECIAL} | {piece: ids[str(rank)] for piece, rank in encoder.items()}
        tokenizer = _from_byte_level(vocabulary, folder / byte_level[1], {})
    elif codes is not None:
        tokenizer = _from_codes(codes, ids)
    else:
        raise UserError(
            f"{dictionary}: a dictionary without its BPE; add {SENTENCEPIECE[0]}, or encoder.json and vocab.bpe, or "
            f"{FAIRSEQ_CODES[0]}"
        )
    _add_fairseq_special(tokenizer)
    return tokenizer


def _fairseq_ids(path: Path) -> dict[str, int]:
    """Ids by token; dict.txt has a token and its count a line."""
    ids = {token: index for index, token in enumerate(FAIRSEQ_SPECIAL)}
    for number, line in enumerate(filter(None, read_text(path).split("\n")), 1):
        token, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not token or not count.isdigit():
            raise UserError(f"{path}: line {number} is {line[:40]!r}, expected a token and its count")
        ids[token] = len(ids) if token not in ids else ids[token]
    return ids


def _from_codes(codes: Path, ids: Mapping[str, int]) -> Tokenizer:
    """subword-nmt's and fastBPE's: words between spaces, and `@@` at the end of a piece that does not end one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    lines = read_text(codes).split("\n", 1)[0]
    merges = _merges(codes)
    if not lines.startswith("#version: 0.2") and len(lines.split(" ")) != 3:
        raise UserError(f"{codes}: BPE codes of subword-nmt before its version 0.2, which are not read; convert them")
    vocabulary = {
        token if token in FAIRSEQ_SPECIAL else token[:-2] if token.endswith("@@") else f"{token}</w>": index
        for token, index in ids.items()
    }
    # Pieces on the way to others, which no text ends with: fairseq does not know them, and they are beyond the model's tokens.
    for piece in [piece for pair in merges for piece in (*pair, "".join(pair))]:
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    return tokenizer


def _renumbered(tokenizer: Tokenizer, ids: Mapping[str, int], dictionary: Path) -> Tokenizer:
    """A SentencePiece tokenizer with the ids that fairseq's dictionary gives the pieces."""
    from tokenizers import Tokenizer

    document = json.loads(tokenizer.to_str())
    model, order = document["model"], dict(ids)
    pieces = dict(model["vocab"]) if model["type"] == "Unigram" else dict.fromkeys(model["vocab"], 0.0)
    if len(ids.keys() & pieces.keys()) < len(FAIRSEQ_SPECIAL) + 1:
        raise UserError(
            f"{dictionary}: it has none of the pieces of the SentencePiece model in its folder; this is not its dictionary"
        )
    for piece in pieces:
        order.setdefault(piece, len(order))
    if model["type"] == "Unigram":
        # A word of the dictionary that is no piece is never chosen.
        model["vocab"] = [[piece, pieces.get(piece, -1e9)] for piece in sorted(order, key=order.__getitem__)]
        model["unk_id"] = order["<unk>"]
    else:
        model["vocab"] = order
    document["added_tokens"] = [token | {"id": order[token["content"]]} for token in document["added_tokens"]]
    document["post_processor"] = None
    renumbered: Tokenizer = Tokenizer.from_str(json.dumps(document))
    _add_fairseq_special(renumbered)
    return renumbered


def _add_fairseq_special(tokenizer: Tokenizer) -> None:
    from tokenizers import AddedToken

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in FAIRSEQ_SPECIAL])


def _add_tokens(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Added and special tokens, under the ids that the files give them."""
    from tokenizers import AddedToken

    added: dict[int, tuple[str, Mapping[str, Any]]] = {}
    if (folder / ADDED_TOKENS).is_file():
        added = {int(token): (content, {}) for content, token in read_json(folder / ADDED_TOKENS).items()}
    for token, entry in (config.get("added_tokens_decoder") or {}).items():
        added[int(token)] = (entry["content"], entry)
    for token, (content, entry) in sorted(added.items()):
        flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized") if name in entry}
        special = bool(entry.get("special", True))
        kept = AddedToken(content, special=special, **flags)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([kept])
        if tokenizer.token_to_id(content) != token:
            raise UserError(
                f"{folder}: the added token {content!r} is {token}, but the vocabulary gives it {tokenizer.token_to_id(content)}; "
                "save the tokenizer with transformers as tokenizer.json"
            )


def _add_prefix(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """The token that begins a text, where tokenizer_config.json asks for it."""
    from tokenizers import processors

    bos = config.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    token = tokenizer.token_to_id(bos) if isinstance(bos, str) else None
    if config.get("add_bos_token") is True and token is not None and tokenizer.encode("a").ids[:1] != [token]:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, token)])


def _check(tokenizer: Tokenizer, original: Callable[[str], Sequence[int]], file: Path) -> None:
    """Compare with the original, line by line and as a whole."""
    for text in (*PAGE.split("\n"), PAGE):
        found, expected = tokenizer.encode(text, add_special_tokens=False).ids, list(original(text))
        if found != expected:
            raise UserError(
                f"{file}: converted by transformers it reads {text[:40]!r} as {len(found)} tokens, not as the original's "
                f"{len(expected)}; put a tokenizer.json into its folder"
            )


def _import(package: str) -> Any:
    from importlib import import_module

    try:
        return import_module(package)
    except ImportError as error:
        name = "protobuf" if package == "google.protobuf" else package.partition(".")[0]
        raise MissingExtraError(name, "tokenizers", "a tokenizer without tokenizer.json") from error
