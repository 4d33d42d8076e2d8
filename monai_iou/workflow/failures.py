"""What ends a training run before its time, each in one sentence: a loss that is NaN, full memory or disk, signals."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from monai_iou.datasets.cases import DatasetError
from monai_iou.distributed import from_all_ranks
from monai_iou.files import OutputError
from monai_iou.planning.own_errors import chain
from monai_iou.voxels import late_checks
from monai_iou.workflow.bars import outlast_readers
from monai_iou.workflow.run_lock import alone_in
from monai_iou.workflow.settings import exit_with_message
from monai_iou.workflow.stopping import largest_of_ranks, stop_signal, stop_signals
from monai_iou.workflow.typed_words import output_key

__all__ = ["StepGuard", "TrainingError", "batch_loss", "disk_full", "explain_out_of_memory", "run"]

logger = logging.getLogger(__name__)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What torch writes when an allocation fails on a CPU, in a data loader's process too, and when the system ends that.
_NO_CPU_MEMORY = ("DefaultCPUAllocator: ", "not enough memory: ", "killed by signal: Killed")
# The same of a GPU: by torch's own allocator, by the driver, and by cuDNN and cuBLAS, which ask the driver themselves.
_NO_GPU_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
NO_MEMORY = (*_NO_CPU_MEMORY, *_NO_GPU_MEMORY)
NO_FILES = (errno.EMFILE, errno.ENFILE)
NO_MORE_FILES = (*map(os.strerror, NO_FILES), "items of ancdata")
_SECONDS_TO_DIE = 2.0  # from when a process closes its connections until the system says that it has ended
NO_SHARED_MEMORY = ("out of shared memory", "unable to allocate shared memory", "unable to write to file </torch_")
LESS_MEMORY = (
    "lower `patch_size`, `batch_size`, `num_samples` or, if the machine's own memory is full, `cache_rate`; in a "
    "validation, set `sw_batch_size` to 1 and `validate#inferer#device` to cpu"
)


class TrainingError(ValueError):
    """A run cannot go on; the message says why and what to do, in one sentence."""


def run(engine: Any, folder: str | None = None) -> None:
    """Run a trainer or an evaluator as a program's main task: what the bundle's `run` does.

    SIGTERM and SIGINT end the training after the current step, see `monai_iou.workflow.checkpoints.CheckpointHandler`,
    and the program after a training that is complete by then; before training and in evaluation they behave as usual.
    Running out of memory or of open files names the keys that help.

    Args:
        engine: a MONAI workflow engine.
        folder: that the run writes to; no other run may at the same time. None for none.

    Raises:
        TrainingError: the machine or the GPU ran out of memory; under `python -m monai.bundle` the program ends with
            that sentence.
        OutputError: another run holds `folder`.
    """
    outlast_readers()
    is_training = hasattr(engine, "optimizer")
    with (
        _alone_in(folder, engine),
        explain_out_of_memory(_remedy(engine)),
        stop_signals(engine.state) if is_training else contextlib.nullcontext(),
    ):
        try:
            engine.run()
        except Exception as error:
            # A signal to the whole process group ends the loader's processes too, and so this step.
            number = stop_signal(engine)
            if not number:
                _raise_own_sentence(error)
                raise
            logger.info(
                "%s: stopped inside a step (%s); the last saved state is kept.", signal.Signals(number).name, error
            )
            raise SystemExit(128 + number) from error
    if is_training:  # only now, when signals act at once again, does none come unseen
        _stop_after_training(engine)
    _report_failed_cases(engine)


def _stop_after_training(engine: Any) -> None:
    """End the program if a signal came after the last step that could stop, so that nothing else begins."""
    (number,) = largest_of_ranks(engine, [stop_signal(engine)])
    if number:
        if engine.state.rank == 0:
            name = signal.Signals(number).name
            logger.info("%s: stopped after the training, which is complete and saved.", name)
        raise SystemExit(128 + number)


def _raise_own_sentence(error: Exception) -> None:
    """Raise what was said inside a transform, which MONAI buries under its own errors, also by a worker process."""
    for cause in chain(error):
        if isinstance(cause, (TrainingError, DatasetError, OutputError)):
            if cause is error and "Original Traceback" not in str(cause):
                with exit_with_message():  # it came as it is, from a file that is not in the cache
                    raise error
            # Of a worker's error torch makes one of the same class, with the worker's traceback as its text.
            sentence = str(cause).rpartition("Error: ")[2].strip() if "Original Traceback" in str(cause) else str(cause)
            with exit_with_message():
                raise type(cause)(sentence) from error


def _report_failed_cases(engine: Any) -> None:
    gathered = from_all_ranks(list(getattr(engine.state, "failed_cases", ())))
    failed = [sentence for sentences in gathered for sentence in sentences]
    if failed:
        with exit_with_message():
            raise TrainingError("\n".join(dict.fromkeys(failed)))


def _remedy(engine: Any) -> str:
    if hasattr(engine, "optimizer"):
        return LESS_MEMORY
    inferer = "inferer" if _is_inference(engine) else "validate#inferer"
    return (
        f"set `sw_batch_size` to 1 and `{inferer}#device` to cpu, which moves the output to the machine's own memory, "
        "or set `device` to cpu; if that memory itself is full, set `num_workers` to 0"
    )


def _alone_in(folder: str | None, engine: Any) -> contextlib.AbstractContextManager[None]:
    if folder is None or engine.state.rank != 0:  # one rank holds it for all
        return contextlib.nullcontext()
    if hasattr(engine, "optimizer"):
        return alone_in(Path(folder), "training")
    purpose = "prediction" if _is_inference(engine) else "evaluation"
    return alone_in(Path(folder), purpose, f"name another folder with {output_key('output_dir')}")


def _is_inference(engine: Any) -> bool:
    return getattr(engine.state, "key_metric_name", None) is None


class StepGuard:
    """Look after each training step whether all ranks are to stop, and whether the loss is a number.

    Args:
        items: of the training data, to name a batch's files by their `case`.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]] = ()) -> None:
        self._files = {item["case"]: _names(item["image"]) for item in items if "case" in item}

    def check(self, engine: Any) -> int:
        """Return the signal that some rank received, 0 if none; all ranks must call it after the same step.

        Raises:
            TrainingError: the loss of some rank is NaN or infinite. Where wrong labels are the reason, they are named.
        """
        loss = batch_loss(engine.state.output)
        number, is_broken = largest_of_ranks(engine, [stop_signal(engine), int(not math.isfinite(loss))])
        if is_broken:
            self._report(engine, loss)
        return number

    def _report(self, engine: Any, loss: float) -> None:
        not_finite = [(loss, self._names(engine.state.batch))] if not math.isfinite(loss) else []
        error = late_checks.settled_error()
        found = from_all_ranks((not_finite, [] if error is None else [str(error)]))
        wrong_labels = dict.fromkeys(sentence for _, sentences in found for sentence in sentences)
        if wrong_labels:
            with exit_with_message():
                raise TrainingError("\n".join(wrong_labels)) from error
        not_finite = [entry for entries, _ in found for entry in entries]
        value = not_finite[0][0]
        files = " and ".join(dict.fromkeys(name for _, names in not_finite for name in names)) or "files without a name"
        message = (
            f"Expected a finite loss, but got {value} in epoch {engine.state.epoch} on the batch of {files}: look at "
            "these files, lower `learning_rate` or set `amp` to false; the files in `ckpt_dir` are still those of the "
            "last good epoch."
        )
        with exit_with_message():
            raise TrainingError(message)

    def _names(self, batch: Any) -> list[str]:
        items = batch if isinstance(batch, list) else [batch]
        cases = [item["case"] for item in items if isinstance(item, Mapping) and "case" in item]
        return [self._files.get(case, str(case)) for case in dict.fromkeys(cases)]


