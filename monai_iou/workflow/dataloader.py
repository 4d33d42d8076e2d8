"""A loader whose batches depend on the seed, the epoch and the place in it alone, and whose thread swallows no error.

A run that is stopped anywhere and resumed sees the batches that it would have seen without the stop, whatever the
number of its workers.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from monai.data.dataloader import DataLoader
from monai.data.thread_buffer import ThreadDataLoader, buffer_iterator
from monai.utils.misc import MAX_SEED
from torch.utils.data import IterableDataset, RandomSampler, Sampler, SequentialSampler, get_worker_info

from monai_iou.distributed import is_distributed
from monai_iou.workflow.lasting_workers import let_workers_last
from monai_iou.workflow.settings import exit_with_message

__all__ = ["BufferedLoader", "LastingLoader", "StepSeeds", "derive_seed"]

_KILLED = -getattr(signal, "SIGKILL", 9)  # the exit code of a process that the system ended, as where memory runs out


class LastingLoader(DataLoader):
    """MONAI's DataLoader whose worker processes only their parent ends, see `let_workers_last`.

    Args:
        dataset: see `monai.data.DataLoader`.
        kwargs: likewise.

    Example:
        >>> [batch.tolist() for batch in LastingLoader(torch.arange(4), batch_size=2)]
        [[0, 1], [2, 3]]
    """

    def __init__(self, dataset: Any, **kwargs: Any) -> None:
        super().__init__(dataset, **kwargs)
        let_workers_last(self)


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class BufferedLoader(ThreadDataLoader):
    """MONAI's ThreadDataLoader with reproducible batches, which raises in the training what its thread raised.

    In MONAI 1.6.1 such an error ends the thread alone: the epoch is cut short, training goes on, and a run whose every
    batch fails ends as if it had succeeded.

    Its workers outlast the signals to a whole job, see `let_workers_last`.

    Before each item, every random transform of the dataset is seeded from `seed`, the epoch, the item's place in the
    epoch and the rank. The order of the items is drawn from `seed` and the epoch. A transform with a method
    `set_epoch_seed` is told a seed that is the same for a whole epoch.

    Args:
        dataset: items by their index. One without indices (an `IterableDataset`) is passed on as it is.
        seed: of the order and of the items' transforms.
        shuffle: take the items in a random order.
        sampler: gives the order instead; one with `set_epoch` is told the epoch.
        kwargs: as for `monai.data.ThreadDataLoader`; workers are processes, not threads.

    Raises:
        ValueError: `use_thread_workers` is set.

    Example:
        >>> import torch
        >>> from monai_iou.workflow.dataloader import BufferedLoader
        >>> [batch.tolist() for batch in BufferedLoader(torch.arange(4), batch_size=2)]
        [[0, 1], [2, 3]]
    """

    def __init__(
        self, dataset: Any, *, seed: int = 0, shuffle: bool = False, sampler: Sampler[int] | None = None, **kwargs: Any
    ) -> None:
        _check_processes(kwargs)
        self._next, self._order = (1, 0), None
        if isinstance(dataset, IterableDataset):
            super().__init__(dataset, **kwargs)  # type: ignore[arg-type]
            let_workers_last(self)
            return
        if sampler is None:
            sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
        self._order = _Order(sampler, seed)
        # A generator of its own: torch's global one belongs to the training's steps.
        own: Any = _Seeded(dataset)
        super().__init__(own, sampler=self._order, generator=torch.Generator(), **kwargs)
        let_workers_last(self)

    def begin(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration be that of `epoch`, from its batch `step` on; without it epochs are counted from 1."""
        self._next = (epoch, step)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # as in MONAI's class, a generator
        """Yield the batches; the next one is made in a thread meanwhile."""
        epoch, step = self._next
        self._next = (epoch + 1, 0)
        if self._order is not None:
            self._order.draw(epoch, skip=step * (self.batch_size or 1))
        batches = _with_failure(DataLoader.__iter__(self), _current_gpu())
        for batch in buffer_iterator(batches, self.buffer_size, self.buffer_timeout, self.repeats):
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


def _check_processes(options: Mapping[str, Any]) -> None:
    """Threads would share the random transforms: one would draw the place of an image, another that of its label."""
    if options.get("use_thread_workers"):
        message = (
            f"Expected `use_thread_workers` to be false, but got {options['use_thread_workers']!r}: leave it out, as "
            "threads would share the random transforms and crop an image and its label at different places; "
            "`num_workers` starts processes."
        )
        with exit_with_message():
            raise ValueError(message)


