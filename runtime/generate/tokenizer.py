"""A bundle's tokenizer: encoding that refuses characters that it would lose, and several texts read as one.

Rule: the tokens depend on the text alone. What a tokenizer.json asks for beyond that is switched off when it is loaded:
truncation and padding (a file keeps those of the last call before it was saved) and the random choices of training.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retnet_export.runtime.bundle.manifest import TokenizerSpec
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.text import TextDecoder

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as _Tokenizer

ANCHORS = ("\n", ".", "a", "0", ",", "(", "é", "日")
"""Texts to stand before a piece: of several kinds, because a tokenizer may join some of them to what follows."""
MASK = "\U0010ffff"
"""Stands for added tokens where characters are looked at; Unicode assigns it to nothing."""
HEAD = 48
"""Characters of a piece that decide whether it joins on to a context as tokens; the whole piece is encoded only then."""


class Tokenizer:
    """A bundle's tokenizer.

    Args:
        path: tokenizer.json.
        spec: what the manifest says of it.

    Raises:
        UserError: the file is not a tokenizer.
    """

    def __init__(self, path: Path, spec: TokenizerSpec) -> None:
        self._tokenizer, description = open_tokenizer(path)
        self.spec = spec
        self._model: dict[str, Any] = description.get("model") or {}
        self._added = {int(token["id"]): str(token["content"]) for token in description.get("added_tokens") or ()}
        self._unknown = _unknown_id(self._model, self._tokenizer)
        self._drops = self._model.get("type") == "BPE" and self._unknown is None and not self._model.get("byte_fallback")
        self._known_characters: dict[str, bool] = {}

    def __repr__(self) -> str:
        return f"<Tokenizer, {self._model.get('type')} of {self.vocab_size} tokens>"

    @property
    def vocab_size(self) -> int:
        """Tokens it knows."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, prefix: bool = False) -> list[int]:
        """Tokens of a text that begins here; with `prefix` after those that the model was trained to see before a text.

        Raises:
            UserError: it holds a character that the tokenizer cannot represent.
        """
        return [*(self.prefix if prefix else ()), *self._tokens(text, "", 0)]

    def encode_after(self, context: Sequence[int], text: str, *, whole: bool = False) -> list[int]:
        """Tokens of a text that goes on after others: together they decode to one text.

        A tokenizer may treat the beginning of a text unlike its middle (it puts a space there, strips it, begins a word), and
        what it does depends on what stands before. So the text is encoded behind the context's own text, and what comes after
        the context's tokens is the result. Where the two would share a token, which was read already in two parts, a single
        character stands for the context.

        Args:
            context: the last tokens read.
            text: what follows.
            whole: whether `context` is all that was read.

        Raises:
            UserError: it holds a character that the tokenizer cannot represent, or begins in the middle of a word and the
                tokenizer can only begin another one.
        """
        if not context:
            return self.encode(text)
        head = text[:HEAD]
        for lead, tokens in self._leads(list(context), whole):
            if self._goes_on(lead, tokens, head) and self._raw(lead + text).ids[: len(tokens)] == tokens:
                following = self._tokens(text, lead, len(tokens))
                break
        else:
            following = self.encode(text)
        self._check_joined(context, following, text)
        return following

    @property
    def prefix(self) -> list[int]:
        """Tokens that the model was trained to see before a text."""
        return list(self.spec.prefix_ids)

    def dropped_end(self, text: str) -> str:
        """Spaces at the end of a text that the tokenizer leaves out there, and that a text to follow needs before it."""
        spaces = text[len(text.rstrip()) :][-HEAD:]
        before = text[: len(text) - len(spaces)][-HEAD:] or "."
        tokens = self._raw(before + spaces).ids if spaces else []
        ends = (spaces[first:] for first in range(len(spaces)))
        return next((end for end in ends if self._raw((before + spaces).removesuffix(end)).ids == tokens), "")

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens; bytes that form no character become U+FFFD. Special tokens have none, unless `special`."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=not special)

    def token(self, token: int) -> str:
        """The vocabulary's name of a token; empty if it has no such id."""
        return self._tokenizer.id_to_token(token) or ""

    def decoder(self, context: Sequence[int] = ()) -> TextDecoder:
        """A decoder of tokens that come one at a time, after the tokens `context`, whose text it does not repeat."""
        return TextDecoder(self, context)

    def _leads(self, context: list[int], whole: bool) -> Iterator[tuple[str, list[int]]]:
        """Texts that may stand before a piece, the most of the context first, with the tokens they should become."""
        if whole:
            count = len(self.prefix)
            begun = context[count:] if context[:count] == self.prefix else context
            yield self.decode(begun, special=True), begun
        for first in range(len(context) + 1):
            end = context[first:]
            if end and (added := self._added.get(end[0])) == self.decode(end[:1], special=True):
                # Text after an added token may begin with a space that only the tokenizer puts there.
                after = self._decoded_after(end[:1], end[1:])
                yield from ((added + text, end) for text in dict.fromkeys((after, after.removeprefix(" "))))
            for anchor, tokens in self._anchors:
                yield anchor + self._decoded_after(tokens, end), tokens + end

    def _goes_on(self, lead: str, tokens: list[int], text: str) -> bool:
        """Whether `text` behind `lead` leaves the lead its `tokens` and takes nothing else of it."""
        found = self._raw(lead + text).ids
        if found[: len(tokens)] != tokens:
            return False
        return self._raw(lead).ids == tokens or self.decode(found, special=True) == self.decode(tokens, special=True) + text

    def _decoded_after(self, before: list[int], tokens: list[int]) -> str:
        return self.decode(before + tokens, special=True)[len(self.decode(before, special=True)) :]

    @cached_property
    def _anchors(self) -> list[tuple[str, list[int]]]:
        """Those of `ANCHORS` that survive the tokenizer, with their tokens."""
        encoded = [(anchor, list(self._raw(anchor).ids)) for anchor in ANCHORS]
        return [(anchor, tokens) for anchor, tokens in encoded if tokens and self.decode(tokens).endswith(anchor)]

    def _check_joined(self, context: Sequence[int], following: list[int], text: str) -> None:
        before = self.decode(context)
        after = self.decode([*context, *following[:4]])[len(before) :]
        if before[-1:].isalnum() and text[:1].isalnum() and after[:1].isspace():
            raise UserError(
                f"the text continues in the middle of a word, after {before[-20:]!r}, but this tokenizer ends every word that it "
                "reads; give whole words"
            )

    def _raw(self, text: str) -> Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise UserError("the text is not valid Unicode (it has half of a surrogate pair); was it read as UTF-8?") from error
        except Exception as error:  # the library raises bare Exception
            raise UserError(
                f"the text cannot be encoded: {error}; remove the characters that the tokenizer does not know"
            ) from error

    def _tokens(self, text: str, lead: str, skip: int) -> list[int]:
        """Tokens of `lead + text` without the first `skip`, which are the lead's; refuses what is lost of the text."""
        encoding = self._raw(lead + text)
        tokens = list(encoding.ids)
        if self._unknown is not None and self._unknown in tokens[skip:]:
            self._refuse_unknown(encoding, lead + text, len(lead), skip)
        if self._drops:
            self._refuse_dropped(text)
        return tokens[skip:]

    def _refuse_unknown(self, encoding: Encoding, text: str, lead: int, skip: int) -> None:
        """Refuse the token for what is unknown, unless the text itself spells it, or it stands for what the tokenizer added."""
        assert self._unknown is not None
        spelt = ("", self.token(self._unknown))
        for token, (start, end) in list(zip(encoding.ids, encoding.offsets, strict=True))[skip:]:
            if token == self._unknown and text[start:end] not in spelt:
                raise UnknownCharacterError(text[start:end], start - lead)

    def _refuse_dropped(self, text: str) -> None:
        """BPE without an unknown token and without bytes drops characters silently."""
        masked = text
        for content in self._added.values():
            masked = masked.replace(content, MASK * len(content))
        for character in set(masked) - self._known_characters.keys():
            self._known_characters[character] = character == MASK or self._knows(character)
        unknown = (index for index, character in enumerate(masked) if not self._known_characters[character])
        # What is unknown alone may be part of a character that normalization makes of it and its neighbour.
        if (position := next(unknown, None)) is not None and not self._knows(masked.replace(MASK, "")):
            raise UnknownCharacterError(text[position], position)

    def _knows(self, text: str) -> bool:
        """Whether every character that normalization and pre-tokenization leave of a text is in the vocabulary."""
        normalizer, pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        normalized = text if normalizer is None else normalizer.normalize_str(text)
        parts = [normalized] if pre_tokenizer is None else [part for part, _ in pre_tokenizer.pre_tokenize_str(normalized)]
        known = self._characters
        return all(character in known for part in parts for character in part)

    @cached_property
    def _characters(self) -> frozenset[str]:
        """Characters that begin or continue a word in the vocabulary."""
        marks = [self._model.get("continuing_subword_prefix") or "", self._model.get("end_of_word_suffix") or ""]
        pieces = (piece.removeprefix(marks[0]).removesuffix(marks[1]) for piece in self._tokenizer.get_vocab())
        return frozenset(piece for piece in pieces if len(piece) == 1)


