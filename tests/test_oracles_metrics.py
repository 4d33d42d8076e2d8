"""The metrics against other packages on real masks, shifted, eroded and cut; each skips where it is absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from monai_iou.metrics import IoUMetric, lesion_scores

MASKS = Path(__file__).parents[2] / "shared" / "data" / "Task901_MSLesionFLAIR" / "labelsTr"

pytestmark = [pytest.mark.real_data, pytest.mark.filterwarnings("default")]


def cases() -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Real lesion masks, cropped, with a shifted, an eroded and a cut and merged prediction."""
    import nibabel

    files = sorted(MASKS.glob("*.nii.gz"))[:2]
    if not files:
        pytest.skip(f"no masks in {MASKS.parent.name} beside the repository")
    found = []
    for path in files:
        mask = np.asarray(nibabel.load(path).dataobj) > 0
        box = ndimage.find_objects(mask.astype(int))[0]
        reference = np.pad(mask[box], 3)
        cut = ndimage.binary_dilation(reference)
        cut[::7] = False
        for name, prediction in (
            ("shifted", np.roll(reference, 1, axis=0)),
            ("eroded", ndimage.binary_erosion(reference)),
            ("cut", cut),
        ):
            found.append((f"{path.name} {name}", prediction, reference))
    return found


def test_panoptica_finds_the_same_lesions():
    panoptica = pytest.importorskip("panoptica")
    from panoptica.utils.constants import CCABackend

    evaluator = panoptica.Panoptica_Evaluator(
        expected_input=panoptica.InputType.SEMANTIC,
        instance_approximator=panoptica.ConnectedComponentsInstanceApproximator(cca_backend=CCABackend.cc3d),
        instance_matcher=panoptica.NaiveThresholdMatching(matching_threshold=0.5),
    )
    for name, prediction, reference in cases():
        theirs = evaluator.evaluate(prediction.astype(np.uint8), reference.astype(np.uint8), verbose=False)["ungrouped"]
        ours = lesion_scores(prediction, reference)
        assert (ours.tp, ours.fp, ours.fn) == (theirs.tp, theirs.fp, theirs.fn), name
        for score in ("sq", "rq", "pq"):
            assert getattr(ours, score) == pytest.approx(getattr(theirs, score), abs=1e-6), (name, score)


def test_ccmetrics_finds_the_same_regions():
    ccmetrics = pytest.importorskip("CCMetrics")
    for name, prediction, reference in cases()[:3]:
        maps = [np.stack([~m, m])[None].astype(np.uint8) for m in (prediction, reference)]
        metric = ccmetrics.CCDiceMetric()
        metric(*map(torch.from_numpy, maps))
        theirs = float(metric.cc_aggregate(mode="patient").mean())
        # they give a voxel between two components to either
        assert lesion_scores(prediction, reference).cc_dice == pytest.approx(theirs, abs=2e-3), name


def test_torchmetrics_gives_the_same_dataset_iou():
    classification = pytest.importorskip("torchmetrics.classification")
    metric, theirs = IoUMetric(num_classes=3), classification.MulticlassJaccardIndex(num_classes=3, average=None)
    for _, prediction, reference in cases():
        pair = [torch.from_numpy(m.astype(np.int64)) for m in (prediction, reference)]
        pair[0][pair[0].shape[0] // 2 :] *= 2
        pair[1][pair[1].shape[0] // 2 :] *= 2
        metric(pair[0][None, None], pair[1][None, None])
        theirs.update(*(p.flatten() for p in pair))
    assert metric.summary()["iou_d_per_class"] == pytest.approx(theirs.compute().tolist(), abs=1e-6)
