"""Folders that fail during a run: full, read-only, used by two runs; and data that change under it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bundle_runs import bundle_command, overrides

from monai_iou.bundle_files import copy_bundle
from monai_iou.datasets.phantoms import write_phantom_dataset
from monai_iou.demo import run_workflow
from monai_iou.workflow.checkpoint_files import check_content, last_epoch

pytestmark = [pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantom_dataset(tmp_path_factory.mktemp("data"), training=4, evaluation=2, shape=(32, 32, 24))


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def in_namespace(command: list[str], mount: str) -> list[str]:
    """The command after a mount that only it sees; skips where that is not allowed."""
    tried = (
        subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    )
    if tried is None or tried.returncode:
        pytest.skip("a mount needs the rights of root")
    return ["unshare", "-m", "bash", "-c", f'{mount} || exit 77; exec "$@"', "x", *command]


def sentence(command: list[str]) -> str:
    """The one sentence that the command ends with, with exit code 1 and no traceback."""
    process = start(command)
    shown, _ = process.communicate(timeout=300)
    assert process.returncode == 1, shown
    assert "Traceback" not in shown
    return next(line for line in reversed(shown.splitlines()) if line.startswith("monai_iou: "))


@pytest.mark.parametrize("key", ["ckpt_dir", "output_dir", "cache_dir"])
@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_folders_on_disks_that_are_full_or_read_only(key: str, kind: str, data: Path, tmp_path: Path) -> None:
    bundle, disk = copy_bundle(tmp_path / "bundle"), tmp_path / "disk"
    disk.mkdir()
    command = bundle_command(bundle, ["train"], overrides(bundle, data, **{key: str(disk / "run")}))
    options = {"read-only": "ro", "full": "size=32k"}[kind]
    found = sentence(in_namespace(command, f"mount -t tmpfs -o {options} tmpfs {disk}"))
    reason = {"read-only": "Read-only file system", "full": "No space left on device"}[kind]
    problem = f"but got `{disk / 'run'}` ({reason}): choose another folder."
    assert found == f"monai_iou: Expected `{key}` to be a folder that can be written, {problem}"


def test_a_disk_that_fills_up_during_a_training(data: Path, tmp_path: Path) -> None:
    bundle, disk = copy_bundle(tmp_path / "bundle"), tmp_path / "disk"
    disk.mkdir()
    command = bundle_command(bundle, ["train"], overrides(bundle, data, ckpt_dir=str(disk)))
    found = sentence(in_namespace(command, f"mount -t tmpfs -o size=128k tmpfs {disk}"))
    assert found.startswith(f"monai_iou: Expected room to write {disk}/"), found


def wait_for_epoch(process: subprocess.Popen[str], models: Path, epoch: int) -> None:
    deadline = time.monotonic() + 600
    while last_epoch(models / "last_epoch.pt") < epoch:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_second_of_two_trainings_is_told_of_the_first(data: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    command = bundle_command(bundle, ["train"], overrides(bundle, data, epochs=100000, val_interval=100000))
    first = start(command)
    wait_for_epoch(first, bundle / "models", 1)
    found = sentence(command)
    assert f"but training by process {first.pid} on" in found
    first.send_signal(signal.SIGTERM)
    shown, _ = first.communicate(timeout=60)
    assert first.returncode == 143, shown
    check_content(bundle / "models" / "last_epoch.pt")
    assert sorted(path.name for path in (bundle / "models").iterdir()) == ["last_epoch.pt"]


@pytest.mark.parametrize("change", ["removed", "truncated"])
def test_an_image_that_changes_during_an_uncached_training(change: str, data: Path, tmp_path: Path) -> None:
    bundle, folder = copy_bundle(tmp_path / "bundle"), shutil.copytree(data, tmp_path / "data")
    given = overrides(bundle, folder, epochs=100000, val_fraction=0, cache_rate=0.0)
    process = start(bundle_command(bundle, ["train"], given))
    wait_for_epoch(process, bundle / "models", 1)
    image = sorted((folder / "imagesTr").iterdir())[2]
    if change == "removed":
        image.unlink()
    else:
        os.truncate(image, image.stat().st_size // 2)
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in shown
    (found,) = [line for line in shown.splitlines() if line.startswith("monai_iou: ")]
    assert found.startswith(f"monai_iou: Expected {image} to stay as it was when the run started, but it ")


def test_a_killed_rank_ends_the_others_and_the_training_resumes(data: Path, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
    given: dict[str, Any] = overrides(bundle, data, epochs=100000, val_fraction=0, batch_size=1)
    process = start(bundle_command(bundle, ["train", "multi_gpu_train"], given, *launcher))
    wait_for_epoch(process, bundle / "models", 2)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    ranks = [pid for pid in workers if b"monai.bundle" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=90)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    epoch = last_epoch(bundle / "models" / "last_epoch.pt")
    run_workflow(bundle, ["train"], {**given, "epochs": epoch + 1, "resume": True})
    assert last_epoch(bundle / "models" / "last_epoch.pt") == epoch + 1
