"""`monai-iou predict` on a small model: where masks go, in which format, and what is never replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from monai_iou.bundle_files import bundle_path, copy_bundle, trained_model_path
from monai_iou.cli import main
from monai_iou.files import OutputError
from monai_iou.volumes.reading import read_channels, read_labels, read_volume
from monai_iou.workflow import prediction
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.inference_keys import AS_SHIPPED
from monai_iou.workflow.mask_formats import write_with_itk
from monai_iou.workflow.prediction import (
    Prediction,
    Predictions,
    earlier_results,
    plan_predictions,
    run_all,
)
from monai_iou.workflow.run_state import RunState
from monai_iou.workflow.trained_models import TrainedModels, find_models, fold_notes


@pytest.fixture(scope="module")
def scan(data: Path) -> Path:
    return next(iter(sorted((data / "imagesTs").glob("*.nii.gz"))))


def predict(*words: object) -> int:
    return main(["predict", *map(str, words)])


@pytest.mark.parametrize("name", ["x" * 250, "\N{GREEK SMALL LETTER LAMDA}" * 125])
def test_a_result_whose_name_is_too_long_is_refused_before_any_work(name: str, folds: Path, tmp_path: Path) -> None:
    """The image's own name has room for a shorter ending."""
    image = tmp_path / f"{name}.nii"
    image.touch()  # it would be refused if it were read
    models = find_models(folds / "fold0")
    with pytest.raises(OutputError) as caught:
        plan_predictions(models, [image], None, ".nii.gz")
    assert str(caught.value) == (
        f"Expected the mask of {name} to have a file name of at most 255 bytes, but got 262 in "
        f"`{tmp_path / name}_mask.nii.gz`: give the image a shorter name."
    )
    plan_predictions(models, [image], tmp_path / "masks", ".nii")
    with pytest.raises(OutputError, match=r"Expected the preview of .* at most 255 bytes, but got 262 in"):
        plan_predictions(models, [image], tmp_path / "masks", ".nii", preview=True)
    assert list((tmp_path / "masks").iterdir()) == []


