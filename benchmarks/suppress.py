"""Choose the term of an absent class: what each candidate does to a network that has to leave empty patches empty.

    python -m benchmarks.suppress        # the first table of docs/losses.md, five minutes on one core
    python -m benchmarks.suppress --side 20 --candidates smooth skip suppress       # the second, as long
    python -m benchmarks.suppress --seeds 1 --candidates moving max

A network of three convolutions learns lesions of 3x3x3 voxels among single bright voxels in noisy patches, with the IoU
loss alone. Tuned: 300 steps with a lesion in each patch, then 300 with every other patch empty. From scratch:
every other patch empty for 300 steps. It is scored on new patches, 100 with a lesion and 100 without, at p = 0.5.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from monai_iou import IoULoss

LESION = 3
SPOTS = {14: 15, 20: 40}  # bright voxels in a patch of so many voxels per side
EMPTY_HALF = (True, False, True, False)
EMPTY_NONE = (False, False, False, False)
TESTED = 200

# From the probabilities of an empty patch (B, N) to its term (B,).
Term = Callable[[Tensor], Tensor]


def suppress(p: Tensor) -> Tensor:
    """Return sum p^2 / sum p with the denominator held constant, as `empty="suppress"` does."""
    share = p.square().sum(1) / p.sum(1).detach()
    return (share + share.detach()) / 2


def numerator_held(p: Tensor) -> Tensor:
    """Return sum p^2 / sum p where one p of the numerator is held constant and the denominator moves."""
    return (p * p.detach()).sum(1) / p.sum(1)


CANDIDATES: dict[str, tuple[str, Term | None]] = {
    "smooth": ('`"smooth"`', None),
    "skip": ('`"skip"`', None),
    "mean": ("mean p", lambda p: p.mean(1)),
    "ratio": ("P / (P + 100)", lambda p: p.sum(1) / (p.sum(1) + 100)),
    "max": ("max p", lambda p: p.amax(1)),
    "moving": ("sum p^2 / sum p, the denominator moves", numerator_held),
    "tenth": ("sum p^2 / sum p, a tenth of it", lambda p: suppress(p) / 10),
    "suppress": ('**sum p^2 / sum p** (`"suppress"`)', None),
}

DEFAULT = ["smooth", "skip", "mean", "ratio", "tenth", "suppress"]


def loss_of(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss of the patches, with the candidate for those without a lesion."""
    term = CANDIDATES[name][1]
    if term is None:
        value: Tensor = IoULoss(sigmoid=True, empty=name)(logits, labels)
        return value
    terms = IoULoss(sigmoid=True, reduction="none")(logits, labels).flatten()
    return torch.where(labels.flatten(1).any(1), terms, term(logits.flatten(1).sigmoid())).mean()


def make_patches(side: int, empty: Sequence[bool], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy images with single bright voxels, and their lesions, (B, 1, side, side, side) both."""
    images = torch.randn(len(empty), 1, side, side, side, generator=generator) * 0.6
    labels = torch.zeros_like(images)
    for image, is_empty in enumerate(empty):
        if not is_empty:
            x, y, z = torch.randint(2, side - 2 * LESION, (3,), generator=generator).tolist()
            labels[image, 0, x : x + LESION, y : y + LESION, z : z + LESION] = 1
        spots = torch.randint(0, side, (SPOTS[side], 3), generator=generator)
        images[image, 0, spots[:, 0], spots[:, 1], spots[:, 2]] += 2.5
    return images + 1.2 * labels, labels


@dataclass(frozen=True)
class Score:
    """Means over the test patches."""

    iou: float
    false_voxels: float
    clean: float


def train(name: str, side: int, seed: int, phases: Sequence[tuple[int, Sequence[bool]]]) -> Score:
    """Train through phases of (steps, which patches of a batch are empty) and score on new patches."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Conv3d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU()]
    network = nn.Sequential(*layers, nn.Conv3d(8, 1, 3, padding=1))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for steps, empty in phases:
        for _ in range(steps):
            images, labels = make_patches(side, empty, generator)
            optimizer.zero_grad()
            loss_of(name, network(images), labels).backward()
            optimizer.step()
    images, labels = make_patches(side, [index % 2 == 0 for index in range(TESTED)], generator)
    with torch.no_grad():
        found = torch.cat([network(part) > 0 for part in torch.split(images, 8)])
    empty_patch = ~labels.flatten(1).any(1)
    false_voxels = found[empty_patch].flatten(1).sum(1).float()
    iou = 1 - IoULoss(reduction="none")(found.float(), labels).flatten()[~empty_patch]
    return Score(iou.mean().item(), false_voxels.mean().item(), (false_voxels == 0).float().mean().item())


def cells(name: str, side: int, seeds: int, phases: Sequence[tuple[int, Sequence[bool]]]) -> str:
    """Return a candidate's cells: means over the seeds, and the IoU of each."""
    scores = [train(name, side, seed, phases) for seed in range(seeds)]
    iou, wrong, clean = (
        sum(column) / seeds for column in zip(*((s.iou, s.false_voxels, s.clean) for s in scores), strict=True)
    )
    each = ", ".join(f"{score.iou:.2f}" for score in scores)
    return f"{iou:.3f} ({each}) | {wrong:.2f} | {clean:.0%}"


def main() -> None:
    """Print the table, a line as soon as its runs are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, choices=list(SPOTS), default=14, help="voxels along a patch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--candidates", nargs="+", choices=list(CANDIDATES), default=DEFAULT)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so small a network gains nothing from more
    start = time.perf_counter()
    print(
        "| term for an empty patch | tuned: IoU (each seed) | false voxels per patch | empty patches left clean ",
        end="",
    )
    print("| from scratch: IoU | false voxels | clean |\n" + "| --- " * 7 + "|", flush=True)
    for name in options.candidates:
        tuned = cells(name, options.side, options.seeds, [(300, EMPTY_NONE), (300, EMPTY_HALF)])
        scratch = cells(name, options.side, options.seeds, [(300, EMPTY_HALF)])
        print(f"| {CANDIDATES[name][0]} | {tuned} | {scratch} |", flush=True)
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s on one thread, torch {torch.__version__}, seeds 0 to {options.seeds - 1}")


if __name__ == "__main__":
    main()
