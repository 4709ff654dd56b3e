"""Models and sessions: a model holds weights once; a session is one sequence (or a batch) in it, with its state.

from retnet_export.runtime import load
model = load("classics.retnet")
for text in model.generate("In the beginning", max_new_tokens=100, temperature=0.8, seed=7):
    print(text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from retnet_export.runtime.backends import open_backend
from retnet_export.runtime.backends.base import Backend, initial_state
from retnet_export.runtime.bundle import Bundle, open_bundle
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.sampling import Sampler, Sampling
from retnet_export.runtime.text import StopStrings, Tokenizer


@dataclass
class Stats:
    """Where the time of a generation went.

    Attributes:
        prompt_tokens, prompt_seconds: reading the prompt.
        graph_ms, sampling_ms, total_ms: per generated token: in the graph, in sampling, from one token to the next.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    graph_ms: list[float] = field(default_factory=list)
    sampling_ms: list[float] = field(default_factory=list)
    total_ms: list[float] = field(default_factory=list)


def load(
    path: str | Path,
    backend: str = "auto",
    *,
    threads: int | None = None,
    low_memory: bool | None = None,
    check_hashes: bool = True,
) -> Model:
    """Open a bundle and make it ready to run.

    Args:
        path: the bundle's folder.
        backend: "auto" or a backend's name.
        threads: CPU threads; the backend's choice when None.
        low_memory: prefer less memory (True) or more speed (False); the backend's choice when None.
        check_hashes: compare every file with its hash first (about a second per gigabyte).

    Raises:
        UserError: the bundle is damaged or the backend does not work here.
    """
    bundle = open_bundle(path, check_hashes=check_hashes)
    return Model(bundle, open_backend(backend, bundle, threads, low_memory))