def _names(image: Any) -> str:
    return " and ".join(map(str, image)) if isinstance(image, (list, tuple)) else str(image)


def batch_loss(output: Any) -> float:
    """Return the loss of a trainer's output; MONAI decollates it, and every item of the batch carries the same loss.

    Decollating has made it a number: no call waits for a GPU.
    """
    first = output[0] if isinstance(output, list) else output
    return float(first["loss"])


@contextlib.contextmanager
def explain_out_of_memory(remedy: str = LESS_MEMORY) -> Iterator[None]:
    """Turn running out of memory or of open files into a sentence that names the keys that help.

    Args:
        remedy: for a lack of memory, by default that of a training.

    Raises:
        TrainingError: with that sentence; under `python -m monai.bundle` the program ends with it.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError, EOFError) as error:
        causes = [*chain(error), *_death_of_a_worker(error)]
        if any(_is_out_of_files(cause) for cause in causes):
            problem, more = os.strerror(errno.EMFILE), "raise the limit that `ulimit -n` shows, for instance with "
            more += "`ulimit -n 4096`"
            if any(os.strerror(errno.ENFILE) in str(cause) for cause in causes):  # the limit of the whole machine
                problem, more = os.strerror(errno.ENFILE), "close other programs"
            message = (
                f"Expected to open another file or worker process, but got '{problem}': lower `num_workers` (0 needs "
                f"the fewest), or {more}."
            )
            with exit_with_message():
                raise TrainingError(message) from error
        if any(text in str(cause) for cause in causes for text in NO_SHARED_MEMORY):
            message = (
                "Expected shared memory (/dev/shm) for the batches of the worker processes, but it is full: lower "
                "`num_workers` (0 needs none), or give the container more (docker run --shm-size=1g)."
            )
            with exit_with_message():
                raise TrainingError(message) from error
        if not any(_is_out_of_memory(cause) for cause in causes):
            raise
        message = f"Expected the run to fit into memory, but it ran out of it: {remedy}."
        with exit_with_message():
            raise TrainingError(message) from error


def _death_of_a_worker(error: BaseException) -> list[BaseException]:
    """Return what torch says of a loader's process that ended: its connection may break first, without a reason."""
    if not any(isinstance(cause, (ConnectionError, EOFError)) for cause in chain(error)):
        return []
    deadline = time.monotonic() + _SECONDS_TO_DIE
    try:  # torch's handler of SIGCHLD raises the same error, wherever the program is
        while time.monotonic() < deadline:
            torch._C._error_if_any_worker_fails()
            time.sleep(0.05)
    except RuntimeError as death:
        return [death]
    return []


def _is_out_of_files(error: BaseException) -> bool:
    known = isinstance(error, OSError) and error.errno in NO_FILES
    # Of a worker's error torch passes on the text alone; and it may not say why a worker's batch cannot be opened.
    return known or (isinstance(error, (OSError, RuntimeError)) and any(text in str(error) for text in NO_MORE_FILES))


def _is_out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY))


@contextlib.contextmanager
def disk_full(path: Path) -> Iterator[None]:
    """Turn a failure to write because the disk is full into a sentence with the file, the free space and the remedy."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's own writer buries the system's error under one of its format.
        if not any(isinstance(cause, OSError) and cause.errno in FULL_DISK for cause in chain(error)):
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        kept = "the earlier file is kept; " if path.is_file() else ""
        message = (
            f"Expected room to write {path}, but the disk is full or a limit is reached ({free:.1f} MB free): {kept}"
            f"delete something there, or write to another disk with {output_key('ckpt_dir')} (or --cache_dir)."
        )
        with exit_with_message():
            raise TrainingError(message) from error
