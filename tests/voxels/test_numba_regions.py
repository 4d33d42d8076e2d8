"""Sums by region from the loops that Numba compiles: the specification's, whatever the regions are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_run import run
from torch import Tensor

from monai_iou import InstanceIoULoss, IoUCELoss, use_kernel, voxel_sums
from monai_iou.voxels import general_tiles, numba_pass, numba_tiles, tiled
from monai_iou.voxels.inputs import Findings, Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.reference import compute_sums as reference_sums
from monai_iou.voxels.spec import PassSpec

REGIONS = 5
TERMS: list[dict[str, Any]] = [
    {},
    {"cross_entropy": True},
    {"power": 2, "confidence": True},
    {"overlap": "min_max", "cross_entropy": True, "label_smoothing": 0.2},
    {"overlap": None, "cross_entropy": True, "focal": 2.0},
    {"power": 2, "cross_entropy": True, "focal": 0.5, "label_smoothing": 0.1},
]
SPECS = [PassSpec(activation, **terms) for activation in ("softmax", "sigmoid") for terms in TERMS]
SPECS += [PassSpec("sigmoid", cross_entropy=True, split=True)]
PLAIN = PassSpec("softmax")


def case(
    classes: int,
    kind: str,
    *,
    of_class: bool = False,
    run_length: int = 40,
    groups: torch.dtype = torch.int32,
    dtype: torch.dtype = torch.float32,
) -> Voxels:
    """Three images with two empty regions; the others go on for `run_length` voxels at least."""
    generator = torch.Generator().manual_seed(classes)
    count = 33 * 40
    logits = torch.randn(3, classes, count, generator=generator, dtype=torch.float64) * 3
    labels = torch.randint(0, max(classes, 2), (3, 1, count), generator=generator)
    maps = torch.rand(3, classes, count, generator=generator)
    mask = torch.rand(3, 1, count, generator=generator) > 0.4 if "ignored" in kind else None
    runs = torch.randint(0, REGIONS, (3, classes if of_class else 1, count // run_length), generator=generator)
    regions = runs.repeat_interleave(run_length, -1).to(groups)
    target = maps if "maps" in kind or classes == 1 else labels
    return flatten_voxels(logits.to(dtype), target, None, mask, regions, REGIONS + 2)


def assert_exact(voxels: Voxels, spec: PassSpec, repeat: int = 1) -> None:
    assert numba_pass.covers(voxels, spec)
    exact = run(reference_sums, replace(voxels, logits=voxels.logits.double()), spec)
    found = run(tiled.compute_sums, voxels, spec, repeat)
    assert found[0].shape == exact[0].shape
    torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-5)
    scale, tolerance = max(1.0, exact[1].abs().max().item()), 1e-5 if voxels.logits.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[1].double(), exact[1], rtol=tolerance, atol=tolerance * scale)


@pytest.fixture(params=[1 << 18, 1 << 10], ids=["one tile", "short tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_tiles, "_LEAST_ELEMENTS", request.param)
    monkeypatch.setattr(numba_tiles, "_MOST_ELEMENTS", request.param)
    monkeypatch.setattr(numba_tiles, "_LEAST_VOXELS", 1 << 8)


@pytest.fixture
def only_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        message = "a tile was left to the general formulas"
        raise AssertionError(message)

    monkeypatch.setattr(general_tiles, "add_tile", refuse)
    monkeypatch.setattr(general_tiles, "write_gradient", refuse)


@pytest.mark.usefixtures("tiles", "only_loops")
@pytest.mark.parametrize("of_class", [False, True], ids=["shared", "of each class"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sums_and_gradients_are_the_specification(spec: PassSpec, of_class: bool) -> None:
    for classes in (1, 2, 3) if spec.activation == "sigmoid" else (2, 4):
        for kind in ("labels", "ignored labels", "maps", "ignored maps"):
            assert_exact(case(classes, kind, of_class=of_class), spec)


@pytest.mark.usefixtures("only_loops")
@pytest.mark.parametrize("groups", [torch.int64, torch.uint8, torch.int16])
def test_regions_and_logits_of_any_dtype(groups: torch.dtype) -> None:
    for classes, of_class in ((2, False), (3, True)):
        assert_exact(case(classes, "labels", of_class=of_class, groups=groups), PLAIN, repeat=3)
        assert_exact(case(classes, "labels", of_class=of_class, groups=groups, dtype=torch.bfloat16), PLAIN)


def test_regions_that_lie_apart_in_memory_are_read_as_others() -> None:
    """As those of a target in channels-last order, where loops for any stride would be compiled, without vectors."""
    voxels = case(2, "labels")
    assert voxels.groups is not None
    apart = voxels.groups.unsqueeze(-1).expand(-1, -1, -1, 3).contiguous()[..., 1]
    assert apart.stride(-1) == 3
    tiles = numba_tiles.Tiles(replace(voxels, groups=apart), PLAIN)
    assert tiles.groups_of(0, slice(5, 77))[0].flags.c_contiguous
    assert_exact(replace(voxels, groups=apart), PLAIN)


@pytest.mark.parametrize("spec", SPECS[::3], ids=str)
def test_regions_that_end_after_a_voxel_or_two_are_left_to_the_general_formulas(
    spec: PassSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is short costs more than its voxels."""
    tiles: list[int] = []
    add_tile = general_tiles.add_tile
    monkeypatch.setattr(general_tiles, "add_tile", lambda *each: (tiles.append(1), add_tile(*each)))
    for run_length, are_general in ((1, True), (2, True), (24, False)):
        tiles.clear()
        assert_exact(case(2, "maps" if spec.activation == "sigmoid" else "labels", run_length=run_length), spec)
        assert bool(tiles) == are_general


