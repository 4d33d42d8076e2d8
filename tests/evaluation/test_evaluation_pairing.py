from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iou.evaluation.pairing import Pair, PairingError, pair_folders, pair_volumes, read_pairs
from monai_iou.evaluation.request import RequestError
from monai_iou.files import write_csv


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    for name in ("predictions/a.mha", "predictions/site/b.nii", "predictions/extra.nii", "references/a.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("references/site/b.nii.gz", "references/lost.nrrd", "references/readme.txt", "references/.a.nii.swp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "predictions", tmp_path / "references"


def test_names_pair_below_folders_without_extensions(folders):
    predictions, references = folders
    pairs = pair_folders(predictions, references)
    assert pairs == [
        Pair("a", predictions / "a.mha", references / "a.nii.gz"),
        Pair("extra", predictions / "extra.nii", None),
        Pair("lost", None, references / "lost.nrrd"),
        Pair("site/b", predictions / "site" / "b.nii", references / "site" / "b.nii.gz"),
    ]
    assert [pair.problem is None for pair in pairs] == [True, False, False, True]
    assert pairs[2].problem == (
        f"Expected a prediction for the reference `{references / 'lost.nrrd'}`, but got none: predict this case."
    )


def test_dicom_folder_is_one_volume(folders):
    predictions, references = folders
    (predictions / "lost").mkdir()
    (predictions / "lost" / "001").write_bytes(bytes(128) + b"DICM")
    (predictions / "lost" / "002").write_bytes(bytes(128) + b"DICM")
    assert Pair("lost", predictions / "lost", references / "lost.nrrd") in pair_folders(predictions, references)


def test_two_volumes_are_one_case_also_if_they_are_dicom(folders, monkeypatch):
    predictions, references = folders
    series = predictions.parent / "series" / "case1"
    series.mkdir(parents=True)
    (series / "001").write_bytes(bytes(128) + b"DICM")
    for first, second in ((predictions / "a.mha", series), (series, series), (series, references / "a.nii.gz")):
        (pair,) = pair_volumes(first, second)
        assert (pair.prediction, pair.reference) == (first, second)
    monkeypatch.chdir(series)
    assert pair_volumes(Path("../../predictions/a.mha"), Path())[0].case == "case1"
    (references / "link.nii.gz").symlink_to(references / "a.nii.gz")
    assert pair_volumes(predictions / "a.mha", references / "link.nii.gz")[0].case == "link", "not what it leads to"
    (references / "link.nii.gz").unlink()
    assert pair_volumes(predictions, references) == []
    assert pair_volumes(series.parent, references) == [], "a folder above a series is a folder of volumes"


def test_a_mask_beside_its_image_is_the_prediction_of_the_image(tmp_path: Path):
    """By the names of `monai-iou predict`: beside one file, channels, a DICOM series or a picture; never an image."""
    for image in ("one.nii.gz", "two_0000.mha", "two_0001.mha", "series/001", "site/deep.nii", "pictures/flat.png"):
        (tmp_path / "p" / image).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / image).write_bytes(bytes(128) + b"DICM")
    names = ("one", "pictures/flat", "series", "site/deep", "two")
    for name in names:
        (tmp_path / "p" / f"{name}_mask.nii.gz").touch()
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / f"{name}.nrrd").touch()
    folders = tmp_path / "p", tmp_path / "r"
    pairs = pair_folders(*folders)
    assert pairs == [Pair(n, folders[0] / f"{n}_mask.nii.gz", folders[1] / f"{n}.nrrd") for n in names]
    assert all(pair.is_mask_of_image for pair in pairs)


