"""Compound losses: the terms' shapes, types and weights, and the arguments that the variants share."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from torch import nn

from monai_iou import (
    AffinityLoss,
    AttentionSupervisionLoss,
    ComponentRegionsd,
    CompoundLoss,
    ContextAttentionLoss,
    FocalIoULoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoUFocalLoss,
    IoULoss,
    LogIoULoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    MultiScaleLoss,
    WeightedCrossEntropyLoss,
    use_kernel,
)
from monai_iou.planning.plan import make_plan
from monai_iou.voxels import passes
from monai_iou.voxels.inputs import Voxels
from monai_iou.workflow.variants import build_loss


def test_terms_of_different_shapes_are_refused() -> None:
    logits, labels = torch.randn(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    cases: list[dict[str, Any]] = [{"batch": True}, {"include_background": False}]
    for options in cases:
        for make in (IoUCELoss, IoUFocalLoss):
            with pytest.raises(ValueError, match="`reduction` to be 'mean' or 'sum' with batch=True or"):
                make(softmax=True, reduction="none", **options)
    shares = IoUCELoss(softmax=True, reduction="none")
    parts = IoULoss(softmax=True, reduction="none"), WeightedCrossEntropyLoss(reduction="none")
    torch.testing.assert_close(shares(logits, labels), parts[0](logits, labels) + parts[1](logits, labels))
    mixed = CompoundLoss([IoULoss(softmax=True, reduction="none"), WeightedCrossEntropyLoss()])
    expected = re.escape("terms of one shape, but got (2, 3, 1, 1) of iou, () of weighted_cross_entropy: set")
    with pytest.raises(ValueError, match=expected):
        mixed(logits, labels)


def test_a_compound_of_other_losses_leaves_the_checks_to_them() -> None:
    loss = CompoundLoss([nn.MSELoss(), nn.L1Loss()])
    assert loss(torch.ones(3), torch.zeros(3)) == 2


SHARED = [True, False, False, True, None, False, "sum", 0.5, 0.25, True, [1.0, 2.0], False, 255]
INSTANCE = ["cells", "alpha", "term", "cell_weight"]
INSTANCE += ["lambda_global", "lambda_instance", "global_loss", "connectivity", "spacing", "max_regions"]
OWN: list[tuple[Any, dict[str, Any], list[str]]] = [
    (LogIoULoss, {"gamma": 0.5}, []),
    (FocalIoULoss, {"gamma": 0.5}, []),
    (FocalTverskyLoss, {"alpha": 0.2, "beta": 0.9, "gamma": 0.5}, []),
    (GeneralizedIoULoss, {"w_type": "simple"}, []),
    (IoUCELoss, {}, ["lambda_iou", "lambda_ce", "gamma", "label_smoothing", "pos_weight"]),
    (IoUFocalLoss, {"gamma": 0.5}, ["lambda_iou", "lambda_focal", "label_smoothing", "pos_weight"]),
    (InstanceIoULoss, {"regions": "blob"}, INSTANCE),
]


@pytest.mark.parametrize(("make", "own", "by_name"), OWN, ids=lambda value: getattr(value, "__name__", ""))
def test_variants_take_their_own_arguments_first(make: Any, own: dict[str, Any], by_name: list[str]) -> None:
    parameters = inspect.signature(make).parameters
    shared = inspect.signature(IoULoss).parameters
    assert list(parameters) == [*own, *shared, *by_name]
    assert all(parameters[name].default == shared[name].default for name in shared)
    assert all(parameters[name].kind == shared[name].kind for name in shared)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in by_name)
    values = [value if make is not InstanceIoULoss or value != "sum" else "mean" for value in SHARED]
    logits, labels = torch.randn(2, 2, 6, 6), torch.zeros(2, 1, 6, 6)
    labels[..., 1:3, 1:3] = 1
    named = make(**own, **dict(zip(shared, values, strict=False)))
    torch.testing.assert_close(make(*own.values(), *values)(logits, labels), named(logits, labels))


def test_a_wrong_argument_names_the_class_it_was_given_to() -> None:
    with pytest.raises(TypeError, match=re.escape("arguments of LogIoULoss (gamma, include_background, ")):
        LogIoULoss(sofmax=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"of InstanceIoULoss .*, but got an unexpected keyword argument 'blob'"):
        InstanceIoULoss(blob=True)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"arguments of ContextAttentionLoss .*, but got an unexpected keyword argument"
    ):
        ContextAttentionLoss(context=5.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"arguments of FocalIoULoss .*, but got too many positional arguments"):
        FocalIoULoss(2.0, *SHARED, 1.0)


FOCAL_ALPHA = (
    "for the `alpha` of a focal loss, write `pos_weight=alpha / (1 - alpha)` with `sigmoid=True` and multiply "
)
TVERSKY_ALPHA = "or use FocalTverskyLoss for that of a Tversky loss"
SUGGESTIONS = [
    (IoUCELoss, "lambda_dice", "write `lambda_iou`"),
    (IoUCELoss, "lambda_focal", "write `lambda_ce`"),
    (IoUFocalLoss, "lambda_ce", "write `lambda_focal`"),
    (IoULoss, "jaccard", "leave it out, because this loss always computes the IoU (Jaccard)"),
    (IoUCELoss, "jaccard", "leave it out, because this loss always computes the IoU (Jaccard)"),
    (IoULoss, "sigmoid_", "write `sigmoid`"),
    (IoULoss, "weights", "write `weight`"),
    (IoULoss, "alpha", "use FocalTverskyLoss, which weights false positives by `alpha`"),
    (IoUFocalLoss, "alpha", f"{FOCAL_ALPHA}`lambda_focal` by 1 - alpha, {TVERSKY_ALPHA}"),
    (IoUCELoss, "alpha", f"{FOCAL_ALPHA}`lambda_ce` by 1 - alpha, {TVERSKY_ALPHA}"),
    (WeightedCrossEntropyLoss, "alpha", f"{FOCAL_ALPHA}the loss by 1 - alpha, {TVERSKY_ALPHA}"),
    (IoULoss, "smooth", "write `smooth_nr` and `smooth_dr`"),
    (LogIoULoss, "sofmax", "write `softmax`"),
    (FocalIoULoss, "gama", "write `gamma`"),
    (FocalTverskyLoss, "apha", "write `alpha`"),
    (GeneralizedIoULoss, "w_typ", "write `w_type`"),
    (LovaszSoftmaxLoss, "ignore_idx", "write `ignore_index`"),
    (LovaszHingeLoss, "per_image", "write `batch=False`"),
    (WeightedCrossEntropyLoss, "ce_weight", "write `weight`"),
    (CompoundLoss, "weight", "write `weights`"),
    (MultiScaleLoss, "down_sample", "write `downsample`"),
    (InstanceIoULoss, "region", "write `regions`"),
    (AffinityLoss, "num_clases", ""),
    (ContextAttentionLoss, "lambda_", ""),
    (AttentionSupervisionLoss, "lambda_atention", "write `lambda_attention`"),
]


@pytest.mark.parametrize(("make", "name", "remedy"), SUGGESTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_mistyped_argument_names_the_right_one(make: Any, name: str, remedy: str) -> None:
    names = ", ".join(inspect.signature(make).parameters)
    got = f"an unexpected keyword argument '{name}'" + (f": {remedy}." if remedy else "")
    with pytest.raises(TypeError, match=re.escape(f"Expected arguments of {make.__name__} ({names}), but got {got}")):
        make(**{name: 1})


def test_metatensors_give_a_plain_tensor_through_monais_losses() -> None:
    logits = MetaTensor(torch.randn(1, 2, 8, 8)).requires_grad_()
    labels = MetaTensor(torch.zeros(1, 1, 8, 8))
    labels[..., 2:4, 2:4] = 1
    theirs = DiceLoss(softmax=True, to_onehot_y=True)
    assert type(theirs(logits, labels)) is MetaTensor
    losses: list[Any] = [
        CompoundLoss([theirs, IoULoss(softmax=True)]),
        MultiScaleLoss(theirs),
        MultiScaleLoss(theirs, weights=[0.0]),
        InstanceIoULoss(global_loss=theirs, softmax=True),
        AttentionSupervisionLoss(theirs, IoULoss()),
    ]
    for loss in losses:
        value = loss(logits, labels)
        assert type(value) is torch.Tensor
        assert all(type(term) is torch.Tensor for term in loss.last_terms.values())
        value.backward()
    coarse = MetaTensor(torch.randn(1, 2, 4, 4))
    assert type(MultiScaleLoss(theirs)([logits, coarse], labels)) is torch.Tensor
    pair = (logits, MetaTensor(torch.rand(1, 2, 8, 8)))
    assert type(AttentionSupervisionLoss(theirs, theirs)(pair, labels)) is torch.Tensor


@pytest.mark.parametrize(
    "loss",
    [
        CompoundLoss([IoULoss(softmax=True)]),
        CompoundLoss([IoULoss(softmax=True), DiceLoss(softmax=True, to_onehot_y=True)]),
        InstanceIoULoss(softmax=True, lambda_global=0),
        InstanceIoULoss(softmax=True, cells="both", lambda_global=0, alpha=1.0),
        MultiScaleLoss(IoULoss(softmax=True)),
        AttentionSupervisionLoss(IoULoss(softmax=True), IoULoss()),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_what_becomes_of_the_loss_changes_no_term(loss: Any) -> None:
    value = loss(torch.zeros(1, 2, 4, 4).requires_grad_(), torch.eye(4, dtype=torch.long)[None, None])
    before = {name: term.clone() for name, term in loss.last_terms.items()}
    value /= 4  # as for the gradients of several batches
    assert {name: term.item() for name, term in loss.last_terms.items()} == {k: v.item() for k, v in before.items()}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_weight_is_void_on_one_channel_of_an_iou_loss(reduction: str) -> None:
    logits, labels = torch.randn(2, 1, 4, 4), torch.ones(2, 1, 4, 4)
    plain = IoULoss(sigmoid=True, reduction=reduction)(logits, labels)
    for weight in (3.0, [3.0], [1.0, 2.0]):
        torch.testing.assert_close(IoULoss(sigmoid=True, reduction=reduction, weight=weight)(logits, labels), plain)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ranks_join_a_mean_alone(reduction: str) -> None:
    expected = f"`reduction` to be 'mean' with sync_batch=True, but got '{reduction}': set reduction='mean', because"
    with pytest.raises(ValueError, match=expected):
        WeightedCrossEntropyLoss(reduction=reduction, sync_batch=True)
    with pytest.raises(ValueError, match="`reduction` to be 'mean'"):
        IoUCELoss(softmax=True, reduction=reduction, batch=True, sync_batch=True)


LOVASZ_OPTIONS: list[dict[str, Any]] = [
    {"softmax": True},
    {"softmax": True, "batch": True, "include_background": False, "ignore_index": 255},
    {"sigmoid": True, "ignore_index": 1},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", LOVASZ_OPTIONS, ids=str)
def test_lovasz_reads_the_voxels_once_with_what_is_beside_it(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 9, 8, 7).to(dtype)
    labels = torch.randint(0, 3, (2, 1, 9, 8, 7))
    if options.get("ignore_index") == 255:
        labels[:, :, :2] = 255
    shared = {name: options[name] for name in ("sigmoid", "ignore_index") if name in options}
    losses = [IoULoss(**options), LovaszSoftmaxLoss(**options), WeightedCrossEntropyLoss([1.0, 2.0, 3.0], **shared)]
    weights = [1.0, 0.5, 2.0]

    def gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    apart = gradient(lambda x: sum(w * loss(x, labels) for w, loss in zip(weights, losses, strict=True)))
    readings = []
    tiles = Voxels.tiles
    monkeypatch.setattr(Voxels, "tiles", lambda self, size: readings.append(size) or tiles(self, size))
    together = gradient(lambda x: CompoundLoss(losses, weights)(x, labels))
    assert len(readings) == 2, "one in forward, one in backward"
    precision = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(together[0], apart[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together[1], apart[1], rtol=precision, atol=precision * apart[1].abs().max().item())


def test_many_terms_make_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[nn.Module] = [IoULoss(softmax=True), FocalTverskyLoss(softmax=True), GeneralizedIoULoss(softmax=True)]
    losses += [LogIoULoss(softmax=True), FocalIoULoss(softmax=True), WeightedCrossEntropyLoss()]
    readings = []
    pick = passes.pick_kernel
    monkeypatch.setattr(passes, "pick_kernel", lambda *pass_of: readings.append(1) or pick(*pass_of))
    CompoundLoss(losses)(torch.randn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4))
    assert len(readings) == 1


@pytest.mark.parametrize("kernel", ["reference", "compiled"])
def test_other_kernels_leave_lovasz_a_pass_of_its_own(kernel: str) -> None:
    logits, labels = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 1, 4, 4))
    loss = CompoundLoss([LovaszSoftmaxLoss(softmax=True), WeightedCrossEntropyLoss()])
    with use_kernel(kernel):
        found = loss(logits, labels)
    torch.testing.assert_close(found, loss(logits, labels))


def with_regions(labels: torch.Tensor, channels: int) -> torch.Tensor:
    find = ComponentRegionsd("x", num_classes=max(channels, 2))
    return torch.stack([find({"x": label})["x"] for label in labels])


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("limit", [None, 50])
@pytest.mark.parametrize(("channels", "activation"), [(1, "sigmoid"), (2, "softmax"), (3, "softmax"), (3, "sigmoid")])
def test_only_an_instance_loss_sees_precomputed_regions(
    channels: int, activation: str, limit: int | None, empty: bool
) -> None:
    torch.manual_seed(0)
    logits, fine = torch.randn(2, channels, 8, 8, 8), torch.zeros(2, 1, 8, 8, 8)
    if not empty:
        fine[:, :, 1:3, 1:3, 1:4] = 1
        fine[:, :, 6, 6, 4:6] = max(1, channels - 1)
    options: dict[str, Any] = {activation: True}
    instance = InstanceIoULoss(max_regions=limit, **options)
    target = with_regions(fine, channels)
    others: list[nn.Module] = [IoUCELoss(**options), LovaszSoftmaxLoss(bins=None, **options)]
    others += [MultiScaleLoss(IoULoss(**options)), DiceCELoss(to_onehot_y=channels > 1, **options)]
    nested = CompoundLoss([CompoundLoss([IoULoss(**options), instance]), DiceLoss(to_onehot_y=channels > 1, **options)])
    for loss in (CompoundLoss([instance, *others]), CompoundLoss([*others, IoULoss(**options), instance]), nested):
        expected = loss(logits, fine)
        torch.testing.assert_close(loss(logits, target), expected)
        outputs = [logits, torch.randn(2, channels, 4, 4, 4)]
        if loss is nested or limit is None:
            several = MultiScaleLoss(nested)
            torch.testing.assert_close(several(outputs, target), several(outputs, fine))
            whole = CompoundLoss([MultiScaleLoss(instance), MultiScaleLoss(IoULoss(**options))])
            torch.testing.assert_close(whole(outputs, target), whole(outputs, fine))
            stacked = torch.stack([logits, logits / 2], 1)
            torch.testing.assert_close(whole(stacked, target), whole(stacked, fine))
    plan = make_plan(None, [], [32, 32, 32], base_channels=4)
    if (channels, activation) == (2, "softmax"):
        loss = build_loss(CompoundLoss([InstanceIoULoss(softmax=True), others[0]]), plan, instance=True)
        torch.testing.assert_close(loss(logits, target), loss(logits, fine))


def test_a_term_that_takes_no_label_map_is_not_trained_on_numbers_of_regions() -> None:
    label = torch.zeros(1, 1, 6, 6)
    label[..., 1:3, 1:3] = label[..., 5, 5] = 1
    terms: list[nn.Module] = [DiceLoss(softmax=True), FocalLoss(to_onehot_y=False)]
    for term in terms:
        with pytest.raises((AssertionError, ValueError), match="ground truth has different shape"):
            CompoundLoss([InstanceIoULoss(softmax=True), term])(torch.randn(1, 2, 6, 6), with_regions(label, 2))


@pytest.mark.parametrize(("make", "own"), [(IoUCELoss, "lambda_ce"), (IoUFocalLoss, "lambda_focal")])
def test_a_wrong_factor_is_named_as_it_was_given(make: Any, own: str) -> None:
    for name in ("lambda_iou", own):
        with pytest.raises(ValueError, match=f"^Expected `{name}` to be a finite number at least 0, but got -1: "):
            make(softmax=True, **{name: -1})
        with pytest.raises(TypeError, match=f"^Expected `{name}` to be a number, but got str: "):
            make(softmax=True, **{name: "1"})
        assert make(softmax=True, **{name: 0}).weights.count(0) == 1