def test_a_mask_lies_beside_its_image_and_nothing_is_replaced(
    folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(shutil.copy(scan, tmp_path / "my scan.nii.gz"))
    before = image.read_bytes()
    assert predict(folds / "fold0", image, "--preview", "--save-probabilities") == 0
    printed = capsys.readouterr().out
    assert image.read_bytes() == before
    mask = tmp_path / "my scan_mask.nii.gz"
    for path in (mask, tmp_path / "my scan_probabilities.nii.gz", tmp_path / "my scan_preview.png"):
        assert f"Written: {path}\n" in printed
        assert path.is_file()
    assert f"""--images "['{image}']" --ckpt_dir {folds}/fold0""" in printed
    header, found = nib.load(image), nib.load(mask)
    np.testing.assert_array_equal(found.affine, header.affine)
    assert found.shape == header.shape
    probabilities = read_channels([tmp_path / "my scan_probabilities.nii.gz"]).array
    np.testing.assert_allclose(probabilities.sum(0), 1, atol=1e-5)
    assert np.array_equal(probabilities.argmax(0), read_labels(mask).array)

    stamp = mask.read_bytes()
    assert predict(folds / "fold0", image) == 1
    assert "add --overwrite to replace it" in capsys.readouterr().err
    assert mask.read_bytes() == stamp


def test_keys_of_inference_reach_it(
    folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("--device", "cpu", "--amp=false", "--sw_batch_size", 1, "--sw_overlap", 0.6)
    keys = (*keys, "--inferer#device", "cpu")
    assert predict("--num_workers", "0", folds / "fold0", *keys, scan, "-o", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "--num_workers 0 --device cpu --amp false --sw_batch_size 1 --sw_overlap 0.6 --inferer#device cpu\n" in (
        printed
    )
    for value, code in (("2", 2), ("$1 + 1", 1)):
        assert predict(folds / "fold0", scan, "-o", tmp_path / "other", "--sw_overlap", value) == code
        assert "overlap" in capsys.readouterr().err, "the key reaches the inferer"
    assert predict(folds / "fold0", scan, "-o", tmp_path / "other", "--sw_overlapp", "2") == 2
    assert "perhaps you meant --sw_overlap." in capsys.readouterr().err


def test_a_config_of_the_run_adds_its_keys(folds: Path, scan: Path, tmp_path: Path) -> None:
    run = copy_bundle(tmp_path / "run")
    shutil.copytree(folds / "fold0", run / "fold0" / "models")
    path = run / "configs" / "inference.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "my_batch": 4, "sw_batch_size": "@my_batch"}))
    for each in (run, run / "fold0"):
        assert predict(each, scan, "-o", tmp_path / "out", "--my_batch", 1, "--overwrite") == 0
    path.write_text("{")
    assert predict(run, scan, "-o", tmp_path / "out", "--my_batch", 1, "--overwrite") == 2


def test_a_folder_of_formats_goes_to_a_folder_of_the_same_formats(folds: Path, scan: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    volume = read_volume(scan)
    write_with_itk(volume.array.astype(np.float32), volume.grid.affine, images / "a.mha")
    write_with_itk(volume.array.astype(np.float32), volume.grid.affine, images / "b.nrrd")
    shutil.copy(scan, images / "c_0000.nii.gz")
    output = tmp_path / "masks"
    # `folds` keeps its models in fold0 and fold1 themselves, as trainings by the bundle's own keys may
    for fold in (0, 1):
        shutil.copytree(folds / f"fold{fold}", tmp_path / "run" / f"fold{fold}" / "models")
    assert predict(tmp_path / "run", images, "--output", output, "--format", "same", "--folds", "all") == 0
    assert sorted(path.name for path in output.iterdir()) == ["a.mha", "b.nrrd", "c.nii.gz"]
    masks = [read_labels(path) for path in sorted(output.iterdir())]
    assert all(np.array_equal(mask.array, masks[0].array) for mask in masks)
    for mask in masks:
        np.testing.assert_allclose(mask.grid.affine, volume.grid.affine, atol=1e-5)


@pytest.mark.parametrize(
    ("chosen", "note"),
    [
        ("2", "Note: of the 3 folds in {}, the model of fold 2 alone is used; to use all, leave --folds out.\n"),
        (
            "2,0",
            "Note: of the 3 folds in {}, the models of folds 2, 0 alone are used; to use all, leave --folds out.\n",
        ),
        ("0,1,2", ""),
        ("all", ""),
        (None, ""),
    ],
)
def test_a_number_of_folds_is_not_mistaken_for_that_of_a_fold(
    chosen: str | None,
    note: str,
    folds: Path,
    scan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After `train --folds 5`, `predict --folds 2` is fold 2."""
    for fold in range(3):
        shutil.copytree(folds / "fold0", tmp_path / "run" / f"fold{fold}" / "models")
    monkeypatch.setattr(prediction, "run_all", lambda *_: None)
    options = [] if chosen is None else ["--folds", chosen]
    assert predict(tmp_path / "run", scan, "--output", tmp_path / "masks", *options) == 0
    told = "".join(line for line in capsys.readouterr().err.splitlines(True) if line.startswith("Note: "))
    assert told == note.format(tmp_path / "run")


def test_the_folder_of_the_images_is_refused_for_the_masks(
    folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = Path(shutil.copy(scan, tmp_path / "scan.nii.gz"))
    before = image.read_bytes()
    assert predict(folds / "fold0", image, "--output", tmp_path, "--overwrite") == 1
    assert "Expected `--output` to be apart from the images" in capsys.readouterr().err
    assert image.read_bytes() == before


def test_what_is_no_run_or_no_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(tmp_path / "nowhere", tmp_path) == 2
    assert predict(tmp_path, tmp_path / "nothing.nii.gz") == 2
    assert predict(tmp_path, tmp_path) == 1
    errors = capsys.readouterr().err
    assert "Expected RUN to be the folder of a training" in errors
    assert "but there is no `" in errors
    assert "train one by `monai-iou train`" in errors


def test_the_models_of_chosen_folds(folds: Path, tmp_path: Path) -> None:
    for fold in (0, 1, 10):
        shutil.copytree(folds / "fold0", tmp_path / f"fold{fold}" / "models")
    assert [path.parent.parent.name for path in find_models(tmp_path).files] == ["fold0", "fold1", "fold10"]
    assert [path.parent.parent.name for path in find_models(tmp_path, "10,0").files] == ["fold10", "fold0"]
    with pytest.raises(ValueError, match=r"a model of fold 2, but it has 0, 1, 10: train it or leave it out\.$"):
        find_models(tmp_path, "2")
    with pytest.raises(ValueError, match="all or numbers of folds"):
        find_models(tmp_path, "first")
    for name in ("fold0_2", "fold0_old", "fold01", "fold2x", "fold"):
        shutil.copytree(folds / "fold0", tmp_path / name / "models")
    assert [path.parent.parent.name for path in find_models(tmp_path).files] == ["fold0", "fold1", "fold10"]


def test_folds_that_are_not_complete_are_left_out_and_named(tmp_path: Path) -> None:
    for fold, done in enumerate((["trained", "predicted"], [], ["trained"])):
        (tmp_path / f"fold{fold}" / "models").mkdir(parents=True)
        (tmp_path / f"fold{fold}" / "models" / "model.pt").touch()
        RunState(tmp_path / f"fold{fold}", {"folds": 4}, done).write()
    assert [path.parents[1].name for path in find_models(tmp_path).files] == ["fold0", "fold2"]
    notes = [
        f"Note: the model of fold 1 in {tmp_path} is left out, because it is not trained to the end.",
        f"Note: fold 3 of the 4 in {tmp_path} has no model yet.",
    ]
    assert fold_notes(tmp_path) == fold_notes(tmp_path, "all") == notes
    assert fold_notes(tmp_path, "1") == [
        f"Note: of the 4 folds in {tmp_path}, the model of fold 1 alone is used; to use all, leave --folds out.",
        f"Note: the model of fold 1 in {tmp_path} is used although it is not trained to the end.",
    ]
    assert fold_notes(tmp_path, "0,02,0") == [
        f"Note: of the 4 folds in {tmp_path}, the models of folds 0, 2 alone are used; to use all, leave --folds out."
    ]
    assert fold_notes(tmp_path / "fold0") == []
    assert fold_notes(tmp_path / "fold1") == [f"Note: the model in {tmp_path / 'fold1'} is not trained to the end."]
    assert [path.parents[1].name for path in find_models(tmp_path, "1,0,1").files] == ["fold1", "fold0"]

    for fold in (0, 2):
        RunState(tmp_path / f"fold{fold}", {"folds": 3}, []).write()
    RunState(tmp_path / "fold1", {"folds": 3}, []).write()
    assert [path.parents[1].name for path in find_models(tmp_path).files] == ["fold0", "fold1", "fold2"]
    used = "Note: the model of fold {} in {} is used, as no fold is trained to the end."
    assert fold_notes(tmp_path) == [used.format(fold, tmp_path) for fold in range(3)]


def test_a_model_beside_those_of_folds_is_named(tmp_path: Path) -> None:
    for place in ("models", "fold0/models", "fold1/models"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.pt").touch()
    own = tmp_path / "models" / "model.pt"
    assert find_models(tmp_path).files == (own,)
    assert fold_notes(tmp_path) == [
        f"Note: {tmp_path} has a model of its own, {own}, which alone is used, and models of folds (0, 1): to use "
        "these, add --folds all."
    ]
    assert [path.parents[1].name for path in find_models(tmp_path, "all").files] == ["fold0", "fold1"]
    assert fold_notes(tmp_path, "all") == fold_notes(tmp_path / "fold0") == []


@pytest.mark.parametrize("name", ["metadata.json", "inference.json"])
def test_damaged_json_of_the_run_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, image = copy_bundle(tmp_path / "run"), tmp_path / "scan.nii.gz"
    (run / "models").mkdir()
    (run / "models" / "model.pt").touch()
    image.touch()
    (run / "configs" / name).write_text("{", encoding="utf-8")
    assert predict(run, image) == (1 if name == "metadata.json" else 2)
    told = " ".join(capsys.readouterr().err.split())
    assert f"{run / 'configs' / name}" in told
    if name == "metadata.json":
        assert "to be a JSON file of the bundle's metadata in UTF-8, but it cannot be read (Expecting property" in told


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [({"mask_format": ".mha"}, "mask_format", ".nii.gz"), ({"mask_suffix": "seg"}, "mask_suffix", "_mask"),
     ({"save_probabilities": True}, "save_probabilities", False), ({"models": ["elsewhere"]}, "models", None)],
)  # fmt: skip
def test_keys_of_results_that_were_edited_in_the_run_do_not_move_them(
    written: dict[str, object], key: str, value: object, tmp_path: Path
) -> None:
    """The command has decided where results go, and checked that they replace nothing."""
    (tmp_path / "inference.json").write_text(json.dumps(written), encoding="utf-8")
    models = TrainedModels((tmp_path / "model.pt",), tmp_path / "inference.json")
    found = Predictions(models, tmp_path, "_mask", ".nii.gz", ()).keys({})
    assert found[key] == value
    asked = Predictions(models, tmp_path, "_mask", ".nii.gz", ()).keys({"save_probabilities": True})
    assert {**written, **asked}["save_probabilities"] is True
    config = json.loads((bundle_path() / "configs" / "inference.json").read_text(encoding="utf-8"))
    assert AS_SHIPPED.items() <= config.items()
    shipped = TrainedModels((tmp_path / "model.pt",), tmp_path / "none.json")
    assert set(Predictions(shipped, tmp_path, "", ".nii.gz", ()).keys({})) == {"images", "ckpt_dir", "output_dir"}


def test_a_format_that_was_edited_in_the_run_replaces_no_file_of_the_user(
    folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folds / "fold0", tmp_path / "run" / "models")
    config = json.loads((bundle_path() / "configs" / "inference.json").read_text(encoding="utf-8"))
    (tmp_path / "run" / "configs").mkdir()
    edited = {**config, "mask_format": ".mha", "save_probabilities": True}
    (tmp_path / "run" / "configs" / "inference.json").write_text(json.dumps(edited), encoding="utf-8")
    image = Path(shutil.copy(scan, tmp_path / "scan.nii.gz"))
    (tmp_path / "scan_mask.mha").write_text("drawn by hand", encoding="utf-8")
    assert predict(tmp_path / "run", image) == 0
    assert f"Written: {tmp_path / 'scan_mask.nii.gz'}" in capsys.readouterr().out
    assert (tmp_path / "scan_mask.nii.gz").is_file()
    assert (tmp_path / "scan_mask.mha").read_text(encoding="utf-8") == "drawn by hand"
    assert not (tmp_path / "scan_probabilities.nii.gz").exists()


def test_images_and_runs_of_any_name(folds: Path, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("$run#1")
    shutil.copytree(folds / "fold0", run / "models")
    names = ["a#1", "$b", "@c", "%d"]
    for name in names:
        shutil.copy(scan, f"{name}.nii.gz")
    assert predict(run, *(f"{name}.nii.gz" for name in names)) == 0
    masks = [read_labels(tmp_path / f"{name}_mask.nii.gz").array for name in names]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    assert predict(run, "a#1.nii.gz", "--output", "@masks#2") == 0
    assert (tmp_path / "@masks#2" / "a#1.nii.gz").is_file()


def scans(folder: Path, scan: Path, *names: str) -> list[Path]:
    """Copies of a scan."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(scan, folder / name)
    return [folder / name for name in names]


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_names_with_folders_keep_them_when_each_format_has_one_image(
    folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = scans(tmp_path, scan, "p1/image.nii.gz")
    volume = read_volume(scan)
    second = tmp_path / "p2" / "image.mha"
    second.parent.mkdir()
    write_with_itk(volume.array.astype(np.float32), volume.grid.affine, second)
    assert predict(folds / "fold0", first, second, "-o", tmp_path / "out", "--format", "same") == 0
    assert files(tmp_path / "out") == ["p1/image.nii.gz", "p2/image.mha"]
    printed = capsys.readouterr().out
    assert all(f"Written: {tmp_path / 'out' / name}\n" in printed for name in files(tmp_path / "out"))


@pytest.mark.parametrize("wanted", [(), ("--save-probabilities",)])
def test_a_full_disk_is_one_sentence_and_finished_masks_stay(
    wanted: tuple[str, ...],
    folds: Path,
    scan: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = scans(tmp_path, scan, "a.nii.gz", "b.nii.gz")
    write, calls = nib.Nifti1Image.to_filename, []

    def full(self: nib.Nifti1Image, name: Path) -> None:
        calls.append(name)
        if len(calls) <= len(images[:1]) + len(wanted):
            write(self, name)
            return
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full)
    assert predict(folds / "fold0", *images, "-o", tmp_path / "out", *wanted) == 1
    error = capsys.readouterr().err
    kind = "probabilities" if wanted else "mask"
    assert f"Expected to write the {kind} `{tmp_path}/out/b" in error
    assert "but got the error 'No space left on device': free space or choose another folder." in error
    assert "Traceback" not in error
    assert "writer libraries" not in error
    assert files(tmp_path / "out") == ["a.nii.gz", *(["a_probabilities.nii.gz"] if wanted else [])]
    assert read_labels(tmp_path / "out" / "a.nii.gz").array.shape == read_volume(scan).array.shape


def test_a_second_run_takes_no_result_for_an_image(folds: Path, scan: Path, tmp_path: Path) -> None:
    scans(tmp_path, scan, "a.nii.gz")
    assert predict(folds / "fold0", tmp_path, "--save-probabilities", "--format", ".mha") == 0
    assert predict(folds / "fold0", tmp_path, "--save-probabilities", "--overwrite") == 0
    assert files(tmp_path) == ["a.nii.gz", "a_mask.mha", "a_mask.nii.gz", "a_probabilities.nii.gz"]


@pytest.fixture
def models(folds: Path) -> TrainedModels:
    return find_models(folds / "fold0")


@pytest.mark.parametrize("result", ["a_mask.nii.gz", "a_probabilities.nii.gz", "a_preview.png"])
def test_no_result_of_any_kind_is_replaced(
    result: str, folds: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scans(tmp_path, scan, "a.nii.gz")
    (tmp_path / result).write_text("mine")
    words = (folds / "fold0", tmp_path / "a.nii.gz", "--save-probabilities", "--preview")
    assert predict(*words) == 1
    assert f"Expected no file at {tmp_path / result}, where a result is to be written" in capsys.readouterr().err
    assert files(tmp_path) == sorted(["a.nii.gz", result])
    assert (tmp_path / result).read_text() == "mine"


def test_no_scan_is_replaced_in_a_folder_of_its_case(models: TrainedModels, scan: Path, tmp_path: Path) -> None:
    """The folder of the masks holds no scan itself, but they would go to p1 and p2 below it."""
    paths = scans(tmp_path, scan, "p1/image.nii.gz", "p2/image.nii.gz")
    with pytest.raises(OutputError, match=r"mask of p1/image` to be apart from the images, but .* would be both read"):
        plan_predictions(models, paths, tmp_path, ".nii.gz")


@pytest.mark.parametrize("result", ["a_mask.nii.gz", "a_probabilities.nii.gz", "a_preview.png"])
def test_no_scan_is_replaced_by_a_result_of_any_kind(
    result: str, models: TrainedModels, scan: Path, tmp_path: Path
) -> None:
    paths = scans(tmp_path, scan, "a.nii.gz", "d/b.nii.gz")
    (tmp_path / result).symlink_to(paths[1])
    with pytest.raises(OutputError, match=r"to be apart from the images, but .* both read and written"):
        plan_predictions(models, paths, None, ".nii.gz", probabilities=True, preview=True)


def test_two_results_do_not_share_a_file(models: TrainedModels, scan: Path, tmp_path: Path) -> None:
    paths = scans(tmp_path, scan, "d/a.nii.gz", "e/a_probabilities.nii.gz")
    assert plan_predictions(models, paths, tmp_path / "out", ".nii.gz")
    expected = r"the probabilities of a and the mask of a_probabilities would both be `.*/out/a_probabilities\.nii\.gz`"
    with pytest.raises(OutputError, match=expected):
        plan_predictions(models, paths, tmp_path / "out", ".nii.gz", probabilities=True)


def test_results_are_called_as_the_image_whatever_it_is_called(
    models: TrainedModels, scan: Path, tmp_path: Path
) -> None:
    (image,) = scans(tmp_path, scan, "x_mask.nii.gz")
    for output, mask in ((tmp_path / "out", "x_mask.mha"), (None, "x_mask_mask.mha")):
        (run,) = plan_predictions(models, [image], output, ".mha", probabilities=True, preview=True)
        (item,) = run.items
        expected = [mask, "x_mask_probabilities.nii.gz", "x_mask_preview.png"]
        assert [path.name for path in item.files.values()] == expected


SHIPPED = "hippocampus_mr"


def test_all_images_are_checked_before_the_first_folder_is_segmented(
    scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = scans(tmp_path, scan, *(f"p{number}/scan.nii.gz" for number in range(4)))
    for path in (paths[1], paths[3]):
        path.write_bytes(path.read_bytes()[:2000])
    before = files(tmp_path)
    assert predict(SHIPPED, *paths, "--device", "cpu") == 1
    printed = capsys.readouterr()
    assert files(tmp_path) == before, "nothing is segmented"
    assert "Written" not in printed.out
    assert [f"Expected `{path}` " in printed.err for path in paths] == [False, True, False, True]


class Segmenter:
    """Stands in for the runs of inference: it writes the masks of some images, and then ends with what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.endings: dict[str, BaseException] = {}
        self.only: dict[str, int] = {}
        self.runs: list[str] = []
        monkeypatch.setattr(prediction, "run_configs", self.run)

    def run(self, _: object, keys: Mapping[str, Any], __: str) -> None:
        folder = Path(keys["output_dir"])
        self.runs.append(folder.name)
        for image in keys["images"][: self.only.get(folder.name)]:
            mask = folder / Path(image).name.replace(".nii.gz", "_mask.nii.gz")
            mask.unlink(missing_ok=True)
            mask.write_text("a mask")
        if folder.name in self.endings:
            raise self.endings[folder.name]


@pytest.fixture
def segmenter(monkeypatch: pytest.MonkeyPatch) -> Segmenter:
    return Segmenter(monkeypatch)


def runs_of(scan: Path, folder: Path, *names: str) -> list[Predictions]:
    model = find_models(trained_model_path(SHIPPED) or folder)
    return plan_predictions(model, scans(folder, scan, *names), None, ".nii.gz")


def test_a_folder_that_fails_keeps_no_other_from_its_masks(scan: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    names = ["p1/a.nii.gz", "p2/a.nii.gz", "p2/b.nii.gz", "p3/a.nii.gz", "p4/a.nii.gz"]
    runs = runs_of(scan, tmp_path, *names)
    (tmp_path / "p2" / "b_mask.nii.gz").write_text("an earlier mask")
    segmenter.only["p2"] = 1
    lacking = ("b", "a picture", "the disk")
    first, second, third = (f"Expected {what} to be there, but it is not: make it." for what in lacking)
    segmenter.endings = {"p2": ValueError(first), "p4": OutputError(third)}
    told = []

    def done(item: Prediction) -> None:
        told.append(item.mask.relative_to(tmp_path).as_posix())
        if item.mask.parent.name == "p3":
            raise OutputError(second)

    with pytest.raises(ValueError, match=r"^Expected b to be there, but") as caught:
        run_all(runs, {}, done)
    assert str(caught.value) == "\n".join([first, second, third])
    assert segmenter.runs == ["p1", "p2", "p3", "p4"]
    assert told == [f"p{number}/a_mask.nii.gz" for number in (1, 2, 3, 4)], "not the earlier one"
    assert (tmp_path / "p2" / "b_mask.nii.gz").read_text() == "an earlier mask"


def test_a_single_failure_is_raised_as_it_is(scan: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    runs = runs_of(scan, tmp_path, "p1/a.nii.gz", "p2/a.nii.gz")
    segmenter.endings["p1"] = OutputError("Expected room, but got none: make room.")
    with pytest.raises(OutputError) as caught:
        run_all(runs, {})
    assert caught.value is segmenter.endings["p1"]
    assert segmenter.runs == ["p1", "p2"]


def test_what_is_wrong_with_every_folder_is_said_once(scan: Path, tmp_path: Path, segmenter: Segmenter) -> None:
    names = [f"p{number}/a.nii.gz" for number in range(5)]
    runs = runs_of(scan, tmp_path, *names)
    segmenter.endings = {f"p{number}": ValueError("Expected a GPU, but got none: take a CPU.") for number in range(5)}
    with pytest.raises(ValueError, match=r"^Expected a GPU, but got none: take a CPU\.$"):
        run_all(runs, {})
    assert segmenter.runs == ["p0", "p1"], "the second says that no image is to blame"
    segmenter.runs.clear()
    segmenter.endings["p0"] = ConfigError("Expected a key, but got another: correct it.")
    with pytest.raises(ConfigError, match=r"^Expected a key, but got another: correct it\.$"):
        run_all(runs, {})
    assert segmenter.runs == ["p0"]


def test_a_new_mask_takes_the_earlier_results_of_its_image_with_it(
    scan: Path, tmp_path: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    scans(tmp_path, scan, "a.nii.gz", "b.nii.gz")
    (tmp_path / "a_mask.nii.gz").write_text("an earlier mask")
    earlier = [tmp_path / name for name in ("a_probabilities.nii.gz", "a_preview.png")]
    others = [tmp_path / name for name in ("a_probabilities.mha", "a_b_preview.png", "a_mask.mha")]
    for path in (*earlier, *others):
        path.write_text("of an earlier mask")
    images = (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz")
    assert predict(SHIPPED, *images) == 1
    assert capsys.readouterr().err == (
        f"Error: Expected no file at {tmp_path / 'a_mask.nii.gz'}, where a result is to be written, but there is one: "
        "add --overwrite to replace it, or choose another folder with --output.\n"
    )
    assert segmenter.runs == []
    segmenter.only[tmp_path.name] = 0
    segmenter.endings[tmp_path.name] = ValueError("Expected a to be segmented, but it is not: try again.")
    assert predict(SHIPPED, *images, "--overwrite") == 1
    assert all(path.exists() for path in earlier), "without a new mask, the results are of the mask that is there"
    segmenter.only[tmp_path.name] = 1
    assert predict(SHIPPED, *images, "--overwrite") == 1
    assert not any(path.exists() for path in earlier)
    assert all(path.exists() for path in others)
    told = capsys.readouterr().out
    assert all(f"Removed, because it belonged to an earlier mask: {path}\n" in told for path in earlier)


def test_a_result_that_a_config_saves_elsewhere_is_missed(
    scan: Path, tmp_path: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    images = with_earlier_results(scan, tmp_path, "a", "b", "c")
    segmenter.only[tmp_path.name] = 1
    assert predict(SHIPPED, *images, "--overwrite") == 1
    config = find_models(trained_model_path(SHIPPED) or tmp_path).config
    printed = capsys.readouterr()
    assert printed.err == (
        f"Error: Expected {config} to write {tmp_path}/b_mask.nii.gz (and 1 more file), but its run ended without "
        "doing so: write what `output_dir`, `mask_suffix`, `mask_format` and `save_probabilities` ask for, as the "
        "inference.json that `monai-iou init` copies does.\n"
    )
    assert [left(tmp_path, name) for name in "abc"] == [["a mask", None, None], ["earlier"] * 3, ["earlier"] * 3]
    stale = [f"{STALE} {tmp_path}/a_{kind}" for kind in KINDS[:0:-1]]
    assert lines(printed.out) == [*stale, f"Written: {tmp_path}/a_{KINDS[0]}"]


def test_a_config_that_saves_elsewhere_is_run_for_one_folder_and_keeps_what_it_has_computed(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def run(_: object, keys: Mapping[str, Any], __: str) -> None:
        for image in keys["images"]:
            made.append(image)
            Path(image.replace(".nii.gz", "_probabilities.nii.gz")).write_text("new")

    monkeypatch.setattr(prediction, "run_configs", run)
    images = [*with_earlier_results(scan, tmp_path, "a"), *scans(tmp_path, scan, "d/a.nii.gz", "e/a.nii.gz")]
    assert predict(SHIPPED, *images, "--overwrite", "--save-probabilities") == 1
    assert made == [str(images[0])]
    assert left(tmp_path, "a") == ["earlier", "new", "earlier"]
    printed = capsys.readouterr()
    assert printed.err.count(f" to write {tmp_path}/a_mask.nii.gz, but its run ended without doing so: write what") == 1
    assert printed.err.count("Expected ") == 1
    assert not lines(printed.out)


def test_an_inference_of_an_earlier_version_is_refused(
    scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would segment the test images of its dataset."""
    run = copy_bundle(tmp_path / "run")
    shutil.copytree(find_models(trained_model_path(SHIPPED) or run).files[0].parent, run / "models")
    config = run / "configs" / "inference.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    del content["images"], content["settings"]["images"], content["cases"]["images"]
    config.write_text(json.dumps(content), encoding="utf-8")
    (image,) = scans(tmp_path, scan, "a.nii.gz")
    assert predict(run, image, "--output", tmp_path / "masks") == 1
    assert capsys.readouterr().err == (
        f"Error: Expected {config} to refer to the key `images`, but it does not, perhaps because an earlier version "
        "wrote it: replace it by the configs/inference.json of a new copy of the bundle (`monai-iou init`).\n"
    )
    assert not (tmp_path / "masks").exists()


KINDS = ("mask.nii.gz", "probabilities.nii.gz", "preview.png")


def with_earlier_results(scan: Path, folder: Path, *names: str) -> list[Path]:
    """Images beside which the results of another model lie."""
    for path in (folder / f"{name}_{kind}" for name in names for kind in KINDS):
        path.write_text("earlier")
    return scans(folder, scan, *(f"{name}.nii.gz" for name in names))


def left(folder: Path, name: str) -> list[str | None]:
    """The texts of the results of an image, None for one that is not there."""
    paths = [folder / f"{name}_{kind}" for kind in KINDS]
    return [path.read_text() if path.exists() else None for path in paths]


def lines(printed: str) -> list[str]:
    return sorted(line for line in printed.splitlines() if line.startswith(("Written", "Removed")))


STALE = "Removed, because it belonged to an earlier mask:"


@pytest.mark.parametrize("wanted", [(), ("--save-probabilities", "--preview")])
def test_ctrl_c_leaves_no_results_of_an_earlier_mask_beside_a_new_one(
    wanted: tuple[str, ...], scan: Path, tmp_path: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    images = with_earlier_results(scan, tmp_path, "a", "b")
    segmenter.only[tmp_path.name] = 1
    segmenter.endings[tmp_path.name] = KeyboardInterrupt()
    assert predict(SHIPPED, *images, "--overwrite", *wanted) == 130
    assert left(tmp_path, "a") == ["a mask", None, None]
    assert left(tmp_path, "b") == ["earlier"] * 3
    removed = [f"{STALE} {tmp_path}/a_{kind}" for kind in KINDS[:0:-1]]
    assert lines(capsys.readouterr().out) == [*removed, f"Written: {tmp_path}/a_mask.nii.gz"]


def test_ctrl_c_among_the_pictures_leaves_none_of_an_earlier_mask(
    scan: Path,
    tmp_path: Path,
    segmenter: Segmenter,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def draw(_: object, mask: Path, path: Path) -> None:
        if mask.name.startswith("b"):
            raise KeyboardInterrupt
        path.write_text("drawn")

    monkeypatch.setattr("monai_iou.workflow.previews.write_preview", draw)
    images = with_earlier_results(scan, tmp_path, "a", "b", "c")
    assert predict(SHIPPED, *images, "--overwrite", "--preview") == 130
    assert [left(tmp_path, name)[1:] for name in "abc"] == [[None, "drawn"], [None, None], [None, None]]
    assert lines(capsys.readouterr().out) == [
        *(f"{STALE} {tmp_path}/{name}_{KINDS[1]}" for name in "ab"),
        *(f"{STALE} {tmp_path}/c_{kind}" for kind in KINDS[:0:-1]),
        *(f"Written: {tmp_path}/a_{kind}" for kind in (KINDS[0], KINDS[2])),
        *(f"Written: {tmp_path}/{name}_{KINDS[0]}" for name in "bc"),
    ]


def test_what_could_not_be_written_with_a_new_mask_is_not_told_and_no_earlier_file_takes_its_place(
    scan: Path, tmp_path: Path, segmenter: Segmenter, capsys: pytest.CaptureFixture[str]
) -> None:
    images = with_earlier_results(scan, tmp_path, "a", "b")
    segmenter.only[tmp_path.name] = 1
    segmenter.endings[tmp_path.name] = ValueError("Expected b to be segmented, but it is not: try again.")
    assert predict(SHIPPED, *images, "--overwrite", "--preview", "--save-probabilities") == 1
    printed = capsys.readouterr()
    assert left(tmp_path, "a") == ["a mask", None, None], "a text cannot be drawn"
    assert left(tmp_path, "b") == ["earlier"] * 3
    assert lines(printed.out) == [f"{STALE} {tmp_path}/a_{KINDS[1]}", f"Written: {tmp_path}/a_mask.nii.gz"]
    assert "Expected b to be segmented, but it is not: try again." in printed.err
    assert f"{tmp_path}/a_mask.nii.gz" in printed.err


def test_probabilities_whose_mask_was_not_written_do_not_lie_beside_an_earlier_one(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: object, keys: Mapping[str, Any], __: str) -> None:
        for image in keys["images"]:
            Path(image.replace(".nii.gz", "_probabilities.nii.gz")).write_text("new")
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction, "run_configs", run)
    images = with_earlier_results(scan, tmp_path, "a", "b")
    (tmp_path / "b_mask.nii.gz").unlink()
    assert predict(SHIPPED, *images, "--overwrite", "--save-probabilities") == 130
    assert left(tmp_path, "a") == ["earlier", None, "earlier"]
    assert left(tmp_path, "b") == [None, "new", "earlier"]
    told = f"Removed, because its mask was not written: {tmp_path}/a_probabilities.nii.gz"
    assert lines(capsys.readouterr().out) == [told]


def test_what_a_command_reads_or_writes_is_no_earlier_result(scan: Path, tmp_path: Path) -> None:
    """`a_probabilities` may be an image, and its mask in another folder, where it has the name of a result of `a`."""
    model = find_models(trained_model_path(SHIPPED) or tmp_path)
    images = scans(tmp_path, scan, "d/a.nii.gz", "e/a_probabilities.nii.gz")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a_probabilities.nii.gz", "a_preview.png"):
        (out / name).touch()
    assert earlier_results(plan_predictions(model, images[:1], out, ".nii.gz")) == {out / "a.nii.gz": []}, "no mask"
    (out / "a.nii.gz").touch()
    runs = plan_predictions(model, images, out, ".nii.gz")
    assert earlier_results(runs) == {out / "a.nii.gz": [out / "a_preview.png"], out / "a_probabilities.nii.gz": []}
    asked = plan_predictions(model, images[:1], out, ".nii.gz", probabilities=True, preview=True)
    assert earlier_results(asked) == {out / "a.nii.gz": []}
    (image,) = scans(tmp_path, scan, "d/a_probabilities.nii.gz")
    (tmp_path / "link").symlink_to(tmp_path / "d")
    image.with_name("a_mask.nii.gz").touch()
    beside = plan_predictions(model, [images[0], tmp_path / "link" / image.name], None, ".nii.gz")
    assert not any(earlier_results(beside).values()), "an image by another path"


@pytest.mark.parametrize("place", ["models", "."])
@pytest.mark.parametrize("folds", ["all", "0", "0,1"])
def test_folds_asked_of_a_single_training_are_answered_with_what_it_has(tmp_path: Path, place: str, folds: str) -> None:
    model = tmp_path / place / "model.pt"
    model.parent.mkdir(exist_ok=True)
    model.touch()
    with pytest.raises(ValueError, match=r"^Expected ") as caught:
        find_models(tmp_path, folds)
    assert str(caught.value) == (
        f"Expected {tmp_path} to hold the models of folds for `--folds`, but it has a single model, {model}: leave "
        "--folds out."
    )
    assert find_models(tmp_path).files == (model,)
