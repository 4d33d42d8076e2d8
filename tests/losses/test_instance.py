"""Instance IoU: regions, the terms inside them, and the transform that carries them."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data.meta_tensor import MetaTensor
from monai.transforms import Compose, RandFlipd, RandSpatialCropd
from scipy import ndimage
from torch import Tensor

from monai_iou import ComponentRegionsd, InstanceIoULoss, IoUCELoss, IoULoss, MultiScaleLoss
from monai_iou.components import component_regions
from monai_iou.metrics.lesion import lesion_scores


def volume(shape: tuple[int, ...] = (12, 10, 8), classes: int = 2, seed: int = 0) -> Tensor:
    """Return a label map (1, 1, *S) with blobs of different size."""
    generator = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(generator.random((classes, *shape)), [0] + [1.1] * len(shape))
    noise[0] = np.quantile(noise[1:].max(0), 0.85)
    return torch.from_numpy(noise.argmax(0))[None, None]


def logits_for(labels: Tensor, classes: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    maps = one_hot(labels, classes).to(dtype)
    return 2 * maps + torch.randn(maps.shape, generator=generator, dtype=dtype)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return (labels == torch.arange(classes).reshape(1, -1, *[1] * (labels.ndim - 2))).float()


def slow_term(p: Tensor, mask: Tensor, regions: str, spacing: tuple[float, ...], s: float = 1e-5) -> float:
    """The definition, a component at a time: a distance transform each."""
    components, count = ndimage.label(mask.numpy(), np.ones((3,) * mask.ndim))
    distances = [ndimage.distance_transform_edt(components != k + 1, sampling=spacing) for k in range(count)]
    terms = []
    for k in range(count):
        lesion = torch.from_numpy(components == k + 1)
        others = torch.from_numpy((components > 0) & (components != k + 1))
        inside = torch.from_numpy(np.argmin(distances, 0) == k) if regions == "voronoi" else ~others
        overlap, found, there = (p * lesion * inside).sum(), (p * inside).sum(), lesion.sum()
        terms.append(1 - (overlap + s) / (found + there - overlap + s))
    return float(torch.stack(terms).mean())


@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 1.3)])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_terms_are_those_of_the_definition(regions: str, spacing: tuple[float, ...], classes: int) -> None:
    labels = volume(classes=max(classes, 2))
    logits = logits_for(labels, max(classes, 2))[:, -classes:]
    loss = InstanceIoULoss(regions, spacing=spacing, sigmoid=classes == 1, softmax=classes > 1)
    value = loss(logits, labels)
    p = logits.sigmoid() if classes == 1 else logits.softmax(1)
    first = 0 if classes == 1 else 1
    masks = [labels[0, 0] == index - first + 1 for index in range(first, classes)]
    terms = [slow_term(p[0, c], mask, regions, spacing) for c, mask in enumerate(masks, first)]
    # Voxels as near to one component as to another may fall to either: none, with these random shapes and spacings.
    tolerance = 2e-2 if regions == "voronoi" else 1e-5
    assert loss.last_terms["instance"].item() == pytest.approx(sum(terms) / len(terms), abs=tolerance)
    whole = IoULoss(sigmoid=classes == 1, softmax=classes > 1)(logits, labels)
    torch.testing.assert_close(loss.last_terms["global"], whole)
    torch.testing.assert_close(value, whole + loss.last_terms["instance"])


def test_regions_are_exact_where_no_voxel_is_in_the_middle() -> None:
    mask = np.zeros((9, 7, 8), dtype=bool)
    mask[1, 1, 1] = mask[7, 5, 4] = mask[2, 6, 0] = True
    spacing = (1.0, 1.37, 2.11)
    points = [np.array(index) * spacing for index in ((1, 1, 1), (2, 6, 0), (7, 5, 4))]
    numbers, count = component_regions(mask, "voronoi", spacing)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in mask.shape], indexing="ij"), -1) * spacing
    nearest = np.argmin([((grid - point) ** 2).sum(-1) for point in points], 0) + 1
    assert count == 3
    np.testing.assert_array_equal(numbers, nearest)


def test_hard_prediction_is_one_minus_the_metrics_cc_iou() -> None:
    reference = volume((20, 20, 20), seed=3)
    prediction = volume((20, 20, 20), seed=3).roll(1, 2)
    loss = InstanceIoULoss(smooth_nr=0.0, smooth_dr=0.0)
    loss(prediction.float(), reference)
    scores = lesion_scores(prediction[0, 0].numpy() > 0, reference[0, 0].numpy() > 0)
    assert loss.last_terms["instance"].item() == pytest.approx(1 - scores.cc_iou, abs=0.01)


def test_a_small_lesion_counts_as_much_as_a_large_one() -> None:
    labels = torch.zeros(1, 1, 24, 12, 12)
    labels[..., 2:10, 2:10, 2:10] = 1
    labels[..., 20, 5, 5] = 1
    missed = labels.clone()
    missed[..., 20, 5, 5] = 0
    loss = InstanceIoULoss()
    assert loss(missed, labels).item() == pytest.approx(1 / 513 + 0.5, abs=1e-4)


@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_perfect_logits_are_zero(regions: str, classes: int) -> None:
    # Masking logits instead of probabilities gives 0.35 for blobs: a masked logit of 0 is a probability of one half.
    labels = volume(classes=max(classes, 2))
    perfect = (one_hot(labels, max(classes, 2))[:, -classes:] * 2 - 1) * 40
    loss = InstanceIoULoss(regions, sigmoid=classes == 1, softmax=classes > 1)
    assert loss(perfect, labels).item() == pytest.approx(0, abs=1e-6)


def test_blob_false_positives_count_against_every_component_and_voronoi_ones_against_one() -> None:
    labels = torch.zeros(1, 1, 30)
    labels[..., 2:6] = labels[..., 20:24] = 1
    found = labels.clone()
    found[..., 27:29] = 1
    voronoi, blob = InstanceIoULoss("voronoi"), InstanceIoULoss("blob")
    voronoi(found, labels), blob(found, labels)
    assert voronoi.last_terms["instance"].item() == pytest.approx((0 + 2 / 6) / 2, abs=1e-4)
    assert blob.last_terms["instance"].item() == pytest.approx(2 / 6, abs=1e-4)


@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize(
    "options", [{}, {"power": 1.5}, {"soft_label": True}, {"batch": True}, {"weight": [1.0, 2, 3]}]
)
def test_gradcheck(regions: str, options: dict[str, Any]) -> None:
    labels = torch.cat([volume((6, 5, 4), 3, seed) for seed in (0, 1)])
    logits = logits_for(labels, 3, dtype=torch.float64).requires_grad_()
    loss = InstanceIoULoss(regions, softmax=True, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits, fast_mode=True)
    two = logits_for(labels.clamp_max(1), 2, dtype=torch.float64).requires_grad_()
    shared = InstanceIoULoss(regions, softmax=True, **{k: v for k, v in options.items() if k != "weight"})
    assert torch.autograd.gradcheck(lambda x: shared(x, labels.clamp_max(1)), two, fast_mode=True)


def test_one_pass_equals_a_pass_a_class() -> None:
    labels = volume()
    logits = logits_for(labels).requires_grad_()
    for regions in ("voronoi", "blob"):
        shared = InstanceIoULoss(regions, softmax=True)
        split = InstanceIoULoss(regions, global_loss=IoULoss(softmax=True), softmax=True)
        torch.testing.assert_close(shared(logits, labels), split(logits, labels))
        slopes = [torch.autograd.grad(loss(logits, labels), logits)[0] for loss in (shared, split)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_precomputed_regions_equal_regions_on_the_fly(regions: str, classes: int) -> None:
    labels = torch.cat([volume(classes=max(2, classes), seed=seed) for seed in (0, 5)])
    logits = logits_for(labels, max(2, classes))[:, -classes:]
    transform = ComponentRegionsd("label", num_classes=max(2, classes))
    precomputed = torch.stack([transform({"label": label})["label"] for label in labels])
    assert precomputed.shape == (2, max(2, classes), 12, 10, 8)
    loss = InstanceIoULoss(regions, sigmoid=classes == 1, softmax=classes > 1)
    torch.testing.assert_close(loss(logits, precomputed), loss(logits, labels))
    torch.testing.assert_close(loss(logits, precomputed.float()), loss(logits, labels))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"regions": "blob"}, {"ignore_index": 200}, {"max_regions": 60}], ids=str)
def test_regions_of_every_dtype_give_the_same_loss(dtype: torch.dtype, classes: int, options: dict[str, Any]) -> None:
    labels = torch.cat([volume(classes=max(2, classes), seed=seed) for seed in (0, 5)])
    labels[:, :, :2] = 200 if "ignore_index" in options else labels[:, :, :2]
    logits = logits_for(labels, max(2, classes))[:, -classes:].requires_grad_()
    transform = ComponentRegionsd("label", num_classes=max(2, classes))
    target = torch.stack([transform({"label": torch.where(label == 200, 0, label)})["label"] for label in labels])
    target[:, :1] = labels.to(target.dtype)
    term = IoUCELoss(sigmoid=classes == 1, softmax=classes > 1)
    found = []
    for given in (target.to(dtype), target.double()):
        loss = InstanceIoULoss(sigmoid=classes == 1, softmax=classes > 1, term=term, **options)
        value = loss(logits, given)
        found.append((value.detach(), *torch.autograd.grad(value, logits)))
    torch.testing.assert_close(found[0], found[1])


def test_labels_above_the_number_of_regions_count() -> None:
    """Where labels stand before the regions of all classes, they are no regions."""
    labels = volume(classes=6)
    logits = logits_for(labels, 6)
    few = torch.where(labels == 5, 5, 0)
    few[0, 0, :, :, 4:] = 0
    target = ComponentRegionsd("x", num_classes=6)({"x": few[0]})["x"][None]
    largest = int(target[:, 1:].max()) - 1
    for limit in (None, largest):
        found = InstanceIoULoss(softmax=True, max_regions=limit)(logits, target)
        torch.testing.assert_close(found, InstanceIoULoss(softmax=True)(logits, few))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.uint8, 60), (torch.uint8, 256), (torch.int8, 1000)])
@pytest.mark.parametrize("regions", ["voronoi", "blob"])
def test_a_limit_of_regions_holds_in_narrow_dtypes(dtype: torch.dtype, limit: int, regions: str) -> None:
    labels = volume()
    logits = logits_for(labels)
    target = ComponentRegionsd("x")({"x": labels[0]})["x"][None]
    loss, free = (InstanceIoULoss(regions, softmax=True, max_regions=each) for each in (limit, None))
    torch.testing.assert_close(loss(logits, target.to(dtype)), free(logits, target))
    torch.testing.assert_close(loss(logits, torch.zeros_like(target, dtype=dtype)), loss(logits, labels[:, :1] * 0))
    unlabelled = torch.tensor([[True, False]])
    torch.testing.assert_close(loss(logits, target.to(dtype), unlabelled), free(logits, target, unlabelled))
    with pytest.raises(ValueError, match="no more than max_regions=2 precomputed regions"):
        InstanceIoULoss(regions, softmax=True, max_regions=2)(logits, target.to(dtype))


@pytest.mark.parametrize("wrong", [-1, 3, 4, 90])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_wrong_labels_beside_regions_are_refused(wrong: int, dtype: torch.dtype) -> None:
    labels = volume(classes=3)
    target = ComponentRegionsd("x", num_classes=3)({"x": labels[0]})["x"][None].to(dtype)
    target[0, 0, 0, 0, 0] = wrong
    message = f"Expected `target` to hold the labels 0 to 2 of an input with 3 channels, but got {wrong}: map"
    with pytest.raises(ValueError, match=re.escape(message)):
        InstanceIoULoss(softmax=True)(logits_for(labels, 3), target)


@pytest.mark.parametrize("classes", [2, 3])
def test_negative_regions_are_outside(classes: int) -> None:
    labels = volume(classes=classes)
    logits = logits_for(labels, classes)
    target = ComponentRegionsd("x", num_classes=classes)({"x": labels[0]})["x"][None]
    outside, negative = target.clone(), target.clone()
    outside[:, 1:, :3], negative[:, 1:, :3] = 0, -1
    loss = InstanceIoULoss(softmax=True)
    torch.testing.assert_close(loss(logits, negative), loss(logits, outside))


def test_forms_of_the_target_are_told_apart() -> None:
    labels = volume()
    logits = logits_for(labels)
    loss = InstanceIoULoss(softmax=True)
    expected = loss(logits, labels)
    torch.testing.assert_close(loss(logits, one_hot(labels, 2)), expected)
    torch.testing.assert_close(loss(logits, ComponentRegionsd("x")({"x": labels[0]})["x"][None]), expected)
    empty = torch.zeros_like(labels)
    torch.testing.assert_close(loss(logits, torch.cat([empty, empty], 1)), loss(logits, empty))


def test_zeros_with_sigmoid_are_maps_without_a_class() -> None:
    logits = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = InstanceIoULoss(sigmoid=True)
    value = loss(logits, torch.zeros(1, 2, 8, 8))
    torch.testing.assert_close(value, IoULoss(sigmoid=True)(logits, torch.zeros(1, 2, 8, 8)))
    assert value == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_a_crop_without_component_is_the_empty_label_map(activation: str) -> None:
    labels = torch.zeros(2, 1, 12, 10, dtype=torch.long)
    labels[0, :, :3, :3] = 1
    logits = logits_for(labels)
    precomputed = torch.stack([ComponentRegionsd("x")({"x": label})["x"] for label in labels])
    loss = InstanceIoULoss(**{activation: True})
    for image, corner in ((0, slice(6, None)), (1, slice(None))):  # lost by a crop, and never there
        crop = (slice(image, image + 1), slice(None), corner)
        torch.testing.assert_close(loss(logits[crop], precomputed[crop]), loss(logits[crop], labels[crop]))
    if activation == "softmax":  # a crop of nothing but padding
        nothing = torch.zeros(1, 2, 12, 10, dtype=torch.long)
        torch.testing.assert_close(loss(logits[:1], nothing), loss(logits[:1], nothing[:, :1]))


def test_a_crop_of_padding_beside_others_is_an_empty_label_map_with_sigmoid() -> None:
    labels = torch.zeros(2, 1, 12, 10, dtype=torch.long)
    labels[0, :, :3, :3] = 1
    logits = logits_for(labels)
    precomputed = torch.stack([ComponentRegionsd("x")({"x": label})["x"] for label in labels])
    precomputed[1] = 0  # as SpatialPadd leaves it where nothing of the volume is inside
    for options in ({}, {"batch": True}, {"include_background": False}):
        loss = InstanceIoULoss(sigmoid=True, **options)
        torch.testing.assert_close(loss(logits, precomputed), loss(logits, labels))


@pytest.mark.parametrize("batch", [True, False])
def test_a_batch_of_padding_with_sigmoid_pushes_the_foreground_down(batch: bool) -> None:
    logits = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    nothing = torch.zeros(2, 2, 8, 8, dtype=torch.int32)
    # Whether these zeros are maps or a label map with regions, the foreground is absent: without class 0 they agree.
    loss = InstanceIoULoss(sigmoid=True, include_background=False, batch=batch, empty="suppress")
    value = loss(logits, nothing)
    torch.testing.assert_close(value, loss(logits, nothing[:, :1]))
    assert loss.last_terms["instance"] == 0
    (slope,) = torch.autograd.grad(value, logits)
    assert (slope[:, 1] > 0).all()
    assert (slope[:, 0] == 0).all()


def test_zeros_with_an_ignored_label_are_ignored() -> None:
    logits = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = InstanceIoULoss(softmax=True, ignore_index=255)(logits, torch.zeros(1, 2, 8, 8))
    assert value.item() == 0
    (slope,) = torch.autograd.grad(value, logits)
    assert (slope == 0).all()


def test_regions_survive_crops_and_flips() -> None:
    labels = volume((24, 20, 16), seed=4)
    whole = ComponentRegionsd("label")({"label": MetaTensor(labels[0])})["label"]
    pipeline = Compose(
        [
            ComponentRegionsd("label"),
            RandFlipd("label", prob=1.0, spatial_axis=0),
            RandSpatialCropd("label", roi_size=(10, 10, 10), random_size=False),
        ]
    )
    pipeline.set_random_state(0)
    crop = pipeline({"label": MetaTensor(labels[0])})["label"]
    assert crop.shape == (2, 10, 10, 10)
    # Every voxel kept its region: the crop is a part of the flipped whole.
    windows = whole.flip(1).as_subclass(Tensor).unfold(1, 10, 1).unfold(2, 10, 1).unfold(3, 10, 1)
    same = (windows == crop.as_subclass(Tensor).reshape(2, 1, 1, 1, 10, 10, 10)).flatten(4).all(4).all(0)
    assert same.any()


def test_a_region_without_its_component_is_left_out() -> None:
    labels = torch.zeros(1, 1, 30)
    labels[..., 2:6] = labels[..., 20:24] = 1
    target = ComponentRegionsd("x")({"x": labels[0]})["x"][None]
    crop = slice(10, 30)  # holds a part of the first region, not its component
    p = torch.full((1, 1, 20), 0.5)
    loss = InstanceIoULoss()
    loss(p, target[..., crop])
    region = (target[0, 1, crop] == 3).sum().item()
    assert loss.last_terms["instance"].item() == pytest.approx(1 - 2 / (region * 0.5 + 4 - 2), abs=1e-4)


def test_nothing_to_find_leaves_the_global_term() -> None:
    logits = torch.randn(2, 2, 6, 6, 6, requires_grad=True)
    labels = torch.zeros(2, 1, 6, 6, 6)
    loss = InstanceIoULoss(softmax=True)
    torch.testing.assert_close(loss(logits, labels), IoULoss(softmax=True)(logits, labels))
    assert loss.last_terms["instance"] == 0
    assert torch.autograd.grad(loss(logits, labels), logits)[0].isfinite().all()


@pytest.mark.parametrize("classes", [2, 3])
def test_ignored_voxels_have_no_effect(classes: int) -> None:
    labels = volume(classes=classes)
    labels[:, :, :5] = 255
    logits = logits_for(labels, classes)
    loss = InstanceIoULoss(softmax=True, ignore_index=255)
    values = []
    for junk in (0.0, 50.0, float("nan")):
        spoiled = torch.where(labels == 255, junk, logits).requires_grad_()
        values.append(loss(spoiled, labels))
        (slope,) = torch.autograd.grad(values[-1], spoiled)
        assert (slope[:, :, :5] == 0).all()
        assert slope[:, :, 5:].abs().sum() > 0
    assert values[0] == values[1] == values[2]
    cropped = InstanceIoULoss(softmax=True)(logits[:, :, 5:], labels[:, :, 5:])
    torch.testing.assert_close(values[0].detach(), cropped)


def test_spacing_of_a_metatensor_is_used() -> None:
    affine = torch.diag(torch.tensor([4.0, 1.0, 1.0, 1.0]))
    mask = volume((12, 10, 8), seed=2)[0]
    plain = ComponentRegionsd("x")({"x": mask})["x"]
    stretched = ComponentRegionsd("x")({"x": MetaTensor(mask, affine=affine)})["x"]
    given = ComponentRegionsd("x", spacing=(4.0, 1.0, 1.0))({"x": mask})["x"]
    assert isinstance(stretched, MetaTensor)
    assert torch.equal(stretched.as_subclass(Tensor), given)
    assert not torch.equal(plain, given)
    torch.testing.assert_close(stretched.affine, affine.double())
    logits = logits_for(mask[None])
    precomputed, on_the_fly = InstanceIoULoss(softmax=True), InstanceIoULoss(softmax=True, spacing=(4.0, 1.0, 1.0))
    torch.testing.assert_close(precomputed(logits, given[None]), on_the_fly(logits, mask[None]))


def test_multi_label_takes_every_channel() -> None:
    maps = torch.cat([volume(seed=0), volume(seed=7)], 1).float()
    logits = torch.randn(1, 2, 12, 10, 8)
    loss = InstanceIoULoss("blob", sigmoid=True)
    loss(logits, maps)
    p = logits.sigmoid()
    terms = [slow_term(p[0, c], maps[0, c] > 0, "blob", (1.0, 1.0, 1.0)) for c in range(2)]
    assert loss.last_terms["instance"].item() == pytest.approx(sum(terms) / 2, abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 6), (1, 1, 3), (7, 1, 1), (40,), (9, 9)])
def test_thin_volumes(shape: tuple[int, ...]) -> None:
    mask = np.zeros(shape, dtype=bool)
    mask.flat[0] = mask.flat[-1] = True
    numbers, count = component_regions(mask, "blob")
    assert count == 2
    assert sorted(numbers[mask]) == [1, 2]
    assert (numbers > 0).sum() == 2


def test_works_inside_other_wrappers_and_configs() -> None:
    labels = volume((16, 16, 16))
    logits = logits_for(labels)
    item = {
        "_target_": "InstanceIoULoss",
        "softmax": True,
        "regions": "blob",
        "global_loss": {"_target_": "IoUCELoss", "softmax": True},
    }
    loss = ConfigParser({"imports": ["$import monai_iou"], "loss": item}).get_parsed_content("loss")
    value = loss(logits, labels)
    torch.testing.assert_close(loss.last_terms["global"], IoUCELoss(softmax=True)(logits, labels))
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(logits, labels) == value
    coarse = torch.nn.functional.avg_pool3d(logits, 2)
    assert MultiScaleLoss(loss)([logits, coarse], labels).isfinite()


def test_errors() -> None:
    labels = volume()
    logits = logits_for(labels)
    with pytest.raises(ValueError, match="`regions` to be one of 'voronoi', 'blob', but got 'ball'"):
        InstanceIoULoss("ball")
    with pytest.raises(ValueError, match="`lambda_instance` to be a finite number at least 0, but got -1"):
        InstanceIoULoss(lambda_instance=-1)
    with pytest.raises(ValueError, match="`reduction` to be one of 'mean', but got 'none'"):
        InstanceIoULoss(reduction="none")
    with pytest.raises(TypeError, match="`global_loss` to be a torch module, but got str"):
        InstanceIoULoss(global_loss="IoULoss")  # type: ignore[arg-type]
    precomputed = ComponentRegionsd("x")({"x": labels[0]})["x"][None]
    with pytest.raises(ValueError, match=re.escape("but got (1, 1, 12, 10, 7)")):
        InstanceIoULoss(softmax=True)(logits, precomputed[..., :7])
    with pytest.raises(ValueError, match="`spacing` to be a positive number in mm, or one for each of up to 3 axes"):
        InstanceIoULoss(softmax=True, spacing=(1.0, -1.0, 1.0))(logits, labels)
    with pytest.raises(ValueError, match="`connectivity` to be one of"):
        InstanceIoULoss(softmax=True, connectivity=8)(logits, labels)
    with pytest.raises(ValueError, match="`num_classes` to count the background and at least one class, but got 1"):
        ComponentRegionsd("x", num_classes=1)
    with pytest.raises(ValueError, match=re.escape("`x` to be a label map (1, *S), but got (2, 12, 10, 8)")):
        ComponentRegionsd("x")({"x": precomputed[0]})


@pytest.mark.parametrize("options", [{"softmax": True, "include_background": False}, {"sigmoid": True}])
def test_the_weight_of_one_scored_class_changes_neither_term(options: dict[str, Any]) -> None:
    """As in MONAI's losses: a factor of the instance term alone would change the proportion of the two."""
    channels = 2 if "softmax" in options else 1
    logits = torch.randn(2, channels, 8, 9, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(2, 1, 8, 9, generator=torch.Generator().manual_seed(1)) < 0.2).long()
    terms = []
    for weight in (None, [3.0]):
        loss = InstanceIoULoss(**options, weight=weight)
        loss(logits, labels)
        terms.append(loss.last_terms)
    torch.testing.assert_close(terms[1], terms[0])
