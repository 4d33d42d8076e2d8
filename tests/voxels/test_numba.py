"""The loops that Numba compiles against the specification, whatever the numbers, layouts and dtypes are."""

from __future__ import annotations

import errno
import importlib
import itertools
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest
import torch
from kernel_run import run
from light_import import LIGHT_IMPORT
from torch import Tensor

from monai_iou import IoUCELoss, IoUFocalLoss, IoULoss, kernel_report, use_kernel, voxel_sums
from monai_iou.voxels import (
    huge_pages,
    in_place,
    numba_cell_slopes,
    numba_cells,
    numba_lines,
    numba_math,
    numba_pass,
    numba_regions,
    numba_softmax,
    numba_tiles,
    numba_usual,
    tiled,
    tiling,
)
from monai_iou.voxels.inputs import Voxels
from monai_iou.voxels.passes import flatten_voxels
from monai_iou.voxels.reference import compute_sums as reference_sums
from monai_iou.voxels.spec import PassSpec

OVERLAPS = [
    ("product", 1.0, False),
    ("product", 2.0, True),
    ("product", 2.0, False),
    ("min_max", 1.0, True),
    (None, 1.0, False),
    (None, 2.0, False),
]
SPECS = [
    PassSpec(activation, overlap, power, entropy, focal, smoothing, confidence, split=split)
    for activation, (overlap, power, confidence), (entropy, focal, smoothing), split in itertools.product(
        ("softmax", "sigmoid"),
        OVERLAPS,
        ((False, 0.0, 0.0), (True, 0.0, 0.0), (True, 2.0, 0.0), (True, 0.5, 0.1), (True, 0.0, 0.2)),
        (False, True),
    )
    if (overlap is not None or entropy) and (not split or (entropy and activation == "sigmoid"))
]
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def case(classes: int, kind: str, dtype: torch.dtype = torch.float32, voxels: int = 1500) -> Voxels:
    """Random voxels of two images: labels, ignored labels, soft maps or ignored soft maps."""
    generator = torch.Generator().manual_seed(classes)
    logits = (torch.randn(2, classes, voxels, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, max(classes, 2), (2, 1, voxels), generator=generator)
    maps = torch.rand(2, classes, voxels, generator=generator)
    mask = torch.rand(2, 1, voxels, generator=generator) > 0.4 if "ignored" in kind else None
    return flatten_voxels(logits, maps if "maps" in kind else labels, None, mask)


def _double(x: float) -> float:
    return 2 * x


def assert_exact(voxels: Voxels, spec: PassSpec, repeat: int = 1) -> None:
    assert numba_pass.covers(voxels, spec)
    exact = run(reference_sums, replace(voxels, logits=voxels.logits.double()), spec)
    found = run(numba_pass.compute_sums, voxels, spec, repeat)
    assert found[1].dtype == voxels.logits.dtype
    torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-5)
    tolerance = GRADIENT[voxels.logits.dtype]
    scale = max(1.0, exact[1].abs().max().item())
    torch.testing.assert_close(found[1].double(), exact[1], rtol=tolerance, atol=tolerance * scale)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_tiles, "_LEAST_ELEMENTS", 1 << 11)
    monkeypatch.setattr(numba_tiles, "_MOST_ELEMENTS", 1 << 11)
    monkeypatch.setattr(numba_tiles, "_LEAST_VOXELS", 1 << 9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sums_and_gradients_are_the_specification(spec: PassSpec) -> None:
    for classes in (1, 2, 3) if spec.activation == "sigmoid" else (2, 5):
        for kind in ("labels", "ignored labels", "maps", "ignored maps"):
            assert_exact(case(classes, kind if classes > 1 else kind.replace("labels", "maps")), spec)


def zeros_and_ones(classes: int) -> Voxels:
    """Random voxels of two images whose maps hold 0 and 1 alone; a quarter of the rows holds 0 alone."""
    voxels = case(classes, "maps", voxels=4500)
    assert voxels.maps is not None
    maps = (voxels.maps > 0.6).float()
    maps[..., : maps.shape[-1] // 4] = 0
    return replace(voxels, maps=maps)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.activation == "sigmoid"], ids=str)
