"""The demo: its volumes are what it says, the run is whole, the command prints and refuses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, run_in_browser
from bundle_runs import SMALL, run_command
from light_import import LIGHT_IMPORT
from matplotlib.image import imread
from scipy import ndimage

from monai_iou import demo
from monai_iou.cli import main
from monai_iou.datasets import phantoms
from monai_iou.files import OutputError
from monai_iou.locks import folder_lock, is_locked

steps: list[tuple[str, bool]] = []  # how each line of the demo begins, and whether it held its folder then


@pytest.mark.parametrize("seed", range(12))
def test_phantoms_have_small_lesions_among_vessels_as_bright(seed: int) -> None:
    phantom = phantoms.make_phantom(seed)
    assert phantom.image.shape == phantom.label.shape == (96, 96, 64)
    assert 0.0002 <= phantom.label.mean() <= 0.005
    lesions, count = ndimage.label(phantom.label, np.ones((3, 3, 3)))
    assert 1 <= count <= 5
    spacing = np.linalg.norm(phantom.affine[:3, :3], axis=0)
    volumes = ndimage.sum_labels(phantom.label, lesions, range(1, count + 1)) * spacing.prod()
    diameters = (6 * volumes / np.pi) ** (1 / 3)
    assert (diameters < 15).all()
    brightness = phantom.image[phantom.label > 0].mean()
    as_bright = (np.abs(phantom.image - brightness) < 15) & (ndimage.binary_dilation(phantom.label, iterations=2) == 0)
    assert as_bright.sum() > (phantom.label > 0).sum(), "brightness alone must not find the lesions"
    off_axis = phantom.affine[:3, :3] / spacing
    assert np.abs(off_axis).max(axis=0).min() < 0.999, "the grid must be oblique"


def test_phantoms_are_the_same_each_time() -> None:
    first, second = phantoms.make_phantom(3), phantoms.make_phantom(3)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.label, second.label)
    assert not np.array_equal(first.label, phantoms.make_phantom(4).label)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> demo.DemoResult:
    """A demo of a few seconds, in a folder that the user gave by a relative path."""
    output = tmp_path_factory.mktemp("demo") / "out#1"
    shape = {"training": 3, "evaluation": 2, "shape": (32, 32, 24)}

    def say(line: str) -> None:
        steps.append((line[:3], is_locked(output)))

    with pytest.MonkeyPatch.context() as here:
        here.chdir(output.parent)
        return demo.run_demo(output.name, say, settings={**SMALL, "pictures": 1}, dataset=shape)


def test_demo_scores_and_masks(result: demo.DemoResult) -> None:
    assert [score.case for score in result.scores] == ["phantom_03", "phantom_04"]
    assert all(0 <= score.iou <= score.dice <= 1 for score in result.scores)
    assert any(score.untrained_iou != score.iou for score in result.scores)
    assert sorted(path.name for path in result.masks.iterdir()) == ["phantom_03.nii.gz", "phantom_04.nii.gz"]
    assert result.mean_iou == pytest.approx(np.mean([score.iou for score in result.scores]))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH")
def test_report_curves_and_summary_open_in_a_browser(result: demo.DemoResult, tmp_path: Path) -> None:
    curves = result.curves
    assert imread(curves).std() > 0.05, "something is drawn"
    look = """
    found.heading = document.querySelector('h1').textContent;
    const pictures = Array.from(document.images);
    if (document.readyState !== 'complete') await new Promise((resolve) => addEventListener('load', resolve));
    found.widths = pictures.map((picture) => picture.naturalWidth);
    """
    for page, heading in ((result.report, "valuation"), (curves.with_name("summary.html"), "Training")):
        content, console = run_in_browser(page, tmp_path, look)
        assert content["problems"] == []
        assert heading in str(content["heading"])
        assert "Refused" not in console
        if page.name == "summary.html":  # its first picture is that of the curves
            assert content["widths"][0] == imread(curves).shape[1]


@pytest.mark.slow
def test_demo_prints_a_command_that_can_be_pasted_and_does_the_same(result: demo.DemoResult, tmp_path: Path) -> None:
    copy = shutil.copytree(result.masks.parent, tmp_path / result.masks.parent.name)
    trained = copy / "bundle" / "models" / "model.pt"
    before = trained.stat().st_mtime_ns
    # Not of its own folder, whose `#` the command writes in another form.
    words = shlex.split(result.command.replace(str(result.masks.parents[1]), str(tmp_path)))
    assert words[0] == "python"
    done = run_command([sys.executable, *words[1:]])
    assert done.returncode == 0, done.stderr
    assert trained.stat().st_mtime_ns > before


def test_demo_replaces_its_own_folder_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").touch()
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "to be a new folder or an earlier demo's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("words", "option"), [(["demo", "--output"], "--output"), (["init"], "DIR")])
def test_a_folder_that_cannot_be_made_is_named(
    words: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "new"
    assert main([*words, str(folder)]) == 1
    expected = f"Expected `{option}` to be a folder that can be written, but got `{folder}` (Not a directory): choose"
    assert f"{expected} another folder." in " ".join(capsys.readouterr().err.split())


def test_demo_takes_a_folder_that_a_file_manager_has_looked_into(tmp_path: Path) -> None:
    left = (".DS_Store", "desktop.ini", "Thumbs.db")
    for folder in (tmp_path / "new", demo._fresh_folder(tmp_path / "earlier")):
        folder.mkdir(exist_ok=True)
        for name in left:
            (folder / name).touch()
        assert demo._fresh_folder(folder) == folder
        assert {path.name for path in folder.iterdir()} == {demo.MARKER, *left}


def test_demo_deletes_no_file_that_it_did_not_write(tmp_path: Path) -> None:
    for name in (*demo.WRITTEN, "my_run", "thesis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / demo.MARKER).touch()
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"^Expected") as raised:
        demo.run_demo(tmp_path)
    assert str(raised.value) == (
        f"Expected `{tmp_path}` to hold nothing but an earlier demo, which is replaced, but got `my_run` in it: move "
        "that elsewhere, or name another folder."
    )
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_demo_replaces_an_earlier_one_but_not_what_its_links_lead_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    folder = demo._fresh_folder(tmp_path / "demo")
    (folder / "masks").symlink_to(tmp_path / "elsewhere")
    (folder / "bundle").mkdir()
    assert demo._fresh_folder(folder) == folder
    assert [path.name for path in folder.iterdir()] == [demo.MARKER]
    assert (tmp_path / "elsewhere" / "file").is_file()


HOLD = f"""
{LIGHT_IMPORT}
import sys
from pathlib import Path
from monai_iou.locks import folder_lock
with folder_lock(Path(sys.argv[1]), "a demo"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_demo_leaves_the_one_that_is_running_alone(
    result: demo.DemoResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert steps == [(f"{step}/5", True) for step in range(1, 6)]
    folder = demo._fresh_folder(tmp_path / "demo")
    (folder / "dataset").mkdir()
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert main(["demo", "--output", str(folder)]) == 1
        assert process.stdin is not None
        process.stdin.close()
    pattern = (
        rf"Error: Expected `{folder}` to be used by one run at a time, but a demo by process {process.pid} on "
        rf"{re.escape(socket.gethostname())} has been using it since \S+: wait until that run has ended, or name "
        r"another folder\.\n"
    )
    assert re.fullmatch(pattern, capsys.readouterr().err)
    assert {path.name for path in folder.iterdir()} == {demo.MARKER, "dataset"}


def test_a_demo_leaves_a_training_of_an_earlier_one_alone(tmp_path: Path) -> None:
    models = demo._fresh_folder(tmp_path) / "bundle" / "models"
    models.mkdir(parents=True)
    with folder_lock(models, "training"), pytest.raises(OutputError, match="to be used by one run at a time"):
        demo.run_demo(tmp_path)
    assert models.is_dir()
    assert demo._fresh_folder(tmp_path) == tmp_path
    assert {path.name for path in tmp_path.iterdir()} == {demo.MARKER}


def test_the_pages_of_a_demo_have_paths_as_the_user_gave_them(result: demo.DemoResult) -> None:
    summary = json.loads(result.report.with_name("summary.json").read_text(encoding="utf-8"))
    named = {name: summary["options"][name] for name in ("predictions", "references")}
    assert named == {"predictions": "out#1/masks", "references": "out#1/dataset/labelsTs"}
    for page in (result.report, result.curves.with_name("summary.html")):
        assert str(result.masks.parents[1]) not in page.read_text(encoding="utf-8")


def test_the_folder_of_a_demo_is_what_it_deletes(result: demo.DemoResult) -> None:
    assert {path.name for path in result.masks.parent.iterdir()} == {demo.MARKER, *demo.WRITTEN}


def test_command_prints_the_table(
    result: demo.DemoResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda output, say: result)
    assert main(["demo"]) == 0
    shown = capsys.readouterr().out
    assert "phantom_03" in shown
    assert f"Mean IoU {result.mean_iou:.3f}" in shown
    assert result.command in shown
    assert shown.rstrip().endswith(f"Report: {result.report}\nCurves: {result.curves}")
    assert result.report.read_text(encoding="utf-8").count('<details class="fold picture"') >= 1
    assert result.curves.read_bytes().startswith(b"\x89PNG")


def test_init_copies_the_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "mine")]) == 0
    assert str(tmp_path / "mine" / "configs" / "train.json") in capsys.readouterr().out
    assert (tmp_path / "mine" / "configs" / "metadata.json").is_file()
    assert main(["init", str(tmp_path / "mine")]) == 1
    assert "new or empty folder" in capsys.readouterr().err


@pytest.mark.slow
def test_full_demo_finds_the_lesions(tmp_path: Path) -> None:
    result = demo.run_demo(tmp_path / "demo")
    assert result.mean_iou >= 0.5
    assert result.mean_iou > 10 * np.mean([score.untrained_iou for score in result.scores])
