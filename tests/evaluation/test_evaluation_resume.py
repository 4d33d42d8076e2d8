"""Which record of an earlier run a case may be taken from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import nibabel
import numpy as np
import pytest

import monai_iou
from monai_iou.evaluation import case_files
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Request
from monai_iou.files import OutputError
from monai_iou.workflow.versions import about_this_run


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    """Two cases; of `b` there is no prediction yet."""
    mask = np.zeros((9, 8, 7), np.uint8)
    mask[2:5, 2:5, 2:5] = 1
    for name in ("references/a", "references/b", "predictions/a"):
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), path)
    return Request(tmp_path / "predictions", tmp_path / "references", tmp_path / "out")


def test_a_prediction_that_cannot_be_read_is_not_one_that_was_missing(request_: Request) -> None:
    """Neither has a hash; the record of the missing one must not become a success."""
    path = request_.predictions / "b.nii.gz"
    (missing,) = evaluate_folders(request_).failures
    assert missing["reason"].startswith("Expected a prediction for the reference")
    path.symlink_to(request_.output / "nowhere.nii.gz")
    for _ in range(2):
        done = evaluate_folders(request_)
        (unreadable,) = done.failures
        assert unreadable["reason"].startswith(f"Expected `{path}` to be a volume, but got no such file")
        assert [row["case"] for row in done.rows] == ["a"]
        assert done.reused == 1
    path.unlink()
    done = evaluate_folders(request_)
    assert (done.failures, done.reused) == ([missing], 1), "the record of the empty prediction is no evaluated case"
    assert done.summary["cases"] == {"paired": 2, "evaluated": 1, "failed": 1, "reused": 1}


def test_packages_that_pip_did_not_install_have_no_version(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a clone on PYTHONPATH."""

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    installed = evaluate_folders(request_).summary["versions"]
    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("monai_iou.versions.version", version)
    done = evaluate_folders(request_)
    assert done.summary["versions"] == {**dict.fromkeys(installed, "not installed"), "monai-iou": monai_iou.__version__}
    assert installed["monai-iou"] == monai_iou.__version__
    assert "not installed" not in installed.values()
    assert done.reused == 1, "the scores depend on no metadata"
    assert about_this_run(["monai-iou"])["versions"]["torch"] == "not installed"


def test_a_prediction_that_was_read_but_not_hashed_is_not_kept_as_missing(
    request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount may come back between the two readings; without the file there must be no score of it later."""
    path = request_.predictions / "b.nii.gz"
    path.write_bytes((request_.predictions / "a.nii.gz").read_bytes())
    original = case_files.file_hash

    def hashed(file: Path) -> str:
        if file == path:
            raise OSError
        return original(file)

    monkeypatch.setattr(case_files, "file_hash", hashed)
    assert [row["iou"] for row in evaluate_folders(request_).rows] == [1.0, 1.0]
    path.unlink()
    done = evaluate_folders(request_)
    assert [failure["case"] for failure in done.failures] == ["b"]
    assert done.summary["labels"]["1"]["iou"]["mean_penalty"] == 0.5


def test_a_file_in_place_of_the_finished_cases_is_named(request_: Request) -> None:
    request_.output.mkdir()
    (request_.output / "finished").touch()
    with pytest.raises(OutputError) as caught:
        evaluate_folders(request_)
    assert str(caught.value) == (
        f"Expected `{request_.output / 'finished'}` to be the folder of the finished cases, but got the error 'File "
        "exists': remove what lies there, or choose another output folder."
    )


@pytest.mark.parametrize(
    ("folder", "text", "typed"),
    [
        (".", "`{here}/a.nii` and `{here}_2/a.nii`", "`./a.nii` and `{here}_2/a.nii`"),
        ("p", "`{here}/p`, {here}/p/b: {here}/p.old/b", "`p`, p/b: {here}/p.old/b"),
        ("p", "`/mnt{here}/p/a.nii`, {here}/p", "`/mnt{here}/p/a.nii`, p"),
    ],
)
def test_a_path_is_shortened_as_a_whole(folder: str, text: str, typed: str) -> None:
    """A folder beside it may have a longer name, which stays as it is."""
    here = Path.cwd()
    request = Request(Path(folder), Path("/references"), Path("out"))
    assert request.as_typed(text.format(here=here)) == typed.format(here=here)
