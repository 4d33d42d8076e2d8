"""The probabilities behind a mask, on the image's own grid, for thresholds and ensembles of a user's own."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.transforms.transform import MapTransform

from monai_iou.files import OutputError, replaced_file
from monai_iou.volumes.names import PROBABILITIES
from monai_iou.volumes.probability_kind import description
from monai_iou.workflow.result_headers import nifti_on_image
from monai_iou.workflow.settings import exit_with_message

if TYPE_CHECKING:
    from monai_iou.workflow.data import BundleCases

__all__ = ["SaveProbabilitiesd"]


class SaveProbabilitiesd(MapTransform):
    """Write the probabilities of all classes as NIfTI, float32, with the classes on the fourth axis.

    The file lies beside the mask and is called as the case, with `_probabilities` behind it.

    Args:
        keys: probabilities of shape (C, X, Y, Z), MetaTensors on the image's grid.
        cases: name the files.
        output_dir: folder of the files.
        regions: whether the channels are regions, each with a probability of its own, and not classes that share one;
            the files' descriptions say so, for `monai-iou evaluate`. None says nothing.
        values: of the classes in label files, of the background too; the descriptions name them if they have gaps.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        OutputError: a file cannot be written; under `python -m monai.bundle` the program ends with that sentence.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cases: BundleCases,
        output_dir: str,
        allow_missing_keys: bool = False,
        *,
        regions: bool | None = None,
        values: Sequence[int] = (),
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.cases, self.output_dir, self.regions, self.values = cases, output_dir, regions, values

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files and return the item as it is."""
        items = dict(data)
        for key in self.key_iterator(items):
            meta = items[key].meta
            image = Path(str(meta.get("filename_or_obj", "image")))
            path = self.cases.result_path(image, self.output_dir, PROBABILITIES, ".nii.gz")
            values = items[key].detach().cpu().as_subclass(torch.Tensor).to(torch.float32).numpy()
            affine = np.asarray(meta["affine"], dtype=np.float64)
            told = "" if self.regions is None else description(regions=self.regions, values=self.values)
            _write(nifti_on_image(np.moveaxis(values, 0, -1), affine, image), path, told)
        return items


def _write(image: Any, path: Path, told: str) -> None:
    image.header["descrip"] = told
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(path, ".nii.gz") as temporary:
            image.to_filename(temporary)
    except OSError as error:
        message = (
            f"Expected to write the probabilities `{path}`, but got the error '{error.strerror or error}': free space "
            "or choose another folder."
        )
        with exit_with_message():
            raise OutputError(message) from error
