"""Sessions: one sequence (or a batch that steps together) in a model, and its state. Feed it, generate from it, save it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends.base import Backend, Narrowing, PassCost, Runner, chunk_tokens, initial_state
from retnet_export.runtime.bundle.manifest import Manifest
from retnet_export.runtime.errors import ArgumentError, UserError
from retnet_export.runtime.generate.generation import Continuation, Generation, OptionChanges, Options, Piece
from retnet_export.runtime.generate.sampling import Logits, Row, Tokens
from retnet_export.runtime.generate.speculation import History, Speculation, length_of_drafts
from retnet_export.runtime.generate.state import Snapshot, first_broken_layer, model_hash
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.generate.tokenizer import Tokenizer, required

if TYPE_CHECKING:
    from typing_extensions import Unpack

TAIL = 16
"""Tokens a session remembers literally: enough for text to join on to, and of constant size."""


@dataclass(frozen=True)
class _LastLogits:
    """The view of one sequence's logits; the largest is checked before anything is chosen.

    Attributes:
        runner: where they are, unless they are `restored`, (B, V).
        tops: what was asked of the runner since its last step, for all sequences.
        slot: the sequence's.
        check_finite: takes the largest logit and the slot.
    """

    runner: Runner
    restored: Logits | None
    tops: dict[int, tuple[Tokens, Logits]]
    slot: int
    check_finite: Callable[[np.floating[Any], int], None]

    def top(self, k: int) -> tuple[Tokens, Logits]:
        if self.restored is not None:
            tokens, logits = Row(self.restored[self.slot]).top(k)
        else:
            if k not in self.tops:
                self.tops[k] = self.runner.top(k)
            tokens, logits = (each[self.slot] for each in self.tops[k])
        self.check_finite(logits[0], self.slot)
        return tokens, logits

    def all(self) -> Logits:
        logits: Logits = (self.runner.logits() if self.restored is None else self.restored)[self.slot]
        # NaN is passed on by max, and so are +inf and a row of nothing but -inf.
        self.check_finite(logits.max(), self.slot)
        return logits


class Session:
    """A batch of sequences and their state.

    Rule: one thread at a time. A call that meets another thread's call in progress is refused, never queued: two interleaved
    texts in one state are of no use.

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
        try:
            self._runner: Runner = self._backend.open_runner(batch)
        except MemoryError as error:
            raise UserError(
                f"{manifest.name}: not enough memory for the state of {batch} sequences, "
                f"{manifest.state_bytes / 1e6:.1f} MB each; use a smaller batch"
            ) from error
        self._vocab_size = manifest.model.vocab_size
        self.chunk = chunk_tokens(backend, manifest.graphs["prefill"].chunk_size)
        self._guard = threading.Lock()
        self._kept: deque[Snapshot] = deque(maxlen=keep)
        self._changes = 0
        self._forget()

    def _forget(self) -> None:
        self._positions = np.zeros(self.batch, np.int64)
        # Arrays of their own, which a continuation looks at and which go along when its sequence moves to another slot.
        self._read = [np.zeros(self._vocab_size, np.int32) for _ in range(self.batch)]
        self._tails: list[deque[int]] = [deque(maxlen=TAIL) for _ in range(self.batch)]
        self._unread = [""] * self.batch
        self._histories = [History() for _ in range(self.batch)]
        # Chosen from logits that a pass over a draft has shown; the runner takes them in with the next pass.
        self._ahead: list[list[int]] = [[] for _ in range(self.batch)]
        self._in_use = self.batch  # the first so many slots hold sequences
        self._restored: Logits | None = None
        self._tops: dict[int, tuple[Tokens, Logits]] = {}
        self._failed = False
        self._changes += 1

    def __repr__(self) -> str:
        where = (
            f"at token {self.position}" if self.batch == 1 else f"of {self.batch} sequences at tokens {self._positions.tolist()}"
        )
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
        return int(self._positions[0])

    @property
    def tail(self) -> tuple[int, ...]:
        """The last tokens read by the first sequence, which text joins on to."""
        return tuple(self._tails[0])

    @property
    def logits(self) -> Logits | None:
        """Float32 (B, V) after the last token read, valid until the next step; None at the start."""
        if self._restored is not None:
            return self._restored
        return self._runner.logits() if self._positions.any() else None

    def reset(self) -> None:
        """Back to the start of a sequence; kept snapshots are forgotten. It also recovers a session that failed."""
        with self._alone():
            start = initial_state(self.manifest.state)
            for slot in range(self.batch):
                self._runner.write_state(slot, start)
            self._kept.clear()
            self._forget()

    def step(self, tokens: Sequence[int] | Tokens) -> Logits:
        """Read one token per sequence, (B,); logits (B, V), valid until the next step.

        Raises:
            UserError: a token is not in the vocabulary, or an earlier step failed.
        """
        if len(tokens) != self.batch:
            raise UserError(f"expected one token for each of {self.batch} sequences, found {len(tokens)}")
        self.advance(tokens)
        return self._runner.logits()

    def advance(self, tokens: Sequence[int] | Tokens) -> None:
        """The same, but the logits stay where they are: for those who then `choose`.

        Args:
            tokens: (n,), n at most B: the first n sequences step, which costs less where the backend can. What the others
                held is given up: `restore` them before they step again.
        """
        array = self._checked(tokens)
        if array.ndim != 1 or not 1 <= len(array) <= self.batch:
            raise UserError(f"expected one token for each of {self.batch} sequences, found shape {array.shape}")
        with self._alone():
            self._advance(array[:, None])

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
        if (
            tokens.ndim != 2
            or not 1 <= len(tokens) <= self.batch
            or not 1 <= tokens.shape[1] <= self.chunk
            or lengths.shape != (len(tokens),)
        ):
            raise UserError(
                f"expected up to {self.chunk} tokens for each of {self.batch} sequences and as many lengths, "
                f"found tokens {tokens.shape} and lengths {lengths.shape}"
            )
        if lengths.min() < 0 or lengths.max() > tokens.shape[1]:
            raise UserError(f"lengths {lengths.tolist()} do not fit rows of {tokens.shape[1]} tokens")
        self._checked(tokens[np.arange(tokens.shape[1]) < lengths[:, None]])
        with self._alone():
            self._advance(tokens, lengths)
            return self._runner.logits()

    def score(self, tokens: Tokens) -> NDArray[np.float32]:
        """Read up to a chunk of tokens (B, C) and give the logits after every one of them, (B, C, V)."""
        if tokens.ndim != 2 or not 1 <= len(tokens) <= self.batch or not 1 <= tokens.shape[1] <= self.chunk:
            raise UserError(f"expected up to {self.chunk} tokens for each of {self.batch} sequences, found {tokens.shape}")
        count, width = self._checked(tokens).shape
        with self._alone():
            self._check_whole()
            self._settle()
            before, self._failed = self.logits, True
            wide = self._widened(tokens)
            rows = np.tile(np.arange(width), (len(wide), 1))
            logits = self._runner.score(wide, np.full(len(wide), width), rows)[:count]
            self._note_read(tokens, np.full(count, width))
            self._restored = np.zeros((self.batch, self._vocab_size), np.float32) if before is None else before.copy()
            self._restored[:count] = logits[:, -1]
        return logits

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
        tokens = self._checked(self.encode(text, prefix=prefix) if isinstance(text, str) else text)
        unread = self.tokenizer.dropped_end(self._unread[0] + text) if isinstance(text, str) else ""
        if not len(tokens) and not (text and unread and self.position):
            raise UserError("the prompt is empty: give at least one character")
        began = time.perf_counter()
        if self._kept.maxlen:
            self.mark()
        self._read_all(tokens, progress)
        self._unread[0] = unread
        if stats is not None:
            stats.add_prompt(len(tokens), time.perf_counter() - began)
        return len(tokens)

    def _read_all(self, tokens: Tokens, progress: Callable[[int, int], None] | None = None) -> None:
        """Read tokens (T,) chunk by chunk."""
        with self._alone():
            for first in range(0, len(tokens), self.chunk):
                part = tokens[None, first : first + self.chunk]
                self._advance(part, np.array([part.shape[1]]))
                if progress is not None:
                    progress(first + part.shape[1], len(tokens))

    def encode(self, text: str, *, prefix: bool = True) -> list[int]:
        """The tokens that `feed` would read: the text goes on where the last one ended, so that several are one text."""
        tokenizer, tail = self.tokenizer, self.tail
        if self.position == 0:
            return [*(tokenizer.begin() if prefix else ()), *tokenizer.encode(text)]
        return tokenizer.encode_after(tail, self._unread[0] + text, whole=len(tail) == self.position)

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

    def _generate(self, continuation: Continuation, stats: Stats | None) -> Iterator[Piece]:
        # A stop string is known by its last token; those before have been read by then, and are taken back.
        start = self.snapshot() if continuation.options.stops else None
        changes, made = self._changes, 0
        speculation = self.speculation(continuation, stats)
        while continuation.finish is None:
            began = time.perf_counter()
            with self._alone():
                if self._changes != changes:
                    raise UserError("the session was fed, restored or reset while it was generating; start a new generation")
                token = self._choose(continuation, 0)
                chosen = time.perf_counter()
                if token is None:
                    break
                piece = continuation.accept(token)
                accepted = time.perf_counter()
                ran = False
                if not continuation.stopped_in_text:
                    if (row := speculation.row_after(token)) is not None:
                        self._foresee(0, token, row)
                    else:
                        ran = True
                        self._check([token], [speculation], [continuation.left])
                    made += 1
                changes = self._changes
            stepped = time.perf_counter()
            if stats is not None and ran:
                stats.add_step(1e3 * (stepped - accepted), 1e3 * (chosen - began), 1e3 * (stepped - began))
            elif stats is not None:
                stats.add_to_step(1e3 * (chosen - began), 1e3 * (stepped - began))
            if start is not None and continuation.stopped_in_text:
                self._go_back(start, made, *continuation.before_stop())
            yield piece
        known = continuation.stopped_in_text
        text = continuation.flush()
        if start is not None and continuation.stopped_in_text and not known:
            self._go_back(start, made, *continuation.before_stop())
        if text:
            yield Piece(None, text)

    def speculation(self, continuation: Continuation, stats: Stats | None, slot: int = 0) -> Speculation:
        """What drafts for one sequence, from here on."""
        speculation = Speculation(self._backend, continuation.options.speculate, stats)
        self._histories[slot].watched = speculation.most > 0
        return speculation

    def check(self, tokens: Sequence[int], speculations: Sequence[Speculation], left: Sequence[int]) -> None:
        """As `advance`, and look at what follows drafts in the same pass, where that pays.

        Args:
            tokens: (n,), the tokens chosen last.
            speculations: of the n sequences; they take what the pass has shown.
            left: how many tokens may still follow in each.
        """
        self._checked(tokens)
        with self._alone():
            self._check(tokens, speculations, left)

    def foresee(self, slot: int, token: int, row: Logits) -> None:
        """Take a chosen token whose logits (V,) a pass has shown: its sequence may choose again at once."""
        with self._alone():
            self._foresee(slot, token, row)

    def _check(self, tokens: Sequence[int], speculations: Sequence[Speculation], left: Sequence[int]) -> None:
        self._check_whole()
        taken = [[*self._ahead[slot], token] for slot, token in enumerate(tokens)]
        for slot, token in enumerate(tokens):
            self._note(slot, np.array([token]))
            self._histories[slot].note(token)
        longest = self.chunk - max(map(len, taken))
        histories = self._histories[: len(tokens)]
        own = list(zip(speculations, histories, left, strict=True))
        chances = [each.chances(history, min(longest, most - 1)) for each, history, most in own]
        cost = next((each.cost for each, row in zip(speculations, chances, strict=True) if row), PassCost(0.0, 0.0))
        length = length_of_drafts(cost, chances)
        drafts = [history.expected(min(length, len(row))) for history, row in zip(histories, chances, strict=True)]
        self._failed = True
        self._changes += 1
        self._tops.clear()
        self._restored = None
        if not any(drafts) and len(max(taken, key=len)) == 1:
            self._runner.step(self._widened(np.array(taken))[:, 0])
        else:
            rows = self._pass(taken, drafts)
            self._restored = np.zeros((self.batch, self._vocab_size), np.float32) if self.batch > 1 else rows[0][:1]
            for slot, (draft, logits) in enumerate(zip(drafts, rows, strict=True)):
                self._restored[slot] = logits[0]
                speculations[slot].check(draft, logits)
        self._ahead, self._failed = [[] for _ in range(self.batch)], False

    def _pass(self, taken: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]) -> list[Logits]:
        """Let the runner take in tokens of the first sequences; logits after the last one and after each of the drafts'."""
        lengths = np.array([len(each) for each in taken])
        wanted = 1 + max(map(len, drafts))
        tokens = np.zeros((len(taken), max(len(own) + len(draft) for own, draft in zip(taken, drafts, strict=True))), np.int64)
        rows = np.zeros((len(taken), wanted), np.int64)
        for slot, (own, draft) in enumerate(zip(taken, drafts, strict=True)):
            tokens[slot, : len(own) + len(draft)] = [*own, *draft]
            rows[slot] = len(own) - 1 + np.minimum(np.arange(wanted), len(draft))
        wide = self._widened(tokens)
        more = len(wide) - len(tokens)
        logits = self._runner.score(wide, np.pad(lengths, (0, more)), np.pad(rows, ((0, more), (0, 0))))
        return [logits[slot, : 1 + len(draft)] for slot, draft in enumerate(drafts)]

    def _foresee(self, slot: int, token: int, row: Logits) -> None:
        self._check_whole()
        assert self._restored is not None
        self._note(slot, np.array([token]))
        self._histories[slot].note(token)
        self._ahead[slot].append(token)
        self._restored[slot] = row
        self._changes += 1
        self._tops.clear()

    def _settle(self) -> None:
        """Let the runner take in what was chosen from logits that a pass has shown; all logits stay as they are."""
        if not any(self._ahead):
            return
        self._check_whole()
        assert self._restored is not None
        self._failed = True
        lengths = np.array([len(ahead) for ahead in self._ahead[: self._in_use]])
        tokens = np.zeros((self._in_use, lengths.max()), np.int64)
        for slot, length in enumerate(lengths):
            tokens[slot, :length] = self._ahead[slot]
        wide = self._widened(tokens)
        self._runner.prefill(wide, np.pad(lengths, (0, len(wide) - len(lengths))))
        self._ahead, self._failed = [[] for _ in range(self.batch)], False

    def _go_back(self, start: Snapshot, made: int, tokens: list[int], text: str) -> None:
        """Stand after `tokens` and `text`, behind `start`; `made` tokens have been read since."""
        if made == len(tokens) and not text:
            return
        self.restore(start)
        self._read_all(self._checked(tokens))
        if text:
            self._read_all(self._checked(self.encode(text)))

    def snapshot(self, slot: int = 0) -> Snapshot:
        """A copy of one sequence: state, position and logits, independent of the backend."""
        with self._alone():
            self._check_whole()
            self._settle()
            logits = self.logits
            return Snapshot(
                model=model_hash(self.manifest),
                state=self._runner.read_state(slot),
                logits=None if logits is None or not self._positions[slot] else logits[slot].copy(),
                read=self._read[slot].copy(),
                tail=tuple(self._tails[slot]),
                unread=self._unread[slot],
                history=self._histories[slot].tokens,
            )

    def restore(self, snapshot: Snapshot, slot: int = 0) -> None:
        """Continue from a snapshot of this model, taken in any session on any backend. It also recovers a session that failed.

        Raises:
            UserError: it belongs to another model or to a bundle with another state type.
        """
        snapshot.check(self.manifest)
        with self._alone():
            if self.batch > 1:
                self._check_whole()
            self._ahead[slot] = []
            logits = self.logits
            self._restored = np.zeros((self.batch, self._vocab_size), np.float32) if logits is None else logits.copy()
            if snapshot.logits is not None:
                self._restored[slot] = snapshot.logits
            self._runner.write_state(slot, snapshot.state)
            self._in_use = max(self._in_use, slot + 1)
            self._positions[slot] = snapshot.position
            self._read[slot] = snapshot.read.copy()
            self._tails[slot] = deque(snapshot.tail, TAIL)
            self._unread[slot] = snapshot.unread
            self._histories[slot] = History(snapshot.history.tolist() or snapshot.tail)
            if not self._positions.any():
                self._restored = None
            self._failed = False
            self._tops.clear()
            self._changes += 1

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

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._guard.acquire(blocking=False):
            raise UserError(
                "this session is in use by another thread; open a session for each thread with "
                "model.session(), they share the weights"
            )
        try:
            yield
        finally:
            self._guard.release()

    def _check_whole(self) -> None:
        if self._failed:
            raise UserError("an earlier step of this session failed, so its state is unknown; call reset() or restore()")

    def _advance(self, tokens: Tokens, lengths: NDArray[np.int64] | None = None) -> None:
        """Read tokens (B, C), of each row the first `lengths` (B,); a step if they are None, then C is 1."""
        self._check_whole()
        self._settle()
        self._failed = True
        wide = self._widened(tokens)
        if lengths is None:
            self._runner.step(wide[:, 0])
        else:
            self._runner.prefill(wide, np.pad(lengths, (0, len(wide) - len(lengths))))
        self._note_read(tokens, lengths)

    def _note_read(self, tokens: Tokens, lengths: NDArray[np.int64] | None) -> None:
        """The runner has read them."""
        self._changes += 1
        self._tops.clear()
        for slot, row in enumerate(tokens):
            real = row if lengths is None else row[: lengths[slot]]
            self._note(slot, real)
            self._histories[slot].extend(real.tolist())
        self._restored = None
        self._failed = False

    def _note(self, slot: int, tokens: Tokens) -> None:
        """Count tokens (T,) as read by a sequence."""
        np.add.at(self._read[slot], tokens, 1)
        self._tails[slot].extend(tokens[-TAIL:].tolist())
        if len(tokens):
            self._unread[slot] = ""
        self._positions[slot] += len(tokens)

    def _widened(self, tokens: Tokens) -> Tokens:
        """Tokens (n, C) of the first n sequences as the runner wants them: as they are if it can leave the others out."""
        self._in_use = len(tokens)
        if isinstance(self._runner, Narrowing):
            self._runner.narrow(len(tokens))
            return tokens
        return np.pad(tokens, ((0, self.batch - len(tokens)), (0, 0)))

    def move(self, source: int, target: int) -> None:
        """Let one sequence go on in another slot, with its continuation. Its logits stay behind: advance before you choose."""
        with self._alone():
            self._check_whole()
            self._runner.write_state(target, self._runner.read_state(source))
            self._positions[target] = self._positions[source]
            self._read[target], self._read[source] = self._read[source], np.zeros(self._vocab_size, np.int32)
            self._tails[target] = deque(self._tails[source], TAIL)
            self._unread[target] = self._unread[source]
            self._ahead[target], self._ahead[source] = self._ahead[source], []
            if self._restored is not None:
                self._restored[target] = self._restored[source]
            self._histories[target] = self._histories[source]
            self._histories[source] = History()
            self._changes += 1

    def continuation(self, options: Options, with_text: bool, slot: int = 0) -> Continuation:
        """What chooses for one sequence, from here on."""
        tokenizer = self.tokenizer if with_text else None
        return Continuation(options, self._read[slot], self.manifest.eos_ids, tokenizer, tuple(self._tails[slot]))

    def choose(self, continuation: Continuation, slot: int) -> int | None:
        """Let a continuation choose a sequence's next token; None if that ends its text.

        Raises:
            UserError: the logits are not finite; the message names the step and the layer.
        """
        with self._alone():
            return self._choose(continuation, slot)

    def _choose(self, continuation: Continuation, slot: int) -> int | None:
        self._check_whole()
        return continuation.choose(_LastLogits(self._runner, self._restored, self._tops, slot, self._check_finite))

    def _check_finite(self, largest: np.floating[Any], slot: int) -> None:
        if np.isfinite(largest):
            return
        where = first_broken_layer(self.manifest.state, self._runner.read_state(slot))
        raise UserError(
            f"the logits after step {self._positions[slot]} are not finite ({largest}), so nothing was sampled: {where}. "
            "Reset the session or restore an earlier snapshot; if the bundle is fp16, export with --precision fp32 or --state fp32"
        )

    def _checked(self, tokens: Sequence[int] | Tokens) -> Tokens:
        array = np.asarray(tokens, np.int64)
        outside = (array < 0) | (array >= self._vocab_size)
        if outside.any():
            raise UserError(f"token {int(array[outside][0])} is not in the vocabulary of {self._vocab_size}")
        return array