class StepSeeds:
    """Handler that starts each epoch's batches where the training stands and seeds torch before each step.

    What a network draws, as dropout does, then depends on the seed and the step alone.

    Args:
        seed: of the run.
        loader: of the training; one that is no `BufferedLoader` is left as it is.
    """

    def __init__(self, seed: int, loader: Any) -> None:
        self.seed, self.loader = seed, loader

    def attach(self, engine: Any) -> None:
        """Register on the trainer."""
        from ignite.engine import Events

        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_STARTED, self._step_started)

    def _epoch_started(self, engine: Any) -> None:
        if isinstance(self.loader, BufferedLoader):
            epoch = engine.state.epoch
            self.loader.begin(epoch, engine.state.iteration - (epoch - 1) * int(engine.state.epoch_length or 0))

    def _step_started(self, engine: Any) -> None:
        torch.manual_seed(derive_seed(self.seed, engine.state.iteration, engine.state.rank))


def derive_seed(*numbers: int) -> int:
    """Return a seed below 2^32 for a place in a run; near places have seeds that have nothing in common.

    Example:
        >>> derive_seed(0, 1, 2) == derive_seed(0, 1, 2) != derive_seed(0, 2, 1)
        True
    """
    return int(np.random.SeedSequence([number % (1 << 63) for number in numbers]).generate_state(1)[0])


class _Order(Sampler[Any]):
    """The indices of one epoch, each with the seed of its place and that of the epoch."""

    def __init__(self, sampler: Sampler[int], seed: int) -> None:
        self.sampler, self.seed = sampler, int(seed)
        self._drawn: list[tuple[int, int, int]] | None = None

    def draw(self, epoch: int, skip: int = 0) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)
        of_epoch = derive_seed(self.seed, epoch)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(of_epoch)
            indices = list(self.sampler)
        rank = dist.get_rank() if is_distributed() else 0
        places = enumerate(indices[skip:], start=skip)
        self._drawn = [(index, derive_seed(self.seed, epoch, place, rank), of_epoch) for place, index in places]

    def __iter__(self) -> Iterator[Any]:
        if self._drawn is None:
            self.draw(1)
        yield from self._drawn or ()

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


class _Seeded(torch.utils.data.Dataset[Any]):
    """A dataset whose random transforms are seeded before each item."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._random = list(_outermost(dataset, "set_random_state", set()))
        self._by_epoch = [each for part in self._random for each in _outermost(part, "set_epoch_seed", set())]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple):
            return self.dataset[key]
        index, seed, of_epoch = key
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  # for transforms that draw from the global generator
        if get_worker_info() is not None:  # in the training's own process torch's generator is that of the steps
            torch.manual_seed(seed)
        for place, each in enumerate(self._random, start=1):  # none draws the global generator's numbers
            each.set_random_state(seed=(seed + place) % MAX_SEED)
        for each in self._by_epoch:
            each.set_epoch_seed(of_epoch)
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)


def _outermost(value: Any, method: str, seen: set[int]) -> Iterator[Any]:
    """Yield what has a method in a dataset, the outermost of nested ones, as MONAI's `set_rnd` finds it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if hasattr(value, method):
        yield value
        return
    plain = isinstance(value, (type, torch.Tensor)) or not hasattr(value, "__dict__")
    parts = value if isinstance(value, (list, tuple)) else () if plain else vars(value).values()
    for each in parts:
        yield from _outermost(each, method, seen)


def _current_gpu() -> int | None:
    """Return the current GPU of this thread; None if nothing has been done on one, which would take its memory."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _with_failure(batches: Iterator[Any], gpu: int | None) -> Iterator[Any]:
    """Yield all batches, and as the last item the error that ended them, if one did.

    A thread begins with the first GPU as its current one, whichever that of the caller is: `gpu` becomes the current
    one of the thread that asks for the first batch.
    """
    try:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        yield from batches
    except GeneratorExit:
        raise
    except BaseException as error:  # a failed check ends a program with SystemExit
        yield _Failure(_with_reason(error, getattr(batches, "_workers", [])))


def _with_reason(error: BaseException, workers: Sequence[Any]) -> BaseException:
    """Return the error, with the signal that ended a worker process where torch was too late to ask for it."""
    killed = [worker.pid for worker in workers if worker.exitcode == _KILLED]
    if not killed or not isinstance(error, RuntimeError) or "killed by signal" in str(error):
        return error
    found = RuntimeError(f"DataLoader worker (pid {killed[0]}) is killed by signal: Killed.")
    found.__cause__ = error
    return found
