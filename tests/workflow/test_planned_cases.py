"""Which cases a plan is made from: never those of `test_labelled`, and the same ones for every fold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from monai_iou.bundle_files import bundle_path
from monai_iou.datasets.cases import DatasetError
from monai_iou.datasets.folder import read_folder
from monai_iou.planning.plan import Plan
from monai_iou.transforms.crops_dictionary import LesionIndicesd
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.labelled import draws_raters
from monai_iou.workflow.targets import DrawnRaterd, LabelTargetsd, ScoredLabelsd

SIDE = 10


def save(path: Path, array: np.ndarray) -> str:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path.name


def entry(
    root: Path, name: str, side: int = SIDE, raters: int = 1, dtype: Any = np.uint8, last: int = 2, **more: Any
) -> Any:
    """A case with the value 1 in a block and another one in a second block."""
    rng = np.random.default_rng(len(list(root.iterdir())))
    label = np.zeros((side,) * 3, dtype)
    label[2:5, 2:5, 2:5], label[6:8, 6:8, 6:8] = 1, last
    image = save(root / f"{name}.nii.gz", rng.normal(rng.uniform(1, 9), 1, label.shape).astype(np.float32))
    labels = [save(root / f"{name}_rater{rater}.nii.gz", label) for rater in range(raters)]
    return {"image": image, "label": labels[0] if raters == 1 else labels, **more}


def dataset(root: Path, training: list[Any], **content: Any) -> Path:
    base = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "core", "2": "rim"}, "training": training}
    (root / "dataset.json").write_text(json.dumps({**base, **content}))
    return root


def plan_of(root: Path, **options: Any) -> Plan:
    return BundleCases(str(root), **options).plan([16, 16, 16], base_channels=4)


def test_the_test_set_does_not_change_the_plan(tmp_path: Path) -> None:
    training = [entry(tmp_path, f"c{k}") for k in range(3)]
    alone = plan_of(dataset(tmp_path, training))
    for given in ({"raters": 2}, {"labelled": ["core"]}, {"raters": 3, "labelled": ["core"]}):
        tested = [entry(tmp_path, "t0", **given), entry(tmp_path, "t1")]
        root = dataset(tmp_path, training, test_labelled=tested)
        assert plan_of(root) == alone
        assert not draws_raters(BundleCases(str(root), raters="draw"))
        cases = BundleCases(str(root))
        assert all("labelled" not in item for item in (*cases.training, *cases.validation))


def test_a_test_case_that_lacks_classes_is_still_scored_without_them(tmp_path: Path) -> None:
    tested = [entry(tmp_path, "t0", labelled=["core"]), entry(tmp_path, "t1")]
    cases = BundleCases(str(dataset(tmp_path, [entry(tmp_path, f"c{k}") for k in range(3)], test_labelled=tested)))
    found = [item["labelled"].tolist() for item in cases.evaluation_on("test_labelled", [])]
    assert found == [[True, True, False], [True, True, True]]
    assert [item["labelled"].tolist() for item in cases.evaluation] == found


REGIONS = {"whole": (1, 2), "core": (2,)}
MODEL = {0: "background", 1: "core", 2: "rim"}


@pytest.mark.parametrize(
    ("content", "named", "changes", "expected"),
    [
        ({"regions": {"core": [2], "whole": [1, 2]}}, "core", {"regions": REGIONS}, [False, False, True]),
        ({"labels": {"0": "background", "1": "centre", "2": "rim"}}, "centre", {}, [True, True, False]),
        ({}, "core", {"labels": {**MODEL, 3: "cyst"}}, [True, True, False, False]),
        ({"labels": {"0": "background", "1": "core", "2": "rim", "3": "cyst"}}, "core", {}, [True, True, False]),
    ],
    ids=["order of regions", "other name", "fewer classes", "more classes"],
)
def test_what_was_annotated_is_told_by_the_classes_of_the_model(
    content: dict[str, Any], named: str, changes: dict[str, Any], expected: list[bool], tmp_path: Path
) -> None:
    training = [entry(tmp_path, f"c{k}") for k in range(2)]
    tested = [entry(tmp_path, "t0", labelled=[named])]
    order = {"regions_class_order": [2, 1]} if "regions" in content else {}
    cases = BundleCases(str(dataset(tmp_path, training, test_labelled=tested, **content, **order)))
    plan = replace(Plan((), MODEL, (), (), (), (), ()), modalities=("CT",), **changes)
    (item,) = cases.evaluation_on(None, [plan])
    assert item["labelled"].tolist() == expected
    target = torch.zeros(len(expected) if plan.has_maps else 1, 2, 2, 2)
    scored = ScoredLabelsd("label", plan)({"label": target, "labelled": item["labelled"]})["label"]
    assert scored.isnan().flatten(1).all(1).tolist() == [not known for known in expected]


def test_a_case_with_all_classes_lacks_those_that_its_dataset_does_not_have(tmp_path: Path) -> None:
    training = [entry(tmp_path, "c0", labelled=["core"]), entry(tmp_path, "c1")]
    cases = BundleCases(str(dataset(tmp_path, training, test_labelled=[entry(tmp_path, "t0")])))
    plan = Plan(("CT",), {**MODEL, 3: "cyst"}, (), (), (), (), ())
    assert cases.evaluation_on(None, [plan])[0]["labelled"].tolist() == [True, True, True, False]


def test_one_of_several_raters_shares_is_not_drawn(tmp_path: Path) -> None:
    training = [entry(tmp_path, f"c{k}", raters=2, dtype=np.float32, last=1) for k in range(3)]
    labels = {"labels": {"0": "background", "1": "lesion"}, "soft_labels": True}
    root = dataset(tmp_path, training, **labels)
    assert plan_of(root).soft
    with pytest.raises(DatasetError) as caught:
        plan_of(root, raters="draw")
    assert str(caught.value) == (
        f"Expected `raters` to be mean for several raters with `soft_labels` in {root.resolve() / 'dataset.json'}, "
        "but got draw: train on the mean of their shares with --raters mean."
    )
    single = [entry(tmp_path, f"s{k}", dtype=np.float32, last=1) for k in range(3)]
    assert plan_of(dataset(tmp_path, single, **labels), raters="draw").soft


def large_patient(root: Path) -> Path:
    """Twelve cases, of which the eight of one patient are twice as large as the others."""
    sizes = [("P1_", 48)] * 8 + [("c", 24)] * 4
    training = [entry(root, f"{name}{k}", side) for k, (name, side) in enumerate(sizes)]
    return dataset(root, training, patient_groups={"P1": ["P1_"]})


def test_all_folds_have_one_network_and_the_intensities_of_their_own_cases(tmp_path: Path) -> None:
    root = large_patient(tmp_path)
    plans = [BundleCases(str(root), folds=3, fold=fold).plan([64, 64, 64], base_channels=4) for fold in range(3)]
    assert {plan.patch_size for plan in plans} == {(48, 48, 48)}
    for name in ("pixdim", "channels", "strides", "spatial_dims"):
        assert all(getattr(plan, name) == getattr(plans[0], name) for plan in plans[1:])
    assert plans[0].intensity[0] != plans[1].intensity[0]
    folder = read_folder(root)
    facts = dict(zip(folder.labelled, folder.training_facts, strict=True))
    for fold, plan in enumerate(plans):
        trained, _ = folder.split(0.1, 0, 3, fold)
        voxels = np.concatenate([facts[case].foreground[0] for case in trained])
        assert plan.intensity[0]["mean"] == pytest.approx(voxels.mean(), rel=1e-3)
        assert plan.trained == tuple(case.name for case in trained)


def test_slices_of_some_folds_alone_are_planned_as_volumes_in_all(tmp_path: Path) -> None:
    training = [entry(tmp_path, f"c{k}") for k in range(2)]
    flat = np.zeros((SIDE, SIDE, 1), np.uint8)
    flat[2:5, 2:5] = 1
    for k in range(2):
        names = [save(tmp_path / f"{kind}{k}.nii.gz", flat.astype(np.float32)) for kind in ("flat", "label")]
        training.append(dict(zip(("image", "label"), names, strict=True)))
    root = dataset(tmp_path, training, patient_groups={"a": ["c0", "c1"], "b": ["flat0", "flat1"]})
    assert {plan_of(root, folds=2, fold=fold).spatial_dims for fold in range(2)} == {3}


def appended(root: Path, **keys: Any) -> ConfigParser:
    """The bundle's configuration with a transform that MONAI's merging syntax adds to those of the training."""
    extra = root / "extra.json"
    extra.write_text(json.dumps({"+train#deterministic_transforms": [{"_target_": "CastToTyped", "keys": "image"}]}))
    parser = ConfigParser(ConfigParser.load_config_files([bundle_path() / "configs" / "train.json", extra]))
    for name, value in {"dataset_dir": str(root), "val_fraction": 0.4, "patch_size": [8, 8, 8], **keys}.items():
        parser[name] = value
    return parser


def names(parser: ConfigParser, part: str) -> list[str]:
    return [type(each).__name__ for each in parser.get_parsed_content(f"{part}#preprocessing").transforms]


@pytest.mark.parametrize("raters", ["mean", "draw"])
@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
def test_an_appended_transform_prepares_training_and_validation(raters: str, tmp_path: Path) -> None:
    dataset(tmp_path, [entry(tmp_path, f"c{k}", raters=2) for k in range(3)])
    parser = appended(tmp_path, raters=raters)
    validation, training = names(parser, "validate"), names(parser, "train")
    assert validation[-2:] == [LabelTargetsd.__name__, "CastToTyped"]
    assert LesionIndicesd.__name__ not in validation
    drawn = [DrawnRaterd.__name__, "CastToTyped", "RandCropByLesionsd"]
    mean = [LabelTargetsd.__name__, LesionIndicesd.__name__, *drawn[1:]]
    start = training.index(drawn[0] if raters == "draw" else mean[0])
    assert training[start:][: len(drawn if raters == "draw" else mean)] == (drawn if raters == "draw" else mean)
