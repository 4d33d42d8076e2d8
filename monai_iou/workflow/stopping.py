"""The signals that end a training: taken over while it runs, and agreed on by its ranks."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from monai_iou.distributed import is_distributed
from monai_iou.workflow.lasting_workers import end_workers

__all__ = ["largest_of_ranks", "quiet_stop", "stop_signal", "stop_signals"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def stop_signals(state: Any) -> Iterator[None]:
    """Set `state.stop_signal` on SIGTERM or SIGINT instead of dying from it; a second SIGINT acts at once.

    Only the main thread may take signals over: elsewhere this does nothing.

    Example:
        >>> from types import SimpleNamespace
        >>> state = SimpleNamespace()
        >>> with stop_signals(state):
        ...     signal.raise_signal(signal.SIGTERM)
        >>> state.stop_signal == signal.SIGTERM
        True
    """
    state.stop_signal = 0
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def receive(number: int, _: FrameType | None) -> None:
        # Schedulers and launchers repeat SIGTERM, in the middle of saving too; a user who repeats Ctrl-C is in a hurry.
        if number == signal.SIGINT and state.stop_signal:
            end_workers()  # for whose batches MONAI's thread would wait, however long they take
            raise KeyboardInterrupt
        state.stop_signal = number

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        restore()


def stop_signal(engine: Any) -> int:
    """Return the number of the signal that asks this process to stop, 0 if none has come."""
    return int(getattr(engine.state, "stop_signal", 0))


def largest_of_ranks(engine: Any, flags: Sequence[int]) -> list[int]:
    """Return each flag's largest value of all ranks, which must call this together.

    Ranks receive a signal at different steps; one that stops alone would leave the others waiting for it.

    Args:
        engine: whose `state.device` the ranks' group works on.
        flags: numbers of this rank, such as that of a signal.
    """
    if not is_distributed():
        return [*flags]
    together = torch.tensor(flags, device=engine.state.device)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return [int(flag) for flag in together.tolist()]


def quiet_stop(record: logging.LogRecord) -> bool:
    """Logging filter: drop Ignite's line for an error where a signal ends the program, which says so itself."""
    return not isinstance(sys.exc_info()[1], SystemExit | KeyboardInterrupt)
