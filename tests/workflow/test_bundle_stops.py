"""A training run that is stopped: by a signal, a loss that is NaN, a full disk, memory that does not suffice."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bundle_runs
import pytest
import torch
from bundle_runs import bundle_command, causes, run_command
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from places import ROOT

from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.files import OutputError
from monai_iou.locks import LOCK_NAME
from monai_iou.workflow import checkpoint_files
from monai_iou.workflow.checkpoint_files import last_epoch, load_state, write_atomically
from monai_iou.workflow.checkpoints import CheckpointHandler
from monai_iou.workflow.failures import StepGuard, TrainingError, explain_out_of_memory, run
from monai_iou.workflow.stopping import stop_signals

pytestmark = [pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of four training and two test volumes."""
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=2, shape=(32, 32, 24))


def overrides(bundle: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Three steps an epoch."""
    return bundle_runs.overrides(bundle, data, **{"batch_size": 1, "val_fraction": 0.25, **changes})


def workflow(bundle: Path, data: Path, **changes: Any) -> tuple[ConfigWorkflow, Any]:
    """An initialized training and its trainer."""
    made = ConfigWorkflow(
        config_file=str(bundle / "configs" / "train.json"),
        workflow_type="train",
        **overrides(bundle, data, **changes),
    )
    made.initialize()
    return made, made.parser.get_parsed_content("train#trainer")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [5, 6], ids=["inside an epoch", "at its end"])
def test_a_signal_ends_the_training_after_its_step(
    number: signal.Signals,
    step: int,
    bundle: Path,
    data: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    made, trainer = workflow(bundle, data, epochs=4)

    @trainer.on(Events.ITERATION_STARTED(once=step))
    def receive() -> None:
        signal.raise_signal(number)

    with pytest.raises(SystemExit) as caught:
        made.run()
    assert caught.value.code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert (
        f"{number.name}: stopped in epoch 2; {bundle}/models/last_epoch.pt has the weights" in capsys.readouterr().out
    )
    stopped = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert (stopped["epoch"], stopped["step"]) == divmod(step, 3)
    assert stopped["validated"] is (step == 5)
    assert "terminating due to exception" not in caplog.text
    assert stopped["optimizer"]["state"][0]["step"].item() == step
    network = made.parser.get_parsed_content("network_def").state_dict()
    assert all(torch.equal(stopped["model"][name], weights) for name, weights in network.items())

    resumed, trainer = workflow(bundle, data, epochs=4, resume=True)
    steps: list[tuple[int, int]] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: steps.append((engine.state.epoch, engine.state.iteration))
    )
    validated = validations(resumed, trainer)
    resumed.run()
    assert steps == [((each - 1) // 3 + 1, each) for each in range(step + 1, 13)]
    assert validated == [(2, 6), (3, 9), (4, 12)]
    assert torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)["optimizer"]["state"][0]["step"] == 12
    rate = resumed.parser.get_parsed_content("lr_scheduler")
    assert rate.last_epoch == 12


def validations(made: ConfigWorkflow, trainer: Any) -> list[tuple[int, int]]:
    """A list that fills with epoch and step of every validation that is completed."""
    done: list[tuple[int, int]] = []
    made.parser.get_parsed_content("validate#evaluator").add_event_handler(
        Events.COMPLETED, lambda engine: done.append((engine.state.epoch, trainer.state.iteration))
    )
    return done


def test_a_signal_during_validation_ends_it_after_a_volume(bundle: Path, data: Path) -> None:
    made, _ = workflow(bundle, data, epochs=4, val_fraction=0.5, batch_size=2)
    evaluator = made.parser.get_parsed_content("validate#evaluator")
    volumes: list[int] = []

    @evaluator.on(Events.ITERATION_STARTED)
    def receive(engine: Any) -> None:
        volumes.append(engine.state.iteration)
        if engine.state.epoch == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit):
        made.run()
    assert volumes == [1, 2, 1]
    stopped = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert (stopped["epoch"], stopped["step"], stopped["best_metric_epoch"]) == (2, 0, 1)
    assert stopped["validated"] is False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_check_ends_the_program_after_a_complete_training(
    number: signal.Signals, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, trainer = workflow(bundle, data, epochs=1)
    trainer.add_event_handler(Events.COMPLETED, lambda: signal.raise_signal(number))
    with pytest.raises(SystemExit) as caught:
        made.run()
    assert caught.value.code == 128 + number
    assert f"{number.name}: stopped after the training, which is complete and saved.\n" in capsys.readouterr().out
    assert (bundle / "models" / "model.pt").is_file()
    workflow(bundle, data, epochs=1, resume=True)[0].run()
    assert "Nothing is left to train" in capsys.readouterr().out


@pytest.mark.parametrize("val_interval", [2, 3])
def test_a_run_stopped_before_its_last_validation_does_it_when_resumed(
    val_interval: int, bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"epochs": 2, "val_interval": val_interval}
    made, trainer = workflow(bundle, data, **changes)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=6), lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        made.run()
    assert [path.name for path in (bundle / "models").iterdir()] == ["last_epoch.pt"]
    capsys.readouterr()
    resumed, trainer = workflow(bundle, data, **changes, resume=True)
    validated = validations(resumed, trainer)
    resumed.run()
    assert validated == ([(2, 6)] if val_interval == 2 else [])
    last = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert (last["epoch"], last["step"], last["validated"]) == (2, 0, True)
    assert last["best_metric_epoch"] == (2 if val_interval == 2 else -1)
    model = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(model[name], weights) for name, weights in last["model"].items())
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "epoch 2/2" in line]
    assert "loss" not in line, "no step was done"
    again, trainer = workflow(bundle, data, **changes, resume=True)
    assert not validations(again, trainer)
    again.run()


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated", "foreign", "no dictionary"])
def test_a_checkpoint_that_cannot_be_read(damage: str, bundle: Path, data: Path) -> None:
    path = bundle / "models" / "last_epoch.pt"
    write_atomically({"epoch": 1, "weights": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    if damage == "no dictionary":
        torch.save([1, 2], path)
    elif damage != "foreign":
        path.write_bytes({"garbage": b"not a checkpoint", "empty": b"", "truncated": whole[:-100]}[damage])
    sentence = (
        f"Expected {path} to be a checkpoint of this bundle, but it cannot be read: delete it, or start anew with "
        "--overwrite and without --resume."
    )
    for read in (last_epoch, load_state):
        with pytest.raises(ValueError, match="checkpoint of this bundle") as caught:
            read(path)
        assert str(caught.value) == sentence
    with pytest.raises(RuntimeError) as wrapped:
        workflow(bundle, data, resume=True)[0].run()
    assert sentence in [str(cause) for cause in causes(wrapped.value)]
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    engine = Engine(lambda *_: None)
    engine.state.rank = 0
    CheckpointHandler(str(path.parent), network, optimizer, schedule, resume=True).attach(engine)
    with pytest.raises(ValueError, match="checkpoint of this bundle"):
        engine.run([0], max_epochs=1)


def refuses(path: Path) -> bool:
    """Read what may be damaged where no meaning is."""
    try:
        last_epoch(path)
    except ValueError as error:
        return "checkpoint of this bundle, but it cannot be read" in str(error)
    return False


def test_no_damage_of_a_checkpoint_gives_another_error(tmp_path: Path) -> None:
    path = tmp_path / "last_epoch.pt"
    refused = 0
    for legacy in (False, True):
        torch.save({"epoch": 1, "step": 0}, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        generator = random.Random(0)
        damaged = [whole[: len(whole) * part // 20] for part in range(20)]
        damaged += [bytes(generator.randrange(256) for _ in range(size)) for size in (1, 2, 5, 50, 500)]
        damaged += [whole[:at] + generator.randbytes(8) + whole[at + 8 :] for at in range(0, len(whole) - 8, 37)]
        for content in damaged:
            path.write_bytes(content)
            refused += refuses(path)
    assert refused > 50


@pytest.mark.slow
def test_the_program_ends_with_the_signals_code(bundle: Path, data: Path) -> None:
    process = start(bundle_command(bundle, ["train"], overrides(bundle, data, epochs=100000, val_interval=7)))
    wait_for_epoch(process, bundle, 3)
    process.send_signal(signal.SIGTERM)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "SIGTERM: stopped in epoch" in shown
    assert "Traceback" not in errors
    assert "terminating due to exception" not in shown + errors
    epoch = last_epoch(bundle / "models" / "last_epoch.pt")
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=epoch + 2, resume=True))
    assert last_epoch(bundle / "models" / "last_epoch.pt") == epoch + 2


@pytest.mark.slow
def test_a_signal_to_one_rank_ends_all(bundle: Path, data: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    command = bundle_command(
        bundle, ["train", "multi_gpu_train"], overrides(bundle, data, epochs=100000, val_fraction=0.5), *launcher
    )
    process = start(command)
    wait_for_epoch(process, bundle, 2)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = [pid for pid in workers if b"monai.bundle" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGTERM)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert shown.count("SIGTERM: stopped in epoch") == 1, shown + errors
    assert "exitcode  : 143" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    epochs = last_epoch(bundle / "models" / "last_epoch.pt") + 1
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=epochs, val_fraction=0.5, resume=True))
    assert last_epoch(bundle / "models" / "last_epoch.pt") == epochs


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for_epoch(process: subprocess.Popen[str], bundle: Path, epoch: int) -> None:
    deadline = time.monotonic() + 600
    while last_epoch(bundle / "models" / "last_epoch.pt") < epoch:
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            process.kill()
            pytest.fail("no epoch was completed")
        time.sleep(0.05)


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def other() -> None:
        with stop_signals(SimpleNamespace()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_second_interrupt_acts_at_once_but_not_a_second_sigterm() -> None:
    state = SimpleNamespace()
    with stop_signals(state):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert state.stop_signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


class Poisond:
    """Turn one case's image to NaN, from some call on."""

    def __init__(self, case: str, after: int = 0) -> None:
        self.case, self.left = case, after

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["case"] != self.case:
            return item
        self.left -= 1
        return item if self.left >= 0 else {**item, "image": item["image"] * math.nan}


def test_a_nan_loss_names_the_batchs_files_and_keeps_the_last_good_epoch(bundle: Path, data: Path) -> None:
    models = bundle / "models"
    poison = {"_target_": "test_bundle_stops.Poisond", "case": "phantom_02", "after": 1}
    with pytest.raises(RuntimeError) as caught:
        run_workflow(
            bundle,
            ["train"],
            overrides(bundle, data, val_fraction=0, epochs=5, **{"train#random_transforms#11": poison}),
        )
    (sentence,) = [str(cause) for cause in causes(caught.value) if isinstance(cause, TrainingError)]
    assert sentence.startswith(
        f"Expected a finite loss, but got nan in epoch 2 on the batch of {data}/imagesTr/phantom_02.nii.gz: look at"
    )
    assert [path.name for path in models.iterdir()] == ["last_epoch.pt"]
    kept = torch.load(models / "last_epoch.pt", weights_only=True)
    assert kept["epoch"] == 1
    assert all(torch.isfinite(weights).all() for weights in kept["model"].values())


@pytest.mark.slow
def test_every_rank_names_the_files_of_the_one_whose_loss_is_nan(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests" / "support")]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    poison = {"_target_": "test_bundle_stops.Poisond", "case": "phantom_02", "after": 1}
    # Without sums over the ranks, one rank's NaN does not reach the other's loss.
    settings = {"val_fraction": 0, "epochs": 9, "loss::sync_batch": False, "train::random_transforms::11": poison}
    done = run_command(
        bundle_command(bundle, ["train", "multi_gpu_train"], overrides(bundle, data, **settings), *launcher)
    )
    assert done.returncode != 0
    sentence = f"on the batch of {data}/imagesTr/phantom_02.nii.gz: look at"
    assert sentence in done.stderr, done.stdout + done.stderr
    kept = torch.load(bundle / "models" / "last_epoch.pt", weights_only=True)
    assert all(torch.isfinite(weights).all() for weights in kept["model"].values())


@pytest.mark.slow
def test_a_rate_that_ruins_the_weights_ends_the_command_with_one_sentence(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1))
    before = {path.name: path.read_bytes() for path in (bundle / "models").iterdir()}
    done = run_command(bundle_command(bundle, ["train"], overrides(bundle, data, learning_rate=1e30, resume=True)))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"monai_iou: Expected (a finite loss|finite weights)", last), last
    assert {path.name: path.read_bytes() for path in (bundle / "models").iterdir()} == before


