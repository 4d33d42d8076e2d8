"""With sync_batch three ranks train as one process on the joined batch would, also where one of them has no image."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from gloo_ranks import leave_group, run_ranks
from loss_ranks import free_port, join_group, make_losses
from torch import Tensor, nn

from monai_iou import (
    ComponentRegionsd,
    InstanceIoULoss,
)


def make_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 1, 6, 6, 6, generator=generator)
    labels = torch.zeros(3, 1, 6, 6, 6, dtype=torch.long)
    labels[0, 0, :2, :2, :2] = labels[0, 0, 4:, 4:, 4:] = 1
    labels[1, 0, 3:5, 3:5, 3:5] = labels[2, 0, 0, :, 0] = 2
    return images, labels


def make_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Conv3d(1, 3, 3, padding=1)


LABELLED = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])


def step(
    network: nn.Module, loss: nn.Module, images: Tensor, labels: Tensor, labelled: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    network.zero_grad()
    value = loss(network(images), labels, labelled)
    value.backward()
    return value.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


def train_share(rank: int, world: int, shares: list[int], port: int, folder: str) -> None:
    join_group(rank, world, port)
    images, labels = (part.split(shares)[rank] for part in make_batch())
    network = nn.parallel.DistributedDataParallel(make_network())
    results = {
        (name, labelled is None): step(network, loss, images, labels, labelled)
        for name, loss in make_losses().items()
        for labelled in (None, LABELLED.split(shares)[rank])
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


def test_ranks_train_as_one_process(tmp_path: Path) -> None:
    shares = [2, 0, 1]
    run_ranks(train_share, len(shares), len(shares), shares, free_port(), str(tmp_path))
    images, labels = make_batch()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(shares))]
    for (name, loss), labelled in itertools.product(make_losses().items(), (None, LABELLED)):
        value, gradients = step(make_network(), loss, images, labels, labelled)
        for result in results:
            ranks_value, ranks_gradients = result[name, labelled is None]
            torch.testing.assert_close(ranks_value, value, msg=lambda text, name=name: f"{name}: {text}")
            for ours, theirs in zip(gradients, ranks_gradients, strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-7)


def make_crops() -> tuple[Tensor, Tensor]:
    """Return logits and labels with their regions of two crops, the second of which is empty."""
    labels = torch.zeros(2, 1, 6, 6, dtype=torch.long)
    labels[0, 0, :2, :2] = 1
    precomputed = torch.stack([ComponentRegionsd("label")({"label": label})["label"] for label in labels])
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)), precomputed


def share_a_crop(rank: int, world: int, port: int, folder: str) -> None:
    join_group(rank, world, port)
    logits, precomputed = (part[[rank]] for part in make_crops())
    results = {}
    for activation in ("softmax", "sigmoid"):
        loss = InstanceIoULoss(batch=True, sync_batch=True, **{activation: True})
        target = precomputed if rank == 0 else torch.zeros_like(precomputed)
        results[activation] = loss(logits, precomputed)
        results[f"{activation}_padding"] = loss(logits, target)  # which must not hang, whatever zeros stand for
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


def test_a_rank_with_an_empty_crop(tmp_path: Path) -> None:
    run_ranks(share_a_crop, 2, 2, free_port(), str(tmp_path))
    logits, precomputed = make_crops()
    for activation in ("softmax", "sigmoid"):
        value = InstanceIoULoss(batch=True, **{activation: True})(logits, precomputed)
        for rank in range(2):
            results = torch.load(tmp_path / f"{rank}.pt")
            torch.testing.assert_close(results[activation], value)
            assert results[f"{activation}_padding"].isfinite()
            if activation == "softmax":
                torch.testing.assert_close(results["softmax_padding"], value)
