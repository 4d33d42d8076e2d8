"""sync_batch: DDP on shards equals one process on the joined batch, in value and in the parameters' gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import join_group, leave_group, run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from monai_iou import IoUCELoss, IoULoss, WeightedCrossEntropyLoss

LOSSES = {
    "iou": lambda: IoULoss(softmax=True, batch=True, sync_batch=True),
    "iou_ce": lambda: IoUCELoss(softmax=True, batch=True, sync_batch=True, weight=[0.2, 1.0, 3.0], empty="suppress"),
    "ce": lambda: WeightedCrossEntropyLoss(weight=[0.2, 1.0, 3.0], gamma=2.0, ignore_index=2, sync_batch=True),
}
# Images on each rank: equal, uneven, one rank with none.
SHARDS = {2: [(1, 1), (2, 1), (3, 0)], 3: [(1, 2, 1), (0, 1, 3)]}


def batch(images: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(images, 1, 5, 6, generator=generator, dtype=torch.float64)
    return image, torch.randint(0, 3, (images, 1, 5, 6), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Conv2d(1, 3, 3, padding=1, dtype=torch.float64)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def _work(rank: int, ranks: int, folder: str) -> None:
    join_group(rank, ranks, folder)
    results = {}
    for name, make in LOSSES.items():
        for shards in SHARDS[ranks]:
            image, label = batch(sum(shards))
            start = sum(shards[:rank])
            part = slice(start, start + shards[rank])
            model = network()
            parallel = DistributedDataParallel(model)
            value = make()(parallel(image[part]), label[part])
            value.backward()
            results[name, shards] = (value.detach(), gradients(model), dist.get_world_size())
    torch.save(results, f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_equal_one_process_on_the_joined_batch(ranks: int, tmp_path: Path) -> None:
    run_ranks(_work, ranks, ranks, str(tmp_path))
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for name, make in LOSSES.items():
        for shards in SHARDS[ranks]:
            image, label = batch(sum(shards))
            model = network()
            value = make()(model(image), label)
            value.backward()
            expected = gradients(model)
            assert any(gradient.abs().max() > 1e-4 for gradient in expected)
            for results in found:
                rank_value, rank_gradients, world = results[name, shards]
                assert world == ranks
                torch.testing.assert_close(rank_value, value.detach())
                torch.testing.assert_close(rank_gradients, expected)


def test_without_sync_batch_ranks_see_their_own_images() -> None:
    """The check above can fail: the mean of two losses is not the loss of the joined sums."""
    image, label = batch(3)
    logits = network()(image)
    loss = IoULoss(softmax=True, batch=True)
    apart = (loss(logits[:2], label[:2]) + loss(logits[2:], label[2:])) / 2
    assert (apart - loss(logits, label)).abs() > 1e-3
