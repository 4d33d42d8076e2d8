"""The layouts of datasets and their variants: what is read, and every refusal in one sentence."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from monai_iou.datasets.case_volumes import check_case
from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.datasets.folder import is_dataset, read_folder
from monai_iou.datasets.label_counts import count_label_files
from monai_iou.datasets.scheme import LabelScheme
from monai_iou.planning import make_plan
from monai_iou.planning.fingerprint import compute_fingerprint
from monai_iou.planning.intensity import is_ct
from monai_iou.workflow.data import BundleCases

SHAPE = (6, 7, 8)
RNG = np.random.default_rng(0)


def save(path: Path, array: np.ndarray, spacing: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([spacing] * 3 + [1])), path)
    return path


def label(*values: int, dtype: type = np.uint8) -> np.ndarray:
    array = np.zeros(SHAPE, dtype)
    for k, value in enumerate(values):
        array[k] = value
    return array


def decathlon(root: Path, count: int = 4, **changes: object) -> Path:
    pairs = []
    for k in range(count):
        save(root / f"imagesTr/c{k}.nii.gz", RNG.normal(size=SHAPE).astype(np.float32))
        save(root / f"labelsTr/c{k}.nii.gz", label(1))
        pairs.append({"image": f"imagesTr/c{k}.nii.gz", "label": f"labelsTr/c{k}.nii.gz"})
    content = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "lesion"}, "training": pairs}
    return describe(root, **{**content, **changes})


def describe(root: Path, **changes: object) -> Path:
    path = root / "dataset.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**old, **changes}), encoding="utf-8")
    return root


def nnunet(root: Path, values: tuple[int, ...] = (1, 2), **changes: object) -> Path:
    for part, names in (("Tr", "abc"), ("Ts", "d")):
        for name in names:
            for channel in range(2):
                save(root / f"images{part}/{name}_{channel:04d}.nii.gz", np.full(SHAPE, channel, np.float32))
            save(root / f"labels{part}/{name}.nii.gz", label(*values))
    (root / "imagesTr/._a_0000.nii.gz").write_bytes(b"macOS")
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "core": 1, "oedema": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    return describe(root, **{**content, **changes})


def refusal(root: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        _ = read_folder(root).training_facts
    message = str(caught.value)
    assert re.fullmatch(r"Expected .+, but .+: .+\.", message), message
    return message


def test_nnunets_folder_is_its_decathlon_twin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = nnunet(tmp_path / "nnunet")
    twin = tmp_path / "twin"
    for name in "abc":
        save(twin / f"imagesTr/{name}.nii.gz", np.stack([np.zeros(SHAPE), np.ones(SHAPE)], -1).astype(np.float32))
        save(twin / f"labelsTr/{name}.nii.gz", label(1, 2))
    pairs = [{"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in "abc"]
    labels = {"0": "background", "1": "core", "2": "oedema"}
    describe(twin, modality={"0": "T1", "1": "T2"}, labels=labels, training=pairs)
    caplog.set_level(logging.INFO)
    first, second = read_folder(ours), read_folder(twin)
    assert "is read as nnU-Net v2's raw data." in caplog.text
    assert "is read as a folder in the Medical Segmentation Decathlon's layout." in caplog.text
    assert (first.labels, first.modalities) == (second.labels, second.modalities)
    assert [case.name for case in first.training] == [case.name for case in second.training] == ["a", "b", "c"]
    assert [case.name for case in first.evaluation] == ["d"]
    for one, other in zip(first.training_facts, second.training_facts, strict=True):
        np.testing.assert_array_equal(one.foreground, other.foreground)
    plans = [make_plan(folder, folder.training_facts, [32, 32, 32]) for folder in (first, second)]
    assert plans[0] == plans[1]


def test_a_missing_channel_or_label_of_nnunet_is_named(tmp_path: Path) -> None:
    (nnunet(tmp_path) / "imagesTr/b_0001.nii.gz").unlink()
    assert "2 channels of b, but b_0001.nii.gz is not there" in refusal(tmp_path)
    (nnunet(tmp_path) / "labelsTr/c.nii.gz").unlink()
    assert "the label of c at" in refusal(tmp_path)


def test_regions_and_ignore_are_read(tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    folder = read_folder(nnunet(tmp_path, labels=labels, regions_class_order=[1, 2, 3]))
    assert folder.regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert (folder.regions_order, folder.ignore) == ((1, 2, 3), 4)
    assert folder.labels == {0: "background", 1: "1", 2: "2", 3: "enhancing"}
    assert len(folder.training_facts) == 3
    describe(tmp_path, labels=labels, regions_class_order=[1])
    assert "`regions_class_order`" in refusal(tmp_path)


def test_splits_of_nnunet_are_the_folds(tmp_path: Path) -> None:
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]
    nnunet(tmp_path)
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    for fold, sides in enumerate(folds):
        cases = BundleCases(str(tmp_path), folds=2, fold=fold)
        assert [item["case"] for item in cases.training] == sides["train"]
        assert [item["case"] for item in cases.validation] == sides["val"]
    assert len(BundleCases(str(tmp_path), folds=3).validation) == 1  # of another number of folds: our own
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["x"]}]))
    assert "but got x, which is none" in refusal(tmp_path)
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["a"]}]))
    assert "but got a on both sides" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["dataset.json", "splits_final.json"])
@pytest.mark.parametrize(
    ("content", "remedy"), [(b'["\xfc"]', "save it in UTF-8"), (b"[", "correct the file"), (None, "check the path")]
)
def test_a_description_that_cannot_be_read_is_answered_with_the_reason(
    tmp_path: Path, name: str, content: bytes | None, remedy: str
) -> None:
    nnunet(tmp_path)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)
    assert re.fullmatch(f"Expected {path} to be JSON, but it cannot be read \\(.*\\): {remedy}\\.", refusal(tmp_path))


@pytest.mark.parametrize("name", ["dataset.json", "splits_final.json"])
def test_a_description_whose_link_leads_nowhere_is_not_passed_over(tmp_path: Path, name: str) -> None:
    """As of a dataset of git-annex that was fetched in part: another description would stand in for it."""
    nnunet(tmp_path)
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}]))
    (tmp_path / name).rename(tmp_path / "stored.json")
    (tmp_path / name).symlink_to(tmp_path / "stored.json")
    assert len(read_folder(tmp_path).splits) == 1
    (tmp_path / "stored.json").unlink()
    assert is_dataset(tmp_path)
    assert refusal(tmp_path).startswith(f"Expected {tmp_path / name} to be JSON, but it cannot be read ([Errno 2] No ")
    if name == "dataset.json":
        with pytest.raises(DatasetError, match=r"dataset\.json to be JSON, but it cannot be read"):
            count_label_files(tmp_path / "labelsTr")


def test_a_plain_pair_of_folders(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / f"images/{name}_0000.nii.gz", RNG.normal(size=SHAPE))
        save(tmp_path / f"labels/{name}.nii.gz", label(7, 70000, dtype=np.int32))
    folder = read_folder(tmp_path)
    assert folder.labels == {0: "background", 7: "7", 70000: "70000"}
    assert [case.name for case in folder.training] == ["a", "b"]
    assert folder.modalities == ("image",)
    assert len(folder.training_facts) == 2
    assert BundleCases(str(tmp_path)).plan([32, 32, 32]).label_values == [0, 7, 70000]
    save(tmp_path / "images/c.nii.gz", RNG.normal(size=SHAPE))
    assert "images/c.nii.gz in" in refusal(tmp_path)
    (tmp_path / "images/c.nii.gz").rename(tmp_path / "labels/c.nii.gz")
    assert "labels/c.nii.gz in" in refusal(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks(tmp_path: Path, encoding: str) -> None:
    path = decathlon(tmp_path) / "dataset.json"
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert len(read_folder(tmp_path).training) == 4


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"a": "\xff\xfe"}', "cannot be read"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"a": "\\ud800"}', "to hold text, but got"),
        (b'{"labels": {"1": "a", "1": "b"}}', "the key '1' comes twice"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "cannot be read"),
        (b"", "cannot be read"),
        (b"null", "to hold a JSON object, but got NoneType"),
    ],
)
def test_json_that_cannot_be_used(tmp_path: Path, content: bytes, text: str) -> None:
    (decathlon(tmp_path) / "dataset.json").write_bytes(content)
    assert text in refusal(tmp_path)


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ({"0": "b", "1": "x", "01": "y"}, "to name each label value once in `labels`, but got 1 twice"),
        ({"0": "b", "1": "x", " 1": "y"}, "to name each label value once in `labels`, but got 1 twice"),
        ({"background": 0, "x": 1, "y": 1}, "to name each label value once in `labels`, but got 1 twice"),
        ({"0": "b", "-1": "x"}, "a negative value, which no class can have"),
        ({"background": 0, "x": 2**63}, "label values within 64-bit integers"),
        ({"background": 0, "x": 1.5, "y": 1}, "the label 'x' a value or a list of values, but got 1.5"),
        ({"background": 0, **{str(k): k for k in range(1, 1001)}}, "at most 1000 labels, but got 1001"),
        ({"a": "b"}, "to name the background 0"),
        ({}, "to name the background 0"),
        (None, "to name the background 0"),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, labels: object, text: str) -> None:
    assert text in refusal(decathlon(tmp_path, labels=labels))


def test_names_to_values_beside_a_list_of_training_cases(tmp_path: Path) -> None:
    assert read_folder(decathlon(tmp_path, labels={"background": 0, "l1": 1})).labels == {0: "background", 1: "l1"}


def test_values_with_gaps_and_of_any_size_are_kept_apart(tmp_path: Path) -> None:
    values = [0, 70000, 312782546, 312782550]
    decathlon(tmp_path, 1, labels={str(value): f"n{value}" for value in values})
    save(tmp_path / "labelsTr/c0.nii.gz", label(*values[1:], dtype=np.int32))
    assert list(read_folder(tmp_path).labels) == values
    assert len(read_folder(tmp_path).training_facts) == 1
    save(tmp_path / "labelsTr/c0.nii.gz", label(312782547, dtype=np.int32))
    assert "but got 312782547: name the value there or correct the label." in refusal(tmp_path)


def test_a_negative_label_is_explained(tmp_path: Path) -> None:
    save(decathlon(tmp_path) / "labelsTr/c1.nii.gz", label(-1, 1, dtype=np.int16))
    assert "but got -1: a negative value cannot be named; write 0 there, or another value with a name" in refusal(
        tmp_path
    )


def test_a_label_of_rounded_floats_is_read_and_one_hot_channels_are_explained(tmp_path: Path) -> None:
    decathlon(tmp_path)
    save(tmp_path / "labelsTr/c1.nii.gz", label(1).astype(np.float32) * np.float32(0.99999994))
    assert len(read_folder(tmp_path).training_facts) == 4
    save(tmp_path / "labelsTr/c1.nii.gz", np.stack([label(1)] * 2, -1))
    assert "write one value per class instead of one-hot channels" in refusal(tmp_path)


def test_a_list_of_images_and_numbered_files_are_channels(tmp_path: Path) -> None:
    decathlon(tmp_path, 2, modality={"0": "a", "1": "b"})
    pairs = json.loads((tmp_path / "dataset.json").read_text())["training"]
    describe(tmp_path, training=[{**pair, "image": [pair["image"]] * 2} for pair in pairs])
    folder = read_folder(tmp_path)
    assert [len(facts.foreground) for facts in folder.training_facts] == [2, 2]
    assert isinstance(folder.training[0].as_item()["image"], list)
    for k in range(2):
        (tmp_path / f"imagesTr/c{k}.nii.gz").rename(tmp_path / f"imagesTr/c{k}_0000.nii.gz")
        save(tmp_path / f"imagesTr/c{k}_0001.nii.gz", np.ones(SHAPE))
    describe(tmp_path, training=pairs)  # nnU-Net v1: the list leaves the numbers out
    folder = read_folder(tmp_path)
    assert [case.name for case in folder.training] == ["c0", "c1"]
    assert [len(case.images) for case in folder.training] == [2, 2]
    describe(tmp_path, training=[{**pair, "image": ["imagesTr/c0_0000.nii.gz"] * 3} for pair in pairs])
    assert "one for each of 2 channels, but got 3" in refusal(tmp_path)


def test_a_numbered_file_of_one_channel_is_named_as_the_list_names_it(tmp_path: Path) -> None:
    """As nnU-Net v1 lists it; the masks are then called as the labels are."""
    decathlon(tmp_path, 2, test=["imagesTr/c0.nii.gz", "imagesTr/c1_0000.nii.gz"])
    for k in range(2):
        (tmp_path / f"imagesTr/c{k}.nii.gz").rename(tmp_path / f"imagesTr/c{k}_0000.nii.gz")
    folder = read_folder(tmp_path)
    assert [case.name for case in folder.training] == ["c0", "c1"]
    assert [case.image.name for case in folder.training] == ["c0_0000.nii.gz", "c1_0000.nii.gz"]
    assert [case.name for case in folder.test] == ["c0", "c1_0000"]


def numbered(root: Path, channels: int, numbers: tuple[int, ...], key: str = "modality") -> Path:
    """Two cases as nnU-Net v1 lists them, `c1` with the files of these numbers."""
    decathlon(root, 2)
    for k, held in enumerate((range(channels), numbers)):
        (root / f"imagesTr/c{k}.nii.gz").unlink()
        for number in held:
            save(root / f"imagesTr/c{k}_{number:04d}.nii.gz", np.ones(SHAPE, np.float32))
    content = json.loads((root / "dataset.json").read_text(encoding="utf-8"))
    del content["modality"]
    (root / "dataset.json").unlink()
    return describe(root, **content, **{key: {str(channel): f"T{channel}" for channel in range(channels)}})


@pytest.mark.parametrize("key", ["modality", "channel_names"])
@pytest.mark.parametrize(
    ("channels", "numbers", "problem"),
    [
        (
            1,
            (0, 1),
            "one file for the only channel of {case}, but {next} is there too: name its channel in {key}, or move",
        ),
        (
            2,
            (0, 1, 2),
            "one file for each of 2 channels of {case}, but {next} is there too: name its channel in {key}, or",
        ),
        (3, (0, 1), "a file for each of 3 channels of {case}, but {next} is not there: add it, or correct {key}."),
        (
            2,
            (1,),
            "a file for each of 2 channels of {case}, but imagesTr/c1_0000.nii.gz is not there: add it, or correct",
        ),
    ],
)
def test_a_numbered_file_that_is_missing_or_left_over_is_named(
    key: str, channels: int, numbers: tuple[int, ...], problem: str, tmp_path: Path
) -> None:
    numbered(tmp_path, channels, numbers, key)
    following = f"imagesTr/c1_{len(numbers) - ('too' in problem):04d}.nii.gz"
    expected = problem.format(case="imagesTr/c1.nii.gz", next=following, key=f"`{key}`")
    where = f"the image in `training` of {tmp_path}/dataset.json"
    assert refusal(tmp_path).startswith(f"Expected {where} to have {expected}")


def test_a_file_that_is_listed_is_free_to_have_neighbours(tmp_path: Path) -> None:
    numbered(tmp_path, 1, (0, 1))
    pairs = [{"image": f"imagesTr/c{k}_0000.nii.gz", "label": f"labelsTr/c{k}.nii.gz"} for k in range(2)]
    for entry in (pairs, [{**pair, "image": [pair["image"]]} for pair in pairs]):
        describe(tmp_path, training=entry)
        assert [case.image.name for case in read_folder(tmp_path).training] == ["c0_0000.nii.gz", "c1_0000.nii.gz"]


@pytest.mark.parametrize(
    ("count", "remedy"),
    [
        (2, "list a file for every channel, or correct `modality`."),
        (0, "list a file for every channel, or correct `modality`."),
        (4, "name every channel in `modality`, or remove some of the files."),
    ],
)
def test_a_case_of_another_number_of_files_is_named(count: int, remedy: str, tmp_path: Path) -> None:
    decathlon(tmp_path, 1, modality={str(channel): f"T{channel}" for channel in range(3)})
    files = ["imagesTr/c0.nii.gz"] * count
    describe(tmp_path, training=[{"image": files, "label": "labelsTr/c0.nii.gz"}])
    assert refusal(tmp_path) == (
        f"Expected the image in `training` of {tmp_path}/dataset.json to be one file or one for each of 3 channels, "
        f"but got {count} files, {files!r}: {remedy}"
    )


@pytest.mark.parametrize("problem", ["labelled", "label"])
def test_a_case_is_named_as_it_is_listed(problem: str, tmp_path: Path) -> None:
    """Where every image is called imaging.nii.gz."""
    pairs = []
    for k in range(2):
        folder = tmp_path / f"case_{k}"
        save(folder / "imaging.nii.gz", RNG.normal(size=SHAPE))
        save(folder / "segmentation.nii.gz", label(1))
        pairs.append({"image": f"case_{k}/imaging.nii.gz", "label": f"case_{k}/segmentation.nii.gz"})
    pairs[1][problem] = "nothing"
    describe(tmp_path, modality={"0": "CT"}, labels={"0": "background", "1": "kidney"}, training=pairs)
    expected = {"labelled": "`labelled` of case_1/imaging.nii.gz in", "label": "the label of case_1/imaging.nii.gz to"}
    assert refusal(tmp_path).startswith(f"Expected {expected[problem]}")


def test_the_number_of_a_case_with_a_folder_for_each_channel_stays_in_its_name(tmp_path: Path) -> None:
    pairs = []
    for k in range(2):
        images = [f"{folder}/case_{k:04d}.nii.gz" for folder in ("CT", "PET")]
        for image in images:
            save(tmp_path / image, RNG.normal(size=SHAPE))
        save(tmp_path / f"masks/case_{k:04d}.nii.gz", label(1))
        pairs.append({"image": images, "label": f"masks/case_{k:04d}.nii.gz"})
    labels = {"0": "background", "1": "lesion"}
    describe(tmp_path, modality={"0": "CT", "1": "PET"}, labels=labels, training=pairs, test=[pairs[0]["image"]])
    folder = read_folder(tmp_path)
    assert [case.name for case in folder.training] == ["case_0000", "case_0001"]
    assert [case.name for case in folder.test] == ["case_0000"]


def test_a_case_that_nnunet_v1_lists_with_a_number_keeps_it(tmp_path: Path) -> None:
    decathlon(tmp_path, 1)
    (tmp_path / "imagesTr/c0.nii.gz").rename(tmp_path / "imagesTr/c_0000_0000.nii.gz")
    describe(tmp_path, training=[{"image": "imagesTr/c_0000.nii.gz", "label": "labelsTr/c0.nii.gz"}])
    assert [case.name for case in read_folder(tmp_path).training] == ["c_0000"]


@pytest.mark.parametrize(
    ("layout", "source"),
    [
        ("Decathlon", "`modality` in dataset.json says"),
        ("nnU-Net", "`channel_names` in dataset.json says"),
        ("plain", "the first image, a.nii.gz, says"),
    ],
)
@pytest.mark.parametrize("read", ["training", "planning"])
def test_an_image_of_other_channels_is_compared_with_what_there_is(
    layout: str, source: str, read: str, tmp_path: Path
) -> None:
    names = {"Decathlon": "imagesTr/c0", "nnU-Net": "imagesTr/c_0000", "plain": "images/b"}
    if layout == "plain":
        for name in "ab":
            save(tmp_path / f"images/{name}.nii.gz", np.ones(SHAPE, np.float32))
            save(tmp_path / f"labels/{name}.nii.gz", label(1))
    elif layout == "Decathlon":
        decathlon(tmp_path)
    else:
        save(tmp_path / "labelsTr/c.nii.gz", label(1))
        describe(tmp_path, channel_names={"0": "MRI"}, labels={"background": 0, "lesion": 1}, file_ending=".nii.gz")
    image = save(tmp_path / f"{names[layout]}.nii.gz", np.ones((*SHAPE, 2), np.float32))
    folder = read_folder(tmp_path)
    with pytest.raises(DatasetError) as caught:
        _ = compute_fingerprint(folder) if read == "planning" else folder.training_facts
    (channel,) = folder.modalities
    assert str(caught.value) == (
        f"Expected {image} to be a 3D image ({channel}), as {source}, but got shape 6x7x8x2: correct one of the two."
    )


def test_an_image_of_one_channel_for_a_model_of_several_is_told_its_names(tmp_path: Path) -> None:
    case = Case("a", save(tmp_path / "a.nii.gz", np.ones(SHAPE, np.float32)))
    with pytest.raises(DatasetError) as caught:
        check_case(case, LabelScheme({0: "background", 1: "lesion"}), ("T1", "FLAIR"), "the trained model")
    assert str(caught.value) == (
        f"Expected {case.image} to be a 4D image with 2 channels last (T1, FLAIR), as the trained model says, but got "
        "shape 6x7x8: join the channels of an image in one file, or call their files NAME_0000 (T1), NAME_0001 (FLAIR) "
        "for `monai-iou predict`."
    )


def test_a_validation_list_is_validated_on(tmp_path: Path) -> None:
    decathlon(tmp_path, 6)
    pairs = json.loads((tmp_path / "dataset.json").read_text())["training"]
    describe(tmp_path, training=pairs[:4], validation=pairs[4:])
    cases = BundleCases(str(tmp_path))
    assert [item["case"] for item in cases.training] == ["c0", "c1", "c2", "c3"]
    assert [item["case"] for item in cases.validation] == ["c4", "c5"]
    assert cases.plan([32, 32, 32]).trained == ("c0", "c1", "c2", "c3")
    folds = [BundleCases(str(tmp_path), folds=3, fold=fold).validation for fold in range(3)]
    assert sorted(item["case"] for fold in folds for item in fold) == [f"c{k}" for k in range(6)]
    describe(tmp_path, validation=pairs[3:])
    assert "comes twice" in refusal(tmp_path)


def test_splits_may_name_the_cases_of_a_validation_list(tmp_path: Path) -> None:
    decathlon(tmp_path, 4)
    pairs = json.loads((tmp_path / "dataset.json").read_text())["training"]
    describe(tmp_path, training=pairs[:3], validation=pairs[3:])
    folds = [{"train": ["c0", "c1"], "val": ["c2", "c3"]}, {"train": ["c2", "c3"], "val": ["c0", "c1"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    folder = read_folder(tmp_path)
    for number, fold in enumerate(folds):
        sides = [[case.name for case in side] for side in folder.split(0.2, folds=2, fold=number)]
        assert sides == [fold["train"], fold["val"]]
    assert [case.name for case in folder.split(0.2)[1]] == ["c3"]


def test_a_pair_that_is_called_as_a_preview_is_a_case(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b", "c_preview"):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(np.eye(8, dtype=np.uint8)).save(tmp_path / folder / f"{name}.png")
    assert [case.name for case in read_folder(tmp_path).training] == ["a", "b", "c_preview"]


def test_names_in_the_other_unicode_form_are_found(tmp_path: Path) -> None:
    decathlon(tmp_path, 1)
    (tmp_path / "imagesTr/c0.nii.gz").rename(tmp_path / "imagesTr" / unicodedata.normalize("NFD", "Müller.nii.gz"))
    pair = {"image": "imagesTr/Müller.nii.gz", "label": "labelsTr/c0.nii.gz"}
    describe(tmp_path, training=[pair])
    assert read_folder(tmp_path).training[0].name == "Müller"


@pytest.mark.parametrize("factor", [100.0, 1e-3])
def test_one_spacing_unlike_the_others_is_named(tmp_path: Path, factor: float) -> None:
    decathlon(tmp_path)
    save(tmp_path / "imagesTr/c2.nii.gz", RNG.normal(size=SHAPE), factor)
    save(tmp_path / "labelsTr/c2.nii.gz", label(1), factor)
    message = refusal(tmp_path)
    assert f"imagesTr/c2.nii.gz to have voxels like the other cases, of about 1 mm, but got {factor:g}x" in message


def spaced(root: Path, *spacing: float, case: str = "c2", shape: tuple[int, ...] = SHAPE) -> None:
    affine = np.diag([*spacing, 1.0])
    (inside := np.zeros(shape, np.uint8))[0] = 1
    nib.save(nib.Nifti1Image(RNG.normal(size=shape), affine), root / f"imagesTr/{case}.nii.gz")
    nib.save(nib.Nifti1Image(inside, affine), root / f"labelsTr/{case}.nii.gz")


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("factor", [1000.0, 1e-3])
def test_a_spacing_unlike_the_others_along_one_axis_is_named(tmp_path: Path, factor: float, axis: int) -> None:
    decathlon(tmp_path)
    spacing = [factor if k == axis else 1.0 for k in range(3)]
    spaced(tmp_path, *spacing)
    sizes = "x".join(f"{length:g}" for length in spacing)
    message = refusal(tmp_path)
    assert f"imagesTr/c2.nii.gz to have voxels like the other cases, of about 1 mm, but got {sizes} mm: " in message


@pytest.mark.parametrize("spacing", [(0.5, 0.5, 6.0), (6.0, 0.4, 0.4), (0.05, 1.0, 1.0), (1.0, 40.0, 1.0)])
def test_thick_slices_among_cubes_are_trained_on(tmp_path: Path, spacing: tuple[float, ...]) -> None:
    decathlon(tmp_path)
    spaced(tmp_path, *spacing)
    assert read_folder(tmp_path).training_facts[2].spacing == pytest.approx(spacing)


def test_the_edge_along_an_axis_of_one_voxel_is_not_compared(tmp_path: Path) -> None:
    decathlon(tmp_path)
    for k in range(4):
        spaced(tmp_path, 0.01, 0.01, 1.0 if k % 2 else 0.01, case=f"c{k}", shape=(6, 7, 1))
    assert len(read_folder(tmp_path).training_facts) == 4
    spaced(tmp_path, 0.01, 10.0, 0.01, shape=(6, 7, 1))
    assert "but got 0.01x10x0.01 mm: " in refusal(tmp_path)


def test_grids_a_fiftieth_of_a_voxel_apart_are_one_and_it_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decathlon(tmp_path, 1)
    moved = np.eye(4)
    moved[0, 3] = 0.02
    nib.save(nib.Nifti1Image(label(1), moved), tmp_path / "labelsTr/c0.nii.gz")
    assert len(read_folder(tmp_path).training_facts) == 1
    assert "the grids are up to 0.02 mm (0.02 voxels) apart" in caplog.text


@pytest.mark.parametrize("dtype", [[("R", "u1"), ("G", "u1"), ("B", "u1")], np.complex64])
@pytest.mark.parametrize("where", ["imagesTr", "labelsTr"])
def test_colours_and_complex_numbers_are_refused(tmp_path: Path, dtype: object, where: str) -> None:
    save(decathlon(tmp_path) / where / "c1.nii.gz", np.zeros(SHAPE, dtype))
    assert f"{where}/c1.nii.gz` to hold one number per voxel, but got" in refusal(tmp_path)


def test_intensities_beyond_float32_are_refused(tmp_path: Path) -> None:
    array = np.zeros(SHAPE)
    array[1, 2, 3] = 1e300
    save(decathlon(tmp_path) / "imagesTr/c1.nii.gz", array)
    assert "intensities that float32 can hold, but got 1e+300" in refusal(tmp_path)


def test_a_constant_image_is_read_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(decathlon(tmp_path) / "imagesTr/c1.nii.gz", np.zeros(SHAPE, np.int16))
    assert len(read_folder(tmp_path).training_facts) == 4
    assert "imagesTr/c1.nii.gz is constant: every voxel is 0. Is it the right file?" in caplog.text
    assert caplog.text.count("is constant") == 1


def test_class_weights_count_each_label_once_and_refuse_negative_ones(tmp_path: Path) -> None:
    save(tmp_path / "labels/a.nii.gz", label(1))
    save(tmp_path / "labels/.ipynb_checkpoints/a-checkpoint.nii.gz", label(1))
    save(tmp_path / "elsewhere/b.nii.gz", label(1, 3))
    (tmp_path / "labels/more").symlink_to(tmp_path / "elsewhere")
    counts = count_label_files(tmp_path / "labels")
    assert counts.values == (0, 1, 3)
    assert counts.cases == ("a", "b")
    save(tmp_path / "labels/c.nii.gz", label(-1, 1, dtype=np.int16))
    with pytest.raises(
        ValueError, match=r"c\.nii\.gz` to hold labels from 0 up, but got -1: a negative value is no class"
    ):
        count_label_files(tmp_path / "labels")


@pytest.mark.parametrize("kind", ["CT", "MR", "named", "all files"])
def test_class_weights_of_images_are_refused_before_they_are_counted(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monai_iou.datasets.label_counts.label_components", None)
    rng = np.random.default_rng(0)
    shape = (20, 20, 20)
    images = {
        "CT": [rng.integers(-1024, 2000, shape, np.int16)],
        "MR": [rng.integers(0, 200, shape, np.uint8)],
        "named": [rng.integers(0, 200, shape, np.uint8)],
        "all files": [
            np.arange(step, step + 400, dtype=np.int16).repeat(20).reshape(shape).T for step in (0, 400, 800)
        ],
    }[kind]
    for number, array in enumerate(images):
        save(tmp_path / f"imagesTr/{number}.nii.gz", array)
    if kind == "named":
        describe(tmp_path, labels={"0": "background", "1": "lesion"})
    if kind == "all files":  # no file looks like an image, but no dataset has so many classes
        monkeypatch.setattr("monai_iou.datasets.label_counts.label_components", lambda mask, _: (mask, 1))
    values = len(np.unique(images[-1]))
    found = f"{values} different values" + (", and 1200 in all files so far" if kind == "all files" else "")
    with pytest.raises(ValueError, match="seems to hold images") as caught:
        count_label_files(tmp_path / "imagesTr")
    assert str(caught.value) == (
        f"Expected `{tmp_path}/imagesTr/{len(images) - 1}.nii.gz` to be a label map, but got {found}: the folder seems "
        "to hold images; name the folder of label files instead, or the label values if so many are right."
    )


def test_class_weights_of_an_atlas_are_counted(tmp_path: Path) -> None:
    """Many values, of which each fills a region, and lesions of one voxel that touch nothing."""
    regions = np.arange(100).repeat(80).reshape(20, 20, 20).astype(np.uint8)
    lesions = np.zeros((20, 20, 20), np.int16)
    lesions[::2, ::2, ::2] = np.arange(1000).reshape(10, 10, 10)
    for name, array in (("regions", regions), ("lesions", lesions)):
        save(tmp_path / name / "a.nii.gz", array)
        counts = count_label_files(tmp_path / name)
        values, voxels = np.unique(array, return_counts=True)
        assert (counts.values, counts.voxels.tolist()) == (tuple(values.tolist()), [voxels.tolist()])
    save(tmp_path / "many/a.nii.gz", np.arange(1200).repeat(10).reshape(1200, 10, 1).astype(np.int16))
    assert len(count_label_files(tmp_path / "many", range(1200)).values) == 1200, "if they are named"


CT_NAMES = (
    "CT", "CTA", "NCCT", "CECT", "LDCT", "HRCT", "MDCT", "CBCT", "CTres", "CT angiography", "computed tomography",
    "Computerized axial tomography", "ct_portal", "PET/CT", "PETCT", "PET-CT", "CCTA", "ccta", "CTPA", "CTCA", "CTU",
    "CTV", "CCT", "cCT", "4DCT", "3DCT_lung", "4D-CT", "4DCBCT", "uCT", "\N{MICRO SIGN}CT", "microCT", "ChestCT",
    "BrainCT", "chestCTScan", "LowDoseCT", "MSCT", "FDCT", "sCT", "CTAC", "CT1", "phase2CT", "SPECT/CT",
    "arterialCT_1mm",
)  # fmt: skip
OTHER_NAMES = (
    "SPECT", "OCT", "T1", "PET", "single photon emission computed tomography", "infarct", "ADC", "ACTH", "contrast",
    "optical coherence tomography", "oct", "oCT", "Oct", "SD-OCT", "SDOCT", "retinaOCT", "OCTA", "SpeCT", "spect",
    "VECTOR", "DOCTOR", "vectorDoctor", "ECT", "ACT", "tract", "TrACT", "DCT", "dsDCT", "PETMR", "CTRL", "ACTIN",
    "factor2", "CTG", "SDoCT", "source_oCT", "_oCT", "SPeCT", "InfarCT",
)  # fmt: skip


@pytest.mark.parametrize("name", CT_NAMES)
def test_names_of_ct(name: str) -> None:
    assert is_ct(name)


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_names_of_others(name: str) -> None:
    assert not is_ct(name)


@pytest.mark.parametrize(
    ("folder", "first", "second"),
    [
        ("labels", "a.nii", "a.nii.gz"),
        ("labels", "a.mha", "a.nii.gz"),
        ("images", "a.nii", "a.nii.gz"),
        ("images", "a.nii.gz", "a_0000.nii.gz"),
    ],
)
def test_two_files_of_one_name_in_a_plain_pair_are_named(folder: str, first: str, second: str, tmp_path: Path) -> None:
    for kind, array in (("images", np.ones(SHAPE, np.float32)), ("labels", label(1))):
        save(tmp_path / kind / "a.nii.gz", array)
    assert [case.name for case in read_folder(tmp_path).training] == ["a"]
    for name in (first, second):
        (tmp_path / folder / name).touch()
    with pytest.raises(DatasetError) as caught:
        read_folder(tmp_path)
    files = " and ".join(str(tmp_path / folder / name) for name in (first, second))
    expected = f"Expected one file per case, but got {files}: keep one of them."
    assert str(caught.value) == expected


def test_a_label_is_not_counted_twice(tmp_path: Path) -> None:
    for name in ("p0/a.nii.gz", "p1/a.nii.gz", "p0/b.nii"):
        save(tmp_path / name, label(1))
    assert len(count_label_files(tmp_path).cases) == 3
    save(tmp_path / "p0/a.nii", label(1))
    expected = f"Expected one file per case, but got `{tmp_path / 'p0/a.nii'}` and `{tmp_path / 'p0/a.nii.gz'}`: keep"
    with pytest.raises(ValueError, match=re.escape(expected)):
        count_label_files(tmp_path)


@pytest.mark.parametrize("named", ["labelsTr", "link", ".", "../labelsTr"])
def test_the_description_of_counted_labels_is_beside_them_as_they_are_named(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`labelsTr` is a link into a store of labels, and `link` a link to it."""
    save(tmp_path / "store" / "abc" / "c.nii.gz", label(1))
    (tmp_path / "data").mkdir()
    describe(tmp_path / "data", labels={"background": 0, "one": 1, "two": 2}, channel_names={"0": "T1"})
    (tmp_path / "data/labelsTr").symlink_to(tmp_path / "store" / "abc")
    (tmp_path / "data/imagesTr").mkdir()
    (tmp_path / "data/link").symlink_to(tmp_path / "data/labelsTr")
    inside = {"labelsTr": "data", "link": "data", ".": "data/labelsTr", "../labelsTr": "data/imagesTr"}[named]
    monkeypatch.chdir(tmp_path / inside)
    values = count_label_files(named).values
    assert values == ((0, 1) if named == "." else (0, 1, 2))  # a system says of `.` only where the link leads


