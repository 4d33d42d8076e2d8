"""nnU-Net v2's own commands with our trainers, and the losses that they build."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from integration_environment import TORCHVISION, recipe, run

pytest.importorskip("nnunetv2", reason="needs nnunetv2, which .ci/integrations installs")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    exec(TORCHVISION, {})
    from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    from monai_iou import IoULoss
    from monai_iou.integrations import nnunet

PLAIN = {"background": 0, "organ": 1, "lesion": 2}
IGNORE = {**PLAIN, "ignore": 3}
REGIONS = {"background": 0, "both": [1, 2], "lesion": 2}
REGIONS_IGNORE = {**REGIONS, "ignore": 3}
TRAINERS = [getattr(nnunet, name) for name in nnunet.__all__]
SHAPES = [(8, 8, 8), (4, 4, 4), (2, 2, 2)]


def bare_trainer(
    trainer_class: type, labels: dict[str, Any], *, batch_dice: bool = False, deep: bool = True, ddp: bool = False
) -> Any:
    """Return a trainer with no more than what building a loss needs: no dataset, plans or results."""
    trainer = object.__new__(trainer_class)
    trainer.label_manager = LabelManager(labels, [1, 2] if isinstance(labels.get("both"), list) else None)
    trainer.configuration_manager = SimpleNamespace(
        batch_dice=batch_dice,
        spacing=[3.0, 1.0, 1.0],
        pool_op_kernel_sizes=[[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    )
    trainer.is_ddp, trainer.enable_deep_supervision, trainer.device = ddp, deep, torch.device("cpu")
    return trainer


def outputs_and_targets(labels: dict[str, Any], ignored: bool = True) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return network outputs and the targets that nnU-Net's transforms make, at three scales."""
    torch.manual_seed(0)
    regions, ignore = "both" in labels, labels.get("ignore") if ignored else None
    heads = 2 if regions else 3
    outputs = [torch.randn(2, heads, *shape, requires_grad=True) for shape in SHAPES]
    full = torch.randint(0, 3 if ignore is None else 4, (2, 1, *SHAPES[0])).to(torch.int16)
    maps = [full[..., ::step, ::step, ::step] for step in (1, 2, 4)]
    if regions:
        maps = [torch.cat([(m == 1) | (m == 2), m == 2, *([m == 3] if "ignore" in labels else [])], 1) for m in maps]
    return outputs, maps


@pytest.mark.parametrize(
    "labels", [PLAIN, IGNORE, REGIONS, REGIONS_IGNORE], ids=["labels", "ignore", "regions", "both"]
)
@pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_every_trainers_loss_takes_nnunets_targets_and_trains(trainer_class: type, labels: dict[str, Any]) -> None:
    loss = bare_trainer(trainer_class, labels)._build_loss()
    outputs, targets = outputs_and_targets(labels)
    value = loss(outputs, targets)
    value.backward()
    assert math.isfinite(value.item())
    assert value.item() > 0
    # nnU-Net gives the coarsest output no weight
    assert all(output.grad is not None and output.grad.abs().sum() > 0 for output in outputs[:2])


@pytest.mark.parametrize("labels", [IGNORE, REGIONS_IGNORE], ids=["labels", "regions"])
@pytest.mark.parametrize("trainer_class", TRAINERS, ids=lambda trainer: trainer.__name__)
def test_ignored_voxels_have_no_effect_and_no_gradient(trainer_class: type, labels: dict[str, Any]) -> None:
    loss = bare_trainer(trainer_class, labels, deep=False)._build_loss()
    (output, *_), (target, *_) = outputs_and_targets(labels)
    ignored = target[:, -1:] if "both" in labels else target == 3
    assert ignored.any()
    value = loss(output, target)
    (gradient,) = torch.autograd.grad(value, output)
    changed = torch.where(ignored, output * -7 + 3, output)
    assert loss(changed, target).item() == value.item()
    assert gradient[ignored.expand_as(gradient)].abs().max() == 0
    assert gradient[~ignored.expand_as(gradient)].abs().min() > 0


@pytest.mark.parametrize("labels", [PLAIN, IGNORE], ids=["labels", "ignore"])
def test_cross_entropy_is_nnunets(labels: dict[str, Any]) -> None:
    trainer = bare_trainer(type("Entropy", (nnunet.nnUNetTrainerIoU,), {"lambda_region": 0.0}), labels, deep=False)
    (output, *_), (target, *_) = outputs_and_targets(labels)
    theirs = DC_and_CE_loss({}, {}, weight_dice=0, ignore_label=labels.get("ignore"))
    assert trainer._build_loss()(output, target).item() == pytest.approx(theirs(output, target).item(), rel=1e-5)


