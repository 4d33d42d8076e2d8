"""Writing masks so that every program finds them on the image: in its geometry, and whole under their names."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.image_writer import ImageWriter
from monai.data.meta_tensor import MetaTensor
from monai.transforms.io.dictionary import SaveImaged
from monai.transforms.transform import MapTransform
from numpy.typing import NDArray

from monai_iou.files import OutputError, replaced_file
from monai_iou.volumes.names import PNG_EXTENSION
from monai_iou.volumes.png import write_png
from monai_iou.workflow.mask_formats import ITK_ENDINGS, mask_ending, write_with_itk
from monai_iou.workflow.result_headers import nifti_on_image
from monai_iou.workflow.settings import exit_with_message

if TYPE_CHECKING:
    from monai_iou.workflow.data import BundleCases

__all__ = ["ClassValuesd", "MaskWriter", "SaveImageMaskd", "mask_dtype"]

# What other programs read too, smallest first; 64 bits only where nothing else holds the values.
DTYPES = (np.uint8, np.uint16, np.int32, np.uint32, np.int64)
_TORCH_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)  # torch computes little with wider unsigned ones


def mask_dtype(values: Sequence[int]) -> type[np.generic]:
    """Return the smallest integer type that holds label values.

    Example:
        >>> mask_dtype([0, 70000]).__name__, mask_dtype([0, 1]).__name__, mask_dtype([0, 2**33]).__name__
        ('int32', 'uint8', 'int64')
    """
    fitting = (dtype for dtype in DTYPES if min(values) >= np.iinfo(dtype).min and max(values) <= np.iinfo(dtype).max)
    return next(fitting)


class ClassValuesd(MapTransform):
    """Turn a network's classes 0, 1, ... into label values, of the smallest integer type that holds them.

    It is one that other programs write as well: those of MONAI Label have no 64-bit integers, and float32 would merge
    large values.

    Regions that overlap, maps (C, *S) of 0 and 1 with the background first, are written one over the other.

    Args:
        keys: maps of classes.
        values: label values in the order of the classes.
        order: of regions the value that each is written as, later ones over earlier ones; empty for a map of classes.
        allow_missing_keys: do not fail where a key is absent.

    Example:
        >>> ClassValuesd("pred", [0, 312782546, 312782550])({"pred": torch.tensor([0.0, 2.0, 1.0])})["pred"].tolist()
        [0, 312782550, 312782546]
    """

    def __init__(
        self,
        keys: KeysCollection,
        values: Sequence[int],
        order: Sequence[int] = (),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.values = [int(value) for value in values]
        self.order = [int(value) for value in order]
        ends = min((0, *self.values, *self.order)), max((0, *self.values, *self.order))
        self.dtype = next(
            dtype for dtype in _TORCH_DTYPES if torch.iinfo(dtype).min <= ends[0] and ends[1] <= torch.iinfo(dtype).max
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with label values in place of classes."""
        items = dict(data)
        for key in self.key_iterator(items):
            classes = items[key]
            plain = torch.as_tensor(classes).as_subclass(torch.Tensor)
            values = self._over_each_other(plain) if self.order else self._of_classes(plain)
            items[key] = MetaTensor(values, meta=classes.meta) if isinstance(classes, MetaTensor) else values
        return items

    def _of_classes(self, classes: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.values, dtype=self.dtype, device=classes.device)[classes.to(torch.int64)]

    def _over_each_other(self, maps: torch.Tensor) -> torch.Tensor:
        written = torch.zeros_like(maps[:1], dtype=self.dtype)
        for region, value in zip(maps[1:], self.order, strict=True):
            written[0][region > 0] = value
        return written


