"""`retnet-export chat`: a conversation whose state is a thing to save, fork and rewind."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands import sampling
from retnet_export.commands.common import BackendName, BundlePath, LowMemory, Threads, print_error, progress
from retnet_export.runtime.errors import UserError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.conversation import Conversation

HELP = """\
Type a message and press Enter; the model continues it. Ctrl-C stops a reply and keeps what was said. Commands:
  /save FILE    save the conversation
  /load FILE    go on from a saved one
  /fork         branch off: go on in a copy, the original stays as it is
  /switch N     go to branch N
  /rewind [N]   take back the last N messages and their replies (1)
  /reset        start again, after the system prompt if there is one
  /stats        speed and sizes of the last reply
  /help         this
  /quit         leave (or Ctrl-D)
A message that begins with / is written //.\
"""


def chat(
    bundle: BundlePath,
    system: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text that comes before the conversation; read once.", show_default=False)
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on from a saved conversation.", show_default=False)
    ] = None,
    before: Annotated[str, typer.Option(help=r"Put before each message, as in 'User: '; \n is a new line.")] = "",
    after: Annotated[str, typer.Option(help=r"Put after each message, as in '\nAssistant: '.")] = r"\n",
    keep: Annotated[int, typer.Option(min=1, help="How many messages /rewind can take back.")] = 16,
    max_new_tokens: sampling.MaxNewTokens = 256,
    temperature: sampling.Temperature = 0.8,
    top_k: sampling.TopK = 0,
    top_p: sampling.TopP = 0.95,
    min_p: sampling.MinP = 0.0,
    repetition_penalty: sampling.RepetitionPenalty = 1.0,
    presence_penalty: sampling.PresencePenalty = 0.0,
    frequency_penalty: sampling.FrequencyPenalty = 0.0,
    logit_bias: sampling.LogitBias = None,
    seed: sampling.Seed = None,
    speculate: sampling.Speculate = "auto",
    stop: sampling.Stop = None,
    stop_token: sampling.StopToken = None,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
) -> None:
    """Talk to a model: at a terminal, or a line of stdin a message. /help lists what can be done with the conversation."""
    from retnet_export.runtime.bundle.files import read_text
    from retnet_export.runtime.generate.conversation import Conversation
    from retnet_export.runtime.generate.generation import Options
    from retnet_export.runtime.model import load

    options = Options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=sampling.biases_from(logit_bias),
        speculate=sampling.speculation_from(speculate),
        seed=seed,
        stop=tuple(stop or ()),
        stop_tokens=tuple(stop_token or ()),
    )
    if system is not None and load_state is not None:
        raise typer.BadParameter(
            "a saved conversation has its beginning already: give --system or --load-state", param_hint="--system"
        )
    text = None if system is None else read_text(system)
    model = load(bundle, backend, threads=threads, low_memory=low_memory)
    conversation = Conversation(model, options, before=_unescaped(before), after=_unescaped(after), keep=keep)
    if text is not None:
        with progress("chat") as update:
            conversation.begin_with(text, lambda done, total: update("reading the system prompt", done / total))
    if load_state is not None:
        conversation.load(load_state)
    _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """Read messages until there are no more. At a terminal a fault is shown and the talk goes on; in a pipe it ends it."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (line editing and history for input())
        typer.secho("/help lists what you can do; Ctrl-D leaves", dim=True, err=True)
    for line in _terminal_lines() if terminal else _piped_lines():
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not _obey(conversation, line[1:]):
                    return
            elif line.strip():
                _reply(conversation, line[1:] if line.startswith("/") else line)
        except UserError as error:
            if not terminal:
                raise
            print_error(str(error))


def _terminal_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: not UTF-8 text (byte {error.start}); convert it first") from error


def _reply(conversation: Conversation, message: str) -> None:
    with _interruptible() as stopped:
        for piece in conversation.say(message, stopped):
            typer.echo(piece, nl=False)
    typer.echo()


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C sets a flag that is looked at between tokens, so that it never falls into a step; the second one is the usual."""
    interrupted = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _obey(conversation: Conversation, line: str) -> bool:
    """Run a command; false if it ends the talk."""
    name, _, rest = line.partition(" ")
    argument = rest.strip()
    if name in ("save", "load"):
        if not argument:
            raise UserError(f"/{name} needs a file, as in /{name} talk.state")
        (conversation.save if name == "save" else conversation.load)(argument)
        _tell(f"{'saved to' if name == 'save' else 'going on from'} {argument}, {conversation.session.position} tokens")
    elif name == "fork":
        origin = conversation.current
        _tell(f"branch {conversation.fork() + 1}, a copy; /switch {origin + 1} goes back")
    elif name == "switch":
        conversation.switch(_number(name, argument, 0) - 1)
        _tell(f"branch {conversation.current + 1}, {conversation.session.position} tokens")
    elif name == "rewind":
        conversation.rewind(_number(name, argument, 1))
        _tell(f"back to {conversation.session.position} tokens")
    elif name == "reset":
        conversation.reset()
        _tell(f"back to {conversation.session.position} tokens")
    elif name == "stats":
        sampling.print_stats(conversation.stats, conversation.session.model.bundle.manifest.state_bytes)
    elif name == "help":
        _tell(HELP)
    elif name in ("quit", "exit"):
        return False
    else:
        raise UserError(f"no command /{name}; /help lists them, and a message that begins with / is written //")
    return True


def _number(name: str, argument: str, default: int) -> int:
    try:
        return int(argument) if argument else default
    except ValueError as error:
        raise UserError(f"/{name} {argument}: expected a number") from error


def _tell(text: str) -> None:
    typer.secho(text, dim=True, err=True)


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n")