def test_targets_of_zeros_and_ones_are_not_read_again(spec: PassSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where probabilities are kept, the targets are their signs; a tile with another target is read again."""
    asked: list[bool] = []
    of_each_class = numba_tiles.Tiles.of_each_class

    def note(tiles: Any, *part: Any, reads_target: bool = True) -> Any:
        asked.append(reads_target)
        return of_each_class(tiles, *part, reads_target=reads_target)

    monkeypatch.setattr(numba_tiles.Tiles, "of_each_class", note)
    for classes in (1, 3):
        voxels = zeros_and_ones(classes)
        asked.clear()
        assert_exact(voxels, spec, repeat=2)
        keeps = numba_tiles.Tiles(voxels, spec).is_usual
        tiles = len(numba_tiles.Tiles(voxels, spec).parts)
        assert asked.count(False) == (tiles if keeps else 0), "the second backward pass computes everything again"
        assert voxels.maps is not None
        for value in (0.5, 0.25, 0.75, 1e-30):  # of one class, in the last tile of the second image
            maps = voxels.maps.clone()
            maps[1, -1, -7] = value
            asked.clear()
            assert_exact(replace(voxels, maps=maps), spec)
            assert asked.count(False) == (tiles - 1 if keeps else 0)


@pytest.mark.parametrize("overlap", ["product", "min_max", None])
def test_a_voxel_of_the_class_whose_probability_is_zero_keeps_its_target(overlap: str | None) -> None:
    """The sign of 0 would be lost, and with it the cross-entropy's gradient of a lesion that is missed completely."""
    logits = torch.full((1, 1, 700), -200.0)
    logits[..., ::3] = 50.0
    maps = torch.zeros(1, 1, 700)
    maps[..., ::2] = 1.0
    spec = PassSpec("sigmoid", overlap, cross_entropy=True)
    assert numba_tiles.Tiles(flatten_voxels(logits, maps, None), spec).is_usual
    assert_exact(flatten_voxels(logits, maps, None), spec)
    two = flatten_voxels(torch.cat([-logits, logits], 1), maps.long(), None)
    assert_exact(two, replace(spec, activation="softmax"))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS[::9], ids=str)
def test_half_precision_is_computed_in_single(spec: PassSpec, dtype: torch.dtype) -> None:
    for classes, kind in ((2, "labels"), (3, "ignored maps")):
        assert_exact(case(classes, kind, dtype), spec)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("spec", SPECS[::7], ids=str)
def test_a_further_backward_pass_computes_again_what_the_first_has_overwritten(spec: PassSpec) -> None:
    for classes in (2, 3):
        assert_exact(case(classes, "labels"), spec, repeat=3)


@pytest.mark.parametrize("voxels", [1, 2, 7, 1023, 1024, 1025, 4099])
def test_any_number_of_voxels(voxels: int) -> None:
    for classes, activation in ((1, "sigmoid"), (2, "softmax"), (4, "softmax"), (30, "softmax")):
        assert_exact(case(classes, "maps" if classes == 1 else "labels", voxels=voxels), PassSpec(activation))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("spec", SPECS[::3], ids=str)
def test_numbers_that_are_not_finite_end_as_in_the_general_formulas(
    spec: PassSpec, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for classes, kind in ((2, "labels"), (2, "ignored labels"), (3, "maps")):
        voxels = case(classes, kind)
        voxels.logits[0, -1, 3] = voxels.logits[1, 0, 1400] = poison
        voxels.logits[1, -1, 41] = -poison
        found = run(numba_pass.compute_sums, voxels, spec)
        with monkeypatch.context() as patch:
            for faster in (numba_pass, in_place):
                patch.setattr(faster, "covers", lambda *_: False)
            general = run(tiled.compute_sums, voxels, spec)
        torch.testing.assert_close(found, general, rtol=1e-4, atol=1e-3, equal_nan=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float16])