class MaskWriter(ImageWriter):
    """MONAI writer of masks: NIfTI, or MetaImage, NRRD or PNG where the name ends so.

    A NIfTI mask has the header of a NIfTI image (`nifti_on_image`), so that programs that read qform or sform put the
    mask where they put the image. The file is written aside and renamed.

    Args:
        output_dtype: integer type of the mask.
        kwargs: as for `monai.data.ImageWriter`.

    Raises:
        OutputError: the file cannot be written; under `python -m monai.bundle` the program ends with that sentence.
    """

    def __init__(self, output_dtype: Any = np.uint8, **kwargs: Any) -> None:
        self.affine: NDArray[np.float64] | None = None
        self.source: Path | None = None
        super().__init__(output_dtype=output_dtype, **kwargs)

    def set_data_array(self, data_array: Any, channel_dim: int | None = 0, **kwargs: Any) -> None:
        """Take a mask of shape (1, X, Y, Z), or without the channel axis if `channel_dim` is None."""
        array = np.asarray(torch.as_tensor(data_array).detach().cpu())
        self.data_obj = array if channel_dim is None else np.take(array, 0, axis=channel_dim)

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, **options: Any) -> None:
        """Take the affine and the image's file from a MetaTensor's `meta`."""
        meta = meta_dict or {}
        self.affine = np.asarray(torch.as_tensor(meta.get("affine", torch.eye(4))).cpu(), dtype=np.float64)
        name = meta.get("filename_or_obj")
        self.source = Path(str(name)) if name else None

    def write(self, filename: Any, verbose: bool = False, **kwargs: Any) -> None:
        """Write the mask, and make its folder if there is none."""
        path = Path(filename)
        ending = mask_ending(path.name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(path, ending) as temporary:
                if ending == PNG_EXTENSION:
                    with exit_with_message():
                        write_png(self._array(), temporary)
                elif ending in ITK_ENDINGS:
                    write_with_itk(self._array(), self._affine(), temporary)
                else:
                    nifti_on_image(self._array(), self._affine(), self.source).to_filename(temporary)
        except OSError as error:
            message = (
                f"Expected to write the mask `{path}`, but got the error '{error.strerror or error}': free space or "
                "choose another folder."
            )
            with exit_with_message():
                raise OutputError(message) from error

    def _array(self) -> NDArray[Any]:
        array: NDArray[Any] = np.asarray(self.data_obj).astype(self.output_dtype)  # type: ignore[attr-defined]
        return array

    def _affine(self) -> NDArray[np.float64]:
        return np.eye(4) if self.affine is None else self.affine


class SaveImageMaskd(SaveImaged):
    """Write masks by `MaskWriter` to the files that their cases give.

    MONAI's own transform takes the folders out of a case's name unless it is told one root of all images, and raises an
    error without its cause where a file cannot be written. Still, this is a `SaveImaged`, and called so: MONAI Label
    leaves out what is one, MONAI Deploy what has `SaveImage` in its name, and both write results themselves.

    Args:
        keys: masks of shape (1, X, Y, Z), MetaTensors on the image's grid.
        cases: name the files.
        output_dir: folder of the files.
        output_postfix: text behind the names of the masks, after an underscore.
        output_ext: ending of the names, which decides the format.
        output_dtype: integer type of the masks.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        OutputError: a file cannot be written; under `python -m monai.bundle` the program ends with that sentence.
    """

    def __init__(
        self,
        keys: KeysCollection,
        cases: BundleCases,
        output_dir: str,
        output_postfix: str = "",
        output_ext: str = ".nii.gz",
        output_dtype: Any = np.uint8,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, output_dir=output_dir, allow_missing_keys=allow_missing_keys, writer=MaskWriter)
        self.cases, self.output_dtype = cases, output_dtype
        self.place = (output_dir, output_postfix, output_ext)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Write the files and return the item as it is."""
        items = dict(data)
        for key in self.key_iterator(items):
            meta = items[key].meta
            image = Path(str(meta.get("filename_or_obj", "image")))
            writer = MaskWriter(self.output_dtype)
            writer.set_data_array(items[key])
            writer.set_metadata(meta)
            writer.write(self.cases.result_path(image, *self.place))
        return items
