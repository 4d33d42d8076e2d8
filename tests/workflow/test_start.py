"""What a run checks before any work: its outputs, earlier trainings, other runs, shared memory, resumed data."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import bundle_command, causes, overrides, run_command
from layouts import LAYOUTS
from light_import import LIGHT_IMPORT
from monai.bundle import ConfigParser

from monai_iou.cli import main
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.files import OutputError
from monai_iou.locks import is_locked
from monai_iou.workflow import failures, models, run_lock, start
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.records import differences
from monai_iou.workflow.running import run_configs
from monai_iou.workflow.settings import Settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=2, shape=(32, 32, 24))


def settings(folder: Path, **changes: Any) -> Settings:
    given = {
        "ckpt_dir": str(folder / "m"), "output_dir": str(folder / "e"), "cache_dir": None, "resume": False,
        "overwrite": False, "num_workers": 0, "batch_size": 2, "num_samples": 2,
    }  # fmt: skip
    return Settings(**{**given, **changes})


def sentence(configs: list[str], given: dict[str, Any], bundle: Path) -> str:
    """The one sentence that a run ends with."""
    with pytest.raises((RuntimeError, ValueError)) as caught:
        run_workflow(bundle, configs, given)
    return next(str(each) for each in causes(caught.value) if isinstance(each, (OutputError, ValueError)))


def test_an_earlier_training_is_not_replaced(bundle: Path, data: Path) -> None:
    given = overrides(bundle, data, epochs=1, overwrite=False)
    run_workflow(bundle, ["train"], given)
    before = {path.name: path.read_bytes() for path in (bundle / "models").iterdir()}
    expected = (
        f"Expected `ckpt_dir` to be without a training, but {bundle}/models/last_epoch.pt is there: continue it with "
        "--resume, replace it with --overwrite, or choose another folder with --output."
    )
    assert sentence(["train"], given, bundle) == expected
    assert {path.name: path.read_bytes() for path in (bundle / "models").iterdir()} == before
    # Resumed on another split it would go on with a best score of other cases.
    found = sentence(["train"], {**given, "resume": True, "split_seed": 3, "val_fraction": 0.5, "epochs": 2}, bundle)
    assert found.startswith(f"Expected {bundle}/models/last_epoch.pt to be of a training on these data, but its ")
    assert "validation cases lack" in found
    assert found.endswith("set `overwrite` as well as `resume` to continue it on these, or choose another folder.")
    found = sentence(["train"], {**given, "resume": True, "pixdim": [2.0, 2.0, 2.0], "epochs": 2}, bundle)
    assert "its `pixdim` was [" in found
    # The options that the sentence names are those with which the training goes on.
    options = re.search(r'settings, give the earlier values with --pixdim "(.*)" and --patch_size "(.*)", set', found)
    assert options is not None
    sizes = dict(zip(("pixdim", "patch_size"), map(json.loads, options.groups()), strict=True))
    run_workflow(bundle, ["train"], {**given, "resume": True, "epochs": 2, **sizes})
    (bundle / "models" / "last_epoch.pt").unlink()
    for resume, instead in (False, ""), (True, " and without --resume"):
        assert sentence(["train"], {**given, "resume": resume, "overwrite": resume}, bundle) == (
            f"Expected `ckpt_dir` to be without a training, but {bundle}/models/model.pt is there without a "
            f"last_epoch.pt, from which it could be continued: replace it with --overwrite{instead}, or choose another "
            "folder with --output."
        )


def test_labels_that_changed_are_noticed_when_resuming(data: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    records = []
    for _ in range(2):
        cases = BundleCases(str(folder), val_fraction=0.25)
        records.append(cases.record(cases.plan([16, 16, 16])))
        path = sorted((folder / "labelsTr").iterdir())[1]
        label = nib.load(path)
        voxels = np.asanyarray(label.dataobj).copy()
        voxels[0, 0, 0] = 1
        nib.save(nib.Nifti1Image(voxels, label.affine, label.header), path)
    assert differences(records[0], records[0]) == []
    assert differences(*records) == ["the label or image of phantom_01 has changed"]
    json.dumps(records[0])  # plain values


@pytest.mark.parametrize("side", ["training", "validation"])
def test_images_that_changed_are_noticed_when_resuming(side: str, data: Path, tmp_path: Path) -> None:
    """Uncompressed files of the same size, as after another correction of the intensities."""
    folder = shutil.copytree(data, tmp_path / "data")
    content = json.loads((folder / "dataset.json").read_text())
    for item in content["training"]:
        image = folder / item["image"]
        item["image"] = item["image"].removesuffix(".gz")
        nib.save(nib.load(image), folder / item["image"])
        image.unlink()
    (folder / "dataset.json").write_text(json.dumps(content))
    records, names = [], []
    for _ in range(2):
        cases = BundleCases(str(folder), val_fraction=0.25)
        records.append(cases.record(cases.plan([16, 16, 16])))
        item = getattr(cases, side)[0]
        names.append(item["case"])
        path = Path(item["image"])
        size, image = path.stat().st_size, nib.load(path)
        nib.save(nib.Nifti1Image(np.asanyarray(image.dataobj)[::-1].copy(), image.affine, image.header), path)
        assert path.stat().st_size == size
    assert differences(*records) == [f"the label or image of {names[0]} has changed"]
    earlier = {name: value for name, value in records[0].items() if name != "images"}
    assert differences(earlier, records[1]) == [], "of a version that did not note them"


@pytest.mark.parametrize("key", ["ckpt_dir", "output_dir", "cache_dir"])
@pytest.mark.parametrize("kind", ["file", "proc", "long", "the dataset", "the images"])
def test_folders_that_no_training_can_have(key: str, kind: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = {
        "file": tmp_path / "file", "proc": Path("/proc/nothing"), "long": tmp_path / ("x" * 300), "the dataset": data,
        "the images": data / "imagesTr",
    }[kind]  # fmt: skip
    cases = BundleCases(str(data))
    plan = cases.plan([16, 16, 16])
    with pytest.raises((OutputError, ValueError)) as caught:
        start.check_training(cases, plan, settings(tmp_path, **{key: str(folder)}))
    assert str(caught.value).startswith(f"Expected `{key}` to be ")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("output", ["images", "link", "imagesTs"])
def test_masks_are_not_written_over_scans(output: str, bundle: Path, data: Path, tmp_path: Path) -> None:
    images = shutil.copytree(data / "imagesTs", tmp_path / "images")
    (tmp_path / "link").symlink_to(images)
    source = data if output == "imagesTs" else images
    folder = data / "imagesTs" if output == "imagesTs" else tmp_path / output
    before = {path: path.read_bytes() for path in [*images.iterdir(), *(data / "imagesTs").iterdir()]}
    given = {"bundle_root": str(bundle), "dataset_dir": str(source), "load_pretrain": False, "output_dir": str(folder)}
    assert "Expected `output_dir` to be apart from the images, but" in sentence(["inference"], given, bundle)
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(images.iterdir()) == sorted(path for path in before if path.parent == images)


@contextlib.contextmanager
def held_by_another_process(folder: Path) -> Iterator[int]:
    code = (
        f"{LIGHT_IMPORT}from pathlib import Path; from monai_iou.locks import folder_lock\n"
        f"with folder_lock(Path({str(folder)!r}), 'training'):\n    print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process.pid
    process.communicate()


def test_a_folder_in_use_is_refused_before_anything_is_written_or_cached(bundle: Path, data: Path) -> None:
    models, output, cache = bundle / "models", bundle / "eval", bundle / "cache"
    for folder in (models, output, output / "tensorboard"):
        folder.mkdir()
    for name in ("config.json", "log.txt"):
        (output / name).write_text("of the run that goes on")
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with held_by_another_process(models) as process:
        found = sentence(["train"], overrides(bundle, data, cache_dir=str(cache)), bundle)
        assert f"but training by process {process} on" in found
        assert [path.name for path in models.iterdir()] == [".monai_iou.lock"]
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert not cache.exists()


def test_the_folder_is_held_from_the_checks_on(data: Path, tmp_path: Path) -> None:
    cases = BundleCases(str(data))
    plan, given = cases.plan([16, 16, 16]), settings(tmp_path)
    models = tmp_path / "m"
    start.check_training(cases, plan, given)
    assert is_locked(models)
    start.check_training(cases, plan, given)  # again in this process: what the first one prepared has failed
    engine = SimpleNamespace(state=SimpleNamespace(rank=0), run=lambda: runs.append(is_locked(models)))
    runs: list[bool] = []
    failures.run(engine, str(models))
    assert runs == [True]
    assert not is_locked(models)
    (models / "model.pt").touch()
    with pytest.raises(OutputError, match="to be without a training"):
        start.check_training(cases, plan, given)
    assert not is_locked(models), "a check that fails holds nothing"


def test_only_the_first_rank_locks(data: Path, tmp_path: Path) -> None:
    cases = BundleCases(str(data))
    plan, given = cases.plan([16, 16, 16]), settings(tmp_path)
    start.check_training(cases, plan, given)
    start.check_training(cases, plan, given, rank=1)
    engine = SimpleNamespace(state=SimpleNamespace(rank=1), run=lambda: None)
    failures.run(engine, str(tmp_path / "m"))
    assert is_locked(tmp_path / "m"), "by the first rank"
    run_lock.release_unused()
    assert not is_locked(tmp_path / "m")


def test_a_run_that_ends_before_its_training_holds_nothing(bundle: Path, data: Path) -> None:
    given = overrides(bundle, data, **{"train#dataset": "$1 / 0"})
    with pytest.raises(ConfigError, match="division by zero"):
        run_configs([bundle / "configs" / "train.json"], given)
    assert (bundle / "eval" / "config.json").is_file()
    assert not is_locked(bundle / "models")
    assert not list((bundle / "models").iterdir())


@pytest.mark.slow
def test_a_command_that_ends_before_its_training_leaves_no_lock(bundle: Path, data: Path) -> None:
    done = run_command(bundle_command(bundle, ["train"], overrides(bundle, data, **{"train::dataset": "$1 / 0"})))
    assert done.returncode == 1, done.stdout
    assert "division by zero" in done.stderr
    assert not list((bundle / "models").iterdir())


def test_workers_without_shared_memory(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # as shutil gives it
    cases = BundleCases(str(data))
    plan = cases.plan([16, 16, 16])
    needed = 2 * 2 * 4 * np.prod(plan.patch_size) * 8
    for free in (needed - 1, needed):
        monkeypatch.setattr(start.shutil, "disk_usage", lambda _, free=free: usage(free, 0, free))
        start.check_training(cases, plan, settings(tmp_path))
        given = settings(tmp_path, num_workers=2)
        if free == needed:
            start.check_training(cases, plan, given)
        else:
            with pytest.raises(ValueError, match=r"Expected /dev/shm to have room .* lower `num_workers`"):
                start.check_training(cases, plan, given)


def test_workers_without_shared_memory_for_the_volumes_of_validation(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few and small patches, these are larger."""
    usage = namedtuple("usage", "total used free")  # as shutil gives it
    cases = BundleCases(str(data), val_fraction=0.25)
    plan = cases.plan([16, 16, 16])
    facts = dict(zip([case.name for case in cases.folder.labelled], cases.folder.training_facts, strict=True))
    held_out = [facts[item["case"]] for item in cases.validation]
    voxels = max(np.prod(np.ceil(np.multiply(each.shape, each.spacing) / plan.pixdim)) for each in held_out)
    needed = 3 * 2 * voxels * 5
    monkeypatch.setattr(start.shutil, "disk_usage", lambda _: usage(needed - 1, 0, needed - 1))
    given = {"num_workers": 3, "batch_size": 1, "num_samples": 1}
    start.check_training(cases, plan, settings(tmp_path, **given, val_fraction=0))
    run_lock.release_unused()
    expected = (
        f"Expected /dev/shm to have room for the volumes of validation of 3 workers, {needed / 1e6:.1f} MB, but "
        f"{needed / 1e6:.1f} MB of shared memory are free: lower `num_workers` (0 needs none), or give the container "
        "more (docker run --shm-size=1g)."
    )
    for fraction in ({"val_fraction": 0.25}, {}):  # an earlier version's train.json does not tell it
        with pytest.raises(ValueError, match=re.escape(expected)):
            start.check_training(cases, plan, settings(tmp_path, **given, **fraction))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, None),
        ({"patch_size": [64, 64, 64], "pixdim": "null", "base_channels": 16, "full_resolution": "false"}, None),
        ({"patch_size": [16, 16, 16], "pixdim": [0.9934, 0.9934, 1.9868], "base_channels": 4}, None),
        ({"base_channels": 32, "sw_batch_size": 1}, "`base_channels` 32 (it has 4)"),
        (
            {"patch_size": [32, 32, 16], "pixdim": (2.0, 2.0, 2.0), "full_resolution": "true"},
            "`patch_size` [32, 32, 16] (it has [16, 16, 16]); `pixdim` (2.0, 2.0, 2.0) (it has [0.993403, 0.993403, "
            "1.98681]); `full_resolution` true (it has False)",
        ),
    ],
)
def test_keys_that_the_plan_of_the_model_has_decided_are_told(
    given: dict[str, Any], told: str | None, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    cases = BundleCases(str(data))
    plan = cases.plan([16, 16, 16], base_channels=4)
    (tmp_path / "model.json").write_text(plan.to_json())
    monkeypatch.setattr(models, "calling_workflow", lambda: SimpleNamespace(parser=ConfigParser(given)))
    chosen = settings(tmp_path, mask_suffix="", mask_format=".nii.gz", save_probabilities=False)
    files = [str(tmp_path / "model.pt")]
    for check in (
        lambda: start.check_inference(cases, plan, chosen, files), lambda: start.check_evaluation(cases, chosen, files),
    ):  # fmt: skip
        caplog.clear()
        check()
        lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
        place = tmp_path / "model.json"
        expected = f"The model follows its plan {place}, and these keys have no effect: {told}."
        assert lines == ([] if told is None else [expected])


@pytest.mark.parametrize("changes", [{}, {"epochs": 1, "val_interval": 5, "keep_weights": "best"}])
def test_a_training_on_data_that_others_bring_needs_no_dataset(changes: dict[str, Any], tmp_path: Path) -> None:
    """MONAI Label's, whose bundle has no dataset in its folder."""
    cases = BundleCases(str(tmp_path / "dataset"))
    given = settings(tmp_path, val_fraction=0.1, tune_postprocessing=False, num_workers=2, **changes)
    start.check_training(cases, cases.plan([16, 16, 16]), given)
    assert (tmp_path / "m").is_dir()
    run_lock.release_unused()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1000.0, "Expected `dataset_dir` to be a path, but the command line read 1000.0, a float: write --dataset_dir"),
        (None, "Expected `dataset_dir` to be a path, but the command line read None, a NoneType"),
        ("", "Expected `dataset_dir` to be a path, but the command line read '', a str"),
        ("patient ::1", "Expected `dataset_dir` to be a path without `#` and `::`, which MONAI's configs take for"),
    ],
)
def test_paths_that_do_not_survive_the_command_line(value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match="Expected `dataset_dir`") as caught:
        Settings(dataset_dir=value)
    assert str(caught.value).startswith(expected)
    assert Settings(dataset_dir=2024).dataset_dir == "2024"
    assert Settings(dataset_dir=Path("a b")).dataset_dir == "a b"


