"""A wrong target on one rank ends every rank with one sentence: none is left waiting for the other's sums."""

from __future__ import annotations

from pathlib import Path

import torch
from gloo_ranks import leave_group, run_ranks
from loss_ranks import JOIN, free_port, join_group, make_losses
from monai.losses import DiceCELoss
from torch import Tensor, nn

from monai_iou import CompoundLoss, InstanceIoULoss, LovaszHingeLoss, LovaszSoftmaxLoss, WeightedCrossEntropyLoss


def every_loss() -> dict[str, nn.Module]:
    return {
        **make_losses(),
        "lovasz": LovaszSoftmaxLoss(softmax=True, batch=True, sync_batch=True),
        "lovasz_and_own": CompoundLoss(
            [LovaszSoftmaxLoss(softmax=True, batch=True, sync_batch=True), WeightedCrossEntropyLoss()]
        ),
        "instance_with_monais": InstanceIoULoss(**JOIN, global_loss=DiceCELoss(softmax=True, to_onehot_y=True)),
    }


def targets() -> dict[str, Tensor]:
    """Return what is wrong on rank 1."""
    wrong = torch.zeros(1, 1, 6, 6, dtype=torch.long)
    wrong[0, 0, 3, 3] = 7
    return {"value": wrong, "shape": wrong[..., :5].clamp_max(1)}


def outcome(loss: nn.Module, logits: Tensor, target: Tensor) -> str:
    try:
        loss(logits, target)
    except (ValueError, RuntimeError) as error:  # the latter is MONAI's
        return str(error)
    return "no error"


def fail_on_one_rank(rank: int, world: int, port: int, folder: str) -> None:
    join_group(rank, world, port)
    logits = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(rank))
    right = torch.zeros(1, 1, 6, 6, dtype=torch.long)
    right[0, 0, 1:3, 1:3] = 1
    found = {}
    for kind, wrong in targets().items():
        for name, loss in every_loss().items():
            found[f"{name}_{kind}"] = outcome(loss, logits, wrong if rank == 1 else right)
            assert loss(logits, right).isfinite(), "the ranks go on together"
    binary = right.clamp_max(1)
    hinge = LovaszHingeLoss(batch=True, sync_batch=True)
    found["hinge_value"] = outcome(hinge, logits[:, :1], binary * 7 if rank == 1 else binary)
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


def test_every_rank_ends_with_one_sentence(tmp_path: Path) -> None:
    run_ranks(fail_on_one_rank, 2, 2, free_port(), str(tmp_path))
    waiting, wrong = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert set(waiting) == set(wrong)
    assert len(wrong) > 20
    for name, sentence in waiting.items():
        assert sentence.startswith("Expected the input and target of every rank to be valid"), (name, sentence)
        assert sentence.endswith("but got an error on another rank: see the message of that rank."), name
    for name, sentence in wrong.items():
        own = "but got 7" if name.endswith("value") else "but got (1, 1, 6, 5)"
        assert own in sentence, name
