"""`monai-iou predict`: which images, and where their masks go."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_iou.datasets.cases import Case, DatasetError
from monai_iou.files import check_outputs, prepare
from monai_iou.planning.stored import load_plan
from monai_iou.volumes.names import MASK, PREVIEW, PROBABILITIES
from monai_iou.workflow.config_errors import ConfigError
from monai_iou.workflow.data import BundleCases
from monai_iou.workflow.images import find_images, image_cases
from monai_iou.workflow.inference_keys import keys_over, not_written
from monai_iou.workflow.mask_formats import mask_ending
from monai_iou.workflow.result_files import check_results, result_file
from monai_iou.workflow.running import run_configs
from monai_iou.workflow.trained_models import TrainedModels
from monai_iou.workflow.undefined_references import check_takes_images
from monai_iou.workflow.written_results import Prediction, WrittenResults, failure_of

__all__ = ["Prediction", "Predictions", "earlier_results", "plan_predictions", "run_all"]


@dataclass(frozen=True)
class Predictions:
    """A run of inference: the images whose masks go to one folder in one format."""

    models: TrainedModels
    output: Path
    suffix: str
    ending: str
    items: tuple[Prediction, ...]

    def keys(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The bundle's keys of this run."""
        images = [_entry(item.case) for item in self.items]
        results = {"output_dir": str(self.output), "mask_suffix": self.suffix, "mask_format": self.ending}
        decided = {**self.models.keys, **results, "save_probabilities": False, **extra}
        return {"images": images, **keys_over(self.models.config, decided)}

    def run(self, extra: Mapping[str, Any]) -> None:
        """Write the masks.

        Raises:
            ValueError: an image cannot be segmented.
            OutputError: a mask cannot be written.
        """
        run_configs([self.models.config], self.keys(extra), "inference")


def _entry(case: Case) -> Any:
    """A case as the bundle's key `images` names it, by its files alone where they give its name."""
    item = case.as_item()
    return item["image"] if image_cases([item["image"]])[0].name == case.name else item


def plan_predictions(
    models: TrainedModels,
    images: Sequence[Path],
    output: Path | None,
    ending: str,
    *,
    probabilities: bool = False,
    preview: bool = False,
) -> list[Predictions]:
    """Decide where each mask goes, and what is to lie beside it.

    Args:
        models: decide how many channels an image has.
        images: see `find_images`.
        output: folder of the masks, called as the images; None puts each beside its image, with `_mask` behind its
            name.
        ending: of the masks' names, which decides their format; "same" takes the image's, where it can be written.
        probabilities: whether they are to be written.
        preview: whether a picture is to be written.

    Returns:
        A run for each folder and format.

    Raises:
        DatasetError: an image is missing.
        OutputError: a result would replace an image, or another result.
        ConfigError: the inference.json takes no images from a command.
    """
    check_takes_images(models.config)
    plan = load_plan(models.files[0].with_suffix(".json"))
    cases = find_images(images, plan.in_channels)
    groups: dict[tuple[Path, str], list[Case]] = {}
    for case in cases:
        folder = output if output is not None else case.image.parent
        wanted = mask_ending(case.image.name) if ending == "same" else ending
        groups.setdefault((folder, wanted), []).append(case)
    suffix = "" if output is not None else MASK
    runs = []
    for (folder, wanted), members in groups.items():
        items = tuple(
            Prediction(
                case,
                result_file(folder, case.name, suffix, wanted),
                result_file(folder, case.name, PROBABILITIES, ".nii.gz") if probabilities else None,
                result_file(folder, case.name, PREVIEW, ".png") if preview else None,
            )
            for case in (_named(case, beside=output is None) for case in members)
        )
        runs.append(Predictions(models, folder, suffix, wanted, items))
    _check(runs)
    return runs


def earlier_results(runs: Sequence[Predictions]) -> dict[Path, list[Path]]:
    """Return for each mask that is there the probabilities and the picture that this command would leave beside it.

    No image and no result of the command is among them, whatever its name.
    """
    items = [item for run in runs for item in run.items]
    own = {os.path.realpath(path) for item in items for path in (*item.files.values(), *item.case.images)}

    def beside(item: Prediction) -> list[Path]:
        kinds = ((PROBABILITIES, ".nii.gz"), (PREVIEW, ".png")) if os.path.lexists(item.mask) else ()
        paths = [result_file(item.mask.parent, Path(item.case.name).name, *kind) for kind in kinds]
        return [path for path in paths if os.path.lexists(path) and os.path.realpath(path) not in own]

    return {item.mask: beside(item) for item in items}


def _named(case: Case, *, beside: bool) -> Case:
    """Beside its image a mask needs no folder in its name."""
    return Case(Path(case.name).name, case.image, None, case.channels) if beside else case


def _check(runs: Sequence[Predictions]) -> None:
    images = {"the images": [path for run in runs for item in run.items for path in item.case.images]}
    for run in runs:
        if not run.suffix:
            check_outputs({"--output": run.output}, images)
    check_results([named for run in runs for item in run.items for named in item.files.items()], images)
    for run in runs:
        prepare(run.output)


def run_all(
    runs: Sequence[Predictions],
    extra: Mapping[str, Any],
    done: Callable[[Prediction], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> None:
    """Run inference for each folder and format, and tell each mask that was written.

    The images of all runs are read before the first run. A run that fails keeps no other run from its images, unless
    its config is at fault or it says what another said before, which has nothing to do with an image then. What
    belongs to an earlier mask is removed from beside a new one, also after Ctrl-C.

    Args:
        runs: the images, and where their results go.
        extra: the bundle's keys.
        done: called for each image whose mask was written, also by a run that failed or was stopped after it, without
            probabilities that were not written; it writes the picture, but after Ctrl-C it gets none to write.
        tell: called with a line for each file that is removed.

    Raises:
        ValueError: an image cannot be segmented; the message has the sentences of all runs that failed.
        OutputError: a result cannot be written, and nothing else failed.
        ConfigError: the bundle's config cannot be run, and nothing else failed.
    """
    if len(runs) > 1:  # a single run checks its own images
        _raise_together(_checked(runs))
    failures: list[Exception] = []
    earlier = earlier_results(runs)
    for run in runs:
        results = WrittenResults(run.items, earlier)
        try:
            failed = failure_of(functools.partial(run.run, extra))
            results.are_complete = failed is None
            if failed is None and (missing := results.missing()):
                failed = not_written(run.models.config, missing)
            of_results = results.finish(done, tell)
        except BaseException:  # Ctrl-C above all
            for error in results.finish(done, tell, stopped=True):
                tell(str(error))
            raise
        again = failed is not None and str(failed) in map(str, failures)
        failures += [each for each in (failed, *of_results) if each is not None]
        if again or isinstance(failed, ConfigError):
            break
    _raise_together(failures)


def _checked(runs: Sequence[Predictions]) -> list[Exception]:
    """Read the images of every run, and return what is wrong with them: the first such sentence of each run."""
    plan = load_plan(runs[0].models.files[0].with_suffix(".json"))
    checks = [(BundleCases(str(run.output), images=run.keys({})["images"]), run.ending) for run in runs]
    found = [failure_of(functools.partial(cases.check_inference, plan, ending)) for cases, ending in checks]
    return [each for each in found if each is not None]


def _raise_together(failures: Sequence[Exception]) -> None:
    """Raise a single error as it is, and the sentences of several as one error."""
    if len(failures) > 1:
        raise DatasetError("\n".join(dict.fromkeys(map(str, failures)))) from failures[0]
    if failures:
        raise failures[0]