def test_weights_that_are_nan_are_never_stored(bundle: Path, data: Path) -> None:
    made, trainer = workflow(bundle, data, epochs=3, val_interval=1)
    network = made.parser.get_parsed_content("network_def")

    @trainer.on(Events.ITERATION_COMPLETED(once=6))
    def ruin() -> None:
        with torch.no_grad():
            next(iter(network.parameters())).fill_(math.inf)

    with pytest.raises(RuntimeError) as caught:
        made.run()
    assert "Expected finite weights at the end of an epoch" in str(causes(caught.value))
    assert last_epoch(bundle / "models" / "last_epoch.pt") == 1
    assert torch.isfinite(next(iter(torch.load(bundle / "models" / "model.pt", weights_only=True).values()))).all()


def test_the_loss_that_handlers_read_is_a_number_already(bundle: Path, data: Path) -> None:
    made, trainer = workflow(bundle, data, val_fraction=0, epochs=1)
    kinds: list[type] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda engine: kinds.append(type(engine.state.output[0]["loss"]))
    )
    made.run()
    assert kinds == [float] * 4, "reading a tensor on a GPU waits for the step, in each handler again"


def test_a_batch_without_names_is_said_to_have_none() -> None:
    state = SimpleNamespace(output=[{"loss": math.inf}], batch=[{"image": 1}], epoch=1, device="cpu")
    with pytest.raises(TrainingError, match="but got inf in epoch 1 on the batch of files without a name"):
        StepGuard().check(SimpleNamespace(state=state))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_keeps_the_old_file_and_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last_epoch.pt"
    write_atomically({"epoch": 1}, path)
    full = contextlib.nullcontext(Path("/dev/full"))  # every write to it fails as on a full disk
    monkeypatch.setattr(checkpoint_files, "temporary_file", lambda *_: full)
    with pytest.raises(TrainingError, match="disk is full or a limit is reached") as caught:
        write_atomically({"epoch": 2, "weights": torch.zeros(10**6)}, path)
    assert re.search(
        rf"write {path}, but .* \([\d.]+ MB free\): the earlier file is kept; delete something there, or write to "
        r"another disk with --output \(or --cache_dir\)\.$",
        str(caught.value),
    )
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last_epoch.pt"]


