"""Where log lines go: through a progress bar while one is shown, and nowhere when their reader has ended."""

from __future__ import annotations

import logging
import sys
from typing import Any

from monai_iou.streams import is_terminal, outlast
from monai_iou.workflow.typed_words import is_bundle_command

__all__ = ["outlast_readers", "start_above_log", "stop_above_log"]

_streams: dict[int, list[tuple[logging.StreamHandler[Any], Any]]] = {}


def start_above_log(bar: Any) -> None:
    """Start a `rich` bar and send to it what log handlers write to the terminal.

    A handler keeps the stream that it was made with, so that the bar's own redirection of stderr does not reach it.

    Args:
        bar: `rich.progress.Progress` on stderr, not yet started.
    """
    handlers = [handler for handler in _handlers() if _is_terminal(handler)]
    _streams[id(bar)] = [(handler, handler.stream) for handler in handlers]
    bar.start()
    for handler in handlers:
        handler.setStream(sys.stderr)


def stop_above_log(bar: Any) -> None:
    """Stop the bar and give the log handlers their streams back."""
    bar.stop()
    for handler, stream in _streams.pop(id(bar), []):
        handler.setStream(stream)


def outlast_readers() -> None:
    """Let a run of `python -m monai.bundle` go on when nobody reads its log any more, as `monai-iou` does.

    A program of the user's own keeps its streams.
    """
    if not is_bundle_command():
        return
    before = {sys.stdout: "stdout", sys.stderr: "stderr"}
    outlast()
    for handler in _handlers():
        if not isinstance(handler, logging.FileHandler) and handler.stream in before:
            handler.stream = getattr(sys, before[handler.stream])


def _handlers() -> list[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    return [handler for logger in loggers for handler in logger.handlers if isinstance(handler, logging.StreamHandler)]


def _is_terminal(handler: logging.StreamHandler[Any]) -> bool:
    return handler.stream in (sys.stdout, sys.stderr) and is_terminal(handler.stream)
