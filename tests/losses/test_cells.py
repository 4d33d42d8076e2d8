"""Cells of the reference and of the prediction: any term inside them, against a slow loop over the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from monai_iou import (
    CompoundLoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoULoss,
    LogIoULoss,
    LovaszSoftmaxLoss,
    WeightedCrossEntropyLoss,
    use_kernel,
    voxel_sums,
)

DICE: dict[str, Any] = {
    "alpha": 0.5,
    "beta": 0.5,
    "gamma": 1.0,
    "smooth_nr": 0.0,
    "smooth_dr": 0.0,
    "empty": "suppress",
}


def cases(classes: int, seed: int = 0, shape: tuple[int, ...] = (11, 9, 7)) -> tuple[Tensor, Tensor]:
    """Return logits and labels of two images, with lesions that are found, missed and invented."""
    generator = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(generator.random((2, 2, classes, *shape)), [0, 0, 0, *[1.0] * len(shape)])
    noise[:, :, 0] = np.quantile(noise[:, :, 1:].max(2), 0.85, axis=(1, 2, 3, 4)[: 1 + len(shape)], keepdims=True)[:, 0]
    labels = torch.as_tensor(noise[0].argmax(1))[:, None]
    found = torch.as_tensor((0.6 * noise[0] + 0.4 * noise[1] - 0.5) * 40 + generator.normal(size=noise[0].shape))
    return found, labels


def cells_of(mask: NDArray[np.bool_], regions: str) -> list[Tensor]:
    """Return the cell of every component: by a distance transform each, or all but the other components."""
    components, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    if regions == "blob":
        return [torch.as_tensor((components == k) | (components == 0)) for k in range(1, count + 1)]
    _, nearest = ndimage.distance_transform_edt(components == 0, return_indices=True)
    owner = components[tuple(nearest)]
    return [torch.as_tensor(owner == k) for k in range(1, count + 1)]


def dice_in(p: Tensor, y: Tensor) -> Tensor:
    """Dice loss of some voxels; of an empty cell BiCC's equation (3), "detached": sum p sg(p) / sg(sum p)."""
    if y.sum() == 0:
        return (p * p.detach()).sum() / p.sum().detach()
    return 1 - 2 * (p * y).sum() / (p.sum() + y.sum())


def slow_mean(logits: Tensor, labels: Tensor, masks: Tensor, regions: str) -> Tensor:
    """Return the mean over images and classes of the mean over cells of Dice + CE inside the cell."""
    log_p = logits.log_softmax(1)
    entropy = -log_p.gather(1, labels)[:, 0]
    means = []
    for image in range(len(logits)):
        for index in range(1, logits.shape[1]):
            p, y = log_p[image, index].exp(), labels[image, 0] == index
            cells = cells_of((masks[image, 0] == index).numpy(), regions)
            terms = [dice_in(p[cell], y[cell].to(p)) + entropy[image][cell].mean() for cell in cells]
            if terms:
                means.append(torch.stack(terms).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize("classes", [2, 4])
def test_dice_and_cross_entropy_in_cells_of_both_equal_a_slow_loop(regions: str, classes: int) -> None:
    logits, labels = cases(classes)
    logits.requires_grad_()
    term = CompoundLoss([FocalTverskyLoss(**DICE), WeightedCrossEntropyLoss()])
    loss = InstanceIoULoss(regions, softmax=True, cells="both", alpha=0.5, term=term, lambda_global=0)
    predicted = logits.argmax(1, keepdim=True)
    by_hand = slow_mean(logits, labels, labels, regions) / 2 + slow_mean(logits, labels, predicted, regions) / 2
    value = loss(logits, labels)
    assert value.item() == pytest.approx(by_hand.item(), abs=1e-6)
    slopes = [torch.autograd.grad(part, logits)[0] for part in (value, by_hand)]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-6)
    assert slopes[0].abs().max() > 1e-4
    for cells, masks in (("reference", labels), ("prediction", predicted)):
        one = InstanceIoULoss(regions, softmax=True, cells=cells, term=term, lambda_global=0)(logits, labels)
        assert one.item() == pytest.approx(slow_mean(logits, labels, masks, regions).item(), abs=1e-6)
        assert loss.last_terms[cells].item() == pytest.approx(one.item())


def test_alpha_mixes_and_the_global_term_is_added() -> None:
    logits, labels = cases(3)
    terms = {}
    for alpha in (0.0, 0.3, 1.0):
        loss = InstanceIoULoss(softmax=True, cells="both", alpha=alpha)
        terms[alpha] = loss(logits, labels).item()
    ends = [InstanceIoULoss(softmax=True, cells=cells)(logits, labels).item() for cells in ("reference", "prediction")]
    assert terms[0.0] == pytest.approx(ends[0])
    assert terms[1.0] == pytest.approx(ends[1])
    assert terms[0.3] == pytest.approx(0.7 * ends[0] + 0.3 * ends[1])
    torch.testing.assert_close(loss.last_terms["global"], IoULoss(softmax=True)(logits, labels))


