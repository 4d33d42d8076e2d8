"""What a run folder says of itself, `run.json`: what was asked for, and which of its stages are done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai_iou.files import json_text, write_json, write_text

__all__ = [
    "FOLD", "RunState", "begin_masks", "can_go_on", "file_keys", "folds_in", "has_checkpoint", "has_masks",
    "mask_files", "model_identity", "no_longer_held_out", "remove_masks",
]  # fmt: skip

STATE_NAME, BEGUN = "run.json", "begun"
BEFORE = "before"  # in run.json of a training that is resumed: the state that holds until it has a new checkpoint
FOLD = re.compile(r"fold(0|[1-9][0-9]*)")  # the folder of a fold; fold0_old is none
CHECKPOINTS = LAST_EPOCH, MODEL = ("last_epoch.pt", "model.pt")
BESIDE_MODEL, END_BYTES = ("model.json", "postprocessing.json"), 1 << 16
LATER = ("memory_gb", "device")  # options that the requests of earlier versions lack, whatever was given
CONTENT = "config_keys"  # of the user's own configs
FILES = {"train_keys": "train.json", "plan_keys": "plan.json"}  # of the run's folder, as `file_keys` notes them
MOST_SHOWN, HASH = 100, "sha256:"


@dataclass
class RunState:
    """The state of a folder of `monai-iou train`.

    Attributes:
        folder: that holds the file.
        request: what was asked for, plain values.
        done: names of the stages that are complete.
        facts: what a stage found out and a later one needs, plain values.
        about: the command line and versions, for readers.
    """

    folder: Path
    request: dict[str, Any]
    done: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunState | None:
        """Read the state of a folder, None if it has none that can be read."""
        try:
            content = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
            before = content.get(BEFORE)
            if before is not None and before["checkpoints"] == _checkpoints(folder):
                content = before  # the resumed training was killed, or has not come to its first checkpoint yet
            return cls(folder, content["request"], content["done"], content["facts"], content["about"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def finish(self, stage: str, **facts: Any) -> None:
        """Write that a stage is complete."""
        self.done = [*dict.fromkeys([*self.done, stage])]
        self.facts.pop(BEGUN, None)  # masks that were begun are complete, or of cases as they were before
        self.facts.update(facts)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write_json(self.folder / STATE_NAME, self._content)

    @property
    def _content(self) -> dict[str, Any]:
        return {"request": self.request, "done": self.done, "facts": self.facts, "about": self.about}

    @contextlib.contextmanager
    def written_for_training(self) -> Iterator[None]:
        """Write the file for the training in the block: until there is a new checkpoint, the earlier state holds.

        It holds also if the program is killed; after an error or Ctrl-C, the file itself is as it was.
        """
        path, checkpoints, earlier = self.folder / STATE_NAME, _checkpoints(self.folder), RunState.read(self.folder)
        before = path.read_bytes() if path.is_file() else None
        kept = {BEFORE: {**earlier._content, "checkpoints": checkpoints}} if earlier and checkpoints else {}
        try:
            write_json(path, {**self._content, **kept})
            yield
        except BaseException:
            if _checkpoints(self.folder) == checkpoints:
                if before is None:
                    path.unlink(missing_ok=True)
                else:
                    write_text(path, before.decode("utf-8"))
            raise

    def differences(self, request: Mapping[str, Any]) -> list[str]:
        """Say what another request asks for that this one does not.

        >>> RunState(Path(), {"dataset": "a", "keys": {"epochs": 2}}).differences({"dataset": "b", "keys": {}})
        ['dataset was a and is b', 'keys had epochs 2']
        """
        before, now = json.loads(json_text(self.request)), json.loads(json_text(request))
        # Of configs counts what they say and not where they lie, as far as a version noted it.
        for each in (before, now):
            each.pop("configs" if CONTENT in before else CONTENT, None)
        for name in FILES:  # of a file that is not there, or that an earlier version did not note
            if name not in before or name not in now:
                before.pop(name, None)
                now.pop(name, None)
        for name in LATER:
            if name not in before:
                now.pop(name, None)
                if name not in before.get("keys", {}):  # nor was the option passed on to the bundle
                    now.get("keys", {}).pop(name, None)
        places = {"keys": "keys", CONTENT: "configs", **FILES}
        lines = [
            f"{name} was {before.get(name)} and is {now.get(name)}"
            for name in [*dict.fromkeys([*before, *now])]
            if name not in places and before.get(name) != now.get(name)
        ]
        for name, where in places.items():
            lines += _key_differences(where, before.get(name, {}), now.get(name, {}))
        return lines


def has_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a training."""
    return any((folder / "models" / name).is_file() for name in CHECKPOINTS)


def can_go_on(folder: Path) -> bool:
    """Return whether a folder holds a training that can be resumed, or is complete: `model.pt` alone may be neither."""
    is_complete = "trained" in getattr(RunState.read(folder), "done", ())
    return (folder / "models" / LAST_EPOCH).is_file() or (is_complete and has_checkpoint(folder))


