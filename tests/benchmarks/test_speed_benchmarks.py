"""What the benchmarks of speed compare: each loss with a peer of its kind, and the network that a patch really gets."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import deformation, epoch, nnunet_steps
from benchmarks.losses import SORTING, Row, peer_of
from benchmarks.network import bundle
from monai_iou.planning.plan import network_size

DICE, DICE_CE = "monai DiceLoss(jaccard)", "monai DiceCELoss(jaccard)"


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("IoULoss, tiled", DICE),
        ("FocalTverskyLoss, tiled", DICE),
        ("WeightedCrossEntropyLoss, tiled", DICE),
        ("IoUCELoss, compiled", DICE_CE),
        ("IoUFocalLoss, tiled", DICE_CE),
        (DICE_CE, DICE_CE),
        ("LovaszSoftmaxLoss, tiled", SORTING),
        ("kornia lovasz_softmax_loss", SORTING),
    ],
)
def test_a_loss_is_compared_with_a_peer_that_has_a_cross_entropy_only_if_it_has_one_too(name: str, peer: str) -> None:
    assert peer_of(Row(name, 1, 5, 64, "float32", 1.0, 1.0, 1.0)) == peer


def test_the_network_that_is_timed_has_the_levels_of_the_patch(tmp_path: Path) -> None:
    options = argparse.Namespace(device="cpu", patch=[64, 64, 48], channels=4)
    plan = bundle(options, tmp_path).get_parsed_content("plan")
    channels, strides, patch = network_size(options.patch, plan.pixdim, options.channels)
    assert (plan.patch_size, plan.channels, plan.strides) == (patch, channels, strides)
    assert plan.patch_size == (64, 64, 48)


def test_every_deformation_that_is_timed_moves_image_and_label(capsys: pytest.CaptureFixture[str]) -> None:
    axes = torch.meshgrid(*[torch.arange(12.0)] * 3, indexing="ij")
    item = {"image": axes[0][None], "label": (axes[1][None] > 5).byte()}
    for name, deform in deformation.forms("cpu").items():
        moved = deform(dict(item))
        assert moved["image"].shape == item["image"].shape
        assert not torch.equal(torch.as_tensor(moved["image"]), item["image"]), name
        assert set(moved["label"].unique().tolist()) == {0, 1}
    deformation.main(["--patch", "8", "8", "8", "--turns", "1"])
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(deformation.forms("cpu"))
    with pytest.raises(SystemExit):
        deformation.main(["--turns", "0"])
    assert "--turns must be at least 1, but is 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--turns", "0"], "--turns must be at least 1, but is 0"),
        (["--keys", "[1]"], "--keys must be a JSON object, but is [1]"),
        (["--other-keys", "2"], "--other-keys must be a JSON object, but is 2"),
    ],
)
def test_an_epoch_that_cannot_be_timed_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        epoch.main([".", "--data", ".", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, but is 0"),
        ([], "FOLDER must have a dataset.json, but there is none in"),
    ],
)
def test_steps_of_nnunet_that_cannot_be_timed_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        nnunet_steps.main([str(tmp_path), *options])
    assert message in capsys.readouterr().err
