"""A clock that charges every moment of a training of the bundle to one part of it, so that the parts add up."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pair = NDArray[np.float64]  # seconds of CPU time, seconds passed
Spent = dict[str, Pair]

PATCHES, OPTIMIZER, ELSE, WHOLE = "preparing the patches", "optimizer", "else", "whole"
FORWARD, BACKWARD = "network forward", "network backward"
LOSS, LOSS_BACKWARD = "loss forward", "loss backward"
PARTS = (PATCHES, FORWARD, LOSS, LOSS_BACKWARD, BACKWARD, OPTIMIZER)
VALIDATION, NETWORK, SCORES = "validation", "network", "postprocessing and metrics"


class Clock:
    """Charges each moment to one part."""

    def __init__(self) -> None:
        self._part, self._since, self._spent = ELSE, self._now(), dict[str, Pair]()

    @staticmethod
    def _now() -> Pair:
        return np.array([time.process_time(), time.perf_counter()])

    def to(self, part: str) -> None:
        """Charge what comes to this part."""
        now = self._now()
        self._spent[self._part] = self._spent.get(self._part, np.zeros(2)) + now - self._since
        self._part, self._since = part, now

    def timed(self, part: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """Return the action, charged to this part; what comes after it is charged to the part before."""

        def act(*args: Any, **kwargs: Any) -> Any:
            before = self._part
            self.to(part)
            try:
                return action(*args, **kwargs)
            finally:
                self.to(before)

        return act

    def taken(self) -> Spent:
        """Return what was charged since the last call."""
        self.to(self._part)
        spent, self._spent = self._spent, {}
        return spent


def total(spent: Spent) -> Pair:
    """Return the sum of all parts."""
    return sum(spent.values(), np.zeros(2))


def figures(samples: Sequence[Spent], parts: Sequence[str], statistic: Callable[..., Any] = np.median) -> Spent:
    """Return what each part takes, what everything else takes, and the whole, which is the sum of these.

    Args:
        samples: of steps, or of validations.
        parts: all but "else".
        statistic: over the samples, of each part by itself.
    """
    split = [{part: sample.get(part, np.zeros(2)) for part in parts} for sample in samples]
    split = [{**named, ELSE: total(sample) - total(named)} for named, sample in zip(split, samples, strict=True)]
    taken = {part: statistic([sample[part] for sample in split], axis=0) for part in (*parts, ELSE)}
    return {**taken, WHOLE: total(taken)}


def module(name: str, earlier: str) -> ModuleType:
    """Return a module of the package, which an earlier version of the package has by another name."""
    import monai_iou

    found = any((Path(folder) / f"{name.replace('.', '/')}.py").is_file() for folder in monai_iou.__path__)
    return importlib.import_module(f"monai_iou.{name if found else earlier}")


def instrument(parser: Any, clock: Clock) -> Any:
    """Return the trainer of a parsed bundle, with its parts and those of its validation charged to the clock."""
    from monai.engines.utils import IterationEvents

    trainer = parser.get_parsed_content("train#trainer")
    loss = clock.timed(LOSS, trainer.loss_function)

    def watched(output: Any, *args: Any) -> Any:
        for tensor in tensors_of(output):  # the first to get its gradient: those of the loss are done before
            tensor.register_hook(lambda _: clock.to(BACKWARD))
        return loss(output, *args)

    trainer.inferer, trainer.loss_function = clock.timed(FORWARD, trainer.inferer), watched
    trainer.add_event_handler(IterationEvents.LOSS_COMPLETED, lambda: clock.to(LOSS_BACKWARD))
    trainer.add_event_handler(IterationEvents.BACKWARD_COMPLETED, lambda: clock.to(ELSE))
    trainer.optimizer.register_step_pre_hook(lambda *_: clock.to(OPTIMIZER))
    trainer.optimizer.register_step_post_hook(lambda *_: clock.to(ELSE))
    if parser.get_parsed_content("val_fraction"):
        evaluator = parser.get_parsed_content("validate#evaluator")
        evaluator.run = clock.timed(VALIDATION, evaluator.run)
        evaluator.inferer = clock.timed(NETWORK, evaluator.inferer)
        for metrics in ("validate#key_metric", "validate#additional_metrics"):
            for metric in parser.get_parsed_content(metrics).values():
                metric.update, metric.compute = clock.timed(SCORES, metric.update), clock.timed(SCORES, metric.compute)
    return trainer


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a network's output."""
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in tensors_of(part)]


@contextmanager
def in_turn(clock: Clock) -> Iterator[None]:
    """Let batches be prepared when they are needed, not in a thread; charge them, and the postprocessing."""
    from monai.engines.utils import engine_apply_transform

    def one_by_one(batches: Any, *_: Any) -> Iterator[Any]:
        following = clock.timed(PATCHES, iter(batches).__next__)
        while True:
            try:
                batch = following()
            except StopIteration:
                return
            yield batch

    scored = clock.timed(SCORES, engine_apply_transform)
    with (
        mock.patch.object(module("workflow.dataloader", "loading"), "buffer_iterator", one_by_one),
        mock.patch("monai.engines.workflow.engine_apply_transform", scored),
    ):
        yield


@contextmanager
def timed_regions(seconds: list[float]) -> Iterator[None]:
    """Append the CPU time of each volume's regions; several volumes are prepared at a time, each in a thread."""
    from monai_iou import ComponentRegionsd

    make = ComponentRegionsd.__call__

    def timed(self: ComponentRegionsd, data: Any) -> Any:
        start = time.thread_time()
        made = make(self, data)
        seconds.append(time.thread_time() - start)
        return made

    with mock.patch.object(ComponentRegionsd, "__call__", timed):
        yield
