"""Cases that were trained on are not scored as test cases, and files that change during a run are named."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, Lambdad

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.folder import read_folder
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.workflow.caching import cached_dataset
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.failures import TrainingError, run
from monai_iou.workflow.records import data_record, differences, image_identity
from monai_iou.workflow.starting_weights import with_seen


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_phantom_dataset(tmp_path / "data", training=3, evaluation=2, shape=(24, 24, 16))


def describe(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plan(folder: Path, **split: Any) -> Plan:
    return BundleCases(str(folder), **{"val_fraction": 0, **split}).plan([16, 16, 16])


def test_the_plan_knows_the_images_that_were_trained_on(data: Path) -> None:
    images = sorted((data / "imagesTr").iterdir())
    assert sorted(plan(data).trained_images) == sorted(image_identity(Case("", image)) for image in images)
    assert len(plan(data, val_fraction=0.3).trained_images) == 2


def skull_stripped(path: Path, seed: int, extension: str = ".nii", slices: int = 155) -> Case:
    """An image of noise within zeros, as wide as BraTS has them."""
    array = np.zeros((240, 240, slices), np.int16)
    inside = np.random.default_rng(seed).integers(0, 500, (120, 120, slices - 65))
    array[60:180, 60:180, 30 : slices - 35] = inside
    nib.save(nib.Nifti1Image(array, np.eye(4)), path.with_name(f"{path.name}{seed}{extension}"))
    return Case(str(seed), path.with_name(f"{path.name}{seed}{extension}"))


@pytest.mark.parametrize(("extension", "slices"), [(".nii", 155), (".nii.gz", 155), (".nii", 700)])
def test_images_that_differ_in_their_middle_are_told_apart(extension: str, slices: int, tmp_path: Path) -> None:
    one, other = (skull_stripped(tmp_path / "im", seed, extension, slices) for seed in (0, 1))
    assert image_identity(one) != image_identity(other)
    shutil.copy(one.image, tmp_path / f"copy{extension}")
    assert image_identity(one) == image_identity(Case("copy", tmp_path / f"copy{extension}"))


@pytest.mark.slow
def test_any_change_of_an_uncompressed_image_is_seen_and_of_a_large_one_every_block(tmp_path: Path) -> None:
    file = tmp_path / "a.nii"
    for size, step in ((1000, 100), ((64 << 20) - 1, 5 << 20), (100 << 20, (100 << 20) // 63)):
        with file.open("wb") as stream:
            stream.truncate(size)
        known = {image_identity(Case("a", file))}
        for place in {*range(0, size - 1, step), size - 1}:
            with file.open("r+b") as stream:
                stream.seek(place)
                stream.write(bytes([place % 251 + 1]))
            known.add(image_identity(Case("a", file)))
        assert len(known) == 1 + len({*range(0, size - 1, step), size - 1})


def test_the_images_of_earlier_records_are_known(data: Path) -> None:
    content = json.loads((data / "dataset.json").read_text())
    (data / "imagesTr" / "plain.nii").write_bytes(
        gzip.decompress((data / content["training"][0]["image"]).read_bytes())
    )
    content["training"][0]["image"] = "imagesTr/plain.nii"
    describe(data, training=content["training"])
    made = plan(data)
    assert [identity.count("-") for identity in made.trained_images] == [1, 0, 0]
    earlier = replace(made, trained_images=tuple(identity.split("-")[0] for identity in made.trained_images))
    assert earlier.trained_images[1:] == made.trained_images[1:] == tuple(map(ends, read_folder(data).training[1:]))
    assert earlier.trained_images[0] == ends(read_folder(data).training[0])
    describe(data, test_labelled=content["training"])
    for known in (made, earlier):
        with pytest.raises(DatasetError, match="phantom_01, phantom_02, plain of `test_labelled`"):
            BundleCases(str(data), val_fraction=0).evaluation_on(None, [known])


def ends(case: Case) -> str:
    """The identity that earlier versions stored."""
    content = case.image.read_bytes()
    whole = str(len(content)).encode() + content[: 1 << 20] + content[max(0, len(content) - (1 << 16)) :]
    return hashlib.sha256(whole).hexdigest()[:16]


@pytest.mark.parametrize("how", ["same entry", "link", "copy", "patient", "hard link"])
def test_test_cases_that_were_trained_on_are_refused(how: str, data: Path) -> None:
    content = json.loads((data / "dataset.json").read_text())
    entry = dict(content["test_labelled"][0])
    first = data / content["training"][0]["image"]
    if how == "same entry":
        entry = content["training"][0]
    elif how != "patient":
        new = data / "imagesTs" / "other.nii.gz"
        {"link": new.symlink_to, "copy": lambda source: shutil.copy(source, new), "hard link": new.hardlink_to}[how](
            first
        )
        entry = {"image": "imagesTs/other.nii.gz", "label": content["training"][0]["label"]}
    groups = {"patient_groups": {"P": ["phantom_00", "phantom_03"]}} if how == "patient" else {}
    trained = plan(data)
    describe(data, test_labelled=[entry, content["test_labelled"][1]], **groups)
    cases = BundleCases(str(data), val_fraction=0)
    name = Path(entry["image"]).name.removesuffix(".nii.gz")
    expected = (
        f"Expected test cases that the model has not seen, but {name} of `test_labelled` in {data}/dataset.json were "
        "trained on, by the same image or the same patient: remove them there, or set --score_trained_cases true"
    )
    for which in (None, "test_labelled"):
        with pytest.raises(DatasetError) as caught:
            cases.evaluation_on(which, [trained])
        assert str(caught.value).startswith(expected)
        assert len(cases.evaluation_on(which, [trained], score_trained_cases=True)) == 2
    assert len(cases.evaluation_on(None, [])) == 2


@pytest.mark.parametrize(
    "split", [{"val_fraction": 0}, {"folds": 2, "fold": 0}, {"folds": 2, "fold": 1}, {"val_fraction": 0.5}]
)
def test_a_patient_whose_validation_case_was_trained_on_is_no_test_case(split: dict[str, Any], data: Path) -> None:
    content = json.loads((data / "dataset.json").read_text())
    *training, validation = content["training"]
    groups = {"P": ["phantom_02", "phantom_03"]}
    describe(data, training=training, validation=[validation], patient_groups=groups)
    assert validation["image"].endswith("phantom_02.nii.gz")
    assert content["test_labelled"][0]["image"].endswith("phantom_03.nii.gz")
    trained, cases = plan(data, **split), BundleCases(str(data), **split)
    if "phantom_02" in trained.trained:
        with pytest.raises(DatasetError, match="has not seen, but phantom_03 of `test_labelled`"):
            cases.evaluation_on("test_labelled", [trained])
    else:
        assert len(cases.evaluation_on("test_labelled", [trained])) == 2


HELD_OUT = (
    "Expected cases that the model has not seen, but it was trained on {}, by the same image or the same patient: give "
    "`val_fraction`, `split_seed`, `folds` and `fold` as in its training, and one model. If they are the same, the "
    "case was seen with an earlier split or by the model it started from: score `test_labelled`."
)


def test_held_out_copies_of_training_images_are_refused_under_any_name(data: Path) -> None:
    trained = plan(data)
    content = json.loads((data / "dataset.json").read_text())
    for part in ("imagesTr", "labelsTr"):
        for path in (data / part).iterdir():
            path.rename(path.with_name(path.name.replace("phantom", "renamed")))
    training = json.loads(json.dumps(content["training"]).replace("phantom", "renamed"))
    describe(data, training=training)
    cases = BundleCases(str(data), val_fraction=0.5)
    held_out = cases.validation[0]["case"]
    assert held_out.startswith("renamed")
    for plans in ([trained], [cases.plan([16, 16, 16]), trained]):
        with pytest.raises(DatasetError) as caught:
            cases.evaluation_on("validation", plans)
        assert str(caught.value) == HELD_OUT.format(held_out)
    without_images = replace(trained, trained_images=())  # of earlier versions: by name, as far as it goes
    assert cases.evaluation_on("validation", [without_images]) == cases.validation


def test_another_scan_of_a_patient_who_was_trained_on_is_not_held_out(data: Path) -> None:
    first, second, third = json.loads((data / "dataset.json").read_text())["training"]
    describe(data, training=[first])
    trained = plan(data)
    groups = {"P": ["phantom_00", "phantom_02"]}
    describe(data, training=[second], validation=[third, first], patient_groups=groups)
    with pytest.raises(DatasetError) as caught:
        BundleCases(str(data)).evaluation_on("validation", [trained])
    assert str(caught.value) == HELD_OUT.format("phantom_02")


def test_held_out_cases_of_another_dataset_may_have_the_same_names(data: Path, tmp_path: Path) -> None:
    other = write_phantom_dataset(tmp_path / "other", training=3, evaluation=0, shape=(25, 24, 16))
    cases = BundleCases(str(other), val_fraction=0.5)
    assert cases.evaluation_on("validation", [plan(data)]) == cases.validation
    with pytest.raises(DatasetError, match=r"^Expected cases that the model has not seen"):
        cases.evaluation_on("validation", [replace(plan(data), trained_images=())])


def test_one_patient_is_validated_on_what_was_trained_on(data: Path) -> None:
    describe(data, patient_groups={"P": ["phantom"]}, test_labelled=[], test=[])
    cases = BundleCases(str(data), val_fraction=0.5)
    own = cases.plan([16, 16, 16])
    assert set(own.trained) & {item["case"] for item in cases.validation}
    assert cases.evaluation_on("validation", [own]) == cases.validation


def test_cases_of_another_dataset_with_the_same_names_are_test_cases(data: Path, tmp_path: Path) -> None:
    other = write_phantom_dataset(tmp_path / "other", training=3, evaluation=2, shape=(25, 24, 16))
    content = json.loads((other / "dataset.json").read_text())
    describe(other, test_labelled=content["training"])
    assert len(BundleCases(str(other), val_fraction=0).evaluation_on(None, [plan(data)])) == 3


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("change", ["removed", "replaced", "truncated"])
def test_a_file_that_changes_during_a_run_is_named(change: str, on_disk: bool, data: Path, tmp_path: Path) -> None:
    cases = BundleCases(str(data), val_fraction=0)
    cache = {"cache_dir": str(tmp_path / "cache")} if on_disk else {"cache_rate": 0.0}
    dataset = cached_dataset(cases.training, Compose([Lambdad("image", read)]), **cache)
    assert len(dataset[1]["image"]) > 100
    path = Path(cases.training[1]["image"])
    if change == "removed":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        shutil.copy(path, path.with_suffix(".new"))
        os.utime(path.with_suffix(".new"), (1, 1))
        path.with_suffix(".new").replace(path)
    what = "is no longer there" if change == "removed" else "was replaced or changed"
    sentence = f"Expected {path} to stay as it was when the run started, but it {what}: leave the dataset alone"
    with pytest.raises(TrainingError) as caught:
        dataset[1]
    assert str(caught.value).startswith(sentence)
    assert dataset[0]["case"] == "phantom_00"


def read(path: str) -> str:
    return Path(path).read_bytes().hex()


def test_a_sentence_of_a_worker_process_arrives_as_it_was_said() -> None:
    said = (
        "Caught TrainingError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\nmonai_iou.workflow.failures.TrainingError: Expected a.nii.gz to stay.\n'
    )

    class Engine:
        class state:  # noqa: N801
            rank = 0

        @staticmethod
        def run() -> None:
            raise RuntimeError from TrainingError(said)

    with pytest.raises(TrainingError) as caught:
        run(Engine())
    assert str(caught.value) == "Expected a.nii.gz to stay."


def test_a_damaged_cache_file_is_prepared_again(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    items = BundleCases(str(data), val_fraction=0).training
    expected = cached_dataset(items, Compose([Lambdad("image", read)]), cache_dir=str(tmp_path / "cache"))[0]
    (stored,) = (tmp_path / "cache").iterdir()
    whole = stored.read_bytes()
    for damage in (b"", b"garbage", whole[:-40], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]):
        stored.write_bytes(damage)
        caplog.clear()
        again = cached_dataset(items, Compose([Lambdad("image", read)]), cache_dir=str(tmp_path / "cache"))
        assert again[0] == expected
        assert f"{stored} is damaged" in caplog.text
        assert again[0] == expected
        assert caplog.text.count("is damaged") == 1


LABELS = {0: "background", 1: "oedema", 2: "core"}


def test_a_case_is_known_by_the_name_that_earlier_versions_gave_it(data: Path) -> None:
    trained = plan(data)
    earlier = replace(trained, trained=tuple(f"{name}_0000" for name in trained.trained))
    content = json.loads((data / "dataset.json").read_text())
    another = content["test_labelled"][0]["image"].split("/")[-1].removesuffix(".nii.gz")
    describe(data, patient_groups={"P": [trained.trained[0], another]})
    for each in (trained, earlier):
        with pytest.raises(DatasetError, match=f"has not seen, but {another} of `test_labelled`"):
            BundleCases(str(data), val_fraction=0).evaluation_on("test_labelled", [each])


def test_records_of_earlier_names_of_the_same_cases_agree() -> None:
    def made(training: list[str], validation: list[str], mark: str = "") -> dict[str, Any]:
        files = {name: name.removesuffix("_0000") + mark for name in (*training, *validation)}
        return {"training": training, "validation": validation, "files": files, "images": files}

    stored = made(["a_0000", "b_0000"], ["c_0000"])
    assert differences(stored, made(["a", "b"], ["c"])) == []
    assert differences(stored, stored) == []
    assert differences(stored, made(["a", "b"], ["c"], "!")) == ["the label or image of a, b, c has changed"]
    assert differences(stored, made(["a"], ["c", "b"])) == [
        "its training cases have b", "its validation cases lack b"
    ]  # fmt: skip
    assert differences(made(["a", "a_0000"], []), made(["a"], [])) == ["its training cases have a_0000"]
    assert differences(made(["a", "b_0001"], []), made(["a_0000", "b_0001"], [])) == []
    assert differences(made(["a"], []), made(["a", "a_0000"], [])) == ["its training cases lack a_0000"]


def test_cases_of_the_model_that_a_training_started_from_do_not_mix_up_its_record(data: Path) -> None:
    cases = BundleCases(str(data), val_fraction=0.3)
    own = cases.plan([16, 16, 16])
    assert cases.validation
    seen = with_seen(own, [*own.trained, cases.validation[0]["case"]], ["x", "y", "z"])
    assert differences(cases.record(seen), cases.record(own)) == []


def record(made: Plan) -> dict[str, Any]:
    """The plan's part of what a checkpoint holds."""
    return data_record([], [], made)


