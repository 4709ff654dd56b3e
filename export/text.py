"""What a checkpoint says about text: its tokenizer, the tokens that begin and end a text, the template of its chats.

Rule: what Hugging Face's own code does with the same files. A text begins as the tokenizer's post-processor has it, whatever
`bos_token_id` is in config.json; it ends at any of the tokens that any of the files names.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_export.export.checkpoints.files import CHAT_TEMPLATE, GENERATION_CONFIG, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG
from retnet_export.export.checkpoints.sources import read_json
from retnet_export.export.tokenizers import converted
from retnet_export.runtime.bundle.files import read_text
from retnet_export.runtime.bundle.manifest import TokenizerSpec
from retnet_export.runtime.errors import ArgumentError, CheckpointWarning, UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class TextSettings:
    """What goes into a bundle.

    Attributes:
        tokenizer: content of tokenizer.json.
        prefix_ids: tokens that begin a text.
        eos_ids: tokens that end one.
        chat_template: Jinja source.
        special_tokens: texts of the named special tokens.
    """

    tokenizer: str | None = None
    prefix_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> TokenizerSpec | None:
        """Write the files of a bundle; what its manifest says of them."""
        if self.tokenizer is None:
            return None
        (folder / TOKENIZER).write_text(self.tokenizer, encoding="utf-8")
        if self.chat_template is not None:
            (folder / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        template = None if self.chat_template is None else CHAT_TEMPLATE
        return TokenizerSpec(TOKENIZER, self.prefix_ids, template, self.special_tokens)


def read_text_settings(folder: Path | None, settings: Mapping[str, Any], vocab_size: int, bos: str = "auto") -> TextSettings:
    """Read the files of a checkpoint that say how it takes and gives text.

    Args:
        folder: where they are; None if there are none.
        settings: config.json.
        vocab_size: of the model.
        bos: what to read before a text: "auto" as the tokenizer does it, "none", or a token by its id or text.

    Raises:
        UserError: a file is damaged, or `bos` is no token.
    """
    if folder is None:
        return TextSettings(eos_ids=_ends(vocab_size, _ids("config.json", settings)))
    config, generation = _optional(folder / TOKENIZER_CONFIG), _optional(folder / GENERATION_CONFIG)
    special = {**_named_tokens(_optional(folder / SPECIAL_TOKENS)), **_named_tokens(config)}
    content = read_text(folder / TOKENIZER) if (folder / TOKENIZER).is_file() else converted(folder)
    tokenizer = None if content is None else _parsed(content, folder / TOKENIZER)
    # BPE codes have pieces that only lead to others: fairseq's dictionary and the model lack them.
    if tokenizer is not None and not (folder / "dict.txt").is_file():
        _check_vocabulary(tokenizer, folder / TOKENIZER, vocab_size)
    ids = [*_ids("config.json", settings), *_ids(GENERATION_CONFIG, generation)]
    if tokenizer is not None and "eos_token" in special:
        ids.append((TOKENIZER_CONFIG, tokenizer.token_to_id(special["eos_token"])))
    return TextSettings(
        tokenizer=content,
        prefix_ids=() if tokenizer is None else _prefix(tokenizer, bos, vocab_size),
        eos_ids=_ends(vocab_size, ids),
        chat_template=_template(folder, config),
        special_tokens=special,
    )


def _optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _parsed(content: str, path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer: Tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer that the package 'tokenizers' reads: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
    """Compare a tokenizer with the model: its tokens must be rows of the embedding, but for those that were added and never used.

    Raises:
        UserError: tokens of its own are beyond the vocabulary; it belongs to another model.
    """
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    beyond = {text: token for text, token in tokenizer.get_vocab(with_added_tokens=True).items() if token >= vocab_size}
    if own := sorted(set(beyond) - added, key=beyond.__getitem__):
        raise UserError(
            f"{path}: {len(own):,} of its tokens, as {own[-1]!r} with the id {beyond[own[-1]]}, are beyond the model's vocabulary "
            f"of {vocab_size:,}: it belongs to another model; put the right tokenizer there, or none to work with token ids"
        )
    if beyond:
        names = sorted(beyond, key=beyond.__getitem__)
        warnings.warn(
            f"{path}: the model's vocabulary of {vocab_size:,} has no room for {', '.join(map(repr, names[:4]))}"
            f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}, which were added; a text with one of them is refused",
            CheckpointWarning,
            stacklevel=2,
        )


def _named_tokens(document: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by name; a file gives each as a text, or as an object with the text in it."""
    texts = {}
    for name in NAMED_TOKENS:
        value = document.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            texts[name] = text
    return texts


def _ids(where: str, document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    value = document.get("eos_token_id")
    yield from ((where, entry) for entry in (value if isinstance(value, list) else [value]))


def _ends(vocab_size: int, ids: Iterable[tuple[str, object]]) -> tuple[int, ...]:
    """Tokens that end a text, each once; unknown tokens are left out with a warning."""
    ends: dict[int, None] = {}
    for where, token in ids:
        if type(token) is int and 0 <= token < vocab_size:
            ends[token] = None
        elif token is not None:
            warnings.warn(
                f"{where}: the end-of-text token {token!r} is not in the vocabulary of {vocab_size:,}; left out",
                CheckpointWarning,
                stacklevel=2,
            )
    return tuple(ends)


def _prefix(tokenizer: Tokenizer, bos: str, vocab_size: int) -> tuple[int, ...]:
    """Tokens that are read before a text."""
    if bos == "none":
        return ()
    if bos != "auto":
        token = int(bos) if bos.isdecimal() else tokenizer.token_to_id(bos)
        if token is None or token >= vocab_size:
            raise ArgumentError(
                "bos", f"is {bos!r}, which is not a token of this model; expected auto, none, or a token by its id or text"
            )
        return (token,)
    text = next((text for text in ("a", "0", ".") if tokenizer.encode(text, add_special_tokens=False).ids), "")
    bare, full = tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.encode(text).ids
    begin = next(first for first in range(len(full) + 1) if full[first : first + len(bare)] == bare)
    prefix, suffix = full[:begin], full[begin + len(bare) :]
    if suffix:
        names = ", ".join(repr(tokenizer.id_to_token(token)) for token in suffix)
        warnings.warn(
            f"{TOKENIZER}: it puts {names} after a text, which would end it; prompts are read without it",
            CheckpointWarning,
            stacklevel=2,
        )
    if beyond := [token for token in prefix if token >= vocab_size]:
        raise UserError(
            f"{TOKENIZER}: it puts the token {beyond[0]} before a text, the model's vocabulary has {vocab_size:,}; "
            "export it with bos=none, or with the tokenizer that belongs to this model"
        )
    return tuple(prefix)


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own comes before an entry of tokenizer_config.json, as in transformers."""
    if (folder / CHAT_TEMPLATE).is_file():
        return read_text(folder / CHAT_TEMPLATE)
    value = config.get("chat_template")
    if isinstance(value, list):
        templates = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = templates.get("default", next(iter(templates.values()), None))
    if value is not None and not isinstance(value, str):
        raise UserError(f"{folder / TOKENIZER_CONFIG}: chat_template is {json.dumps(value)[:60]}, expected a text or named ones")
    return value
