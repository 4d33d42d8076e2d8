"""The passes that write over their temporaries: the specification's numbers, tile by tile, whatever was in them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from monai_iou.voxels import in_place
from monai_iou.voxels.formulas import tile_gradient, tile_maps
from monai_iou.voxels.inputs import Tile, Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.spec import COUNT, ROWS, PassSpec

SPLIT = [PassSpec("sigmoid", overlap, cross_entropy=True, split=True) for overlap in ("product", None)]
USUAL = [
    *SPLIT,
    *(
        PassSpec(activation, overlap, cross_entropy=entropy)
        for activation, overlap, entropy in itertools.product(("softmax", "sigmoid"), ("product", None), (False, True))
        if overlap is not None or entropy
    ),
]
KINDS = ["labels", "ignored", "maps", "masked maps"]


def case(kind: str, dtype: torch.dtype, classes: int = 3) -> Voxels:
    generator = torch.Generator().manual_seed(classes)
    logits = (torch.randn(1, classes, 7, 5, generator=generator, dtype=torch.float64) * 4).to(dtype)
    labels = torch.randint(0, classes, (1, 1, 7, 5), generator=generator)
    maps = torch.rand(1, classes, 7, 5, generator=generator)
    keep = torch.rand(1, 1, 7, 5, generator=generator) > 0.4
    target = labels if kind in ("labels", "ignored") else maps
    return flatten_voxels(logits, target, None, keep if kind in ("ignored", "masked maps") else None)


def first_tile(voxels: Voxels) -> Tile:
    return voxels.tiles(voxels.logits.shape[2])[0][0]


def spoilt(space: in_place.Workspace) -> in_place.Workspace:
    """Fill the temporaries with NaN: nothing may depend on what a tile before has left in them."""
    for part in (space.maps, space.lines):
        part.fill_(torch.nan)
    return space


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", USUAL, ids=str)
def test_sums_and_gradient_of_a_tile_are_the_specification(spec: PassSpec, kind: str, dtype: torch.dtype) -> None:
    voxels = case(kind, dtype)
    exact = voxels.tile(0, slice(None), torch.float64)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    space = spoilt(in_place.Workspace.for_sums(voxels.logits, spec, 64))
    rows = torch.full((ROWS, 3), torch.nan, dtype=space.maps.dtype)
    in_place.add_tile(rows.unbind(), first_tile(voxels), spec, space)
    for row, values in tile_maps(*exact, None, spec):
        torch.testing.assert_close(rows[row].double(), values.sum(-1), rtol=tolerance, atol=tolerance)
    count = 35.0 if exact[2] is None else exact[2].sum().item()
    assert rows[COUNT].tolist() == [count] * 3

    pull = torch.randn(ROWS, 3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    place = torch.full_like(voxels.logits[0], torch.nan)
    space = spoilt(in_place.Workspace.for_gradient(voxels.logits, spec, 64))
    in_place.write_gradient(place, pull.to(space.maps.dtype).unbind(), first_tile(voxels), spec, space)
    expected = tile_gradient(*exact, pull, spec)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 10 * tolerance
    torch.testing.assert_close(place.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spec", USUAL, ids=str)
def test_a_short_tile_uses_a_part_of_the_workspace(spec: PassSpec) -> None:
    """Workspaces are cut for whole tiles; the last one of an image is shorter."""
    voxels = case("labels", torch.float32)
    wide = spoilt(in_place.Workspace.for_sums(voxels.logits, spec, 35))
    part = replace(voxels, logits=voxels.logits[..., :11], labels=_cut(voxels.labels, 11))
    exact = spoilt(in_place.Workspace.for_sums(part.logits, spec, 11))
    found, expected = (torch.zeros(ROWS, 3) for _ in range(2))
    in_place.add_tile(found.unbind(), first_tile(part), spec, wide)
    in_place.add_tile(expected.unbind(), first_tile(part), spec, exact)
    torch.testing.assert_close(found, expected)


def _cut(labels: Tensor | None, length: int) -> Tensor:
    assert labels is not None
    return labels[:, :length]


@pytest.mark.parametrize("margin", [0.0, 30.0, 200.0, 3e38])
def test_confident_and_extreme_logits_stay_finite(margin: float) -> None:
    logits = torch.tensor([[[margin, 0.0, -margin], [0.0, 0.0, margin]]])
    voxels = flatten_voxels(logits, torch.tensor([[[0, 1, 1]]]), None)
    for spec in USUAL:
        rows = torch.zeros(ROWS, 2)
        in_place.add_tile(rows.unbind(), first_tile(voxels), spec, in_place.Workspace.for_sums(logits, spec, 3))
        assert rows.isfinite().all()


def test_only_the_usual_specifications_are_covered() -> None:
    voxels = case("labels", torch.float32)
    assert all(in_place.covers(voxels, spec) for spec in USUAL)
    grouped = replace(voxels, groups=torch.zeros(1, 35, dtype=torch.long))
    assert not any(in_place.covers(grouped, spec) for spec in USUAL)
    others = [PassSpec(None), PassSpec(overlap="min_max"), PassSpec(power=2), PassSpec(confidence=True)]
    others += [PassSpec(cross_entropy=True, focal=2.0), PassSpec(cross_entropy=True, label_smoothing=0.1)]
    assert not any(in_place.covers(voxels, spec) for spec in others)