class UnknownCharacterError(UserError):
    """A text holds a character that the tokenizer cannot represent: which, and where in the text."""

    def __init__(self, character: str, position: int) -> None:
        self.character, self.position = character, position
        super().__init__(
            f"the tokenizer does not know {character!r} (character {position} of the text) and has no byte fallback; remove it"
        )


def open_tokenizer(path: Path) -> tuple[_Tokenizer, dict[str, Any]]:
    """A tokenizer.json as an object that gives the same tokens for the same text always, and as the JSON that it is.

    Raises:
        UserError: it is none.
    """
    from tokenizers import Tokenizer as _Tokenizer

    try:
        content = path.read_text(encoding="utf-8")
        tokenizer: _Tokenizer = _Tokenizer.from_str(content)
        description = json.loads(content)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer that the package 'tokenizers' reads: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for random in ("dropout", "alpha", "nbest_size"):
        if getattr(tokenizer.model, random, None) is not None:
            setattr(tokenizer.model, random, None)
    return tokenizer, description


def _unknown_id(model: dict[str, Any], tokenizer: _Tokenizer) -> int | None:
    """The token for what a model does not know: Unigram names it by its id, the others by its text."""
    if model.get("type") == "Unigram":
        found = model.get("unk_id")
        return found if isinstance(found, int) else None
    name = model.get("unk_token")
    return tokenizer.token_to_id(name) if isinstance(name, str) else None


def required(tokenizer: Tokenizer | None, bundle: object) -> Tokenizer:
    """The tokenizer of a bundle that must have one.

    Raises:
        UserError: it has none; `bundle` says which.
    """
    if tokenizer is None:
        raise UserError(
            f"{bundle}: the bundle has no tokenizer, so it takes and gives only token ids; "
            "put tokenizer.json into the checkpoint's folder and export it again"
        )
    return tokenizer
