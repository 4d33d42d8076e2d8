"""What a training leaves to look at in its `output_dir`: config, log, table and curves of its epochs, pictures."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from monai_iou.evaluation.rendering import readable
from monai_iou.files import prepare, write_csv, write_json
from monai_iou.losses.terms import loss_and_terms
from monai_iou.workflow.curves import draw_curves
from monai_iou.workflow.event_files import EventFolder
from monai_iou.workflow.extra_files import earlier_epochs, extra_file
from monai_iou.workflow.keys import calling_workflow
from monai_iou.workflow.literal import literal
from monai_iou.workflow.log_file import open_log
from monai_iou.workflow.pictures import draw_case, save_png
from monai_iou.workflow.run_summary import write_summary
from monai_iou.workflow.score_files import told_apart
from monai_iou.workflow.versions import about_this_run

if TYPE_CHECKING:
    from monai.engines.evaluator import Evaluator
    from monai.engines.trainer import Trainer

__all__ = ["RunFolderHandler", "open_run_folder"]

# Drawing the curves takes as long as several steps of a small network.
SECONDS_BETWEEN_CURVES = 30.0


def open_run_folder(folder: str, bundle_root: str | None = None) -> None:
    """Write `config.json`, the resolved config of the run that calls this, and send its log to `log.txt` as well.

    `config.json` can be run again: `python -m monai.bundle run --config_file config.json`. Beside the bundle's keys it
    has `about`, the command line and the versions.

    Args:
        folder: of the run.
        bundle_root: of the bundle. It is written into `config.json` where the config's own expression would find
            another one from there; None leaves the expression.
    """
    if (Path(folder) / "pictures").is_dir():
        prepare(Path(folder) / "pictures", "output_dir")  # removes what a killed run left
    logger = open_log(Path(folder))
    about = about_this_run(sys.argv)
    for name, value in about.items():
        logger.debug("%s: %s", name, value)
    workflow = calling_workflow()
    if workflow is not None:
        config = {name: value for name, value in workflow.parser.get().items() if name != "_meta_"}
        if str(config.get("bundle_root", "")).startswith("$") and _is_elsewhere(folder, bundle_root):
            config["bundle_root"] = literal(str(Path(str(bundle_root)).resolve()))
        plain = json.loads(json.dumps({**config, "about": about}, default=str))
        write_json(Path(folder) / "config.json", plain)


def _is_elsewhere(folder: str, bundle_root: str | None) -> bool:
    """Whether the folder above the run's is not the bundle, as `bundle_root()` would take it to be."""
    return bundle_root is not None and Path(folder).resolve().parent != Path(bundle_root).resolve()