def _checkpoints(folder: Path) -> dict[str, str]:
    """The checkpoints that are there, with what changes when one is replaced, and not when the folder is copied."""
    found = [path for name in CHECKPOINTS if (path := folder / "models" / name).is_file()]
    return {path.name: hashlib.sha256(_end(path)).hexdigest() for path in found}


def _end(path: Path) -> bytes:
    """What tells a checkpoint from others: its end has a checksum of all of it, or those of its parts."""
    with path.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - END_BYTES))
        return f"{size} ".encode() + stream.read()


def file_keys(configs: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the keys of a run's own train.json and plan.json, by which a later start knows that one was edited.

    Args:
        configs: the paths of the two, and perhaps others after them; a file that cannot be read is left out.

    Returns:
        `train_keys` and `plan_keys`; of an entry of train.json that is long, a hash.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, path in zip(FILES, configs, strict=False):
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue  # whoever takes it for a config says so
        content.pop("plan_report", None)  # is for readers
        found[name] = {key: _short(value) for key, value in content.items()} if name == "train_keys" else content
    return found


def _short(value: Any) -> Any:
    text = json_text(value)
    return value if len(text) <= MOST_SHOWN else HASH + hashlib.sha256(text.encode()).hexdigest()[:16]


def mask_files(state: RunState, masks: Path) -> list[Path]:
    """Return the masks of the cases that a training held out, in the folder of all masks."""
    return [masks / f"{item['case']}.nii.gz" for item in state.facts.get("held_out", ())]


def folds_in(run: Path) -> list[Path]:
    """Return the folders of the folds of a run that are there."""
    return [path for path in run.glob("fold*") if FOLD.fullmatch(path.name)]


def no_longer_held_out(state: RunState, held_out: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cases that a training held out before, by its state, and does not hold out now.

    >>> before = RunState(Path(), {}, facts={"held_out": [{"case": "a"}, {"case": "b"}], "earlier": ["c"]})
    >>> no_longer_held_out(before, [{"case": "b"}])
    ['a', 'c']
    """
    before = [*(item["case"] for item in state.facts.get("held_out", ())), *state.facts.get("earlier", ())]
    now = {item["case"] for item in held_out}
    return [case for case in dict.fromkeys(before) if case not in now]


def remove_masks(state: RunState, masks: Path) -> None:
    """Remove the masks of the cases that a training holds out, and of those that it held out before.

    The folds of a run share the folder of masks: what another fold holds out now stays.
    """
    folders = folds_in(state.folder.parent) if FOLD.fullmatch(state.folder.name) else []
    others = [RunState.read(each) for each in folders if each.name != state.folder.name]
    elsewhere = {path for other in others if other is not None for path in mask_files(other, masks)}
    earlier = [masks / f"{case}.nii.gz" for case in state.facts.get("earlier", ())]
    for path in (*mask_files(state, masks), *(path for path in earlier if path not in elsewhere)):
        path.unlink(missing_ok=True)


def begin_masks(state: RunState, masks: Path, made_by: Mapping[str, str | None]) -> list[dict[str, Any]]:
    """Return the held-out cases without a mask; masks stay if the same model and config made them.

    Args:
        state: of the training; it is written if masks are begun anew.
        masks: the folder of all masks.
        made_by: what tells the model and the config from others.
    """
    if state.facts.get(BEGUN) != made_by or made_by["model"] is None:
        state.done = [stage for stage in state.done if stage != "predicted"]
        remove_masks(state, masks)
        state.facts[BEGUN] = dict(made_by)  # only now, or masks of others would be kept after a kill
        state.write()
    return [
        item for item, path in zip(state.facts["held_out"], mask_files(state, masks), strict=True) if not path.is_file()
    ]


def model_identity(training: Path) -> str | None:
    """Return what tells the model of a training from an earlier one there, None if there is no model.

    Args:
        training: its folder.
    """
    model = training / "models" / MODEL
    if not model.is_file():
        return None
    digest = hashlib.sha256(_end(model))
    for path in (model.with_name(name) for name in BESIDE_MODEL):
        digest.update(path.read_bytes() if path.is_file() else b"none")
    return digest.hexdigest()[:16]


def has_masks(state: RunState | None, masks: Path) -> bool:
    """Return whether a training's masks are complete, still there, and of the model that is there now."""
    if state is None or "predicted" not in state.done:
        return False
    made_by, now = state.facts.get("model"), model_identity(state.folder)  # either may be unknown
    return (None in (made_by, now) or made_by == now) and all(path.is_file() for path in mask_files(state, masks))


def _key_differences(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what keys of one place differ; of a file, which has many, its name is said with each."""
    is_file = where in FILES.values()
    have, of = ("has", f" of {where}") if is_file else ("have", "")
    lines = []
    for name in [*dict.fromkeys([*before, *now])]:
        if name not in now:
            lines.append(f"{where} had {name} {_shown(before[name])}")
        elif name not in before:
            lines.append(f"{where} {have} {name} {_shown(now[name])}")
        elif before[name] != now[name]:
            was, given = _shown(before[name]), _shown(now[name])
            lines.append(f"{name}{of} was {was} and is {given}" if was != given else f"{name}{of} is another one")
    return lines


def _shown(value: Any) -> str:
    text = "..." if str(value).startswith(HASH) else str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."
