"""CSV files of an evaluation's scores: every case once, however many ranks scored it, and the labels' own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from monai.handlers.metrics_saver import MetricsSaver
from monai.handlers.utils import write_metrics_reports
from monai.utils.dist import string_list_all_gather

__all__ = ["CaseScoresSaver"]


class CaseScoresSaver(MetricsSaver):
    """MONAI's `MetricsSaver` with the labels' names as columns and each case once.

    With fewer cases than ranks every rank scores every case, and MONAI's class writes each as often. Cases are told
    apart by the names of their files.

    Args:
        args, kwargs: as for `monai.handlers.MetricsSaver`.
        class_labels: names of the scored classes, in the order of their columns.

    Raises:
        ValueError: when the scores are written, if there are more or fewer classes than names.
    """

    def __init__(self, *args: Any, class_labels: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.class_labels = [str(label).replace(self.deli, " ") for label in class_labels]

    def __call__(self, engine: Any) -> None:
        """Write the files, on `save_rank` alone."""
        from ignite import distributed

        files = string_list_all_gather(self._filenames) if distributed.get_world_size() > 1 else self._filenames
        if distributed.get_rank() != self.save_rank:
            return
        rows = sorted({file: row for row, file in reversed(list(enumerate(files)))}.values(), key=files.__getitem__)
        write_metrics_reports(
            save_dir=self.save_dir,
            images=[files[row] for row in rows],
            metrics=_wanted(engine.state.metrics, self.metrics),
            metric_details={
                name: self._checked(name, values)[rows]
                for name, values in _wanted(engine.state.metric_details, self.metric_details).items()
            },
            summary_ops=self.summary_ops,
            deli=self.deli,
            output_type=self.output_type,
            class_labels=self.class_labels,
        )

    def _checked(self, name: str, values: Any) -> Any:
        if values.ndim != 2 or values.shape[1] != len(self.class_labels):
            message = (
                f"Expected `class_labels` to name the {tuple(values.shape)[1:]} classes of {name}, but got "
                f"{self.class_labels}: give one name for each column."
            )
            raise ValueError(message)
        return values


def _wanted(scores: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    return {} if names is None else {name: value for name, value in scores.items() if name in names or "*" in names}
