"""Worker processes of a training's loaders, which only the training ends.

Schedulers and `timeout` send SIGTERM to every process of a job, and a terminal Ctrl-C. The training then ends after its
step, for which it needs its workers: torch's would die at once, and the step with them.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import context
from types import FrameType
from typing import Any

__all__ = ["LastingStart", "end_workers", "let_workers_last"]

SECONDS_BETWEEN_LOOKS = 1.0  # after the parent


def let_workers_last(loader: Any) -> None:
    """Let the workers of a torch DataLoader outlast the signals to a whole job.

    They still end with their loader, also if they hang, and once their parent is gone. On Windows, which has no such
    signals, and with a `multiprocessing_context` that is not Python's own, they stay as they are.

    Args:
        loader: that has not started any; its own `worker_init_fn` is called as well.
    """
    if loader.num_workers == 0:
        return
    method = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    own = CONTEXTS.get(type(loader.multiprocessing_context or multiprocessing.get_context(method)))
    if own is not None:
        loader.multiprocessing_context, loader.worker_init_fn = own, LastingStart(loader.worker_init_fn)


@dataclass(frozen=True)
class LastingStart:
    """What a worker does first; it can be pickled if `then` can, for workers that are not forked.

    Args:
        then: called with the worker's number afterwards, None for nothing.
    """

    then: Callable[[int], None] | None = None

    def __call__(self, worker: int) -> None:
        """Leave the end of this process to its parent, which ends it by SIGKILL."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _ignore)  # and not SIG_IGN, which programs that a transform starts would inherit
        threading.Thread(target=_end_with_parent, name="monai_iou_end", daemon=True).start()
        if self.then is not None:
            self.then(worker)


def end_workers() -> None:
    """End all these workers at once, whatever they do; only the main thread may call this."""
    if CONTEXTS:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for a lack of memory
    for process in multiprocessing.active_children():
        if isinstance(process, _EndedByKill):
            process.kill()


def _ignore(number: int, frame: FrameType | None) -> None:
    pass


def _end_with_parent() -> None:
    """End this process once its parent is gone; torch looks only between two batches, and one may hang."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    # Forked workers keep the pipe open by which their siblings would see that the parent is gone; and the process above
    # one that a server has forked is the server.
    is_child = os.getppid() == parent.pid
    while os.getppid() == parent.pid if is_child else parent.is_alive():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(0)


class _EndedByKill:
    """A process that ignores SIGTERM, by which torch ends one that hangs, and Python all: it waits without a limit."""

    _popen: Any

    def start(self) -> None:
        super().start()  # type: ignore[misc]  # of a process
        self._popen.terminate = self._popen.kill


CONTEXTS: dict[type, context.BaseContext] = {}
if sys.platform != "win32":

    class _Forked(_EndedByKill, context.ForkProcess): ...

    class _Served(_EndedByKill, context.ForkServerProcess): ...

    class _Spawned(_EndedByKill, context.SpawnProcess): ...

    class _ForkContext(context.ForkContext):
        Process = _Forked

    class _ForkServerContext(context.ForkServerContext):
        Process = _Served

    class _SpawnContext(context.SpawnContext):
        Process = _Spawned

    CONTEXTS |= {
        context.ForkContext: _ForkContext(),
        context.ForkServerContext: _ForkServerContext(),
        context.SpawnContext: _SpawnContext(),
    }
    # Python kills those that are left when the program ends, which torch's handler would take for a lack of memory.
    atexit.register(signal.signal, signal.SIGCHLD, signal.SIG_DFL)