def test_cross_entropy_of_regions_is_nnunets_mean() -> None:
    trainer = bare_trainer(
        type("Entropy", (nnunet.nnUNetTrainerIoU,), {"lambda_region": 0.0}), REGIONS_IGNORE, deep=False
    )
    (output, *_), (target, *_) = outputs_and_targets(REGIONS_IGNORE)
    theirs = DC_and_BCE_loss({}, {"ddp": False}, use_ignore_label=True, weight_dice=0)
    # theirs adds the two regions where there are ignored voxels, and averages them where there are none
    assert trainer._build_loss()(output, target).item() == pytest.approx(theirs(output, target).item() / 2, rel=1e-5)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_the_region_term_is_the_iou_loss_without_background(batch_dice: bool) -> None:
    trainer = bare_trainer(
        type("Region", (nnunet.nnUNetTrainerIoU,), {"lambda_ce": 0.0}), PLAIN, batch_dice=batch_dice, deep=False
    )
    (output, *_), (target, *_) = outputs_and_targets(PLAIN)
    expected = IoULoss(include_background=False, softmax=True, batch=batch_dice)(output, target)
    assert trainer._build_loss()(output, target).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("ddp", [False, True])
def test_deep_supervision_is_nnunets_own(ddp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_compile", "f")
    theirs = super(nnunet.nnUNetTrainerIoU, bare_trainer(nnunet.nnUNetTrainerIoU, PLAIN, ddp=ddp))._build_loss()
    for trainer_class in (nnunet.nnUNetTrainerIoU, nnunet.nnUNetTrainerIoUArea):
        ours = bare_trainer(trainer_class, PLAIN, ddp=ddp)._build_loss()
        weights = ours.weight_factors if isinstance(ours, DeepSupervisionWrapper) else ours.loss.weights
        assert list(weights) == list(theirs.weight_factors)


def test_sums_over_the_batch_are_sums_over_the_ranks() -> None:
    loss = bare_trainer(nnunet.nnUNetTrainerIoUBatch, PLAIN, ddp=True, deep=False)._build_loss()
    assert all(term.sync_batch for term in loss.losses)
    loss = bare_trainer(nnunet.nnUNetTrainerIoU, PLAIN, ddp=True, deep=False)._build_loss()
    assert not any(term.sync_batch for term in loss.losses)


def test_a_patch_of_ignored_voxels_only_is_survived() -> None:
    for labels in (IGNORE, REGIONS_IGNORE):
        loss = bare_trainer(nnunet.nnUNetTrainerIoU, labels, deep=False)._build_loss()
        (output, *_), (target, *_) = outputs_and_targets(labels)
        target = torch.full_like(target, 3) if "both" not in labels else torch.zeros_like(target)
        target[:, -1] = 3 if "both" not in labels else True
        value = loss(output, target)
        (gradient,) = torch.autograd.grad(value, output)
        assert value.item() == 0
        assert gradient.abs().max() == 0


def test_small_lesions_are_in_the_coarse_labels() -> None:
    """A lesion of one voxel off nnU-Net's grid of nearest voxels is seen by the second output of the Area trainer."""
    target = torch.zeros(1, 1, *SHAPES[0], dtype=torch.int16)
    target[0, 0, 3, 3, 3] = 2
    targets = [target[..., ::step, ::step, ::step] for step in (1, 2, 4)]
    assert targets[1].max() == 0
    pulls = []
    for trainer_class in (nnunet.nnUNetTrainerIoU, nnunet.nnUNetTrainerIoUArea):
        outputs = [torch.zeros(1, 3, *shape, requires_grad=True) for shape in SHAPES]
        bare_trainer(trainer_class, PLAIN)._build_loss()(outputs, targets).backward()
        gradient = outputs[1].grad
        assert gradient is not None
        pulls.append((gradient[0, 2, 1, 1, 1] - gradient[0, 2, 0, 0, 0]).item())
    assert pulls[0] == 0
    assert pulls[1] < 0


@pytest.mark.parametrize("labels", [PLAIN, REGIONS_IGNORE], ids=["labels", "regions"])
@pytest.mark.parametrize("trainer_class", [nnunet.nnUNetTrainerIoUInstance, nnunet.nnUNetTrainerIoUBidirectional])
def test_coarse_cells_are_measured_in_mm_where_thick_slices_are_halved_later(
    trainer_class: type, labels: dict[str, Any]
) -> None:
    """Each scale has the value of a trainer whose spacing is that of its voxels: slices of 3 mm, pixels of 1 or 2."""
    torch.manual_seed(0)
    shapes = [(6, 24, 24), (6, 12, 12), (3, 6, 6)]
    full = torch.zeros(1, 1, *shapes[0], dtype=torch.int16)
    full[0, 0, 0, 2:6, 2:6] = full[0, 0, 4, 10:14, 4:8] = full[0, 0, 2, 18:22, 18:22] = 2
    steps = [tuple(a // b for a, b in zip(shapes[0], shape, strict=True)) for shape in shapes]
    maps = [full[:, :, :: step[0], :: step[1], :: step[2]] for step in steps]
    if "both" in labels:
        maps = [torch.cat([each > 0, each == 2, each == 3], 1) for each in maps]
    outputs = [torch.randn(1, 2 if "both" in labels else 3, *shape) for shape in shapes]
    found = bare_trainer(trainer_class, labels)._build_loss()
    expected = 0.0
    for step, weight, output, target in zip(steps, found.weight_factors, outputs, maps, strict=False):
        alone = bare_trainer(trainer_class, labels, deep=False)
        alone.configuration_manager.spacing = [mm * n for mm, n in zip((3.0, 1.0, 1.0), step, strict=True)]
        expected += weight * alone._build_loss()(output, target).item()
    assert found(outputs, maps).item() == pytest.approx(expected, rel=1e-6)
    plain = DeepSupervisionWrapper(found.loss, found.weight_factors)(outputs, maps).item()
    assert abs(plain - expected) > 3e-5, "the proportions of the voxels have an effect"


def write_raw_dataset(folder: Path) -> None:
    """Write four volumes with a lesion each, and a voxel with the ignore label, in nnU-Net's layout."""
    import nibabel as nib
    import numpy as np

    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(0)
    for case in range(4):
        image = rng.normal(size=(32, 32, 24)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        corner = rng.integers(4, 14, 3)
        label[tuple(slice(c, c + 6) for c in corner)] = 1
        image[label == 1] += 3
        label[0, 0, 0] = 2
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / f"case_{case}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / f"case_{case}.nii.gz")
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "channel_names": {"0": "CT"},
                "labels": {"background": 0, "lesion": 1, "ignore": 2},
                "numTraining": 4,
                "file_ending": ".nii.gz",
            }
        )
    )


def test_nnunet_commands_train_and_predict(tmp_path: Path) -> None:
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    variables = {**folders, "nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    write_raw_dataset(tmp_path / "nnUNet_raw" / "Dataset901_Lesions")
    install, train, own = recipe("nnU-Net v2", "sh")
    brief = recipe("nnU-Net v2", "py")[0].replace("num_epochs = 250", "num_epochs = 1")
    brief += "        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1\n"

    run(f"{install}\nnnUNetv2_plan_and_preprocess -d 901 -c 3d_fullres -np 1 -npfp 1", tmp_path, **variables)
    (tmp_path / "trainers" / "my_trainers.py").write_text(brief)
    assert "-tr nnUNetTrainerIoU" in train
    # the trainer of the recipe as it is found by nnU-Net, without its 1000 epochs
    found = run(
        f'{install}\npython -c "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as f;'
        "print(f('nnUNetTrainerIoU').__module__)\"",
        tmp_path,
        **variables,
    )
    assert found.splitlines()[-1] == "monai_iou.integrations.nnunet"

    own = own.replace(" 901 3d_fullres 0 ", " 901 3d_fullres all ").replace(
        "nnUNetv2_train", "nnUNetv2_train -device cpu"
    )
    run(f"{install}\n{own}", tmp_path, **variables)
    results = tmp_path / "nnUNet_results" / "Dataset901_Lesions" / "nnUNetTrainerMine__nnUNetPlans__3d_fullres"
    assert "CompoundLoss" in (results / "fold_all" / "debug.json").read_text()
    scores = json.loads((results / "fold_all" / "validation" / "summary.json").read_text())
    assert len(scores["metric_per_case"]) == 4
    log = next((results / "fold_all").glob("training_log_*.txt")).read_text()
    assert math.isfinite(float(log.split("train_loss ")[1].split()[0]))

    run(
        f"{install}\nnnUNetv2_predict -i {folders['nnUNet_raw']}/Dataset901_Lesions/imagesTr -o predictions -d 901 "
        "-c 3d_fullres -f all -tr nnUNetTrainerMine -device cpu -npp 1 -nps 1 --disable_tta",
        tmp_path,
        **variables,
    )
    assert len(list((tmp_path / "predictions").glob("case_*.nii.gz"))) == 4
