"""The results of inference: which a run has written, also one that was stopped, and what else lies beside them."""

from __future__ import annotations

import functools
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from monai_iou.datasets.cases import Case
from monai_iou.files import OutputError
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.result_files import remove_result

__all__ = ["Prediction", "WrittenResults", "failure_of"]


@dataclass(frozen=True)
class Prediction:
    """One image and the files that its results go to.

    Attributes:
        case: the image.
        mask: its file.
        probabilities: their file, None where nobody asked for them.
        preview: the file of its picture, None likewise.
    """

    case: Case
    mask: Path
    probabilities: Path | None = None
    preview: Path | None = None

    @property
    def files(self) -> dict[str, Path]:
        """Every file of the results, by what it is."""
        named = {"mask": self.mask, "probabilities": self.probabilities, "preview": self.preview}
        return {f"the {what} of {self.case.name}": path for what, path in named.items() if path is not None}


class WrittenResults:
    """The results of a run, to be created before it begins.

    Args:
        items: the images, and where their results go.
        earlier: what lies beside each mask and is to go with it, see `monai_iou.workflow.prediction.earlier_results`.

    Attributes:
        are_complete: whether the run has ended without an error, so that it writes no mask any more.
    """

    def __init__(self, items: Sequence[Prediction], earlier: Mapping[Path, Sequence[Path]]) -> None:
        self._earlier = earlier
        self._left = deque(items)
        self.are_complete = False
        self._before = {path: _stamp(path) for item in items for path in item.files.values()}

    def missing(self) -> list[Path]:
        """The masks and probabilities that were not written, such as those that a user's config saves elsewhere."""
        files = [path for item in self._left for path in (item.mask, item.probabilities)]
        return [path for path in files if path is not None and not self._is_new(path)]

    def finish(
        self, done: Callable[[Prediction], None], tell: Callable[[str], None], *, stopped: bool = False
    ) -> list[Exception]:
        """Go through the images that are left: remove what is not of the mask beside it, and pass on each new mask.

        Args:
            done: called with each image that has a new mask, and those of its other results that are new or yet to be
                made; of a run that was stopped, no picture is made any more.
            tell: called with a line for each file that is removed and does not come back.
            stopped: whether the run was.

        Returns:
            What went wrong; the other images have been gone through nevertheless.
        """
        found: list[Exception | None] = []
        while self._left:
            item = self._left[0]
            written = self._written(item, stopped=stopped)
            for path, why in self._to_remove(item):
                found.append(failure_of(functools.partial(remove_result, path)))
                if found[-1] is None and (written is None or path != written.preview):
                    tell(f"Removed, because {why}: {path}")
            self._left.popleft()  # only now: whatever stops this calls it again
            if written is not None:
                found.append(failure_of(functools.partial(done, written)))
        return [each for each in found if each is not None]

    def _written(self, item: Prediction, *, stopped: bool) -> Prediction | None:
        """The image without the results that there are none of; None if its mask was not written."""
        if not self._is_new(item.mask):
            return None
        probabilities = item.probabilities if self._is_new(item.probabilities) else None
        return replace(item, probabilities=probabilities, preview=None if stopped else item.preview)

    def _to_remove(self, item: Prediction) -> list[tuple[Path, str]]:
        """What lies beside the mask and is not of it, with the reason."""
        has_probabilities = self._is_new(item.probabilities)
        if self._is_new(item.mask):
            own = [item.preview] if has_probabilities else [item.preview, item.probabilities]
            paths, why = [*self._earlier[item.mask], *own], "it belonged to an earlier mask"
        else:  # which is written after the probabilities
            is_of_none = has_probabilities and os.path.lexists(item.mask) and not self.are_complete
            paths, why = [item.probabilities] if is_of_none else [], "its mask was not written"
        return [(path, why) for path in paths if path is not None and os.path.lexists(path)]

    def _is_new(self, path: Path | None) -> bool:
        return path is not None and _stamp(path) not in (None, self._before[path])


def failure_of(work: Callable[[], None]) -> Exception | None:
    """Do some work and return the error that it ended with, if that says in a sentence what is wrong."""
    try:
        work()
    except (ValueError, OutputError, ConfigError) as error:
        return error
    return None


def _stamp(file: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced, None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