def test_names_of_cases_are_the_same_whatever_system_wrote_them(tmp_path: Path) -> None:
    apart, one = (unicodedata.normalize(form, "M\u00fcller") for form in ("NFD", "NFC"))
    for names, folder in (((apart, one), tmp_path / "apart"), ((one, apart), tmp_path / "one")):
        on_disk, written = names
        for part in ("imagesTr", "labelsTr"):
            number = "_0000" if part == "imagesTr" else ""
            for name in (on_disk, "b"):
                save(folder / part / f"{name}{number}.nii.gz", label(1).astype(np.float32 if number else np.uint8))
        labels = {"background": 0, "one": 1, "two": 2}
        describe(folder, channel_names={"0": "T1"}, labels=labels, labelled={written: ["one"]}, file_ending=".nii.gz")
        splits = [{"train": [written], "val": ["b"]}, {"train": ["b"], "val": [written]}]
        (folder / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
        read = read_folder(folder)
        assert {case.name: case.labelled for case in read.training} == {one: (1,), "b": None}
        assert read.splits == (((one,), ("b",)), (("b",), (one,)))
        entries = [
            {"image": f"imagesTr/{case}/scan.nii.gz", "label": f"imagesTr/{case}/seg.nii.gz"} for case in (on_disk, "b")
        ]
        for entry in entries:
            save(folder / "listed" / entry["image"], label(1).astype(np.float32))
            save(folder / "listed" / entry["label"], label(1))
        describe(
            folder / "listed", modality={"0": "T1"}, labels={"0": "background", "1": "one", "2": "two"},
            training=entries, labelled={f"{written}/scan": ["one"]},
        )  # fmt: skip
        listed = read_folder(folder / "listed").training
        assert {case.name: case.labelled for case in listed} == {f"{one}/scan": (1,), "b/scan": None}
