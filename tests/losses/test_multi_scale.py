"""Deep supervision: labels at coarse scales, weights, and agreement with MONAI's wrapper."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import monai.losses
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from monai_iou import (
    ComponentRegionsd,
    CompoundLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LogTverskyLoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
)
from monai_iou.losses.label_pooling import pool_labels
from monai_iou.voxels import late_checks


def lesions(count: int = 200, size: int = 32, seed: int = 0) -> Tensor:
    """Return volumes with one lesion of 3x3x3 voxels each, at random places."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(count, 1, size, size, size, dtype=torch.uint8)
    for volume, corner in zip(
        labels, torch.randint(0, size - 2, (count, 3), generator=generator).tolist(), strict=True
    ):
        x, y, z = corner
        volume[0, x : x + 3, y : y + 3, z : z + 3] = 1
    return labels


@pytest.mark.parametrize("mode", ["area", "max", "nearest"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16])
def test_labels_of_every_dtype_are_pooled_alike(dtype: torch.dtype, mode: str) -> None:
    labels = lesions(3, size=8).long()
    for ignore_index in (None, 1):
        expected = pool_labels(labels, [3, 2, 4], classes=2, mode=mode, ignore_index=ignore_index)
        found = pool_labels(labels.to(dtype), [3, 2, 4], classes=2, mode=mode, ignore_index=ignore_index)
        assert torch.equal(found.double(), expected.double())


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_small_lesions_survive(factor: int) -> None:
    labels = lesions()
    size = [32 // factor] * 3
    fractions = pool_labels(labels, size, classes=2, mode="area")
    mass = fractions[:, 1].flatten(1).sum(1) * factor**3 / 27
    torch.testing.assert_close(mass, torch.ones(200))
    torch.testing.assert_close(fractions.sum(1), torch.ones(200, *size))
    assert (pool_labels(labels, size, classes=2, mode="max").flatten(1).amax(1) == 1).all()
    kept = (pool_labels(labels, size, classes=2, mode="nearest").flatten(1).amax(1) == 1).float().mean().item()
    assert kept == pytest.approx({2: 1.0, 4: 0.45, 8: 0.05}[factor], abs=0.1)


def block_loop(labels: Tensor, factor: int, ignore: int | None) -> tuple[Tensor, Tensor]:
    """Fractions and "max" labels of (B, 1, X, Y) label maps of 3 classes, block by block."""
    batch, _, width, height = labels.shape
    counts = {value: int((labels == value).sum()) for value in (1, 2)}
    fractions = torch.zeros(batch, 3, width // factor, height // factor)
    largest = torch.zeros(batch, 1, width // factor, height // factor, dtype=labels.dtype)
    for b in range(batch):
        for i in range(width // factor):
            for j in range(height // factor):
                block = labels[b, 0, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].flatten().tolist()
                voxels = [value for value in block if value != ignore]
                for value in voxels:
                    fractions[b, value, i, j] += 1 / len(voxels)
                foreground = sorted({v for v in voxels if v > 0}, key=lambda v: (counts[v], -v))
                largest[b, 0, i, j] = foreground[0] if foreground else 0 if voxels else ignore
    return fractions, largest


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("factor", [2, 4])
def test_pooling_is_that_of_a_slow_loop(ignore: int | None, factor: int) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(2, 1, 8, 12, generator=generator) ** 2 * 3).to(torch.uint8)
    if ignore is not None:
        labels[:, :, :5, :6] = ignore
    fractions, largest = block_loop(labels, factor, ignore)
    size = [8 // factor, 12 // factor]
    torch.testing.assert_close(pool_labels(labels, size, 3, "area", ignore), fractions)
    torch.testing.assert_close(pool_labels(labels, size, 3, "max", ignore), largest)
    maps = (labels == torch.arange(3).reshape(1, 3, 1, 1)).float()
    torch.testing.assert_close(pool_labels(maps, size, 3, "area", ignore), fractions)


WRONG = [
    (torch.tensor([[[0, 1, 7, 2]]]), None, "labels 0 to 2 of an input with 3 channels, but got 7: map the labels to"),
    (torch.tensor([[[0, 255, 2, 1]], [[0, 0, 7, 0]]]), 255, "labels 0 to 2 of an input with 3 channels, but got 7"),
    (torch.tensor([[[0, 1, 255, 2]]], dtype=torch.uint8), None, "but got 255: map .*, or set `ignore_index` to"),
    (torch.tensor([[[0.0, 1, 1.5, 2]]]), None, "but got 1.5: give a soft target one channel per class"),
    (torch.tensor([[[0.0, 2], [1, 0], [1, -1]]]), None, "per-class values between 0 and 1, but got 2"),
    (torch.tensor([[[1.0, 0], [0, torch.nan], [0, 1]]]), None, "per-class values between 0 and 1, but got nan"),
]


@pytest.mark.parametrize(("target", "ignore", "message"), WRONG)
def test_fractions_of_wrong_labels_are_refused(target: Tensor, ignore: int | None, message: str) -> None:
    """They would become voxels of no class, whose fractions are 0: only the full resolution looks at labels."""
    with pytest.raises(ValueError, match=f"^Expected `target` to hold .*{message}"):
        pool_labels(target, [2], 3, "area", ignore)
    output = [torch.randn(len(target), 3, target.shape[2] // 2)]
    for loss in (IoUCELoss(softmax=True, ignore_index=ignore), monai.losses.DiceLoss(softmax=True, to_onehot_y=True)):
        if isinstance(loss, IoUCELoss) or ignore is None:
            with pytest.raises(ValueError, match=message):
                MultiScaleLoss(loss)(output, target)


def test_wrong_values_of_ignored_voxels_are_no_labels() -> None:
    maps = torch.tensor([[[1.0, 0, 0, 0], [0, 1, torch.nan, 9], [0, 0, 1, 1]]])  # class 2 is ignored
    assert pool_labels(maps, [2], 3, "area", 2).tolist() == [[[0.5, 0], [0.5, 0], [0, 1]]]


def test_fractions_of_wrong_labels_are_nan_where_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([[[0, 1, 7, 2]]])
    compiled = torch.compile(MultiScaleLoss(IoUCELoss(softmax=True)), backend="eager", fullgraph=True)
    outputs = [torch.randn(1, 3, 2)]
    assert compiled(outputs, labels).isnan()
    assert compiled(outputs, labels.clamp_max(2)).isfinite()
    monkeypatch.setattr(late_checks, "answers_late", lambda _: True)  # as on a GPU
    with late_checks.collected() as asked:
        assert pool_labels(labels, [2], 3).isnan().all()
    ((bad, error),) = asked
    assert bool(bad)
    assert "but got 7" in str(error())
    with late_checks.collected() as asked:
        assert pool_labels(labels.clamp_max(2), [2], 3).isfinite().all()
    assert not bool(asked[0][0])


def test_pooled_maps_of_one_channel_and_of_an_ignored_class() -> None:
    binary = torch.tensor([[[1.0, 0, 255, 1, 255, 255]]])
    assert pool_labels(binary, [3], 1, "area", 255).tolist() == [[[0.5, 1, 255]]]
    assert pool_labels(binary, [3], 1, "max", 255).tolist() == [[[1, 1, 255]]]
    ignored = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]]])
    assert pool_labels(ignored, [2], 3, "area", 2).tolist() == [[[1, 0], [0, 0], [0, 1]]]
    assert pool_labels(torch.zeros(1, 1, 6, dtype=torch.bool), [3], 1, "max").dtype == torch.bool


LOSSES: list[nn.Module] = [
    IoULoss(softmax=True),
    IoULoss(softmax=True, to_onehot_y=True, batch=True),
    IoULoss(softmax=True, power=1.5),
    IoULoss(sigmoid=True, squared_pred=True),
    LogIoULoss(softmax=True),
    FocalIoULoss(softmax=True),
    FocalTverskyLoss(softmax=True),
    FocalTverskyLoss(softmax=True, squared_pred=True),
    LogTverskyLoss(0.5, 0.5, softmax=True, squared_pred=True),
    GeneralizedIoULoss(softmax=True),
    WeightedCrossEntropyLoss(weight=[0.1, 1.0, 1.0]),
    IoUCELoss(softmax=True),
    IoUFocalLoss(softmax=True),
    CompoundLoss([IoULoss(softmax=True), monai.losses.DiceLoss(softmax=True, to_onehot_y=True)]),
    CompoundLoss([LovaszSoftmaxLoss(softmax=True), WeightedCrossEntropyLoss()]),
    LovaszSoftmaxLoss(softmax=True, bins=None),
    InstanceIoULoss(softmax=True),
    monai.losses.DiceLoss(softmax=True, to_onehot_y=True),
    monai.losses.DiceCELoss(softmax=True, to_onehot_y=True, jaccard=True),
    monai.losses.TverskyLoss(softmax=True, to_onehot_y=True),
    monai.losses.FocalLoss(to_onehot_y=True),
    monai.losses.HausdorffDTLoss(softmax=True, to_onehot_y=True),
]


def outputs_of(shape: tuple[int, ...] = (2, 3, 8, 8, 8), scales: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch, classes, *space = shape
    return [
        torch.randn(batch, classes, *(side // 2**k for side in space), generator=generator).requires_grad_()
        for k in range(scales)
    ]


def some_labels() -> Tensor:
    return (torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(9)) ** 3 * 3).floor()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("downsample", ["area", "max", "nearest"])
def test_every_loss_at_every_scale(loss: nn.Module, downsample: str) -> None:
    outputs, labels = outputs_of(), some_labels()
    if downsample == "area" and any("Lovasz" in type(module).__name__ for module in loss.modules()):
        with pytest.raises(ValueError, match="with LovaszSoftmaxLoss, which needs hard labels, but got 'area': use do"):
            MultiScaleLoss(loss)
        return
    multi = MultiScaleLoss(loss, downsample=downsample)
    value = multi(outputs, labels)
    assert value.isfinite()
    for slope in torch.autograd.grad(value, outputs):
        assert slope.isfinite().all()
        assert slope.abs().sum() > 0
    assert list(multi.last_terms) == ["scale_0", "scale_1", "scale_2"]
    parts = [weight * term for weight, term in zip((4 / 7, 2 / 7, 1 / 7), multi.last_terms.values(), strict=True)]
    torch.testing.assert_close(value.detach(), torch.stack(parts).sum())
    torch.testing.assert_close(multi.last_terms["scale_0"], loss(outputs[0], labels).detach())


@pytest.mark.parametrize("loss", [IoULoss(softmax=True), monai.losses.DiceCELoss(softmax=True, to_onehot_y=True)])
def test_nearest_is_monais_deep_supervision(loss: nn.Module) -> None:
    outputs, labels = outputs_of(), some_labels()
    theirs = monai.losses.DeepSupervisionLoss(loss)(outputs, labels)  # weights 1, 1/2, 1/4, not normalised
    torch.testing.assert_close(MultiScaleLoss(loss, downsample="nearest")(outputs, labels) * 1.75, theirs)
    given = MultiScaleLoss(loss, weights=[1.0, 0.5, 0.25], downsample="nearest")
    torch.testing.assert_close(given(outputs, labels), theirs)


def test_up_to_five_outputs_are_monais_up_to_a_factor_and_six_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(1, 3, side, side, generator=generator) for side in (64, 32, 16, 8, 4, 2)]
    labels = torch.randint(0, 3, (1, 1, 64, 64), generator=generator).float()
    loss = IoULoss(softmax=True)
    ours, theirs = MultiScaleLoss(loss, downsample="nearest"), monai.losses.DeepSupervisionLoss(loss)
    torch.testing.assert_close(ours(outputs[:5], labels) * (2 - 1 / 16), theirs(outputs[:5], labels))
    assert abs(ours(outputs, labels) * (2 - 1 / 32) - theirs(outputs, labels)) > 1e-3
    given = MultiScaleLoss(loss, weights=[1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], downsample="nearest")
    torch.testing.assert_close(given(outputs, labels), theirs(outputs, labels))


@pytest.mark.parametrize("make", [IoULoss, LogIoULoss, FocalIoULoss, FocalTverskyLoss, GeneralizedIoULoss])
def test_area_is_zero_only_at_the_fractions(make: Any) -> None:
    labels = some_labels()
    truth = [pool_labels(labels, [side] * 3, 3) for side in (8, 4, 2)]
    multi = MultiScaleLoss(make())
    assert abs(multi(truth, labels).item()) < 1e-5
    rounded = [maps.round() for maps in truth]
    assert multi(rounded, labels) > 0.01


def test_the_wrapped_loss_itself_stays_as_it_is() -> None:
    loss = IoUCELoss(softmax=True, to_onehot_y=True)
    outputs, labels = outputs_of(scales=1), some_labels()
    before = loss(outputs[0], labels)
    multi = MultiScaleLoss(loss)
    assert multi.loss is loss
    assert loss(outputs[0], labels) == before
    assert multi(outputs[0], labels) == before
    assert multi(outputs, labels) == before


@pytest.mark.parametrize("downsample", ["area", "max", "nearest"])
def test_ignored_voxels_have_no_effect_at_any_scale(downsample: str) -> None:
    outputs, labels = outputs_of(), some_labels()
    labels[:, :, :4] = 255
    multi = MultiScaleLoss(IoUCELoss(softmax=True, ignore_index=255), downsample=downsample)
    slopes = torch.autograd.grad(multi(outputs, labels), outputs)
    for slope in slopes:
        half = slope.shape[2] // 2
        assert (slope[:, :, :half] == 0).all()
        assert slope[:, :, half:].abs().sum() > 0
    alone = MultiScaleLoss(IoUCELoss(softmax=True), downsample=downsample)
    valid = alone([output[:, :, output.shape[2] // 2 :] for output in outputs], labels[:, :, 4:])
    torch.testing.assert_close(multi(outputs, labels), valid)


class Targets(nn.Module):
    """Keeps the coarse labels that a loss is given."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.inner = loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        self.last = target
        value: Tensor = self.inner(input, target)
        return value


@pytest.mark.parametrize("make", [monai.losses.DiceCELoss, monai.losses.DiceFocalLoss, IoUCELoss])
def test_multi_label_maps_keep_their_mass(make: Any) -> None:
    # torch's CrossEntropyLoss inside DiceCELoss has an ignore_index of -100, and rows of zeros are no ignored voxels.
    maps = torch.zeros(1, 2, 4, 4)
    maps[:, :, ::2, ::2] = 1
    multi = MultiScaleLoss(Targets(make(sigmoid=True)))
    multi([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)], maps)
    torch.testing.assert_close(multi.soft_loss.last, torch.full((1, 2, 2, 2), 0.25))


def test_dynunets_stacked_tensor() -> None:
    network = DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2, 2, 2], deep_supervision=True, deep_supr_num=2).train()
    stacked = network(torch.randn(1, 1, 16, 16, 16))
    assert stacked.shape == (1, 3, 2, 16, 16, 16)
    labels = lesions(1, 16)
    loss = IoUCELoss(softmax=True)
    expected = sum(weight * loss(stacked[:, k], labels) for k, weight in enumerate((4 / 7, 2 / 7, 1 / 7)))
    torch.testing.assert_close(MultiScaleLoss(loss)(stacked, labels), expected)
    network.eval()
    single = network(torch.randn(1, 1, 16, 16, 16))
    torch.testing.assert_close(MultiScaleLoss(loss)(single, labels), loss(single, labels))


def test_a_label_map_without_its_channel_is_no_per_class_maps() -> None:
    # (B, C, *S) beside (B, *S) has the form of a stack (B, K, C, *S) beside per-class maps (B, C, *S).
    for size in ((8, 8, 8), (8, 8)):
        label = torch.zeros(2, *size)
        label[:, 2:5, 3:6] = 1
        for channels, loss in (
            (1, IoULoss(sigmoid=True)),
            (2, IoUCELoss(softmax=True)),
            (2, InstanceIoULoss(softmax=True)),
        ):
            logits = torch.zeros(2, channels, *size)
            text = f"but got {tuple(logits.shape)}: add the channel dimension, target.unsqueeze(1), if the"
            with pytest.raises(ValueError, match=re.escape(text)):
                MultiScaleLoss(loss)(logits, label)
            assert MultiScaleLoss(loss)(logits, label.unsqueeze(1)).isfinite()


def test_a_label_map_without_its_channel_is_nan_where_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(late_checks, "answers_late", lambda _: True)
    monkeypatch.setattr(late_checks, "ask", lambda bad, error: asked.append((bool(bad), error)))
    label = torch.zeros(2, 8, 8, 8)
    label[:, 2:5, 3:6] = 1
    assert MultiScaleLoss(IoULoss(softmax=True))(torch.zeros(2, 2, 8, 8, 8), label).isnan()
    errors = [str(error()) for bad, error in asked if bad]
    assert len(errors) == 1
    assert "add the channel dimension, target.unsqueeze(1)" in errors[0]


@pytest.mark.parametrize("kind", [{"softmax": True}, {"sigmoid": True}])
def test_a_stack_beside_per_class_maps(kind: dict[str, bool]) -> None:
    loss, stacked = IoUCELoss(**kind), torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = nn.functional.one_hot(torch.arange(2 * 64).reshape(2, 8, 8) % 4, 4).movedim(-1, 1).float()
    expected = MultiScaleLoss(loss)(list(stacked.unbind(1)), maps)
    for target in (maps, maps.half(), maps.bool(), 0.9 * maps + 0.025):
        value = MultiScaleLoss(loss)(stacked, target)
        torch.testing.assert_close(value, MultiScaleLoss(loss)(list(stacked.unbind(1)), target))
    torch.testing.assert_close(MultiScaleLoss(loss)(stacked, maps), expected)
    without = maps.clone()
    without[..., 3:] = 0  # as at ignored voxels, or behind the border of the image
    for options in ({}, {"ignore_index": 255}):
        padded = MultiScaleLoss(IoUCELoss(**options, **kind))
        torch.testing.assert_close(padded(stacked, without), padded(list(stacked.unbind(1)), without))
    pairs = torch.tensor([[True, True, True, False], [True] * 4])
    for target in (torch.where(pairs[..., None, None], maps, 0), torch.where(pairs[..., None, None], maps, torch.nan)):
        known = None if target.isnan().any() else pairs
        expected = MultiScaleLoss(loss)(list(stacked.unbind(1)), target, known)
        torch.testing.assert_close(MultiScaleLoss(loss)(stacked, target, known), expected)


@pytest.mark.parametrize("downsample", ["area", "max", "nearest"])
@pytest.mark.parametrize("value", [-1.0, 0.5, 3.0])
def test_a_wrong_label_that_no_output_of_full_size_sees(downsample: str, value: float) -> None:
    label = torch.zeros(1, 1, 8, 8)
    label[..., 1, 1] = value  # which neither the middle of a coarse voxel nor its largest value need show
    loss = MultiScaleLoss(IoULoss(softmax=True), downsample=downsample)
    with pytest.raises(ValueError, match=re.escape(f"but got {value:g}")):
        loss([torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)], label)
    with pytest.raises(ValueError, match=re.escape(f"but got {value:g}")):
        MultiScaleLoss(IoULoss(softmax=True), [0, 1], downsample)([torch.zeros(1, 3, n, n) for n in (8, 4)], label)
    ignoring = MultiScaleLoss(IoULoss(softmax=True, ignore_index=-1), downsample=downsample)
    assert ignoring([torch.zeros(1, 3, 4, 4)], label.clamp_max(0).floor()).isfinite()


@pytest.mark.parametrize("downsample", ["area", "max", "nearest"])
def test_no_voxels_at_any_scale(downsample: str) -> None:
    for channels in (1, 3):
        outputs = [
            torch.zeros(2, channels, 0, 4, requires_grad=True),
            torch.zeros(2, channels, 0, 2, requires_grad=True),
        ]
        for maps in (1, channels):
            value = MultiScaleLoss(IoUCELoss(sigmoid=True), downsample=downsample)(outputs, torch.zeros(2, maps, 0, 4))
            assert value.isfinite()
            value.backward()


def test_the_lovasz_hinge_takes_hard_labels_of_one_channel() -> None:
    outputs, labels = outputs_of((2, 1, 8, 8, 8)), some_labels().clamp_max(1)
    with pytest.raises(ValueError, match="with LovaszHingeLoss, which needs hard labels"):
        MultiScaleLoss(CompoundLoss([LovaszHingeLoss()]))
    multi = MultiScaleLoss(LovaszHingeLoss(), downsample="max")
    value = multi(outputs, labels)
    for slope in torch.autograd.grad(value, outputs):
        assert slope.abs().sum() > 0
    coarse = nn.functional.max_pool3d(labels, 2)
    torch.testing.assert_close(multi.last_terms["scale_1"], LovaszHingeLoss()(outputs[1], coarse).detach())


@pytest.mark.parametrize("downsample", ["area", "max", "nearest"])
@pytest.mark.parametrize("channels", [1, 2])
def test_precomputed_regions_serve_the_finest_scale(channels: int, downsample: str) -> None:
    outputs, labels = outputs_of((2, channels, 8, 8, 8)), some_labels().clamp_max(1)
    precomputed = torch.stack([ComponentRegionsd("x")({"x": label})["x"] for label in labels])
    multi = MultiScaleLoss(InstanceIoULoss(sigmoid=True), downsample=downsample)
    torch.testing.assert_close(multi(outputs, precomputed), multi(outputs, labels))


def test_weights() -> None:
    outputs, labels = outputs_of(), some_labels()
    loss = IoULoss(softmax=True)
    first = MultiScaleLoss(loss, weights=[2.0, 0.0, 0.0])
    torch.testing.assert_close(first(outputs, labels), 2 * loss(outputs[0], labels))
    nothing = MultiScaleLoss(loss, weights=[0.0, 0.0, 0.0])(outputs, labels)
    assert nothing.item() == 0
    nothing.backward()


def test_errors() -> None:
    outputs, labels = outputs_of(), some_labels()
    loss = IoULoss(softmax=True)
    with pytest.raises(ValueError, match="`downsample` to be one of 'area', 'max', 'nearest', but got 'linear'"):
        MultiScaleLoss(loss, downsample="linear")
    with pytest.raises(ValueError, match="`weights` to be a finite number at least 0, but got -1"):
        MultiScaleLoss(loss, weights=[1.0, -1])
    with pytest.raises(ValueError, match=r"Expected `weights` to hold at least one factor, but got \[\]: give one"):
        MultiScaleLoss(loss, weights=[])
    with pytest.raises(ValueError, match=re.escape("one factor per scale (3), but got 2: give as many")):
        MultiScaleLoss(loss, weights=[1.0, 1.0])(outputs, labels)
    with pytest.raises(TypeError, match="`loss` to be a torch module, but got str"):
        MultiScaleLoss("IoULoss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one output, but got an empty list"):
        MultiScaleLoss(loss)([], labels)
    with pytest.raises(TypeError, match="a tensor or a list of tensors, but got NoneType"):
        MultiScaleLoss(loss)(None, labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`target` to be a tensor, but got ndarray: convert it with torch\.as_tensor"):
        MultiScaleLoss(loss)(outputs, labels.numpy())
    with pytest.raises(ValueError, match=re.escape("no larger than the target (3,), but got (2, 3, 8, 8, 8)")):
        MultiScaleLoss(loss)(outputs, torch.zeros(3))
    with pytest.raises(
        ValueError, match=re.escape("no larger than the target (2, 1, 4, 4, 4), but got (2, 3, 8, 8, 8)")
    ):
        MultiScaleLoss(loss)(outputs, labels[..., ::2, ::2, ::2])


def test_copies_and_config() -> None:
    outputs, labels = outputs_of(), some_labels()
    item = {
        "_target_": "monai_iou.MultiScaleLoss",
        "loss": {"_target_": "monai_iou.IoULoss", "softmax": True},
        "downsample": "max",
    }
    loss = ConfigParser({"loss": item}).get_parsed_content("loss")
    value = loss(outputs, labels)
    for twin in (
        copy.deepcopy(MultiScaleLoss(IoULoss(softmax=True), downsample="max")),
        pickle.loads(pickle.dumps(loss)),
    ):
        assert twin(outputs, labels) == value


def with_regions(labels: Tensor, classes: int) -> Tensor:
    find = ComponentRegionsd("x", num_classes=max(classes, 2))
    return torch.stack([find({"x": label})["x"] for label in labels])


@pytest.mark.parametrize("downsample", ["area", "max", "nearest"])
@pytest.mark.parametrize(("classes", "activation"), [(1, "sigmoid"), (2, "softmax"), (3, "sigmoid"), (3, "softmax")])
@pytest.mark.parametrize("empty", [False, True])
def test_a_limit_of_regions_changes_no_scale(classes: int, activation: str, downsample: str, empty: bool) -> None:
    """The coarser labels have no regions, whatever the limit says of the target: fractions look like them."""
    labels = some_labels().clamp_max(max(classes - 1, 1)) * (not empty)
    values = {}
    for limit in (None, 50):
        outputs = outputs_of((2, classes, 8, 8, 8))
        instance = InstanceIoULoss(max_regions=limit, **{activation: True})
        loss = MultiScaleLoss(instance, downsample=downsample)
        value = loss(outputs, with_regions(labels, classes))
        values[limit] = list(loss.last_terms.values()), torch.autograd.grad(value, outputs)
    torch.testing.assert_close(values[50], values[None])


@pytest.mark.parametrize("form", ["labels", "regions", "maps"])
@pytest.mark.parametrize("options", [{}, {"batch": True}, {"cells": "both"}, {"max_regions": 9}], ids=str)
def test_the_same_classes_have_cells_at_every_scale(form: str, options: dict[str, Any]) -> None:
    """Lesions of whole coarse voxels: every way of downsampling gives the same labels, in whatever form."""
    if "max_regions" in options and form == "maps":
        pytest.skip("it would read maps as regions")
    labels = torch.zeros(2, 1, 8, 8)
    labels[0, ..., 2:4, 2:4] = labels[0, ..., 6:8, 4:6] = labels[1, ..., 0:6, 2:4] = 1
    outputs = outputs_of((2, 2, 8, 8), scales=2)
    maps = torch.cat([1 - labels, labels], 1)
    target = {"labels": labels, "regions": with_regions(labels, 2), "maps": maps}[form]
    values = {}
    for downsample in ("area", "max", "nearest"):
        instance = InstanceIoULoss(sigmoid=True, lambda_global=0, **options)
        values[downsample] = MultiScaleLoss(instance, weights=[0.0, 1.0], downsample=downsample)(outputs, target)
    coarse = maps[..., ::2, ::2] if form == "maps" else labels[..., ::2, ::2]
    alone = InstanceIoULoss(sigmoid=True, lambda_global=0, spacing=2.0, **options)
    for value in values.values():
        torch.testing.assert_close(value, alone(outputs[1], coarse))
    assert form != "maps" or values["area"] != alone(outputs[1], labels[..., ::2, ::2])  # cells of the background too
