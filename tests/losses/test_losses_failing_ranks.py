"""A wrong target on one rank ends every rank with one sentence: none is left waiting for the other's sums."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import join_group, leave_group, run_ranks
from loss_ranks import JOIN, make_losses
from monai.losses import DiceCELoss
from torch import Tensor, nn

from monai_iou import (
    AttentionSupervisionLoss,
    CompoundLoss,
    ContextAttentionLoss,
    InstanceIoULoss,
    IoULoss,
    LovaszHingeLoss,
    LovaszSoftmaxLoss,
    WeightedCrossEntropyLoss,
    distributed,
)
from monai_iou.voxels import late_checks
from monai_iou.voxels.late_checks import LateChecks


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


def attention_losses() -> dict[str, nn.Module]:
    """Return losses on attention maps, alone or beside a segmentation loss; sums over ranks in one or in both."""
    alone = ContextAttentionLoss(batch=True, sync_batch=True)
    return {
        "both": AttentionSupervisionLoss(IoULoss(**JOIN), alone),
        "segmentation": AttentionSupervisionLoss(IoULoss(**JOIN), ContextAttentionLoss()),
        "attention": AttentionSupervisionLoss(IoULoss(softmax=True), alone),
    }


class WithForeground(nn.Module):
    """Stands in for a loss like MONAI's, which sums nothing over the ranks and has checks of its own."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not target.any():
            message = "Expected foreground, but got none: leave such images out."
            raise ValueError(message)
        return input.mean()


def compounds() -> dict[str, nn.Module]:
    """Return compounds of which only a part sums over the ranks."""
    return {
        "first": CompoundLoss([WithForeground(), IoULoss(**JOIN)]),
        "last": CompoundLoss([IoULoss(**JOIN), WithForeground()]),
        "beside_instance": CompoundLoss([InstanceIoULoss(**JOIN), WithForeground(), IoULoss(softmax=True)]),
        "nested": CompoundLoss([CompoundLoss([IoULoss(**JOIN)]), WithForeground()]),
    }


def outcome(loss: nn.Module, logits: Any, target: Tensor) -> str:
    try:
        value = loss(logits, target)
    except (ValueError, RuntimeError) as error:  # the latter is MONAI's
        return str(error)
    return "finite" if value.isfinite() else "nan"


def fail_on_one_rank(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder)
    logits = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(rank))
    right = torch.zeros(1, 1, 6, 6, dtype=torch.long)
    right[0, 0, 1:3, 1:3] = 1
    found = {}
    for kind, wrong in targets().items():
        for name, loss in every_loss().items():
            found[f"{name}_{kind}"] = outcome(loss, logits, wrong if rank == 1 else right)
            assert loss(logits, right).isfinite(), "the ranks go on together"
    for name, loss in compounds().items():
        for kind, wrong in {"rule": torch.zeros_like(right), "value": targets()["value"]}.items():
            found[f"compound_{name}_{kind}"] = outcome(loss, logits, wrong if rank == 1 else right)
            assert loss(logits, right).isfinite(), "the ranks go on together"
    for name, loss in attention_losses().items():
        pair = (logits, [logits[:, :1].sigmoid()])
        for kind, wrong in {"number": right - 1, **targets()}.items():
            found[f"attention_{name}_{kind}"] = outcome(loss, pair, wrong if rank == 1 else right)
            assert loss(pair, right).isfinite(), "the ranks go on together"
    binary = right.clamp_max(1)
    hinge = LovaszHingeLoss(batch=True, sync_batch=True)
    found["hinge_value"] = outcome(hinge, logits[:, :1], binary * 7 if rank == 1 else binary)
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


def test_every_rank_ends_with_one_sentence(tmp_path: Path) -> None:
    run_ranks(fail_on_one_rank, 2, 2, str(tmp_path))
    waiting, wrong = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert set(waiting) == set(wrong)
    assert len(wrong) > 20
    for name, sentence in waiting.items():
        assert sentence.startswith("Expected the input and target of every rank to be valid"), (name, sentence)
        assert sentence.endswith("but got an error on another rank: see the message of that rank."), name
    for name, sentence in wrong.items():
        kinds = {"value": "but got 7", "number": "but got -1", "shape": "but got (1, 1, 6, 5)", "rule": "but got none"}
        own = kinds[name.rpartition("_")[2]]
        assert own in sentence, name


