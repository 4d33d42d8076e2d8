"""With sync_batch three ranks train as one process on the joined batch would, also where one of them has no image."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from gloo_ranks import join_group, leave_group, run_ranks
from loss_ranks import JOIN, make_losses
from torch import Tensor, nn

from monai_iou import (
    ComponentRegionsd,
    CompoundLoss,
    FocalTverskyLoss,
    GeneralizedIoULoss,
    InstanceIoULoss,
    IoUCELoss,
    IoULoss,
    LogIoULoss,
    LovaszSoftmaxLoss,
    WeightedCrossEntropyLoss,
)


def every_loss() -> dict[str, nn.Module]:
    return {
        **make_losses(),
        "cells_of_both": InstanceIoULoss(cells="both", alpha=0.3, **JOIN),
        "cells_of_the_prediction": InstanceIoULoss(cells="prediction", lambda_global=0, **JOIN),
        "inverse": InstanceIoULoss(cells="both", cell_weight="inverse", weight=[0.5, 1.0, 2.0], **JOIN),
        "term": InstanceIoULoss(term=IoUCELoss(), empty="suppress", **JOIN),
        "own_global": InstanceIoULoss("blob", cells="both", global_loss=IoUCELoss(**JOIN), **JOIN),
    }


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


def assert_same_step(name: str, found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(found[0], expected[0], msg=lambda text: f"{name}: {text}")
    for theirs, ours in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-7, msg=lambda text: f"{name}: {text}")


def train_share(rank: int, world: int, shares: list[int], folder: str) -> None:
    join_group(rank, world, folder)
    images, labels = (part.split(shares)[rank] for part in make_batch())
    network = nn.parallel.DistributedDataParallel(make_network())
    results = {
        (name, labelled is None): step(network, loss, images, labels, labelled)
        for name, loss in every_loss().items()
        for labelled in (None, LABELLED.split(shares)[rank])
    }
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


def test_ranks_train_as_one_process(tmp_path: Path) -> None:
    shares = [2, 0, 1]
    run_ranks(train_share, len(shares), len(shares), shares, str(tmp_path))
    images, labels = make_batch()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(shares))]
    for (name, loss), labelled in itertools.product(every_loss().items(), (None, LABELLED)):
        expected = step(make_network(), loss, images, labels, labelled)
        for result in results:
            assert_same_step(name, result[name, labelled is None], expected)


PARTLY: dict[str, Any] = {**JOIN, "ignore_index": 7}  # no class: voxels of no map at all are ignored


def partly_labelled_losses() -> dict[str, nn.Module]:
    return {
        "iou": IoULoss(**PARTLY),
        "images": FocalTverskyLoss(**PARTLY, average="images"),
        "classes": LogIoULoss(**PARTLY, average="classes", include_background=False),
        "generalized": GeneralizedIoULoss(**PARTLY, empty="suppress"),
        "lovasz": LovaszSoftmaxLoss("all", **PARTLY),
        "foreground": LovaszSoftmaxLoss("all", **PARTLY, include_background=False),
        "compound": CompoundLoss([LovaszSoftmaxLoss("all", **PARTLY), IoULoss(**PARTLY)]),
        "cross_entropy": WeightedCrossEntropyLoss(sync_batch=True, ignore_index=7),
        "instance": InstanceIoULoss(**PARTLY),
    }


def partly_labelled_images(images: slice, form: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what a loss takes of some of two images: class 2 is not known in the first, the second is all ignored."""
    inputs = torch.randn(2, 1, 6, 6, 6, generator=torch.Generator().manual_seed(0))[images]
    maps = torch.zeros(2, 3, 6, 6, 6)
    maps[0, 1, :3] = maps[0, 0, 3:] = 1
    if form == "maps":
        maps[0, 2] = torch.nan
    labelled = torch.tensor([[True, True, False], [True, True, True]])[images]
    return inputs, maps[images], labelled if form == "labelled" and not labelled.all() else None


# The second rank has no image, or one without a voxel that counts: it does not see that a class is left out.
PARTLY_LABELLED = list(itertools.product((slice(1, 1), slice(1, 2)), ("maps", "labelled")))


def train_partly_labelled(rank: int, folder: str) -> None:
    join_group(rank, 2, folder)
    network = nn.parallel.DistributedDataParallel(make_network())
    results = [
        {
            name: step(network, loss, *partly_labelled_images(second if rank else slice(1), form))
            for name, loss in partly_labelled_losses().items()
        }
        for second, form in PARTLY_LABELLED
    ]
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


def test_a_rank_that_does_not_see_which_classes_are_left_out(tmp_path: Path) -> None:
    run_ranks(train_partly_labelled, 2, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for index, (second, form) in enumerate(PARTLY_LABELLED):
        joined = partly_labelled_images(slice(second.stop), form)
        for name, loss in partly_labelled_losses().items():
            expected = step(make_network(), loss, *joined)
            assert expected[0] > 0
            for result in results:
                assert_same_step(f"{name}, {second}, {form}", result[index][name], expected)


def make_crops() -> tuple[Tensor, Tensor]:
    """Return logits and labels with their regions of two crops, the second of which is empty."""
    labels = torch.zeros(2, 1, 6, 6, dtype=torch.long)
    labels[0, 0, :2, :2] = 1
    precomputed = torch.stack([ComponentRegionsd("label")({"label": label})["label"] for label in labels])
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0)), precomputed


def share_a_crop(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder)
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
    run_ranks(share_a_crop, 2, 2, str(tmp_path))
    logits, precomputed = make_crops()
    for activation in ("softmax", "sigmoid"):
        value = InstanceIoULoss(batch=True, **{activation: True})(logits, precomputed)
        for rank in range(2):
            results = torch.load(tmp_path / f"{rank}.pt")
            torch.testing.assert_close(results[activation], value)
            assert results[f"{activation}_padding"].isfinite()
            if activation == "softmax":
                torch.testing.assert_close(results["softmax_padding"], value)
