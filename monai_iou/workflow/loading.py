"""Loading in the bundle's configs: MONAI's LoadImaged over the one reader of volumes, and labels as classes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config.type_definitions import KeysCollection
from monai.data.image_reader import ImageReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.transform import MapTransform
from monai.utils.enums import MetaKeys, SpaceKeys
from numpy.typing import NDArray

from monai_iou.datasets.case_volumes import read_shares
from monai_iou.datasets.cases import DatasetError, check_intensities
from monai_iou.planning.plan import Plan
from monai_iou.volumes.reading import Volume, VolumeError, read_channels, read_labels

__all__ = ["LabelClassesd", "LabelReader", "VolumeReader", "class_dtype", "label_dtype"]

MOST_SHOWN = 10
_NO_CHANNEL = float("nan")  # MONAI's mark of an array without a channel axis


class VolumeReader(ImageReader):
    """MONAI reader over `monai_iou.volumes.reading`: the same files and refusals as in evaluation and planning.

    Images come as float32 of shape (X, Y, Z), or (X, Y, Z, channels); several files are the channels of one image.

    Raises:
        DatasetError: from `get_data`, if a file cannot be read, or holds NaN, infinity or more than float32 can hold.
    """

    def verify_suffix(self, filename: Any) -> bool:
        """Take every file: what cannot be read is refused by `get_data`."""
        return True

    def read(self, data: Any, **kwargs: Any) -> tuple[Path, ...]:
        """Return the paths. After an error here MONAI would try its other readers, which know no checksums."""
        return tuple(Path(path) for path in (data if isinstance(data, (list, tuple)) else [data]))

    def get_data(self, img: Any) -> tuple[NDArray[Any], dict[str, Any]]:
        """Read the volume and describe where it lies."""
        try:
            volume = self.volume(img)
        except VolumeError as error:
            raise DatasetError(str(error)) from error
        array = volume.array
        has_channels = array.ndim == 4 and len(array) > 1
        if array.ndim == 4:
            array = np.moveaxis(array, 0, -1) if has_channels else array[0]
        meta = {
            MetaKeys.AFFINE: volume.grid.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: volume.grid.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(volume.grid.shape),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if has_channels else _NO_CHANNEL,
        }
        return array, {str(key): value for key, value in meta.items()}

    def volume(self, paths: Sequence[Path]) -> Volume:
        """Read the files as one volume, with the channels first."""
        volume = read_channels(paths)
        check_intensities(volume)
        return Volume(volume.array.astype(np.float32), volume.grid, volume.path)


class LabelReader(VolumeReader):
    """The same for label maps, in the smallest integer type that holds them; LoadImaged keeps it by `dtype: null`.

    Several files are the labels of several raters, and become channels.

    Args:
        soft: read shares of classes, float32, instead of values; each class is a channel, and of several raters' shares
            the mean is taken.
        kwargs: as for `VolumeReader`.
    """

    def __init__(self, soft: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.soft = soft

    def volume(self, paths: Sequence[Path]) -> Volume:
        """Read the files as one volume, with the channels first."""
        volumes = [read_shares(path) if self.soft else read_labels(path) for path in paths]
        first = volumes[0]
        if len(volumes) == 1:
            return first
        arrays = [volume.array for volume in volumes]
        return Volume(np.mean(arrays, axis=0) if self.soft else np.stack(arrays), first.grid, first.path)


def class_dtype(classes: int) -> torch.dtype:
    """Return the smallest type that holds the numbers of so many classes.

    Example:
        >>> class_dtype(256), class_dtype(1000)
        (torch.uint8, torch.int16)
    """
    return torch.uint8 if classes <= 256 else torch.int16 if classes <= 2**15 else torch.int32


def label_dtype(plan: Plan) -> torch.dtype:
    """Return the type that holds the labels of a plan between reading and the network."""
    return torch.float32 if plan.soft_labels else class_dtype(len(plan.labels) + (plan.ignore is not None))


class LabelClassesd(MapTransform):
    """Turn the values of a label map into classes 0, 1, ...; values of any size are kept apart.

    Args:
        keys: label maps of an integer type.
        values: label values in the order of the classes.
        ignore: value of voxels that count neither way; it becomes the number after the last class.
        soft: labels hold shares of classes, and stay as they are.
        allow_missing_keys: do not fail where a key is absent.

    Raises:
        DatasetError: on a value that is none of `values`.

    Example:
        >>> label = torch.tensor([[0, 312782550, 312782546]])
        >>> LabelClassesd("label", [0, 312782546, 312782550])({"label": label})["label"].tolist()
        [[0, 2, 1]]
    """

    def __init__(
        self,
        keys: KeysCollection,
        values: Sequence[int],
        ignore: int | None = None,
        soft: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.values = [int(value) for value in values] + ([] if ignore is None else [int(ignore)])
        self.soft = soft

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with classes in place of label values."""
        items = dict(data)
        for key in () if self.soft else self.key_iterator(items):
            items[key] = self._classes(items[key])
        return items

    @property
    def _shown(self) -> str:
        return ", ".join(map(str, self.values[:MOST_SHOWN])) + ", ..." * (len(self.values) > MOST_SHOWN)

    def _classes(self, label: Any) -> torch.Tensor:
        order = np.argsort(self.values, kind="stable")
        whole = (label if isinstance(label, torch.Tensor) else torch.from_numpy(label)).as_subclass(torch.Tensor)
        ascending = torch.from_numpy(np.asarray(self.values, dtype=np.int64)[order]).to(whole.device)
        place = torch.searchsorted(ascending, whole.to(torch.int64).contiguous()).clamp(max=len(ascending) - 1)
        wrong = ascending[place] != whole
        if bool(wrong.any()):
            name = label.meta.get("filename_or_obj", "the label") if isinstance(label, MetaTensor) else "the label"
            message = (
                f"Expected {name} to hold only label values that the network was planned for ({self._shown}), but got "
                f"{whole[wrong].flatten()[0].item()}: correct the label, or train with this value."
            )
            raise DatasetError(message)
        classes = torch.from_numpy(order).to(whole.device)[place].to(class_dtype(len(order)))
        return MetaTensor(classes, meta=label.meta) if isinstance(label, MetaTensor) else classes
