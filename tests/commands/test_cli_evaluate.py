from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from light_import import LIGHT_IMPORT
from places import DOCS

from monai_iou.cli import main
from monai_iou.locks import folder_lock


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
    assert err.splitlines()[-1] == "Scoring cases 2/2: case1"


def test_a_failed_case_makes_the_exit_code_one(folders, tmp_path, capsys):
    (tmp_path / "predictions" / "case0.nii.gz").unlink()
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("Evaluated 1 of 2 cases.")
    assert "Label 1: mean HD95 35.68 mm, counting 1 undefined or missing score as the worst; 1.00 mm without it" in out
    assert "Failed: case0: Expected a prediction for the reference" in err


def test_a_case_without_a_prediction_is_not_counted_as_evaluated_before(folders, tmp_path, capsys):
    (tmp_path / "predictions" / "case0.nii.gz").unlink()
    for expected in ("Evaluated 1 of 2 cases.", "Evaluated 1 of 2 cases (1 from before)."):
        assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 1
        assert capsys.readouterr().out.splitlines()[0] == expected


def test_an_interrupted_command_ends_with_130_and_goes_on_later(folders, tmp_path, capsys, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    command = ["evaluate", *folders, f"--output={tmp_path / 'out'}"]
    with monkeypatch.context() as patch:
        patch.setattr("monai_iou.evaluation.case_files.read_labels", interrupt)
        assert main(command) == 130
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines()[-1] == "Aborted."
    assert not (tmp_path / "out" / "cases.csv").exists()
    assert main(command) == 0


def test_a_single_truncated_case_ends_with_tables_and_exit_code_one(folders, tmp_path, capsys):
    for kind in ("predictions", "references"):
        (tmp_path / kind / "case1.nii.gz").unlink()
    path = tmp_path / "predictions" / "case0.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Evaluated 0 of 1 cases.",
        *(
            f"Label {label}: mean {score}, counting 1 undefined or missing score as the worst; undefined without it"
            for label in (1, 2)
            for score in ("IoU 0.000", "HD95 70.36 mm")
        ),
        f"Report: {tmp_path / 'out' / 'report.html'}",
    ]
    assert "Failed: case0: Expected" in err
    assert "reshape" not in err


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
        (["--labels="], 2, "Expected label values, but got '': separate whole numbers by commas, such as 1,2."),
        (["--regions="], 2, "Expected regions, but got '': write a name and its labels, such as whole=1+2,core=2."),
        (["--tolerance=1=0.5,1=2"], 2, "Expected one distance for each label, but got '1=0.5,1=2': remove one."),
        (["--labels=1,1"], 2, "Expected every label once in `--labels`, but got 1 again: remove it."),
        (["--images=nowhere"], 2, "Expected `--images` to be a folder of volumes, but got `nowhere`: check the path."),
        (["--labels=1", "--regions=a=1"], 2, "Expected either `--labels` or `--regions`, but got both: keep one."),
        (["--workers=0"], 2, "Expected `--workers` to be 1 or more"),
        (["--resample=prediction"], 2, "Expected reference, but got 'prediction': "),
        (["--pairs=absent.csv"], 2, "Expected `--pairs` to be a file, but got `absent.csv`: check the path."),
        (["--groups=absent.csv"], 2, "Expected `--groups` to be a file, but got `absent.csv`: check the path."),
        (["--predictions=" + "x" * 300], 2, "Expected `--predictions` to be a folder of volumes, but got `xxx"),
        (
            ["--tolerance=1=a"],
            2,
            "Expected a distance in mm, but got '1=a': write one, or one per label such as 1=0.5,2=2.",
        ),
        (["--labels=1", "--tolerance=2=1"], 2, "to name structures that are scored (1), but got 2: correct its name."),
        (["--lables=1"], 2, "--labels"),
        (["--scheduler=host"], 2, "Expected `--scheduler` to be an address such as tcp://host:8786, but got `host`"),
        (
            ["--scheduler=tls://host:1"],
            2,
            "but got `tls://host:1`: give one with a host and a port, of TCP without encryption.",
        ),
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
    assert not (tmp_path / "out").exists()


