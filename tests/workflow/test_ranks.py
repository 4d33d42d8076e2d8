"""The process group of the multi_gpu configs: made for the device of the run, and patient with a rank that works on."""

from __future__ import annotations

import os
import re
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bundle_runs import bundle_command, overrides, run_command
from gloo_ranks import run_ranks
from torch.multiprocessing.spawn import ProcessException

from monai_iou.workflow import ranks

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
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(dist, "init_process_group", lambda **given: made.append(given))
    ranks.join_group(device)
    gpu = torch.device("cuda", current[0]) if current else None  # which NCCL would guess from the number of the rank
    assert made == [{"backend": backend, "timeout": ranks.LONGEST_WAIT, "device_id": gpu}]
    assert chosen == current
    assert timedelta(hours=12) <= ranks.LONGEST_WAIT, "rank 0 may tune for hours on large volumes"


def _leave_one_after_the_other(rank: int, port: int, wait: float, work: float) -> None:
    torch.set_num_threads(1)
    place = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # what torchrun sets as well
    os.environ.update({name: str(value) for name, value in place.items()})
    ranks.LONGEST_WAIT = timedelta(seconds=wait)
    ranks.join_group("cpu")
    dist.barrier()
    if rank == 0:
        time.sleep(work)
    ranks.leave_group()
    os._exit(0)


def test_the_longest_wait_is_that_for_a_rank_that_works_alone() -> None:
    for wait, work in ((120, 4), (4, 12)):
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has it, on any port
        if work < wait:
            run_ranks(_leave_one_after_the_other, 2, store.port, wait, work)
        else:
            with pytest.raises(ProcessException, match=r"(?i)timed? ?out"):
                run_ranks(_leave_one_after_the_other, 2, store.port, wait, work)


def test_two_ranks_train_and_tune_on_the_cpu_that_the_command_names(bundle: Path, data: Path) -> None:
    given = overrides(bundle, data, device="cpu", epochs=1, tune_postprocessing=True)
    done = run_command(bundle_command(bundle, ["train", "multi_gpu_train"], given, *LAUNCHER))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"raises the validation IoU|Validation IoU", done.stdout)) == 1, "rank 0 tunes"


@pytest.mark.slow
def test_two_ranks_evaluate_on_the_cpu_that_the_command_names(folds: Path, data: Path, tmp_path: Path) -> None:
    given = overrides(folds, data, device="cpu", ckpt_dir=str(folds / "fold0"), output_dir=str(tmp_path))
    done = run_command(bundle_command(folds, ["train", "evaluate", "multi_gpu_evaluate"], given, *LAUNCHER))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "metrics.csv").is_file()
