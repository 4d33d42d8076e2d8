"""What a training leaves to look at: table, curves, pictures, log, config, and one page."""

from __future__ import annotations

import html
import io
import json
import logging
import math
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bundle_runs import overrides
from monai.bundle import ConfigParser, ConfigWorkflow

from monai_iou.bundle_files import bundle_path, copy_bundle
from monai_iou.demo import run_workflow
from monai_iou.files import read_csv, write_csv, write_json
from monai_iou.planning.loss_rules import CROSS_ENTROPY_WEIGHT
from monai_iou.planning.plan import Plan
from monai_iou.workflow import run_folder
from monai_iou.workflow.bars import start_above_log, stop_above_log
from monai_iou.workflow.checkpoint_files import last_epoch
from monai_iou.workflow.curves import draw_curves
from monai_iou.workflow.event_files import EventFolder
from monai_iou.workflow.run_folder import RunFolderHandler
from monai_iou.workflow.run_summary import write_summary
from monai_iou.workflow.versions import about_this_run

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of two epochs, resumed for a third."""
    bundle = copy_bundle(tmp_path_factory.mktemp("run") / "bundle")
    run_workflow(bundle, ["train"], overrides(bundle, data, pictures=1))
    run_workflow(bundle, ["train"], overrides(bundle, data, pictures=1, epochs=3, val_interval=2, resume=True))
    return bundle / "eval"


def test_the_table_has_every_epoch_of_all_parts_once(run: Path) -> None:
    rows = read_csv(run / "epochs.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {"seconds", "learning_rate", "train_loss", "train_loss_iou", "train_loss_cross_entropy"} <= rows[0].keys()
    for row in rows:
        total = float(row["train_loss_iou"]) + CROSS_ENTROPY_WEIGHT * float(row["train_loss_cross_entropy"])
        assert float(row["train_loss"]) == pytest.approx(total, rel=1e-5)
    assert [bool(row["val_mean_iou"]) for row in rows] == [True, True, False]
    assert float(rows[0]["val_mean_dice"]) >= float(rows[0]["val_mean_iou"]) >= 0


def test_pictures_of_the_same_case_and_curves(run: Path) -> None:
    from matplotlib.image import imread
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (picture,) = (run / "pictures").iterdir()
    assert re.fullmatch(r"phantom_\d\d\.png", picture.name)
    assert imread(run / "progress.png").shape[2] >= 3
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (tag,) = events.Tags()["images"]
    assert tag.startswith("validation/phantom_")
    assert [event.step for event in events.Images(tag)] == [1, 2]


def test_the_log_and_the_config_tell_the_run(run: Path) -> None:
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"INFO epoch \d/\d loss", log)) == 3
    assert "Resumed from" in log
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert (config["epochs"], config["seed"], config["patch_size"]) == (3, 0, [24, 24, 16])
    assert {"monai", "torch", "monai-iou", "python"} <= config["about"]["versions"].keys()


def test_the_page_is_one_file_with_everything(run: Path) -> None:
    page = (run / "summary.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert "val_mean_dice" in page
    assert "phantom_" in page
    assert "Slice numbers are those of the prepared volume" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_a_page_of_an_empty_folder(tmp_path: Path) -> None:
    assert "Training" in write_summary(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("epochs", "text"), [(1, ">1 epoch."), (2, ">2 epochs.")])
def test_a_page_counts_its_epochs(epochs: int, text: str, tmp_path: Path) -> None:
    rows = "".join(f"{epoch},10,0.9\n" for epoch in range(1, epochs + 1))
    (tmp_path / "epochs.csv").write_text(f"epoch,seconds,train_loss\n{rows}", encoding="utf-8")
    assert text in write_summary(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("scores", "best", "cells"),
    [
        ([5.208333488553762e-05], "; best mean validation IoU 0.0001 in epoch 1", ["0.0001", "0.0001"]),
        ([0.69999, 0.12345], "; best mean validation IoU 0.7000 in epoch 1", ["0.1235", "0.7000"]),
        ([0.1, 0.69999, 4e-7], "; best mean validation IoU 0.7000 in epoch 2", ["0.0000", "0.7000"]),
        ([0.5, math.nan], "; best mean validation IoU 0.5000 in epoch 1", ["-", "0.5000"]),
        ([math.nan, math.nan], "", ["-"]),
    ],
)
def test_a_page_rounds_the_scores_of_the_training(
    scores: list[float], best: str, cells: list[str], tmp_path: Path
) -> None:
    rows = [{"epoch": epoch, "train_loss": 0.9, "val_mean_iou": score} for epoch, score in enumerate(scores, start=1)]
    write_csv(tmp_path / "epochs.csv", tuple(rows[0]), rows)
    page = write_summary(tmp_path).read_text(encoding="utf-8")
    assert f">{len(rows)} epoch{'s' if rows[1:] else ''}{best}.</p>" in page
    assert re.findall(r"<td>(.*?)</td>", page) == cells
    heads = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', page)
    assert heads[:2] == ["Score", "last epoch"]
    assert heads[2:] == [f"epoch {best[-1]}, the best" for _ in cells[1:]]


def test_a_page_has_paths_as_the_user_gave_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent to others, and folders may be called after users or patients."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    typed = ["train", "data", "-o", "run", "--cache_dir", "/c"]
    found = {"bundle_root": f"$'{tmp_path}/r\\x231'", "dataset_dir": f"{tmp_path}/data", "ckpt_dir": str(tmp_path)}
    typed_keys = {"output_dir": "run", "start_from": f"/mnt{tmp_path}/model.pt", "cache_dir": "/c", "pixdim": None}
    about = about_this_run([f"{tmp_path}/.venv/bin/monai-iou", *typed])
    write_json(tmp_path / "run" / "config.json", {**found, **typed_keys, "about": about})
    page = html.unescape(write_summary(Path("run")).read_text(encoding="utf-8"))
    assert dict(re.findall("<dt>([^<]*)</dt><dd><code>([^<]*)</code></dd>", page)) == {
        "Command": shlex.join(["monai-iou", *typed]),
        "bundle_root": json.dumps("$'r\\x231'"),
        "dataset_dir": '"data"',
        "ckpt_dir": '"."',
        "output_dir": '"run"',
        "start_from": json.dumps(f"/mnt{tmp_path}/model.pt"),
        "cache_dir": '"/c"',
        "pixdim": "null",
    }


def test_per_class_columns_and_undefined_scores(tmp_path: Path) -> None:
    handler = RunFolderHandler(
        str(tmp_path), torch.optim.SGD([torch.zeros(1)], 0.1), torch.nn.MSELoss(), labels=["liver", "tumour"]
    )
    details = torch.tensor([[0.5, torch.nan], [0.7, torch.nan]])
    state = type(
        "State", (), {"epoch": 4, "metrics": {"val_mean_iou": 0.6}, "metric_details": {"val_mean_iou": details}}
    )
    handler.evaluator = type("Evaluator", (), {"state": state})  # type: ignore[assignment]
    found = handler._scores(4)
    assert found["val_mean_iou liver"] == pytest.approx(0.6)
    assert np.isnan(found["val_mean_iou tumour"])
    assert handler._scores(5) == {}


def test_classes_of_one_name_have_columns_of_their_own(tmp_path: Path) -> None:
    state = SimpleNamespace(
        epoch=1, metrics={"val_mean_iou": 0.5}, metric_details={"val_mean_iou": torch.tensor([[0.25, 0.5, 0.75]])}
    )
    evaluator: Any = SimpleNamespace(state=state)
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    labels = ["lesion", "lesion", "liver"]
    handler = RunFolderHandler(str(tmp_path), optimizer, torch.nn.MSELoss(), evaluator, labels)
    scores = {"": 0.5, " lesion (1)": 0.25, " lesion (2)": 0.5, " liver": 0.75}
    assert handler._scores(1) == {f"val_mean_iou{name}": value for name, value in scores.items()}


def plan_of_regions() -> Plan:
    """The example of docs/bundle.md."""
    labels = {0: "background", 1: "oedema", 2: "necrosis", 3: "enhancing"}
    regions = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    return Plan((), labels, (), (), (), (), (), regions=regions, regions_order=(1, 2, 3))


@pytest.mark.parametrize(
    ("plan", "names"),
    [
        (plan_of_regions(), ["whole", "core", "enhancing"]),
        (Plan((), {0: "background", 5: "tumour", 2: "liver"}, (), (), (), (), (), ignore=9), ["tumour", "liver"]),
    ],
)
def test_columns_are_named_as_the_networks_classes(plan: Plan, names: list[str]) -> None:
    train = json.loads((bundle_path() / "configs" / "train.json").read_text(encoding="utf-8"))
    (handler,) = (each for each in train["train"]["handlers"] if each["_target_"].endswith("RunFolderHandler"))
    parser = ConfigParser({"plan": plan, "labels": handler["labels"]})
    assert parser.get_parsed_content("labels") == names


def test_pictures_of_regions_show_the_last_region_of_each_voxel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    titles: list[str] = []

    def draw(_: object, *maps: np.ndarray, title: str, **__: object) -> np.ndarray:
        drawn.extend(maps)
        titles.append(title)
        return np.zeros((4, 4, 3))

    monkeypatch.setattr(run_folder, "draw_case", draw)
    monkeypatch.setattr(run_folder, "save_png", lambda *_: None)
    monkeypatch.setattr(RunFolderHandler, "_to_tensorboard", lambda *_: None)
    values = torch.randint(0, 4, (4, 5, 6), generator=torch.Generator().manual_seed(0))
    regions = torch.stack([values == 0, values > 0, values > 1, values > 2]).float()
    unknown = torch.stack([values == 0, values > 0, torch.full_like(values, torch.nan, dtype=torch.float)]).float()
    handler = RunFolderHandler(
        str(tmp_path), torch.optim.SGD([torch.zeros(1)], 0.1), torch.nn.MSELoss(), cases=["c"], spacing=(1, 1, 1)
    )
    for prediction, label in ((regions, regions.to(torch.uint8)), (values[None], unknown)):
        output = [{"image": torch.zeros(2, 4, 5, 6), "pred": prediction, "label": label}]
        state = SimpleNamespace(batch=[{"case": "c"}], output=output)
        handler._draw(SimpleNamespace(state=state), SimpleNamespace(state=SimpleNamespace(epoch=1)))  # type: ignore[arg-type]
    assert titles == ["c, epoch 1, prepared volume"] * 2
    expected = [values, values, values, (values > 0).long()]
    for found, each in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(found, each.numpy())


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"epoch": 1, "train_loss": 1.0}],
        [{"epoch": 1, "train_loss": None, "train_loss_iou": None, "seconds": None}],
        [{"epoch": epoch, "train_loss": float("nan"), "val_mean_iou": 0.1 * epoch} for epoch in range(1, 50)],
    ],
)
def test_curves_of_any_table(rows: list[dict[str, Any]]) -> None:
    assert draw_curves(rows).shape == (650, 1300, 3)


@pytest.mark.parametrize(("seconds", "drawn"), [(60.0, [1, 4]), (0.0, [1, 2, 3, 4])])
def test_short_epochs_do_not_wait_for_their_curves(
    seconds: float, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ignite.engine import Engine

    counts: list[int] = []

    def count(rows: list[dict[str, Any]]) -> np.ndarray:
        counts.append(len(rows))
        return np.zeros((4, 4, 3), dtype=np.uint8)

    monkeypatch.setattr(run_folder, "draw_curves", count)
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CURVES", seconds)
    engine = Engine(lambda *_: {"loss": 1.0})
    engine.state.rank = 0
    RunFolderHandler(str(tmp_path), torch.optim.SGD([torch.zeros(1)], 0.1), torch.nn.MSELoss()).attach(engine)  # type: ignore[arg-type]
    engine.run([0], max_epochs=4)
    assert counts == drawn
    assert len(read_csv(tmp_path / "epochs.csv")) == 4
    engine.run([0], max_epochs=4)  # again from the first epoch: its last curves are new ones
    assert counts == [*drawn, *(drawn if seconds == 0 else [4])]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_resumed_epoch_has_no_loss_of_its_rest(step: int, tmp_path: Path) -> None:
    from ignite.engine import Engine, Events

    engine = Engine(lambda _, batch: {"loss": float(batch)})
    engine.state.rank = 0

    def resume() -> None:
        engine.state.epoch, engine.state.iteration = 1, 3 + step

    engine.add_event_handler(Events.STARTED, resume)
    handler_of(tmp_path).attach(engine)  # type: ignore[arg-type]
    engine.run([2.0, 4.0, 6.0], max_epochs=3)
    rows = read_csv(tmp_path / "epochs.csv")
    assert [(row["epoch"], row["learning_rate"]) for row in rows] == [("2", "0.1"), ("3", "0.1")]
    assert [bool(row["seconds"]) for row in rows] == [step == 0, True]
    assert [row["train_loss"] for row in rows] == ["4.0" if step == 0 else "", "4.0"]


def test_an_epoch_of_which_only_the_validation_was_left_has_no_loss(tmp_path: Path) -> None:
    handler = handler_of(tmp_path)
    complete(handler, 1)
    handler._draw_curves()
    (row,) = read_csv(tmp_path / "epochs.csv")
    assert row == {"epoch": "1", "seconds": "", "learning_rate": "0.1"}


def test_log_lines_go_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console
    from rich.progress import Progress

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("monai_iou.bar_test")
    handler = logging.StreamHandler(terminal)
    logger.addHandler(handler)
    bar = Progress(console=Console(file=terminal, force_terminal=True, width=60), auto_refresh=False)
    start_above_log(bar)
    bar.add_task("training", total=3)
    logger.error("a line of the log")
    bar.refresh()
    stop_above_log(bar)
    assert handler.stream is terminal
    logger.removeHandler(handler)
    lines = terminal.getvalue().split("\n")
    (line,) = [line for line in lines if "a line of the log" in line]
    assert line.rpartition("\x1b[2K")[2] == "a line of the log"  # behind what erases the bar


@pytest.mark.parametrize("output", ["bundle/eval", "runs/a"])
def test_the_config_of_a_run_goes_on_with_it_wherever_its_folder_is(output: str, bundle: Path, data: Path) -> None:
    places = overrides(bundle, data, epochs=1, output_dir=str(bundle.parent / output))
    del places["bundle_root"]
    config = bundle / "configs" / "train.json"
    for epochs, resume in ((1, False), (2, True)):
        workflow = ConfigWorkflow(str(config), workflow_type="train", **{**places, "epochs": epochs, "resume": resume})
        workflow.initialize()
        workflow.run()
        assert last_epoch(bundle / "models" / "last_epoch.pt") == epochs
        config, places = bundle.parent / output / "config.json", {"overwrite": False}
    stored = json.loads(config.read_text())["bundle_root"]
    assert (stored == str(bundle)) == (output == "runs/a"), "a copy of the whole bundle finds itself"


def event_files(bundle: Path) -> set[str]:
    return {path.name for path in (bundle / "eval" / "tensorboard").iterdir()}


def test_a_training_that_replaces_another_removes_its_curves_with_its_first_checkpoint(
    bundle: Path, data: Path
) -> None:
    from ignite.engine import Events

    run_workflow(bundle, ["train"], overrides(bundle, data, pictures=1, epochs=1))
    first = event_files(bundle)
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=2, resume=True))
    resumed = event_files(bundle)
    assert first < resumed, "all of one training"

    workflow = ConfigWorkflow(
        str(bundle / "configs" / "train.json"), workflow_type="train", **overrides(bundle, data, epochs=1)
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    before: list[set[str]] = []
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: before.append(event_files(bundle)))
    (bundle / "eval" / "tensorboard" / "notes.txt").touch()
    workflow.run()
    own = before[-1] - resumed - {"notes.txt"}
    assert resumed < before[-1], "nothing is in their place yet"
    assert own
    assert event_files(bundle) == own | {"notes.txt"}


def test_curves_stay_if_nothing_is_replaced_or_they_cannot_be_removed(tmp_path: Path) -> None:
    folder = EventFolder(str(tmp_path))
    assert folder.path == str(tmp_path / "tensorboard")
    EventFolder(str(tmp_path), replaces=True).remove_earlier()  # there is no folder yet
    Path(folder.path).mkdir()
    earlier, other = (Path(folder.path) / f"events.out.tfevents.{number}" for number in (1, 2))
    earlier.touch()
    EventFolder(str(tmp_path)).remove_earlier()
    replacing = EventFolder(str(tmp_path), replaces=True)
    other.mkdir()
    stuck = EventFolder(str(tmp_path), replaces=True)
    replacing.remove_earlier()
    assert [*Path(folder.path).iterdir()] == [other]
    stuck.remove_earlier()
    assert [*Path(folder.path).iterdir()] == [other]


class FullDisk(io.FileIO):
    """A file of which the disk takes half of what is written."""

    def write(self, data: Any) -> int:
        super().write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")


def test_curves_that_a_full_disk_cut_off_are_whole_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = EventFolder(str(tmp_path))
    writer = folder.writer
    assert list(tmp_path.iterdir()) == [], "a rank that writes nothing leaves no file"
    for step in range(6):
        with monkeypatch.context() as patched:
            if step in (0, 2, 3):
                patched.setattr(Path, "open", lambda path, mode: FullDisk(path, mode))
            writer.add_scalar("train_loss", step / 2, step)
            writer.flush()
    (file,) = Path(folder.path).iterdir()
    events = EventAccumulator(folder.path)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(n, n / 2) for n in range(6)]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{folder.path} cannot be read or replaced now and stays as it is: [Errno 28] No space left on device"
    ]
    file.unlink()
    writer.add_scalar("train_loss", 3.0, 6)
    writer.close()
    events = EventAccumulator(folder.path)
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [6], "after somebody removed the file"


def test_a_folder_of_curves_that_cannot_be_written_ends_no_training(bundle: Path, data: Path) -> None:
    folder = bundle / "eval" / "tensorboard"
    folder.parent.mkdir()
    folder.write_text("no folder")
    run_workflow(bundle, ["train"], overrides(bundle, data, pictures=1, epochs=1))
    assert last_epoch(bundle / "models" / "last_epoch.pt") == 1
    assert (bundle / "eval" / "summary.html").is_file()
    log = (bundle / "eval" / "log.txt").read_text(encoding="utf-8")
    assert re.findall(r"WARNING (.*tensorboard.*)", log) == [
        f"{folder} cannot be read or replaced now and stays as it is: [Errno 17] File exists: '{folder}'"
    ]


def handler_of(folder: Path, **options: Any) -> RunFolderHandler:
    return RunFolderHandler(str(folder), torch.optim.SGD([torch.zeros(1)], 0.1), torch.nn.MSELoss(), **options)


def complete(handler: RunFolderHandler, *epochs: int) -> None:
    for epoch in epochs:
        handler._epoch_completed(SimpleNamespace(state=SimpleNamespace(epoch=epoch)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"epoch;seconds;train_loss\n1;10,5;0,9\n2;10,4;0,8\n", []),
        (b"epoch;seconds;train_loss\n1;10.5;0.9\n2;10,4;0,8\n", ["1"]),
        (b"epoch,seconds,train_loss\n1,10.5,0.9\n2,1", ["1", "2"]),
        ("epoch,seconds,Verlust f\xfcr alle\n1,10.5,0.9\n".encode("latin-1"), []),
        (b"seconds,train_loss\n10.5,0.9\n", []),
        (b'epoch,seconds\n1,"10.5\n', []),
        (b"epoch,seconds\ninf,10.5\n2,10.4\n", ["2"]),
    ],
)
def test_a_table_that_a_spreadsheet_saved_ends_no_training(
    content: bytes, kept: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "epochs.csv"
    table.write_bytes(content)
    assert "Training" in write_summary(tmp_path).read_text(encoding="utf-8")
    complete(handler_of(tmp_path, pictures=0), 3, 4)
    assert [row["epoch"] for row in read_csv(table)] == [*kept, "3", "4"]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if content.endswith(b"2,1"):  # a row that ends early
        assert warned == []
        return
    aside = tmp_path / "epochs_unreadable.csv"
    assert aside.read_bytes() == content
    assert warned == [
        f"{table} has rows that cannot be read, perhaps since a spreadsheet saved it with decimal commas: they are "
        f"left out of the table from now on, and {aside} keeps them."
    ]
    table.write_bytes(content)
    complete(handler_of(tmp_path, pictures=0), 5)
    assert aside.read_bytes() == 2 * content, "what was kept before is kept too"


@pytest.mark.slow
def test_files_that_a_viewer_holds_end_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on Windows, where a file that is open elsewhere cannot be replaced."""
    held = {tmp_path / "epochs.csv", tmp_path / "progress.png", tmp_path / "summary.html", tmp_path / "pictures/c.png"}
    replace = Path.replace

    def replace_free(self: Path, target: Path) -> Path:
        if Path(target) in held:
            raise PermissionError(13, "The file is being used by another process")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_free)
    monkeypatch.setattr(run_folder, "SECONDS_BETWEEN_CURVES", 0.0)
    monkeypatch.setattr(RunFolderHandler, "_to_tensorboard", lambda *_: None)
    handler = handler_of(tmp_path, cases=["c"])
    label = torch.ones(1, 8, 8, 4)
    batch: Any = SimpleNamespace(batch=[{"case": "c"}], output=[{"image": label, "pred": label, "label": label}])
    engine: Any = SimpleNamespace(state=SimpleNamespace(epoch=2))
    for _ in range(2):
        handler._draw(SimpleNamespace(state=batch), engine)  # type: ignore[arg-type]
        complete(handler, 1, 2)
        handler._completed(engine)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert {message.partition(" cannot be read or replaced now and stays as it is: ")[0] for message in warned} == {
        str(path) for path in held
    }
    assert len(warned) == len(held), "each once"
    assert all("The file is being used by another process" in message for message in warned)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    held.clear()
    handler._completed(engine)
    assert [row["epoch"] for row in read_csv(tmp_path / "epochs.csv")] == ["1", "2"], "of a training that ends here"
    complete(handler, 3)
    handler._completed(engine)
    assert [row["epoch"] for row in read_csv(tmp_path / "epochs.csv")] == ["1", "2", "3"], "none is lost"
    assert (tmp_path / "progress.png").is_file()
    assert (tmp_path / "summary.html").is_file()


