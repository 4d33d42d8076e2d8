"""Worker processes of a training's loaders: only the training ends them, whoever signals the whole job."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bundle_runs import overrides
from forked_runs import finish, fork
from ignite.engine import Events
from monai.bundle import ConfigWorkflow
from monai.data.dataloader import DataLoader
from places import ROOT

from monai_iou.workflow.checkpoint_files import last_epoch
from monai_iou.workflow.dataloader import BufferedLoader, LastingLoader
from monai_iou.workflow.lasting_workers import LastingStart
from monai_iou.workflow.stopping import stop_signals

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="has no signals to a whole job"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning"),
]
METHODS = ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forkserver", "spawn"))]  # imports torch
LOADERS = [BufferedLoader, LastingLoader]


PLACES = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests" / "support")])


class Slowd:
    """A transform that takes a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        return item


class Pids(torch.utils.data.Dataset[int]):
    """The process that makes each item, of which the one at `hangs` never comes."""

    def __init__(self, hangs: int = -1) -> None:
        self.hangs = hangs

    def __getitem__(self, index: int) -> int:
        if index == self.hangs:
            time.sleep(600)
        return os.getpid()

    def __len__(self) -> int:
        return 20


def kill(pid: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Signal a process as a scheduler does: not from its parent."""
    subprocess.run(["kill", f"-{number.value}", str(pid)], check=True)


def is_running(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def ended(pid: int) -> bool:
    return wait_until(lambda: not is_running(pid), 30.0)


def note(worker: int) -> None:
    os.environ["OF_WORKER"] = str(worker)


class Noted(Pids):
    def __getitem__(self, index: int) -> int:
        return int(os.environ.get("OF_WORKER", -1))


class Started(Pids):
    """The exit code of a program that a transform starts and terminates."""

    def __getitem__(self, index: int) -> int:
        program = subprocess.Popen(["sleep", "60"])
        program.terminate()
        return program.wait(30)

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_signal_to_all_processes_leaves_the_workers(kind: type[DataLoader], method: str) -> None:
    batches: Iterator[Any] = iter(kind(Pids(), batch_size=1, num_workers=1, multiprocessing_context=method))
    pid = int(next(batches))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        kill(pid, number)
    assert [int(batch) for batch in batches] == [pid] * 19
    assert ended(pid), "at the end of the epoch"


@pytest.mark.parametrize("kind", LOADERS)
def test_a_worker_that_hangs_ends_with_its_loader(kind: type[DataLoader], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = kind(Pids(hangs=1), batch_size=1, num_workers=1)
    batches = DataLoader.__iter__(loader)
    pid, workers = int(next(batches)), batches._workers
    batches._shutdown_workers()
    workers[0].join(30)
    assert (workers[0].exitcode, is_running(pid)) == (-signal.SIGKILL, False)


@pytest.mark.slow
def test_a_second_ctrl_c_waits_for_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    before = signal.getsignal(signal.SIGCHLD)
    batches: Any = iter(BufferedLoader(Pids(hangs=1), batch_size=1, num_workers=1))
    pid = int(next(batches))
    with stop_signals(SimpleNamespace()):
        signal.raise_signal(signal.SIGINT)
        assert is_running(pid), "to make the batches of the step"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert ended(pid)
    batches.close()  # waits for MONAI's thread, and that for the worker
    signal.signal(signal.SIGCHLD, before)


def test_programs_that_a_worker_starts_end_by_the_signal() -> None:
    (codes,) = LastingLoader(Started(), batch_size=1, num_workers=1)
    assert codes.tolist() == [-signal.SIGTERM]


@pytest.mark.slow
def test_a_program_ends_silently_with_workers_that_hang(tmp_path: Path) -> None:
    code = (
        "from test_lasting_workers import *\n"
        "kept = [iter(LastingLoader(Pids(1), batch_size=1, num_workers=2)) for _ in range(2)]\n"
        "[next(each) for each in kept]\n"
        "raise SystemExit(143)"
    )
    environment = {**os.environ, "PYTHONPATH": PLACES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (143, "")


def test_other_loaders_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = LastingLoader(Pids(), num_workers=0)
    assert not isinstance(alone.worker_init_fn, LastingStart)
    own = type("Own", (SpawnContext,), {})()
    loader = LastingLoader(Pids(), num_workers=1, multiprocessing_context=own)
    assert loader.multiprocessing_context is own
    assert not isinstance(loader.worker_init_fn, LastingStart)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: None)
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert isinstance(LastingLoader(Pids(), num_workers=1).multiprocessing_context, SpawnContext)


@pytest.mark.parametrize("kind", LOADERS)
def test_the_users_start_of_a_worker_is_kept(kind: type[DataLoader]) -> None:
    for worker_init_fn, expected in (note, 0), (None, -1):
        loader = kind(Noted(), batch_size=1, num_workers=1, worker_init_fn=worker_init_fn)
        assert int(next(iter(loader))) == expected


def test_the_start_by_default_is_monais() -> None:
    loader = LastingLoader(Pids(), num_workers=1)
    assert loader.worker_init_fn.then is DataLoader(Pids(), num_workers=1).worker_init_fn


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_whose_training_is_gone_ends(method: str, tmp_path: Path) -> None:
    """Also one that hangs, which torch's own workers do not."""
    found, log = tmp_path / "pids", tmp_path / "log"

    def run() -> None:
        forkserver._forkserver.__init__()  # a server of its own and not that of the tests
        loader = LastingLoader(Pids(hangs=1), batch_size=1, num_workers=2, multiprocessing_context=method)
        batches = DataLoader.__iter__(loader)
        next(batches)
        (tmp_path / "new").write_text(" ".join(str(worker.pid) for worker in batches._workers))
        (tmp_path / "new").rename(found)
        time.sleep(600)

    child = fork(run, log)
    try:
        wait_until(found.exists)
    finally:
        os.kill(child, signal.SIGKILL)
        finish(child)
    pids = [int(pid) for pid in found.read_text().split()]
    assert [ended(pid) for pid in pids] == [True, True], log.read_text()


@pytest.mark.parametrize("phase", ["train#trainer", "validate#evaluator"])
def test_a_training_whose_workers_get_the_signal_too_keeps_its_steps(phase: str, bundle: Path, data: Path) -> None:
    keys = overrides(bundle, data, batch_size=1, val_fraction=0.5, case_repeats=2, num_workers=1)  # four steps an epoch
    made = ConfigWorkflow(config_file=str(bundle / "configs" / "train.json"), workflow_type="train", **keys)
    made.initialize()

    @made.parser.get_parsed_content(phase).on(Events.ITERATION_STARTED)
    def receive(engine: Any) -> None:
        if engine.state.iteration == (6 if phase.startswith("train") else 1) and engine.state.epoch == 2:
            signal.raise_signal(signal.SIGTERM)
            for worker in multiprocessing.active_children():
                kill(worker.pid or 0)
            time.sleep(0.3)  # in which torch would tell that one has died

    with pytest.raises(SystemExit) as caught:
        made.run()
    assert caught.value.code == 143
    last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert (last["epoch"], last["step"]) == ((1, 2) if phase.startswith("train") else (2, 0))


@pytest.mark.slow
def test_a_signal_to_the_group_of_a_training_keeps_the_steps_of_the_epoch(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    slow = {"_target_": "test_lasting_workers.Slowd", "seconds": 0.15}
    keys = overrides(bundle, data, batch_size=1, val_fraction=0, case_repeats=4, num_workers=1, epochs=50)
    given = json.dumps({**keys, "train#random_transforms#11": slow}, default=str)
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom monai_iou.demo import run_workflow\n"
        "run_workflow(Path(sys.argv[1]), ['train'], json.loads(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONPATH": PLACES, "OMP_NUM_THREADS": "1"}
    last, log = bundle / "models" / "last_epoch.pt", tmp_path / "log"
    with log.open("w") as stream:
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(bundle), given],
            env=environment, stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    assert wait_until(lambda: last_epoch(last) == 1 or child.poll() is not None), log.read_text()
    time.sleep(1)
    os.killpg(child.pid, signal.SIGTERM)
    assert child.wait(120) == 143, log.read_text()
    assert "SIGTERM: stopped in epoch 2" in log.read_text()
    assert torch.load(last, weights_only=True)["step"] > 0
