"""Reading and writing checkpoints: a file is always whole, and what was changed in it since is noticed.

A checkpoint is torch's zip file with the SHA-256 of its content as the archive's comment, which torch, MONAI and every
other reader of zip files pass over. One changed bit, or a block of zeros, is refused. A file without such a comment,
saved by another program, is taken if the zip's own checksums, where it has any, are right.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from monai_iou.files import put_back_after_errors, temporary_file
from monai_iou.volumes.plain_names import is_plain
from monai_iou.workflow.failures import disk_full
from monai_iou.workflow.settings import exit_with_message
from monai_iou.workflow.typed_words import switch_on

__all__ = [
    "UNREADABLE", "check_content", "has_its_model", "is_with_model", "last_epoch", "load_state", "write_atomically",
    "write_together",
]  # fmt: skip


# What torch.load raises for a file that is damaged or no checkpoint.
UNREADABLE = (OSError, EOFError, RuntimeError, TypeError, ValueError, KeyError, IndexError, pickle.UnpicklingError)
KEYS = ("epoch", "model", "optimizer", "lr_scheduler", "scaler", "best_metric", "best_metric_epoch")

# The last record of a zip file: its signature, 16 bytes of numbers, and the length of the comment that follows.
END_SIGNATURE, END_BYTES = b"PK\x05\x06", 22
FILE_SIGNATURE = b"PK\x03\x04"
MARK = b"monai_iou sha256 "
COMMENT_BYTES = len(MARK) + 64


def last_epoch(path: str | os.PathLike[str]) -> int:
    """Return the epoch that the last checkpoint completed, 0 if there is none.

    Raises:
        ValueError: the file is not a checkpoint of the bundle, or damaged.
    """
    return int(load_state(Path(path), mmap=True)["epoch"]) if Path(path).is_file() else 0


def load_state(path: Path, *, mmap: bool = False) -> Mapping[str, Any]:
    """Read a checkpoint; with `mmap` only what is used of its tensors.

    Raises:
        ValueError: the file is not a checkpoint of the bundle, or damaged.
    """
    with exit_with_message():
        try:
            check_content(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_plain(path))
            usable = isinstance(state, Mapping) and set(KEYS) <= set(state) and isinstance(state["epoch"], int)
            error = None
        except UNREADABLE as caught:
            usable, error = False, caught
        if not usable:
            message = (
                f"Expected {path} to be a checkpoint of this bundle, but it cannot be read: delete it, or start anew "
                f"with {switch_on('overwrite')} and without --resume."
            )
            raise ValueError(message) from error
    return dict(state)


def is_with_model(state: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint was written together with `model.pt`, by its state: both have the same weights."""
    is_best = state["best_metric_epoch"] == state["epoch"] and not state.get("step", 0)
    return bool(is_best or state.get("final", False))


def has_its_model(state: Mapping[str, Any], path: Path) -> bool:
    """Return whether there is a model, and that of a checkpoint where the two were written together.

    Args:
        state: of the checkpoint; the names of its weights do not matter, as earlier versions kept those of wrappers.
        path: of the model.
    """
    if not is_with_model(state) or not path.is_file():
        return path.is_file()
    weights = state.get("average", {}).get("network", state["model"])
    try:
        check_content(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return all(_is_same(*pair) for pair in zip(stored.values(), weights.values(), strict=True))
    except (*UNREADABLE, AttributeError):
        return False


def _is_same(one: Any, other: Any) -> bool:
    """Whether two weights have the same values; NaN in a buffer is the same as NaN."""
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    except TypeError:  # what a module stores beside tensors, such as text, tells nothing of the weights
        pass
    return True


def write_atomically(content: Any, path: Path) -> None:
    """Save with torch.save (text as it is) so that `path` is always the old file or the new one, whole.

    The data reach the disk under a name of this process alone before the rename: a kill or a power cut leaves at most a
    temporary file, which the next run removes.

    Args:
        content: what to save.
        path: of the file; its folder is made if there is none.

    Raises:
        TrainingError: the disk is full.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, Any], without: Path | None = None) -> None:
    """Save files that belong together, each as `write_atomically` does, once there is room for all.

    Args:
        contents: what to save at each path, in the order in which the files take their places; all are on the disk
            before the first does.
        without: a file that goes with the earlier last one.

    Raises:
        TrainingError: the disk is full; all earlier files remain.
    """
    with contextlib.ExitStack() as stack:
        written = {}
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk_full(path):
                written[path] = stack.enter_context(temporary_file(path.parent))
                _write(content, written[path])
        for path in [*written][:-1] + ([] if without is None else [without]):
            with disk_full(path):
                stack.enter_context(put_back_after_errors(path))
        *_, last = written
        for path, temporary in written.items():
            if path == last and without is not None:  # until then, the earlier file that it goes with is there
                without.unlink(missing_ok=True)
            with disk_full(path):  # the folder itself may have to grow
                temporary.replace(path)


def _write(content: Any, path: Path) -> None:
    if isinstance(content, str):
        path.write_bytes(content.encode())
    else:
        with path.open("wb") as stream:
            torch.save(content, stream)
        _seal(path)
    with path.open("r+b") as stream:  # Windows flushes no file that is open for reading alone
        os.fsync(stream.fileno())


def check_content(path: Path) -> None:
    """Hold a checkpoint against its checksum.

    Raises:
        ValueError: they differ, or the checksum's own place is damaged.
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - COMMENT_BYTES))
        tail = stream.read()
        stream.seek(0)
        is_zip = stream.read(len(FILE_SIGNATURE)) == FILE_SIGNATURE
    if tail.startswith(MARK):
        intact = tail.removeprefix(MARK) == _digest(path, size - COMMENT_BYTES)
    elif is_zip:  # of another program: without a comment, the archive's end is the file's
        end = tail[-END_BYTES:]
        intact = end.startswith(END_SIGNATURE) and end.endswith(b"\0\0") and _is_sound_zip(path)
    else:
        intact = True  # torch's old format, which has no checksum
    if not intact:
        message = f"Expected {path} to be as it was written, but its content was changed: restore it or train again."
        raise ValueError(message)


def _seal(path: Path) -> None:
    """Append the checksum as the zip file's comment."""
    with path.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        stream.write(COMMENT_BYTES.to_bytes(2, "little"))
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as stream:
        stream.write(MARK + digest)


def _digest(path: Path, size: int) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size > 0:
            block = stream.read(min(size, 1 << 20))
            if not block:
                break
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()


def _is_sound_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return False