def test_labels_of_any_dtype_and_stride(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 3, 700), torch.randint(0, 3, (2, 1, 700, 4)).to(dtype)
    for spec in (PassSpec(), PassSpec("sigmoid", cross_entropy=True)):
        expected = run(numba_pass.compute_sums, flatten_voxels(logits, labels[..., 1].long(), None), spec)
        found = run(numba_pass.compute_sums, flatten_voxels(logits, labels[..., 1], None), spec)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_logits_are_read_and_gradients_written_where_they_are() -> None:
    whole, labels = torch.randn(2, 4, 6, 5, 8), torch.randint(0, 2, (2, 1, 6, 5, 8))
    for activation, channels in (("softmax", slice(1, 3)), ("sigmoid", slice(1, 3)), ("softmax", slice(0, 4))):
        for spec in (PassSpec(activation, cross_entropy=True), PassSpec(activation, power=2)):
            parts = (whole[:, channels], whole[:, channels].to(memory_format=torch.channels_last_3d))
            expected = run(reference_sums, flatten_voxels(parts[0].double(), labels, None), spec)
            for part in (*parts, whole[:1, channels].expand(2, -1, -1, -1, -1)):
                exact = expected
                if part.stride(0) == 0:
                    exact = run(reference_sums, flatten_voxels(part.double(), labels, None), spec)
                found = run(numba_pass.compute_sums, flatten_voxels(part, labels, None), spec)
                torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=1e-5)


