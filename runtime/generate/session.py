"""Sessions: one sequence (or a batch that steps together) in a model, and its state. Feed it, generate from it, save it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import Backend
from retnet_export.runtime.bundle.manifest import Manifest
from retnet_export.runtime.errors import ArgumentError, UserError
from retnet_export.runtime.generate.budget import Budget
from retnet_export.runtime.generate.generation import Continuation, Generation, OptionChanges, Options, Piece
from retnet_export.runtime.generate.loop import Loop
from retnet_export.runtime.generate.sampling import Logits, Tokens
from retnet_export.runtime.generate.sequences import Sequences
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.generate.tokenizer import Tokenizer, required

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Unpack


class _Alone:
    """Held by the call that uses a session; the call of another thread is refused."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise UserError(
                "this session is in use by another thread; open a session for each thread with "
                "model.session(), they share the weights"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()


class Session:
    """A batch of sequences and their state.

    Rule: one thread at a time. A call that meets another thread's call in progress is refused, never queued: two interleaved
    texts in one state make no sense.

    Args:
        backend: what runs the bundle.
        manifest: the bundle's.
        tokenizer: the bundle's; without one, tokens go in and come out.
        batch: sequences that step together; text goes in and comes out only if it is 1.
        keep: the last so many snapshots are kept for `rewind`, one before each text that is fed.

    Attributes:
        chunk: the most tokens of a sequence that are read at once.
    """

    def __init__(self, backend: Backend, manifest: Manifest, tokenizer: Tokenizer | None, batch: int = 1, *, keep: int = 0) -> None:
        if batch < 1 or keep < 0:
            raise UserError(f"session: batch is {batch}, expected at least 1; keep is {keep}, expected 0 or more")
        self.manifest, self.batch, self._backend, self._tokenizer = manifest, batch, backend, tokenizer
        self._sequences = Sequences(backend, manifest, batch)
        self.chunk = self._sequences.chunk
        self._budget = Budget()
        self._alone = _Alone()
        self._kept: deque[Snapshot] = deque(maxlen=keep)

    def __repr__(self) -> str:
        positions = [slot.position for slot in self._sequences.slots]
        where = f"at token {self.position}" if self.batch == 1 else f"of {self.batch} sequences at tokens {positions}"
        return f"<Session {where} of {self.manifest.name}>"

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            UserError: it has none.
        """
        return required(self._tokenizer, self.manifest.name)

    @property
    def position(self) -> int:
        """Tokens read so far; by the first sequence, if they differ."""
        return self._sequences.slots[0].position

    @property
    def tail(self) -> tuple[int, ...]:
        """The last tokens read by the first sequence, which text joins on to."""
        return tuple(self._sequences.slots[0].tail)

    @property
    def logits(self) -> Logits | None:
        """Float32 (B, V) after the last token read, valid until the next step; None at the start."""
        return self._sequences.logits

    def reset(self) -> None:
        """Back to the start of a sequence; kept snapshots are forgotten. It also recovers a session that failed."""
        with self._alone:
            self._sequences.reset()
            self._kept.clear()

    def step(self, tokens: Sequence[int] | Tokens) -> Logits:
        """Read one token per sequence, (B,); logits (B, V), valid until the next step.

        Raises:
            UserError: a token is not in the vocabulary, or an earlier step failed.
        """
        if len(tokens) != self.batch:
            raise UserError(f"expected one token for each of {self.batch} sequences, found {len(tokens)}")
        self.advance(tokens)
        return self._sequences.last()

    def advance(self, tokens: Sequence[int] | Tokens) -> None:
        """The same, but the logits stay where they are: for those who then `choose`.

        Args:
            tokens: (n,), n at most B: the first n sequences step, which costs less where the backend can. What the others
                held is given up: `restore` them before they step again.
        """
        with self._alone:
            self._sequences.step(np.asarray(tokens, np.int64))

    def prefill(self, tokens: Tokens, lengths: NDArray[np.int64]) -> Logits:
        """Read up to a chunk of tokens per sequence at once; as many steps would do the same.

        Args:
            tokens: (B, C), C at most the bundle's chunk size; fewer rows are for the first sequences, as in `advance`.
            lengths: (B,), how many of each row are real; a sequence of 0 keeps its state and has no logits.

        Returns:
            Logits (B, V) after each sequence's last real token, valid until the next step.

        Raises:
            UserError: shapes do not fit, a token is not in the vocabulary, or an earlier step failed.
        """
        with self._alone:
            self._sequences.prefill(tokens, lengths)
            return self._sequences.last()

    def score(self, tokens: Tokens) -> NDArray[np.float32]:
        """Read up to a chunk of tokens (B, C) and give the logits after every one of them, (B, C, V)."""
        with self._alone:
            return self._sequences.score(tokens)

    def feed(
        self,
        text: str | Sequence[int],
        stats: Stats | None = None,
        progress: Callable[[int, int], None] | None = None,
        *,
        prefix: bool = True,
    ) -> int:
        """Read a text, or token ids.

        Args:
            text: what to read.
            stats: receives how long it took.
            progress: called after each chunk with the tokens read so far and their total. What it raises ends the reading
                there, and the session stands at that token.
            prefix: whether a first text comes after the tokens that begin one; a chat template has them in its text.

        Returns:
            How many tokens that were.

        Raises:
            UserError: there is nothing to read, or it cannot be encoded.
        """
        if isinstance(text, (bytes, bytearray)):
            raise ArgumentError("text", "is bytes, expected a str or token ids; decode it first, as in text.decode()")
        if self.batch != 1:
            raise UserError(f"feed needs a session of one sequence, this one has {self.batch}; use step")
        slot = self._sequences.slots[0]
        tokens = self._sequences.checked(self.encode(text, prefix=prefix) if isinstance(text, str) else text)
        unread = self.tokenizer.dropped_end(slot.unread + text) if isinstance(text, str) else ""
        if not len(tokens) and not (text and unread and self.position):
            raise UserError("the prompt is empty: give at least one character")
        began = time.perf_counter()
        if self._kept.maxlen:
            self.mark()
        self._read_all(tokens, progress)
        slot.unread = unread
        if stats is not None:
            stats.add_prompt(len(tokens), time.perf_counter() - began)
        return len(tokens)

    def _read_all(self, tokens: Tokens, progress: Callable[[int, int], None] | None = None) -> None:
        """Read tokens (T,) chunk by chunk."""
        with self._alone:
            for first in range(0, len(tokens), self.chunk):
                part = tokens[None, first : first + self.chunk]
                self._sequences.prefill(part, np.array([part.shape[1]]))
                if progress is not None:
                    progress(first + part.shape[1], len(tokens))

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """The tokens that `feed` would read: the text goes on where the last one ended, so that several are one text."""
        tokenizer, slot = self.tokenizer, self._sequences.slots[0]
        if slot.position == 0:
            return tokenizer.encode(text, prefix=prefix)
        return tokenizer.encode_after(tuple(slot.tail), slot.unread + text, whole=len(slot.tail) == slot.position)

    def generate(
        self, options: Options | None = None, *, stats: Stats | None = None, **changes: Unpack[OptionChanges]
    ) -> Iterator[str]:
        """Text piece by piece, whole characters only; lazy, and can be closed at any piece.

        Args:
            options: how tokens are chosen and when to stop; `changes` are its fields by name.
            stats: receives the times.
            changes: `temperature=0.8`, `max_new_tokens=200`, ….

        Raises:
            UserError: nothing was read yet, or an option is out of its range.
        """
        return (piece.text for piece in self.pieces(options, stats=stats, **changes) if piece.text)

    def generate_tokens(
        self, options: Options | None = None, *, stats: Stats | None = None, **changes: Unpack[OptionChanges]
    ) -> Iterator[int]:
        """The same as token ids, which needs no tokenizer."""
        generation = self.pieces(options, stats=stats, with_text=False, **changes)
        return (piece.token for piece in generation if piece.token is not None)

    def pieces(
        self,
        options: Options | None = None,
        *,
        stats: Stats | None = None,
        with_text: bool = True,
        **changes: Unpack[OptionChanges],
    ) -> Generation:
        """The same as `Piece`s, with token ids and log-probabilities; its `finish` says why it ended.

        Each token is read into the state before its piece is given, so the session always stands where the text does.
        """
        if self.batch != 1:
            raise UserError(f"generate needs a session of one sequence, this one has {self.batch}; use Model.generate_many")
        if self.logits is None:
            raise UserError("nothing to continue: feed the session a prompt first")
        continuation = self.continuation((options or Options()).changed(changes), with_text)
        return Generation(continuation, self._generate(continuation, stats))

    def loop(self, stats: Stats | None = None) -> Loop:
        """What generates in this session's sequences. It belongs to one thread, as the session does."""
        return Loop(self._sequences, self._budget, stats)

    def _generate(self, continuation: Continuation, stats: Stats | None) -> Iterator[Piece]:
        # A stop string is known by its last token; those before have been read by then, and are taken back.
        start = self.snapshot() if continuation.options.stops else None
        loop = self.loop(stats)
        running = loop.begin(continuation, 0)
        ended = taken_back = False
        while not ended:
            with self._alone:
                piece = loop.choose(running, 0)
                if running.waits and not continuation.stopped_in_text:
                    loop.advance([running])
            if piece is None:
                piece, ended = Piece(None, continuation.flush()), True
            if start is not None and continuation.stopped_in_text and not taken_back:
                self._go_back(start, len(running.read), *continuation.before_stop())
                taken_back = True
            if not ended or piece.text:
                yield piece

    def _go_back(self, start: Snapshot, made: int, tokens: list[int], text: str) -> None:
        """Stand after `tokens` and `text`, behind `start`; `made` tokens have been read since."""
        if made != len(tokens) or text:
            self.restore(start)
            self._read_all(np.array(tokens, np.int64))
            self._read_all(np.array(self.encode(text) if text else [], np.int64))

    def snapshot(self, slot: int = 0) -> Snapshot:
        """A copy of one sequence: state, position and logits, independent of the backend."""
        with self._alone:
            return self._sequences.snapshot(slot)

    def restore(self, snapshot: Snapshot, slot: int = 0) -> None:
        """Continue from a snapshot of this model, taken in any session on any backend.

        A session of one sequence that failed works again; one of several needs `reset`, since the others are lost as well.

        Raises:
            UserError: it belongs to another model or to a bundle with another state type.
        """
        snapshot.check(self.manifest)
        with self._alone:
            self._sequences.restore(snapshot, slot)

    def fork(self) -> Session:
        """An independent session at the same place. Costs a copy of the state."""
        twin = Session(self._backend, self.manifest, self._tokenizer, self.batch, keep=self._kept.maxlen or 0)
        for slot in range(self.batch):
            twin.restore(self.snapshot(slot), slot)
        twin._kept.extend(self._kept)
        return twin

    def mark(self) -> None:
        """Keep a snapshot of this place for `rewind`; `feed` does so itself before it reads."""
        if not self._kept.maxlen:
            raise UserError("this session keeps no snapshots: open it with keep=1 or more")
        self._kept.append(self.snapshot())

    def rewind(self, count: int = 1) -> None:
        """Go back to the `count`-th last kept snapshot and forget it and the later ones.

        Raises:
            UserError: fewer are kept.
        """
        if not 1 <= count <= len(self._kept):
            raise UserError(f"cannot rewind by {count}: {len(self._kept)} snapshots are kept, at most {self._kept.maxlen}")
        self.restore(self._kept[-count])
        for _ in range(count):
            self._kept.pop()

    @property
    def kept(self) -> int:
        """How many snapshots `rewind` can go back."""
        return len(self._kept)

    def move(self, source: int, target: int) -> None:
        """Let one sequence go on in another slot, with its continuation and its logits."""
        with self._alone:
            self._sequences.move(source, target)

    def continuation(self, options: Options, with_text: bool, slot: int = 0) -> Continuation:
        """What chooses for one sequence, from here on."""
        tokenizer = self.tokenizer if with_text else None
        own = self._sequences.slots[slot]
        return Continuation(options, own.read, self.manifest.eos_ids, tokenizer, tuple(own.tail))
