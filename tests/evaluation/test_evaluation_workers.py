from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest

from monai_iou.evaluation import case_files, workers
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


@pytest.mark.usefixtures("forked_workers")
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


class Pictures:
    """What a task returns; a plain object has no weak references."""


def test_results_that_were_taken_are_not_kept():
    """With the pictures of some thousand cases, they would fill the memory."""
    pool = workers._Processes(2)
    with ThreadPoolExecutor(2) as threads:
        pool._pool = threads
        taken, alive = [], []
        for _, result in pool._round(Pictures, {str(i): () for i in range(20)}):
            taken.append(weakref.ref(result))
            alive.append(sum(one() is not None for one in taken))
            del result
    assert len(taken) == 20
    assert max(alive) == 1


def test_scheduler_without_dask_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SchedulerError) as error, runner(scheduler="tcp://127.0.0.1:1"):
        pass
    assert str(error.value) == (
        "Expected Dask for `--scheduler`, but it is not installed: "
        "run `pip install '.[cluster]'` in a clone of the repository, here and on the workers."
    )


@pytest.fixture
def cluster(tmp_path):
    """A Dask scheduler and two workers of one thread each, as processes on loopback."""
    pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'")
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
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_cluster_that_loses_a_worker_loses_no_case(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("monai_iou.evaluation.cluster.CONNECT_SECONDS", 60)  # its processes have just been started
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
    deadline = time.monotonic() + 600
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
    pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'")
    monkeypatch.setattr("monai_iou.evaluation.cluster.CONNECT_SECONDS", 1)
    message = r"Dask scheduler at `tcp://127\.0\.0\.1:9`, but got no answer: start"
    with pytest.raises(SchedulerError, match=message), runner(scheduler="tcp://127.0.0.1:9"):
        pass


@contextlib.contextmanager
def answering(speak) -> Iterator[str]:
    """A port of loopback; `speak` gets each connection."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(20)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    held.append(connection)
                    speak(connection)

        held: list[socket.socket] = []
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join(5)
            for connection in held:
                connection.close()


@pytest.mark.parametrize(
    ("speak", "text"),
    [
        (lambda connection: None, "what accepts connections there does not greet as one: check the port"),
        (lambda connection: connection.close(), "does not greet as one"),
        (lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n"), "something else answers there"),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n"), "something else answers there"),
    ],
)
def test_what_is_no_scheduler_is_named_in_time(monkeypatch, speak, text):
    pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'")
    monkeypatch.setattr("monai_iou.evaluation.cluster.CONNECT_SECONDS", 1)
    with answering(speak) as address:
        with pytest.raises(SchedulerError) as error, runner(scheduler=address):
            pass
        assert text in str(error.value)
        assert f"`{address}`" in str(error.value)


@pytest.mark.parametrize(
    "address", ["tls://host:8786", "ucx://host:8786", "http://host", "host", "tcp://host:x", "", "a b"]
)
def test_other_addresses_are_refused(address):
    pytest.importorskip("distributed", reason="Dask is not installed: pip install '.[cluster]'")
    with (
        pytest.raises(SchedulerError, match="to be an address such as tcp://host:8786, but got"),
        runner(scheduler=address),
    ):
        pass


SCRIPT = """
import sys
from pathlib import Path
from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.request import Request

{guard}done = evaluate_folders(Request(Path("predictions"), Path("references"), Path("out"), workers=2))
{indent}print("ROWS", len(done.rows), done.notes)
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told(tmp_path):
    save_cases(tmp_path, count=2)
    (tmp_path / "script.py").write_text(SCRIPT.format(guard="", indent=""), encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ROWS 2 ")
    assert 'has no `if __name__ == "__main__":` around its work' in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, sys, time\nsys.path.insert(0, sys.argv[1])\n"
        "from test_evaluation_workers import note_and_sleep\nfrom monai_iou.evaluation.workers import runner\n"
        "if __name__ == '__main__':\n"
        "    with runner(workers=2) as run:\n"
        "        list(run(note_and_sleep, {str(i): (sys.argv[2],) for i in range(2)}))\n",
        encoding="utf-8",
    )
    marks = tmp_path / "marks"
    marks.mkdir()
    support = Path(__file__).parent
    with subprocess.Popen([sys.executable, "script.py", str(support), str(marks)], cwd=tmp_path) as parent:
        deadline = time.monotonic() + 600
        while not (workers := [int(path.name) for path in marks.iterdir()]):
            assert time.monotonic() < deadline, "no worker started"
            time.sleep(0.1)
        parent.kill()
        parent.wait(10)
    deadline = time.monotonic() + 30
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.1)


INTERRUPTED = """
import signal
import sys
sys.path.insert(0, sys.argv[1])
from test_evaluation_workers import evaluate_slowly
from monai_iou.cli import main
from monai_iou.evaluation import evaluate

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore it
    evaluate.evaluate_files = evaluate_slowly
    sys.exit(main(["evaluate", "-p", "predictions", "-r", "references", "-o", "out", "--workers", "2"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_ends_the_command_and_its_workers_and_keeps_the_finished_cases(tmp_path, monkeypatch):
    """The workers ignore the signal, and the interpreter waits for them before it exits."""
    save_cases(tmp_path, count=6)
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "script.py").write_text(INTERRUPTED, encoding="utf-8")
    monkeypatch.setenv("MARKS", str(marks))
    command = [sys.executable, "script.py", str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as parent:
        try:
            deadline = time.monotonic() + 600
            while len(list(marks.iterdir())) < 2 or not list((tmp_path / "out").glob("finished/*.jsonl")):
                assert time.monotonic() < deadline, "the slow cases never started"
                assert parent.poll() is None
                time.sleep(0.1)
            parent.send_signal(signal.SIGINT)
            _, said = parent.communicate(timeout=60)
        finally:
            parent.kill()
    assert parent.returncode == 130
    assert "Traceback" not in said
    assert said.endswith("Aborted.\n")
    assert len(list((tmp_path / "out" / "finished").iterdir())) == 1
    deadline = time.monotonic() + 30
    while any(is_alive(int(path.name)) for path in marks.iterdir()):
        assert time.monotonic() < deadline, "a worker outlived the command"
        time.sleep(0.1)


def evaluate_slowly(case: str, *arguments: object) -> object:
    """The first case as usual; the others never end."""
    if case == "case00":
        return case_files.evaluate_files(case, *arguments)
    return note_and_sleep(os.environ["MARKS"])


def note_and_sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(300)


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def test_no_more_processes_than_processors(monkeypatch, tmp_path):
    monkeypatch.setattr("monai_iou.evaluation.workers.available_cores", lambda: 1)
    with runner(workers=64) as run:
        assert dict(run(slow_square, {"a": (3, tmp_path)})) == {"a": 9}
    assert run.notes == ["64 worker processes were asked for, but there is one processor."]
    assert (tmp_path / f"3-{os.getpid()}").exists()
    monkeypatch.setattr("monai_iou.evaluation.workers.available_cores", lambda: 2)
    with runner(workers=64) as run:
        assert run.notes == ["64 worker processes were asked for, and 2 were used, one per processor."]
