"""Two dimensions: volumes of one slice, planned and given to 2D networks."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import GaussianSmooth, RandGaussianSmoothd
from torch import nn

from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.cases import CaseFacts
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.workflow.architecture import ONE_OUTPUT, with_network
from monai_iou.workflow.flat import SliceNetwork
from monai_iou.workflow.variants import NETWORKS, build_network


def facts(*shapes: tuple[int, int, int], spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[CaseFacts]:
    return [CaseFacts(shape, spacing, np.zeros((1, 0))) for shape in shapes]


def planned(*shapes: tuple[int, int, int], patch: Any = (32, 32, 32), **options: Any) -> Plan:
    return make_plan(None, facts(*shapes, **options.pop("facts", {})), list(patch), base_channels=4, **options)


@pytest.mark.parametrize("axis", range(3))
def test_slices_of_one_voxel_are_planned_in_two_dimensions(axis: int) -> None:
    shape: Any = tuple(1 if each == axis else 48 for each in range(3))
    plan = planned(shape, shape)
    assert (plan.spatial_dims, plan.flat_axis) == (2, axis)
    assert plan.patch_size == tuple(1 if each == axis else 32 for each in range(3))
    assert all(stride[axis] == 1 and max(stride) == 2 for stride in plan.strides)
    assert [angle > 0 for angle in plan.rotations(0.5)] == [each == axis for each in range(3)]
    assert planned(shape, patch=(32, 32)) == planned(shape)


def test_volumes_are_planned_in_three_unless_the_key_says_two() -> None:
    assert planned((48, 48, 1), (48, 48, 20)).spatial_dims == 3
    thick = planned((48, 48, 20), spatial_dims=2, facts={"spacing": (1.0, 5.0, 1.0)})
    assert (thick.flat_axis, thick.patch_size) == (1, (32, 1, 20 if thick.patch_size[2] == 20 else 24))
    assert planned((48, 48, 20), spatial_dims=2).flat_axis == 2
    padded = planned((48, 48, 1), spatial_dims=3)
    assert (padded.flat_axis, padded.patch_size) == (None, (32, 32, 5))


@pytest.mark.parametrize("axis", range(3))
def test_a_slice_is_what_the_2d_network_gives(axis: int) -> None:
    flat = nn.Conv2d(1, 3, 3, padding=1)
    image = torch.randn(2, 1, 6, 7)
    expected = flat(image)
    volume = image.unsqueeze(2 + axis)
    torch.testing.assert_close(SliceNetwork(flat, axis)(volume).squeeze(2 + axis), expected)


class _Several(nn.Module):
    def forward(self, image: torch.Tensor) -> Any:
        return [image, (image, torch.stack([image, image], 1))]


def test_every_output_gets_its_axis_back() -> None:
    first, (second, stacked) = SliceNetwork(_Several(), 1)(torch.zeros(1, 2, 6, 1, 7))
    assert first.shape == second.shape == (1, 2, 6, 1, 7)
    assert stacked.shape == (1, 2, 2, 6, 1, 7)


def test_more_than_a_slice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one slice along axis 2, but got 5 slices: give the patch") as caught:
        SliceNetwork(nn.Conv2d(1, 1, 1), 2)(torch.zeros(1, 1, 6, 7, 5))
    assert re.fullmatch(r"Expected .+, but .+: .+\.", str(caught.value))
    with pytest.raises(torch.jit.Error, match=re.escape(str(caught.value))):  # type: ignore[attr-defined]
        torch.jit.script(SliceNetwork(nn.Conv2d(1, 1, 1), 2))(torch.zeros(1, 1, 6, 7, 5))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("deep", [False, True])
def test_every_network_has_two_dimensions(name: str, deep: bool) -> None:
    if deep and name in ONE_OUTPUT:
        return
    plan = with_network(planned((48, 48, 1), full_resolution=True), name, deep_supervision=deep)
    network = build_network(plan)
    assert isinstance(network, SliceNetwork)
    assert not any(isinstance(part, nn.Conv3d) for part in network.modules())
    image = torch.randn(2, 1, *plan.patch_size)
    outputs = network.train()(image)
    finest = outputs[0] if isinstance(outputs, (list, tuple)) else outputs[:, 0] if outputs.ndim == 6 else outputs
    assert finest.shape == (2, 2, *plan.patch_size)
    assert network.eval()(image).shape == (2, 2, *plan.patch_size)


def smoothing(plan: Plan) -> RandGaussianSmoothd:
    """That of the shipped training, which always happens here."""
    config = json.loads((bundle_path() / "configs" / "train.json").read_text())
    transforms = config["train"]["random_transforms"]
    entry = next(each for each in transforms if each["_target_"] == "RandGaussianSmoothd")
    parser = ConfigParser({"plan": plan, "smooth": {**entry, "prob": 1.0}})
    made = parser.get_parsed_content("smooth")
    assert isinstance(made, RandGaussianSmoothd)
    return made


@pytest.mark.parametrize("axis", range(3))
def test_a_slice_is_smoothed_in_its_plane_alone(axis: int) -> None:
    shape: Any = tuple(1 if each == axis else 48 for each in range(3))
    smooth = smoothing(planned(shape))
    image = torch.rand(1, *planned(shape).patch_size)
    for seed in range(5):
        found = smooth.set_random_state(seed)({"image": image})["image"]
        drawn = [smooth.rand_smooth.x, smooth.rand_smooth.y, smooth.rand_smooth.z]
        in_plane = GaussianSmooth([sigma for each, sigma in enumerate(drawn) if each != axis])
        np.testing.assert_allclose(np.asarray(found.squeeze(1 + axis)), in_plane(image.squeeze(1 + axis)), atol=1e-6)
        constant = smooth({"image": torch.ones_like(image)})["image"]
        np.testing.assert_allclose(np.asarray(constant).squeeze()[12:20, 12:20], 1, atol=2e-4)


def test_volumes_are_smoothed_along_all_axes_as_ever() -> None:
    image = torch.rand(2, 12, 11, 10)
    ranges = {f"sigma_{axis}": (0.4, 1.0) for axis in "xyz"}
    usual = RandGaussianSmoothd("image", prob=1.0, **ranges)  # type: ignore[arg-type]
    ours = smoothing(planned((48, 48, 48)))
    for seed in range(5):
        found, expected = (each.set_random_state(seed)({"image": image})["image"] for each in (ours, usual))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