def test_other_errors_of_writing_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"denied|directory") as caught:
        write_atomically("text", tmp_path)
    assert caught.value.errno != errno.ENOSPC


@pytest.mark.slow
def test_a_training_without_room_for_its_checkpoint(bundle: Path, data: Path) -> None:
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1))
    last = bundle / "models" / "last_epoch.pt"
    before = last.read_bytes()
    resource = pytest.importorskip("resource")  # not on Windows
    room = len(before) // 2  # of one file: enough for the model, not for the optimizer's averages
    process = start(
        bundle_command(bundle, ["train"], overrides(bundle, data, resume=True)),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith(f"monai_iou: Expected room to write {last}, but the disk is full")
    assert last.read_bytes() == before
    assert sorted(path.name for path in (bundle / "models").iterdir()) == ["last_epoch.pt", "model.json", "model.pt"]


class Greedy(torch.nn.Module):
    """A network that needs more than any machine has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(1, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.layer(image) + torch.empty(1 << 56)


def test_a_training_that_does_not_fit_into_memory(bundle: Path, data: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        run_workflow(bundle, ["train"], overrides(bundle, data, network_def={"_target_": "test_bundle_stops.Greedy"}))
    (sentence,) = [str(cause) for cause in causes(caught.value) if isinstance(cause, TrainingError)]
    assert sentence.startswith("Expected the run to fit into memory, but it ran out of it: lower `patch_size`")
    for key in ("batch_size", "num_samples", "sw_batch_size", "cache_rate"):
        assert f"`{key}`" in sentence


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory\nand more"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
    ],
)
def test_every_way_to_run_out_of_memory_is_known(error: Exception) -> None:
    wrapped = RuntimeError("applying transform")
    wrapped.__cause__ = error
    with pytest.raises(TrainingError, match="fit into memory"), explain_out_of_memory():
        raise wrapped


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),  # as a further worker process is started
        RuntimeError("unable to open shared memory object </torch_7> in read-write mode: Too many open files (24)"),
        RuntimeError("Caught OSError in DataLoader worker process 0.\nOSError: [Errno 24] Too many open files: 'a.gz'"),
        RuntimeError("received 0 items of ancdata"),
    ],
)
def test_too_many_open_files_name_the_workers_and_the_limit(error: Exception) -> None:
    wrapped = RuntimeError("applying transform")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        with pytest.raises(TrainingError) as caught, explain_out_of_memory():
            raise each
        assert str(caught.value) == (
            "Expected to open another file or worker process, but got 'Too many open files': lower `num_workers` (0 "
            "needs the fewest), or raise the limit that `ulimit -n` shows, for instance with `ulimit -n 4096`."
        )


def test_too_many_open_files_of_all_programs_are_no_matter_of_the_own_limit() -> None:
    with pytest.raises(TrainingError) as caught, explain_out_of_memory():
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
    assert str(caught.value) == (
        "Expected to open another file or worker process, but got 'Too many open files in system': lower "
        "`num_workers` (0 needs the fewest), or close other programs."
    )


def test_other_errors_of_files_stay_as_they_are() -> None:
    with pytest.raises(FileNotFoundError), explain_out_of_memory():
        raise FileNotFoundError(errno.ENOENT, "No such file")


@pytest.mark.parametrize(("metric", "purpose"), [(None, "prediction"), ("val_mean_iou", "evaluation")])
def test_a_second_prediction_in_a_folder_is_refused_by_its_name(
    metric: str | None, purpose: str, tmp_path: Path
) -> None:
    second: list[OutputError] = []
    engine = SimpleNamespace(state=SimpleNamespace(rank=0, key_metric_name=metric))

    def begin_another() -> None:
        with pytest.raises(OutputError, match=r"name another folder with --output\.$") as caught:
            run(engine, str(tmp_path))
        second.append(caught.value)
        holder = json.loads((tmp_path / LOCK_NAME).read_text())
        assert holder["purpose"] == purpose

    engine.run = begin_another
    run(engine, str(tmp_path))
    assert second


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_a_connection_that_breaks_because_a_worker_was_killed(error: Exception) -> None:
    """The loader reads from a process that is already gone, before it has seen that it is."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    torch._C._set_worker_pids(id(child), (child.pid,))
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's, if an earlier test had a loader, raises at once
    try:
        child.kill()
        with pytest.raises(TrainingError, match="fit into memory") as caught, explain_out_of_memory():
            raise error
        assert caught.value.__cause__ is error
    finally:
        torch._C._remove_worker_pids(id(child))
        child.wait()
        signal.signal(signal.SIGCHLD, handler)


def test_torchs_handler_may_say_it_while_we_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(seconds: float) -> None:
        message = "DataLoader worker (pid 7) is killed by signal: Killed. "
        raise RuntimeError(message)

    monkeypatch.setattr("monai_iou.workflow.failures.time.sleep", killed)
    with pytest.raises(TrainingError, match="fit into memory"), explain_out_of_memory():
        raise EOFError


def test_a_connection_that_breaks_for_another_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monai_iou.workflow.failures._SECONDS_TO_DIE", 0.1)
    with pytest.raises(ConnectionResetError, match="by a server"), explain_out_of_memory():
        raise ConnectionResetError(errno.ECONNRESET, "by a server")


def test_other_errors_of_a_run_stay_as_they_are() -> None:
    def fail() -> None:
        message = "shapes do not match"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(SimpleNamespace(state=SimpleNamespace(), run=fail))


def test_a_step_that_a_signal_broke_is_no_error() -> None:
    state = SimpleNamespace()

    def fail() -> None:
        state.stop_signal = int(signal.SIGTERM)
        message = "DataLoader worker (pid 7) is killed by signal: Terminated."
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as caught:
        run(SimpleNamespace(state=state, run=fail))
    assert caught.value.code == 143
