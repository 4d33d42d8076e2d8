"""Paths that the command line reads as something else are refused, not taken for another folder."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from monai_iou.workflow import settings, typed_words
from monai_iou.workflow.settings import Settings

LINK = "rename the folder, or make a link to it under another name."
NAME = "write --output_dir ./NAME for a folder called by a number or a word such as None."


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    def typed(text: str) -> None:
        monkeypatch.setattr("sys.argv", ["monai/bundle/__main__.py", "run", *shlex.split(text)])

    monkeypatch.setattr(settings, "is_bundle_command", lambda: True)
    return typed


def test_messages_name_what_the_command_that_runs_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert typed_words.switch_on("resume") == "--resume", "of `monai-iou train`"
    assert typed_words.output_key("ckpt_dir") == "--output"
    monkeypatch.setattr(typed_words, "is_bundle_command", lambda: True)
    assert typed_words.switch_on("resume") == "--resume true"
    assert typed_words.output_key("ckpt_dir") == "--ckpt_dir"


@pytest.mark.parametrize(
    ("typed", "value", "message"),
    [
        ("--output_dir x#y", "x", f"to be 'x#y' as it was typed, but the command line read 'x': {LINK}"),
        ("--output_dir=7#2", 7, f"to be '7#2' as it was typed, but the command line read 7: {LINK}"),
        ("--output-dir 2024_01", 202401, f"to be '2024_01' as it was typed, but the command line read 202401: {NAME}"),
        ("--output_dir 0x10", 16, f"to be '0x10' as it was typed, but the command line read 16: {NAME}"),
        ("--output_dir a --output_dir 1e3", 1000.0, f"the command line read 1000.0: {NAME}"),
        ("--models fold#0", "fold", f"to be 'fold#0' as it was typed, but the command line read 'fold': {LINK}"),
    ],
)  # fmt: skip
def test_another_folder_than_the_one_that_was_typed_is_refused(
    typed: str, value: Any, message: str, command: Any
) -> None:
    command(typed)
    name = "models" if "models" in typed else "output_dir"
    with pytest.raises(SystemExit) as caught:
        Settings(**{name: value})
    assert str(caught.value).startswith(f"monai_iou: Expected `{name}` to be ")
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("--output_dir out", "out"),
        ("--output_dir ./2024_01", "./2024_01"),
        ("--output_dir 2024", 2024),
        ("--output_dir \"'a b'\"", "a b"),
        ("--output_dir '$@bundle_root + 1'", "/bundle/eval"),
        ("--dataset_dir x", "any"),
    ],
)
def test_what_was_typed_is_taken(typed: str, value: Any, command: Any) -> None:
    command(typed)
    assert Settings(output_dir=value).output_dir == str(value)


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("epochs", "--epochs %params.json#epochs", 5),
        ("epochs", "--epochs \"'%params.json#epochs'\"", 5),
        ("val_interval", "--val_interval @train#trainer#max_epochs", 2),
        ("images", "--images %images.json#images", ["a.nii.gz", "b.nii.gz"]),
        ("output_dir", "--output_dir '$@train#name'", "/x"),
    ],
)
def test_what_monai_resolves_is_not_cut(name: str, typed: str, value: Any, command: Any) -> None:
    command(typed)
    assert getattr(Settings(**{name: value}), name) == value


def test_lists_and_separators_keep_their_own_checks(command: Any) -> None:
    command("--models \"['a#b','c']\" --output_dir /x#y")
    assert Settings(models=["a#b", "c"]).models == ["a#b", "c"]
    with pytest.raises(SystemExit, match="Expected `output_dir` to be a path without `#` and `::`"):
        Settings(output_dir="/x::y")
