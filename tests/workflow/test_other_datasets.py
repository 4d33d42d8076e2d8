"""A model that is evaluated on another dataset: contradicting labels are refused, other names are told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from monai_iou.datasets.cases import DatasetError
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.workflow import start
from monai_iou.workflow.data import BundleCases

PLAN = replace(make_plan(None, [], [16, 16, 16]), modalities=("CT",), ignore=9)
LABELS = {"0": "background", "1": "lesion"}
Write = Callable[..., BundleCases]


@pytest.fixture
def write(data: Path, tmp_path: Path) -> Write:
    """Make a folder with the volumes of `data` and another description."""

    def other(**changes: Any) -> BundleCases:
        for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (tmp_path / name).symlink_to(data / name)
        content = json.loads((data / "dataset.json").read_text())
        (tmp_path / "dataset.json").write_text(json.dumps({**content, **changes}))
        return BundleCases(str(tmp_path))

    return other


@pytest.mark.parametrize(
    ("changes", "plan", "words"),
    [
        ({"soft_labels": True}, PLAN, "`soft_labels` of {} to be false, as in the training of the model, but got true"),
        (
            {"labels": {**LABELS, "9": "bone"}},
            PLAN,
            "the label value 9 to mean the same in {} as in the training of the model, but the model ignores it and it "
            "is bone in {}: correct",
        ),
        (
            {"labels": {**LABELS, "9": "ignore"}},
            replace(PLAN, ignore=None, labels={0: "background", 1: "lesion", 9: "bone"}),
            "the label value 9 to mean the same in {} as in the training of the model, but {} ignores it and it is "
            "bone in the model: correct",
        ),
    ],
    ids=["soft", "ignored by the model", "ignored in the dataset"],
)
def test_labels_of_another_meaning_are_refused(
    changes: dict[str, Any], plan: Plan, words: str, write: Write, tmp_path: Path
) -> None:
    cases = write(**changes)
    with pytest.raises(DatasetError) as caught:
        cases.evaluation_on(None, [plan], score_trained_cases=True)
    assert str(caught.value).startswith(f"Expected {words.replace('{}', str(tmp_path / 'dataset.json'))}")


def test_other_names_and_channels_are_told(write: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = write(labels={"0": "background", "1": "tumour"}, modality={"0": "T1"})
    with caplog.at_level(logging.WARNING, "monai_iou"):
        assert len(cases.evaluation_on(None, [PLAN], score_trained_cases=True)) == 3
        file = tmp_path / "dataset.json"
        channels = (
            f"{file} has the channels T1, but the model was trained on CT: CT is normalised in another way than others."
        )
        assert caplog.messages == [
            f"{file} has the classes tumour (1), but the model was trained on lesion (1): the scores are those of the "
            "model's classes.",
            channels,
        ]
        caplog.clear()
        places = {"output_dir": str(tmp_path / "masks"), "mask_suffix": "", "mask_format": ".nii.gz"}
        settings: Any = SimpleNamespace(**places, images=None, save_probabilities=False)
        start.check_inference(cases, PLAN, settings, [])
        assert caplog.messages == [channels]


def test_the_models_own_dataset_is_not_mentioned(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "monai_iou"):
        cases = write(labels={**LABELS, "9": "ignore"})
        assert len(cases.evaluation_on(None, [PLAN], score_trained_cases=True)) == 3
        assert len(cases.evaluation_on(None, [], score_trained_cases=True)) == 3
    assert caplog.messages == []