@pytest.mark.parametrize("regions", ["voronoi", "blob"])
@pytest.mark.parametrize("cells", ["reference", "prediction", "both"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_perfect_logits_are_zero_in_all_cells(regions: str, cells: str, classes: int) -> None:
    _, labels = cases(max(2, classes))
    maps = labels == torch.arange(max(2, classes)).reshape(1, -1, 1, 1, 1)
    perfect = (maps[:, -classes:] * 80.0) - 40
    options: dict[str, Any] = {"sigmoid": True} if classes == 1 else {"softmax": True}
    for term in (None, IoUCELoss(), LogIoULoss()):
        value = InstanceIoULoss(regions, cells=cells, term=term, **options)(perfect, labels)
        assert value.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("empty", ["smooth", "suppress"])
def test_a_far_false_positive_component_costs_more_than_its_voxels(empty: str) -> None:
    labels = torch.zeros(1, 1, 40, 20, 20)
    labels[..., 2:12, 2:12, 2:12] = 1
    maps = labels.clone()
    maps[..., 35:37, 15:17, 15:17] = 1  # 8 voxels beside a lesion of 1000
    logits = 40 * maps - 20
    plain = IoULoss(sigmoid=True)(logits, labels).item()
    values = {
        cells: InstanceIoULoss(sigmoid=True, cells=cells, lambda_global=0, empty=empty)(logits, labels).item()
        for cells in ("reference", "prediction", "both")
    }
    assert plain == pytest.approx(8 / 1008, abs=1e-4)
    assert values["reference"] == pytest.approx(plain, abs=1e-4)
    assert values["prediction"] == pytest.approx(0.5, abs=1e-3)
    assert values["both"] > 20 * plain
    skipped = InstanceIoULoss(sigmoid=True, cells="prediction", lambda_global=0, empty="skip")
    assert skipped(logits, labels).item() == pytest.approx(0, abs=1e-4)


def test_inverse_sizes_weigh_small_components_more() -> None:
    labels = torch.zeros(1, 1, 30)
    labels[..., 2:10] = labels[..., 20:22] = 1
    p = torch.where(labels > 0, 1.0, 0.0)
    p[..., 20] = 0  # half of the small one is missed
    for cells, sizes in (("reference", (8, 2)), ("prediction", (8, 1))):
        options: dict[str, Any] = {"sigmoid": True, "cells": cells, "lambda_global": 0, "smooth_nr": 0, "smooth_dr": 0}
        logits = 100 * p - 50
        assert InstanceIoULoss(**options)(logits, labels).item() == pytest.approx((0 + 0.5) / 2, abs=1e-6)
        weighted = InstanceIoULoss(cell_weight="inverse", **options)(logits, labels).item()
        weights = [1 / size for size in sizes]
        assert weighted == pytest.approx(0.5 * weights[1] / sum(weights), abs=1e-6)


@pytest.mark.parametrize("options", [{"softmax": True}, {"sigmoid": True}, {"softmax": True, "batch": True}])
@pytest.mark.parametrize("term", [IoUCELoss(gamma=2.0, label_smoothing=0.1), FocalTverskyLoss(), LogIoULoss()])
def test_gradcheck(options: dict[str, Any], term: torch.nn.Module) -> None:
    logits, labels = cases(3, shape=(6, 5))
    loss = InstanceIoULoss(cells="both", term=term, **options)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_(), fast_mode=True)


def test_prediction_components_have_no_gradient_and_ignored_voxels_no_effect() -> None:
    logits, labels = cases(3)
    labels[:, :, :4] = 255
    values = []
    for junk in (0.0, 50.0):
        spoiled = torch.where(labels == 255, junk, logits).requires_grad_()
        values.append(InstanceIoULoss(softmax=True, cells="both", term=IoUCELoss(), ignore_index=255)(spoiled, labels))
        (slope,) = torch.autograd.grad(values[-1], spoiled)
        assert (slope[:, :, :4] == 0).all()
    assert values[0] == values[1]
    cropped = InstanceIoULoss(softmax=True, cells="both", term=IoUCELoss())(logits[:, :, 4:], labels[:, :, 4:])
    torch.testing.assert_close(values[0], cropped)


def test_classes_with_regions_of_their_own() -> None:
    logits, labels = cases(3)
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(0, 3, logits.shape, generator=generator)
    for activation in ("softmax", "sigmoid"):
        sums = voxel_sums(logits, labels, activation=activation, groups=groups)
        for index in range(3):
            alone = voxel_sums(logits, labels, activation=activation, groups=groups[:, [index]])
            for name in ("intersection", "prediction", "target", "count"):
                torch.testing.assert_close(getattr(sums, name)[:, index], getattr(alone, name)[:, index])
            entropy = alone.cross_entropy[:, index] if activation == "sigmoid" else alone.cross_entropy.sum(1)
            torch.testing.assert_close(sums.cross_entropy[:, index], entropy)


@pytest.mark.parametrize("kernel", ["reference", "tiled", "compiled"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_all_kernels_take_regions_of_each_class(kernel: str, activation: str) -> None:
    logits, labels = cases(3)
    groups = torch.randint(-1, 3, logits.shape, generator=torch.Generator().manual_seed(0))
    logits.requires_grad_()
    found = []
    for name in ("reference", kernel):
        with use_kernel(name):
            sums = voxel_sums(logits, labels, activation=activation, groups=groups, num_groups=3, confidence=True)
        weights = torch.rand(sums.rows.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found.append((sums.rows, torch.autograd.grad((sums.rows * weights).sum(), logits)[0]))
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"cells": "prediction", "softmax": False},
        ValueError,
        "Expected `softmax` or `sigmoid` to be True with cells='prediction', but got neither: set one, because it "
        "determines which voxels are predicted.",
    ),
    ({"cells": "mine"}, ValueError, "Expected `cells` to be one of 'reference', 'prediction', 'both', but got 'mine'"),
    ({"alpha": 1.2}, ValueError, "Expected `alpha` to be from 0 to 1, but got 1.2: give the share of the"),
    ({"alpha": float("nan")}, ValueError, "Expected `alpha` to be from 0 to 1, but got nan"),
    ({"cell_weight": "size"}, ValueError, "Expected `cell_weight` to be one of 'equal', 'inverse', but got 'size'"),
    ({"term": "iou"}, TypeError, "Expected `term` to be a torch module, but got str"),
    ({"term": LovaszSoftmaxLoss()}, TypeError, "Expected `term` to be a region loss such as IoULoss or FocalTversky"),
    ({"term": GeneralizedIoULoss()}, TypeError, "Expected `term` to be a region loss such as IoULoss or FocalTversky"),
    ({"term": IoULoss(sigmoid=True)}, ValueError, "Expected `term` to have no activation of its own, but got one in"),
    (
        {"term": IoULoss(other_act=torch.sigmoid)},
        ValueError,
        "Expected `term` to have no activation of its own, but got one in IoULoss: set it in InstanceIoULoss alone",
    ),
    (
        {"softmax": False, "other_act": torch.tanh, "term": CompoundLoss([IoULoss(other_act=torch.sigmoid)])},
        ValueError,
        "Expected `term` to have no activation of its own, but got one in IoULoss: set it in InstanceIoULoss alone",
    ),
    ({"term": IoUCELoss(weight=[1.0, 2.0])}, ValueError, "Expected `term` without weights, but got some in"),
    ({"term": IoULoss(ignore_index=3)}, ValueError, "Expected `ignore_index` of `term` to be left out or that of"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=r"^Expected") as caught:
        InstanceIoULoss(**{"softmax": True, **options})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("term", [IoULoss(weight=2.0), IoUCELoss(pos_weight=2.0)])
def test_a_term_with_weights_is_told_where_they_belong(term: Any) -> None:
    part = "IoULoss" if isinstance(term, IoULoss) else "WeightedCrossEntropyLoss"
    with pytest.raises(ValueError, match=r"^Expected") as caught:
        InstanceIoULoss(sigmoid=True, term=term)
    assert str(caught.value) == (
        f"Expected `term` without weights, but got some in {part}: pass those of several classes to InstanceIoULoss as "
        "`weight`, and that of one channel, or `pos_weight`, to the global term, as in "
        "global_loss=IoUCELoss(sigmoid=True, pos_weight=2)."
    )


def test_the_weight_of_one_channel_has_an_effect_in_the_global_term_alone() -> None:
    logits, labels = cases(2)
    logits = logits[:, 1:]
    values = [
        InstanceIoULoss(sigmoid=True, **options)(logits, labels)
        for options in (
            {},
            {"weight": 5.0},
            {"global_loss": IoUCELoss(sigmoid=True)},
            {"global_loss": IoUCELoss(sigmoid=True, pos_weight=5.0)},
        )
    ]
    assert values[1] == values[0]
    assert values[3] > values[2]


def test_terms_that_cannot_share_a_reading() -> None:
    logits, labels = cases(2)
    term = CompoundLoss([IoULoss(power=2.0), IoULoss()])
    with pytest.raises(ValueError, match=r"^Expected the losses of `term` to share one pass over the voxels, but they"):
        InstanceIoULoss(softmax=True, term=term)(logits, labels)


def test_a_term_may_name_the_activation_of_the_loss() -> None:
    logits, labels = cases(2)
    logits = logits[:, 1:]
    expected = InstanceIoULoss(sigmoid=True)(logits, labels)
    for term in (IoULoss(other_act=torch.sigmoid), IoULoss()):
        torch.testing.assert_close(InstanceIoULoss(other_act=torch.sigmoid, term=term)(logits, labels), expected)