@pytest.mark.parametrize("own", ["a_mask", "b_mask", "c_0001"])
def test_what_has_the_name_of_a_reference_or_no_image_is_no_mask_beside_one(tmp_path: Path, own: str):
    for path in ("p/a.nii", "p/a_mask.nii", "p/b_mask.nii", "p/c_0001.nii", "p/c.nii", "r/a.nii", f"r/{own}.nii"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    pairs = pair_folders(tmp_path / "p", tmp_path / "r")
    masks = {"a": "a.nii", "a_mask": "a_mask.nii"} if own == "a_mask" else {"a": "a_mask.nii"}
    expected = {**masks, "b_mask": "b_mask.nii", "c": "c.nii", "c_0001": "c_0001.nii"}
    assert {pair.case: pair.prediction and pair.prediction.name for pair in pairs} == expected


@pytest.mark.parametrize("kind", ["prediction", "empty", "image", "fractions"])
def test_predictions_with_masks_beside_them_are_told_from_images(tmp_path: Path, kind: str):
    """Masks of a brain, for example: only the values of a file tell that it is no image."""
    mask = np.zeros((4, 5, 6), np.uint8)
    mask[1:3] = 1
    beside = {"prediction": mask * 3, "empty": mask * 0, "image": mask * 2, "fractions": mask * 0.5}[kind]
    folders = tmp_path / "p", tmp_path / "r"
    for path, array in (("p/a", beside), ("p/a_mask", mask), ("r/a", mask * 3), ("p/b", mask), ("p/b_mask", mask)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{path}.nii")
    (tmp_path / "r" / "b.nii").touch()  # of the first pair alone is read what it is
    if kind in ("image", "fractions"):
        assert [pair.prediction for pair in pair_folders(*folders)] == [folders[0] / f"{n}_mask.nii" for n in "ab"]
        return
    message = (
        f"Expected `{folders[0]}` to hold one prediction for `a`, but got the label map `a.nii` with `a_mask.nii` "
        "beside it: keep one of the two, or name the predictions in a CSV with `--pairs`."
    )
    with pytest.raises(PairingError, match=f"^{re.escape(message)}$"):
        pair_folders(*folders)


@pytest.mark.parametrize("image", ["whole", "8 bits", "fractions", "channels"])
@pytest.mark.parametrize("layout", ["p{}/imaging", "{}"])
def test_references_beside_their_images_are_not_paired_with_these(tmp_path: Path, image: str, layout: str):
    rng = np.random.default_rng(0)
    shape, mask = (8, 8, 8), np.zeros((8, 8, 8), np.uint8)
    mask[2:4] = 1
    scan = {
        "whole": lambda: rng.integers(-1000, 1000, shape, np.int16),
        "8 bits": lambda: rng.integers(0, 256, shape, np.uint8),
        "fractions": lambda: rng.normal(size=shape),
        "channels": lambda: rng.normal(size=(*shape, 2)),
    }[image]
    folders, other = (tmp_path / "p", tmp_path / "r"), layout.replace("imaging", "segmentation") + "{}"
    for number in range(2):
        name = layout.format(number)
        files = {f"p/{name}": mask, f"r/{name}": scan(), "r/" + other.format(number, "_seg"): mask}
        for path, array in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{path}.nii")
    first, beside = folders[1] / f"{layout.format(0)}.nii", (folders[1] / f"{other.format(0, '_seg')}.nii").name
    message = (
        f"Expected `{folders[1]}` to hold label maps under the names of the predictions, but got the image `{first}` "
        f"with `{beside}` beside it: pair the predictions with the label maps in a CSV with `--pairs`."
    )
    with pytest.raises(PairingError, match=f"^{re.escape(message)}$"):
        pair_folders(*folders)
    nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), first)
    assert len(pair_folders(*folders)) == 4


@pytest.mark.parametrize("kind", ["regions", "lesions", "damaged", "one more"])
def test_references_without_predictions_beside_others_are_no_sign_of_images(tmp_path: Path, kind: str):
    """Of many values too, as of numbered lesions; nor is a file that cannot be read."""
    labels = np.arange(256).repeat(32).reshape(16, 16, 32).astype(np.int16).T
    if kind == "lesions":
        labels = np.zeros((16, 16, 32), np.int16)
        labels[::2, ::2, ::2] = np.arange(1024).reshape(8, 8, 16)
    if kind == "one more":  # a single case that was not predicted does not make all others images
        labels = np.random.default_rng(0).integers(0, 256, (8, 8, 8), np.uint8)
    for name in ("p/a", "p/b", "r/a", "r/b", "r/c", *([] if kind == "one more" else ["r/d"])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), tmp_path / f"{name}.nii")
    if kind == "damaged":
        (tmp_path / "r/a.nii").write_bytes(b"no volume")
    assert [pair.problem is None for pair in pair_folders(tmp_path / "p", tmp_path / "r")][:2] == [True, True]


