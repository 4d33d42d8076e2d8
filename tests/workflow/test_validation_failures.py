"""A validation case whose output is not finite: a sentence, no score, no best model; and the training goes on."""

from __future__ import annotations

import contextlib
import csv
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundle_runs import overrides
from gloo_ranks import join_group, leave_group, run_ranks
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.handlers import from_engine

from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.handlers import DiceHandler, IoUHandler
from monai_iou.workflow.engines import ValidationEvaluator
from monai_iou.workflow.optimization import WeightAverage, inner_module, is_better, is_parallel
from monai_iou.workflow.postprocessing import tune_postprocessing

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]
SENTENCE = (
    "Expected a finite network output for {}, but it has NaN or infinity: look at its intensities, lower "
    "`learning_rate` or set `amp` to false; this validation gives no score and chooses no model."
)


def batches(*values: float) -> list[dict[str, Any]]:
    """Volumes whose output is the image: in half of the reference where the value is 1, NaN where it is NaN."""
    label = torch.zeros(1, 1, 4, 4, 4)
    label[..., :2] = 1
    found = []
    for index, value in enumerate(values):
        image = torch.zeros(1, 1, 4, 4, 4)
        image[..., 0] = value
        found.append({"image": image, "label": label, "case": [f"case{index}"]})
    return found


def metric(kind: Any) -> Any:
    return kind(include_background=False, num_classes=2, output_transform=from_engine(["pred", "label"]))


def evaluator_of(batches: list[dict[str, Any]]) -> ValidationEvaluator:
    return ValidationEvaluator(
        device=torch.device("cpu"), val_data_loader=batches, network=torch.nn.Identity(), epoch_length=len(batches),
        key_val_metric={"val_mean_iou": metric(IoUHandler)}, additional_metrics={"val_mean_dice": metric(DiceHandler)},
        metric_cmp_fn=is_better,
    )  # fmt: skip


def test_a_validation_with_a_failed_case_has_no_score_and_no_best(caplog: pytest.LogCaptureFixture) -> None:
    good, bad, lesser = batches(1, 1), batches(1, math.nan), batches(1, 0)
    engine = evaluator_of(bad)
    seen: list[tuple[float, float, int]] = []
    for epoch, data in enumerate((bad, lesser, bad, good), start=1):
        engine.data_loader = data
        engine.run(epoch)
        state = engine.state
        assert list(state.metrics) == ["val_mean_iou", "val_mean_dice"]
        assert math.isnan(state.metrics["val_mean_iou"]) == math.isnan(state.metrics["val_mean_dice"])
        assert bool(state.metric_details) == (data is not bad)
        seen.append((state.metrics["val_mean_iou"], state.best_metric, state.best_metric_epoch))
    assert seen[1:2] + seen[3:] == [(0.25, 0.25, 2), (0.5, 0.5, 4)]
    assert [(math.isnan(score), *best) for score, *best in seen[0::2]] == [(True, -1, -1), (True, 0.25, 2)]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        SENTENCE.format("case1")
    ] * 2


def validate_on_rank(rank: int, folder: str) -> None:
    """Rank 1 alone has a case that fails, and in the second validation no other."""
    join_group(rank, 2, folder)
    found = []
    engine = evaluator_of([])
    for epoch, bad in enumerate((batches(1, math.nan), batches(math.nan), batches(1)), start=1):
        engine.data_loader = bad if rank == 1 else batches(1, 1)
        engine.state.epoch_length = len(engine.data_loader)
        engine.run(epoch)
        found.append((engine.state.metrics["val_mean_iou"], engine.state.best_metric_epoch))
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


def test_a_failed_case_of_one_rank_leaves_all_without_a_score(tmp_path: Path) -> None:
    run_ranks(validate_on_rank, 2, str(tmp_path))
    for rank in range(2):
        first, second, third = torch.load(tmp_path / f"{rank}.pt")
        assert math.isnan(first[0])
        assert math.isnan(second[0])
        assert [first[1], second[1], third] == [-1, -1, (0.5, 3)]