class Model:
    """A bundle on a backend."""

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle, self.backend = bundle, backend
        spec = bundle.manifest.tokenizer
        self._tokenizer = None if spec is None else Tokenizer(bundle.file(spec.file), spec)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            UserError: it has none.
        """
        if self._tokenizer is None:
            raise UserError(
                f"{self.bundle.path}: the bundle has no tokenizer, so it takes and gives token ids only; "
                "put tokenizer.json beside the checkpoint and export it again"
            )
        return self._tokenizer

    def session(self, batch: int = 1) -> Session:
        """A new sequence, or `batch` of them, at the initial state."""
        return Session(self, batch)

    def generate(self, prompt: str, **options: object) -> Iterator[str]:
        """Text after `prompt`, piece by piece; options are those of `Session.generate`."""
        session = self.session()
        session.feed(prompt)
        return session.generate(**options)  # type: ignore[arg-type]


class Session:
    """A batch of sequences and their state. Feed it, step it, generate from it.

    Attributes:
        logits: float32 (B, V) after the last token read; None at the start.
    """

    def __init__(self, model: Model, batch: int) -> None:
        self.model, self.batch = model, batch
        self._stream = model.backend.open_stream(batch)
        self.logits: NDArray[np.float32] | None = None
        self._failed = False

    def reset(self) -> None:
        """Back to the start of a sequence."""
        start = initial_state(self.model.bundle.manifest.state)
        for slot in range(self.batch):
            self._stream.write_state(slot, start)
        self.logits, self._failed = None, False

    def step(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Read one token per sequence, (B,); logits (B, V), valid until the next step.

        Raises:
            UserError: a token is not in the vocabulary, or an earlier step failed.
        """
        array = np.asarray(tokens, np.int64)
        if array.shape != (self.batch,):
            raise UserError(f"expected one token for each of {self.batch} sequences, found shape {array.shape}")
        self._check_tokens(array)
        return self._advance(lambda: self._stream.step(array))

    def prefill(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Read up to a chunk of tokens per sequence at once; as many steps would do the same.

        Args:
            tokens: (B, C), C at most the bundle's chunk size.
            lengths: (B,), how many of each row are real; a sequence of 0 keeps its state and has no logits.

        Returns:
            Logits (B, V) after each sequence's last real token, valid until the next step.

        Raises:
            UserError: shapes do not fit, a token is not in the vocabulary, or an earlier step failed.
        """
        most = self._chunk_size
        if tokens.ndim != 2 or len(tokens) != self.batch or not 1 <= tokens.shape[1] <= most or lengths.shape != (self.batch,):
            raise UserError(
                f"expected up to {most} tokens for each of {self.batch} sequences and as many lengths, "
                f"found tokens {tokens.shape} and lengths {lengths.shape}"
            )
        if lengths.min() < 0 or lengths.max() > tokens.shape[1]:
            raise UserError(f"lengths {lengths.tolist()} do not fit rows of {tokens.shape[1]} tokens")
        self._check_tokens(tokens[np.arange(tokens.shape[1]) < lengths[:, None]])
        return self._advance(lambda: self._stream.prefill(tokens, lengths))

    @property
    def _chunk_size(self) -> int:
        return self.model.bundle.manifest.graphs["prefill"].chunk_size

    def _check_tokens(self, tokens: NDArray[np.int64]) -> None:
        vocab_size = self.model.bundle.manifest.model.vocab_size
        strange = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if strange.size:
            raise UserError(f"token {int(strange[0])} is not in the vocabulary of {vocab_size}")

    def _advance(self, run: Callable[[], None]) -> NDArray[np.float32]:
        if self._failed:
            raise UserError("an earlier step of this session failed, so its state is unknown; call reset()")
        self._failed = True
        run()
        self.logits = self._stream.logits()
        self._failed = False
        return self.logits

    def feed(self, text: str | Sequence[int], stats: Stats | None = None) -> int:
        """Read a text, or token ids; returns how many tokens that were; `stats` receives how long it took.

        Raises:
            UserError: there is nothing to read, or it cannot be encoded.
        """
        if self.batch != 1:
            raise UserError(f"feed reads one sequence, this session has {self.batch}; use step")
        tokens = self._encode(text) if isinstance(text, str) else list(text)
        if not tokens:
            raise UserError("the prompt is empty: give at least one character")
        began = time.perf_counter()
        for start in range(0, len(tokens), self._chunk_size):
            chunk = np.array([tokens[start : start + self._chunk_size]], np.int64)
            self.prefill(chunk, np.array([chunk.shape[1]]))
        if stats is not None:
            stats.prompt_tokens += len(tokens)
            stats.prompt_seconds += time.perf_counter() - began
        return len(tokens)

    def _encode(self, text: str) -> list[int]:
        tokenizer = self.model.tokenizer
        tokens = tokenizer.encode(text)
        start = tokenizer.spec.bos_id
        return [start, *tokens] if self.logits is None and start is not None else tokens

    def generate_tokens(
        self, *, max_new_tokens: int = 128, sampling: Sampling | None = None, stats: Stats | None = None
    ) -> Iterator[int]:
        """Tokens chosen one after another; each is read into the state before the next is chosen.

        The iterator is lazy and can be closed at any token. It ends before an end-of-text token.
        """
        if self.logits is None:
            raise UserError("nothing to continue: feed the session a prompt first")
        sampler = Sampler(sampling or Sampling())
        spec = self.model.bundle.manifest.tokenizer
        ends = frozenset(spec.eos_ids if spec else ())
        for _ in range(max_new_tokens):
            began = time.perf_counter()
            token = sampler.choose(self.logits[0])
            chosen = time.perf_counter()
            if token in ends:
                return
            self.step([token])
            stepped = time.perf_counter()
            yield token
            if stats is not None:
                stats.sampling_ms.append(1e3 * (chosen - began))
                stats.graph_ms.append(1e3 * (stepped - chosen))
                stats.total_ms.append(1e3 * (time.perf_counter() - began))

    def generate(
        self,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        stats: Stats | None = None,
    ) -> Iterator[str]:
        """Text piece by piece, whole characters only, up to a stop string (which is not given) or the token limit."""
        stops = StopStrings([stop] if isinstance(stop, str) else stop)
        stream = self.model.tokenizer.stream()
        sampling = Sampling(temperature, top_k, top_p, seed)
        for token in self.generate_tokens(max_new_tokens=max_new_tokens, sampling=sampling, stats=stats):
            if text := stops.push(stream.push(token)):
                yield text
            if stops.hit:
                return
        if text := stops.push(stream.flush()):
            yield text
        if not stops.hit and (text := stops.flush()):
            yield text
