"""The process group of the multi_gpu configs: made for the device of the run, and patient with a rank that works on."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bundle_runs import bundle_command, overrides, run_command
from gloo_ranks import run_ranks
from monai.bundle import ConfigParser
from torch.multiprocessing.spawn import ProcessException

from monai_iou.bundle_files import bundle_path
from monai_iou.demo import run_workflow
from monai_iou.workflow import ranks
from monai_iou.workflow.devices import default_device, own_gpu

ONE_FOR_EACH = (
    "start no more ranks than GPUs (--nproc_per_node of torchrun), or give each task of srun a GPU of its own "
    "(--gpus-per-task=1)."
)
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]


@pytest.mark.parametrize(
    ("device", "backend", "current"),
    [("cpu", "gloo", []), (torch.device("cpu"), "gloo", []), ("cuda:3", "nccl", [3]), ("cuda", "nccl", [1])],
)
def test_the_group_is_for_the_device_also_on_a_machine_with_gpus(
    device: torch.device | str, backend: str, current: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    chosen: list[int] = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(dist, "init_process_group", lambda **given: made.append(given))
    ranks.join_group(device)
    gpu = torch.device("cuda", current[0]) if current else None  # which NCCL would guess from the number of the rank
    assert made == [{"backend": backend, "timeout": ranks.LONGEST_WAIT, "device_id": gpu}]
    assert chosen == current
    assert timedelta(hours=12) <= ranks.LONGEST_WAIT, "rank 0 may tune for hours on large volumes"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int | None, bool], None]:
    """Take a rank's place on a machine with GPUs, by torchrun or by another launcher."""

    def launch(gpus: int, place: int | None, torchrun: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        environment = {"LOCAL_RANK": place, "TORCHELASTIC_RUN_ID": "none" if torchrun else None}
        for name, value in environment.items():
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return launch


@pytest.mark.parametrize(
    ("gpus", "place", "torchrun", "expected"),
    [
        (0, None, False, "cpu"),
        (0, 1, True, "cpu"),
        (1, None, False, "cuda:0"),
        (1, 0, True, "cuda:0"),
        (1, 3, False, "cuda:0"),  # srun --gpus-per-task=1
        (4, None, False, "cuda:0"),
        (4, 3, True, "cuda:3"),
        (4, 3, False, "cuda:3"),
        (1, 1, True, "1 GPU"),
        (2, 3, True, "2 GPUs"),
        (2, 2, False, "2 GPUs"),
    ],
)
def test_each_rank_takes_a_gpu_of_its_own_or_is_refused(
    gpus: int, place: int | None, torchrun: bool, expected: str, launched: Callable[[int, int | None, bool], None]
) -> None:
    launched(gpus, place, torchrun)
    if "GPU" not in expected:
        assert default_device() == torch.device(expected)
        return
    for choose in (default_device, own_gpu):
        with pytest.raises(ValueError, match=r"^Expected a GPU for each rank") as caught:
            choose()
        assert str(caught.value) == (
            f"Expected a GPU for each rank of this machine, but torch sees {expected} and LOCAL_RANK, which counts "
            f"from 0, is {place}: {ONE_FOR_EACH}"
        )


@pytest.mark.filterwarnings("ignore:parsing config_file:UserWarning")
@pytest.mark.parametrize(
    "configs", [["train"], ["train", "multi_gpu_train"], ["train", "evaluate", "multi_gpu_evaluate"], ["inference"]]
)
def test_every_config_takes_the_gpu_of_the_rank(
    configs: list[str], launched: Callable[[int, int | None, bool], None]
) -> None:
    for gpus, place, torchrun, expected in ((1, 1, False, 0), (2, 1, True, 1)):
        launched(gpus, place, torchrun)
        files = [str(bundle_path() / "configs" / f"{name}.json") for name in configs]
        parser = ConfigParser(ConfigParser.load_config_files(files))
        assert parser.get_parsed_content("device") == torch.device("cuda", expected)


def test_a_gpu_without_a_number_is_the_only_one_that_a_task_sees(
    launched: Callable[[int, int | None, bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(dist, "init_process_group", lambda **_: None)
    launched(1, 1, False)
    ranks.join_group("cuda")
    assert chosen == [0]
    launched(1, 1, True)
    with pytest.raises(ValueError, match=r"^Expected a GPU for each rank of this machine, but torch sees 1 GPU and"):
        ranks.join_group("cuda")
    assert chosen == [0]


@pytest.mark.parametrize(
    ("said", "kind", "sentence"),
    [
        (
            "NCCL error: invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
            ValueError,
            f"Expected a GPU for each rank, but NCCL finds two ranks on the same one: {ONE_FOR_EACH}",
        ),
        ("NCCL error: unhandled system error", RuntimeError, "NCCL error: unhandled system error"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_in_one_sentence(
    said: str,
    kind: type[Exception],
    sentence: str,
    launched: Callable[[int, int | None, bool], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def join(**_: Any) -> None:
        raise RuntimeError(said)

    launched(1, 1, False)  # as with srun --gres=gpu:1, which one rank cannot tell from a GPU of its own
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(kind) as caught:
        ranks.join_group("cuda")
    assert str(caught.value) == sentence


def _be_rank(rank: int, port: int) -> None:
    """Take a rank's place, as torchrun gives it."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # what torchrun sets as well
    os.environ.update({name: str(value) for name, value in place.items()})


def _leave_one_after_the_other(rank: int, port: int, wait: float, work: float) -> None:
    _be_rank(rank, port)
    ranks.LONGEST_WAIT = timedelta(seconds=wait)
    ranks.join_group("cpu")
    dist.barrier()
    if rank == 0:
        time.sleep(work)
    ranks.leave_group()
    os._exit(0)


def _store() -> dist.TCPStore:
    """Where the ranks meet, as torchrun has it, on any port."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.mark.slow
def test_the_longest_wait_is_that_for_a_rank_that_works_alone() -> None:
    stores = [_store(), _store()]
    with ThreadPoolExecutor(2) as threads:  # both at once: most of the time, their ranks wait
        long, short = (
            threads.submit(run_ranks, _leave_one_after_the_other, 2, store.port, wait, work)
            for store, wait, work in zip(stores, (120, 4), (4, 12), strict=True)
        )
    long.result()
    with pytest.raises(ProcessException, match=r"(?i)timed? ?out"):
        short.result()


def _train_on_rank(rank: int, port: int, bundle: Path, given: dict[str, Any]) -> None:
    _be_rank(rank, port)
    with (bundle / f"printed{rank}.txt").open("w") as printed:
        os.dup2(printed.fileno(), 1)
        run_workflow(bundle, ["train", "multi_gpu_train"], given)
        sys.stdout.flush()
    os._exit(0)


def test_two_ranks_train_and_tune_on_the_cpu_that_the_command_names(bundle: Path, data: Path) -> None:
    given = overrides(bundle, data, device="cpu", epochs=1, tune_postprocessing=True)
    store = _store()
    run_ranks(_train_on_rank, 2, store.port, bundle, given)
    printed = "".join((bundle / f"printed{rank}.txt").read_text(encoding="utf-8") for rank in range(2))
    assert len(re.findall(r"raises the validation IoU|Validation IoU", printed)) == 1, "rank 0 tunes"
    assert (bundle / "models" / "postprocessing.json").is_file()


@pytest.mark.slow
def test_two_ranks_evaluate_on_the_cpu_that_the_command_names(folds: Path, data: Path, tmp_path: Path) -> None:
    given = overrides(folds, data, device="cpu", ckpt_dir=str(folds / "fold0"), output_dir=str(tmp_path))
    done = run_command(bundle_command(folds, ["train", "evaluate", "multi_gpu_evaluate"], given, *LAUNCHER))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "metrics.csv").is_file()


def test_a_training_without_a_group_writes_as_the_first_rank(
    bundle: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")  # as PyTorchJob and SageMaker set it for each container
    run_workflow(bundle, ["train"], overrides(bundle, data, epochs=1))
    assert (bundle / "models" / "model.pt").is_file()
    assert list((bundle / "eval" / "tensorboard").iterdir())