@pytest.mark.parametrize("file", ["a.nii.gz", "series"])
def test_a_volume_and_a_folder_of_volumes_are_no_pair(folders, file):
    predictions, references = folders
    volume = references / "a.nii.gz"
    if file == "series":
        volume = references.parent / "series"
        volume.mkdir()
        (volume / "001").write_bytes(bytes(128) + b"DICM")
    message = (
        f"two folders or two volumes, but got the volume `{volume}` and the folder `{predictions}`: name the folder"
    )
    with pytest.raises(RequestError, match=re.escape(message)):
        pair_volumes(predictions, volume)
    with pytest.raises(PairingError, match=r"`--predictions` to be a folder of volumes, but got `.*absent`: check"):
        pair_volumes(predictions / "absent", volume)


def test_two_files_of_one_name_are_refused(folders):
    (folders[0] / "a.nii").touch()
    with pytest.raises(PairingError, match=r"one file per case, but got `.*a\.mha` and `.*a\.nii`: keep one"):
        pair_folders(*folders)


def test_folders_that_cannot_be_paired_are_refused(folders, tmp_path):
    with pytest.raises(PairingError, match=r"`--predictions` to be a folder of volumes, but got `.*absent`"):
        pair_folders(tmp_path / "absent", folders[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PairingError, match=r"Expected volumes in `.*empty`, but got none: name a folder with NIfTI"):
        pair_folders(folders[0], tmp_path / "empty")
    (tmp_path / "empty" / "z.nii").touch()
    with pytest.raises(PairingError, match=r"named as the references, but got `z` in .* or pair them in a CSV"):
        pair_folders(tmp_path / "empty", folders[1])


def test_csv_pairs_files_of_any_name(folders, tmp_path):
    predictions, references = folders
    table = tmp_path / "pairs.csv"
    table.write_text(
        "case,prediction,reference\n"
        f"one,{predictions / 'a.mha'},site/b.nii.gz\n"
        ",site/b.nii,a.nii.gz\n"
        "three,absent.nii,lost.nrrd\n"
        "four,,lost.nrrd\n"
        "five,extra.nii,absent.nii\n"
        "six,absent.nii,absent.nii\n",
        encoding="utf-8-sig",  # as spreadsheets write it
    )
    pairs = read_pairs(table, predictions, references)
    assert pairs == [
        Pair("one", predictions / "a.mha", references / "site" / "b.nii.gz"),
        Pair("a", predictions / "site" / "b.nii", references / "a.nii.gz"),
        Pair("three", None, references / "lost.nrrd", (predictions / "absent.nii",)),
        Pair("four", None, references / "lost.nrrd"),
        Pair("five", predictions / "extra.nii", None, (references / "absent.nii",)),
        Pair("six", None, None, (predictions / "absent.nii", references / "absent.nii")),
    ]
    assert [pair.problem for pair in pairs] == [
        None,
        None,
        f"Expected a prediction for the reference `{references / 'lost.nrrd'}`, but got none at "
        f"`{predictions / 'absent.nii'}`: correct the path in `--pairs`, or predict this case.",
        f"Expected a prediction for the reference `{references / 'lost.nrrd'}`, but got none: predict this case.",
        f"Expected a reference for the prediction `{predictions / 'extra.nii'}`, but got none at "
        f"`{references / 'absent.nii'}`: correct the path in `--pairs`, or add or remove the case.",
        f"Expected two files for the case `six`, but got none at `{predictions / 'absent.nii'}` and "
        f"`{references / 'absent.nii'}`: correct the path in `--pairs`, or remove the case.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "columns prediction and reference and at least one row, but got nothing"),
        ("prediction,truth\na,b\n", "columns prediction and reference and at least one row, but got prediction, truth"),
        ("prediction,reference\na.nii,b.nii\nc.nii,b.nii\n", "a case of its own, but got `b` again"),
        ("prediction,reference\n,\n", "to name a file, but got empty cells in row 2"),
    ],
)
def test_csv_without_pairs_is_refused(folders, tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    with pytest.raises(PairingError) as error:
        read_pairs(tmp_path / "pairs.csv", *folders)
    assert message in str(error.value)


def test_absent_csv_is_refused(folders, tmp_path):
    with pytest.raises(
        PairingError, match=r"`--pairs` to be a CSV file in UTF-8, but got `.*none\.csv` .*: check the path\."
    ):
        read_pairs(tmp_path / "none.csv", *folders)


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        ("prediction,reference\nM\xfcller.nii,a.nii\n".encode("latin-1"), "save it in UTF-8"),
        (b'prediction,reference\n"a.nii"x,a.nii\n', "save it as CSV"),
    ],
)
def test_a_csv_that_cannot_be_read_is_not_answered_with_its_path(folders, tmp_path, content, remedy):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(PairingError, match=rf"`--pairs` to be a CSV file in UTF-8, but got .*: {remedy}\.$"):
        read_pairs(tmp_path / "pairs.csv", *folders)


