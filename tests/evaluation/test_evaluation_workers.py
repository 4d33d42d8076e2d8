from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.results import Progress, Request
from monai_iou.evaluation.workers import SchedulerError, TaskError, runner


def slow_square(value: int, folder: Path) -> int:
    """Leaves a mark when it starts, with the process that runs it."""
    (folder / f"{value}-{os.getpid()}").touch()
    time.sleep(0.2)
    return value * value


def dangerous_square(value: int, folder: Path) -> int:
    """13 always kills its process, 7 the first time."""
    if value == 13 or (value == 7 and not (folder / "died").exists()):
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return slow_square(value, folder)


def test_tasks_run_here_with_one_worker(tmp_path):
    with runner() as run:
        assert dict(run(slow_square, {"a": (3, tmp_path)})) == {"a": 9}
    assert (tmp_path / f"3-{os.getpid()}").exists()


def test_errors_of_this_package_are_given_as_they_are():
    def complain(error: Exception) -> None:
        raise error

    with runner() as run:
        results = dict(run(complain, {"ours": (ValueError("Expected a\n b."),), "other": (KeyError("k"),)}))
    assert results == {"ours": TaskError("Expected a b."), "other": TaskError("KeyError: 'k'")}


def test_processes_share_the_work_and_one_that_dies_loses_no_task(tmp_path):
    with runner(workers=2) as run:
        first = dict(run(slow_square, {str(i): (i, tmp_path) for i in range(6)}))
        shared = {path.name.split("-")[1] for path in tmp_path.iterdir()}
        second = dict(run(dangerous_square, {str(i): (i, tmp_path) for i in (5, 7, 13)}))
    assert first == {str(i): i * i for i in range(6)}
    assert len(shared) <= 2
    assert str(os.getpid()) not in shared
    assert "died twice: give it more memory" in second.pop("13").reason
    assert second == {"5": 25, "7": 49}


def test_scheduler_without_dask_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SchedulerError) as error, runner(scheduler="tcp://127.0.0.1:1"):
        pass
    assert str(error.value) == (
        "Expected Dask for `--scheduler`, but it is not installed: "
        'pip install "monai-iou[cluster]", here and on the workers.'
    )


@pytest.fixture
def cluster(tmp_path):
    """A Dask scheduler and two workers of one thread each, as processes on loopback."""
    pytest.importorskip("distributed", reason="Dask is not installed: pip install monai-iou[cluster]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    common = ["--local-directory", str(tmp_path / "dask"), "--no-dashboard", "--nthreads", "1", "--nworkers", "1"]
    commands = [
        ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", address.split(":")[2], "--no-dashboard"],
        *[["distributed.cli.dask_worker", address, "--no-nanny", "--name", name, *common] for name in ("one", "two")],
    ]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", *command],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
            for command in commands
        ]
        try:
            yield address, processes
        finally:
            for process in processes:
                process.kill()


# distributed leaves its event loop's sockets to the garbage collector when a worker is killed under it.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cluster_that_loses_a_worker_loses_no_case(cluster, tmp_path):
    address, (_, first, second) = cluster
    both_work(address, tmp_path)
    save_cases(tmp_path, count=16)

    def kill(step: Progress) -> None:
        if step.stage == "cases" and step.done == 4:
            second.kill()

    folders = tmp_path / "predictions", tmp_path / "references"
    there = evaluate_folders(Request(*folders, tmp_path / "there", scheduler=address), kill)
    evaluate_folders(Request(*folders, tmp_path / "here"))
    assert there.failures == []
    assert first.poll() is None
    assert second.wait(5) == -signal.SIGKILL
    for name in ("cases.csv", "lesions.csv", "failures.csv"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()


def both_work(address: str, folder: Path) -> None:
    marks = folder / "marks"
    marks.mkdir()
    deadline = time.monotonic() + 120
    with runner(scheduler=address) as run:
        while len({path.name.split("-")[1] for path in marks.iterdir()}) < 2:
            assert time.monotonic() < deadline, "the second worker never came"
            assert dict(run(slow_square, {str(i): (i, marks) for i in range(4)})) == {str(i): i * i for i in range(4)}


def save_cases(folder: Path, count: int) -> None:
    for kind, shift in (("references", 0), ("predictions", 1)):
        (folder / kind).mkdir()
        for case in range(count):
            labels = np.zeros((40, 40, 40), np.uint8)
            labels[8 + shift : 30, 8 : 12 + case, 9:31] = 1
            nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / kind / f"case{case:02}.nii")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_scheduler_that_is_not_there_is_named(monkeypatch):
    pytest.importorskip("distributed", reason="Dask is not installed: pip install monai-iou[cluster]")
    monkeypatch.setattr("monai_iou.evaluation.workers.CONNECT_SECONDS", 1)
    message = r"Dask scheduler at `tcp://127\.0\.0\.1:9`, but got no answer: start"
    with pytest.raises(SchedulerError, match=message), runner(scheduler="tcp://127.0.0.1:9"):
        pass
