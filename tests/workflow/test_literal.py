"""Paths of any signs, as MONAI's parser and its command line hand them on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.bundle import ConfigParser
from monai.bundle.utils import ID_SEP_KEY

from monai_iou.commands import keys as commands
from monai_iou.commands.command_lines import bundle_line
from monai_iou.workflow import settings
from monai_iou.workflow.literal import PATHS, literal, with_literal_paths
from monai_iou.workflow.running import run_configs

SIGNS = [
    "a#1.nii.gz",
    "$HOME.nii.gz",
    "@data",
    "%data",
    "a@#b",
    "it's \\#1",
    "x%#y",
    "import #1",
    "data\udcff#",
    "n\n#",
]


def parsed(value: Any) -> Any:
    """What MONAI makes of a value in a config, also where another key takes it up."""
    parser = ConfigParser({"given": value, "taken": {"inner": "@given"}})
    assert parser.get_parsed_content("taken")["inner"] == parser.get_parsed_content("given")
    return parser.get_parsed_content("given")


@pytest.mark.parametrize("text", SIGNS)
def test_each_sign_is_handed_on(text: str) -> None:
    value = [{"case": text, "image": [text, "plain.nii.gz"]}, text]
    assert (parsed(literal(text)), parsed(literal(value))) == (text, value)


@given(st.lists(st.text(alphabet="#$@%:\\'\"a/ .", min_size=1), min_size=1))
def test_any_text_is_handed_on(texts: list[str]) -> None:
    assert parsed(literal(texts)) == texts
    assert parsed(literal(texts[0])) == texts[0]


def test_the_parser_would_change_them() -> None:
    assert ConfigParser({"given": SIGNS[0]}).get_parsed_content("given") == f"a{ID_SEP_KEY}1.nii.gz"


def test_plain_paths_and_the_users_own_expressions_stay_as_they_are() -> None:
    keys = {"images": ["a b.nii.gz", "50%.nii.gz"], "dataset_dir": "me@home/d", "my_folder": "$@bundle_root + '/c'"}
    assert with_literal_paths(keys) == keys
    assert with_literal_paths({"models": ["a#"]})["models"].startswith("$")


@pytest.mark.parametrize("text", SIGNS)
@pytest.mark.parametrize("name", commands.PATHS)
def test_every_key_of_a_path_takes_its_name_as_it_is(name: str, text: str) -> None:
    assert parsed(with_literal_paths({name: text})[name]) == text


def test_the_commands_know_the_same_keys_of_paths() -> None:
    assert commands.PATHS == settings.PATHS == PATHS


@pytest.mark.filterwarnings("ignore:Default logging file:UserWarning")
@pytest.mark.parametrize("name", ["a#1", "$a", "@a", "%a"])
def test_a_run_gets_its_paths(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"images": None, "seen": {"_target_": "builtins.dict", "images": "@images", "beside":
                                "$@dataset_dir + '/labels'"}, "dataset_dir": "", "run": ["$@seen"]}))  # fmt: skip
    images = [{"case": "c", "image": [f"{name}.nii.gz"]}]
    workflow = run_configs([path], {"images": images, "dataset_dir": name}, "inference")
    assert workflow.parser.get_parsed_content("seen") == {"images": images, "beside": f"{name}/labels"}


@pytest.mark.parametrize("name", ["a#1", "$a", "@a", "%a", "it's #1"])
def test_the_line_that_is_shown_hands_them_on_too(name: str) -> None:
    from fire.parser import DefaultParseValue

    line = bundle_line([f"{name}/train.json"], {"dataset_dir": name, "images": [f"{name}.nii.gz"]})
    words = shlex.split(line)
    read = {key: DefaultParseValue(words[words.index(f"--{key}") + 1]) for key in ("dataset_dir", "images")}
    assert {key: parsed(value) for key, value in read.items()} == {"dataset_dir": name, "images": [f"{name}.nii.gz"]}
    files = DefaultParseValue(words[words.index("--config_file") + 1])
    assert (files[0] if isinstance(files, list) else files) == f"{name}/train.json"
