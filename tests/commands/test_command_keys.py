"""Keys of the bundle on the command line of `monai-iou train`, read before anything heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from monai_iou.commands.keys import known_keys, read_keys
from monai_iou.commands.lines import bundle_line

KNOWN = known_keys([])


def test_keys_are_read_as_monai_reads_them() -> None:
    words = ["--patch_size", "[24, 24, 16]", "--learning_rate=1e-3", "--amp", "true", "--loss::_target_", "IoULoss"]
    assert read_keys(words, KNOWN, []) == {
        "patch_size": [24, 24, 16],
        "learning_rate": 1e-3,
        "amp": "true",
        "loss::_target_": "IoULoss",
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--epoch", "3"], "Expected an option or a key of the bundle, but got --epoch: perhaps you meant --epochs."),
        (["--lerning_rate=1"], "perhaps you meant --learning_rate."),
        (["--fold", "1", "--oputput", "x"], "perhaps you meant --output."),
        (["--quite::other", "1"], "but got --quite::other: docs/bundle.md lists the keys."),
        (["--ckpt_dir", "x"], "it sets `ckpt_dir` itself: use --output."),
        (["--batch_size"], "Expected a value after --batch_size, but the command line ends: add it."),
        (["stray"], "Expected options and keys with their values, but got 'stray'"),
    ],
)
def test_what_is_no_key_is_refused_with_a_suggestion(words: list[str], sentence: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        read_keys(words, KNOWN | {"fold"}, ["output", "epochs"])
    assert sentence in str(caught.value)


def test_a_users_config_adds_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"my_width": 3, "+imports": [], "train#inferer": {}}), encoding="utf-8")
    assert known_keys([path]) == KNOWN | {"my_width"}
    path.write_text("{", encoding="utf-8")
    with pytest.raises(click.UsageError, match="Expected `--config` to be a JSON file"):
        known_keys([path])


def test_a_line_can_be_pasted() -> None:
    import shlex

    line = bundle_line(["my run/a.json", "it's.json"], {"flag": True, "none": None, "names": ["a b", "c"], "n": 1e-3})
    words = shlex.split(line)
    assert words[:6] == ["python", "-m", "monai.bundle", "run", "--config_file", "['my run/a.json', \"it's.json\"]"]
    assert words[6:] == ["--flag", "true", "--none", "null", "--names", "['a b','c']", "--n", "0.001"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "nowhere"], "Expected DATASET to be a folder of labelled volumes, but got `nowhere`"),
        (["train", ".", "--epoch", "1"], "perhaps you meant --epochs"),
        (["train", ".", "--fold", "1"], "Expected `--folds` to be given with `--fold 1`"),
        (["train", ".", "--folds", "3", "--fold", "3"], "count from 0"),
        (["train", ".", "--config", "no.json"], "Expected `--config` to be a file, but got `no.json`"),
        (["plan", "nowhere"], "Expected DATASET_DIR to be a folder of labelled volumes, but got `nowhere`"),
        (["class-weights", "nowhere"], "Expected LABELS_DIR to be a folder of label files, but got `nowhere`"),
        (["describe", "nowhere"], "Expected DIR to be the folder of a trained bundle, but got `nowhere`"),
        (["predict", "nowhere", "scan.nii.gz"], "Expected RUN to be the folder of a training"),
    ],
)
def test_a_wrong_line_is_refused_without_importing_the_package(words: list[str], sentence: str, tmp_path: Path) -> None:
    code = (
        "import sys, monai_iou_command\n"
        f"status = monai_iou_command.main({words})\n"
        "assert status == 2, status\n"
        "assert 'monai_iou' not in sys.modules and 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sentence in result.stderr
