"""CSV files of an evaluation's scores: every case once, however many ranks scored it, and the labels' own names.

The files are those of MONAI's `write_metrics_reports`, written by this package's one writer of tables: quoted, four
digits whatever the number's type, and labels of one name told apart.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.handlers.metrics_saver import MetricsSaver
from numpy.typing import NDArray

from monai_iou.distributed import from_all_ranks
from monai_iou.files import csv_text, write_texts
from monai_iou.tables import counted

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
        self.class_labels = told_apart([str(label) for label in class_labels])

    def __call__(self, engine: Any) -> None:
        """Write the files, on `save_rank` alone."""
        from ignite import distributed

        files = [file for names in from_all_ranks(self._filenames) for file in names]
        if distributed.get_rank() != self.save_rank:
            return
        rows = sorted({file: row for row, file in reversed(list(enumerate(files)))}.values(), key=files.__getitem__)
        folder = Path(self.save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        details = {
            name: _with_mean(self._checked(name, values)[rows])
            for name, values in _wanted(engine.state.metric_details, self.metric_details).items()
        }
        means = _wanted(engine.state.metrics, self.metrics)
        texts = {"metrics.csv": self._means(means, details)} if means else {}
        for name, table in details.items():
            texts |= self._tables(name, table, [files[row] for row in rows])
        write_texts({folder / name: text for name, text in texts.items()})

    def _means(self, means: Mapping[str, Any], details: Mapping[str, NDArray[np.float64]]) -> str:
        """The text of metrics.csv: a row per metric, its mean, and the mean of each class where there are details."""
        empty = [""] * len(self.class_labels)
        rows = [
            [name, value, *(_digits(_statistic("mean", column)) for column in details[name].T[:-1])]
            if name in details
            else [name, value, *empty]
            for name, value in means.items()
        ]
        return csv_text([["metric", "mean", *self.class_labels], *rows], self.deli)

    def _tables(self, name: str, table: NDArray[np.float64], files: Sequence[str]) -> dict[str, str]:
        """The texts of one metric's files: a row per case, and a row per class with the statistics asked for."""
        columns = [*self.class_labels, "mean"]
        raw = [["filename", *columns], *([file, *map(_digits, row)] for file, row in zip(files, table, strict=True))]
        texts = {f"{name}_raw.csv": csv_text(raw, self.deli)}
        if self.summary_ops is not None:
            operations = list(_OPERATIONS) if "*" in self.summary_ops else list(self.summary_ops)
            lines = [
                [column, *(_digits(_statistic(operation, values)) for operation in operations)]
                for column, values in zip(columns, table.T, strict=True)
            ]
            texts[f"{name}_summary.csv"] = csv_text([["class", *operations], *lines], self.deli)
        return texts

    def _checked(self, name: str, values: Any) -> Any:
        if values.ndim != 2:
            message = (
                f"Expected {name} to be a table with a column for each class, but got shape {tuple(values.shape)}: "
                "leave this metric out of `metric_details`."
            )
            raise ValueError(message)
        if values.shape[1] != len(self.class_labels):
            message = (
                f"Expected `class_labels` to be {counted(values.shape[1], 'name')}, one for each class of {name}, but "
                f"got {self.class_labels}: name each class once."
            )
            raise ValueError(message)
        return values


def _wanted(scores: Mapping[str, Any], names: Sequence[str] | None) -> dict[str, Any]:
    return {} if names is None else {name: value for name, value in scores.items() if name in names or "*" in names}


_OPERATIONS: dict[str, Callable[[NDArray[np.float64]], Any]] = {
    "mean": np.nanmean,
    "median": np.nanmedian,
    "max": np.nanmax,
    "min": np.nanmin,
    "90percentile": lambda values: np.nanpercentile(values, 90),
    "std": np.nanstd,
    "notnans": lambda values: np.count_nonzero(~np.isnan(values)),
}


def told_apart(names: Sequence[str]) -> list[str]:
    """Names of columns, with the number of the class where two classes have one name or that of the mean.

    >>> told_apart(["lesion", "lesion", "mean"])
    ['lesion (1)', 'lesion (2)', 'mean (3)']
    """
    counts = Counter([*names, "mean"])
    return [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names, start=1)]


def _with_mean(values: Any) -> NDArray[np.float64]:
    """The scores with their mean over the classes as the last column; the mean of nothing is NaN."""
    table = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "Mean of empty slice"
        return np.concatenate([table, np.nanmean(table, axis=1, keepdims=True)], axis=1)


def _statistic(operation: str, values: NDArray[np.float64]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # "All-NaN slice encountered"
        if operation in _OPERATIONS:
            return float(_OPERATIONS[operation](values)) if values.size else float("nan")
        share, is_percentile, rest = operation.partition("percentile")
        if not is_percentile or rest or not share.isdecimal():
            known = ", ".join([*_OPERATIONS, "<number>percentile"])
            message = f"Expected `summary_ops` to be among {known}, but got {operation}: correct it."
            raise ValueError(message)
        return float(np.nanpercentile(values, int(share))) if values.size else float("nan")


def _digits(value: float) -> str:
    """Four digits, as MONAI writes them; undefined scores are `nan` there too."""
    return f"{value:.4f}"
