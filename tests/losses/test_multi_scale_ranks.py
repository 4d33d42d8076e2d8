"""Deep supervision under DistributedDataParallel: outputs without a weight, and a wrong label on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import leave_group, run_ranks
from loss_ranks import JOIN, free_port, join_group
from torch import Tensor, nn

from monai_iou import InstanceIoULoss, IoUCELoss, MultiScaleLoss
from monai_iou.distributed import depending_on

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


def train_share(rank: int, world: int, port: int, folder: str) -> None:
    join_group(rank, world, port)
    image, labels = (part[[rank]] for part in images())
    results = {}
    for name, weights in GIVEN.items():
        network = nn.parallel.DistributedDataParallel(Heads())
        results[name] = train(network, MultiScaleLoss(IoUCELoss(**JOIN), weights=weights), image, labels)
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_outputs_without_a_weight_do_not_end_a_training(ranks: int, tmp_path: Path) -> None:
    run_ranks(train_share, ranks, ranks, free_port(), str(tmp_path))
    image, labels = (part[:ranks] for part in images())
    for name, weights in GIVEN.items():
        loss = MultiScaleLoss(IoUCELoss(softmax=True, batch=True), weights=weights)
        values, parameters = train(Heads(), loss, image, labels)
        for rank in range(ranks):
            ranks_values, ranks_parameters = torch.load(tmp_path / f"{rank}.pt")[name]
            assert ranks_values == pytest.approx(values, abs=1e-6)
            torch.testing.assert_close(ranks_parameters, parameters)


def test_outputs_without_a_weight_have_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.ones((), requires_grad=True)
    for bad in (torch.nan, torch.inf, 1.0):
        output = torch.full((1, 2, 4), bad, dtype=torch.float16, requires_grad=True)
        alone = depending_on([output], value)
        assert alone is value  # in a single process nothing waits for its gradient, and none is computed
        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: True)
            together = depending_on([output, output[:0]], value)
        assert together.item() == 1
        assert together.dtype == value.dtype
        (slope,) = torch.autograd.grad(together, output)
        assert torch.equal(slope, torch.zeros_like(output))


def fail_on_one_rank(rank: int, world: int, port: int, folder: str) -> None:
    join_group(rank, world, port)
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
    run_ranks(fail_on_one_rank, 2, 2, free_port(), str(tmp_path))
    waiting, wrong = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(wrong) == 6
    for name, sentence in wrong.items():
        own = "but got 7" if name.endswith("value") else "to be no larger than the target (1, 1, 3, 3)"
        assert own in sentence, name
        assert waiting[name].startswith("Expected the input and target of every rank to be valid"), name
