"""The root of the bundle and its cases, as the configs ask for them.

`BundleCases` is the one object that the configs create from `dataset_dir`: lists of items for MONAI's datasets, and the
plan. It opens nothing before it is asked, so that a config without its data still gives its network.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from monai_iou.datasets.case_volumes import check_case, check_side
from monai_iou.datasets.cases import Case, DatasetError, check_voxel_size, log_edges
from monai_iou.datasets.folder import SegmentationFolder, is_dataset, map_cases, read_folder
from monai_iou.datasets.naming import check_names
from monai_iou.planning.intensity import warn_of_unnamed_ct
from monai_iou.planning.plan import Plan, make_plan
from monai_iou.planning.stored import load_plan
from monai_iou.volumes.names import PNG_EXTENSION, RESULTS, case_name, volumes_below
from monai_iou.workflow.images import image_cases
from monai_iou.workflow.keys import calling_workflow
from monai_iou.workflow.labelled import case_items, check_raters
from monai_iou.workflow.mask_formats import check_fits_png
from monai_iou.workflow.models import report_missing_plan
from monai_iou.workflow.other_datasets import check_meaning
from monai_iou.workflow.records import check_held_out, check_unseen, data_record, image_identity
from monai_iou.workflow.result_files import result_file
from monai_iou.workflow.settings import exit_with_message, is_true, optional

__all__ = ["BundleCases", "bundle_root"]

logger = logging.getLogger(__name__)


def bundle_root() -> str:
    """Return the root of the bundle whose config is being resolved, "." if that cannot be known.

    The default of the configs' `bundle_root`. `monai.bundle.load` gives a config no way to learn where it lies, and "."
    then means the caller's directory, where there is no model; so look for the workflow that is resolving this.
    """
    workflow = calling_workflow()
    return "." if workflow is None else str(Path(workflow.config_root_path).resolve().parent)


class BundleCases:
    """The cases of a dataset folder in any of the supported layouts, as the bundle's configs need them.

    Args:
        dataset_dir: the folder; for inference also any folder of images.
        val_fraction: part of `training` that is held out to choose the best checkpoint, see `split_cases`.
        split_seed: seed of that split, or of the folds.
        folds: number of folds of a cross-validation; validation is then fold `fold` instead of a fraction.
        fold: from 0 to `folds` - 1, see `fold_cases`.
        images: what inference segments instead of the folder's images, see `image_cases`.
        raters: "mean" or "draw", see `make_plan`.
        spatial_dims: 2 or 3, see `make_plan`; None decides by the volumes.

    Raises:
        DatasetError: on first use of a list, if the folder cannot be used. Under `python -m monai.bundle` the program
            ends with that one sentence and exit code 1 instead of a traceback.
    """

    def __init__(
        self,
        dataset_dir: str,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        folds: int | None = None,
        fold: int = 0,
        images: object = None,
        raters: str = "mean",
        spatial_dims: int | None = None,
    ) -> None:
        self.dataset_dir = Path(dataset_dir)
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.folds, self.fold = optional(folds), fold
        self._images = optional(images)
        self.raters, self.spatial_dims = raters, spatial_dims
        self._record: dict[str, Any] | None = None

    @property
    def training(self) -> list[dict[str, Any]]:
        """Items to train on."""
        return case_items(self._split[0], self.folder)

    @property
    def validation(self) -> list[dict[str, Any]]:
        """Items held out from `training` to choose the best checkpoint."""
        return case_items(self._split[1], self.folder)

    @property
    def evaluation(self) -> list[dict[str, Any]]:
        """Items to report scores on: `test_labelled`, else the validation split."""
        return self.evaluation_on(None, [])

    def evaluation_on(
        self, which: str | None, plans: Sequence[Plan], *, score_trained_cases: bool = False
    ) -> list[dict[str, Any]]:
        """Items to report scores on, by the config's key `evaluate_on`.

        Args:
            which: "test_labelled"; "validation", the cases that this split or fold holds out; None for `evaluation`.
            plans: of the models that are evaluated; none may have been trained on a case that is scored.
            score_trained_cases: score "test_labelled" cases that a model was trained on all the same.

        Raises:
            ValueError: `which` is something else.
            DatasetError: there are no such cases, a model was trained on them, or it knows other labels.
        """
        wanted = optional(which)
        with exit_with_message():
            if wanted not in (None, "test_labelled", "validation"):
                message = (
                    f'Expected `evaluate_on` to be "test_labelled", "validation" or null, but got {which!r}: leave '
                    "--evaluate_on out for `test_labelled`, or for the validation cases of a dataset without it."
                )
                raise ValueError(message)
            if wanted == "test_labelled" and not self.folder.evaluation:
                message = (
                    f"Expected {self.dataset_dir / 'dataset.json'} to have `test_labelled` cases, but it has none: add "
                    "them, or take --evaluate_on validation."
                )
                raise DatasetError(message)
            check_meaning(self.folder, plans)
            scheme = plans[0].scheme if plans else None
            if self.scored_part(which) == "test":
                if not score_trained_cases:
                    check_unseen(self.folder, plans)
                cases = self.folder.evaluation
                self.folder.need_like_spacings(cases, self.folder.check(cases))
                return case_items(cases, self.folder, scheme)
            check_held_out(self.folder, *self._split, plans)
        return case_items(self._split[1], self.folder, scheme)

    def scored_part(self, which: str | None) -> str:
        """Return what the scores of `evaluation_on` are called by: "test", or "val" for held-out training cases."""
        return "test" if optional(which) != "validation" and self.folder.evaluation else "val"

    @property
    def inference(self) -> list[dict[str, Any]]:
        """Items to segment: `test`, else `test_labelled`; without dataset.json every image of the folder."""
        with exit_with_message():
            cases = self._to_segment()
            if not cases:
                message = (
                    f"Expected {self.dataset_dir} to hold images to segment, but it has neither a dataset.json with "
                    "`test` images nor NIfTI, MetaImage, NRRD or PNG files or DICOM series: name one that holds some."
                )
                raise DatasetError(message)
            return [replace(case, label=None).as_item() for case in cases]

    def _to_segment(self) -> Sequence[Case]:
        if self._images is not None:
            return image_cases(self._images)
        if (self.dataset_dir / "dataset.json").exists():
            return self.folder.test
        cases = [Case(case_name(path), path) for path in volumes_below(self.dataset_dir, deep=False, without=RESULTS)]
        check_names(cases, str(self.dataset_dir))
        return cases

    @property
    def files(self) -> dict[str, list[Path]]:
        """Every file that belongs to the folder, by what it is: what no run may write over."""
        with exit_with_message():
            if self._images is not None or not is_dataset(self.dataset_dir):
                images = self._to_segment() if self._images is not None or self.dataset_dir.is_dir() else []
                return {"the images": [path for case in images for path in case.images]}
            cases = [*self.folder.labelled, *self.folder.evaluation, *self.folder.test]
            return {
                "the dataset": [self.dataset_dir / "dataset.json"],
                "the images": [path for case in cases for path in case.images],
                "the labels": [path for case in cases for path in case.labels],
            }

    @property
    def mask_root(self) -> str:
        """Folder below which `SaveImaged` repeats folders: of copies of the bundle from before `SaveImageMaskd`."""
        return str(Path(os.sep).absolute()) if self._case_names else ""

    def mask_name(self, meta: Mapping[str, Any] | None, saver: object = None) -> dict[str, Any]:
        """Name a mask after its case, for `output_name_formatter` of the same copies; MONAI takes an extension off."""
        file = Path(str((meta or {}).get("filename_or_obj", "image")))
        return {"subject": str(Path(self.mask_root) / f"{self._case_names.get(file, case_name(file))}.nii.gz")}

    def result_path(self, image: Path, folder: str, suffix: str, ending: str) -> Path:
        """Return where the mask of an image goes, or another result with the suffix behind its case's name."""
        return result_file(Path(folder), self._case_names.get(image, case_name(image)), suffix, ending)

    def result_files(self, folder: str, suffix: str, ending: str) -> dict[str, Path]:
        """Return where inference writes the mask of each case, or another result, see `result_path`."""
        return {name: self.result_path(image, folder, suffix, ending) for image, name in self._case_names.items()}

    @cached_property
    def _case_names(self) -> dict[Path, str]:
        """Of the images to segment; none where MONAI Label and MONAI Deploy bring theirs later."""
        with exit_with_message():
            return {case.image: case.name for case in self._to_segment()}

    def check_inference(self, plan: Plan, mask_format: str = ".nii.gz") -> None:
        """Read every image of `inference` before the first is segmented, so that a bad one cannot end a long run.

        Raises:
            DatasetError: an image is damaged, has other channels than the model, or a mask that the format cannot hold.
        """
        cases = [replace(case, label=None) for case in self._to_segment()] if self.inference else []

        def check(case: Case) -> None:
            facts = check_case(case, plan.scheme, plan.modalities, "the trained model")
            usual = log_edges(plan.patch_size, plan.pixdim)[None]
            check_voxel_size(case.image, facts, usual, "those that the model was trained on")
            if mask_format == PNG_EXTENSION:
                check_fits_png(case.image, facts.shape, plan.label_values)

        with exit_with_message():
            logger.info("Checking %d images%s", len(cases), "" if self._images else f" of {self.dataset_dir}")
            map_cases(check, cases)

    @cached_property
    def folder(self) -> SegmentationFolder:
        """The folder's dataset.json, read."""
        with exit_with_message():
            return read_folder(self.dataset_dir)

    def plan(
        self,
        patch_size: Sequence[int],
        pixdim: Sequence[float] | None = None,
        base_channels: int = 16,
        saved: str | None = None,
        *,
        full_resolution: bool | str = False,
        prefer_saved: bool = False,
    ) -> Plan:
        """Return the plan: from the training cases, from `saved`, or, without both, that of the shipped metadata.

        Args:
            patch_size: see `make_plan`.
            pixdim: see `make_plan`.
            base_channels: see `make_plan`.
            full_resolution: see `network_size`.
            saved: path of a plan that training stored; it need not exist.
            prefer_saved: take `saved` first, as evaluation and inference must; training takes the data first.

        Raises:
            DatasetError: the plan is damaged, or there is a trained model beside `saved` but no plan.
        """
        with exit_with_message():
            stored = Path(saved) if saved is not None and Path(saved).is_file() else None
            in_folder = is_dataset(self.dataset_dir)
            if stored is not None and (prefer_saved or not in_folder):
                return load_plan(stored)
            if prefer_saved and saved is not None:
                report_missing_plan(Path(saved), self.dataset_dir if in_folder else None)
            whole = is_true(full_resolution, "full_resolution")
            if not in_folder:
                return make_plan(None, [], patch_size, pixdim, base_channels, full_resolution=whole)
            check_raters(self.folder, self.raters)
            facts = dict(zip(self.folder.labelled, self.folder.training_facts, strict=True))
            trained, every = [facts[case] for case in self._split[0]], list(facts.values())
            check_side(self._split[0], trained)
            warn_of_unnamed_ct(self.folder.modalities, every)
            kinds: dict[str, Any] = {"raters": self.raters, "spatial_dims": self.spatial_dims, "trained": trained}
            plan = make_plan(self.folder, every, patch_size, pixdim, base_channels, full_resolution=whole, **kinds)
            return self.trained_on(plan)

    def trained_on(self, plan: Plan) -> Plan:
        """Return a plan with the cases of this split as those that its model is trained on; as it is without them."""
        return replace(plan, **self._trained) if is_dataset(self.dataset_dir) else plan

    @cached_property
    def _trained(self) -> dict[str, Any]:
        own, _ = self._split
        return {"trained": tuple(case.name for case in own), "trained_images": tuple(map_cases(image_identity, own))}

    def record(self, plan: Plan) -> dict[str, Any]:
        """Return what a resumed training must have in common with this one; {} for data that others brought."""
        if not is_dataset(self.dataset_dir):
            return {}
        self._record = self._record or data_record(*self._split, self.trained_on(plan))
        return self._record

    @cached_property
    def _split(self) -> tuple[list[Case], list[Case]]:
        with exit_with_message():
            folder = self.folder
            logger.info("Checking %d cases for training and validation of %s", len(folder.labelled), folder.root)
            folder.need_training()
            # Before minutes of reading.
            training, validation = folder.split(self.val_fraction, self.split_seed, self.folds, self.fold)
            _ = folder.training_facts
            if set(training) & set(validation):
                logger.warning("%s has one patient: it is validated on what it is trained on.", folder.root)
            return training, validation
