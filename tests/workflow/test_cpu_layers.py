"""Instance normalisation and PReLU for a CPU, against torch's."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from typing import Any

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.unet import UNet
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from monai_iou.workflow.cpu_layers import FastInstanceNorm3d, FastPReLU, use_fast_layers
from monai_iou.workflow.optimization import with_weights_in

LAST = torch.channels_last_3d
SHAPES = [(2, 4, 5, 6, 7), (1, 1, 3, 3, 3), (3, 2, 1, 1, 2), (1, 33, 4, 1, 1), (2, 3, 2, 2, 2)]


def image_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).contiguous(memory_format=LAST)


def results(layer: torch.nn.Module, image: Tensor) -> list[Tensor]:
    """Return what a layer gives, and the gradients of a random projection of it for the image and the weights."""
    leaf = image.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(leaf)
    pull = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output)
    gradients = torch.autograd.grad(output, [leaf, *layer.parameters()], pull)
    return [output.detach(), *gradients]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_equals_torch_in_float64(shape: tuple[int, ...], affine: bool, dtype: torch.dtype) -> None:
    fast = FastInstanceNorm3d(shape[1], affine=affine, eps=1e-3, dtype=dtype)
    for weights in fast.parameters():
        torch.nn.init.normal_(weights)
    exact = torch.nn.InstanceNorm3d(shape[1], affine=affine, eps=1e-3, dtype=torch.float64)
    exact.load_state_dict(fast.state_dict())
    image = image_of(shape, dtype)
    found = results(fast, image)
    assert all(part.dtype == dtype for part in found)
    assert found[0].is_contiguous(memory_format=LAST)
    for one, other in zip(found, results(exact, image.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_norm_keeps_digits_that_a_large_mean_would_take() -> None:
    image = image_of((1, 2, 8, 8, 8)) + 3000
    exact = torch.nn.InstanceNorm3d(2)(image.double())
    assert (FastInstanceNorm3d(2)(image) - exact).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e12, 1e17])
def test_gradients_of_very_large_and_small_numbers(scale: float) -> None:
    image = image_of((1, 2, 8, 8, 8)) * scale
    found, exact = results(FastInstanceNorm3d(2), image), results(torch.nn.InstanceNorm3d(2), image.double())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_several_gradients_at_once(dtype: torch.dtype) -> None:
    image = image_of((2, 3, 2, 3, 4), dtype).requires_grad_()
    output = FastInstanceNorm3d(3)(image)
    pulls = torch.randn(3, *output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.stack([torch.autograd.grad(output, image, pull, retain_graph=True)[0] for pull in pulls])
    (together,) = torch.autograd.grad(output, image, pulls, is_grads_batched=True, retain_graph=True)
    mapped = torch.func.vmap(lambda pull: torch.autograd.grad(output, image, pull, retain_graph=True)[0])(pulls)
    for found in (together, mapped):
        torch.testing.assert_close(found, expected)


def test_norm_of_what_is_constant_or_undefined() -> None:
    image = image_of((3, 2, 4, 4, 4))
    image[0, 0] = 7
    image[1, 1, 0, 0, 0] = math.nan
    image[2, 0, 0, 0, 0] = math.inf
    fast, usual = FastInstanceNorm3d(2)(image), torch.nn.InstanceNorm3d(2)(image)
    assert (fast[0, 0] == 0).all()  # of which torch makes 3e-5
    assert torch.equal(fast.isnan(), usual.isnan())
    torch.testing.assert_close(fast[1:], usual[1:], equal_nan=True)


@pytest.mark.parametrize(
    "image",
    [
        image_of((2, 3, 4, 4, 4)).contiguous(),
        image_of((2, 3, 4, 4, 4)).half(),
        image_of((2, 3, 4, 4, 4))[0],
        torch.zeros(0, 3, 4, 4, 4).contiguous(memory_format=LAST),
    ],
    ids=["usual layout", "float16", "no batch", "no images"],
)
def test_what_is_not_covered_is_left_to_torch(image: Tensor) -> None:
    assert torch.equal(FastInstanceNorm3d(3)(image), torch.nn.InstanceNorm3d(3)(image))


def test_errors_and_running_statistics_are_those_of_torch() -> None:
    one_voxel = image_of((2, 3, 1, 1, 1))
    for layer in (FastInstanceNorm3d(3), torch.nn.InstanceNorm3d(3)):
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            layer(one_voxel)
    for layer in (FastInstanceNorm3d(4, affine=True), torch.nn.InstanceNorm3d(4, affine=True)):
        with pytest.raises(ValueError, match="expected input's size at dim=1"):
            layer(image_of((2, 3, 4, 4, 4)))
    fast, usual = (kind(3, track_running_stats=True) for kind in (FastInstanceNorm3d, torch.nn.InstanceNorm3d))
    for _ in range(2):
        assert torch.equal(fast(image_of((2, 3, 4, 4, 4))), usual(image_of((2, 3, 4, 4, 4))))
    assert torch.equal(fast.running_var, usual.running_var)


@pytest.mark.parametrize("weight", [0.25, 0.0, -1.5])
@pytest.mark.parametrize("contiguous", [True, False])
def test_prelu_equals_torch(weight: float, contiguous: bool) -> None:
    image = image_of((2, 3, 4, 4, 4))
    image[0, 0, 0, 0] = 0
    image = image.contiguous() if contiguous else image
    for one, other in zip(
        results(FastPReLU(init=weight), image), results(torch.nn.PReLU(init=weight), image), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_prelu_of_what_is_undefined_and_of_a_weight_for_each_channel() -> None:
    image = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0])
    assert torch.equal(results(FastPReLU(), image)[0].isnan(), torch.tensor([True, False, False, False, False]))
    for one, other in zip(results(FastPReLU(), image), results(torch.nn.PReLU(), image), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    channels = image_of((2, 3, 4, 4, 4))
    assert torch.equal(FastPReLU(3)(channels), torch.nn.PReLU(3)(channels))
    assert torch.equal(FastPReLU().double()(channels.double()), torch.nn.PReLU().double()(channels.double()))
    half = channels.bfloat16()
    assert torch.equal(FastPReLU().bfloat16()(half), torch.nn.PReLU().bfloat16()(half))
    with pytest.raises(RuntimeError, match="Type promoting not supported"):
        FastPReLU()(half)


@pytest.mark.parametrize("layer", [FastInstanceNorm3d(2, affine=True), FastPReLU()], ids=["norm", "prelu"])
def test_first_and_second_derivatives(layer: torch.nn.Module) -> None:
    layer = layer.double()
    image = image_of((2, 2, 2, 1, 2), torch.float64).requires_grad_()

    def output(image: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(dict(layer.named_parameters()), weights, strict=True))
        found: Tensor = torch.func.functional_call(layer, named, (image.contiguous(memory_format=LAST),))
        return found

    inputs = (image, *(weights.detach().requires_grad_() for weights in layer.parameters()))
    assert torch.autograd.gradcheck(output, inputs)
    assert torch.autograd.gradgradcheck(output, inputs)


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    image = image_of((2, 3, 4, 4, 4)).bfloat16()
    exact = results(torch.nn.InstanceNorm3d(3), image.double())
    found = results(FastInstanceNorm3d(3), image)
    assert found[0].is_contiguous(memory_format=LAST)
    assert torch.equal(found[0], exact[0].bfloat16())
    torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):  # the weight is float32
        pairs = list(zip(results(FastPReLU(), image), results(torch.nn.PReLU(), image), strict=True))
    assert [one.dtype for one, _ in pairs] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def check_as_exact(found: list[Tensor], usual: list[Tensor], exact: list[Tensor]) -> None:
    """Check that no result is much further from float64 than torch's; some gradients are 0 but for rounding."""
    scale = max(other.abs().max() for other in exact)
    for one, torchs, other in zip(found, usual, exact, strict=True):
        assert (one - other).abs().max() <= 2 * (torchs - other).abs().max() + 3e-6 * scale


