"""TensorBoard's event files of a training, and those that an earlier training left in its folder."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import socket
import time
from functools import cached_property
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from torch.utils.tensorboard import FileWriter, RecordWriter, SummaryWriter

from monai_iou.workflow.extra_files import extra_file

__all__ = ["EventFolder", "EventWriter"]

MOST_PENDING = 50 << 20  # bytes of events that wait for room on a disk
_numbers = itertools.count()  # two writers of a process may begin in the same second


class EventFolder:
    """The folder of a training's event files, which knows what lay there before the training's own were opened.

    TensorBoard draws all files of a folder as one run. Those of a training that is replaced therefore have to go, but
    not before the new one has something in their place.

    Args:
        output_dir: of the training; the folder is `tensorboard` in it.
        replaces: whether an earlier training there is replaced; else all files are kept, as a resumed training needs.

    Attributes:
        path: of the folder.

    Example:
        >>> EventFolder("eval").path
        'eval/tensorboard'
    """

    def __init__(self, output_dir: str, *, replaces: bool = False) -> None:
        self.path = f"{output_dir}/tensorboard"
        self._earlier = [*Path(self.path).glob("events.out.tfevents.*")] if replaces else []

    @cached_property
    def writer(self) -> EventWriter:
        """The writer of all handlers of the training."""
        return EventWriter(self.path)

    def remove_earlier(self) -> None:
        """Remove the files of the training that is replaced."""
        while self._earlier:
            with contextlib.suppress(OSError):  # a viewer may hold one: no reason to end a training
                self._earlier.pop().unlink()


class EventWriter(SummaryWriter):
    """TensorBoard's writer, of a file that ends no training where it cannot be written, as on a full disk.

    The log has one warning then, and what could not be written is tried again with what comes next. TensorBoard itself
    writes in a thread, whose errors are printed and end the training.

    Args:
        log_dir: of the file; both are made by the first `flush`.
    """

    file_writer: Any
    all_writers: Any

    def _get_file_writer(self) -> Any:
        if self.file_writer is None:
            self.file_writer = _FileWriter(Path(self.log_dir))
            self.all_writers = {self.log_dir: self.file_writer}
        return self.file_writer


class _FileWriter(FileWriter):
    """What makes events of summaries, without the file that it would open."""

    def __init__(self, folder: Path) -> None:
        self.event_writer = _EventFile(folder)


class _EventFile:
    """In the place of TensorBoard's `EventFileWriter`: a file to which `flush` appends whole events."""

    def __init__(self, folder: Path) -> None:
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        self.path, self._told = folder / name, set[Path]()
        self._size, self._first = 0, Event(wall_time=now, file_version="brain.Event:2")
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Begin anew with what could not be written: pictures of hours on a full disk would fill the memory."""
        self._pending = io.BytesIO()
        if not self._size:
            self.add_event(self._first)

    def get_logdir(self) -> str:
        return str(self.path.parent)

    def add_event(self, event: Any) -> None:
        RecordWriter(self._pending).write(event.SerializeToString())

    def flush(self) -> None:
        events = self._pending.getvalue()
        with extra_file(self.path.parent, self._told):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                begin = min(stream.tell(), self._size)
                stream.truncate(begin)  # a full disk may leave a part of an event, behind which nothing would be read
                stream.write(events)
            self._size, self._pending = begin + len(events), io.BytesIO()
        if self._pending.tell() > MOST_PENDING:
            self._begin_anew()

    def close(self) -> None:
        self.flush()
