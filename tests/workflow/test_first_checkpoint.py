"""The files of a checkpoint belong together: a full disk or a kill between two of them loses and mixes nothing."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_runs import finish, fork
from growing_weight import growing_weight
from ignite.engine import Engine, Events

from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.planning.plan import make_plan
from monai_iou.workflow.checkpoint_files import has_its_model, is_with_model, write_atomically
from monai_iou.workflow.checkpoints import CheckpointHandler
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.trained_models import is_unfinished

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*os.fork:DeprecationWarning"),
]
NAMES = ("last_epoch.pt", "model.json", "model.pt")
TUNED = "postprocessing.json"


def train(
    folder: Path, scores: list[float], *, resume: bool = False, start: float = 0.0, keep: str = "best", **first: float
) -> None:
    """Train a single weight: it grows by 1 in each epoch, and each epoch has its score; `first` is one at the start."""
    trained, trainer, evaluator = growing_weight(start)
    evaluator.state.best_metric, evaluator.state.best_metric_epoch = -1.0, -1
    plan = make_plan(None, [], [16, 16, 16])
    handler = CheckpointHandler(str(folder), *trained, evaluator, plan, keep=keep, resume=resume)
    handler.attach_first(trainer)

    def validate(engine: Engine) -> None:
        score = scores[engine.state.epoch - 1] if engine.state.epoch else first["at_start"]
        if score > evaluator.state.best_metric:
            evaluator.state.best_metric, evaluator.state.best_metric_epoch = score, engine.state.epoch

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    if first:
        trainer.add_event_handler(Events.STARTED, validate)
    handler.attach(trainer)
    trainer.run([0], max_epochs=len(scores))


def weight(folder: Path) -> float:
    return float(torch.load(folder / "model.pt", weights_only=True)["weight"])


def state(folder: Path) -> dict[str, Any]:
    return dict(torch.load(folder / "last_epoch.pt", weights_only=True))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def killed(folder: Path, name: str, *given: Any, **changes: Any) -> None:
    """Train in a process that ends, as by SIGKILL, before a file takes its place for the first time."""

    def run() -> None:
        replace = Path.replace

        def end(self: Path, target: Path) -> Path:
            if Path(target).name == name:
                os._exit(9)
            return replace(self, target)

        Path.replace = end  # type: ignore[method-assign]
        train(folder, *given, **changes)

    log = folder.parent / "log"
    assert finish(fork(run, log)) == 9, log.read_text()


@pytest.mark.parametrize("is_full", NAMES)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_disk_without_room_for_one_file_keeps_all_earlier_ones(
    earlier: bool, is_full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if earlier:
        train(tmp_path, [0.5, 0.6])
        (tmp_path / TUNED).write_text("{}", encoding="utf-8")
    before = content(tmp_path)
    kinds = {name: "optimizer" if name == "last_epoch.pt" else "weight" for name in NAMES}
    save, write = torch.save, Path.write_bytes

    def fill(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        if is_full == "model.json":
            full.setattr(Path, "write_bytes", fill)
        else:
            full.setattr(torch, "save", lambda what, to: (fill if kinds[is_full] in what else save)(what, to))
        with pytest.raises(TrainingError, match=f"^Expected room to write .*/{is_full}, but the disk is full"):
            train(tmp_path, [0.1], start=10)
    assert Path.write_bytes is write
    assert content(tmp_path) == before
    train(tmp_path, [0.1], start=10)
    assert (weight(tmp_path), state(tmp_path)["epoch"]) == (11, 1)
    assert sorted(content(tmp_path)) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_kill_between_the_files_of_a_first_checkpoint_loses_and_mixes_nothing(
    earlier: bool, name: str, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    if earlier:
        train(models, [0.5, 0.6])
        (models / TUNED).write_text("{}", encoding="utf-8")
    before = content(models)
    killed(models, name, [0.1], start=10)
    if name == "last_epoch.pt":
        assert {key: value for key, value in content(models).items() if key in (*NAMES, TUNED)} == before
        return
    assert state(models)["epoch"] == 1
    assert not has_its_model(state(models), models / "model.pt")
    train(models, [0.1, 0.05], start=99, resume=True)
    assert weight(models) == 11, "the best one, of the training that was killed"
    assert (models / "model.json").is_file()
    assert state(models)["epoch"] == 2


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_kill_between_the_files_of_a_later_checkpoint(name: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    train(models, [0.5])
    killed(models, name, [0.5, 0.6], resume=True)
    assert (weight(models), state(models)["best_metric_epoch"]) == (1, 2)
    train(models, [0.5, 0.6], resume=True)
    assert weight(models) == 2, "also if nothing is left to train"


@pytest.mark.parametrize("name", NAMES)
def test_a_kill_as_the_final_weights_are_stored(name: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    train(models, [0.5, 0.4])
    assert weight(models) == 1
    killed(models, name, [0.5, 0.4], resume=True, keep="last")
    assert weight(models) == 1
    train(models, [0.5, 0.4], resume=True, keep="last")
    assert (weight(models), state(models)["final"]) == (2, True)


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.4], [math.nan]], ids=str)
@pytest.mark.parametrize("keep", ["best", "last"])
def test_resuming_a_whole_checkpoint_writes_no_model(keep: str, scores: list[float], tmp_path: Path) -> None:
    train(tmp_path, scores, keep=keep)
    (tmp_path / TUNED).write_text("{}", encoding="utf-8")
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    train(tmp_path, scores, keep=keep, resume=True)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_a_model_that_a_validation_at_the_start_chose_has_its_checkpoint(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    killed(models, "model.pt", [0.1], start=10, at_start=0.3)
    assert state(models)["epoch"] == 0
    train(models, [0.1], resume=True)
    assert (weight(models), state(models)["best_metric_epoch"]) == (10, 0)


def test_a_model_is_compared_where_it_was_written_with_the_checkpoint(tmp_path: Path) -> None:
    path, weights = tmp_path / "model.pt", {"a": torch.ones(2), "extra": "text"}
    best = {"epoch": 2, "best_metric_epoch": 2, "model": {f"module.{name}": value for name, value in weights.items()}}
    assert not has_its_model(best, path)
    write_atomically(weights, path)
    assert has_its_model(best, path), "whatever the names"
    odd = {"a": torch.tensor([math.nan, 1.0]), "b": torch.eye(2).to_sparse(), "extra": {"scale": torch.ones(2)}}
    for stored, isthere in ((odd, True), ({**odd, "a": torch.tensor([math.nan, 2.0])}, False)):
        write_atomically(stored, path)
        assert has_its_model({**best, "model": odd}, path) is isthere
    write_atomically(weights, path)
    assert not has_its_model({**best, "average": {"steps": 1, "network": {"a": torch.zeros(2), "extra": "text"}}}, path)
    assert has_its_model({**best, "epoch": 3, "model": {}}, path)
    assert not has_its_model({**best, "epoch": 3, "model": {}, "final": True}, path)
    assert [is_with_model({**best, **change}) for change in ({}, {"step": 1}, {"step": 1, "final": True})] == [
        True, False, True,
    ]  # fmt: skip
    for damaged in (path.read_bytes()[:-90], b"", b"[]"):
        path.write_bytes(damaged)
        assert not has_its_model(best, path)
    write_atomically([1], path)
    assert not has_its_model(best, path)


@pytest.mark.slow
def test_a_run_outlives_a_replacement_that_has_no_room_for_its_first_checkpoint(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    data, run = write_phantom_dataset(tmp_path / "data", training=4, evaluation=0, shape=(32, 32, 24)), tmp_path / "run"
    room = 600 * 1024  # of one file: enough for the model, not for the optimizer's averages
    code = "import sys, monai_iou_command; sys.exit(monai_iou_command.main())"
    small = ["--epochs", "1", "--patch_size", "[16,16,16]", "--base_channels", "4", "--batch_size", "1"]
    small += ["--num_samples", "1", "--num_workers", "0", "--device", "cpu", "--pictures", "0"]

    def start(*words: str, limit: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, "train", str(data), "--output", str(run), *small, *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=170, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        )  # fmt: skip

    def has_no_room(*words: str) -> bool:
        failed = start(*words, limit=room)
        sentence = f"Expected room to write {run / 'models' / 'last_epoch.pt'}, but the disk is full"
        return failed.returncode == 1 and sentence in " ".join(failed.stderr.split())

    assert has_no_room()
    assert list((run / "models").glob("model*")) == []
    done = start()
    assert done.returncode == 0, done.stderr
    assert not is_unfinished(run)
    sizes = [(run / "models" / name).stat().st_size for name in ("model.pt", "last_epoch.pt")]
    assert sizes[0] < room < sizes[1]
    before = content(run)
    assert has_no_room("--overwrite", "--seed", "5")
    after = content(run)
    logs = [each.pop("log.txt") for each in (before, after)]
    assert logs[1].startswith(logs[0])
    assert after == before
