"""The metrics against other packages on real masks, shifted, eroded and cut; each skips where it is absent."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_iou, compute_surface_dice
from places import DATA
from scipy import ndimage

from monai_iou.metrics import IoUMetric, boundary_iou, lesion_scores, overlap_scores, surface_scores

MASKS = DATA / "Task901_MSLesionFLAIR" / "labelsTr"

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


def perturbed() -> Iterator[tuple[str, np.ndarray, np.ndarray, tuple[float, ...]]]:
    """Real tumours (1 x 1 x 3.3 mm) and lesions as predictions could be: shifted, eroded, merged, split."""
    import nibabel

    files = [MASKS.parents[1] / "Task902_STSTumourCT" / "labelsTr" / f"STS_{name}.nii.gz" for name in ("019", "025")]
    files.append(MASKS / "openms_07.nii.gz")
    for path in files:
        if not path.is_file():
            pytest.skip(f"no {path.name} beside the repository")
        image = nibabel.load(path)
        mask = np.asarray(image.dataobj) > 0
        numbers, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        largest = ndimage.find_objects(numbers)[int(np.bincount(numbers[mask]).argmax()) - 1]
        # A box around the largest lesion holds its neighbours too, and keeps the slow loops quick.
        around = tuple(slice(max(0, side.start - 8), side.stop + 8) for side in largest)
        reference = np.pad(mask[around], 4)
        split = reference.copy()
        split[:, reference.shape[1] // 2] = False
        for name, prediction in (
            ("shifted", np.roll(reference, (2, -1, 1), axis=(0, 1, 2))),
            ("eroded", ndimage.binary_erosion(reference)),
            ("merged", ndimage.binary_closing(reference, np.ones((3, 3, 3)), iterations=3)),
            ("split", split),
        ):
            yield f"{path.name} {name}", prediction, reference, tuple(float(zoom) for zoom in image.header.get_zooms())


def test_monai_gives_the_same_overlap_and_distances_on_real_masks():
    for name, prediction, reference, spacing in perturbed():
        pair = [torch.from_numpy(mask.copy())[None, None].float() for mask in (prediction, reference)]
        overlap = overlap_scores(prediction, reference, spacing=spacing)
        surface = surface_scores(prediction, reference, tolerances=(1.0, 3.0), spacing=spacing)
        theirs = {
            "iou": compute_iou(*pair),
            "dice": compute_dice(*pair),
            "hd95_mm": compute_hausdorff_distance(*pair, include_background=True, percentile=95, spacing=spacing),
        }
        ours = {"iou": overlap.iou, "dice": overlap.dice, "hd95_mm": surface.hd95_mm}
        for i, tolerance in enumerate((1.0, 3.0)):
            ours[f"nsd {tolerance}"] = surface.nsd[i]
            theirs[f"nsd {tolerance}"] = compute_surface_dice(
                *pair, [tolerance], include_background=True, spacing=spacing, use_subvoxels=True
            )
        assert ours == pytest.approx({key: float(value) for key, value in theirs.items()}, abs=1e-5), name
        assert 0 < overlap.iou < 1, name


def test_the_boundary_band_of_real_masks_is_that_of_a_loop_over_voxels():
    for name, prediction, reference, spacing in perturbed():
        bands = [slow_band(mask, 2.0, spacing) for mask in (prediction, reference)]
        both, either = (int(np.count_nonzero(f(*bands))) for f in (np.logical_and, np.logical_or))
        assert boundary_iou(prediction, reference, width=2.0, spacing=spacing) == pytest.approx(both / either), name


def slow_band(mask: np.ndarray, width: float, spacing: tuple[float, ...]) -> np.ndarray:
    """Each voxel of the mask whose ball of `width` mm, or face neighbours, leave it; the image's outside counts."""
    reach = [max(1, int((width + 1e-6) / step)) for step in spacing]
    padded = np.pad(mask, [(n, n) for n in reach])
    offsets = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), axis=-1).reshape(-1, 3)
    near = np.linalg.norm(offsets * spacing, axis=1) <= width + 1e-6
    offsets = offsets[near | (np.abs(offsets).sum(axis=1) == 1)]
    band = np.zeros_like(mask)
    for voxel in np.argwhere(mask):
        around = padded[tuple((voxel + reach + offsets).T)]
        band[tuple(voxel)] = not around.all()
    return band