def test_a_command_line_without_a_command_shows_the_help(capsys):
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    main([])  # 2, before click 8.2 0
    assert "".join(capsys.readouterr()) == help_text


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_names_that_an_output_cannot_encode_are_escaped(folders, tmp_path, monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    path = tmp_path / "\u03a9\udcff.json"
    assert main(["class-weights", str(tmp_path / "references"), f"--output={path}"]) == 0
    shown = str(path).encode(encoding, "backslashreplace").decode(encoding)
    text = stream.buffer.getvalue().decode(encoding)
    assert text.splitlines()[-1] == f'Written: {shown}. In a config: "weight": "%{shown}::weights"'
    assert path.is_file()
    assert stream.errors == "strict"


def test_an_output_inside_the_inputs_is_refused_before_any_work(folders, tmp_path, capsys):
    before = sorted(path for path in tmp_path.rglob("*"))
    for output in ("predictions", "references/results", "predictions/../references"):
        assert main(["evaluate", *folders, f"--output={tmp_path / output}"]) == 2
        assert "Expected `--output` to be apart from the" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cases.csv").write_text("my,own\n", encoding="utf-8")
    assert main(["evaluate", *folders, f"--output={tmp_path / 'other'}"]) == 2
    assert "was not written by an evaluation and would be replaced" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "other")
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_an_earlier_evaluation_of_other_folders_is_named(folders, tmp_path, capsys):
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 0
    assert "This folder held" not in capsys.readouterr().out
    swapped = [f"--predictions={tmp_path / 'references'}", f"--references={tmp_path / 'predictions'}"]
    assert main(["evaluate", *swapped, f"--output={tmp_path / 'out'}"]) == 0
    held = f"Note: This folder held the evaluation of {tmp_path / 'predictions'} against {tmp_path / 'references'}"
    assert held in capsys.readouterr().out


def test_two_evaluations_into_one_folder_do_not_mix(folders, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with folder_lock(tmp_path / "out", "an evaluation"):
        assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 1
    assert "to be used by one run at a time" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cases.csv").exists()
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 0


def test_names_cannot_steer_the_terminal(folders, tmp_path, capsys):
    for kind in ("predictions", "references"):
        (tmp_path / kind / "case0.nii.gz").rename(tmp_path / kind / "\x1b[31mred\r\u202e.nii.gz")
    (tmp_path / "predictions" / "case1.nii.gz").unlink()
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 1
    out, err = capsys.readouterr()
    assert "\\x1b[31mred\\r\\u202e" in err
    assert not any(character in out + err for character in "\x1b\r\u202e")
    assert main(["evaluate", f"--predictions={tmp_path}/\x1b[2J", *folders[1:], f"--output={tmp_path / 'out'}"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_paths_are_shown_as_they_were_typed(folders, tmp_path, monkeypatch, capsys):
    (tmp_path / "predictions" / "case1.nii.gz").write_bytes(b"broken")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "-p", "predictions", "-r", "references", "-o", "out"]) == 1
    out, err = capsys.readouterr()
    written = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.*"))
    assert "`predictions/case1.nii.gz`" in err
    assert str(tmp_path) not in out + err + written


def test_version_help_and_suggestions(capsys):
    import monai_iou

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"monai-iou {monai_iou.__version__}\n"
    assert main(["evaluate", "-h"]) == 0
    assert "-p, --predictions" in capsys.readouterr().out
    assert main(["evalute"]) == 2
    assert "Expected a command, but got 'evalute': perhaps you meant evaluate." in capsys.readouterr().err


def test_the_command_alone_shows_its_help(capsys):
    main([])
    out, err = capsys.readouterr()
    shown = out + err
    assert "\n  evaluate       Score a folder of predictions against references.\n" in shown
    assert "Error" not in shown
    assert "\\n" not in shown


def test_a_wrong_path_is_named_without_the_package(tmp_path):
    code = (
        "import sys, monai_iou_command as c; rc = c.main(['evaluate', '-p', 'absent', '-r', '.', '-o', 'out']);"
        "print(rc, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2 False\n"
    assert "Expected `--predictions` to be a folder of volumes, but got `absent`" in done.stderr


def test_compare_prints_and_writes_the_differences(folders, tmp_path, capsys):
    for name in ("a", "b"):
        main(["evaluate", *folders, f"--output={tmp_path / name}", "--labels=1"])
    capsys.readouterr()
    out = tmp_path / "comparison"
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), f"--output={out}", "--metrics=iou,dice"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "b against a, label 1, IoU: +0.0000 (no interval with fewer than 8 cases), p = 1 corrected"
    assert lines[1] == "b against a, label 1, Dice: +0.0000 (no interval with fewer than 8 cases), p = 1 exploratory"
    assert lines[-1] == f"Report: {out / 'comparison.html'}"
    assert {path.name for path in out.iterdir()} == {"comparison.csv", "paired.csv", "comparison.html"}
    for arguments, text in (
        (["a"], "Expected two or more evaluated folders, but got 1"),
        (["a", "absent"], f"Expected an output folder of `monai-iou evaluate`, but got `{tmp_path / 'absent'}`"),
        (
            ["a", "b", "--primary=speed"],
            "but got speed: choose among these; counts, volumes and columns of a challenge are not compared.",
        ),
        (["a", "b", "--metrics=relative_volume_error"], "to name scores among iou, dice"),
    ):
        paths = [str(tmp_path / name) if "--" not in name else name for name in arguments]
        assert main(["compare", *paths, f"--output={out}"]) == 2
        assert text in capsys.readouterr().err


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


def test_masks_that_are_compared_with_themselves_are_named(folders, tmp_path, capsys):
    note = f"Note: --predictions and --references are the same, {tmp_path / 'references'}: each mask was compared with"
    own = ["-p", str(tmp_path / "references"), "-r", str(tmp_path / "predictions" / ".." / "references")]
    assert main(["evaluate", *own, f"--output={tmp_path / 'own'}"]) == 0
    assert note in capsys.readouterr().out
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}"]) == 0
    out = capsys.readouterr().out
    assert "the same" not in out
    assert "itself" not in out