def labelled_by_one_rank(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder)
    logits, labels = torch.zeros(1, 3, 6, 6), torch.zeros(1, 1, 6, 6, dtype=torch.long)
    labelled = torch.ones(1, 3, dtype=torch.bool)
    labelled[0, 2] = rank == 0
    found = {}
    for name, loss in {"attention": attention_losses()["both"], "compound": compounds()["last"]}.items():
        given: Any = (logits, [logits[:, :1].sigmoid()]) if name == "attention" else logits
        try:
            found[name] = str(loss(given, labels, labelled))
        except ValueError as error:
            found[name] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


def test_ranks_refuse_together_what_one_of_them_did_not_annotate(tmp_path: Path) -> None:
    """Each would decide by its own values, and those that go on would wait for the others."""
    run_ranks(labelled_by_one_rank, 2, 2, str(tmp_path))
    every, some = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert every == some
    for sentence in every.values():
        assert "`labelled` on several ranks, which must decide alike and do not read its values: use a loss" in sentence


def fail_in_a_group_for_gpus_alone(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder, "cuda:gloo")  # as NCCL, it has nothing for tensors on a CPU
    attention = ContextAttentionLoss(batch=True, sync_batch=True)
    label = torch.zeros(1, 1, 6, 6)
    found = []
    for loss, given in ((IoULoss(**JOIN), {"out": label}), (attention, []), (CompoundLoss([IoULoss(**JOIN)]), {})):
        with pytest.raises((TypeError, ValueError)) as caught:
            loss(given, label)
        found.append(str(caught.value))
    torch.save(found, Path(folder) / f"{rank}.pt")
    os._exit(0)  # without a barrier, which the group has none of


def test_an_input_that_is_no_tensor_is_named_where_the_ranks_cannot_agree(tmp_path: Path) -> None:
    run_ranks(fail_in_a_group_for_gpus_alone, 2, 2, str(tmp_path))
    no_tensor = "Expected `input` to be a tensor, but got dict: convert it with torch.as_tensor."
    no_map = (
        "Expected `input` to hold at least one attention map, but got none: pass the output of a network in training "
        "mode."
    )
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [no_tensor, no_map, no_tensor]


def test_an_error_is_told_on_the_device_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's tensors are on this rank's GPU, whatever the input is."""
    told: list[torch.device] = []
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "get_dist_device", lambda: torch.device("meta"))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: told.append(tensor.device))
    with pytest.raises(TypeError, match=r"^Expected `input` to be a tensor, but got dict: "):
        IoULoss(**JOIN)({}, torch.zeros(1, 1, 6, 6))
    assert told == [torch.device("meta")]


def test_a_group_that_breaks_where_nothing_else_is_wrong_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Tensor) -> None:
        message = "Connection closed by peer"
        raise RuntimeError(message)

    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", broken)
    with pytest.raises(RuntimeError, match="closed by peer"), distributed.fails_together(True, None):
        pass
    with pytest.raises(KeyError, match="mine"), distributed.fails_together(True, None):
        raise KeyError("mine")  # noqa: EM101


class Event:
    """Stands in for torch.cuda.Event: every answer is there."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def stand_in_for_a_gpu() -> None:
    """Let this process check labels as it does on a GPU."""
    late_checks.answers_late = lambda _: True
    late_checks._alone, late_checks.shared = (LateChecks(lambda: cast("Any", Event()), pinned=False) for _ in range(2))


def fail_late_on_one_rank(rank: int, world: int, folder: str) -> None:
    join_group(rank, world, folder)
    stand_in_for_a_gpu()
    logits = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(rank))
    right = torch.zeros(1, 1, 6, 6, dtype=torch.long)
    right[0, 0, 1:3, 1:3] = 1
    found = {}
    for name, loss in every_loss().items():
        if name != "instance_with_monais":  # MONAI's loss looks at the labels itself
            first = outcome(loss, logits, targets()["value"] if rank == 1 else right)
            found[name] = [first, *(outcome(loss, logits, right) for _ in range(5))]
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


def test_on_gpus_every_rank_ends_in_the_same_later_call(tmp_path: Path) -> None:
    run_ranks(fail_late_on_one_rank, 2, 2, str(tmp_path))
    waiting, wrong = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert set(waiting) == set(wrong)
    assert len(wrong) > 10
    for name, theirs in waiting.items():
        own = wrong[name]
        assert theirs[0] == own[0] == "nan", name
        (call,) = (step for step, result in enumerate(own) if "but got 7" in result)
        assert theirs[call].endswith("but got an error on another rank: see the message of that rank."), name
        for results in (theirs, own):
            assert [result for step, result in enumerate(results) if step not in (0, call)] == ["finite"] * 4, name
