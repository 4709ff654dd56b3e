"""Models: a bundle on a backend, which holds the weights once for all its sessions.

from retnet_export.runtime import load
model = load("classics.retnet")
for text in model.generate("In the beginning", max_new_tokens=100, temperature=0.8, seed=7):
    print(text, end="", flush=True)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from retnet_export.runtime.backends import open_backend
from retnet_export.runtime.backends.base import Backend
from retnet_export.runtime.bundle.bundle import Bundle, open_bundle
from retnet_export.runtime.bundle.files import read_text
from retnet_export.runtime.errors import UserError
from retnet_export.runtime.generate.batching import Completion, Prompt, generate_many
from retnet_export.runtime.generate.generation import OptionChanges, Options
from retnet_export.runtime.generate.session import Session
from retnet_export.runtime.generate.state import Snapshot
from retnet_export.runtime.generate.stats import Stats
from retnet_export.runtime.generate.templates import ChatTemplate
from retnet_export.runtime.generate.tokenizer import Tokenizer, required
from retnet_export.runtime.hub import bundle_folder

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack


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
        path: the bundle's folder, or "user/name" on the Hugging Face Hub.
        backend: "auto" or a backend's name.
        threads: CPU threads; the backend's choice when None.
        low_memory: prefer less memory (True) or more speed (False); the backend's choice when None.
        check_hashes: compare every file with its hash first (about a second per gigabyte).

    Raises:
        UserError: the bundle is damaged or the backend does not work here.
    """
    bundle = open_bundle(bundle_folder(path), check_hashes=check_hashes)
    return Model(bundle, open_backend(backend, bundle, threads, low_memory))


class Model:
    """A bundle on a backend. Sessions of one model may run in different threads.

    `with load(…) as model:` gives the backend's memory back at the end of the block, or as soon as the last session is gone.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._backend: Backend | None = backend
        spec = bundle.manifest.tokenizer
        self._tokenizer = None if spec is None else Tokenizer(bundle.file(spec.file), spec)

    def __repr__(self) -> str:
        config, backend = self.bundle.manifest.model, "closed"
        if self._backend is not None:
            backend = f"on {self._backend.name} ({self._backend.variant})"
        return (
            f"<Model {self.bundle.manifest.name} {backend}: {config.num_layers} layers, width {config.hidden_size}, "
            f"vocabulary {config.vocab_size}>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the backend; sessions that are open can go on."""
        self._backend = None

    @property
    def backend(self) -> Backend:
        """What runs it.

        Raises:
            UserError: the model was closed.
        """
        if self._backend is None:
            raise UserError(f"{self.bundle.path}: the model was closed; load it again")
        return self._backend

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's template for chats; None if it has none.

        Raises:
            UserError: it is not valid, or jinja2 is not installed.
        """
        spec = self.bundle.manifest.tokenizer
        if spec is None or spec.chat_template is None:
            return None
        path = self.bundle.file(spec.chat_template)
        return ChatTemplate(read_text(path), spec.special_tokens, str(path))

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer.

        Raises:
            UserError: it has none.
        """
        return required(self._tokenizer, self.bundle.path)

    @property
    def ends(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        return self.bundle.manifest.eos_ids

    def session(self, batch: int = 1, *, keep: int = 0) -> Session:
        """A new sequence, or `batch` of them, at the initial state.

        Args:
            batch: sequences that step together; text goes in and comes out only if it is 1.
            keep: the last so many snapshots are kept for `rewind`, one before each text that is fed.
        """
        return Session(self.backend, self.bundle.manifest, self._tokenizer, batch, keep=keep)

    def generate(
        self, prompt: str | Sequence[int], options: Options | None = None, **changes: Unpack[OptionChanges]
    ) -> Iterator[str]:
        """Text after `prompt`, piece by piece; options are those of `Session.generate`."""
        session = self.session()
        session.feed(prompt)
        return session.generate(options, **changes)

    def generate_many(
        self,
        prompts: Iterable[str | Sequence[int] | Prompt],
        options: Options | None = None,
        *,
        batch: int = 8,
        after: Snapshot | None = None,
        stats: Stats | None = None,
        **changes: Unpack[OptionChanges],
    ) -> Iterator[Completion]:
        """Continue many prompts, up to `batch` at a time; see `batching.generate_many`."""
        return generate_many(self.session, prompts, options, batch=batch, after=after, stats=stats, **changes)
