"""What every loss promises, whatever its formula: one suite over all of them."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import monai.losses
import pytest
import torch
from loss_cases import (
    CASES,
    EXACT,
    GLOBAL,
    HARD,
    REGION,
    SHAPE,
    Case,
    every_loss,
    gradient,
    one_hot,
    over,
    pair,
)
from monai.bundle import ConfigParser
from monai.metrics import LossMetric
from torch import Tensor, nn

import monai_iou
from monai_iou import (
    FocalTverskyLoss,
    LogTverskyLoss,
    use_kernel,
)


@every_loss
def test_bounds(case: Case) -> None:
    for seed in range(3):
        value = case(softmax=True)(*pair(seed=seed)).item()
        assert value > 0
        assert value <= 1 or not case.bounded


@every_loss
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_perfect_prediction_is_zero(case: Case, activation: str) -> None:
    logits, labels = pair()
    maps = one_hot(labels, 3)
    loss = case(**{activation: True})
    perfect = (maps * 2 - 1) * 60
    value = loss(perfect, maps)
    assert gradient(loss, perfect, maps).isfinite().all()
    if case.zero_when_perfect:
        assert abs(value.item()) < (1e-6 if case.exact else 1 / 1024)
        assert loss(logits, maps) > value


@over(HARD)
def test_hard_prediction_is_one_minus_iou(case: Case) -> None:
    _, labels = pair(seed=1)
    _, found = pair(seed=2)
    expected = []
    for image in range(2):
        for label in range(3):
            reference, prediction = set(), set()
            for voxel, (y, p) in enumerate(
                zip(labels[image].flatten().tolist(), found[image].flatten().tolist(), strict=True)
            ):
                reference |= {voxel} if y == label else set()
                prediction |= {voxel} if p == label else set()
            expected.append(1 - len(reference & prediction) / len(reference | prediction))
    options = {"smooth_nr": 0.0, "smooth_dr": 0.0} if case.smoothing else {}
    value = case(**options)(one_hot(found, 3), labels)
    assert value.item() == pytest.approx(sum(expected) / 6, abs=1e-6)


@pytest.mark.parametrize("squared", [False, True])
@over({name: case for name, case in REGION.items() if name not in ("iou_power", "iou_ce", "iou_focal", "compound")})
def test_soft_label_is_zero_only_at_the_label(case: Case, squared: bool) -> None:
    soft = pair(seed=3)[0].softmax(1)
    loss = case(soft_label=True)
    if squared:
        if isinstance(loss, FocalTverskyLoss) and loss.alpha != loss.beta:
            with pytest.raises(ValueError, match="to be equal with soft_label=True and a `power` of 2"):
                case(soft_label=True, squared_pred=True)
            return
        loss = case(soft_label=True, squared_pred=True)
    assert abs(loss(soft, soft).item()) < 1e-5
    assert loss(soft.roll(1, 2), soft) > 0.01
    assert loss(soft.roll(1, 2), soft) > loss((soft + soft.roll(1, 2)) / 2, soft)


@pytest.mark.parametrize("kind", [FocalTverskyLoss, LogTverskyLoss])
@pytest.mark.parametrize(("alpha", "beta", "power"), [(0.3, 0.7, 2), (0.5, 0.5, 2), (0.6, 0.4, 1.5), (0.7, 0.35, 1.5)])
def test_no_wrong_prediction_has_a_lower_tversky_loss(kind: Any, alpha: float, beta: float, power: float) -> None:
    labels = (torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    loss = kind(alpha, beta, 1.0, power=power)
    perfect = loss(labels, labels).item()
    assert perfect == pytest.approx(0, abs=1e-5)
    for inside in (0.999, 0.9, 0.5, 0.1):
        assert loss(labels * inside, labels).item() > perfect + 1e-7


@pytest.mark.parametrize("kind", [FocalTverskyLoss, LogTverskyLoss])
def test_powers_for_which_wrong_predictions_would_be_better_are_refused(kind: Any) -> None:
    expected = (
        "Expected `beta` to be at least 0.7, which is `alpha` times (q - 1) with a `power` q of 2, but got 0.3: leave "
        "`power` at 1 and squared_pred out, or raise `beta`, because wrong predictions would have a lower loss than "
        "right ones."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        kind(0.7, 0.3, squared_pred=True)
    changed = kind(0.3, 0.7, squared_pred=True)
    changed.alpha, changed.beta = 0.7, 0.3
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        changed(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
    expected = (
        "Expected `alpha` and `beta` to be equal with soft_label=True and a `power` of 2, but got 0.3 and 0.7: leave "
        "`power` at 1 and squared_pred out, or give both one value."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        kind(soft_label=True, squared_pred=True)


@every_loss
def test_equal_weights_change_nothing(case: Case) -> None:
    logits, labels = pair()
    plain = case(softmax=True)(logits, labels)
    torch.testing.assert_close(case(softmax=True, weight=[1.0, 1.0, 1.0])(logits, labels), plain)
    assert not torch.isclose(case(softmax=True, weight=[0.1, 1.0, 3.0])(logits, labels), plain)


@over(GLOBAL)
def test_the_order_of_voxels_and_images_changes_nothing(case: Case) -> None:
    logits, labels = pair()
    loss = case(softmax=True)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    shuffled = (logits.flatten(2)[..., order].flip(0), labels.flatten(2)[..., order].flip(0))
    torch.testing.assert_close(loss(*shuffled), loss(logits, labels))


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32, torch.float64])
def test_label_map_equals_one_hot(case: Case, dtype: torch.dtype) -> None:
    logits, labels = pair()
    loss = case(softmax=True)
    torch.testing.assert_close(loss(logits, labels.to(dtype)), loss(logits, one_hot(labels, 3)))


@over(GLOBAL)
@pytest.mark.parametrize("form", ["label", "maps"])
def test_ignored_voxels_have_no_effect(case: Case, form: str) -> None:
    logits, labels = pair((2, 3, 60))
    ignored = torch.zeros(60, dtype=torch.bool)
    ignored[::4] = True
    loss = case(softmax=True, ignore_index=255)
    expected = case(softmax=True)(logits[..., ~ignored], labels[..., ~ignored])
    target = one_hot(labels, 3).masked_fill(ignored, 0) if form == "maps" else labels.masked_fill(ignored, 255)
    for junk in (0.0, 1e4, float("nan")):
        spoiled = logits.masked_fill(ignored, junk)
        torch.testing.assert_close(loss(spoiled, target), expected)
        slope = gradient(loss, spoiled, target)
        assert (slope[..., ignored] == 0).all()
        assert slope[..., ~ignored].abs().sum() > 0


@every_loss
def test_all_ignored_is_finite_with_zero_gradient(case: Case) -> None:
    logits, labels = pair()
    loss = case(softmax=True, ignore_index=255)
    nothing = torch.full_like(labels, 255)
    assert loss(logits, nothing).isfinite()
    assert (gradient(loss, logits, nothing) == 0).all()


@over(EXACT)
@pytest.mark.parametrize(
    ("kernel", "fast"),  # the fast mode looks along random directions, and not along every axis
    [pytest.param("reference", False, marks=pytest.mark.slow), pytest.param("auto", False, marks=pytest.mark.slow),
     ("auto", True)],
)  # fmt: skip
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradcheck(case: Case, kernel: str, fast: bool, activation: str) -> None:
    logits, labels = pair((2, 3, 3, 4), dtype=torch.float64)
    assert all((labels == label).flatten(1).any(1).all() for label in range(3))
    loss = case(**{activation: True})
    with use_kernel(kernel):
        maps = one_hot(labels, 3).double()
        assert torch.autograd.gradcheck(lambda x: loss(x, maps), logits.requires_grad_(), fast_mode=fast)


@every_loss
def test_half_precision_of_a_large_volume(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 1, 128, 128, 128, generator=generator).half().requires_grad_()
    labels = torch.zeros(1, 1, 128, 128, 128, dtype=torch.uint8)
    labels[..., 60:62, 60:62, 60:62] = 1
    value = case(sigmoid=True)(logits, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(value, case(sigmoid=True)(logits.float(), labels), rtol=1e-4, atol=1e-5)


@every_loss
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("present", [True, False])
def test_huge_logits_and_empty_foreground(case: Case, activation: str, present: bool) -> None:
    logits, labels = pair()
    labels = labels if present else torch.zeros_like(labels)
    maps = one_hot(labels, 3)
    for size in (1e-3, 1e4):
        for spread in (logits.sign(), maps * 2 - 1, 1 - maps * 2):
            loss = case(**{activation: True})
            assert loss(spread * size, maps).isfinite()
            assert gradient(loss, spread * size, maps).isfinite().all()


@every_loss
def test_one_dimension_two_dimensions_and_no_image(case: Case) -> None:
    loss = case(softmax=True)
    for shape in ((2, 3, 40), (2, 3, 8, 5)):
        assert loss(*pair(shape)).isfinite()
    logits, labels = pair()
    assert gradient(loss, logits[:0], labels[:0]).shape == (0, *SHAPE[1:])


@every_loss
@pytest.mark.parametrize("form", ["label", "maps"])
def test_inputs_are_left_as_they_were(case: Case, form: str) -> None:
    logits, labels = pair()
    target = one_hot(labels, 3) if form == "maps" else labels.float()
    before = logits.clone(), target.clone()
    gradient(case(softmax=True), logits, target)
    assert torch.equal(logits, before[0])
    assert torch.equal(target, before[1])


@every_loss
def test_works_in_monai_wrappers(case: Case) -> None:
    logits, labels = pair((2, 3, 8, 8, 8))
    loss = case(softmax=True)
    plain = loss(logits, labels)
    coarse = nn.functional.avg_pool3d(logits, 2)
    deep = monai.losses.DeepSupervisionLoss(case(softmax=True), weights=[1.0, 0.0])
    torch.testing.assert_close(deep([logits, coarse], labels.float()), plain)
    masked = monai.losses.MaskedLoss(loss=loss)
    everywhere = torch.ones(2, 1, 8, 8, 8)
    torch.testing.assert_close(masked(logits, one_hot(labels, 3), everywhere), plain)
    metric = LossMetric(loss)
    metric(logits, labels)
    torch.testing.assert_close(torch.as_tensor(metric.aggregate()).squeeze(), plain)


@every_loss
def test_copies_behave_alike(case: Case) -> None:
    logits, labels = pair()
    loss = case(softmax=True, weight=[0.5, 1.0, 2.0])
    value = loss(logits, labels)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin(logits, labels) == value
        assert twin.state_dict().keys() == loss.state_dict().keys()
        assert all(torch.equal(twin.state_dict()[name], kept) for name, kept in loss.state_dict().items())


@pytest.mark.slow
@every_loss
def test_torch_compile(case: Case) -> None:
    logits, labels = pair()
    loss = case(softmax=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, raised while it traces
        compiled = torch.compile(lambda x, y: loss(x, y), backend="aot_eager")
        x = logits.clone().requires_grad_()
        value = compiled(x, labels)
        (slope,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(value, loss(logits, labels))
    torch.testing.assert_close(slope, gradient(loss, logits, labels))


@pytest.mark.parametrize("prefix", ["", "monai_iou."], ids=["short", "full"])
@pytest.mark.parametrize("name", [case.make.__name__ for case in CASES.values() if isinstance(case.make, type)])
def test_config_finds_the_loss(name: str, prefix: str) -> None:
    parser = ConfigParser({"imports": ["$import monai_iou"], "loss": {"_target_": prefix + name, "softmax": True}})
    assert type(parser.get_parsed_content("loss")) is getattr(monai_iou, name)


@every_loss
def test_a_metatensor_gives_a_plain_tensor(case: Case) -> None:
    from monai.data.meta_tensor import MetaTensor

    logits, labels = pair()
    value = case(softmax=True)(MetaTensor(logits), MetaTensor(labels))
    assert type(value) is Tensor
    torch.testing.assert_close(value, case(softmax=True)(logits, labels))