def test_the_gradient_is_the_only_large_tensor_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities are kept where the gradient will stand; without a gradient nothing is kept."""
    logits = torch.randn(1, 2, 50, requires_grad=True)
    rows = tiled.compute_sums(flatten_voxels(logits, torch.zeros(1, 1, 50), None), PassSpec())
    node: Any = rows.grad_fn
    while not hasattr(node, "kept"):
        node = node.next_functions[0][0]
    torch.testing.assert_close(node.kept[0, 1], logits[0].softmax(0)[1])
    asked: list[Tensor] = []

    def empty_like(tensor: Tensor) -> Tensor:
        asked.append(tensor)
        return torch.empty_like(tensor)

    monkeypatch.setattr(huge_pages, "empty_like", empty_like)
    with torch.no_grad():
        assert tiled.compute_sums(flatten_voxels(logits, torch.zeros(1, 1, 50), None), PassSpec()).grad_fn is None
    assert not asked
    tiled.compute_sums(flatten_voxels(logits, torch.zeros(1, 1, 50), None), PassSpec())
    assert len(asked) == 1


@pytest.mark.parametrize("count", [100_001, 400_001])
@pytest.mark.parametrize("poison", [0.0, 3e38])
@pytest.mark.parametrize("classes", [1, 2, 4])
def test_sums_and_gradient_are_the_same_to_the_last_bit_for_any_number_of_threads(
    classes: int, poison: float, count: int
) -> None:
    """Also where the general formulas take a tile, and where there is but one."""
    allowed, found = torch.get_num_threads(), []
    voxels = case(classes, "maps" if classes == 1 else "labels", voxels=count)
    voxels.logits[0, -1, 12_345] = poison
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            found.append(run(numba_pass.compute_sums, voxels, PassSpec("sigmoid", cross_entropy=True)))
        finally:
            torch.set_num_threads(allowed)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_exponential_and_logarithm_are_right_to_a_few_units_in_the_last_place() -> None:
    x = -np.logspace(-8, math.log10(87), 20_001, dtype=np.float32)
    exponentials = np.array([numba_math.exp(value) for value in x])
    np.testing.assert_allclose(exponentials, np.exp(x.astype(np.float64)), rtol=3e-7)
    y = np.logspace(-30, 30, 20_001, dtype=np.float32)
    logarithms = np.array([numba_math.log1p(value) for value in y])
    np.testing.assert_allclose(logarithms, np.log1p(y.astype(np.float64)), rtol=3e-7)
    assert numba_math.exp(np.float32(0)) == 1
    assert numba_math.exp(np.float32(-1000)) == numba_math.log1p(np.float32(0)) == 0


@pytest.mark.parametrize("margin", [9.0, 14.0, 20.0, 40.0])
@pytest.mark.parametrize("classes", [2, 3])
def test_confident_voxels_keep_their_digits(classes: int, margin: float) -> None:
    """Simplified as numbers without rounding, ln(1 + x) of a small x would be 0."""
    logits = torch.zeros(1, classes, 600)
    logits[0, 0] = margin
    voxels = flatten_voxels(logits, torch.zeros(1, 1, 600, dtype=torch.long), None)
    for spec in (PassSpec(cross_entropy=True), PassSpec(None, cross_entropy=True, focal=2.0)):
        spec = replace(spec, activation="softmax")
        exact = run(reference_sums, replace(voxels, logits=logits.double()), spec)
        found = run(numba_pass.compute_sums, voxels, spec)
        torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-36)
        torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [-0.01, 1.01, -1e-45, 1 + 2**-23, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("classes", [1, 3])
def test_targets_that_are_not_shares_are_found_while_they_are_read(classes: int, value: float) -> None:
    logits, maps = torch.randn(1, classes, 5000), torch.rand(1, classes, 5000)
    for activation, options in (("softmax", {}), ("sigmoid", {"gamma": 2.0}), ("softmax", {"power": 2.0})):
        voxel_sums(logits, maps, activation=activation, **options)  # type: ignore[arg-type]
        wrong = maps.clone()
        wrong[0, -1, 4321] = value
        with pytest.raises(ValueError, match=r"^Expected `target` to hold (per-class )?values between 0 and 1"):
            voxel_sums(logits, wrong, activation=activation, **options)  # type: ignore[arg-type]
        logits_with_nan = logits.clone()
        logits_with_nan[0, 0, 4321] = torch.nan  # the general formulas read this tile
        with pytest.raises(ValueError, match=r"^Expected `target` to hold (per-class )?values between 0 and 1"):
            voxel_sums(logits_with_nan, wrong, activation=activation, **options)  # type: ignore[arg-type]
        mask = torch.ones(1, 1, 5000)
        mask[..., 4321] = 0  # an ignored voxel may hold anything
        voxel_sums(logits, wrong, activation=activation, mask=mask, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1 + 1e-9, -1e-60])
def test_targets_that_single_precision_would_round_to_a_share_are_refused(value: float) -> None:
    maps = torch.rand(1, 1, 50, dtype=torch.float64)
    maps[..., 7] = value
    with pytest.raises(ValueError, match=rf"but got {value}: "):
        voxel_sums(torch.randn(1, 1, 50), maps)


@pytest.fixture(params=["missing", "off", "wrong", "no vectors"])
def without_numba(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make Numba unusable in one way; return what the report says of it."""

    def refuse(name: str) -> Any:
        message = f"Numba needs NumPy 1.0 or less, said {name}"
        raise ImportError(message)

    reason = "NUMBA_DISABLE_JIT is set"
    if request.param == "missing":
        monkeypatch.setattr(numba_tiles.importlib, "import_module", refuse)
        reason = (
            "Numba does not work here (ImportError: Numba needs NumPy 1.0 or less, said monai_iou.voxels.numba_usual)"
        )
    elif request.param == "off":
        monkeypatch.setattr(numba.core.config, "DISABLE_JIT", 1)
    elif request.param == "no vectors":
        monkeypatch.setattr(numba_regions, "vectors_work", lambda: False)
        reason = "vectors do not work in Numba here"
    else:
        monkeypatch.setattr(numba_math, "exp", lambda _: 0.25)
        reason = "Numba computed exp(-1) = 0.25"
    numba_tiles.loaded.cache_clear()
    yield reason
    numba_tiles.loaded.cache_clear()


@pytest.mark.parametrize("loss", [IoULoss, IoUCELoss, IoUFocalLoss])
def test_without_numba_torch_does_the_same(loss: Any, without_numba: str) -> None:
    logits, labels = torch.randn(1, 3, 9, 9), torch.randint(0, 3, (1, 1, 9, 9))
    assert not numba_pass.covers(flatten_voxels(logits, labels, None), PassSpec())
    gradients = []
    for kernel in ("tiled", "reference"):
        leaf = logits.clone().requires_grad_()
        with use_kernel(kernel):
            loss(softmax=True)(leaf, labels).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)
    assert kernel_report()["cpu"] == (
        f"tiled: the default on a CPU; its loops are operations of torch, because {without_numba}."
    )


