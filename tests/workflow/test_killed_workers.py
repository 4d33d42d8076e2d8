"""What the loader says of a worker process that was killed, whoever asked for its end first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator

import pytest

from monai_iou.workflow.dataloader import _Failure, _with_failure
from monai_iou.workflow.failures import TrainingError, explain_out_of_memory


class Batches:
    """An iterator with worker processes, as torch's, whose only batch fails as torch's does if it asked too late."""

    def __init__(self, kill: signal.Signals) -> None:
        self._workers = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))]
        self._workers[0].start()
        os.kill(self._workers[0].pid or 0, kill)
        self._workers[0].join()

    def __iter__(self) -> Iterator[int]:
        yield 0
        message = f"DataLoader worker (pid(s) {self._workers[0].pid}) exited unexpectedly"
        raise RuntimeError(message)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("kill", "found"), [(signal.SIGKILL, TrainingError), (signal.SIGTERM, RuntimeError)])
def test_a_killed_worker_is_out_of_memory(kill: signal.Signals, found: type[Exception]) -> None:
    first, last = _with_failure(Batches(kill), None)  # type: ignore[arg-type]
    assert first == 0
    assert isinstance(last, _Failure)
    with pytest.raises(found) as caught, explain_out_of_memory():
        raise last.error
    assert ("ran out of it" in str(caught.value)) == (kill == signal.SIGKILL)
