"""Keys of the bundle on the command line of `monai-iou train`, read before anything heavy is imported."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner
from places import DOCS

from monai_iou.bundle_files import bundle_path
from monai_iou.cli import cli, main
from monai_iou.commands.command_lines import bundle_line
from monai_iou.commands.keys import (
    INFERENCE_SETS,
    PARTS,
    PATHS,
    STORED,
    check_values,
    known_keys,
    names_keys,
    own_options,
    plain_values,
    read_keys,
    words_of_keys,
)
from monai_iou.commands.predict import predict
from monai_iou.commands.train import UNTIMED, _check_cells, _is_begun, _keys, train
from monai_iou.workflow import settings

KNOWN = known_keys([])


def keys_of(words: list[str], tmp_path: Path) -> dict[str, Any]:
    with train.make_context("train", [str(tmp_path), *words]) as context:
        return _keys(context, tmp_path, context.params)


def test_keys_are_read_as_monai_reads_them() -> None:
    words = ["--patch_size", "[24, 24, 16]", "--learning_rate=1e-3", "--amp", "true", "--loss::_target_", "IoULoss"]
    assert read_keys(words, KNOWN, []) == {
        "patch_size": [24, 24, 16],
        "learning_rate": 1e-3,
        "amp": "true",
        "loss::_target_": "IoULoss",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [("2024_01", "2024_01"), ("007", "007"), ("1e3", "1e3"), ("'a b'", "a b"), ("None", None), ("null", "null")],
)
def test_a_path_is_the_text_that_was_typed(text: str, value: str | None) -> None:
    assert read_keys(["--cache_dir", text], KNOWN, []) == read_keys([f"--cache_dir={text}"], KNOWN, [])
    assert read_keys(["--cache_dir", text], KNOWN, []) == {"cache_dir": value}
    assert PATHS == settings.PATHS


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--epoch", "3"], "Expected an option or a key of the bundle, but got --epoch: perhaps you meant --epochs."),
        (["--lerning_rate=1"], "perhaps you meant --learning_rate."),
        (["--fold", "1", "--oputput", "x"], "perhaps you meant --output."),
        (["--quite::other", "1"], "but got --quite::other: docs/bundle.md lists the keys."),
        (["--ckpt_dir", "x"], "the command sets `ckpt_dir` itself: use --output."),
        (["--batch_size"], "Expected a value after --batch_size, but the command line ends: add it."),
        (["stray"], "Expected options and keys with their values, but got 'stray'"),
    ],
)
def test_what_is_no_key_is_refused_with_a_suggestion(words: list[str], sentence: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        read_keys(words, KNOWN | {"fold"}, ["output", "epochs"])
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--resume", "false"], "Expected --resume without a value, but got 'false': leave --resume out."),
        (["--resume=True"], "Expected --resume without a value, but got 'True': write --resume alone."),
        (["--overwrite", "true", "--epochs", "3"], "--overwrite without a value, but got 'true': write --overwrite al"),
        (
            ["--patch_size", "16", "24", "8", "--epochs", "3"],
            'Expected one value after --patch_size, but got 16 24 8: write the list as one word, "[16,24,8]".',
        ),
        (
            ["--patch_size=[16,", "24,", "8]"],
            'Expected one value after --patch_size, but got 16 24 8: write the list as one word, "[16,24,8]".',
        ),
        (["--batch_size", "2", "x"], "but got 'x': write the name of its key before it."),
    ],
)
def test_a_word_too_many_is_answered_with_what_to_write(words: list[str], sentence: str, tmp_path: Path) -> None:
    for line in ([str(tmp_path), *words], [*words, str(tmp_path)]):
        found = CliRunner().invoke(cli, ["train", *line])
        assert found.exit_code == 2
        if "'x'" not in sentence or line[0] == str(tmp_path):  # else that word is the folder
            assert sentence in found.output


def test_a_folder_that_is_called_by_a_number_is_not_blamed_for_a_word_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "904").mkdir()
    found = CliRunner().invoke(cli, ["train", "--batch_size", "2", "904", "--epochs", "3", "junk"])
    assert found.exit_code == 2
    assert "but got 'junk': write the name of its key before it." in found.output
    found = CliRunner().invoke(cli, ["train", "--patch_size", "16", "24", "8", "data"])
    assert 'write the list as one word, "[16,24,8]".' in found.output


def test_a_folder_may_be_called_by_a_number_behind_a_key(tmp_path: Path) -> None:
    (tmp_path / "2024").mkdir()
    with train.make_context("train", ["--batch_size", "2", str(tmp_path / "2024"), "--resume"]) as context:
        assert _keys(context, context.params["dataset"], context.params) == {"batch_size": 2}
    with train.make_context("train", ["--batch_size", "2", "2024"]) as context:
        assert context.params["dataset"] == Path("2024")
        assert not context.args


def test_a_plan_is_timed_with_plain_keys_alone() -> None:
    plain = {"sw_batch_size": 1, "validate#inferer#device": "cpu", "amp": False, "cache_dir": None}
    resolved = {
        "device": "@mine",
        "loss": {"_target_": "IoULoss"},
        "patch_size": [8, 8, 8],
        "epochs": "$1 + 1",
        "x": "%a",
    }
    assert plain_values({**plain, **resolved}) == plain


def test_a_users_config_adds_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"my_width": 3, "+imports": [], "train#inferer": {}}), encoding="utf-8")
    assert known_keys([path]) == KNOWN | {"my_width"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "it holds no object, {...}"),
        ("\ufeff{}", "it begins with a byte-order mark, which MONAI does not read"),
        ('{"\xfc": 1}', "'utf-8' codec can't decode byte 0xfc in position 2: invalid start byte"),
    ],
)
def test_a_config_that_holds_no_keys_is_named(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text, encoding="latin-1" if "\xfc" in text else "utf-8")
    remedy = {"'": "save it in UTF-8", "it begins": "save it without the mark"}
    remedy = next((told for start, told in remedy.items() if why.startswith(start)), "correct it")
    for read in (known_keys, lambda paths: names_keys({}, paths)):
        with pytest.raises(click.UsageError) as caught:
            read([path])
        assert str(caught.value) == (
            f"Expected `--config` to be a JSON file of the bundle's keys, but got `{path}` ({why}): {remedy}."
        )


@pytest.mark.parametrize("name", ["case_repeats", "network_def#dropout", "+instance", "epochs"])
def test_minutes_are_not_given_for_another_training_than_the_one_that_is_timed(name: str, tmp_path: Path) -> None:
    key = name.lstrip("+").split("#")[0]
    sentence = (
        f"Expected no key beside `--minutes` that changes how long a training takes, but got `{key}`: leave it out, "
        "because the plan is what is timed, or give --epochs instead of --minutes."
    )
    config = tmp_path / "mine.json"
    config.write_text(json.dumps({name: 3}), encoding="utf-8")
    for words in [["--config", str(config)], *([[f"--{name}", "3"]] if key != "epochs" else [])]:
        with pytest.raises(click.UsageError) as caught:
            keys_of(["--minutes", "5", *words], tmp_path)
        assert str(caught.value) == sentence
        keys_of([*words, "--seed", "1"], tmp_path)
    assert keys_of(["--minutes", "5", "--learning_rate", "0.1"], tmp_path) == {"learning_rate": 0.1}


def test_a_training_that_has_begun_with_such_a_key_goes_on(tmp_path: Path) -> None:
    assert not _is_begun(tmp_path / "run")
    for place in ("models", "fold1/models"):
        checkpoint = tmp_path / place / "last_epoch.pt"
        checkpoint.parent.mkdir(parents=True)
        checkpoint.touch()
        assert _is_begun(tmp_path)
        checkpoint.unlink()


@pytest.mark.parametrize(("again", "code"), [(["--overwrite"], 2), ([], 1), (["--overwrite", "--resume"], 1)])
def test_a_training_that_is_replaced_is_timed_anew(
    again: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is no dataset, at which what goes on ends, after the check of the command line."""
    (tmp_path / "run" / "models").mkdir(parents=True)
    (tmp_path / "run" / "models" / "last_epoch.pt").touch()
    (tmp_path / "data").mkdir()
    words = [str(tmp_path / "data"), "-o", str(tmp_path / "run"), "--minutes", "5", "--batch_size", "8"]
    assert main(["train", *words, *again]) == code
    assert ("Expected no key beside `--minutes`" in capsys.readouterr().err) == (code == 2)