def test_a_case_of_a_table_is_named_as_its_files_are(folders, tmp_path):
    """In the composed form, by which maps, images and patients are looked up."""
    apart, one = (unicodedata.normalize(form, "M\u00fcller") for form in ("NFD", "NFC"))
    table = tmp_path / "pairs.csv"
    table.write_text(f"prediction,reference,case\na.mha,a.nii.gz,{apart}\nx/a.mha,x/a.nii,\n", encoding="utf-8")
    assert [pair.case for pair in read_pairs(table, *folders)] == [one, "x/a"]
    table.write_text(f"prediction,reference,case\na.mha,a.nii.gz,{apart}\na.mha,a.nii.gz,{one}\n", encoding="utf-8")
    with pytest.raises(PairingError, match=f"a case of its own, but got `{one}` again: rename it"):
        read_pairs(table, *folders)


@pytest.mark.parametrize(
    "text", ["prediction;reference\na.mha;a.nii.gz\n", "prediction , reference\na.mha, a.nii.gz\n"]
)
def test_tables_of_spreadsheets_are_read(folders, tmp_path, text):
    (tmp_path / "pairs.csv").write_text(text, encoding="utf-8-sig")
    assert read_pairs(tmp_path / "pairs.csv", *folders) == [Pair("a", folders[0] / "a.mha", folders[1] / "a.nii.gz")]


@pytest.mark.parametrize(
    "name", [" a1", "a1 ", "site/ a", "M\udcf6ller", " M\udcf6ller ", r"M\udcf6ller", "=1+1", "a1"]
)
def test_a_table_of_our_own_leads_to_files_of_any_name(tmp_path: Path, name: str) -> None:
    """Whose tables have bytes that are no text as escapes, and whose readers leave out blanks."""
    folders = tmp_path / "p", tmp_path / "r"
    for folder in folders:
        (folder / name).parent.mkdir(parents=True)
        (folder / f"{name}.nii.gz").touch()
    row = {"prediction": f"{name}.nii.gz", "reference": folders[1] / f"{name}.nii.gz", "case": name}
    write_csv(tmp_path / "pairs.csv", tuple(row), [row])
    (pair,) = read_pairs(tmp_path / "pairs.csv", *folders)
    assert (pair.prediction, pair.reference) == tuple(folder / f"{name}.nii.gz" for folder in folders)
    assert pair.case == name
    write_csv(tmp_path / "pairs.csv", ("prediction", "reference"), [row])
    assert read_pairs(tmp_path / "pairs.csv", *folders)[0].problem is None


def test_blanks_around_a_cell_are_none_of_its_name(folders, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("prediction,reference,case\n a.mha ,  a.nii.gz, one \n")
    expected = [Pair("one", folders[0] / "a.mha", folders[1] / "a.nii.gz")]
    assert read_pairs(tmp_path / "pairs.csv", *folders) == expected


def test_slices_that_are_links_are_one_file_and_copies_are_two(folders):
    predictions, references = (folder / "series" for folder in folders)
    for folder in (predictions, references):
        folder.mkdir()
        (folder / "readme").write_text("no slice", encoding="utf-8")
    (references / "001").write_bytes(bytes(128) + b"DICM")
    pair = Pair("series", predictions, references)
    (predictions / "001").write_bytes((references / "001").read_bytes())
    assert not pair.is_one_file
    (predictions / "001").unlink()
    (predictions / "001").hardlink_to(references / "001")
    assert pair.is_one_file
    assert not Pair("lost", None, references).is_one_file
    assert not Pair("absent", predictions / "absent.nii", references / "absent.nii").is_one_file
