"""What the values in label files mean: classes, regions that overlap, and voxels that count neither way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LabelScheme"]


@dataclass(frozen=True)
class LabelScheme:
    """What the values in label files mean.

    Attributes:
        labels: value -> name, 0 first; without the ignored value. Of regions, the values that they are made of.
        regions: name -> values, in the order of dataset.json, where classes overlap; empty without regions.
        order: of the regions, the value that each is written as, later ones over earlier ones (nnU-Net's
            `regions_class_order`).
        ignore: value of voxels that count neither way, None without one.
        soft: whether label files hold the share of each foreground class in a voxel, from 0 to 1, instead of values.
    """

    labels: dict[int, str]
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    order: tuple[int, ...] = ()
    ignore: int | None = None
    soft: bool = False

    @property
    def classes(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and values of each foreground class, in the order of the network's classes from 1.

        >>> LabelScheme({0: "background", 1: "oedema", 2: "core"}, {"whole": (1, 2), "core": (2,)}, (1, 2)).classes
        (('whole', (1, 2)), ('core', (2,)))
        """
        return tuple(self.regions.items()) or tuple((name, (value,)) for value, name in self.labels.items() if value)

    @property
    def file_values(self) -> tuple[int, ...]:
        """Every value that a label file may hold."""
        return tuple(self.labels) if self.ignore is None else (*self.labels, self.ignore)
