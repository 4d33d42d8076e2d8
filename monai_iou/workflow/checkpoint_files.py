"""Reading and writing checkpoints so that a file is always whole."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monai_iou.workflow.failures import disk_full
from monai_iou.workflow.settings import exit_with_message

__all__ = ["UNREADABLE", "last_epoch", "last_step", "load_state", "write_atomically"]


# What torch.load raises for a file that is damaged or no checkpoint.
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, KeyError, IndexError, pickle.UnpicklingError)
KEYS = ("epoch", "model", "optimizer", "lr_scheduler", "scaler", "best_metric", "best_metric_epoch")


def last_epoch(path: str | os.PathLike[str]) -> int:
    """Return the epoch that the last checkpoint completed, 0 if there is none.

    Raises:
        ValueError: the file is not a checkpoint of the bundle, or damaged.
    """
    return int(load_state(Path(path), mmap=True)["epoch"]) if Path(path).is_file() else 0


def last_step(path: str | os.PathLike[str]) -> int:
    """Return the steps that the last checkpoint did of the epoch after that, 0 if there is none.

    Raises:
        ValueError: the file is not a checkpoint of the bundle, or damaged.
    """
    return int(load_state(Path(path), mmap=True).get("step", 0)) if Path(path).is_file() else 0


def load_state(path: Path, *, mmap: bool = False) -> Mapping[str, Any]:
    """Read a checkpoint; with `mmap` only what is used of its tensors."""
    with exit_with_message():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            usable = isinstance(state, Mapping) and set(KEYS) <= set(state) and isinstance(state["epoch"], int)
            error = None
        except UNREADABLE as caught:
            usable, error = False, caught
        if not usable:
            message = (
                f"Expected {path} to be a checkpoint of this bundle, but it cannot be read: delete it or set "
                "--resume false."
            )
            raise ValueError(message) from error
    return dict(state)


def write_atomically(content: Any, path: Path, *, shared: bool = False) -> None:
    """Save with torch.save (text as it is) so that `path` is always the old file or the new one, whole.

    The data reach the disk under a temporary name before the rename: after a kill or a power cut there is at most a
    stale temporary file, which the next save replaces.

    Args:
        content: what to save.
        path: of the file; its folder is made if there is none.
        shared: other processes or threads may write the same file now; the temporary name is then of this thread
            alone.

    Raises:
        TrainingError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{os.getpid()}.{threading.get_ident()}" if shared else ""
    temporary = path.with_name(f"{path.name}{own}.tmp")
    try:
        with disk_full(path), temporary.open("wb") as stream:
            if isinstance(content, str):
                stream.write(content.encode())
            else:
                torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