def test_rows_of_a_table_that_could_not_be_opened_are_read_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "epochs.csv"
    complete(handler_of(tmp_path, pictures=0), 1, 2)
    handler, opened = handler_of(tmp_path, pictures=0), Path.open

    def held(self: Path, *given: Any, **named: Any) -> Any:
        if self == table:
            raise PermissionError(13, "The file is being used by another process")
        return opened(self, *given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", held)
        complete(handler, 3)
    assert [row["epoch"] for row in read_csv(table)] == ["1", "2"]
    complete(handler, 4)
    assert [row["epoch"] for row in read_csv(table)] == ["1", "2", "3", "4"]


def drawn_once(handler: RunFolderHandler, *cases: str) -> None:
    label = torch.ones(1, 8, 8, 4)
    items = [{"image": label, "pred": label, "label": label}] * len(cases)
    batch: Any = SimpleNamespace(batch=[{"case": case} for case in cases], output=items)
    handler._draw(SimpleNamespace(state=batch), SimpleNamespace(state=SimpleNamespace(epoch=1)))  # type: ignore[arg-type]


def test_cases_of_any_name_have_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    names = ["a$1_$1", "M\udcf6ller"]
    drawn_once(handler_of(tmp_path, cases=names), *names)
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"{name}.png" for name in names}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"validation/a$1_$1", r"validation/M\udcf6ller"}


@pytest.mark.parametrize(("part", "file"), [("draw_case", "pictures/c.png"), ("_to_tensorboard", "tensorboard")])
def test_pictures_that_cannot_be_made_end_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str, file: str
) -> None:
    """As the libraries that draw them raise errors of any type."""

    def fail(*_: object, **__: object) -> None:
        message = "set_text(): incompatible\n  arguments"
        raise TypeError(message)

    monkeypatch.setattr(run_folder if part == "draw_case" else RunFolderHandler, part, fail)
    handler = handler_of(tmp_path, cases=["c"])
    for _ in range(2):
        drawn_once(handler, "c")
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{tmp_path / file} cannot be made now and stays as it is: TypeError: set_text(): incompatible arguments"
    ]