def test_commands_do_not_replace_files_of_others(data: Path, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(data, tmp_path / "data")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    label = sorted((folder / "labelsTr").iterdir())[0]
    for command, source in (("plan", folder), ("class-weights", folder / "labelsTr")):
        for output in (folder / "dataset.json", label, folder / "labelsTr" / "new.nii.gz"):
            expected = 1 if output.suffix == ".json" else 2  # a wrong extension is an error of the command line
            assert main([command, str(source), "--output", str(output)]) == expected
            assert "Expected `--output` to be a" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    for _ in range(2):  # its own file is replaced
        assert main(["class-weights", str(folder / "labelsTr"), "--output", str(folder / "weights.json")]) == 0


@pytest.mark.parametrize("image", ["p1/image.nii.gz", "p1/image_probabilities.nii.gz"])
def test_results_in_folders_of_their_cases_are_not_written_over_scans(image: str, tmp_path: Path) -> None:
    """The output folder holds no image itself, but a folder below it does."""
    scan = tmp_path / image
    scan.parent.mkdir()
    scan.touch()
    named = [{"case": "p1/image", "image": str(scan)}]
    given = {"images": named, "mask_suffix": "", "mask_format": ".nii.gz", "save_probabilities": True}
    chosen = settings(tmp_path, **{**given, "output_dir": str(tmp_path)})
    with pytest.raises(OutputError, match=r"of p1/image` to be apart from the images, but .* both read and written"):
        start.check_inference(BundleCases(str(tmp_path), images=named), None, chosen, [])  # type: ignore[arg-type]


def test_nothing_is_tuned_without_validation_cases(bundle: Path, data: Path) -> None:
    found = sentence(["train"], overrides(bundle, data, val_fraction=0, tune_postprocessing=True), bundle)
    assert found == (
        "Expected `tune_postprocessing` to be false without validation cases, but got true: keep some out of the "
        "training by `val_fraction` or `folds`, or list them as `validation`."
    )
    assert not (bundle / "models").exists()


@pytest.mark.parametrize("layout", ["nnU-Net regions and ignore", "partly labelled"])
def test_regions_and_partly_labelled_cases_may_be_tuned_on(layout: str, tmp_path: Path) -> None:
    cases = BundleCases(str(LAYOUTS[layout](tmp_path / "data")), val_fraction=0.34)
    plan = cases.plan([16, 16, 8])
    assert plan.regions or plan.partly_labelled
    start.check_training(cases, plan, settings(tmp_path, val_fraction=0.34, tune_postprocessing=True))
    assert (tmp_path / "m").is_dir()
    run_lock.release_unused()


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, True),
        ({"epochs": 3}, False),
        ({"keep_weights": "last"}, False),
        ({"val_fraction": 0}, False),
    ],
)
def test_a_training_without_a_validation_is_told_so(
    changes: dict[str, Any], warned: bool, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"epochs": 2, "val_interval": 3, "val_fraction": 0.25, "keep_weights": "best", "resume": True, **changes}
    cases = BundleCases(str(data), val_fraction=given["val_fraction"])
    plan, chosen = cases.plan([16, 16, 16]), settings(tmp_path, **given)
    for rank in (0, 1):
        start.check_training(cases, plan, chosen, rank)
    lines = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert (
        lines
        == [
            "No epoch will be validated, because `epochs` is 2 and `val_interval` is 3; the final weights will be "
            "stored even though `keep_weights` is best: lower --val_interval, or raise --epochs."
        ]
        * warned
    )
    run_lock.release_unused()
