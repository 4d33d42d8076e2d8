from __future__ import annotations

import os
import resource
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from places import DOCS

from monai_iou.cli import main


@pytest.fixture
def folders(tmp_path) -> list[str]:
    for i in range(2):
        reference = np.zeros((35, 50, 35), np.uint8)
        reference[8:20, 10 + i : 30, 12:22] = 1
        reference[21:25, 10:30, 12:22] = 2
        for kind, array in (("references", reference), ("predictions", np.roll(reference, 1, axis=0))):
            (tmp_path / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / kind / f"case{i}.nii.gz")
    return [f"--{kind}={tmp_path / kind}" for kind in ("predictions", "references")]


def test_evaluate_writes_everything_and_says_where(folders, tmp_path, capsys):
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "cases.csv", "lesions.csv", "failures.csv", "summary.json", "report.html", "finished",
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "Evaluated 2 of 2 cases."
    assert out.splitlines()[1].startswith("Label 1: mean IoU 0.8")
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    assert err.splitlines()[-1] == "cases 2/2: case1"


def test_a_failed_case_makes_the_exit_code_one(folders, tmp_path, capsys):
    (tmp_path / "predictions" / "case0.nii.gz").unlink()
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("Evaluated 1 of 2 cases.")
    assert "Failed: case0: Expected a prediction for the reference" in err


def test_a_single_truncated_case_ends_with_tables_and_exit_code_one(folders, tmp_path, capsys):
    for kind in ("predictions", "references"):
        (tmp_path / kind / "case1.nii.gz").unlink()
    path = tmp_path / "predictions" / "case0.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Evaluated 0 of 1 cases.",
        "Label 1: mean IoU undefined",
        "Label 2: mean IoU undefined",
        f"Report: {tmp_path / 'out' / 'report.html'}",
    ]
    assert "Failed: case0: Expected" in err
    assert "reshape" not in err


def test_two_small_cases_end_in_time_with_the_import(folders, tmp_path):
    before = seconds_of_children()
    command = [sys.executable, "-m", "monai_iou_command", "evaluate", *folders, f"--output={tmp_path / 'out'}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert seconds_of_children() - before < 15


def seconds_of_children() -> float:
    """Processor time rather than wall time: other work on the machine must not fail the test."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (["--labels=1,x"], 2, "Expected label values, but got '1,x': separate whole numbers by commas, such as 1,2."),
        (
            ["--regions=whole"],
            2,
            "Expected regions, but got 'whole': write a name and its labels, such as whole=1+2,core=2.",
        ),
        (["--regions=a=1,a=2"], 2, "Expected every region to have a name of its own, but got 'a=1,a=2': rename one."),
        (["--labels=1,1"], 2, "Expected every label once in `--labels`, but got 1 again: remove it."),
        (["--images=nowhere"], 2, "Expected `--images` to be a folder of volumes, but got `nowhere`: check the path."),
        (["--labels=1", "--regions=a=1"], 2, "Expected either `--labels` or `--regions`, but got both: keep one."),
        (["--workers=0"], 2, "Expected `--workers` to be 1 or more"),
        (["--resample=prediction"], 2, "'prediction' is not 'reference'"),
        (["--pairs=absent.csv"], 1, "Expected `--pairs` to be a CSV file in UTF-8, but got `absent.csv`"),
        (
            ["--output=/proc/no/such"],
            1,
            "Expected `--output` to be a folder that can be written, but got `/proc/no/such`",
        ),
    ],
)
def test_wrong_options_give_one_sentence(folders, tmp_path, capsys, options, code, text):
    arguments = ["evaluate", *folders, f"--output={tmp_path / 'out'}", *options]
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err


def test_compare_prints_and_writes_the_differences(folders, tmp_path, capsys):
    for name in ("a", "b"):
        main(["evaluate", *folders, f"--output={tmp_path / name}", "--labels=1"])
    capsys.readouterr()
    out = tmp_path / "comparison"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), f"--output={out}", "--metrics=iou,dice"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path / 'b'}, label 1, iou: +0.0000 (+0.0000 to +0.0000), corrected p = 1"
    assert lines[-1] == f"Report: {out / 'comparison.html'}"
    assert {path.name for path in out.iterdir()} == {"comparison.csv", "comparison.html"}
    assert main(["compare", str(tmp_path / "a"), f"--output={out}"]) == 1
    assert "Expected two or more evaluated folders, but got 1" in capsys.readouterr().err


def test_a_bar_is_shown_on_a_terminal(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 0
    assert "Scoring cases" in capsys.readouterr().err


def test_help_names_every_option():
    source = DOCS / "evaluation.md"
    from monai_iou.cli import cli

    text = source.read_text(encoding="utf-8")
    for command in ("evaluate", "compare"):
        for option in cli.commands[command].params:
            if option.opts[0].startswith("--"):
                assert f"`{option.opts[0]}" in text, f"{option.opts[0]} is not in docs/evaluation.md"
