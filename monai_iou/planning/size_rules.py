"""The rules for the size of a training step: patch, network, batch and cache, from the volumes and the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from monai_iou.datasets.cases import CaseFacts
from monai_iou.datasets.folder import SegmentationFolder
from monai_iou.planning.fingerprint import Fingerprint
from monai_iou.planning.hardware import GIB, Machine, training_bytes
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.tables import counted

__all__ = [
    "Decision",
    "Levels",
    "batch_decision",
    "cache_decision",
    "choose_levels",
    "counted",
    "format_size",
    "holds_a_volume",
    "network_decision",
    "patch_decision",
]


PATCH_VOXELS = {"cpu": 64**3, "cuda": 128**3}
MAX_PATCHES = {"cpu": 4, "cuda": 8}
# A level at full resolution makes a step on a CPU slower (docs/results/hippocampus-cpu.md), so that it is used only for
# steps of no more voxels than this.
FULL_RESOLUTION_VOXELS = 2**19
MIN_PATCH_VOXELS = 8**3


@dataclass(frozen=True)
class Decision:
    """One decision: its name, its value and its reason as text, and the keys of the bundle that implement it."""

    name: str
    value: str
    reason: str
    keys: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Levels:
    """Keys of the network: channels of its first level, and whether this level has the full resolution of the patch."""

    base_channels: int
    full_resolution: bool


STRIDED, FULL, FULL_GPU = Levels(16, False), Levels(8, True), Levels(32, True)


def choose_levels(
    folder: SegmentationFolder,
    facts: Sequence[CaseFacts],
    fingerprint: Fingerprint,
    pixdim: Sequence[float],
    machine: Machine,
) -> tuple[Plan, Levels]:
    """Return the plan with the largest patch, and its network: full resolution on a GPU and for small patches."""
    if machine.device == "cuda":
        return _largest_plan(folder, facts, fingerprint, pixdim, FULL_GPU, machine), FULL_GPU
    plan = _largest_plan(folder, facts, fingerprint, pixdim, STRIDED, machine)
    if MAX_PATCHES["cpu"] * np.prod(plan.patch_size) > FULL_RESOLUTION_VOXELS:
        return plan, STRIDED
    return _largest_plan(folder, facts, fingerprint, pixdim, FULL, machine), FULL


def _largest_plan(
    folder: SegmentationFolder,
    facts: Sequence[CaseFacts],
    fingerprint: Fingerprint,
    pixdim: Sequence[float],
    levels: Levels,
    machine: Machine,
) -> Plan:
    """Return the plan with the largest patch that fits twice: near a cube in mm, within the median volume."""
    volume = np.ceil(np.array(fingerprint.extent.median) / pixdim - 1e-3)
    limit = float(PATCH_VOXELS[machine.device])
    wanted = limit

    def planned(patch: Sequence[int]) -> Plan:
        return make_plan(folder, facts, patch, pixdim, levels.base_channels, full_resolution=levels.full_resolution)

    while True:
        plan = planned(_sides(volume, pixdim, wanted))
        # Training plans again from the rounded patch, which may give another network: iterate until the plan is stable.
        while (again := planned(plan.patch_size)) != plan:
            plan = again
        needed = training_bytes(plan, 2)
        if np.prod(plan.patch_size) <= limit and needed <= machine.step_bytes:
            return plan
        wanted *= 0.85
        if wanted < MIN_PATCH_VOXELS:
            message = (
                f"Expected memory for a training step of two patches of {format_size(plan.patch_size)} voxels, "
                f"{needed / GIB:.2f} GiB, but a step may take {machine.step_bytes / GIB:.2f} GiB of {machine.source}: "
                "free memory or plan for a larger machine with `--memory-gb`."
            )
            raise ValueError(message)


def _sides(volume: np.ndarray, pixdim: Sequence[float], voxels: float) -> list[int]:
    """Return the box of at most `voxels` voxels that is as close to a cube in mm as the volume allows."""
    low, high = 0.0, float((volume * pixdim).max())
    for _ in range(60):
        edge = (low + high) / 2
        low, high = (edge, high) if np.prod(_box(volume, pixdim, edge)) <= voxels else (low, edge)
    return [int(side) for side in _box(volume, pixdim, high if np.prod(volume) <= voxels else low)]


def _box(volume: np.ndarray, pixdim: Sequence[float], edge: float) -> np.ndarray:
    box: np.ndarray = np.minimum(volume, np.maximum(1, np.floor(edge / np.array(pixdim) + 1e-6)))
    return box


def patch_decision(plan: Plan, fingerprint: Fingerprint, machine: Machine) -> Decision:
    """Return the size of the patch with its reason."""
    if holds_a_volume(plan, fingerprint):
        reason = "contains the median volume"
    else:
        kind = "GPU" if machine.device == "cuda" else "CPU"
        reason = (
            f"closest to a cube in mm with at most {round(PATCH_VOXELS[machine.device] ** (1 / 3))}^3 voxels "
            f"(the limit for a {kind}); two patches fit into {machine.source}"
        )
    return Decision("patch", f"{format_size(plan.patch_size)} voxels", reason, {"patch_size": list(plan.patch_size)})


def network_decision(plan: Plan, levels: Levels, machine: Machine) -> Decision:
    """Return the network, as `network_size` and `choose_levels` decided it, with its reason."""
    deepest = [side // int(stride) for side, stride in zip(plan.patch_size, np.prod(plan.strides, axis=0), strict=True)]
    first = "full" if levels.full_resolution else "half"
    value = (
        f"{len(plan.channels)} levels, {plan.channels[0]} to {plan.channels[-1]} channels, first at {first} resolution"
    )
    reason = f"axes are halved as long as 5 voxels remain, {format_size(deepest)} at the lowest level; "
    if machine.device == "cuda":
        reason += "full resolution is affordable on a GPU"
    else:
        reason += f"full resolution is {'' if levels.full_resolution else 'not '}affordable on a CPU with this patch"
    keys: dict[str, Any] = {"base_channels": levels.base_channels, "full_resolution": levels.full_resolution}
    if plan.spatial_dims == 2:
        keys["spatial_dims"], value, reason = 2, f"2D, {value}", f"every volume is one slice; {reason}"
    return Decision("network", value, reason, keys)


def batch_decision(plan: Plan, fingerprint: Fingerprint, machine: Machine, trained: int) -> Decision:
    """Decide the number of patches per step: as many as memory and a limit on voxels allow, but at least two."""
    budget = 4 * PATCH_VOXELS[machine.device] // int(np.prod(plan.patch_size))
    patches = max(2, min(MAX_PATCHES[machine.device], budget))
    while patches > 2 and training_bytes(plan, patches) > machine.step_bytes:
        patches -= 1
    samples = 1 if holds_a_volume(plan, fingerprint) else 2
    batch = max(1, min(patches // samples, trained // 2))  # at least two steps per epoch, in a new order each time
    samples = max(1, patches // batch)
    needed = training_bytes(plan, batch * samples) / GIB
    reason = (
        f"a step takes about {needed:.1f} GiB (3 x what backward keeps + 16 bytes per parameter); "
        f"it may take {machine.step_bytes / GIB:.1f} of {machine.source}"
    )
    value = f"{counted(batch, 'volume')} x {counted(samples, 'patch', 'patches')}"
    return Decision("batch", value, reason, {"batch_size": batch, "num_samples": samples})


def cache_decision(plan: Plan, fingerprint: Fingerprint, machine: Machine) -> Decision:
    """Decide which fraction of the prepared volumes, float32 images and the training's targets, is kept in memory."""
    volumes = [np.prod(np.multiply(c.facts.shape, c.facts.spacing) / plan.pixdim) for c in fingerprint.measures]
    needed = float(sum(volumes)) * (4 * plan.in_channels + plan.label_bytes)
    rate = math.floor(100 * min(1.0, machine.cache_bytes / needed)) / 100
    reason = (
        f"all prepared volumes take {needed / GIB:.2f} GiB; they may take {machine.cache_bytes / GIB:.1f} GiB in one "
        "process (each of several ranks keeps its own: divide `cache_rate` by their number)"
    )
    return Decision("cache", f"{rate:.0%} of the volumes", reason, {"cache_rate": rate})


def holds_a_volume(plan: Plan, fingerprint: Fingerprint) -> bool:
    """Return whether the patch is at least as large as the median volume, in mm along each axis."""
    return bool((np.array(plan.patch_size) * plan.pixdim >= np.array(fingerprint.extent.median) * (1 - 1e-3)).all())


def format_size(numbers: Sequence[float]) -> str:
    """Return sizes as text, `64 x 64 x 32`."""
    return " x ".join(f"{number:.4g}" for number in numbers)
