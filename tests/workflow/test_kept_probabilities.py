"""The probabilities of a validation, and the two scores of them that `calibration` adds to a training."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bundle_runs import overrides

from monai_iou import CalibrationMetric, ThresholdIoUMetric
from monai_iou.demo import run_workflow
from monai_iou.planning.plan import Plan
from monai_iou.workflow.kept_probabilities import KeptProbabilitiesd

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]

NAMES = {0: "background", 1: "oedema", 2: "core"}
SHAPE = (4, 5, 6)


def plan(**changes: Any) -> Plan:
    return Plan(("MRI",), NAMES, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),), ({"kind": "zscore"},), **changes)


@pytest.mark.parametrize("ignore", [None, 9])
@pytest.mark.parametrize("exclusive", [True, False])
def test_the_voxels_that_count_are_kept_with_their_label(exclusive: bool, ignore: int | None) -> None:
    regions = {} if exclusive else {"regions": {"whole": (1, 2), "core": (2,)}, "regions_order": (1, 2)}
    used = plan(ignore=ignore, **regions)
    generator = torch.Generator().manual_seed(0)
    output = torch.randn((3, *SHAPE), generator=generator)
    numbers = torch.randint(0, 3, (1, *SHAPE), generator=generator)
    label = numbers if exclusive else torch.cat([numbers == 0, numbers >= 1, numbers == 2]).to(torch.uint8)
    counts = torch.ones(SHAPE, dtype=torch.bool)
    if ignore is not None:
        counts[0] = False
        label[:, ~counts] = used.ignore_index if exclusive else 0
    found = KeptProbabilitiesd(["pred", "label"], used)({"pred": output, "label": label})
    assert found["pred"] is output
    probabilities = output.softmax(0) if exclusive else output.sigmoid()
    assert torch.equal(found["probabilities"], probabilities[:, counts])
    assert torch.equal(found["probability_label"], label[:, counts])


def test_classes_that_were_not_annotated_have_no_score() -> None:
    label = torch.randint(0, 3, (1, *SHAPE), generator=torch.Generator().manual_seed(0))
    item = {"pred": torch.randn(3, *SHAPE), "label": label, "labelled": torch.tensor([True, False, True])}
    kept = KeptProbabilitiesd(["pred", "label"], plan())(item)
    for metric in (ThresholdIoUMetric(False, score="average_precision"), CalibrationMetric(False)):
        found = metric([kept["probabilities"]], [kept["probability_label"]])
        assert found.isnan().tolist() == [[True, False]]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_training_scores_its_probabilities_on_request(
    bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(bundle, data, epochs=2)
    names = ("val_average_precision", "val_ece")
    run_workflow(bundle, ["train"], given)
    plain = rows_of(bundle / "eval" / "epochs.csv")
    assert not {*names} & {*plain[0]}
    capsys.readouterr()
    run_workflow(bundle, ["train"], {**given, "calibration": "true"})
    rows = rows_of(bundle / "eval" / "epochs.csv")
    shown = capsys.readouterr().out
    for name in names:
        assert all(0 <= float(row[name]) <= 1 for row in rows)
        assert f"{name} {float(rows[-1][name]):.4f}" in shown
    assert [row["val_mean_iou"] for row in rows] == [row["val_mean_iou"] for row in plain], "nothing else changes"
    assert not math.isnan(float(rows[-1]["val_ece"]))
    run_workflow(bundle, ["train", "evaluate"], {**given, "calibration": "true"})
    assert not list((bundle / "eval").glob("*ece*"))
