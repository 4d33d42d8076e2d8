"""The group of all commands, and the entry point that runs one and returns its exit code."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType, ModuleType

import click

from .bundle import describe, init
from .compare import compare
from .demo import demo
from .evaluate import evaluate
from .plan import plan
from .predict import predict
from .train import train
from .weights import class_weights

__all__ = ["cli", "main"]

PACKAGE = Path(__file__).resolve().parent.parent


class _Commands(click.Group):
    """A group that suggests the command nearest to a mistyped one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            known = ", ".join(self.list_commands(ctx))
            remedy = f"perhaps you meant {near[0]}" if near else f"choose one of {known}"
            message = f"Expected a command, but got {args[0]!r}: {remedy}."
            raise click.UsageError(message, ctx) from error


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    """Read the version from the package's text: importing the package takes seconds."""
    if value and not context.resilient_parsing:
        text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
        version = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
        click.echo(f"monai-iou {version[1] if version else 'of unknown version'}")
        context.exit()


def _module(name: str) -> ModuleType:
    """The module `console` or `streams`, by its path as long as the package is not imported."""
    if "monai_iou" in sys.modules:
        return importlib.import_module(f"monai_iou.{name}")
    spec = importlib.util.spec_from_file_location(f"monai_iou_{name}", PACKAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version."
)
def cli() -> None:
    """Train models for small structures with MONAI, and predict, evaluate and compare segmentations."""


for _command in (demo, init, plan, train, predict, evaluate, compare, class_weights, describe):
    cli.add_command(_command)


def _show(error: click.ClickException) -> None:
    """Print an error as click does, with what would steer the terminal escaped."""
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):  # since click 8.2: its text is the help
        click.echo(error.format_message(), err=True)
        return
    context = getattr(error, "ctx", None)
    if context is not None:
        click.echo(f"{context.get_usage()}\nTry '{context.command_path} -h' for help.\n", err=True)
    _module("console").say(f"Error: {error.format_message()}", error=True)


@contextlib.contextmanager
def _any_text() -> Iterator[None]:
    """Let stdout and stderr escape what their encoding lacks: a file's name must not end a command whose work is done.

    On Windows, output to a file or pipe is encoded for one language; elsewhere, bytes of names may be no UTF-8.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    strict = [stream for stream in streams if stream.errors == "strict"]
    for stream in strict:
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in strict:
            if not stream.closed:
                stream.reconfigure(errors="strict")


_received: list[int] = []  # the signal that has ended the command


def _end(number: int, frame: FrameType | None) -> None:
    """End the command as Ctrl-C does, with the exit code that the signal gives."""
    signal.signal(number, signal.SIG_DFL)  # a second one acts at once
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # Modules in C swallow an exception, and the command would go on with half of them. A temporary file that is
            # left is removed by the next command.
            signal.raise_signal(number)
        frame = frame.f_back
    _received.append(number)
    sys.exit(128 + number)


_held = threading.local()  # the mask of signals as it was before a fork


def _before_fork() -> None:
    """Hold the signal back: between the fork and the next function, it would be lost in the new process."""
    _held.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork(*, child: bool) -> None:
    """In the new process, let the signal act by itself: its parent ends it so, also within a library's C code."""
    if child and signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _held.mask)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=functools.partial(_after_fork, child=False),
        after_in_child=functools.partial(_after_fork, child=True),
    )


@contextlib.contextmanager
def _ended_in_order() -> Iterator[list[int]]:
    """Let SIGTERM, by which schedulers end a job, end the command as Ctrl-C does: it cleans up after itself.

    By default, Python dies from it at once, and leaves the files that it was writing. A training takes the signal over.

    Yields:
        The signal, if it has come.
    """
    _received.clear()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield []
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield _received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if _received:
            click.echo("Terminated.", err=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv[1:]`) and return its exit code.

    Whoever reads the output may end early, as `head` does: the work goes on, and its exit code is the same.
    """
    with _any_text(), _module("streams").outlasting() as outputs, _ended_in_order() as received:
        code = _run(argv)
    if received:  # what it raised was lost, as in a destructor
        return 128 + received[0]
    failure = outputs["stdout"].failure if "stdout" in outputs else None
    return code if failure is None else _not_printed(failure, code)


def _run(argv: Sequence[str] | None) -> int:
    try:
        result = cli.main(args=None if argv is None else list(argv), prog_name="monai-iou", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        click.echo("Aborted.", err=True)
        return 130
    except click.ClickException as error:
        _show(error)
        return error.exit_code
    return int(result or 0)


def _not_printed(error: OSError, code: int) -> int:
    """Say on stderr that stdout cannot be written, as on a full disk; the work is done nevertheless."""
    message = (
        f"Error: Expected to print the results, but got the error '{error.strerror or error}': free space, or send "
        "the output elsewhere."
    )
    with contextlib.suppress(OSError):
        click.echo(message, err=True)
    return code or 1
