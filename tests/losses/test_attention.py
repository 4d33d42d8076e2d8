"""Attention maps and context priors: the losses, the networks that feed them, and training with both."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data.meta_tensor import MetaTensor
from monai.engines.trainer import SupervisedTrainer
from monai.inferers.utils import sliding_window_inference
from monai.networks.nets.attentionunet import AttentionUnet
from monai.networks.utils import convert_to_torchscript
from scipy import ndimage
from torch import Tensor, nn

from monai_iou import (
    AffinityLoss,
    AttentionMapUnet,
    AttentionSupervisionLoss,
    ContextAttentionLoss,
    ContextPriorHead,
    IoUCELoss,
    IoULoss,
    MultiScaleLoss,
)
from monai_iou.losses.attention import dilate


def lesion(shape: tuple[int, ...] = (16, 14, 12), seed: int = 0) -> Tensor:
    labels = torch.zeros(1, 1, *shape, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        corner = [int(torch.randint(0, side - 2, (), generator=generator)) for side in shape]
        labels[(0, 0, *[slice(c, c + 2) for c in corner])] = 1
    return labels


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.5, 1.2), (0.8, 5.0, 0.8)])
@pytest.mark.parametrize("distance", [0.0, 1.0, 2.9, 6.0, 100.0])
def test_dilation_is_that_of_a_distance_transform(spacing: tuple[float, ...], distance: float) -> None:
    mask = lesion() > 0
    expected = ndimage.distance_transform_edt(~mask[0, 0].numpy(), sampling=spacing) <= distance + 1e-6
    np.testing.assert_array_equal(dilate(mask, distance, spacing)[0, 0].numpy(), expected)
    nothing = torch.zeros_like(mask)
    assert not dilate(nothing, distance, spacing).any()


@pytest.mark.parametrize("size", [0.1, 0.3, 0.6, 0.7, 1.1])
@pytest.mark.parametrize("steps", [1, 3, 100])
def test_a_voxel_at_exactly_the_margin_is_inside_it(size: float, steps: int) -> None:
    """Also if the voxel size comes from a header, in float32."""
    mask = torch.zeros(1, 1, 2 * steps + 7, dtype=torch.bool)
    mask[..., steps + 3] = True
    for spacing in (size, float(np.float32(size))):
        assert int(dilate(mask, steps * size, [spacing]).sum()) == 2 * steps + 1


def slow_attention(maps: list[Tensor], labels: Tensor, distance: float, spacing: tuple[float, ...]) -> float:
    values = []
    for p in maps:
        far = ndimage.distance_transform_edt(labels[0, 0].numpy() == 0, sampling=spacing)
        context = torch.from_numpy(far <= distance).float()
        step = context.shape[0] // p.shape[2]
        blocks = context.unfold(0, step, step).unfold(1, step, step).unfold(2, step, step).flatten(3).mean(3)
        values.append(1 - (torch.minimum(p[0, 0], blocks).sum() / torch.maximum(p[0, 0], blocks).sum()).item())
    return sum(values) / len(values)


def some_maps(shape: tuple[int, ...] = (16, 16, 8), scales: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(1, 1, *[side // 2**k for side in shape], generator=generator) for k in range(scales)]


def test_context_attention_is_the_definition() -> None:
    labels, maps = lesion((16, 16, 8)), some_maps()
    for spacing in ((1.0, 1.0, 1.0), (1.0, 2.0, 4.0)):
        loss = ContextAttentionLoss(context_mm=4.1, spacing=spacing)
        assert loss(maps, labels).item() == pytest.approx(slow_attention(maps, labels, 4.1, spacing), abs=1e-5)
    weighted = ContextAttentionLoss(context_mm=4.1, weights=[0.0, 2.0, 0.0])
    expected = 2 * ContextAttentionLoss(context_mm=4.1)([maps[1]], labels)
    torch.testing.assert_close(weighted(maps, labels), expected)


def test_spacing_of_a_metatensor_is_used() -> None:
    labels, maps = lesion((16, 16, 8)), some_maps()
    affine = torch.diag(torch.tensor([1.0, 2.0, 4.0, 1.0])).unsqueeze(0)
    batch = MetaTensor(labels, affine=affine)
    batch.is_batch = True
    given = ContextAttentionLoss(context_mm=4.1, spacing=(1.0, 2.0, 4.0))(maps, labels)
    torch.testing.assert_close(ContextAttentionLoss(context_mm=4.1)(maps, batch), given)
    assert not torch.isclose(ContextAttentionLoss(context_mm=4.1)(maps, labels), given)


def test_maps_that_cover_lesion_and_context_are_perfect() -> None:
    labels = lesion((16, 16, 8))
    context = dilate(labels > 0, 3.0, (1.0, 1.0, 1.0)).float()
    maps = [context, nn.functional.avg_pool3d(context, 2), nn.functional.avg_pool3d(context, 4)]
    loss = ContextAttentionLoss(context_mm=3.0)
    assert loss(maps, labels).item() == pytest.approx(0, abs=1e-6)
    assert loss([labels.float()], labels) > 0.3
    assert ContextAttentionLoss(context_mm=0.0)([labels.float()], labels).item() == pytest.approx(0, abs=1e-6)
    one_hot = torch.cat([1 - labels, labels], 1)
    torch.testing.assert_close(loss(some_maps(), one_hot), loss(some_maps(), labels))


def test_ignored_voxels_have_no_effect() -> None:
    labels = lesion((16, 16, 8))
    labels[:, :, :8] = 255
    loss = ContextAttentionLoss(context_mm=2.0, ignore_index=255)
    maps = [values.requires_grad_() for values in some_maps()]
    for values, slope in zip(maps, torch.autograd.grad(loss(maps, labels), maps), strict=True):
        assert (slope[:, :, : values.shape[2] // 2] == 0).all()
        assert slope.abs().sum() > 0
    valid = ContextAttentionLoss(context_mm=2.0)
    torch.testing.assert_close(loss(maps, labels), valid([m[:, :, m.shape[2] // 2 :] for m in maps], labels[:, :, 8:]))


@pytest.mark.parametrize("ignored", [0, 1])
def test_an_ignored_label_may_be_a_value_of_the_context(ignored: int) -> None:
    labels = lesion((16, 16, 8)).int() + 2 * lesion((16, 16, 8), seed=1).int()
    marked = torch.where(labels == ignored, 9, labels)
    value = ContextAttentionLoss(context_mm=2.0, ignore_index=ignored)(some_maps(), labels)
    torch.testing.assert_close(value, ContextAttentionLoss(context_mm=2.0, ignore_index=9)(some_maps(), marked))
    maps = [maps.requires_grad_() for maps in some_maps()]
    slope = torch.autograd.grad(ContextAttentionLoss(context_mm=2.0, ignore_index=ignored)(maps, labels), maps)[0]
    assert (slope[labels == ignored] == 0).all()
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("ignored", [-1, 256])
def test_an_ignored_label_that_bytes_cannot_hold_ignores_nothing(ignored: int) -> None:
    labels = lesion((16, 16, 8)) * 255
    assert labels.dtype == torch.uint8
    value = ContextAttentionLoss(context_mm=2.0, ignore_index=ignored)(some_maps(), labels)
    torch.testing.assert_close(value, ContextAttentionLoss(context_mm=2.0)(some_maps(), labels))
    p = torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(AffinityLoss(ignore_index=ignored)(p, labels), AffinityLoss()(p, labels))


def test_context_attention_gradcheck() -> None:
    maps = [values.double().requires_grad_() for values in some_maps((8, 4, 4), 2)]
    loss = ContextAttentionLoss(context_mm=1.5)
    assert torch.autograd.gradcheck(lambda *m: loss(list(m), lesion((8, 4, 4))), maps)


def slow_affinity(p: Tensor, labels: Tensor) -> float:
    """The formulas of the paper, row by row."""
    y = labels.flatten().tolist()
    n = len(y)
    unary = whole = 0.0
    for i in range(n):
        hit = found = there = rejected = others = 0.0
        for j in range(n):
            same, value = float(y[i] == y[j]), float(p[0, i, j])
            unary -= same * np.log(value) + (1 - same) * np.log(1 - value)
            hit, found, there = hit + same * value, found + value, there + same
            rejected, others = rejected + (1 - same) * (1 - value), others + 1 - same
        whole -= np.log(hit / found) + np.log(hit / there) + (np.log(rejected / others) if others else 0)
    return float(unary / n**2 + whole / n)


def test_affinity_is_the_papers() -> None:
    labels = torch.randint(0, 3, (1, 1, 2, 3, 2), generator=torch.Generator().manual_seed(0))
    p = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    assert AffinityLoss()(p, labels).item() == pytest.approx(slow_affinity(p, labels), rel=1e-5)
    assert AffinityLoss(sigmoid=True)(p.logit(), labels).item() == pytest.approx(slow_affinity(p, labels), rel=1e-4)
    parts = [AffinityLoss(lambda_global=0)(p, labels), AffinityLoss(lambda_unary=0)(p, labels)]
    torch.testing.assert_close(parts[0] + 2 * parts[1], AffinityLoss(lambda_global=2)(p, labels))
    one_class = torch.zeros_like(labels)
    assert AffinityLoss()(p, one_class).item() == pytest.approx(slow_affinity(p, one_class), rel=1e-5)


def test_affinity_at_a_coarser_grid_keeps_small_lesions() -> None:
    labels = torch.zeros(1, 1, 16, 16, 16)
    labels[..., 5, 6, 7] = 1
    coarse = torch.zeros(64)
    coarse[1 * 16 + 1 * 4 + 1] = 1
    perfect = (coarse.unsqueeze(0) == coarse.unsqueeze(1)).float().unsqueeze(0)
    assert AffinityLoss()(perfect, labels).item() == pytest.approx(0, abs=1e-6)
    assert AffinityLoss(size=(4, 4, 4))(perfect, labels).item() == pytest.approx(0, abs=1e-6)
    assert AffinityLoss(downsample="nearest")(perfect, labels) > 0.1


def test_a_certain_and_wrong_affinity_costs_the_least_logarithm() -> None:
    labels = torch.tensor([[[0, 0, 1, 1]]])
    wrong = torch.zeros(1, 4, 4, requires_grad=True)
    value = AffinityLoss(lambda_global=0)(wrong, labels)
    torch.testing.assert_close(value, torch.tensor(69.07755 / 2))
    assert (torch.autograd.grad(value, wrong)[0] == torch.where(labels == labels.mT, 0, 1 / 16)).all()


def test_affinity_ignores_positions() -> None:
    labels = torch.tensor([[[0, 1, 255, 0, 1]]])
    keep = [0, 1, 3, 4]
    p = torch.rand(1, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    value = AffinityLoss(ignore_index=255)(p, labels)
    torch.testing.assert_close(value, AffinityLoss()(p[:, keep][..., keep], labels[..., keep]))
    (slope,) = torch.autograd.grad(value, p)
    assert (slope[:, 2] == 0).all()
    assert (slope[:, :, 2] == 0).all()
    assert AffinityLoss(ignore_index=255)(p, torch.full_like(labels, 255)) == 0


@pytest.mark.parametrize("sigmoid", [False, True])
def test_affinity_gradients(sigmoid: bool) -> None:
    labels = torch.randint(0, 2, (2, 1, 6), generator=torch.Generator().manual_seed(0))
    p = torch.rand(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.05
    loss = AffinityLoss(sigmoid=sigmoid)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), p.requires_grad_())
    for value in (0.0, 1.0):
        extreme = torch.full((2, 6, 6), 1e4 * (value - 0.5) if sigmoid else value, requires_grad=True)
        total = loss(extreme, labels)
        assert total.isfinite()
        assert torch.autograd.grad(total, extreme)[0].isfinite().all()


def small_unet(dims: int = 3) -> AttentionMapUnet:
    torch.manual_seed(0)
    return AttentionMapUnet(dims, 1, 2, channels=(4, 8, 16), strides=(2, 2))


def test_attention_unet_hands_out_its_maps_in_training_only() -> None:
    network, x = small_unet(), torch.rand(2, 1, 16, 16, 16)
    output: Any = network(x)
    logits, maps = output
    assert logits.shape == (2, 2, 16, 16, 16)
    assert [tuple(values.shape) for values in maps] == [(2, 1, 16, 16, 16), (2, 1, 8, 8, 8)]
    assert all(((values >= 0) & (values <= 1)).all() for values in maps)
    assert all(not block._forward_hooks for block in network.modules())
    assert isinstance(network.eval()(x), Tensor)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(twin(x), network(x))
    plain = AttentionUnet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2))
    plain.load_state_dict(network.state_dict())
    torch.testing.assert_close(plain.eval()(x), network(x))


@pytest.mark.parametrize("head", [False, True])
def test_evaluation_and_export_see_plain_logits(head: bool) -> None:
    torch.manual_seed(0)
    network = ContextPriorHead(1, 2, size=(4, 4, 4)) if head else small_unet()
    x = torch.rand(1, 1, 16, 16, 16)
    network.eval()
    with torch.no_grad():
        expected = network(x)
        assert sliding_window_inference(torch.rand(1, 1, 20, 20, 20), 16, 1, network).shape == (1, 2, 20, 20, 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own: its script and trace are deprecated
            scripted = convert_to_torchscript(network)
            traced = convert_to_torchscript(network, inputs=[x], use_trace=True)
        torch.testing.assert_close(scripted(x), expected)
        torch.testing.assert_close(traced(x), expected)


def halves() -> Tensor:
    labels = torch.zeros(1, 1, 16, 16, 16)
    labels[..., :8] = 1
    return labels


def sure_head(score: float) -> ContextPriorHead:
    """A head that says of all positions that they belong together."""
    torch.manual_seed(0)
    head = ContextPriorHead(8, 2, size=(4, 4, 4))
    with torch.no_grad():
        head.affinity.conv.bias.add_(score)
    return head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", [3.0, 9.0])
def test_confident_mistakes_cost_in_half_precision_what_they_cost_in_float32(score: float, dtype: torch.dtype) -> None:
    image, results = torch.randn(1, 8, 16, 16, 16, generator=torch.Generator().manual_seed(0)), []
    for enabled in (False, True):
        head = sure_head(score)
        with torch.autocast("cpu", dtype, enabled=enabled):
            _, affinity = head(image)
        assert affinity.dtype == torch.float32
        assert affinity.max() < 1
        value = AffinityLoss()(affinity, halves())
        value.backward()
        gradient = head.affinity.conv.bias.grad
        assert isinstance(gradient, Tensor)
        results.append((value.item(), gradient))
    (value, gradient), (found, found_gradient) = results
    assert found == pytest.approx(value, rel=0.02)
    torch.testing.assert_close(found_gradient, gradient, rtol=0.02, atol=0.02 * gradient.abs().max().item())


def test_float16_holds_the_context_of_the_largest_grid() -> None:
    """4096 features of 100 add up to more than float16 has, half of each too; their mean does not."""
    head = ContextPriorHead(1, 2, size=(16, 16, 16)).half().eval()
    head.gather.forward = lambda coarse: torch.full_like(coarse, 100)  # type: ignore[method-assign]
    mixed: list[Tensor] = []
    head.mix.register_forward_pre_hook(lambda _, given: mixed.append(given[0]))
    with torch.no_grad():
        head(torch.ones(1, 1, 16, 16, 16, dtype=torch.float16))
    _, same, other = mixed[0].float().unbind(1)
    torch.testing.assert_close(same + other, torch.full_like(same, 100), rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_head_of_any_precision(dtype: torch.dtype) -> None:
    logits, affinity = sure_head(9).to(dtype)(torch.ones(2, 8, 8, 8, 8, dtype=dtype))
    assert logits.dtype == dtype
    assert affinity.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert affinity.max() < 1


class PriorNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1)
        self.head = ContextPriorHead(8, 2, size=(4, 4, 4))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.stem(x).relu())


@pytest.mark.parametrize("kind", ["attention", "affinity"])
def test_monais_trainer_learns_with_it(kind: str) -> None:
    torch.manual_seed(0)
    labels = lesion((16, 16, 16)).float()
    data = [{"image": labels[0] + 0.1 * torch.randn(1, 16, 16, 16), "label": labels[0]}] * 2
    network = small_unet() if kind == "attention" else PriorNetwork()
    auxiliary = ContextAttentionLoss(context_mm=2.0) if kind == "attention" else AffinityLoss()
    loss = AttentionSupervisionLoss(IoUCELoss(softmax=True), auxiliary, lambda_attention=0.5)
    history: list[dict[str, float]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SupervisedTrainer(
            device=torch.device("cpu"),
            max_epochs=15,
            train_data_loader=torch.utils.data.DataLoader(data, batch_size=2),
            network=network,
            optimizer=torch.optim.Adam(network.parameters(), 2e-2),
            loss_function=loss,
        )
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED,
            lambda engine: history.append({name: term.item() for name, term in loss.last_terms.items()}),
        )
        trainer.run()
    assert len(history) == 15
    for name in ("segmentation", "attention"):
        assert all(np.isfinite(step[name]) for step in history)
        assert history[-1][name] < history[0][name]


def test_combined_loss_of_plain_logits_is_the_segmentation_loss() -> None:
    logits, labels = torch.randn(1, 2, 8, 8), torch.ones(1, 1, 8, 8)
    loss = AttentionSupervisionLoss(IoULoss(softmax=True), ContextAttentionLoss())
    torch.testing.assert_close(loss(logits, labels), IoULoss(softmax=True)(logits, labels))
    both = loss((logits, [torch.ones(1, 1, 8, 8)]), labels)
    torch.testing.assert_close(both, IoULoss(softmax=True)(logits, labels))  # the maps are perfect


def test_config_makes_the_loss() -> None:
    item = {
        "_target_": "AttentionSupervisionLoss",
        "loss": {"_target_": "IoUCELoss", "softmax": True},
        "attention": {"_target_": "ContextAttentionLoss", "context_mm": 5.0},
    }
    loss = ConfigParser({"imports": ["$import monai_iou"], "loss": item}).get_parsed_content("loss")
    assert isinstance(loss, AttentionSupervisionLoss)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.bfloat16])
def test_labels_of_any_type_are_the_same_foreground(dtype: torch.dtype) -> None:
    labels, maps = lesion((16, 16, 8)), some_maps()
    one_hot = torch.cat([1 - labels, labels], 1)
    expected = ContextAttentionLoss()(maps, labels)
    assert ContextAttentionLoss()(maps, labels.to(dtype)) == expected
    assert ContextAttentionLoss()(maps, one_hot.to(dtype)) == expected
    ignoring = ContextAttentionLoss(ignore_index=0)
    assert ignoring(maps, one_hot.to(dtype)) == ignoring(maps, one_hot)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.nan, "nan: replace it by the number of a class."),
        (torch.inf, "inf: replace it by the number of a class."),
        (-1.0, "-1: map the labels to consecutive classes, or set `ignore_index` to the value to leave out."),
        (0.5, "0.5: give a soft target one channel per class, shape (B, C, *S)."),
    ],
)
def test_values_that_are_no_class_numbers_are_refused(wrong: float, text: str) -> None:
    labels = torch.tensor([[[0.0, 0, 1, 1, 0, 2, 0, 255]]])
    bad = labels.clone()
    bad[..., 3] = wrong
    maps = [torch.rand(1, 1, 8), torch.rand(1, 1, 4)]
    message = re.escape(f"Expected `target` to hold class numbers from 0, but got {text}")
    for loss, values in (
        (ContextAttentionLoss(), maps),
        (AffinityLoss(), torch.rand(1, 8, 8)),
        (AffinityLoss(), torch.rand(1, 4, 4)),
        (AffinityLoss(downsample="nearest"), torch.rand(1, 4, 4)),
    ):
        assert loss(values, labels).isfinite()
        with pytest.raises(ValueError, match=message):
            loss(values, bad)
    if wrong == -1:  # the value that an `ignore_index` names is none of these
        assert ContextAttentionLoss(ignore_index=-1)(maps, bad).isfinite()
        assert AffinityLoss(ignore_index=-1)(torch.rand(1, 4, 4), bad).isfinite()
        with pytest.raises(ValueError, match=re.escape("from 0, but got -1: map")):
            ContextAttentionLoss()(maps, bad.to(torch.int16))


def test_maps_beyond_0_to_1_and_without_annotation_are_refused() -> None:
    values, classes = torch.rand(1, 1, 8), torch.tensor([[[1.0] * 8, [0.0] * 8, [0.0] * 8]])
    for wrong in (-1.0, 2.0, torch.inf, torch.nan):
        bad = classes.clone()
        bad[0, 1, 3] = wrong
        with pytest.raises(ValueError, match=f"to hold per-class values between 0 and 1, but got {wrong}: "):
            ContextAttentionLoss()(values, bad)
    with pytest.raises(ValueError, match="between 0 and 1, but got 2: pass maps of 0 and 1, such as `target > 0`"):
        ContextAttentionLoss()(values, (2 * classes).to(torch.uint16))
    ignored = classes.clone()
    ignored[0, :, 0] = torch.tensor([torch.nan, torch.nan, 1.0])
    assert ContextAttentionLoss(ignore_index=2)(values, ignored).isfinite()
    classes[0, 2] = torch.nan
    loss = AttentionSupervisionLoss(IoUCELoss(softmax=True), ContextAttentionLoss())
    with pytest.raises(
        ValueError,
        match=r"Expected every class of `target` to be annotated with ContextAttentionLoss, which cannot leave classes "
        r"out, but got a map that is NaN everywhere: leave this image out, or train without this loss\.",
    ):
        loss((torch.randn(1, 3, 8), [values]), classes)


def test_errors() -> None:
    labels, maps = lesion((16, 16, 8)), some_maps()
    with pytest.raises(ValueError, match="`context_mm` to be a finite number at least 0, but got -1"):
        ContextAttentionLoss(context_mm=-1)
    with pytest.raises(ValueError, match=re.escape("one factor per map (3), but got 2: give as many factors")):
        ContextAttentionLoss(weights=[1.0, 1.0])(maps, labels)
    with pytest.raises(ValueError, match="at least one attention map, but got none: pass the output of a network"):
        ContextAttentionLoss()([], labels)
    with pytest.raises(ValueError, match=re.escape("target (1, 1, 16, 16, 8), but got (1, 2, 16, 16, 8)")):
        ContextAttentionLoss()([maps[0].repeat(1, 2, 1, 1, 1)], labels)
    with pytest.raises(ValueError, match=re.escape("to be an affinity (B, N, N), but got (1, 4, 5)")):
        AffinityLoss()(torch.zeros(1, 4, 5), labels)
    with pytest.raises(ValueError, match=re.escape("4913 of 4913: choose a coarser grid, because")):
        AffinityLoss()(torch.zeros(1, 1, 1).expand(1, 4913, 4913), torch.zeros(1, 1, 17, 17, 17))
    with pytest.raises(ValueError, match=re.escape("`size` to have 1 to 4096 positions (16x16x16)")):
        ContextPriorHead(8, 2, size=(32, 16, 16))
    with pytest.raises(ValueError, match="an odd number of at least 1, but got 2: use 3, because only an odd kernel"):
        ContextPriorHead(8, 2, size=(4, 4), kernel_size=2)
    with pytest.raises(ValueError, match="`in_channels` to be at least 1, but got 0"):
        ContextPriorHead(0, 2, size=(4, 4))
    with pytest.raises(ValueError, match="`out_channels` to be at least 1, but got -1"):
        ContextPriorHead(8, -1, size=(4, 4))
    with pytest.raises(ValueError, match=re.escape("the shape of the grid for a target of shape (16, 16, 8)")):
        AffinityLoss()(torch.zeros(1, 100, 100), labels)
    with pytest.raises(ValueError, match=re.escape("to be a label map (B, 1, *S) of 1 image, but")):
        AffinityLoss()(torch.zeros(1, 4, 4), torch.zeros(1, 2, 4))
    with pytest.raises(TypeError, match=r"`input` to be floating point, but got torch\.int64"):
        AffinityLoss()(torch.zeros(1, 4, 4).long(), labels)
    with pytest.raises(ValueError, match="`downsample` to be one of 'max', 'nearest', but got 'area'"):
        AffinityLoss(downsample="area")
    with pytest.raises(ValueError, match=re.escape("(logits, maps) or logits, but got dict: use a network")):
        AttentionSupervisionLoss(IoULoss(), AffinityLoss())({}, labels)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`attention` to be a torch module, but got NoneType"):
        AttentionSupervisionLoss(IoULoss(), None)  # type: ignore[arg-type]
    for wrong in (3, (4.0, 4.0), "44", ()):
        with pytest.raises(
            TypeError, match=re.escape(f"`size` to be one integer per spatial dimension, but got {wrong!r}")
        ):
            AffinityLoss(size=wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=re.escape(f"but got {wrong!r}: give the shape of the grid.")):
            ContextPriorHead(8, 2, size=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`target` to be a tensor, but got NoneType"):
        AffinityLoss()(torch.zeros(1, 4, 4), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`target` to be a tensor, but got ndarray"):
        ContextAttentionLoss()(maps, labels.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="an attention map or a list of them, but got int: pass the maps"):
        ContextAttentionLoss()(3, labels)  # type: ignore[arg-type]
    both = AttentionSupervisionLoss(MultiScaleLoss(IoULoss(softmax=True)), ContextAttentionLoss())
    for logits, given in (([], "list"), (3, "int"), (torch.zeros(3), "(3,)")):
        text = f"the first part of `input` to be logits (B, C, *S) or a list of them, but got {given}: use a network"
        with pytest.raises(ValueError, match=re.escape(text)):
            both((logits, maps), labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bfloat16])
def test_labels_of_every_dtype_have_the_same_context(dtype: torch.dtype) -> None:
    labels, maps = lesion((16, 16, 8)), some_maps()
    for ignore_index in (None, 1):
        loss = ContextAttentionLoss(context_mm=1.0, ignore_index=ignore_index)
        torch.testing.assert_close(loss(maps, labels.to(dtype)), loss(maps, labels))