@pytest.mark.slow
def test_a_program_that_logs_everything_is_spared_the_compilers_lines(tmp_path: Path) -> None:
    script = (
        "import logging; logging.basicConfig(level=logging.DEBUG)\n"
        f"import numpy, torch\n{LIGHT_IMPORT}from monai_iou.voxels import numba_math\n"
        "numba_math.loop(lambda x: 2 * x)(1.0); print(logging.getLogger('numba').level)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(logging.WARNING)
    assert "numba" not in done.stderr


def test_in_inference_mode() -> None:
    logits, labels = torch.randn(1, 2, 60), torch.randint(0, 2, (1, 1, 60))
    with torch.inference_mode():
        found = IoUCELoss(softmax=True)(logits.clone(), labels)
    torch.testing.assert_close(found.clone(), IoUCELoss(softmax=True)(logits, labels))


def test_what_the_loops_do_not_cover_is_left_to_torch() -> None:
    labels = torch.randint(0, 2, (1, 1, 50))
    voxels = flatten_voxels(torch.randn(1, 2, 50), labels, None)
    assert numba_pass.covers(voxels, PassSpec())
    assert not numba_pass.covers(replace(voxels, logits=voxels.logits.double()), PassSpec())
    assert not numba_pass.covers(replace(voxels, logits=voxels.logits[:0]), PassSpec())
    for spec in (PassSpec(None), PassSpec(power=1.5), PassSpec(bins=64)):
        assert not numba_pass.covers(voxels, spec)
    found, exact = (run(kernel, voxels, PassSpec(power=1.5)) for kernel in (tiled.compute_sums, reference_sums))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


def test_machine_code_is_kept_nowhere_if_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def refuse(*functions: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            message = "cannot cache function: no locator available"
            raise RuntimeError(message)
        return njit(*functions, **options)

    monkeypatch.setattr(numba_math.numba, "njit", refuse)
    loop: Any = numba_math.loop(_double)
    assert loop(4.0) == 8.0
    assert loop.stats.cache_path is None


@pytest.fixture
def hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return what uses a loop, as a new process would, and returns how often machine code came from `tmp_path`."""
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path))

    def use() -> int:
        loop: Any = numba_math.loop(_double)
        assert loop(4.0) == 8.0
        return sum(loop.stats.cache_hits.values())

    return use


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("length", [0, 60])
def test_machine_code_in_a_file_that_was_cut_short_is_made_again(
    suffix: str, length: int, tmp_path: Path, hits: Callable[[], int]
) -> None:
    assert (hits(), hits()) == (0, 1)
    for file in tmp_path.rglob(f"*.{suffix}"):
        os.truncate(file, length)
    assert (hits(), hits()) == (0, 1)


def test_a_full_disk_is_no_hindrance(hits: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", refuse)
    assert (hits(), hits()) == (0, 0)


@pytest.mark.parametrize(
    ("where", "name", "value"), [(numba.core.config, "CPU_NAME", "generic"), (numba, "__version__", "0.1")]
)
def test_kinds_of_processor_and_versions_of_numba_share_no_file(
    where: Any, name: str, value: str, tmp_path: Path, hits: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numba would let two of them write to one file at the same time, and load the machine code of the other."""
    hits()
    of_this = set(tmp_path.rglob("*.nb?"))
    monkeypatch.setattr(where, name, value)
    assert (hits(), hits()) == (0, 1)
    assert len(set(tmp_path.rglob("*.nb?")) - of_this) == len(of_this) == 2


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], tuple[float, int]]]:
    """Return what multiplies 4 by a factor with a loop of that version, and how often its machine code was kept.

    The loops of all versions stand in the same line of the same file, as those of a package that is installed anew.
    """
    monkeypatch.setattr(numba.core.config, "CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(tmp_path)

    def call(factor: int) -> tuple[float, int]:
        (tmp_path / "own_loops.py").write_text(f"def scaled(x):\n    return {factor} * x\n")
        sys.modules.pop("own_loops", None)
        importlib.invalidate_caches()
        monkeypatch.setattr(numba_math, "_STAMP", f"{factor:08}" + "0" * 56)
        loop: Any = numba_math.loop(importlib.import_module("own_loops").scaled)
        return loop(4.0), sum(loop.stats.cache_hits.values())

    yield call
    sys.modules.pop("own_loops", None)


def test_machine_code_of_earlier_loops_is_not_taken_for_that_of_new_ones(
    installed: Callable[[int], tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full after Numba's first file, the index, leaves the second one, the data, as it was."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert (installed(2), installed(2)) == ((8.0, 0), (8.0, 1))
    with monkeypatch.context() as full:
        full.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", refuse)
        assert installed(3) == (12.0, 0)
    assert (installed(3), installed(3)) == ((12.0, 0), (12.0, 1))


def test_machine_code_of_earlier_loops_is_removed_and_that_of_other_processors_stays(
    tmp_path: Path, installed: Callable[[int], tuple[float, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(numba.core.config, "CPU_NAME", "generic")
        installed(2)
        of_other = set(tmp_path.rglob("*.nb?"))
    for factor in (2, 3):
        installed(factor)
        assert len(set(tmp_path.rglob("*.nb?")) - of_other) == len(of_other) == 2
    assert of_other <= set(tmp_path.rglob("*.nb?"))


@pytest.mark.parametrize(
    "module",
    [
        numba_cell_slopes,
        numba_cells,
        numba_lines,
        numba_math,
        numba_regions,
        numba_softmax,
        numba_usual,
    ],
)
def test_every_loop_takes_one_combination_of_types(module: ModuleType) -> None:
    for voxels in (case(2, "labels"), case(3, "ignored labels"), case(3, "maps", torch.float16)):
        run(numba_pass.compute_sums, voxels, PassSpec(cross_entropy=True, focal=2.0))
        run(numba_pass.compute_sums, voxels, PassSpec("sigmoid", cross_entropy=True))
        groups = torch.zeros(2, 1, voxels.logits.shape[2], dtype=torch.uint8)
        run(numba_pass.compute_sums, replace(voxels, groups=groups), PassSpec())
        run(numba_pass.compute_sums, replace(voxels, groups=groups), PassSpec("sigmoid", power=2))
    for name, loop in vars(module).items():
        if hasattr(loop, "py_func"):
            signatures = {signature for signature, *_ in loop._cache._cache_file._load_index()}
            assert len(signatures) <= 1, name


def test_machine_code_is_current_while_no_file_of_loops_has_changed(tmp_path: Path) -> None:
    folder = Path(numba_math.__file__).parent
    files = [path.name for path in folder.glob("numba_*.py")]
    names = ("cell_slopes", "cells", "lines", "math", "regions", "softmax", "usual")
    assert {f"numba_{name}.py" for name in names} <= set(files)
    for name in files:
        shutil.copy(folder / name, tmp_path)
    current = numba_math.source_stamp(tmp_path)
    assert current == numba_math.source_stamp(folder)
    stamps = {loop._cache._cache_file._source_stamp for loop in (numba_math.exp, numba_lines.add_line)}
    assert stamps == {current}
    with (tmp_path / "numba_math.py").open("a") as file:
        file.write("# a change\n")
    assert numba_math.source_stamp(tmp_path) != current


def test_a_folder_that_cannot_be_written_to_is_no_hindrance(tmp_path: Path) -> None:
    """An installation of another user, and no home of one's own."""
    script = (
        f"import torch\n{LIGHT_IMPORT}from monai_iou.voxels import voxel_sums\n"
        "x = torch.randn(1, 2, 40, requires_grad=True); sums = voxel_sums(x, torch.ones(1, 1, 40, dtype=torch.long))\n"
        "sums.union.sum().backward(); print(x.grad.isfinite().all())"
    )
    nowhere = tmp_path / "file"
    nowhere.write_text("")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(nowhere / "cache"), "HOME": str(nowhere)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "tensor(True)", done.stderr


def test_threads_may_compile_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_MAX_THREADS", 8)
    voxels = case(2, "labels", voxels=9000)
    found = tiling.in_threads(lambda _: numba_pass.compute_sums(voxels, PassSpec(confidence=True)), list(range(8)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