@pytest.mark.parametrize("how", ["symbolic links", "hard links", "pairs"])
def test_single_masks_that_are_compared_with_themselves_are_counted(folders, tmp_path, capsys, how):
    own, options = tmp_path / "predictions" / "case1.nii.gz", []
    reference = tmp_path / "references" / own.name
    if how == "pairs":
        table = f"prediction,reference\ncase0.nii.gz,case0.nii.gz\n{reference},case1.nii.gz\n"
        (tmp_path / "pairs.csv").write_text(table, encoding="utf-8")
        options = [f"--pairs={tmp_path / 'pairs.csv'}"]
    else:
        own.unlink()
        (own.symlink_to if how == "symbolic links" else own.hardlink_to)(reference)
    assert main(["evaluate", *folders, *options, f"--output={tmp_path / 'out'}"]) == 0
    note = (
        "Note: Cases whose prediction is the file of the reference itself, or a link to it: 1 of 2, such as `case1`. "
        "Each was compared with itself."
    )
    assert note in capsys.readouterr().out.splitlines()


def test_a_class_that_no_file_holds_is_named(folders, tmp_path, capsys):
    arguments = ["class-weights", str(tmp_path / "references"), f"--output={tmp_path / 'weights.json'}"]
    assert main(arguments) == 0
    assert "No file holds" not in capsys.readouterr().out
    for labels, note in (
        ("7,9", "No file holds labels 7 and 9: their weights are 0."),
        ("7", "No file holds label 7: its weight is 0."),
    ):
        assert main([*arguments, f"--labels=0,1,2,{labels}"]) == 0
        assert note in capsys.readouterr().out.splitlines()
    assert main([*arguments[:2], "--output=weights.txt"]) == 2
    assert "to be a .json file, but got `weights.txt`: add the extension" in capsys.readouterr().err


def test_weights_of_a_dataset_of_regions_are_said_to_be_those_of_its_label_values(folders, tmp_path, capsys):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    content = {"channel_names": {"0": "CT"}, "labels": labels, "regions_class_order": [1, 2], "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert main(["class-weights", str(tmp_path / "references"), f"--output={tmp_path / 'weights.json'}"]) == 0
    note = (
        "This dataset has regions instead of classes (whole, core). The weights are those of the label values: do not "
        "give them to a loss of regions."
    )
    assert note in capsys.readouterr().out.splitlines()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_under_stdout_is_one_sentence():
    code = f"{LIGHT_IMPORT}from monai_iou.cli import main; sys.exit(main(['--version']))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "Error: Expected to print the results, but got the error 'No space left on device': free space, or send the "
        "output elsewhere.\n"
    )


