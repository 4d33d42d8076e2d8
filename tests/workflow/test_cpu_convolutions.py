"""Convolutions that give few channels on a CPU, against torch's in float64."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from monai.networks.nets.unet import UNet
from torch import Tensor
from torch.autograd import forward_ad
from torch.profiler import profile

from monai_iou.workflow import cpu_convolutions
from monai_iou.workflow.cpu_convolutions import FastConv3d, FastConvTranspose3d
from monai_iou.workflow.optimization import with_weights_in

LAST = torch.channels_last_3d
SHAPES = [(4, 5, 16), (3, 2, 40), (1, 1, 8), (2, 3, 15), (5, 4, 64), (2, 2, 33)]


def image_of(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).contiguous(memory_format=LAST)


def layer_of(kind: Any, *sizes: int, **arguments: object) -> Any:
    torch.manual_seed(sum(sizes))
    return kind(*sizes, 3, padding=1, **arguments).to(memory_format=LAST)


def results(layer: torch.nn.Module, image: Tensor) -> list[Tensor]:
    """Return what a layer gives, and the gradients of a random projection of it for the image and the weights."""
    leaf = image.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(leaf)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, [leaf, *layer.parameters()], pull)]


@pytest.fixture(autouse=True)
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let images that are quick to test have the fast forms too."""
    monkeypatch.setattr(cpu_convolutions, "LEAST_LENGTH", 1)
    monkeypatch.setattr(cpu_convolutions, "LEAST_VOXELS", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the fast forms that were used."""
    found: list[str] = []
    for name in ("_convolve", "_enlarge", "_gradients_of_kernel"):
        usual = getattr(cpu_convolutions, name)

        def noted(*given: object, _usual: Any = usual, _name: str = name) -> Any:
            found.append(_name)
            return _usual(*given)

        monkeypatch.setattr(cpu_convolutions, name, noted)
    return found


def check_close(found: list[Tensor], exact: list[Tensor]) -> None:
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("given", "made"), [(1, 1), (2, 2), (3, 3), (4, 4), (1, 4), (3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_equals_float64(
    shape: tuple[int, ...], given: int, made: int, bias: bool, calls: list[str]
) -> None:
    layer = layer_of(FastConv3d, given, made, bias=bias)
    image = image_of(2, given, *shape)
    found = results(layer, image)
    exact = torch.nn.Conv3d(given, made, 3, padding=1, bias=bias, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    check_close(found, results(exact, image.double()))
    assert found[0].is_contiguous(memory_format=LAST)
    pieces = [math.ceil(shape[2] / (16 // channels)) * (16 // channels) for channels in (given, made)]
    used = ["_convolve", "_convolve", "_gradients_of_kernel"] if max(pieces) <= 1.25 * shape[2] else []
    assert calls == used


@pytest.mark.parametrize("shape", [(4, 5, 6), (1, 1, 1), (2, 3, 16), (1, 4, 1)], ids=str)
@pytest.mark.parametrize("strides", [(2, 2, 2), (2, 2, 1), (1, 2, 2), (2, 1, 1)], ids=str)
@pytest.mark.parametrize(("given", "made"), [(8, 1), (8, 2), (5, 3), (32, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolution_equals_float64(
    shape: tuple[int, ...], strides: tuple[int, ...], given: int, made: int, bias: bool, calls: list[str]
) -> None:
    sizes: dict[str, Any] = {"stride": strides, "output_padding": tuple(stride - 1 for stride in strides), "bias": bias}
    layer = layer_of(FastConvTranspose3d, given, made, **sizes)
    image = image_of(2, given, *shape)
    found = results(layer, image)
    exact = torch.nn.ConvTranspose3d(given, made, 3, padding=1, dtype=torch.float64, **sizes)
    exact.load_state_dict(layer.state_dict())
    check_close(found, results(exact, image.double()))
    assert found[0].is_contiguous(memory_format=LAST)
    assert calls == ["_enlarge"]


CONVOLUTIONS = [
    FastConv3d(2, 2, 3),
    FastConv3d(2, 2, 3, padding="same"),
    FastConv3d(2, 2, 3, padding=1, padding_mode="reflect"),
    FastConv3d(2, 2, 3, padding=2, dilation=2),
    FastConv3d(2, 2, 3, padding=1, stride=2),
    FastConv3d(2, 2, 3, padding=1, groups=2),
    FastConv3d(2, 2, 1),
    FastConv3d(2, 2, (3, 3, 1), padding=1),
    FastConv3d(2, 5, 3, padding=1),
    FastConv3d(2, 2, 3, padding=1).double(),
]
TRANSPOSED = [
    FastConvTranspose3d(2, 2, 3, stride=2),
    FastConvTranspose3d(2, 2, 3, stride=2, padding=1),
    FastConvTranspose3d(2, 2, 2, stride=2),
    FastConvTranspose3d(2, 2, 3, stride=1, padding=1),
    FastConvTranspose3d(2, 2, 3, stride=(2, 2, 3), padding=1, output_padding=(1, 1, 2)),
    FastConvTranspose3d(2, 2, 3, stride=2, padding=1, output_padding=1, groups=2),
    FastConvTranspose3d(2, 8, 3, stride=2, padding=1, output_padding=1),
    FastConvTranspose3d(2, 2, 3, stride=2, padding=1, output_padding=1).double(),
]


@pytest.mark.parametrize("layer", [*CONVOLUTIONS, *TRANSPOSED], ids=str)
def test_everything_else_is_torchs(layer: Any, calls: list[str]) -> None:
    image = image_of(2, 2, 4, 4, 16).to(layer.weight.dtype)
    usual = copy.deepcopy(layer)
    usual.__class__ = type(layer).__mro__[1]
    for one, other in zip(results(layer, image), results(usual, image), strict=True):
        assert torch.equal(one, other)
    assert not calls


@pytest.mark.parametrize("kind", [FastConv3d, FastConvTranspose3d])
def test_other_images_are_torchs(kind: Any, calls: list[str]) -> None:
    sizes = {} if kind is FastConv3d else {"stride": 2, "output_padding": 1}
    layer = layer_of(kind, 2, 2, **sizes)
    usual = copy.deepcopy(layer)
    usual.__class__ = kind.__mro__[1]
    image = image_of(2, 2, 4, 4, 16)
    empty = image[:0]
    for other in (image.contiguous(), image[0], empty):
        torch.testing.assert_close(layer(other), usual(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(image), usual(image))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(image, torch.ones_like(image))
        torch.testing.assert_close(
            forward_ad.unpack_dual(layer(dual)).tangent, forward_ad.unpack_dual(usual(dual)).tangent
        )
    torch.testing.assert_close(torch.func.vmap(layer)(image[None]), torch.func.vmap(usual)(image[None]))
    torch.testing.assert_close(torch.jit.script(layer)(image), usual(image))
    assert not calls
    with pytest.raises(RuntimeError) as found:
        layer(image_of(2, 3, 4, 4, 16))
    with pytest.raises(RuntimeError) as expected:
        usual(image_of(2, 3, 4, 4, 16))
    assert str(found.value) == str(expected.value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.trace's own
        traced = torch.jit.trace(layer, image, check_trace=False)
    assert not calls
    torch.testing.assert_close(traced(image), usual(image))


def test_a_size_that_is_asked_for(calls: list[str]) -> None:
    layer = layer_of(FastConvTranspose3d, 2, 2, stride=2, output_padding=1)
    assert layer(image_of(2, 2, 4, 4, 16), output_size=[7, 8, 31]).shape == (2, 2, 7, 8, 31)
    assert not calls


@pytest.mark.parametrize(
    ("shape", "used"), [((1, 5, 64, 64, 2), False), ((1, 5, 64, 65, 1), True), ((2, 5, 1, 1, 1), True)]
)
def test_a_single_small_image_is_torchs(shape: tuple[int, ...], used: bool, calls: list[str]) -> None:
    """torch computes it without oneDNN, in which the form of here takes three times as long."""
    layer = layer_of(FastConvTranspose3d, 5, 2, stride=2, output_padding=1)
    usual = copy.deepcopy(layer)
    usual.__class__ = torch.nn.ConvTranspose3d
    torch.testing.assert_close(layer(image_of(*shape)), usual(image_of(*shape)))
    assert calls == ["_enlarge"] * used
    with torch.no_grad(), profile() as of_torch:
        torch.nn.functional.conv3d(image_of(*shape), torch.ones(16, 5, 2, 2, 2), padding=1)
    assert ("aten::mkldnn_convolution" in {event.name for event in of_torch.events()}) == used


@pytest.mark.parametrize("kind", [FastConv3d, FastConvTranspose3d])
def test_several_gradients_at_once(kind: Any, calls: list[str]) -> None:
    sizes = {} if kind is FastConv3d else {"stride": 2, "output_padding": 1}
    layer, image = layer_of(kind, 2, 2, **sizes), image_of(2, 2, 2, 3, 16).requires_grad_()
    inputs, output = [image, *layer.parameters()], layer(image)
    assert calls
    pulls = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(0))
    expected = [torch.autograd.grad(output, inputs, pull, retain_graph=True) for pull in pulls]
    together = torch.autograd.grad(output, inputs, pulls, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda pull: torch.autograd.grad(output, inputs, pull, retain_graph=True))(pulls)
    for found in (together, mapped):
        for one, others in zip(found, zip(*expected, strict=True), strict=True):
            torch.testing.assert_close(one, torch.stack(others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [FastConv3d, FastConvTranspose3d])
def test_second_derivatives(kind: Any) -> None:
    sizes = {} if kind is FastConv3d else {"stride": 2, "output_padding": 1}
    found = []
    for each in (kind, kind.__mro__[1]):
        layer = layer_of(each, 2, 2, **sizes).double() if each is not kind else layer_of(each, 2, 2, **sizes)
        image = image_of(2, 2, 2, 3, 16).to(layer.weight.dtype).requires_grad_()
        parts = [image, *layer.parameters()]
        first = torch.autograd.grad(layer(image).square().sum(), parts, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([part.square().sum() for part in first]).sum(), parts))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("kind", [FastConv3d, FastConvTranspose3d])
def test_what_needs_no_gradient_gets_none_and_what_follows_may_work_in_place(kind: Any) -> None:
    sizes = {} if kind is FastConv3d else {"stride": 2, "output_padding": 1}
    layer, image = layer_of(kind, 2, 2, **sizes), image_of(2, 2, 2, 3, 16)
    everything = results(layer, image)
    layer.weight.requires_grad_(False)
    leaf = image.clone(memory_format=torch.preserve_format).requires_grad_()
    output = torch.relu_(layer(leaf).mul_(1))
    assert not layer(image.detach()).detach().requires_grad
    gradients = torch.autograd.grad(output.sum(), [leaf, layer.bias])
    assert [gradient.shape for gradient in gradients] == [part.shape for part in (everything[1], everything[3])]
    expected = torch.autograd.grad(torch.relu(layer(leaf)).sum(), [leaf, layer.bias])
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", [FastConv3d, FastConvTranspose3d])
def test_gradients_that_are_asked_for_under_autocast_are_as_precise(kind: Any) -> None:
    sizes = {} if kind is FastConv3d else {"stride": 2, "output_padding": 1}
    layer, image = layer_of(kind, 2, 2, **sizes), image_of(2, 2, 4, 4, 16).requires_grad_()
    expected = torch.autograd.grad(layer(image).square().sum(), [image, *layer.parameters()])
    value = layer(image).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(value, [image, *layer.parameters()])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_last_layers_of_a_network_have_them(calls: list[str]) -> None:
    torch.manual_seed(0)
    network = with_weights_in(LAST, UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=2))
    image = image_of(2, 1, 16, 16, 16)
    exact = copy.deepcopy(network).double()
    found, expected = results(network, image), results(exact, image.double())
    assert calls[:2] == ["_enlarge", "_convolve"]
    assert (found[0] - expected[0]).abs().max() < 1e-4 * expected[0].abs().max()
    calls.clear()
    with torch.no_grad():
        network(image)
    assert calls == ["_enlarge", "_convolve"]


@pytest.mark.parametrize(("shape", "used"), [((32, 32, 16), True), ((96, 96, 8), False), ((16, 16, 40), False)])
def test_small_and_thin_images_are_torchs(
    shape: tuple[int, ...], used: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_convolutions, "LEAST_LENGTH", 16)
    monkeypatch.setattr(cpu_convolutions, "LEAST_VOXELS", 1 << 14)
    layer = layer_of(FastConv3d, 2, 2)
    with torch.no_grad():
        layer(image_of(1, 2, *shape))
    assert calls == ["_convolve"] * used
