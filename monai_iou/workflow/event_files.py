"""TensorBoard's event files of a training, and those that an earlier training left in its folder."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["EventFolder"]


class EventFolder:
    """The folder of a training's event files, which knows what lay there before the training's own were opened.

    TensorBoard draws all files of a folder as one run. Those of a training that is replaced therefore have to go, but
    not before the new one has something in their place.

    Args:
        output_dir: of the training; the folder is `tensorboard` in it.
        replaces: whether an earlier training there is replaced; else all files are kept, as a resumed training needs.

    Attributes:
        path: of the folder, for TensorBoard's writers.

    Example:
        >>> EventFolder("eval").path
        'eval/tensorboard'
    """

    def __init__(self, output_dir: str, *, replaces: bool = False) -> None:
        self.path = f"{output_dir}/tensorboard"
        self._earlier = [*Path(self.path).glob("events.out.tfevents.*")] if replaces else []

    def remove_earlier(self) -> None:
        """Remove the files of the training that is replaced."""
        while self._earlier:
            with contextlib.suppress(OSError):  # a viewer may hold one: no reason to end a training
                self._earlier.pop().unlink()
