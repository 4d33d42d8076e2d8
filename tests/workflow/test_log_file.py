"""`log.txt` of a training: what ended it stands there too."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from monai_iou.workflow import settings
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.log_file import close_log, log_failure, log_file, open_log
from monai_iou.workflow.running import run_configs

IMPORTS = ["$import monai_iou", "$import monai_iou.workflow.settings"]
SENTENCE = "Expected `resume` to be true or false, but got 'perhaps': write --resume true or --resume false."


def test_the_sentence_that_ends_a_run_of_our_commands_is_logged_once(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    failing = "$monai_iou.workflow.settings.is_true('perhaps', 'resume')"
    config.write_text(json.dumps({"imports": IMPORTS, "run": [failing]}))
    open_log(tmp_path)
    with pytest.raises(ValueError, match="Expected `resume`"):
        run_configs([config], {}, "inference")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.partition(" ERROR ")[2] for line in lines] == [SENTENCE]


def test_so_is_that_of_monais_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_log(tmp_path / "..").info("of another run")
    open_log(tmp_path)
    monkeypatch.setattr(settings, "is_bundle_command", lambda: True)
    with pytest.raises(SystemExit, match="monai_iou: Expected `resume`"), settings.exit_with_message():
        settings.is_true("perhaps", "resume")
    (line,) = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert line.endswith(f"ERROR {SENTENCE}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_log_that_cannot_be_written_is_no_failure_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").symlink_to("/dev/full")
    logger = open_log(tmp_path)
    log_failure(ValueError("Expected room"))
    logger.log(logging.INFO, "more")
    assert capsys.readouterr().err == ""
    (tmp_path / "log.txt").unlink()
    open_log(tmp_path).info("of the next run")
    assert "of the next run" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Default logging file:UserWarning")
def test_no_run_writes_into_the_log_of_a_training_before_it(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"run": ["$1 / 0"]}))
    for kind in ("train", "inference"):
        open_log(tmp_path)
        if kind == "inference":  # as the command does when it has trained; its own masks are made before
            close_log()
        with pytest.raises(ConfigError, match="but got ZeroDivisionError"):
            run_configs([config], {}, kind)
        assert log_file() is None
        assert (tmp_path / "log.txt").read_text(encoding="utf-8") == ""
