"""The pass over a whole batch by loops that Numba compiles, a tile at a time, in threads.

The loops read the logits and labels where they are. Between forward and backward they keep the probabilities of each
class of a sigmoid, or of the second of two classes of a softmax, where the gradient will stand, with the label as their
sign; of more classes of a softmax nothing. A tile whose numbers they do not take (NaN, infinite, extreme) is left to
the general formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from monai_iou.voxels import general_tiles, huge_pages, in_place
from monai_iou.voxels.inputs import Voxels, total_dtype
from monai_iou.voxels.labels import narrowed
from monai_iou.voxels.numba_tiles import Array, Flat, Tiles, loaded
from monai_iou.voxels.single_backward import once_differentiable
from monai_iou.voxels.spec import BACKGROUND_ENTROPY, COUNT, CROSS_ENTROPY, ROWS, PassSpec
from monai_iou.voxels.tiling import in_threads


def hindrance() -> str | None:
    """Return why the loops cannot be used, as the end of a sentence; None if they can."""
    found = loaded()
    return found if isinstance(found, str) else None


def covers(voxels: Voxels, spec: PassSpec) -> bool:
    """Return whether this pass computes what `spec` asks for."""
    logits = voxels.logits
    return (
        (spec.activation == "sigmoid" or (spec.activation == "softmax" and logits.shape[1] > 1))
        and logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and logits.numel() > 0
        and spec.power in (1, 2)
        and spec.bins is None
        and hindrance() is None
    )


class _State(IntEnum):
    """Who computes the gradient of a tile: the general formulas, the loops, or the loops from probabilities kept.

    With `SIGNED`, the sign of a kept probability also says whether the target is 1.
    """

    GENERAL, COMPUTED, KEPT, SIGNED = range(4)


def _general_sums(voxels: Voxels, spec: PassSpec, image: int, part: slice) -> Array:
    """Return the statistics (C, R, 7) of a tile that the loops do not take."""
    logits = voxels.logits
    rows = torch.zeros((ROWS, *logits.shape[:2], voxels.regions), dtype=total_dtype(logits), device="cpu")
    if in_place.covers(voxels, spec):
        rows[:, image, :, 0] = in_place.sums(voxels.part(image, part), spec)[:, 0]
    else:
        general_tiles.add_tile(rows, voxels, spec, image, part)
    statistics: Array = rows[:, image].permute(1, 2, 0).numpy()
    return statistics


def _write_general(out: Tensor, gradient: Tensor, voxels: Voxels, spec: PassSpec, image: int, part: slice) -> None:
    """Write the gradient of a tile that the loops do not take."""
    if in_place.covers(voxels, spec):
        place, pulls = out[image : image + 1, :, part], gradient[:, image : image + 1]
        in_place.write_gradients(place, pulls, voxels.part(image, part), spec)
    else:
        general_tiles.write_gradient(out, gradient, voxels, spec, image, part)


class _Tile(NamedTuple):
    """What the loops found in a tile.

    Attributes:
        rows: the statistics, (C, R, 7).
        state: what becomes of its gradient. If that is left to the general formulas, all else means nothing.
        are_shares: whether targets are from 0 to 1.
        runs: for each class, those of the regions, where probabilities are kept; see `numba_cells.add_regions`.
    """

    rows: Array
    state: _State
    are_shares: bool
    runs: Sequence[Array] = ()


def _tile_sums(tiles: Tiles, kept: Flat | None, image: int, part: slice) -> _Tile:
    """Return what the loops find in a tile."""
    rows = np.zeros((tiles.classes, tiles.regions, ROWS))
    groups, step = tiles.groups_of(image, part)
    looks = groups.size and (tiles.is_softmax or not tiles.is_usual)  # else the loops look themselves
    if looks and not tiles.by_region.has_long_runs(groups, step, tiles.region_maps, part.stop - part.start):
        return _Tile(rows, _State.GENERAL, False)
    if tiles.is_softmax:
        if not tiles.softmax.add_classes(*tiles.of_all_classes(image, part), groups, step, rows):
            return _Tile(rows, _State.GENERAL, False)
        wrong, rows[..., -1] = rows[..., -1].sum(), 0
        return _Tile(rows, _State.COMPUTED, wrong == 0)
    wrong, state, runs, count = 0.0, int(_State.SIGNED), list[Array](), part.stop - part.start
    place, stride = (None, 0) if kept is None else kept.tile(image, part)
    for c, x, other, target, number in tiles.of_each_class(image, part, reads_target=tiles.whole is None):
        pair, own = np.zeros((2, *rows.shape[1:])), groups[c * step :]
        if tiles.is_usual:
            p = x if place is None else place[c * stride : c * stride + count]
            keeps = place is not None
            if groups.size:
                sources = x, other, target, tiles.whole_numbers(image, part, c), number, own
                space = np.empty((2, tiles.cells.most_runs(count) if keeps else 0), np.int32)
                found, known = tiles.cells.add_regions(*sources, *tiles.of_cells, keeps, p, space, pair)
                runs.append(space[:, :known].copy())
            else:
                found = tiles.usual.add_usual(x, other, target, number, tiles.two, tiles.terms, keeps, p, pair[:, 0])
            state = min(state, found)
        else:
            taken = tiles.lines.add_line(x, other, target, number, *tiles.options(image, part), own, pair)
            state = min(state, _State.COMPUTED if taken else _State.GENERAL)
        wrong, pair[0, :, -1] = wrong + pair[0, :, -1].sum(), 0
        rows[c] = pair[0]
        if tiles.two:
            rows[0], rows[0, :, COUNT] = pair[1], pair[0, :, COUNT]
        elif tiles.spec.split:
            rows[c, :, BACKGROUND_ENTROPY] = pair[1, :, CROSS_ENTROPY]
        else:
            with np.errstate(invalid="ignore"):  # infinite targets, which are refused later
                rows[c, :, CROSS_ENTROPY] += pair[1, :, CROSS_ENTROPY]
    return _Tile(rows, _State(state), wrong == 0, runs if state >= _State.KEPT else ())


def _sums(voxels: Voxels, spec: PassSpec, kept: Tensor | None) -> tuple[Tensor, list[tuple[_State, Sequence[Array]]]]:
    """Return the statistics (7, B, C, R), and for each tile what becomes of its gradient, and the runs that it kept."""
    tiles = Tiles(voxels, spec)
    places = None if kept is None or not tiles.is_usual else Flat(kept)
    places = places if places is None or places.is_shared else None

    def work(part: tuple[int, slice]) -> tuple[Array | slice, _Tile]:
        found = _tile_sums(tiles, places, *part)
        if found.state == _State.GENERAL:
            found = found._replace(rows=_general_sums(voxels, spec, *part))
        if voxels.groups is None:
            return slice(None), found
        # Of thousands of regions a tile has few, and there are many tiles.
        met = np.flatnonzero((found.rows != 0).any((0, 2)))
        return met, found._replace(rows=found.rows[:, met])

    total = np.zeros((*voxels.logits.shape[:2], voxels.regions, ROWS))
    results = in_threads(work, tiles.parts)
    for (image, _), (met, found) in zip(tiles.parts, results, strict=True):
        with np.errstate(invalid="ignore"):  # infinite logits or targets
            total[image][:, met] += found.rows
    # The loops read 1 + 1e-9 as 1, and -1e-60 as 0.
    reads_exactly = voxels.maps is not None and voxels.maps.dtype != torch.float64
    if voxels.findings is not None and reads_exactly and all(found.state != _State.GENERAL for _, found in results):
        voxels.findings.maps_are_shares = all(found.are_shares for _, found in results)
    return torch.from_numpy(total).permute(3, 0, 1, 2), [(found.state, found.runs) for _, found in results]


def _write_tile(
    tiles: Tiles, out: Flat, pulls: Array, state: _State, runs: Sequence[Array], image: int, part: slice
) -> None:
    """Write the gradient of a tile into `out` (B, C, N); `pulls` is d loss / d statistics, (B, C, 7, R) float32."""
    place, stride = out.tile(image, part, copy=False)
    groups, step = tiles.groups_of(image, part)
    if tiles.is_softmax:
        tiles.softmax.write_classes(*tiles.of_all_classes(image, part), groups, step, pulls[image], place, stride)
    else:
        count, of_others = part.stop - part.start, BACKGROUND_ENTROPY if tiles.spec.split else CROSS_ENTROPY
        signs = state == _State.SIGNED
        for c, x, other, target, number in tiles.of_each_class(image, part, reads_target=not signs):
            pair, own = pulls[image, [c, 0]], groups[c * step :]
            if not tiles.two:
                pair[1, CROSS_ENTROPY] = pulls[image, c, of_others]
            places = place[c * stride : c * stride + count], place[:count]
            if state >= _State.KEPT and groups.size:
                kept = runs[0 if tiles.two else c]
                tiles.cell_slopes.write_regions(target, signs, kept, *tiles.of_cells, pair, *places)
            elif state >= _State.KEPT:
                tiles.usual.write_usual(target, signs, tiles.two, tiles.terms, pair, *places)
            else:
                tiles.lines.write_line(x, other, target, number, *tiles.options(image, part), own, pair, *places)
    if not out.is_shared:
        out.write(place, image, part)


class _NumbaSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, voxels: Voxels, spec: PassSpec, keeps: bool) -> Tensor:
        ctx.kept = huge_pages.empty_like(logits) if keeps else None
        total, ctx.tiles = _sums(voxels, spec, ctx.kept)
        if max(state for state, _ in ctx.tiles) < _State.KEPT:
            ctx.kept = None
        ctx.spec, ctx.has_ignored, ctx.regions = spec, voxels.has_ignored, voxels.regions
        # Wrong labels may wrap round here; their error follows the sums, and no backward does.
        labels = narrowed(voxels.labels, logits.shape[1])
        ctx.save_for_backward(logits, labels, voxels.maps, voxels.valid, voxels.groups)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, maps, valid, groups = ctx.saved_tensors
        voxels = Voxels(logits, labels, maps, valid, ctx.has_ignored, groups, ctx.regions)
        gradient, tiles = gradient.to(torch.float32), Tiles(voxels, ctx.spec)
        pulls = gradient.permute(1, 2, 0, 3).contiguous().numpy()
        kept, ctx.kept = ctx.kept, None  # a further backward pass computes the probabilities again
        out = huge_pages.empty_like(logits) if kept is None else kept
        places = Flat(out)

        def work(task: tuple[tuple[int, slice], tuple[_State, Sequence[Array]]]) -> None:
            part, (state, runs) = task
            if state == _State.GENERAL:
                _write_general(out, gradient, voxels, ctx.spec, *part)
            else:
                _write_tile(tiles, places, pulls, state if kept is not None else _State.COMPUTED, runs, *part)

        in_threads(work, list(zip(tiles.parts, ctx.tiles, strict=True)))
        ctx.tiles = [(state, ()) for state, _ in ctx.tiles]
        return out, None, None, None


def compute_sums(voxels: Voxels, spec: PassSpec) -> Tensor:
    """Return the statistics (7, B, C, R) of `voxels`."""
    logits = voxels.logits
    keeps = torch.is_grad_enabled() and logits.requires_grad and logits.dtype == torch.float32
    result: Tensor = _NumbaSums.apply(logits, voxels, spec, keeps)
    return result
