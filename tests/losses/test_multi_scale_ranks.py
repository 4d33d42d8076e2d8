"""Deep supervision under DistributedDataParallel: outputs without a weight, and a wrong label on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import join_group, leave_group, run_ranks
from loss_ranks import JOIN
from torch import Tensor, nn

from monai_iou import InstanceIoULoss, IoUCELoss, MultiScaleLoss
from monai_iou.distributed import depending_on
from monai_iou.losses.label_pooling import pool_labels

GIVEN = {"nnU-Net": [0.6, 0.4, 0.0], "coarse": [0.0, 0.0, 1.0], "none": [0.0, 0.0, 0.0]}


class Heads(nn.Module):
    """Three outputs, each with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads = nn.ModuleList(nn.Conv2d(1, 2, 1) for _ in range(3))

    def forward(self, image: Tensor) -> list[Tensor]:
        return [head(image[..., :: 2**scale, :: 2**scale]) for scale, head in enumerate(self.heads)]


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 1, 8, 8, generator=generator)
    return image, (image > 0.5).long()


def train(network: nn.Module, loss: nn.Module, image: Tensor, labels: Tensor) -> tuple[list[float], list[Tensor]]:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(network(image), labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values, [parameter.detach().clone() for parameter in network.parameters()]


def unused_outputs() -> list[tuple[Tensor, Tensor]]:
    """Return a loss of 1 that depends on outputs without a part in it, and its slope by these, which hold anything."""
    found = []
    for bad in (torch.nan, torch.inf, 1.0):
        output = torch.full((1, 2, 4), bad, dtype=torch.float16, requires_grad=True)
        together = depending_on([output, output[:0]], torch.ones((), requires_grad=True))
        found.append((together.detach(), *torch.autograd.grad(together, output)))
    return found


def train_share(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder)
    image, labels = (part[[rank]] for part in images())
    results: dict[str, Any] = {"unused": unused_outputs()}
    for name, weights in GIVEN.items():
        network = nn.parallel.DistributedDataParallel(Heads())
        results[name] = train(network, MultiScaleLoss(IoUCELoss(**JOIN), weights=weights), image, labels)
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_outputs_without_a_weight_do_not_end_a_training(ranks: int, tmp_path: Path) -> None:
    run_ranks(train_share, ranks, ranks, str(tmp_path))
    image, labels = (part[:ranks] for part in images())
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name, weights in GIVEN.items():
        loss = MultiScaleLoss(IoUCELoss(softmax=True, batch=True), weights=weights)
        values, parameters = train(Heads(), loss, image, labels)
        for result in results:
            ranks_values, ranks_parameters = result[name]
            assert ranks_values == pytest.approx(values, abs=1e-6)
            torch.testing.assert_close(ranks_parameters, parameters)
    for result in results:  # and what the outputs hold has no effect
        assert len(result["unused"]) == 3
        for value, slope in result["unused"]:
            assert value.dtype == torch.float32
            assert value.item() == 1
            assert slope.dtype == torch.float16
            assert torch.equal(slope, torch.zeros_like(slope))


def test_without_a_group_nothing_waits_for_the_gradient_of_an_unused_output() -> None:
    value, output = (torch.ones(shape, requires_grad=True) for shape in ((), (1, 2, 4)))
    assert depending_on([output], value) is value


def fail_on_one_rank(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder)
    generator = torch.Generator().manual_seed(rank)
    outputs = [torch.randn(1, 3, side, side, generator=generator) for side in (8, 4)]
    right = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    right[..., 2:5, 2:5] = 1
    wrong = right * 7
    losses: dict[str, Any] = {
        "area": MultiScaleLoss(IoUCELoss(**JOIN)),
        "coarse": MultiScaleLoss(IoUCELoss(**JOIN), weights=[0.0, 1.0]),
        "max": MultiScaleLoss(InstanceIoULoss(**JOIN), downsample="max"),
    }
    found = {}
    for name, loss in losses.items():
        for kind, target in {"value": wrong, "size": right[..., :3, :3]}.items():
            try:
                found[f"{name}_{kind}"] = str(loss(outputs, target if rank == 1 else right))
            except ValueError as error:
                found[f"{name}_{kind}"] = str(error)
            assert loss(outputs, right).isfinite(), "the ranks go on together"
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


def test_a_wrong_target_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    run_ranks(fail_on_one_rank, 2, 2, str(tmp_path))
    waiting, wrong = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(wrong) == 6
    for name, sentence in wrong.items():
        own = "but got 7" if name.endswith("value") else "to be no larger than the target (1, 1, 3, 3)"
        assert own in sentence, name
        assert waiting[name].startswith("Expected the input and target of every rank to be valid"), name


def rare_classes() -> tuple[list[Tensor], Tensor]:
    """Return outputs and labels of two images: class 1 is rare in the first, and common in both together."""
    generator = torch.Generator().manual_seed(2)
    outputs = [torch.randn(2, 3, side, side, generator=generator) for side in (8, 4, 2)]
    labels = torch.zeros(2, 1, 8, 8, dtype=torch.long)
    labels[0, 0, 0, :5] = torch.tensor([1, 2, 2, 2, 2])
    labels[1, 0, 3:7, 2:7] = 1
    return outputs, labels


def score_rare_classes(rank: int, folder: str) -> None:
    join_group(rank, 2, folder)
    outputs, labels = rare_classes()
    loss = MultiScaleLoss(IoUCELoss(**JOIN), downsample="max")
    shares = [slice(rank, rank + 1), slice(2 * rank, 2)]  # in the second round, rank 1 has no image
    torch.save([loss([output[own] for output in outputs], labels[own]) for own in shares], Path(folder) / f"{rank}.pt")
    leave_group()


def test_ranks_decide_together_which_class_is_the_rarest(tmp_path: Path) -> None:
    run_ranks(score_rare_classes, 2, str(tmp_path))
    outputs, labels = rare_classes()
    loss = MultiScaleLoss(IoUCELoss(softmax=True, batch=True), downsample="max")
    expected = loss(outputs, labels)
    assert pool_labels(labels, [4, 4], 3, "max")[0, 0, 0, 0] == 2
    assert pool_labels(labels[:1], [4, 4], 3, "max")[0, 0, 0, 0] == 1
    for rank in range(2):
        for value in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(value, expected)
