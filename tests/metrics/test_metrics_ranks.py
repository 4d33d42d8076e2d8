"""The metrics under real ranks: a rank without data neither hangs nor fails, and uneven rows arrive in order."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from gloo_ranks import leave_group, run_ranks

from monai_iou.metrics import BoundaryIoUMetric, IoUMetric, LesionIoUMetric

IMAGES = torch.randint(0, 3, (5, 2, 1, 6, 6), generator=torch.Generator().manual_seed(7))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def score_shares(rank: int, world: int, rounds: list[list[list[int]]], port: int, folder: str) -> None:
    """One rank: in each round score its images, then everything that collects over the ranks."""
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    assert dist.get_world_size() == world
    metric = IoUMetric(False, "mean_batch", num_classes=3)
    others = [LesionIoUMetric(num_classes=3), BoundaryIoUMetric(num_classes=3)]
    results = []
    for shares in rounds:
        for index in shares[rank]:
            for each in (metric, *others):
                each(IMAGES[index, :1], IMAGES[index, 1:])
        result = {"mean": metric.aggregate(), "buffer": metric.get_buffer(), "length": len(metric)}
        if any(shares):
            result["summary"] = metric.summary()
        result["others"] = [each.aggregate() for each in others]
        results.append(result)
        for each in (metric, *others):
            each.reset()
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()


# All rounds on one set of ranks: starting processes is nearly all the time that this takes.
ROUNDS = [[[0, 1, 2], [3], []], [[], [4, 2], []], [[], [], []], [[1, 3], [], []], [[0], [], [2, 4]]]
WORLD = 3


def test_ranks_equal_one_process(tmp_path):
    run_ranks(score_shares, WORLD, WORLD, ROUNDS, free_port(), str(tmp_path))
    for rank in range(WORLD):
        for shares, result in zip(ROUNDS, torch.load(tmp_path / f"{rank}.pt"), strict=True):
            alone = IoUMetric(False, "mean_batch", num_classes=3)
            others = [LesionIoUMetric(num_classes=3), BoundaryIoUMetric(num_classes=3)]
            for index in (i for share in shares for i in share):
                for each in (alone, *others):
                    each(IMAGES[index, :1], IMAGES[index, 1:])
            for got, each in zip(result["others"], others, strict=True):
                torch.testing.assert_close(got, each.aggregate(), equal_nan=True)
            assert result["length"] == len(alone) == sum(map(len, shares))
            torch.testing.assert_close(result["buffer"], alone.get_buffer(), equal_nan=True)
            torch.testing.assert_close(result["mean"], alone.aggregate(), equal_nan=True)
            if any(shares):
                assert result["summary"] == alone.summary()
            else:
                assert result["mean"].isnan().all()