@pytest.mark.parametrize("option", ["--output", "--predictions", "--references", "--pairs", "--groups", "--images"])
def test_an_empty_path_is_not_the_current_folder(option, folders, tmp_path, capsys, monkeypatch):
    """As of a variable of the shell that is not set."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["evaluate", *folders, "--output=out", f"{option}="]) == 2
    assert "Expected a path, but got an empty one: write `.` for the current folder." in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_label_twice_in_a_region_is_refused(folders, tmp_path, capsys):
    assert main(["evaluate", *folders, f"--output={tmp_path / 'out'}", "--regions=whole=1+1"]) == 2
    assert (
        "Expected every label of a region once, but got 'whole=1+1': remove one from whole." in capsys.readouterr().err
    )


def test_cases_that_a_table_of_patients_lacks_are_noted(folders, tmp_path, capsys):
    (tmp_path / "patients.csv").write_text("case,patient\ncase0,P\nCase1,P\n")
    options = [f"--output={tmp_path / 'out'}", f"--groups={tmp_path / 'patients.csv'}"]
    assert main(["evaluate", *folders, *options]) == 0
    note = f"Cases without a patient in `{tmp_path / 'patients.csv'}`: 1 of 2, such as case1."
    assert f"Note: {note}" in capsys.readouterr().out
    assert note in json.loads((tmp_path / "out" / "summary.json").read_text())["notes"][-1]


def test_two_files_are_one_case(folders, tmp_path, capsys):
    files = [f"{folder}/case0.nii.gz" for folder in folders]
    assert main(["evaluate", *files, f"--output={tmp_path / 'out'}"]) == 0
    assert capsys.readouterr().out.startswith("Evaluated 1 of 1 cases.")
    assert main(["evaluate", files[0], folders[1], f"--output={tmp_path / 'out2'}"]) == 2
    assert (
        f"Expected `--predictions` and `--references` to be two folders or two volumes, but got the volume "
        f"`{files[0].removeprefix('--predictions=')}` and the folder `{folders[1].removeprefix('--references=')}`: "
        "name the folder above the volume, or one volume of the folder."
    ) in capsys.readouterr().err
    assert main(["evaluate", files[0], "--references=nowhere", f"--output={tmp_path / 'out2'}"]) == 2
    assert "Expected `--references` to be a folder of volumes, but got `nowhere`" in capsys.readouterr().err
    (tmp_path / "pairs.csv").touch()
    options = [f"--pairs={tmp_path / 'pairs.csv'}", f"--output={tmp_path / 'out2'}"]
    assert main(["evaluate", files[0], folders[1], *options]) == 2
    assert "whose paths start at them, but got the file `" in capsys.readouterr().err


def test_two_dicom_series_are_one_case(folders, tmp_path, capsys):
    image = SimpleITK.ReadImage(str(tmp_path / "references" / "case0.nii.gz"))
    writer = SimpleITK.ImageFileWriter()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(image.GetDepth()):
            part = image[:, :, index]
            for tag, value in (
                ("0008|0060", "OT"), ("0020|000e", f"1.2.{len(name)}.{ord(name)}"), ("0020|0013", str(index)),
                ("0020|0032", f"0\\0\\{index}"), ("0020|0037", "1\\0\\0\\0\\1\\0"), ("0018|0050", "1"),
            ):  # fmt: skip
                part.SetMetaData(tag, value)
            writer.KeepOriginalImageUIDOn()
            writer.SetFileName(str(tmp_path / name / f"{index:03d}.dcm"))
            writer.Execute(part)
    options = [f"--predictions={tmp_path / 'a'}", f"--references={tmp_path / 'b'}", f"--output={tmp_path / 'out'}"]
    assert main(["evaluate", *options]) == 0
    assert capsys.readouterr().out.startswith("Evaluated 1 of 1 cases.")
    options[0] = f"--predictions={tmp_path / 'references' / 'case0.nii.gz'}"
    assert main(["evaluate", *options, "--resample", "reference"]) == 0, "a file and a series are a pair too"
    assert main(["evaluate", f"--predictions={tmp_path / 'predictions'}", *options[1:]]) == 2
    message = (
        f"two folders or two volumes, but got the volume `{tmp_path / 'b'}` and the folder `{tmp_path / 'predictions'}`"
    )
    assert message in capsys.readouterr().err