@pytest.fixture
def network() -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=2)


def test_a_network_keeps_names_weights_hooks_and_values(network: UNet) -> None:
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = results(copy.deepcopy(network).double(), image.double())
    usual = results(network, image)
    calls: list[str] = []
    prelu = network.model[0].conv.unit0.adn.A
    prelu.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    names = list(network.state_dict())
    same = with_weights_in(LAST, network)
    assert same is network
    assert list(network.state_dict()) == names
    assert isinstance(prelu, torch.nn.PReLU)
    kinds = {type(module).__name__ for module in network.modules()}
    assert {"FastInstanceNorm3d", "FastPReLU"} <= kinds
    assert not {"InstanceNorm3d", "PReLU"} & kinds
    found = results(network, image)
    assert calls == ["FastPReLU"]
    check_as_exact(found, usual, expected)
    for other_network in (copy.deepcopy(network), pickle.loads(pickle.dumps(UNet(3, 1, 2, (4, 8), (2,))))):
        assert use_fast_layers(other_network)(image).shape == (2, 2, 16, 16, 16)


@pytest.mark.parametrize("name", ["channels_last_3d", "torch.channels_last_3d"])
def test_a_format_may_be_given_by_its_name(name: str) -> None:
    network = torch.nn.Sequential(torch.nn.Conv3d(4, 2, 3))
    assert with_weights_in(name, network)[0].weight.is_contiguous(memory_format=LAST)  # type: ignore[index]


def test_a_format_of_pictures_is_for_networks_without_volumes() -> None:
    flat = torch.nn.Conv2d(1, 2, 3)
    assert with_weights_in(torch.channels_last, flat) is flat


@pytest.mark.parametrize("wrong", ["foo", "float32", torch.preserve_format, torch.channels_last, None])
def test_a_format_that_no_weights_can_have_is_refused(wrong: Any) -> None:
    message = f"Expected `memory_format` to be contiguous_format or channels_last_3d, but got {wrong!r}: leave"
    with pytest.raises(ValueError, match=re.escape(message)):
        with_weights_in(wrong, torch.nn.Conv3d(1, 4, 3))


