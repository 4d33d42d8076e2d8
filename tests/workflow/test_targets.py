"""The training's target and the scored label, against slow loops over voxels and the metrics themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import CacheDataset
from monai.data.meta_tensor import MetaTensor
from monai.metrics.meandice import DiceMetric
from monai.transforms import Compose
from torch.utils.data import ConcatDataset

from monai_iou import IoUCELoss, IoUMetric, RandCropByLesionsd
from monai_iou.planning.plan import Plan
from monai_iou.transforms.crops_dictionary import LesionIndicesd
from monai_iou.volumes.reading import read_labels
from monai_iou.workflow.dataloader import BufferedLoader
from monai_iou.workflow.loading import LabelClassesd, label_dtype
from monai_iou.workflow.masks import ClassValuesd
from monai_iou.workflow.postprocessing import LabelsFromProbabilitiesd
from monai_iou.workflow.references import write_reference
from monai_iou.workflow.targets import DrawnRaterd, LabelTargetsd, ScoredLabelsd, has_maps

LABELS = {0: "background", 1: "oedema", 2: "core", 7: "enhancing"}
REGIONS = {"whole": (1, 2, 7), "core": (2, 7), "enhancing": (7,)}
SHAPE = (5, 6, 7)


def plan(**changes: Any) -> Plan:
    return Plan(("MRI",), LABELS, (1.0,) * 3, (16,) * 3, (8, 16), ((2, 2, 2),), ({"kind": "zscore"},), **changes)


def regions(**changes: Any) -> Plan:
    return plan(regions=REGIONS, regions_order=(1, 2, 7), **changes)


def values(seed: int = 0, raters: int = 1, ignore: bool = True) -> torch.Tensor:
    choices = [*LABELS, *([9] if ignore else [])]
    return torch.as_tensor(np.random.default_rng(seed).choice(choices, size=(raters, *SHAPE)))


def target_of(label: torch.Tensor, used: Plan) -> torch.Tensor:
    classes = LabelClassesd("label", used.label_values, used.ignore, used.soft_labels)({"label": label})["label"]
    return LabelTargetsd("label", used)({"label": classes.to(label_dtype(used))})["label"]


def test_regions_and_ignored_voxels_become_maps_as_a_loop_makes_them() -> None:
    label = values()
    found = target_of(label, regions(ignore=9))
    assert found.dtype == torch.uint8
    for place in np.ndindex(SHAPE):
        value = int(label[(0, *place)])
        inside = [int(value in members) for members in REGIONS.values()]
        expected = [0, 0, 0, 0] if value == 9 else [int(not any(inside)), *inside]
        assert found[(slice(None), *place)].tolist() == expected


def test_classes_that_exclude_each_other_stay_a_label_map() -> None:
    label = values()
    used = plan(ignore=9)
    numbers = {**{value: number for number, value in enumerate(LABELS)}, 9: used.ignore_index}
    assert not has_maps(used)
    assert torch.equal(target_of(label, used), label.clone().apply_(lambda value: numbers[value]).to(torch.uint8))


@pytest.mark.parametrize("used", [plan(mean_of_raters=True, ignore=9), regions(mean_of_raters=True, ignore=9)])
def test_several_raters_have_the_mean_of_those_who_say_something(used: Plan) -> None:
    label = values(raters=3)
    found = target_of(label, used)
    for place in np.ndindex(SHAPE):
        rows = []
        for rater in range(3):
            value = int(label[(rater, *place)])
            if value != 9:
                inside = [value in members for _, members in used.scheme.classes]
                rows.append([not any(inside), *inside])
        expected = np.mean(rows, axis=0) if rows else np.zeros(4)
        np.testing.assert_allclose(found[(slice(None), *place)], expected, rtol=1e-6)


def test_one_rater_is_drawn_and_all_of_them_in_time() -> None:
    label = values(raters=3, ignore=False)
    used = regions()
    draw = DrawnRaterd("label", used).set_random_state(0)
    classes = LabelClassesd("label", used.label_values)({"label": label})["label"]
    expected = [LabelTargetsd("label", used).target(classes[k : k + 1]) for k in range(3)]
    found = [draw({"label": classes})["label"] for _ in range(30)]
    matches = [[torch.equal(each, one) for one in expected].index(True) for each in found]
    assert set(matches) == {0, 1, 2}


@pytest.mark.parametrize("used", [plan(ignore=9), regions(ignore=9), plan(), regions()])
def test_what_is_scored_beside_one_rater_at_a_time_is_the_majority(used: Plan) -> None:
    label = values(raters=3, ignore=used.ignore is not None)
    classes = LabelClassesd("label", used.label_values, used.ignore)({"label": label})["label"]
    found = ScoredLabelsd(["label"], used)({"label": LabelTargetsd("label", used).target(classes)})["label"]
    for place in np.ndindex(SHAPE):
        spoken = [int(label[(rater, *place)]) for rater in range(3) if int(label[(rater, *place)]) != used.ignore]
        if used.exclusive:
            shares = [spoken.count(value) for value in used.label_values]
            expected = shares.index(max(shares)) if spoken else 0
            assert int(found[(0, *place)]) == expected
        elif spoken:
            shares = [np.mean([value in members for value in spoken]) for _, members in used.scheme.classes]
            assert found[(slice(1, None), *place)].tolist() == [int(share >= 0.5) for share in shares]


@pytest.mark.parametrize(
    "used", [plan(ignore=9, mean_of_raters=True), plan(ignore=9), regions(ignore=9), plan(soft_labels=True)]
)
def test_a_reference_is_written_for_what_is_no_label_map(used: Plan, tmp_path: Path) -> None:
    affine = np.diag([-1.0, 1.0, 2.0, 1.0])
    shares = np.random.default_rng(1).dirichlet([1, 1, 1, 1], SHAPE).astype(np.float32)
    arrays = (
        [shares[..., 1:]] if used.soft_labels else [values(seed, 1)[0].numpy().astype(np.uint8) for seed in range(3)]
    )
    files = [tmp_path / f"{k}.nii.gz" for k in range(len(arrays))]
    for file, array in zip(files, arrays, strict=True):
        nib.save(nib.Nifti1Image(array, affine), file)
    write_reference(files, used, tmp_path / "references" / "case.nii.gz")
    found = read_labels(tmp_path / "references" / "case.nii.gz")
    np.testing.assert_allclose(found.grid.affine, affine)
    if used.soft_labels:
        np.testing.assert_array_equal(found.array, np.array(used.label_values)[shares.argmax(-1)])
        return
    whole = np.stack(arrays)
    agreed = (whole == whole[0]).all(0)
    np.testing.assert_array_equal(found.array[agreed], whole[0][agreed])
    assert set(np.unique(found.array)) <= {*used.label_values, 9}


@pytest.mark.parametrize("workers", [0, 1])
def test_of_a_case_one_rater_is_drawn_for_each_epoch(workers: int) -> None:
    raters, used = 3, plan()
    items = [{"case": f"c{case}", "label": torch.arange(raters).view(raters, 1, 1)} for case in range(4)]
    cached = CacheDataset(items, Compose([DrawnRaterd("label", used)]), progress=False)
    loader = BufferedLoader(ConcatDataset([cached] * 3), shuffle=True, batch_size=2, num_workers=workers)

    def drawn(epoch: int) -> dict[str, set[int]]:
        loader.begin(epoch)
        found: dict[str, set[int]] = {}
        for batch in loader:
            for case, label in zip(batch["case"], batch["label"], strict=True):
                found.setdefault(case, set()).add(int(label))
        return found

    epochs = [drawn(epoch) for epoch in range(1, 9 if workers == 0 else 3)]
    assert all(len(raters) == 1 for epoch in epochs for raters in epoch.values()), "one, however often it is taken"
    assert drawn(2) == epochs[1], "a resumed epoch has the same"
    if workers == 0:
        assert len({tuple(sorted((case, *rater) for case, rater in epoch.items())) for epoch in epochs}) > 4
        assert all(set.union(*(epoch[f"c{case}"] for epoch in epochs)) == {0, 1, 2} for case in range(4))


def test_shares_leave_the_rest_to_the_background() -> None:
    shares = torch.rand(3, *SHAPE) / 3
    found = target_of(shares, plan(soft_labels=True))
    torch.testing.assert_close(found.sum(0), torch.ones(SHAPE))
    torch.testing.assert_close(found[1:], shares)
    overlapping = target_of(shares, regions(soft_labels=True))
    torch.testing.assert_close(overlapping[0], 1 - shares.amax(0))


@pytest.mark.parametrize("used", [plan(ignore=9), regions(ignore=9), plan(mean_of_raters=True, ignore=9)])
def test_ignored_voxels_have_no_effect_on_loss_and_gradient(used: Plan) -> None:
    label = values()
    target = target_of(label, used)[None]
    loss = IoUCELoss(
        softmax=used.exclusive,
        sigmoid=not used.exclusive,
        include_background=False,
        soft_label=used.soft,
        ignore_index=used.ignore_index,
    )
    logits = torch.randn(1, 4, *SHAPE, requires_grad=True)
    value = loss(logits, target)
    value.backward()
    assert logits.grad is not None
    ignored = (label == 9).expand(4, *SHAPE)[None]
    assert ignored.any()
    assert float(logits.grad[ignored].abs().max()) == 0
    assert float(logits.grad[~ignored].abs().min()) > 0
    wild = torch.where(ignored, 50 * torch.randn_like(logits), logits)
    torch.testing.assert_close(loss(wild, target), value)


@pytest.mark.parametrize("used", [plan(ignore=9), regions(ignore=9)])
def test_scores_are_those_of_the_voxels_that_count(used: Plan) -> None:
    label, predicted = values(), values(1, ignore=False)
    hard = target_of(predicted, used if used.exclusive else regions())
    item = ScoredLabelsd(["pred", "label"], used)({"pred": hard.float(), "label": target_of(label, used)})
    found = IoUMetric(include_background=False, num_classes=4)([item["pred"]], [item["label"]])
    theirs = DiceMetric(include_background=False, num_classes=4)(item["pred"][None], item["label"][None])
    counts = (label != 9).numpy()
    for number, (_, members) in enumerate(used.scheme.classes):
        a, b = (np.isin(each.numpy(), members) & counts for each in (predicted, label))
        assert float(found[0, number]) == pytest.approx((a & b).sum() / (a | b).sum(), abs=1e-6)
        assert float(theirs[0, number]) == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-6)


@pytest.mark.parametrize("used", [plan(), regions()])
def test_classes_that_were_not_annotated_are_not_scored(used: Plan) -> None:
    label = values(ignore=False)
    target = target_of(label, used)
    item = {"pred": target.float(), "label": target, "labelled": torch.tensor([True, True, False, True])}
    scored = ScoredLabelsd(["pred", "label"], used)(item)
    found = IoUMetric(include_background=False, num_classes=4)([scored["pred"]], [scored["label"]])
    assert found[0].isnan().tolist() == [False, True, False]
    dice = DiceMetric(include_background=False, num_classes=4)(scored["pred"][None], scored["label"][None])
    assert dice[0].isnan().tolist() == [False, True, False]


def test_soft_labels_are_scored_by_their_largest_share() -> None:
    used = plan(soft_labels=True)
    shares = torch.tensor([[0.2, 0.6], [0.5, 0.3], [0.1, 0.0]])
    scored = ScoredLabelsd(["pred", "label"], used)({"pred": torch.zeros(1, 2), "label": target_of(shares, used)})
    assert scored["label"].tolist() == [[2, 1]]
    overlapping = regions(soft_labels=True)
    item = {"pred": torch.zeros(4, 2), "label": target_of(shares, overlapping)}
    assert ScoredLabelsd(["pred", "label"], overlapping)(item)["label"].tolist() == [[1, 0], [0, 1], [1, 0], [0, 0]]


def test_metadata_stays() -> None:
    label = MetaTensor(values(ignore=False), affine=torch.diag(torch.tensor([2.0, 2, 2, 1])))
    found = target_of(label, regions())
    assert isinstance(found, MetaTensor)
    assert found.affine.diagonal().tolist() == [2, 2, 2, 1]


@pytest.mark.parametrize("used", [plan(ignore=9), regions(ignore=9), plan(mean_of_raters=True, ignore=9)])
def test_no_crop_is_centred_on_an_ignored_voxel_nor_counts_it_as_a_lesion(used: Plan) -> None:
    label = torch.full((1, 12, 12, 12), 9)
    label[0, :4, :4, :4] = 0
    label[0, 1, 1, 1] = 7
    item = LesionIndicesd("label", ignore_index=used.ignore_index)({"label": target_of(label, used)})
    options: dict[str, Any] = {"ignore_index": used.ignore_index, "jitter": 0, "size_exponent": 0}
    crop = RandCropByLesionsd("label", "label", (1, 1, 1), 200, pos=1, neg=1, **options).set_random_state(0)
    patches = [patch["label"][:, 0, 0, 0].tolist() for patch in crop(item)]
    inside = [[3], [0]] if not has_maps(used) else [[0, 1, 1, 1] if used.regions else [0, 0, 0, 1], [1, 0, 0, 0]]
    assert {tuple(patch) for patch in patches} == {tuple(each) for each in inside}


def test_masks_are_written_in_the_order_of_the_regions() -> None:
    used = regions()
    probabilities = torch.tensor(
        [[0.9, 0.1, 0.1, 0.1], [0.1, 0.9, 0.9, 0.9], [0.1, 0.1, 0.9, 0.4], [0.1, 0.2, 0.4, 0.8]]
    )
    labels = LabelsFromProbabilitiesd("pred", exclusive=False)({"pred": probabilities})
    written = ClassValuesd("pred", used.label_values, used.regions_order)(labels)["pred"]
    assert written.tolist() == [[0, 1, 2, 7]]
    back = ClassValuesd("pred", used.label_values, (7, 2, 1))(labels)["pred"]
    assert back.tolist() == [[0, 7, 2, 1]], "later regions over earlier ones"