def validate_with_buffers(rank: int, folder: str, averages: bool, compiles: bool) -> None:
    """Rank 1 has another running mean than rank 0, by which its output is wrong, and more volumes."""
    join_group(rank, 2, folder)
    norm = torch.nn.BatchNorm3d(1, eps=0, affine=False, momentum=None)
    parallel = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(norm, torch.nn.Conv3d(1, 1, 1)))
    with torch.no_grad():
        norm.running_mean.fill_(-float(rank))
        parallel.module[1].weight.fill_(1)
        parallel.module[1].bias.fill_(0)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    network = torch.compile(parallel, backend="eager") if compiles else parallel
    trained = WeightAverage(network, optimizer, 0.5 if averages else None).network
    volumes = batches(*[1] * (1 + 7 * rank))
    engine = ValidationEvaluator(
        device=torch.device("cpu"), val_data_loader=volumes, network=trained, epoch_length=len(volumes),
        key_val_metric={"val_mean_iou": metric(IoUHandler)},
    )  # fmt: skip
    assert not is_parallel(engine.network), "it may wait in a call for a rank that has no volume left"
    engine.run(1)
    stored = inner_module(trained)[0].running_mean
    torch.save([engine.state.metrics["val_mean_iou"], float(stored)], Path(folder) / f"{rank}.pt")
    leave_group()


@pytest.mark.parametrize(("averages", "compiles"), [(False, False), (True, False), (False, True)])
def test_ranks_with_buffers_validate_the_network_that_rank_0_stores(
    averages: bool, compiles: bool, tmp_path: Path
) -> None:
    """The buffers of the others are those of their own last batch."""
    run_ranks(validate_with_buffers, 2, str(tmp_path), averages, compiles)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [[0.5, 0.0]] * 2


class Flaky(torch.nn.Module):
    """A network whose output is NaN in some epochs, for images of any kind but not in training."""

    bad = False

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.layer(image)
        return logits if self.training or not Flaky.bad else logits * math.nan


@pytest.mark.parametrize("bad", [(1, 3), (1, 2, 3)], ids=str)
def test_a_training_takes_no_model_from_a_validation_that_failed(
    bad: tuple[int, ...],
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = write_phantom_dataset(tmp_path / "data", training=4, evaluation=1, shape=(32, 32, 24))
    monkeypatch.setattr(Flaky, "bad", False)  # so that it is so again after the test
    network = {"network_def": {"_target_": "test_validation_failures.Flaky"}}
    made = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"), workflow_type="train",
        **overrides(bundle, data, epochs=3, tune_postprocessing=True, **network),
    )  # fmt: skip
    made.initialize()
    trainer = made.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: setattr(Flaky, "bad", engine.state.epoch in bad))
    made.run()
    models = bundle / "models"
    last, model = (torch.load(models / name, weights_only=True) for name in ("last_epoch.pt", "model.pt"))
    assert last["best_metric_epoch"] == (2 if len(bad) == 2 else -1)
    final = all(torch.equal(model[name], weights) for name, weights in last["model"].items())
    assert final == (len(bad) == 3), "without any best, the final weights"
    with (bundle / "eval" / "epochs.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["epoch"]) for row in rows if not row["val_mean_iou"]] == list(bad)
    shown = capsys.readouterr().out
    for item in made.parser.get_parsed_content("cases").validation:
        assert shown.count(f"ERROR {SENTENCE.format(item['case'])}") == len(bad)
    assert "no post-processing is tuned." in shown
    assert not (models / "postprocessing.json").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_post_processing_is_not_tuned_on_what_is_not_finite(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = torch.nn.Conv3d(1, 2, 1)
    torch.save(network.state_dict(), tmp_path / "model.pt")
    earlier = tmp_path / "postprocessing.json"
    earlier.write_text("{}")
    outputs = {0.0: torch.rand(1, 2, 4, 4, 4), 1.0: torch.full((1, 2, 4, 4, 4), value)}
    evaluator = SimpleNamespace(
        state=SimpleNamespace(rank=0, device=torch.device("cpu")), network=network, amp=False, amp_kwargs={},
        inferer=lambda image, _: outputs[float(image.max())], mode=contextlib.nullcontext,
    )  # fmt: skip
    label = torch.ones(1, 4, 4, 4)
    items = [{"image": torch.full((1, 4, 4, 4), float(n)), "label": label, "case": f"c{n}"} for n in (0, 1)]
    assert tune_postprocessing(evaluator, items, (1.0, 1.0, 1.0), 2, str(tmp_path)) is None
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "Expected a finite network output for c1, but it has NaN or infinity: look at its intensities, or set `amp` to "
        "false; no post-processing is tuned."
    ]
    assert earlier.read_text() == "{}", "what was tuned for these weights stays"
