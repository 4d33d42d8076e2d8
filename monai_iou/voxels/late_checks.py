"""Checks of a GPU's labels that nothing waits for: their queue of work would run dry.

What is wrong becomes NaN at once; the error is raised by a later call. Inside :func:`collected` the questions are given
to the caller instead, who asks them together with other ranks (:mod:`monai_iou.distributed`).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

Error = Callable[[], ValueError]  # made only when it is raised
Asked = list[tuple[Tensor, Error]]


@dataclass(frozen=True)
class _Question:
    """A check whose answer is on its way from the GPU."""

    answer: Tensor
    arrival: torch.cuda.Event
    error: Error


class LateChecks:
    """Checks in the order in which they were asked, by any thread."""

    def __init__(self, new_event: Callable[[], torch.cuda.Event] = torch.cuda.Event, *, pinned: bool = True) -> None:
        self._new_event = new_event
        self._pinned = pinned  # memory that a GPU writes to while the CPU goes on
        self._questions: deque[_Question] = deque()
        self.forget()

    def forget(self) -> None:
        """Begin anew: a forked process can use neither its parent's events nor a lock that was taken then."""
        self._of_parent = self._questions  # kept, because to destroy an event is to use the parent's GPU
        self._questions = deque()
        self._lock = threading.Lock()

    def ask(self, bad: Tensor, error: Error) -> None:
        """Send `bad`, whether there is an error, on its way to the CPU."""
        with torch.cuda.device_of(bad):  # whose stream copies, and has to record the arrival
            answer = torch.empty((), dtype=torch.bool, device="cpu", pin_memory=self._pinned)
            answer.copy_(bad, non_blocking=True)
            arrival = self._new_event()
            arrival.record()
        with self._lock:
            self._questions.append(_Question(answer, arrival, error))

    def raise_arrived(self) -> None:
        """Raise the error of the oldest check that has been answered by "wrong"; the others are dropped with it."""
        self._raise_first(lambda: self._questions[0].arrival.query())

    def raise_settled(self, pending: int) -> None:
        """Do the same with all but the last `pending` checks, whose answers are waited for.

        So processes that ask the same questions raise in the same call.
        """

        def is_due() -> bool:
            due = len(self._questions) > pending
            if due:
                self._questions[0].arrival.synchronize()
            return due

        self._raise_first(is_due)

    def _raise_first(self, is_due: Callable[[], bool]) -> None:
        wrong = None
        with self._lock:
            while self._questions and is_due():
                question = self._questions.popleft()
                if bool(question.answer):
                    wrong = question
                    self._questions.clear()
        if wrong is not None:
            raise wrong.error()


_alone = LateChecks()
shared = LateChecks()  # of all ranks together
_asked: ContextVar[Asked | None] = ContextVar("monai_iou_asked", default=None)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone.forget)
    os.register_at_fork(after_in_child=shared.forget)


def answers_late(tensor: Tensor) -> bool:
    """Return whether the values of a tensor cannot be looked at without waiting for its device."""
    return tensor.device.type == "cuda"


def is_captured(tensor: Tensor) -> bool:
    """Return whether work on a tensor becomes part of a CUDA graph, in which no event may be asked for its answer."""
    if tensor.device.type != "cuda":
        return False
    with torch.cuda.device_of(tensor):
        return torch.cuda.is_current_stream_capturing()


@contextmanager
def collected() -> Iterator[Asked]:
    """Collect the questions of this thread that are asked inside the `with` block, and raise no earlier ones."""
    asked: Asked = []
    token = _asked.set(asked)
    try:
        yield asked
    finally:
        _asked.reset(token)


def ask(bad: Tensor, error: Error) -> None:
    """Ask whether `bad` holds; a later call of :func:`raise_arrived` raises the error."""
    asked = _asked.get()
    if asked is None:
        _alone.ask(bad, error)
    else:
        asked.append((bad, error))


def settled_error() -> ValueError | None:
    """Wait for the answers to all questions; return the error of one answered by "wrong", None if there is none.

    Ranks that ask questions together must call it together.
    """
    for asked in (_alone, shared):
        try:
            asked.raise_settled(0)
        except ValueError as error:
            return error
    return None


def raise_arrived() -> None:
    """Raise the error of the oldest question that has been answered by "wrong"."""
    if _asked.get() is None:
        _alone.raise_arrived()