class RunFolderHandler:
    """Write `epochs.csv` after each epoch, `progress.png` at most twice a minute, and pictures of a few cases.

    The pictures are drawn after each validation. They show the first cases of the validation data with the contours of
    prediction and reference, in `pictures` and, by epoch, in TensorBoard. At the end `summary.html` joins all. Attach
    it after the `ValidationHandler` and before the `CheckpointHandler`: an epoch that is to be done again gets its row
    again. An epoch that was stopped and resumed has no duration and loss, which would be of the rest alone. A file that
    cannot be replaced, as a viewer may hold it, is tried again later: none ends a training.

    Args:
        folder: of the run.
        optimizer: for its learning rate.
        loss: the trainer's loss, for its terms.
        evaluator: of the validation, None without one.
        labels: names of the scored classes.
        cases: names of the validation cases, in the order of their batches.
        pictures: number of cases to draw; 0 draws no curves either.
        spacing: of the network's voxels, in mm.
        events: TensorBoard's files of the training; None writes some of its own into `tensorboard` in the folder.
    """

    def __init__(
        self,
        folder: str,
        optimizer: torch.optim.Optimizer,
        loss: torch.nn.Module,
        evaluator: Evaluator | None = None,
        labels: Sequence[str] = (),
        cases: Sequence[str] = (),
        pictures: int = 3,
        spacing: Sequence[float] = (1.0, 1.0, 1.0),
        events: EventFolder | None = None,
    ) -> None:
        self.events = events or EventFolder(folder)
        self.folder, self.optimizer, self.evaluator = Path(folder), optimizer, evaluator
        self.labels = told_apart(labels)
        self.pictures, self.spacing = int(pictures), tuple(spacing)
        self.cases = [case for case in cases if case][: self.pictures]
        self._terms = loss_and_terms(loss)
        self._rows: list[dict[str, Any]] = []
        self._before: list[dict[str, Any]] | None = None  # of the part that was resumed, once they are read
        self._told: set[Path] = set()
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._is_whole = False  # until an epoch begins with its first step; of the rest, a mean would say nothing
        self._start = time.monotonic()
        self._next_curves = -np.inf
        self._drawn: dict[str, Any] | None = None

    def attach(self, engine: Trainer) -> None:
        """Register on the trainer and its evaluator; only rank 0 writes."""
        from ignite.engine import Events

        if engine.state.rank != 0:
            return
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.COMPLETED, self._completed)
        if self.evaluator is not None and self.cases:
            self.evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda each: self._draw(each, engine))

    def _epoch_started(self, engine: Trainer) -> None:
        self._sums.clear()
        self._is_whole = engine.state.iteration % int(engine.state.epoch_length or 1) == 0
        self._steps, self._start = 0, time.monotonic()

    def _iteration_completed(self, engine: Trainer) -> None:
        self._steps += 1
        for name, value in self._terms(engine.state.output).items():
            self._sums[name] += value

    def _epoch_completed(self, engine: Trainer) -> None:
        epoch = engine.state.epoch
        self._rows = [row for row in self._rows if row["epoch"] < epoch]
        self._rows.append({
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._start, 3) if self._is_whole else None,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            **{name: total / self._steps if self._is_whole else None for name, total in self._sums.items()},
            **self._scores(epoch),
        })  # fmt: skip
        with extra_file(self.folder / "epochs.csv", self._told):
            self._write_table(self.folder / "epochs.csv")
        if self.pictures and time.monotonic() >= self._next_curves:
            self._draw_curves()
            self._next_curves = time.monotonic() + SECONDS_BETWEEN_CURVES

    def _write_table(self, path: Path) -> None:
        first = self._rows[0]["epoch"]
        if self._before is None:
            known = earlier_epochs(path) if first > 1 else []
            self._before = [{**row, "epoch": int(row["epoch"])} for row in known]
        self._before = [row for row in self._before if row["epoch"] < first]
        columns = list(dict.fromkeys(name for row in self._table for name in row))
        path.parent.mkdir(parents=True, exist_ok=True)  # others, who run the trainer alone, may not have made it
        write_csv(path, columns, self._table)

    @property
    def _table(self) -> list[dict[str, Any]]:
        """The rows of all epochs, also of the part of the training that was resumed."""
        return [*(self._before or ()), *self._rows]

    def _draw_curves(self) -> None:
        with extra_file(self.folder / "progress.png", self._told):
            save_png(draw_curves(self._table), self.folder / "progress.png")
            self._drawn = self._rows[-1]

    def _scores(self, epoch: int) -> dict[str, float]:
        """The validation's means and, behind them, those of each class."""
        state = self.evaluator.state if self.evaluator is not None else None
        if state is None or state.epoch != epoch:
            return {}
        scores: dict[str, float] = {name: v for name, v in state.metrics.items() if isinstance(v, float)}
        for name, values in state.metric_details.items():
            table = np.asarray(torch.as_tensor(values).cpu(), dtype=np.float64)
            if len(self.labels) > 1 and table.shape[1:] == (len(self.labels),):
                scores |= {f"{name} {label}": _mean(column) for label, column in zip(self.labels, table.T, strict=True)}
        return scores

    def _draw(self, evaluator: Evaluator, engine: Trainer) -> None:
        for source, item in zip(evaluator.state.batch, evaluator.state.output, strict=True):
            case = source.get("case")
            if case in self.cases:
                path, picture = self.folder / "pictures" / picture_name(case), None
                with extra_file(path, self._told):
                    image, *maps = (torch.as_tensor(item[name]).cpu() for name in ("image", "pred", "label"))
                    picture = draw_case(
                        image[0].float().numpy(), *map(class_numbers, maps),
                        spacing=self.spacing, title=f"{case}, epoch {engine.state.epoch}, prepared volume",
                    )  # fmt: skip
                    save_png(picture, path)
                if picture is not None:
                    with extra_file(self.folder / "tensorboard", self._told):
                        self._to_tensorboard(picture, str(case), engine.state.epoch)

    def _to_tensorboard(self, picture: np.ndarray, case: str, epoch: int) -> None:
        self.events.writer.add_image(f"validation/{readable(case)}", picture, epoch, dataformats="HWC")
        self.events.writer.flush()

    def _completed(self, engine: Trainer) -> None:
        if self._rows:  # once more, as a viewer may have held it at the last epoch
            with extra_file(self.folder / "epochs.csv", self._told):
                self._write_table(self.folder / "epochs.csv")
        if self.pictures:
            if self._rows and self._rows[-1] is not self._drawn:
                self._draw_curves()
            with extra_file(self.folder / "summary.html", self._told):
                write_summary(self.folder, {case: picture_name(case) for case in self.cases})


def picture_name(case: str) -> str:
    """Return the file of a case's picture; a case's name may have folders in it.

    >>> picture_name("p1/image")
    'p1_image.png'
    """
    return f"{case.replace('/', '_')}.png"


def class_numbers(maps: torch.Tensor) -> NDArray[np.int64]:
    """Return one map of class numbers: of overlapping regions the last, 0 where nobody annotated.

    Args:
        maps: class numbers (1, *S), or a map of each class (C, *S), the background first.

    Example:
        >>> class_numbers(torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 1]])).tolist()
        [0, 1, 2]
    """
    if len(maps) == 1:
        return maps[0].round().long().numpy()
    numbers = torch.arange(len(maps)).view(-1, *[1] * (maps.ndim - 1))
    return (numbers * maps.nan_to_num().round().long()).amax(0).numpy()


def _mean(column: np.ndarray) -> float:
    kept = column[~np.isnan(column)]
    return float(kept.mean()) if kept.size else float("nan")
