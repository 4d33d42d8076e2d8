"""Checkpoints: one changed bit is refused, and every reader of torch's files still reads them."""

from __future__ import annotations

import errno
import os
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from monai_iou.datasets.cases import DatasetError
from monai_iou.workflow.checkpoint_files import check_content, last_epoch, load_state, write_atomically, write_together
from monai_iou.workflow.failures import TrainingError
from monai_iou.workflow.models import check_models

STATE = {"epoch": 3, "optimizer": {}, "lr_scheduler": {}, "scaler": {}, "best_metric": 0.5, "best_metric_epoch": 2}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv3d(2, 8, 3)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Path]:
    """The two checkpoints of a training."""
    paths = {name: tmp_path / f"{name}.pt" for name in ("last_epoch", "model")}
    write_atomically({**STATE, "model": network().state_dict()}, paths["last_epoch"])
    write_atomically(network().state_dict(), paths["model"])
    return paths


def is_refused(name: str, path: Path) -> bool:
    try:
        if name == "model":
            check_models([str(path)], network())
        else:
            last_epoch(path)
    except DatasetError as error:
        return str(error).startswith(f"Expected {path} to be a trained model, but it cannot be read: copy it again")
    except ValueError as error:
        return str(error).startswith(
            f"Expected {path} to be a checkpoint of this bundle, but it cannot be read: delete"
        )
    return False


@pytest.mark.parametrize("name", ["last_epoch", "model"])
def test_damage_is_refused_in_one_sentence(name: str, stored: dict[str, Path]) -> None:
    path = stored[name]
    assert not is_refused(name, path)
    whole, generator = path.read_bytes(), random.Random(0)
    flips = [generator.randrange(8 * len(whole)) for _ in range(200)]
    flips += range(8 * (len(whole) - 110), 8 * len(whole))  # the checksum itself and the length of its place
    for bit in flips:
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert is_refused(name, path), bit
    for start in range(0, len(whole), 512):
        changed = bytearray(whole)
        changed[start : start + 512] = bytes(len(changed[start : start + 512]))
        path.write_bytes(changed)
        assert is_refused(name, path) is (changed != whole), start
    for cut in (1, 40, 81, 82, 200, len(whole) - 3, len(whole)):
        path.write_bytes(whole[: len(whole) - cut])
        assert is_refused(name, path), cut
    path.write_bytes(whole + b"more")
    assert is_refused(name, path)


def test_other_programs_read_the_file_as_if_it_had_no_checksum(stored: dict[str, Path]) -> None:
    for mmap in (False, True):
        weights = torch.load(stored["model"], weights_only=True, mmap=mmap)
        assert all(torch.equal(weights[key], value) for key, value in network().state_dict().items())
    with zipfile.ZipFile(stored["model"]) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"monai_iou sha256 ")


@pytest.mark.parametrize("legacy", [False, True])
def test_weights_of_another_program_are_taken(legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=not legacy)
    check_models([str(path)], network())
    if not legacy:
        whole = bytearray(path.read_bytes())
        at = whole.index(network().weight.detach().numpy().tobytes()[:16])
        whole[at] ^= 1
        path.write_bytes(whole)
        assert is_refused("model", path), "the zip's own checksums"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    weights = network().state_dict()
    weights["bias"][1] = value
    write_atomically(weights, tmp_path / "model.pt")
    message = (
        r"model.pt to hold finite weights, but `bias` has NaN or infinity: take another checkpoint or train again\."
    )
    with pytest.raises(DatasetError, match=message):
        check_models([str(tmp_path / "model.pt")], network())


def test_a_planted_link_is_not_followed_and_no_name_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim, path, names = tmp_path / "victim", tmp_path / "last_epoch.pt", []
    victim.write_text("mine")
    for name in ("last_epoch.pt.tmp", "last_epoch.pt"):
        (tmp_path / name).symlink_to(victim)
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (names.append(self.name), replace(self, target))[1])
    for _ in range(2):
        write_atomically({"epoch": 1}, path)
    assert victim.read_text() == "mine"
    assert len(set(names)) == 2
    assert all(str(os.getpid()) in name for name in names)
    check_content(path)


def test_values_of_a_plan_that_no_training_stores(tmp_path: Path) -> None:
    import json
    from dataclasses import asdict

    from monai_iou.planning.plan import make_plan
    from monai_iou.planning.stored import load_plan

    plan: dict[str, Any] = asdict(make_plan(None, [], [16, 16, 16]))
    path = tmp_path / "model.json"
    path.write_text(json.dumps(plan))
    assert load_plan(path).pixdim == (1.0, 1.0, 1.0)
    ct = {"kind": "ct", "lower": -100.0, "upper": 200.0, "mean": 10.0, "std": 20.0}
    path.write_text(json.dumps({**plan, "intensity": [ct]}))
    assert load_plan(path).intensity == (ct,)
    for key, value in [
        ("pixdim", [1.0, float("nan"), 1.0]), ("pixdim", [1.0, 0, 1.0]), ("pixdim", [1.0]),
        ("patch_size", [-16, 16, 16]), ("patch_size", [16.5, 16, 16]), ("channels", [8]), ("channels", [0, 16]),
        ("strides", []), ("strides", [[2, 2]]),
        ("intensity", []), ("intensity", [{**ct, "std": 0.0}]), ("intensity", [{**ct, "lower": 900.0}]),
        ("intensity", [{**ct, "mean": None}]), ("intensity", [{"kind": "other"}]), ("labels", {"1": "lesion"}),
    ]:  # fmt: skip
        path.write_text(json.dumps({**plan, key: value}))
        with pytest.raises(DatasetError, match=r"model\.json to be the plan that training stored"):
            load_plan(path)


def test_files_that_belong_together_are_replaced_once_there_is_room_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, model, tuned = (tmp_path / name for name in ("model.json", "model.pt", "postprocessing.json"))
    write_together({plan: "old", model: {"epoch": 1}}, without=tuned)
    tuned.write_text("{}", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == 3

    def fill(content: Any, stream: Any) -> None:
        stream.write(b"a part of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(torch, "save", fill)
        with pytest.raises(TrainingError, match=r"^Expected room to write .*model\.pt, but the disk is full"):
            write_together({plan: "new", model: {"epoch": 2}}, without=tuned)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    replace = Path.replace

    def no_room_for_the_model(self: Path, target: Path) -> Path:
        if Path(target) == model:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    with monkeypatch.context() as full:
        full.setattr(Path, "replace", no_room_for_the_model)
        with pytest.raises(TrainingError, match=r"^Expected room to write .*model\.pt, but the disk is full"):
            write_together({plan: "new", model: {"epoch": 2}}, without=tuned)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_together({plan: "new", model: {"epoch": 2}}, without=tuned)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.pt"]
    assert (plan.read_text(encoding="utf-8"), torch.load(model, weights_only=True)) == ("new", {"epoch": 2})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names are UTF-8")
def test_a_checkpoint_is_read_below_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xf6ller")) / "last_epoch.pt"
    write_atomically({**STATE, "model": network().state_dict()}, path)
    assert last_epoch(path) == 3
    for mmap in (False, True):
        weights = load_state(path, mmap=mmap)["model"]
        assert all(torch.equal(weights[key], value) for key, value in network().state_dict().items())