def test_another_format_and_derived_classes_are_left_alone(network: UNet) -> None:
    class Own(torch.nn.PReLU):
        pass

    given = torch.nn.Sequential(network, Own())
    assert with_weights_in(torch.contiguous_format, given) is given
    assert not any(isinstance(module, FastPReLU) for module in given.modules())
    use_fast_layers(given)
    assert type(given[1]) is Own


def test_an_activation_that_works_in_place_may_follow() -> None:
    network = BasicUNet(3, 1, 2, (4, 4, 8, 8, 8, 4))  # its LeakyReLU does
    image = torch.randn(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAST)
    exact = results(copy.deepcopy(network).double(), image.double())
    usual = results(network, image)
    assert any(getattr(module, "inplace", False) for module in network.modules())
    check_as_exact(results(with_weights_in(LAST, network), image), usual, exact)
    norm, activation = FastInstanceNorm3d(4), torch.nn.LeakyReLU(inplace=True)
    plain = torch.nn.Sequential(torch.nn.InstanceNorm3d(4), torch.nn.LeakyReLU())
    pairs = zip(
        results(torch.nn.Sequential(norm, activation), image_of((2, 4, 4, 4, 6))),
        results(plain, image_of((2, 4, 4, 4, 6))),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


def test_metadata_tracing_and_transforms_of_functions(network: UNet) -> None:
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAST)
    usual, fast = copy.deepcopy(network).eval(), with_weights_in(LAST, network).eval()
    expected = usual(image)
    torch.testing.assert_close(fast(MetaTensor(image)).as_tensor(), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own layers warn of a comparison
        traced = torch.jit.trace(fast, image)
    torch.testing.assert_close(traced(image), expected, rtol=1e-4, atol=1e-5)
    parameters = {name: weights.detach() for name, weights in fast.named_parameters()}

    def value(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(fast, parameters, (image,)).square().mean()
        return found

    several = torch.stack([image, 2 * image])
    gradients = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(parameters, several)
    assert all(gradient.shape[0] == 2 for gradient in gradients.values())
    value(dict(fast.named_parameters()), image).backward()
    for name, weights in fast.named_parameters():
        assert weights.grad is not None
        torch.testing.assert_close(gradients[name][0], weights.grad, rtol=1e-2, atol=1e-6)


@torch.no_grad()
def test_whoever_sees_each_operation_sees_those_of_torch(network: UNet) -> None:
    """A count of operations, `torch.export` and `torch.fx` know nothing of zeros in a kernel."""
    image = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAST)
    usual, fast = copy.deepcopy(network).eval(), with_weights_in(LAST, network).eval()
    expected = usual(image)
    assert {"FastConv3d", "FastConvTranspose3d"} <= {type(module).__name__ for module in fast.modules()}
    assert not torch.equal(fast(image), expected)  # the sums are taken in another order
    counts = []
    for each in (usual, fast):
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(each(image), expected, rtol=1e-4, atol=1e-5)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its next version
        traced = [torch.fx.symbolic_trace(fast), torch.export.export(fast, (image,)).module()]
        traced += [make_fx(fast, pre_dispatch=early)(image) for early in (False, True)]
        traced += [torch.compile(fast, backend="eager", fullgraph=True)]
    for each in traced:
        torch.testing.assert_close(each(image), expected, rtol=1e-4, atol=1e-5)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    stand_in = mode.from_tensor(image)
    assert fast(stand_in).shape == expected.shape
    with mode:
        assert fast(stand_in).shape == expected.shape


def test_torchscript(network: UNet) -> None:
    """`python -m monai.bundle ckpt_export` writes it."""
    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=LAST)
    expected = network.eval()(image)
    scripted = torch.jit.script(with_weights_in(LAST, network))
    torch.testing.assert_close(scripted(image), expected, rtol=1e-4, atol=1e-5)
    one_image = image_of((2, 3, 4, 4, 4))[0]
    for layer in (FastInstanceNorm3d(3), FastPReLU()):
        torch.testing.assert_close(torch.jit.script(layer)(one_image), layer(one_image))


def test_a_traced_network_is_left_as_it_is(network: UNet) -> None:
    image = torch.randn(1, 1, 8, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own layers warn of a comparison
        traced = torch.jit.trace(network.eval(), image)
    assert use_fast_layers(traced)(image).shape == (1, 2, 8, 8, 8)


@pytest.mark.parametrize("of_image", [True, False], ids=["image", "weight"])
def test_second_derivative_of_one_alone(of_image: bool) -> None:
    found = []
    for layer in (FastPReLU(), torch.nn.PReLU()):
        image = image_of((2, 2, 3, 3, 3)).requires_grad_(of_image)
        asked = image if of_image else layer.weight
        layer.requires_grad_(not of_image)
        (gradient,) = torch.autograd.grad(layer(image).square().sum(), asked, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), asked)[0])
    torch.testing.assert_close(*found)


def test_derivative_forward() -> None:
    image = image_of((2, 2, 3, 3, 3))
    with forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(layer(forward_ad.make_dual(image, torch.ones_like(image)))).tangent
            for layer in (FastPReLU(), torch.nn.PReLU())
        ]
    torch.testing.assert_close(*tangents)
