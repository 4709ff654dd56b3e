"""`retnet-export chat`: a conversation that you can save, fork and rewind."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retnet_export.commands import sampling
from retnet_export.commands.group import interruptible
from retnet_export.commands.options import BackendName, BundlePath, LowMemory, Threads
from retnet_export.commands.output import print_error, print_table, progress
from retnet_export.runtime.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from retnet_export.runtime.generate.conversation import Conversation
    from retnet_export.runtime.generate.generation import Options

HELP = """\
Type a message and press Enter; the model replies. Ctrl-C stops a reply and keeps what was said.
Write a message of several lines between two lines of \"\"\", or press Alt-Enter for a new line. Commands:
  /save FILE    save the conversation; /save! overwrites
  /load FILE    continue a saved one
  /fork         continue in a copy; the original stays unchanged
  /switch N     continue branch N
  /rewind [N]   remove the last N messages and their replies (default 1)
  /reset        start again, after the system prompt if there is one
  /set NAME X   change an option, for example /set temperature 0.7
  /show         show the options and the size of the conversation
  /stats        show the speed of the last reply
  /help         show this text
  /quit         leave (or Ctrl-D)
To send a message that begins with /, write //.\
"""
QUOTES = '"""'
HISTORY_LINES = 1000


@sampling.with_sampling(max_new_tokens=256)
def chat(
    bundle: BundlePath,
    system: Annotated[Path | None, typer.Option(metavar="FILE", help="A text to read before the conversation.")] = None,
    load_state: Annotated[Path | None, typer.Option(metavar="FILE", help="Continue a saved conversation.")] = None,
    template: Annotated[Path | None, typer.Option(metavar="FILE", help="A Jinja chat template instead of the model's own.")] = None,
    before: Annotated[
        str | None, typer.Option(help=r"Without a template: text before each message, for example 'User: '; \n is a new line.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help=r"Without a template: text after each message, for example '\nAssistant: '; default \n.")
    ] = None,
    keep: Annotated[int, typer.Option(min=1, help="How many messages /rewind can remove.")] = 16,
    *,
    options: Options,
    backend: BackendName = "auto",
    threads: Threads = None,
    low_memory: LowMemory = None,
) -> None:
    """Chat with a model in a terminal, or with one message per line of stdin. /help lists the commands."""
    from retnet_export.runtime.bundle.files import read_text
    from retnet_export.runtime.generate.conversation import Conversation
    from retnet_export.runtime.generate.templates import ChatTemplate, PlainTemplate, Template
    from retnet_export.runtime.model import load

    if system is not None and load_state is not None:
        raise ArgumentError("system", "cannot be combined with --load-state: a saved conversation already has its beginning")
    if template is not None and (before is not None or after is not None):
        raise ArgumentError(
            "template", "cannot be combined with --before and --after: the template contains the text around a message"
        )
    text = None if system is None else read_text(system)
    source = None if template is None else read_text(template)
    model = load(bundle, backend, threads=threads, low_memory=low_memory)
    chosen: Template | None = None
    if source is not None:
        spec = model.bundle.manifest.tokenizer
        chosen = ChatTemplate(source, spec.special_tokens if spec else {}, str(template))
    elif before is not None or after is not None:
        chosen = PlainTemplate(sampling.unescaped(before or ""), "\n" if after is None else sampling.unescaped(after))
    conversation = Conversation(model, options, template=chosen, keep=keep)
    if text is not None:
        with progress("chat") as update:
            conversation.begin_with(text, lambda done, total: update("reading the system prompt", done / total))
    if load_state is not None:
        conversation.load(load_state)
    _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """Read messages until there are no more. In a terminal an error is shown and the chat continues; in a pipe it ends the chat."""
    terminal = sys.stdin.isatty()
    with _line_editing() if terminal else contextlib.nullcontext():
        if terminal:
            typer.secho("/help lists what you can do; Ctrl-D leaves", dim=True, err=True)
        for message in _messages(_terminal_lines() if terminal else _piped_lines()):
            try:
                if message.startswith("/") and not message.startswith("//"):
                    if not _obey(conversation, message[1:], terminal):
                        return
                elif message.strip():
                    _reply(conversation, message[1:] if message.startswith("/") else message)
            except UserError as error:
                if not terminal:
                    raise
                print_error(str(error))


def _messages(lines: Iterator[str]) -> Iterator[str]:
    """Lines; everything between two lines with quotes is one message."""
    for line in lines:
        if not line.startswith(QUOTES):
            yield line
            continue
        parts = [line[len(QUOTES) :]]
        while not parts[-1].rstrip().endswith(QUOTES):
            if (following := next(lines, None)) is None:
                raise UserError(f"the message that begins with {QUOTES} has no end; close it with {QUOTES}")
            parts.append(following)
        parts[-1] = parts[-1].rstrip().removesuffix(QUOTES)
        text = "\n".join(parts).removeprefix("\n").removesuffix("\n")
        yield f"/{text}" if text.startswith("/") else text


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Line editing for `input`, Alt-Enter for a new line in a message, and a history that is saved."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "retnet-export"
    with contextlib.suppress(OSError):
        readline.read_history_file(folder / "history")
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        # If the home folder cannot be written, the chat goes on without a history.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(folder / "history")


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
    with interruptible() as stopped:
        for piece in conversation.say(message, stopped):
            typer.echo(piece, nl=False)
    typer.echo()


def _obey(conversation: Conversation, line: str, terminal: bool) -> bool:
    """Run a command; false if it ends the chat."""
    name, _, rest = line.partition(" ")
    argument = rest.strip()
    if name in ("save", "save!", "load"):
        if not argument:
            raise UserError(f"/{name} needs a file, for example /{name} talk.state")
        if name == "save" and Path(argument).exists() and not _overwrites(argument, terminal):
            return True
        (conversation.load if name == "load" else conversation.save)(argument)
        _tell(f"{'continued from' if name == 'load' else 'saved to'} {argument}, {conversation.session.position} tokens")
    elif name == "fork":
        origin = conversation.current
        _tell(f"branch {conversation.fork() + 1}, a copy; /switch {origin + 1} returns to the original")
    elif name == "switch":
        conversation.switch(_number(name, argument, 0) - 1)
        _tell(f"branch {conversation.current + 1}, {conversation.session.position} tokens")
    elif name == "rewind":
        conversation.rewind(_number(name, argument, 1))
        _tell(f"back to {conversation.session.position} tokens")
    elif name == "reset":
        conversation.reset()
        _tell(f"back to {conversation.session.position} tokens")
    elif name == "set":
        option, _, value = argument.partition(" ")
        field = sampling.field_called(option)
        conversation.options = sampling.changed(conversation.options, field, value.strip())
        _tell(f"{field} {sampling.shown(conversation.options)[field]}")
    elif name == "show":
        _show(conversation)
    elif name == "stats":
        sampling.print_stats(conversation.stats, conversation.model, conversation.options.seed)
    elif name == "help":
        _tell(HELP)
    elif name in ("quit", "exit"):
        return False
    else:
        raise UserError(f"no command /{name}; /help lists them, and to send a message that begins with /, write //")
    return True


def _overwrites(file: str, terminal: bool) -> bool:
    """Whether an existing file may be replaced."""
    if not terminal:
        raise UserError(f"{file}: already exists; /save! {file} overwrites it")
    return typer.confirm(f"{file} exists. Overwrite it?", err=True)


def _show(conversation: Conversation) -> None:
    where = f"{conversation.session.position} tokens, {len(conversation.messages)} messages, {conversation.kept} for /rewind"
    rows = [*sampling.shown(conversation.options).items(), ("conversation", where)]
    if conversation.branches > 1:
        rows.append(("branch", f"{conversation.current + 1} of {conversation.branches}"))
    print_table("", rows, err=True)


def _number(name: str, argument: str, default: int) -> int:
    try:
        return int(argument) if argument else default
    except ValueError as error:
        raise UserError(f"/{name} {argument}: expected a number") from error


def _tell(text: str) -> None:
    typer.secho(text, dim=True, err=True)