def test_keys_that_change_a_trainings_length_are_keys_of_the_bundle() -> None:
    assert set(UNTIMED) <= KNOWN
    assert len(set(UNTIMED)) == len(UNTIMED)


def test_keys_may_stand_anywhere_among_options_and_images() -> None:
    words = ["--sw_batch_size", "1", "run", "-o", "masks", "a.nii", "--amp=false", "--format", ".mha", "b.nii", "--tta"]
    with predict.make_context("predict", [*words, "--device", "cpu", "--", "--c.nii"]) as context:
        assert words_of_keys(context) == ["--sw_batch_size", "1", "--amp=false", "--device", "cpu"]
        assert [path.name for path in context.params["images"]] == ["a.nii", "b.nii", "--c.nii"]
        assert context.params["run"].name == "run"
        assert context.params["output"].name == "masks"
        assert context.params["tta"]
        assert context.params["ending"] == ".mha"
    with train.make_context("train", ["--batch_size", "2", "data", "--folds", "3", "stray"]) as context:
        assert words_of_keys(context) == ["--batch_size", "2"]
        assert context.args == ["stray"]
        assert (context.params["dataset"].name, context.params["folds"]) == ("data", 3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--sw_batchsize", "1"], "perhaps you meant --sw_batch_size."),
        (
            ["--epochs", "1"],
            "Expected a key of inference.json, but got `epochs`, which is one of train.json: give it to "
            "`monai-iou train`.",
        ),
        (
            ["--evaluate_on=validation"],
            "Expected a key of inference.json, but got `evaluate_on`, which is one of evaluate.json: give it to "
            "`python -m monai.bundle run` with evaluate.json.",
        ),
        (["--fold", "1"], "a key of inference.json, but got `fold`, which is one of train.json: use --folds."),
        (["--tta_flips", "true"], "the command sets `tta_flips` itself: use --tta."),
        (["--images", "a"], "the command sets `images` itself: use IMAGES."),
        *(
            (
                [f"--{name}", "8"],
                f"Expected no key that is stored with the model, but got `{name}`: leave it out, or name another RUN.",
            )
            for name in STORED
        ),
    ],
)
def test_predict_refuses_what_is_no_key_of_inference(words: list[str], sentence: str) -> None:
    known = known_keys([], "inference")
    assert {*INFERENCE_SETS, *STORED} <= known
    with pytest.raises(click.UsageError) as caught:
        read_keys(words, known, own_options_of(predict), "inference")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("key", "config", "remedy"),
    [
        ("mask_format", "inference", "use --format of `monai-iou predict`"),
        ("tta_flips", "inference", "use --tta of `monai-iou predict`"),
        ("images", "inference", "use IMAGES of `monai-iou predict`"),
        ("load_pretrain", "inference", "give it to `monai-iou predict`"),
        ("evaluate_on", "evaluate", "give it to `python -m monai.bundle run` with evaluate.json"),
    ],
)
def test_a_key_of_another_config_is_answered_with_who_takes_it(key: str, config: str, remedy: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        read_keys([f"--{key}", "x"], KNOWN, own_options_of(train))
    expected = f"Expected a key of train.json, but got `{key}`, which is one of {config}.json: {remedy}."
    assert str(caught.value) == expected


def test_the_parts_below_validate_are_those_of_inference() -> None:
    train_keys = json.loads((bundle_path() / "configs" / "train.json").read_text())
    assert set(PARTS) == known_keys([], "inference") & set(train_keys["validate"])


@pytest.mark.parametrize(
    ("command", "shipped", "key", "meant"),
    [
        (train, "train", "inferer#device", "validate#inferer#device"),
        (train, "train", "+inferer::sw_device", "validate#inferer#sw_device"),
        (train, "train", "dataset", "dataset_dir"),
        (predict, "inference", "validate#inferer#device", "inferer#device"),
    ],
)
def test_a_key_that_another_config_has_elsewhere_is_answered_with_its_place(
    command: click.Command, shipped: str, key: str, meant: str
) -> None:
    with pytest.raises(click.UsageError) as caught:
        read_keys([f"--{key}", "x"], known_keys([], shipped), own_options_of(command), shipped)
    expected = f"Expected an option or a key of the bundle, but got --{key}: perhaps you meant --{meant}."
    assert str(caught.value) == expected


def own_options_of(command: click.Command) -> list[str]:
    return own_options(click.Context(command))


@pytest.mark.parametrize(("command", "shipped"), [(train, "train"), (predict, "inference")])
def test_every_key_of_the_page_is_taken_or_answered_with_who_takes_it(command: click.Command, shipped: str) -> None:
    """`mask_format` was answered with "perhaps you meant --memory_format"."""
    table = (DOCS / "bundle.md").read_text(encoding="utf-8").split("| key | default | meaning |")[1].split("\n\n")[0]
    keys = {key for row in table.splitlines()[2:] for key in re.findall("`([a-z_]+)`", row.split("|")[1])}
    known, sets = known_keys([], shipped), INFERENCE_SETS if shipped == "inference" else {}
    others = keys - known - set(sets) - set(own_options_of(command))
    assert {"evaluate_on", "score_trained_cases"} <= others
    assert ("seed" if shipped == "inference" else "save_probabilities") in others
    for key in others:
        with pytest.raises(click.UsageError) as caught:
            read_keys([f"--{key}", "x"], known, own_options_of(command), shipped)
        start = re.escape(f"Expected a key of {shipped}.json, but got `{key}`, which is one of ")
        named = re.match(start + r"(\w+)\.json: (give|use) ", str(caught.value))
        assert named is not None, str(caught.value)
        assert key in known_keys([], named[1])


@pytest.mark.parametrize(("command", "config"), [("train", "train.json"), ("predict", "inference.json")])
def test_the_help_names_the_config_whose_keys_are_options(command: str, config: str) -> None:
    told = " ".join(CliRunner().invoke(cli, [command, "--help"]).output.split())
    assert f"Every key of the bundle's {config} is an option too, such as --" in told


@pytest.mark.parametrize("again", [[], ["--memory-gb", "8"], ["--memory-gb", "8", "--resume"], ["--overwrite"]])
def test_a_training_on_a_gpu_that_is_not_there_is_refused_before_anything_is_prepared(
    again: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice was to give --memory-gb, with which the command planned, copied the bundle, and then ended."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "data").mkdir()
    words = ["train", str(tmp_path / "data"), "-o", str(tmp_path / "run"), "--epochs", "1", "--device", "cuda", *again]
    found = CliRunner().invoke(cli, words)
    assert found.exit_code == 2
    assert found.output.endswith(
        "Error: Expected a GPU for `--device cuda`, but torch finds none: write `--device cpu`, or leave `--device` "
        "out; `monai-iou plan` can plan for another machine.\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["train", ".", "--validate#inferer#device", "gpu"], "validate#inferer#device"),
        (["train", ".", "--validate::inferer::sw_device=gpu"], "validate#inferer#sw_device"),
        (["train", ".", "--config", "mine.json"], "validate#inferer#device"),
        (["train", ".", "--transform_device", "gpu"], "transform_device"),
        (["predict", ".", "x.nii", "--inferer#device", "gpu"], "inferer#device"),
        (["predict", ".", "x.nii", "--inferer#sw_device", "gpu"], "inferer#sw_device"),
        (["predict", ".", "x.nii", "--device", "gpu"], "device"),
    ],
)
def test_a_device_that_is_not_there_is_a_wrong_line_and_nothing_is_done(
    words: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an inferer ended a training at its first validation, and a prediction with tracebacks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "mine.json").write_text(json.dumps({"validate#inferer#device": "gpu"}), encoding="utf-8")
    (tmp_path / "x.nii").touch()
    found = CliRunner().invoke(cli, words)
    assert found.exit_code == 2
    assert found.output.endswith(
        f"Error: Expected `{key}` to be cpu, as torch can use no CUDA GPU here, but got 'gpu': write --{key} cpu, or "
        f"leave --{key} out for the default.\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "x.nii"}


def test_a_line_can_be_pasted() -> None:
    import shlex

    line = bundle_line(["my run/a.json", "it's.json"], {"flag": True, "none": None, "names": ["a b", "c"], "n": 1e-3})
    words = shlex.split(line)
    assert words[:6] == ["python", "-m", "monai.bundle", "run", "--config_file", "['my run/a.json', \"it's.json\"]"]
    assert words[6:] == ["--flag", "true", "--none", "null", "--names", "['a b','c']", "--n", "0.001"]


@pytest.mark.parametrize("name", ["train", "predict", "evaluate", "compare", "plan", "demo", "class-weights"])
def test_every_command_with_an_output_takes_o(name: str) -> None:
    assert "-o, --output " in CliRunner().invoke(cli, [name, "--help"]).output


@pytest.mark.parametrize("name", ["train", "plan"])
def test_a_dataset_is_named_alike_in_every_command(name: str) -> None:
    assert re.search(rf"^Usage: .* {name} \[OPTIONS\] DATASET", CliRunner().invoke(cli, [name, "--help"]).output)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", ".", "--batch_size", "0"], "Expected `batch_size` to be an integer of at least 1, but got 0: leave"),
        (["train", ".", "--learning_rate", "nan"], "Expected `learning_rate` to be a positive number, but got 'nan': "),
        (["train", ".", "--val_fraction=1"], "Expected `val_fraction` to be a number from 0 to less than 1, but got 1"),
        (["train", ".", "--amp", "maybe"], "Expected `amp` to be true or false, but got 'maybe': write --amp true or"),
        (["train", ".", "--config", "mine.json"], "Expected `ema_decay` to be null or a number between 0 and 1, but"),
        (["predict", ".", "x.nii", "--sw_batch_size", "0"], "Expected `sw_batch_size` to be an integer of at least 1"),
        (["predict", ".", "x.nii", "--sw_overlap", "1"], "Expected `sw_overlap` to be a number from 0 to less than 1"),
    ],
)
def test_a_setting_out_of_its_range_is_a_wrong_line_and_nothing_is_done(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended with 1, after minutes of planning."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps({"ema_decay": 2}), encoding="utf-8")
    (tmp_path / "x.nii").touch()
    found = CliRunner().invoke(cli, words)
    assert found.exit_code == 2
    assert sentence in found.output
    assert {path.name for path in tmp_path.iterdir()} == {"mine.json", "x.nii"}


@pytest.mark.parametrize("shipped", ["train", "inference"])
def test_what_the_bundle_takes_or_resolves_is_no_wrong_setting(shipped: str) -> None:
    config = json.loads((bundle_path() / "configs" / f"{shipped}.json").read_text(encoding="utf-8"))
    check_values(config, shipped)
    for sign in "$@%":
        check_values(dict.fromkeys(config["settings"], f"{sign}x"), shipped)
    check_values({"batch_size::x": 0, "+epochs": 0, "mine": -1, "sw_overlap": ["@x", 0.5]}, shipped)


MACHINE_NUMBERS = [("--memory-gb", "give GiB, such as 8"), ("--minutes", "give minutes, such as 30")]
FOLD_NUMBERS = [("--folds", 2, "give 2 or more folds, usually 5"), ("--fold", 0, "count folds from 0")]
WRONG_NUMBERS = [
    *(
        ([command, ".", option, value], f"'{option}': Expected a positive number, but got '{value}': {remedy}.")
        for command in ("plan", "train")
        for option, remedy in MACHINE_NUMBERS
        for value in ("-1", "0", "nan", "inf", "much")
    ),
    *(
        (
            [command, ".", option, value],
            f"'{option}': Expected a whole number of at least {least}, but got '{value}': {remedy}.",
        )
        for command in ("plan", "train")
        for option, least, remedy in FOLD_NUMBERS
        for value in (str(least - 1), "nan", "2.5")
    ),
    (["train", ".", "--epochs", "0"], "Expected a whole number of at least 1, but got '0': leave --epochs out for"),
    *(
        ([command, ".", "--folds", "3", "--fold", "3"], "`--fold` to be below `--folds 3`, but got 3: count from 0.")
        for command in ("plan", "train")
    ),
    *(
        ([command, ".", "--fold", "1"], "`--folds` to be given with `--fold 1`, but it is not: add --folds 5 or drop")
        for command in ("plan", "train")
    ),
    *(
        (
            ["predict", ".", "x", "--folds", value],
            f"Expected all or numbers of folds, but got '{value}': write for instance 0,1,2.",
        )
        for value in ("abc", "0,", "-1", "fold0", "")
    ),
    *(
        (
            ["class-weights", ".", "--beta", value],
            f"Expected a number of at least 0 and below 1, but got '{value}': give for instance 0.9999.",
        )
        for value in ("nan", "1", "-0.1", "inf")
    ),
]


def refused_by(lines: list[list[str]], folder: Path) -> str:
    """Give command lines to the command in a process that must not import the package; return what it says of each."""
    code = (
        "import sys, monai_iou_command\n"
        f"for words in {lines}:\n"
        "    print('status', monai_iou_command.main(words), file=sys.stderr)\n"
        "assert 'monai_iou' not in sys.modules and 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_number_out_of_its_range_is_a_wrong_line_and_nothing_is_done(tmp_path: Path) -> None:
    """Some ended with 1, after all volumes were read or with a copy of the bundle in a new folder."""
    said_by_all = refused_by([words for words, _ in WRONG_NUMBERS], tmp_path)
    assert list(tmp_path.iterdir()) == []
    *said, end = re.split(r"^status (?=\d)", said_by_all, flags=re.MULTILINE)
    assert end == "2\n"
    assert all(text.startswith("2\n") for text in said[1:])
    for (words, sentence), text in zip(WRONG_NUMBERS, said, strict=True):
        assert sentence in text, words


@pytest.mark.parametrize("words", [["--regions", "whole=1+2"], ["--config", "mine.json"]])
def test_regions_of_labels_are_refused_before_anything_is_planned(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(json.dumps({"regions": "whole=1+2"}), encoding="utf-8")
    found = CliRunner().invoke(cli, ["train", ".", *words])
    assert found.exit_code == 2
    assert (
        "Expected `regions` to be voronoi or blob, the cells of lesions, but got 'whole=1+2': choose one; unions of "
        "labels are named in `regions` of dataset.json.\n"
    ) in found.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
    for cells in ("blob", "voronoi", "$'blob'", "@my_cells"):
        _check_cells({"regions": cells, "instance": True})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "train",
            "--folds N Number of folds of a cross-validation, all of which are trained: 5 trains the folds 0 to 4.",
        ),
        (
            "predict",
            "--folds all|0,1 Numbers of the folds, counted from 0, whose models are averaged: 2 takes the model",
        ),
        ("train", "--memory-gb GIB Memory of the GPU, or RAM, in GiB (2^30 bytes). Default: what is free now."),
        ("plan", "--memory-gb GIB Memory of the GPU, or RAM, in GiB (2^30 bytes). Default: what is free now."),
        ("class-weights", "weights level off at 1 / (1 - BETA) voxels per case, which is 10 000 by default."),
    ],
)
def test_the_help_says_what_a_number_is_of(name: str, text: str) -> None:
    assert text in " ".join(CliRunner().invoke(cli, [name, "--help"]).output.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["train", "nowhere"], "Expected DATASET to be a folder of labelled volumes, but got `nowhere`"),
        (["train", ".", "--epoch", "1"], "perhaps you meant --epochs"),
        (["train", ".", "--fold", "1"], "Expected `--folds` to be given with `--fold 1`"),
        (["train", ".", "--folds", "3", "--fold", "3"], "count from 0"),
        (["train", ".", "--config", "no.json"], "Expected `--config` to be a file, but got `no.json`"),
        (["plan", "nowhere"], "Expected DATASET to be a folder of labelled volumes, but got `nowhere`"),
        (["class-weights", "nowhere"], "Expected LABELS_DIR to be a folder of label files, but got `nowhere`"),
        (["describe", "nowhere"], "Expected DIR to be the folder of a trained bundle, but got `nowhere`"),
        (["predict", "nowhere", "scan.nii.gz"], "Expected RUN to be the folder of a training"),
        (["predict", ".", "scan.nii.gz", "--overwite"], "perhaps you meant --overwrite"),
        (["predict", ".", "--overwite", "scan.nii.gz"], "perhaps you meant --overwrite"),
        (["predict", "."], "Expected IMAGES after RUN, but got none"),
    ],
)
def test_a_wrong_line_is_refused_without_importing_the_package(words: list[str], sentence: str, tmp_path: Path) -> None:
    said = refused_by([words], tmp_path)
    assert sentence in said
    assert said.endswith("status 2\n")


@pytest.mark.parametrize("name", ["tracking", "tracking_uri", "tracking-uri", "experiment_name", "run_name"])
@pytest.mark.parametrize("command", ["train", "predict"])
def test_an_option_of_monais_own_command_is_not_taken_for_a_mistyped_key(
    tmp_path: Path, command: str, name: str
) -> None:
    images = [str(tmp_path)] if command == "predict" else []
    found = CliRunner().invoke(cli, [command, str(tmp_path), *images, f"--{name}", "mlflow"])
    assert found.exit_code == 2
    assert found.output.endswith(
        f"Error: Expected an option or a key of the bundle, but got --{name}, which MONAI's own command takes: give it "
        "to `python -m monai.bundle run`, as docs/integrations.md describes.\n"
    )