def test_regions_in_another_order_are_another_plan() -> None:
    base = replace(make_plan(None, [], [16, 16, 16]), labels=LABELS)
    one = replace(base, regions={"whole": (1, 2), "core": (2,)}, regions_order=(1, 2))
    other = replace(base, regions={"core": (2,), "whole": (1, 2)}, regions_order=(2, 1))
    assert one.class_names == other.class_names[::-1]
    assert differences(record(one), record(other)) == [
        "its `regions` was {'whole': [1, 2], 'core': [2]} and is {'core': [2], 'whole': [1, 2]}",
        "its `regions_order` was [1, 2] and is [2, 1]",
    ]
    assert differences(record(one), record(replace(one, regions=dict(one.regions)))) == []


def test_what_the_targets_are_made_by_belongs_to_the_plan() -> None:
    base = replace(make_plan(None, [], [16, 16, 16]), labels=LABELS)
    later = {"soft_labels": True, "mean_of_raters": True, "spatial_dims": 2}
    for name, value in later.items():
        changed = record(replace(base, **{name: value}))
        assert differences(record(base), changed) == [f"its `{name}` was {getattr(base, name)} and is {value}"]
        earlier = {key: each for key, each in record(base).items() if key not in (*later, "regions_order")}
        assert differences(earlier, changed) == [], "of a version that did not note it"
