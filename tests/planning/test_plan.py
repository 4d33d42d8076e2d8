"""What a run decides from its data, and the transforms that follow the decisions."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import UNet
from monai.transforms import create_rotate, create_shear

from monai_iou.datasets.cases import CaseFacts, DatasetError
from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.planning.intensity import looks_like_ct
from monai_iou.planning.plan import make_plan, network_size
from monai_iou.planning.stored import load_plan
from monai_iou.transforms import NormalizeModalitiesd


def facts(shape: tuple[int, int, int], spacing: tuple[float, float, float], foreground: list[float]) -> CaseFacts:
    return CaseFacts(shape, spacing, np.array([foreground], dtype=np.float32))


def folder(*modalities: str) -> SegmentationFolder:
    return SegmentationFolder(Path(), modalities, {0: "background", 4: "a", 9: "b"}, (), (), ())


@settings(max_examples=25, deadline=None)
@given(
    patch=st.tuples(*[st.integers(3, 40)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8)] * 3),
)
def test_every_patch_and_spacing_gets_a_network_that_runs(
    patch: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    channels, strides, window = network_size(patch, spacing, 2)
    assert all(side >= wanted for side, wanted in zip(window, patch, strict=True))
    assert all(side < wanted + 16 for side, wanted in zip(window, patch, strict=True))
    network = UNet(3, 1, 2, channels, strides, num_res_units=2).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, *window)).shape == (1, 2, *window)


def test_thick_slices_are_not_pooled_before_the_pixels_are_as_large() -> None:
    _, strides, _ = network_size((64, 64, 32), (1, 1, 3.0))
    assert strides[0] == (2, 2, 1)
    _, strides, _ = network_size((64, 64, 64), (1, 1, 1))
    assert set(strides) == {(2, 2, 2)}


def test_plan_takes_the_median_spacing_and_no_more_patch_than_there_is() -> None:
    cases = [
        facts((30, 30, 10), (1, 1, 3), [0, 1]),
        facts((34, 30, 12), (1, 1, 4), [0, 1]),
        facts((32, 30, 9), (1, 1, 4), [2]),
    ]
    plan = make_plan(folder("MR"), cases, [64, 24, 64])
    assert plan.pixdim == (1, 1, 4)
    assert plan.patch_size[1] == 24
    assert 34 <= plan.patch_size[0] < 34 + 16
    assert plan.label_values == [0, 4, 9]
    assert plan.classes == [0, 1, 2]
    assert make_plan(folder("MR"), cases, [64, 24, 64], [2, 2, 2]).pixdim == (2, 2, 2)


@pytest.mark.parametrize(
    ("modality", "kind"),
    [("CT", "ct"), ("ct", "ct"), ("CT_contrast", "ct"), ("CBCT", "ct"), ("SPECT", "zscore"), ("T1", "zscore")],
)
def test_only_ct_has_a_common_window(modality: str, kind: str) -> None:
    values = np.random.default_rng(0).normal(60, 20, 5000)
    rule = make_plan(folder(modality), [facts((9, 9, 9), (1, 1, 1), values.tolist())], [8, 8, 8]).intensity[0]
    assert rule["kind"] == kind
    if kind == "ct":
        assert (rule["lower"], rule["upper"]) == pytest.approx(np.percentile(values, (0.5, 99.5)), rel=1e-4)


def test_plan_survives_its_file(tmp_path: Path) -> None:
    plan = make_plan(folder("CT", "T1"), [CaseFacts((9, 9, 9), (1, 1, 1), np.ones((2, 5)))], [8, 8, 8])
    (tmp_path / "model.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "model.json") == plan
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(DatasetError, match="to be the plan that training stored"):
        load_plan(tmp_path / "model.json")


@pytest.mark.parametrize("patch", [[64, 64], [64, 64, 0], [64, 64, 1.5], "64", 64, [64, 64, "a"]])
def test_patch_size_that_cannot_be_used(patch: object) -> None:
    message = f"Expected `patch_size` to be 3 positive integers (voxels), but got {patch!r}: "
    message += 'write it as --patch_size "[a,b,c]".'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_plan(None, [], patch)  # type: ignore[arg-type]


def test_zscore_keeps_zeros_and_survives_large_raw_values() -> None:
    rng = np.random.default_rng(0)
    image = torch.tensor(rng.normal(1e6, 3e4, (1, 16, 16, 16)), dtype=torch.float32)
    image[0, :4] = 0
    out = NormalizeModalitiesd("image", [{"kind": "zscore"}])({"image": image})["image"]
    assert (out[0, :4] == 0).all()
    assert out[0, 4:].mean().item() == pytest.approx(0, abs=1e-3)
    assert out[0, 4:].std().item() == pytest.approx(1, abs=1e-3)
    constant = NormalizeModalitiesd("image", [{"kind": "zscore"}])({"image": torch.full((1, 4), 7.0)})["image"]
    assert (constant == 0).all()


@pytest.mark.parametrize("value", [1.0, 0.1, 255.0, 1e6, -3.0])
def test_a_channel_that_is_a_mask_does_not_vanish(value: float) -> None:
    mask = torch.zeros(1, 12, 11, 10)
    mask[0, 3:9, 2:9, 3:9] = value
    normalize = NormalizeModalitiesd("image", [{"kind": "zscore"}])
    torch.testing.assert_close(normalize({"image": mask})["image"], (mask != 0).float(), rtol=0, atol=0)
    mask[0, 4, 4] *= 1 + 1e-6
    torch.testing.assert_close(normalize({"image": mask})["image"], (mask != 0).float(), rtol=0, atol=0)


def test_a_channel_named_nonorm_keeps_its_values(tmp_path: Path) -> None:
    plan = make_plan(folder("T1", "noNorm"), [CaseFacts((9, 9, 9), (1, 1, 1), np.ones((2, 5)))], [8, 8, 8])
    assert [rule["kind"] for rule in plan.intensity] == ["zscore", "none"]
    (tmp_path / "model.json").write_text(plan.to_json())
    assert load_plan(tmp_path / "model.json") == plan
    image = torch.tensor([[0.0, 1, 3, 0], [0, 0.25, 1, -1000]])
    out = NormalizeModalitiesd("image", plan.intensity)({"image": image})["image"]
    torch.testing.assert_close(out, torch.stack([torch.tensor([0.0, -1, 1, 0]), image[1]]))


def test_ct_window_and_channels() -> None:
    rule = {"kind": "ct", "lower": 0.0, "upper": 100.0, "mean": 50.0, "std": 25.0}
    normalize = NormalizeModalitiesd("image", [rule, {"kind": "zscore"}])
    image = torch.tensor([[-500.0, 0, 50, 1000], [1, 1, 3, 3]])
    torch.testing.assert_close(normalize({"image": image})["image"], torch.tensor([[-2.0, -2, 0, 2], [-1, -1, 1, 1]]))
    with pytest.raises(ValueError, match="Expected `image` to have 2 channels, but got 1"):
        normalize({"image": image[:1]})


@given(sides=st.tuples(*[st.floats(0.3, 8)] * 3))
@settings(max_examples=50, deadline=None)
def test_nothing_turns_between_axes_of_very_unequal_spacing(sides: tuple[float, float, float]) -> None:
    plan = make_plan(None, [], [16, 16, 16], sides)
    unlike = {(a, b) for a in range(3) for b in range(3) if max(sides[a], sides[b]) >= 3 * min(sides[a], sides[b])}
    assert plan.is_anisotropic == bool(unlike)
    # All at once, as MONAI multiplies them: two turns between like axes may mix unlike ones.
    for matrix in (create_rotate(3, plan.rotations(0.5)), create_shear(3, plan.shears(0.1))):
        mixed = {(int(a), int(b)) for a, b in np.argwhere(np.abs(matrix[:3, :3] - np.eye(3)) > 1e-9)}
        assert not mixed & {pair for pair in unlike if pair[0] != pair[1]}
    if not unlike:
        assert plan.rotations(0.5) == [0.5] * 3
        assert plan.shears(0.1) == [0.1] * 6


def test_thick_slices_turn_in_their_plane() -> None:
    plan = make_plan(None, [], [16, 16, 16], (4.0, 1.0, 1.0))
    assert plan.rotations(0.5) == [0.5, 0, 0]
    matrix = create_shear(3, plan.shears(0.1))
    assert {(int(a), int(b)) for a, b in np.argwhere(np.abs(matrix[:3, :3]) > 0)} == {
        (0, 0),
        (1, 1),
        (2, 2),
        (1, 2),
        (2, 1),
    }


def test_the_rule_of_intensities_keeps_its_earlier_name() -> None:
    from monai_iou import planning
    from monai_iou.planning.intensity import intensity_rule

    assert planning._intensity is intensity_rule


@pytest.mark.parametrize(("patch", "dims"), [([1, 1, 1], None), ([1, 1], 2)])
def test_a_patch_that_leaves_one_voxel_is_refused(patch: list[int], dims: int | None) -> None:
    cases = [facts((20, 20, 9), (1, 1, 3), [0, 1])]
    with pytest.raises(ValueError, match=r"^Expected `patch_size`") as caught:
        make_plan(folder("MR"), cases, patch, spatial_dims=dims)
    assert str(caught.value) == (
        "Expected `patch_size` to leave at least two voxels at the network's coarsest level, but got [1, 1, 1], which "
        "leaves one: lengthen an axis."
    )
    assert make_plan(folder("MR"), cases, [1, 2, *patch[2:]], spatial_dims=dims).patch_size == (1, 2, 1)


def test_small_volumes_keep_their_patch() -> None:
    for shape in ((1, 1, 1), (3, 3, 3), (1, 7, 7)):
        assert np.prod(make_plan(folder("MR"), [facts(shape, (1, 1, 1), [0, 1])], [64, 64, 64]).patch_size) > 1


@pytest.mark.parametrize("channels", [4.0, 0, True, None])
def test_channels_are_a_positive_integer(channels: object) -> None:
    with pytest.raises(ValueError, match=r"^Expected `base_channels` to be a positive integer, but got"):
        make_plan(None, [], [16, 16, 16], base_channels=channels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("lowest", "values", "expected"),
    [
        ([-1024, -1000, 0], [40, 55], True),  # of one the air is cut off
        ([-1024, 0, 0], [40, 55], False),
        ([-3024, -500, -2000], [40, 55], True),
        ([-499, -499, -499], [40, 55], False),
        ([-4096, -4096, -4096], [40, 55], False),  # the phase of MR
        ([-1024, -1024, -1024], [40, 55.5], False),
        ([0, 0, 0], [40, 55], False),
    ],
)
def test_a_channel_looks_like_ct_by_its_air_and_whole_numbers(
    lowest: list[int], values: list[float], expected: bool
) -> None:
    cases = [replace(facts((9, 9, 9), (1, 1, 1), values), lowest=(float(low),)) for low in lowest]
    assert looks_like_ct("image", 0, cases) is expected
    assert not looks_like_ct("CTA", 0, cases)
    assert not looks_like_ct("image", 0, [replace(case, lowest=()) for case in cases])
