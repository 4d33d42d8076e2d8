"""Thresholds and smallest components for several classes, regions and partly labelled cases, against slow loops."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from monai_iou.datasets.cases import DatasetError
from monai_iou.metrics.iou import IoUMetric
from monai_iou.planning.plan import Plan
from monai_iou.workflow.labelled import LABELLED
from monai_iou.workflow.postprocessing import (
    LabelsFromProbabilitiesd,
    Postprocessing,
    load_postprocessing,
    tune,
    tune_postprocessing,
)
from monai_iou.workflow.targets import ScoredLabelsd
from monai_iou.workflow.tuning import THRESHOLDS, labels_of, threshold_scores, tune_classes

SHAPE = (10, 9, 8)
NAMES = {0: "background", 1: "oedema", 2: "core", 3: "enhancing"}
REGIONS = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
Case = tuple[torch.Tensor, torch.Tensor]


def plan(**changes: Any) -> Plan:
    return Plan(("MRI",), NAMES, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),), ({"kind": "zscore"},), **changes)


def make_case(seed: int, exclusive: bool = True, missing: int | None = None) -> Case:
    """Probabilities (4, *S), too low in the foreground and none of them a threshold, and their label."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 5, (5, 5, 4)) % 4
    numbers = blocks.repeat(2, 0).repeat(2, 1).repeat(2, 2)[tuple(slice(side) for side in SHAPE)]
    foreground = [numbers == number if exclusive else numbers >= number for number in (1, 2, 3)]
    inside = np.stack([numbers == 0, *foreground])
    height = np.array([0.15, 0.42, 0.3, 0.35])[:, None, None, None]
    values = inside * height + rng.random((4, *SHAPE)) * 0.35
    values[0] += 0.3
    probabilities = torch.from_numpy((np.floor(values * 399) + 0.5) / 400).float()
    label = torch.from_numpy(inside if not exclusive else numbers[None]).to(torch.uint8)
    if missing is not None:
        maps = torch.from_numpy(inside).float()
        maps[missing] = torch.nan
        label = maps
    return probabilities, label


KINDS: dict[str, tuple[bool, list[Case]]] = {
    "classes": (True, [make_case(seed) for seed in range(3)]),
    "regions": (False, [make_case(seed, exclusive=False) for seed in range(3)]),
    "partly labelled": (True, [make_case(0), make_case(1, missing=2), make_case(2, missing=1)]),
    "partly labelled regions": (False, [make_case(0, False), make_case(1, False, missing=3)]),
    "never labelled": (True, [make_case(0, missing=3), make_case(1, missing=3)]),
}


def mean_iou(cases: list[Case], settings: Postprocessing, exclusive: bool) -> float:
    """What evaluation gives for these settings."""
    metric = IoUMetric(include_background=False, num_classes=4)
    transform = LabelsFromProbabilitiesd("pred", settings, exclusive)
    for probabilities, label in cases:
        metric([transform({"pred": probabilities})["pred"]], [label])
    return float(metric.aggregate())


def slow_iou(probability: torch.Tensor, label: torch.Tensor, number: int, threshold: float) -> float:
    true = label[number] if len(label) > 1 else label[0] == number
    if bool(torch.isnan(true.float()).any()):
        return math.nan
    both = either = 0
    for p, t in zip(probability.flatten().tolist(), true.flatten().tolist(), strict=True):
        both += p > threshold and bool(t)
        either += p > threshold or bool(t)
    return both / either if either else math.nan


def slow_thresholds(cases: list[Case]) -> list[float]:
    """The best threshold of each class, by a loop over the grid, the cases and the voxels."""
    best = []
    for number in (1, 2, 3):
        means = {}
        for threshold in THRESHOLDS:
            scores = [slow_iou(p[number], label, number, threshold) for p, label in cases]
            known = [score for score in scores if not math.isnan(score)]
            means[threshold] = sum(known) / len(known) if known else -1.0
        best.append(max(means, key=lambda threshold: (round(means[threshold], 6), -abs(threshold - 0.5))))
    return best


