"""Streams that nobody reads, that cannot be written, or that are closed: the work is done, and stderr is quiet."""

from __future__ import annotations

import errno
import io
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from light_import import LIGHT_IMPORT

from monai_iou.bundle_files import trained_model_path
from monai_iou.cli import main
from monai_iou.console import progress
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.evaluation.request import Progress
from monai_iou.streams import Output, is_terminal, outlasting
from monai_iou.workflow import bars
from monai_iou.workflow.bars import outlast_readers
from monai_iou.workflow.held_out import to_stderr

posix = pytest.mark.skipif(os.name == "nt", reason="descriptors of a POSIX system")
MONAI_IOU = [sys.executable, "-m", "monai_iou.cli"]
STREAMS = f"{LIGHT_IMPORT}import logging, os\nfrom monai_iou.streams import outlasting\n"


@pytest.fixture
def unread():
    """The writing end of a pipe whose reader has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=3, evaluation=1, shape=(32, 32, 24))


def predict(data: Path, output: Path) -> list[str]:
    return [*MONAI_IOU, "predict", str(trained_model_path("hippocampus_mr")), str(data / "imagesTs"),
            f"--output={output}", "--device=cpu"]  # fmt: skip


@posix
@pytest.mark.slow
@pytest.mark.parametrize("with_stderr", [False, True])
def test_a_reader_that_ends_early_costs_no_mask(data: Path, tmp_path: Path, unread: int, with_stderr: bool) -> None:
    command = predict(data, tmp_path / "masks")
    errors = unread if with_stderr else subprocess.PIPE
    done = subprocess.run(command, stdout=unread, stderr=errors, text=True, check=False)
    assert done.returncode == 0
    assert not done.stderr
    assert [path.name for path in (tmp_path / "masks").glob("*.gz")] == ["phantom_03.nii.gz"]


@posix
@pytest.mark.slow
def test_closed_streams_cost_no_mask(data: Path, tmp_path: Path) -> None:
    command = f"exec {' '.join(predict(data, tmp_path / 'masks'))} <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 0
    assert (tmp_path / "masks" / "phantom_03.nii.gz").is_file()


@posix
@pytest.mark.slow
def test_a_closed_stderr_costs_no_scores(data: Path, tmp_path: Path) -> None:
    labels = str(data / "labelsTs")
    words = [*MONAI_IOU, "evaluate", "-p", labels, "-r", labels, "-o", str(tmp_path / "out"), "2>&-"]
    done = subprocess.run(["/bin/sh", "-c", f"exec {' '.join(words)}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("Evaluated 1 of 1 cases.\n")
    assert (tmp_path / "out" / "report.html").is_file()


@posix
@pytest.mark.slow
@pytest.mark.parametrize("bundle", [False, True])
def test_a_reader_that_ends_during_a_training_costs_no_scores(data: Path, tmp_path: Path, bundle: bool) -> None:
    small = ["--epochs=2", "--patch_size=[16,16,16]", "--device=cpu", "--base_channels=4"]
    command = [*MONAI_IOU, "train", str(data), f"--output={tmp_path / 'run'}", *small]
    if bundle:
        assert main(["init", str(tmp_path / "run")]) == 0
        config = tmp_path / "run" / "configs" / "train.json"
        command = [sys.executable, "-m", "monai.bundle", "run", f"--config_file={config}", f"--dataset_dir={data}"]
        command += small
    errors = tmp_path / "errors"
    with errors.open("w") as stream, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream) as process:
        assert process.stdout is not None
        last = b"Checking" if bundle else b"epoch 1/2"
        assert any(last in line for line in process.stdout)
        process.stdout.close()
        assert process.wait() == 0
    assert "Traceback" not in errors.read_text()
    assert "Errno" not in errors.read_text()
    written = "run/eval/summary.html" if bundle else "run/validation/report.html"
    assert (tmp_path / written).is_file()


@posix
@pytest.mark.parametrize("flags", [[], ["-u"]])
def test_every_way_to_print_outlasts_the_reader(unread: int, flags: list[str]) -> None:
    code = (
        f"{STREAMS}with outlasting() as outputs:\n"
        "    handler = logging.StreamHandler(sys.stdout)\n"
        "    for _ in range(3):\n"
        "        handler.handle(logging.LogRecord('a', 20, '', 0, 'a line', None, None))\n"
        "        print('a line', flush=True)\n"
        "        os.write(1, b'of a C library')\n"
        "print('behind it')\n"
        "assert outputs['stdout'].failure is None\n"
    )
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, stdout=unread, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_a_terminal_that_was_closed_is_no_full_disk() -> None:
    main_end, terminal = os.openpty()
    code = f"{STREAMS}import monai_iou.commands.group as group; sys.stdin.read(); sys.exit(group.main(['--version']))"
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], stdout=terminal, text=True, **pipes) as process:
        os.close(terminal)
        os.close(main_end)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named_at_every_call_and_keeps_its_descriptor() -> None:
    code = (
        f"{STREAMS}import monai_iou.commands.group as group\n"
        "codes = [group.main(['--version']) for _ in range(2)]\n"
        "assert codes == [1, 1], codes\n"
        "assert os.path.sameopenfile(1, os.open('/dev/full', os.O_WRONLY))\n"
    )
    with open("/dev/full", "wb") as full:  # noqa: PTH123 - a device
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Expected to print the results") == 2


@posix
def test_a_socket_without_a_reader_is_no_full_disk() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    command = [sys.executable, "-c", f"{STREAMS}import monai_iou.commands.group as g; sys.exit(g.main(['--version']))"]
    done = subprocess.run(command, stdout=theirs.fileno(), stderr=subprocess.PIPE, text=True, check=False)
    theirs.close()
    assert (done.returncode, done.stderr) == (0, "")
    output = Output(os.open(os.devnull, os.O_WRONLY), "wb")
    assert output._is_unread(ConnectionResetError(errno.ECONNRESET, "reset"))
    output.close()


def test_a_log_file_that_is_not_open_yet_stays_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_iou.workflow.bars.is_bundle_command", lambda: True)
    monkeypatch.setattr(sys, "stderr", None)
    handler = logging.FileHandler(tmp_path / "own.log", delay=True)
    logger = logging.getLogger("own")
    logger.addHandler(handler)
    outlast_readers()
    logger.error("a line")
    logger.removeHandler(handler)
    handler.close()
    assert (tmp_path / "own.log").read_text() == "a line\n"


@posix
@pytest.mark.parametrize("words", [["--version"], ["--help"], ["evaluate", "--help"]])
def test_a_command_that_only_prints_is_quiet(unread: int, words: list[str]) -> None:
    code = f"{LIGHT_IMPORT}from monai_iou.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=unread, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_the_next_file_does_not_get_the_place_of_a_closed_stream(tmp_path: Path) -> None:
    code = f"{STREAMS}with outlasting(), open({str(tmp_path / 'mask')!r}, 'w') as mask: assert mask.fileno() > 2"
    (tmp_path / "code.py").write_text(code)
    command = f"exec {sys.executable} {tmp_path / 'code.py'} <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == 0


@pytest.mark.parametrize("name", ["stdin", "stdout", "stderr"])
def test_streams_that_are_not_the_processs_own_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = io.StringIO()
    monkeypatch.setattr(sys, name, own)
    with outlasting():
        assert getattr(sys, name) is own
    monkeypatch.setattr(sys, name, None)
    with outlasting():
        assert getattr(sys, name) is not None
    assert getattr(sys, name) is None


def test_without_stderr_progress_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_terminal(sys.stderr)
    with progress() as show:
        show(Progress("cases", 1, 2, "a"))
    to_stderr("a line")
    handler = logging.StreamHandler()
    handler.stream = None
    assert not bars._is_terminal(handler)
    assert capsys.readouterr().out == ""