@pytest.mark.usefixtures("tiles", "only_loops")
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("of_class", [False, True], ids=["shared", "of each class"])
@pytest.mark.parametrize(
    "spec",
    [
        PassSpec("sigmoid"),
        PassSpec("sigmoid", cross_entropy=True),
        PassSpec("sigmoid", cross_entropy=True, split=True),
        PassSpec("sigmoid", cross_entropy=True, label_smoothing=0.1),
    ],
    ids=["plain", "entropy", "split", "smoothed"],
)
def test_targets_of_zeros_and_ones_in_regions(spec: PassSpec, classes: int, of_class: bool) -> None:
    voxels = case(classes, "maps", of_class=of_class)
    assert voxels.maps is not None
    maps = (voxels.maps > 0.6).float()
    maps[..., : maps.shape[-1] // 2] = 0  # rows without the class
    logits = voxels.logits.clone()
    logits[..., ::11] = -200.0  # probabilities of 0, of either target
    mixed = maps.clone()
    mixed[-1, -1, -3] = 0.25
    assert_exact(replace(voxels, logits=logits, maps=maps), spec, repeat=2)
    assert_exact(replace(voxels, logits=logits, maps=mixed), spec)
    assert numba_tiles.Tiles(voxels, spec).is_usual == (spec.label_smoothing == 0)


@pytest.mark.usefixtures("tiles", "only_loops")
@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("step", [1, 2], ids=["in one piece", "apart in memory"])
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_whole_numbers_are_read_as_the_same_numbers_in_float32(cross_entropy: bool, step: int, classes: int) -> None:
    voxels, spec = case(classes, "maps"), PassSpec("sigmoid", cross_entropy=cross_entropy)
    assert voxels.maps is not None
    whole = (voxels.maps > 0.6).int()
    whole[..., : whole.shape[-1] // 2] = 0  # rows without the class
    whole = whole.repeat_interleave(step, -1)[..., ::step]
    assert (numba_tiles.Tiles(replace(voxels, maps=whole), spec).whole is not None) == (step == 1)
    assert_exact(replace(voxels, maps=whole), spec, repeat=2)
    for wrong in (-1, 2, 2**31 - 1):
        changed = whole.clone()
        changed[1, -1, -7] = wrong
        for maps in (changed, changed.float()):
            found = replace(voxels, maps=maps, findings=Findings())
            rows = tiled.compute_sums(found, spec)
            assert found.findings is not None
            assert found.findings.maps_are_shares is False
            expected = reference_sums(replace(voxels, logits=voxels.logits.double(), maps=maps), spec)
            torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tiles", "only_loops")
@pytest.mark.parametrize("cross_entropy", [False, True])
def test_two_classes_of_which_one_is_rare_in_regions(cross_entropy: bool) -> None:
    voxels = case(2, "labels")
    assert voxels.labels is not None
    labels = voxels.labels.clone()
    labels[..., : labels.shape[-1] // 2] = 0
    logits = voxels.logits.clone()
    logits[:, 0, ::13] = 120.0
    spec = PassSpec("softmax", cross_entropy=cross_entropy)
    assert numba_tiles.Tiles(voxels, spec).is_usual
    assert_exact(replace(voxels, logits=logits, labels=labels), spec, repeat=2)
    assert_exact(replace(voxels, logits=logits, labels=labels * 0), spec)


def test_a_region_of_one_label_has_nothing_of_the_other() -> None:
    labels = (torch.arange(4000) >= 1500).long().view(1, 1, -1)
    logits = torch.randn(1, 2, 4000, generator=torch.Generator().manual_seed(0))
    voxels = flatten_voxels(logits, labels, None, None, labels + 1, 3)
    sums = tiled.compute_sums(voxels, PLAIN)
    torch.testing.assert_close(sums, reference_sums(replace(voxels, logits=logits.double()), PLAIN), rtol=1e-5, atol=0)


def test_a_few_voxels_beside_large_lesions_keep_their_digits() -> None:
    """The background's share of a region that a lesion all but fills is no difference of float32 sums."""
    labels = torch.ones(1, 1, 1 << 18, dtype=torch.long)
    labels[..., 1000:1003] = 0
    logits = torch.zeros(1, 2, 1 << 18)
    logits[0, 1] = 8 + torch.rand(1 << 18, generator=torch.Generator().manual_seed(0))
    logits[0, 1, 1000:1003] = torch.tensor([-2.0, 0.0, 2.0])
    voxels = flatten_voxels(logits, labels, None, None, torch.zeros_like(labels), 1)
    expected = reference_sums(replace(voxels, logits=logits.double()), PLAIN)
    torch.testing.assert_close(tiled.compute_sums(voxels, PLAIN), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("lesion", [0, 1])
def test_a_small_class_keeps_its_digits_whichever_it_is(lesion: int) -> None:
    """Eight voxels in each of two regions, found in part, against nearly certain voxels of the other class."""
    margin = -12 - torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
    labels = torch.full((1, 1, 1 << 20), 1 - lesion)
    groups = (torch.arange(1 << 20) >= 1 << 19).long().view(1, 1, -1)
    for start in (5, 1 << 19):
        labels[..., start : start + 8] = lesion
        margin[start : start + 8] = torch.linspace(-3, 3, 8)
    logits = torch.zeros(1, 2, 1 << 20)
    logits[0, lesion] = margin
    voxels = flatten_voxels(logits, labels, None, None, groups, 2)
    expected = reference_sums(replace(voxels, logits=logits.double()), PLAIN)
    torch.testing.assert_close(tiled.compute_sums(voxels, PLAIN), expected, rtol=1e-5, atol=0)


def test_the_gradient_keeps_its_digits_where_one_region_of_several_is_nearly_certain() -> None:
    """Its slopes are as steep as the other class is rare, so that 1 - p from a rounded p would be seen."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.zeros(1, 2, 4000), torch.ones(1, 1, 4000, dtype=torch.long)
    logits[0, 1] = torch.randn(4000, generator=generator)
    logits[0, 1, 2000:] = 14 + torch.rand(2000, generator=generator)
    labels[..., :2000] = torch.randint(0, 2, (2000,), generator=generator)
    groups = (torch.arange(4000) >= 2000).long().view(1, 1, -1)
    gradients = []
    for kernel, dtype in (("reference", torch.float64), ("tiled", torch.float32)):
        leaf = logits.to(dtype).requires_grad_()
        with use_kernel(kernel):
            sums = voxel_sums(leaf, labels, groups=groups, cross_entropy=False)
        (gradient,) = torch.autograd.grad(sums.union.log().sum(), leaf)
        gradients.append(gradient.double())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("spec", SPECS[::3], ids=str)
def test_numbers_that_are_not_finite_end_as_in_the_general_formulas(
    spec: PassSpec, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    voxels = case(2, "maps" if spec.activation == "sigmoid" else "labels")
    voxels.logits[0, -1, 3] = voxels.logits[1, 0, 700] = poison
    found = run(tiled.compute_sums, voxels, spec)
    monkeypatch.setattr(numba_pass, "covers", lambda *_: False)
    torch.testing.assert_close(found, run(tiled.compute_sums, voxels, spec), rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("rows", ["of both classes", "of the background alone"])
@pytest.mark.parametrize("value", [2, -1, 255])
def test_labels_that_are_not_classes_are_found_in_any_region(value: int, rows: str) -> None:
    """Also in a row whose other voxels are background, which is summed with fewer sums."""
    labels = torch.randint(0, 2, (1, 1, 8192))
    if rows == "of the background alone":
        labels[..., :5000] = 0
    groups = (torch.arange(8192) >= 4096).int().view(1, 1, -1)
    logits = torch.randn(1, 2, 8192)
    voxel_sums(logits, labels, groups=groups)
    for place in (10, 3000):
        wrong = labels.clone()
        wrong[..., place] = value
        for options in ({}, {"cross_entropy": False}):
            with pytest.raises(ValueError, match=f"{value}"):
                voxel_sums(logits, wrong, groups=groups, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", ["of shares", "of zeros"])
@pytest.mark.parametrize("value", [-0.01, 1.5, -1e-45, torch.nan, torch.inf])
@pytest.mark.parametrize("classes", [1, 3])
def test_targets_that_are_no_shares_are_found_in_any_region(classes: int, value: float, rows: str) -> None:
    maps = torch.rand(1, classes, 8192)
    if rows == "of zeros":
        maps[..., :5000] = 0
    groups = (torch.arange(8192) >= 4096).int().view(1, 1, -1)
    logits = torch.randn(1, classes, 8192)
    for activation in ("sigmoid", "softmax") if classes > 1 else ("sigmoid",):
        voxel_sums(logits, maps, groups=groups, activation=activation)  # type: ignore[arg-type]
        wrong = maps.clone()
        wrong[0, -1, 3000] = value
        with pytest.raises(ValueError, match=r"^Expected `target` to hold (per-class )?values between 0 and 1"):
            voxel_sums(logits, wrong, groups=groups, activation=activation)  # type: ignore[arg-type]


def test_a_voxel_of_no_region_counts_nowhere() -> None:
    outside = torch.full((3, 1, 50), -1)
    voxels = flatten_voxels(torch.randn(3, 2, 50), torch.ones(3, 1, 50).long(), None, None, outside, 2)
    assert not tiled.compute_sums(voxels, PLAIN).any()


@pytest.mark.parametrize(("classes", "term"), [(1, None), (2, None), (2, IoUCELoss), (4, None), (4, IoUCELoss)])
def test_a_loss_by_lesions_and_its_gradient_are_those_of_the_reference(classes: int, term: Any) -> None:
    activation = {"sigmoid": True} if classes == 1 else {"softmax": True}
    logits = torch.randn(2, classes, 9, 10, 40)
    labels = torch.zeros(2, 1, 9, 10, 40, dtype=torch.long)
    labels[:, :, 1:3, 2:4, 2:5] = labels[1, :, 1:2, 8:9, 8:9] = 1
    labels[:, :, 6:8, 5:9, 27:39] = max(1, classes - 1)
    found: list[tuple[Tensor, ...]] = []
    for kernel in ("reference", "tiled"):
        leaf = logits.clone().requires_grad_()
        with use_kernel(kernel):
            loss = InstanceIoULoss(term=None if term is None else term(**activation), **activation)
            value = loss(leaf, labels.float() if classes == 1 else labels)
        found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.testing.assert_close(found[1], found[0])


def test_what_a_tile_holds_does_not_grow_with_the_regions_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of regions and hundreds of tiles would be a table of gigabytes."""
    monkeypatch.setattr(numba_tiles, "_LEAST_ELEMENTS", 1 << 10)
    monkeypatch.setattr(numba_tiles, "_MOST_ELEMENTS", 1 << 10)
    monkeypatch.setattr(numba_tiles, "_LEAST_VOXELS", 1 << 8)
    sizes: list[int] = []
    in_threads = numba_pass.in_threads

    def watched(*each: Any) -> list[Any]:
        results = in_threads(*each)
        sizes.extend(found.rows.shape[1] for _, found in results)
        return results

    monkeypatch.setattr(numba_pass, "in_threads", watched)
    groups = (torch.arange(1 << 14) // 64).view(1, 1, -1)
    voxels = flatten_voxels(torch.randn(1, 2, 1 << 14), torch.randint(0, 2, (1, 1, 1 << 14)), None, None, groups, 256)
    found = tiled.compute_sums(voxels, PLAIN)
    torch.testing.assert_close(found, reference_sums(voxels, PLAIN), rtol=1e-5, atol=1e-5, check_dtype=False)
    assert max(sizes) <= 9


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_regions_that_are_expanded_are_those_of_each_class(dtype: torch.dtype) -> None:
    """A cross-entropy of a region is that of all classes if each class has its own regions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 1, 4000), generator=generator)
    groups = (torch.arange(4000) // 1000).to(dtype).expand(2, 3, -1)
    found = []
    for given in (groups, groups.contiguous()):
        logits = torch.randn(2, 3, 4000, generator=torch.Generator().manual_seed(1)).requires_grad_()
        rows = voxel_sums(logits, labels, groups=given).rows
        weights = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2))
        found.append((rows.detach(), *torch.autograd.grad((rows * weights).sum(), logits)))
    torch.testing.assert_close(found[0], found[1])