@pytest.mark.parametrize("kind", KINDS)
def test_the_iou_at_every_threshold_is_that_of_a_loop_over_the_voxels(kind: str) -> None:
    probabilities, label = KINDS[kind][1][-1]
    found = threshold_scores(probabilities, label)
    expected = [
        [slow_iou(probabilities[number], label, number, threshold) for threshold in THRESHOLDS] for number in (1, 2, 3)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_class_in_neither_map_has_no_score() -> None:
    probabilities, label = torch.zeros(3, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    probabilities[2, 0] = 0.31
    found = threshold_scores(probabilities, label)
    assert np.isnan(found[0]).all()
    expected = [0.0 if threshold < 0.31 else math.nan for threshold in THRESHOLDS]
    np.testing.assert_array_equal(found[1], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_tuned_is_the_best_of_the_four_that_a_loop_finds(kind: str) -> None:
    exclusive, cases = KINDS[kind]
    settings, before, after = tune_classes(cases, 1.0, exclusive)
    assert before == pytest.approx(mean_iou(cases, Postprocessing(), exclusive))
    assert after == pytest.approx(mean_iou(cases, settings, exclusive))
    chosen = slow_thresholds(cases)
    with_thresholds = mean_iou(cases, Postprocessing(chosen), exclusive)
    assert after >= max(before, with_thresholds) - 1e-6, "never below what was not tuned"
    assert with_thresholds > before, "the probabilities of the foreground are too low"
    assert settings.threshold is not None
    assert [*settings.threshold] == chosen
    if kind == "never labelled":
        assert chosen[2] == 0.5
        assert settings.min_size_mm3[2] == 0


@pytest.mark.parametrize("kind", ["classes", "regions"])
def test_a_smallest_size_is_found_for_each_of_them(kind: str) -> None:
    exclusive = kind == "classes"
    probabilities, label = torch.full((3, 12, 4, 4), 0.01), torch.zeros(3 if not exclusive else 1, 12, 4, 4)
    for number, value in ((1, 0.9), (2, 0.8)):
        where = (slice(5 * number - 4, 5 * number - 1), slice(3), slice(3))
        probabilities[(number, *where)] = value
        label[(number if not exclusive else 0, *where)] = 1 if not exclusive else number
    probabilities[0] = 1 - probabilities[1:].amax(0)
    probabilities[:2, 11, 3, 3] = torch.tensor([0.05, 0.95])  # a speck of the first
    settings, before, after = tune_classes([(probabilities, label)], 2.0, exclusive)
    assert (before, after) == (pytest.approx((27 / 28 + 1) / 2), 1.0)
    assert settings == Postprocessing(None, (54.0, 0.0))


def test_perfect_classes_are_left_alone() -> None:
    label = torch.randint(0, 3, (1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    probabilities = 0.1 + 0.7 * torch.nn.functional.one_hot(label[0], 3).movedim(-1, 0).float()
    assert tune_classes([(probabilities, label)], 1.0) == (Postprocessing(None, (0.0, 0.0)), 1.0, 1.0)


def test_without_any_score_nothing_is_chosen() -> None:
    probabilities, label = make_case(0, missing=1)
    label[1:] = torch.nan
    settings, before, after = tune_classes([(probabilities, label)], 1.0)
    assert settings == Postprocessing(None, (0.0,) * 3)
    assert before == after == -math.inf


def test_a_case_in_which_the_only_class_was_not_annotated_is_left_out() -> None:
    rng = np.random.default_rng(0)
    cases = [(rng.random((6, 6, 6)).astype(np.float32), (rng.random((6, 6, 6)) < 0.3).astype(np.uint8)) for _ in "ab"]
    unknown = (rng.random((6, 6, 6)).astype(np.float32), np.full((6, 6, 6), np.nan, np.float32))
    assert tune([*cases, unknown], 1.0, 2) == tune(cases, 1.0, 2)


# -- what the thresholds mean


def test_a_voxel_belongs_to_the_class_that_exceeds_its_threshold_the_most() -> None:
    probabilities = torch.rand(4, 12, 10, generator=torch.Generator().manual_seed(1))
    limits = (0.3, 0.6, 0.45)
    found = labels_of(probabilities, limits)
    assert found.shape == (1, 12, 10)
    for place in np.ndindex(12, 10):
        shares = {n: np.float32(probabilities[(n, *place)]) / np.float32(t) for n, t in enumerate(limits, start=1)}
        above = {n: share for n, share in shares.items() if probabilities[(n, *place)] > limits[n - 1]}
        assert int(found[(0, *place)]) == (max(above, key=lambda n: above[n]) if above else 0)
    assert set(found.flatten().tolist()) == {0, 1, 2, 3}
    regions = labels_of(probabilities, limits, exclusive=False)
    expected = [probabilities[0] > 0.5, *(probabilities[n] > t for n, t in enumerate(limits, start=1))]
    assert torch.equal(regions, torch.stack(expected))
    assert torch.equal(labels_of(probabilities, None, exclusive=False), probabilities > 0.5)


def test_one_class_has_one_number_as_before() -> None:
    probabilities = torch.rand(1, 6, 5, generator=torch.Generator().manual_seed(2))
    both = torch.cat([1 - probabilities, probabilities])
    assert torch.equal(labels_of(both, 0.35), (probabilities > 0.35).long())
    assert torch.equal(labels_of(both, 0.35, exclusive=False), torch.cat([both[:1] > 0.5, probabilities > 0.35]))
    assert json.loads(Postprocessing(0.35, (2.0,)).to_json()) == {"threshold": 0.35, "min_size_mm3": [2.0]}


def test_each_region_loses_its_own_small_components() -> None:
    probabilities = torch.zeros(3, 1, 1, 9)
    probabilities[1, 0, 0, [0, 1, 3, 5, 6, 7]] = 0.9
    probabilities[2, 0, 0, [0, 1, 3, 5, 6, 7]] = 0.4
    given = MetaTensor(probabilities, affine=torch.diag(torch.tensor([2.0, 1.0, 1.0, 1.0], dtype=torch.float64)))
    found = LabelsFromProbabilitiesd("pred", Postprocessing([0.5, 0.3], (4.0, 6.0)), exclusive=False)({"pred": given})
    assert isinstance(found["pred"], MetaTensor)
    assert torch.equal(found["pred"].affine, given.affine)
    assert found["pred"].dtype == torch.float32
    assert found["pred"][:, 0, 0].tolist() == [[0] * 9, [1, 1, 0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 0]]


def test_thresholds_that_are_not_as_many_as_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold for each") as caught:
        LabelsFromProbabilitiesd("pred", Postprocessing((0.5,), (0.0,)))({"pred": torch.rand(3, 2, 2, 2)})
    assert str(caught.value) == (
        "Expected a threshold for each foreground class, 2 of them, but got (0.5,): give as many numbers, or None for "
        "none."
    )


# -- the file


def test_several_thresholds_go_into_the_file_and_out_again(tmp_path: Path) -> None:
    path = tmp_path / "postprocessing.json"
    settings = Postprocessing((0.3, 0.55), (0.0, 4.5))
    path.write_text(settings.to_json())
    assert json.loads(path.read_text()) == {"threshold": [0.3, 0.55], "min_size_mm3": [0.0, 4.5]}
    assert load_postprocessing(str(path), 3) == settings
    assert eval(str(settings)) == settings, "as the page on MONAI Deploy writes it into a config"


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 2, [], [0.5, 1.0], [0.0, 0.5], [0.5, 0.5, 0.5], [0.5], True])
def test_thresholds_that_do_not_fit_are_refused(threshold: Any, classes: int, tmp_path: Path) -> None:
    path = tmp_path / "postprocessing.json"
    path.write_text(json.dumps({"threshold": threshold, "min_size_mm3": [0.0] * (classes - 1)}))
    with pytest.raises(DatasetError) as caught:
        load_postprocessing(str(path), classes)
    assert str(caught.value) == (
        f"Expected {path} to be what training tuned, but it does not fit {classes} classes: tune again or delete it."
    )


def test_a_single_number_is_not_for_several_classes(tmp_path: Path) -> None:
    path = tmp_path / "postprocessing.json"
    path.write_text(json.dumps({"threshold": 0.5, "min_size_mm3": [0.0, 0.0]}))
    with pytest.raises(DatasetError, match="it does not fit 3 classes: tune again or delete it"):
        load_postprocessing(str(path), 3)


# -- from the network to the file


class Recorded:
    """Stands for an evaluator and its data: the output of each case is known."""

    def __init__(self, folder: Path, cases: list[Case], annotated: dict[int, list[bool]] | None = None) -> None:
        network = torch.nn.Conv3d(1, 4, 1)
        torch.save(network.state_dict(), folder / "model.pt")
        self.predicted: list[int] = []
        self.kept: list[int] = []
        self.logits = [logits for logits, _ in cases]
        self.evaluator = SimpleNamespace(
            state=SimpleNamespace(rank=0, device=torch.device("cpu")), network=network, amp=False, amp_kwargs={},
            inferer=self._infer, mode=contextlib.nullcontext,
        )  # fmt: skip
        self.items = [
            {"image": torch.full((1, *SHAPE), float(n)), "label": label, "case": f"c{n}"}
            for n, (_, label) in enumerate(cases)
        ]
        for number, known in (annotated or {}).items():
            self.items[number][LABELLED] = np.array(known)

    def _infer(self, image: torch.Tensor, _: Any) -> torch.Tensor:
        self.predicted.append(int(image.max()))
        known = {id(logits) for logits in self.logits}
        # By their exact types, as `isinstance` follows references of other tests whose objects are gone.
        kinds = (torch.Tensor, MetaTensor)
        alive = (each for each in gc.get_objects() if type(each) in kinds and id(each) not in known)
        self.kept.append(sum(each.is_floating_point() and each.shape == self.logits[0].shape for each in alive))
        return self.logits[self.predicted[-1]][None]


def recorded_cases(exclusive: bool, used: Plan) -> list[Case]:
    """Logits and targets, the first slice of which is ignored if voxels can be."""
    cases = []
    for seed in range(2):
        probabilities, label = make_case(seed, exclusive)
        if used.ignore_index is not None:
            label[:, 0] = used.ignore_index if exclusive else 0
            probabilities[1:, 0] = 0.99  # what would count against any threshold
        cases.append((probabilities.log() if exclusive else probabilities.logit(), label))
    return cases


@pytest.mark.parametrize("ignore", [None, 9])
@pytest.mark.parametrize("exclusive", [True, False])
def test_classes_and_regions_are_tuned_in_two_goes_over_the_cases(
    exclusive: bool, ignore: int | None, tmp_path: Path
) -> None:
    used = plan(ignore=ignore) if exclusive else plan(regions=REGIONS, regions_order=(1, 2, 3), ignore=ignore)
    annotated = {1: [exclusive, True, False, True]}
    cases = recorded_cases(exclusive, used)
    run = Recorded(tmp_path, cases, annotated)
    settings = tune_postprocessing(run.evaluator, run.items, (1.0, 1.0, 1.0), 4, str(tmp_path), used)
    assert settings is not None
    assert load_postprocessing(str(tmp_path / "postprocessing.json"), 4) == settings
    assert isinstance(settings.threshold, tuple)
    assert run.predicted == [0, 1, 0, 1]
    assert max(run.kept) == run.kept[0], "no volume of a case is kept while the next one is predicted"

    scores = []
    for tried in (Postprocessing(), settings):
        metric = IoUMetric(include_background=False, num_classes=4)
        for (logits, _), item in zip(cases, run.items, strict=True):
            probabilities = logits.softmax(0) if exclusive else logits.sigmoid()
            transform = LabelsFromProbabilitiesd("pred", Postprocessing(tried.threshold), exclusive)
            scored = ScoredLabelsd(["pred", "label"], used)({**item, **transform({"pred": probabilities})})
            metric([scored["pred"]], [scored["label"]])
        scores.append(float(metric.aggregate()))
    assert scores[1] > scores[0]


def test_a_single_region_is_tuned_as_a_single_class_is(tmp_path: Path) -> None:
    used = Plan(("MRI",), NAMES, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),), ({"kind": "zscore"},),
                regions={"whole": (1, 2, 3)}, regions_order=(1,))  # fmt: skip
    probabilities, label = make_case(0, exclusive=False)
    run = Recorded(tmp_path, [(probabilities[:2].logit(), label[:2])])
    settings = tune_postprocessing(run.evaluator, run.items, (1.0, 1.0, 1.0), 2, str(tmp_path), used)
    expected, _, after = tune([(probabilities[1].logit().sigmoid().numpy(), label[1].numpy())], 1.0, 2)
    assert settings == expected
    assert isinstance(expected.threshold, float)
    assert run.predicted == [0]
    labels = LabelsFromProbabilitiesd("pred", settings, exclusive=False)({"pred": probabilities[:2]})["pred"]
    assert float(IoUMetric(include_background=False)([labels], [label[:2]])) == pytest.approx(after)


def test_classes_are_not_tuned_on_what_is_not_finite(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cases = recorded_cases(True, plan())
    cases[0][0][0, 0, 0, 0] = math.nan
    run = Recorded(tmp_path, cases)
    assert tune_postprocessing(run.evaluator, run.items, (1.0, 1.0, 1.0), 4, str(tmp_path), plan()) is None
    assert run.predicted == [0, 1], "all that are not finite are named, and nothing is predicted again"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR] == [
        "Expected a finite network output for c0, but it has NaN or infinity: look at its intensities, or set `amp` to "
        "false; no post-processing is tuned."
    ]
    assert not (tmp_path / "postprocessing.json").exists()


def test_where_no_case_has_a_score_nothing_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = Recorded(tmp_path, recorded_cases(True, plan()), {n: [True, False, False, False] for n in (0, 1)})
    assert tune_postprocessing(run.evaluator, run.items, (1.0, 1.0, 1.0), 4, str(tmp_path), plan()) is None
    told = [record.getMessage() for record in caplog.records if record.name.endswith("workflow.postprocessing")]
    assert told == ["No threshold or smallest component raises the validation IoU."]
    assert not (tmp_path / "postprocessing.json").exists()
