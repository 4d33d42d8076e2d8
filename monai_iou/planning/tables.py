"""Tables of what `monai-iou plan` found and decided, for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from monai_iou.tables import counted

if TYPE_CHECKING:
    from monai_iou.datasets.folder import SegmentationFolder
    from monai_iou.planning.fingerprint import Fingerprint
    from monai_iou.planning.rules import Proposal

__all__ = ["plan_tables"]


def plan_tables(folder: SegmentationFolder, fingerprint: Fingerprint, proposal: Proposal) -> list[Table]:
    """Return the tables of the dataset, of its channels, of its classes and of the decisions."""
    return [_dataset(folder, fingerprint), _channels(fingerprint), _classes(fingerprint), _decisions(proposal)]


def _dataset(folder: SegmentationFolder, fingerprint: Fingerprint) -> Table:
    cases = f"{counted(fingerprint.cases, 'training case')} of {counted(fingerprint.patients, 'patient')}"
    table = Table("", "median", "smallest", "largest", title=escape(f"{folder.root.name}: {cases}"))
    for name, spread in (("shape, voxels (RAS)", fingerprint.shape), ("spacing, mm (RAS)", fingerprint.spacing)):
        table.add_row(name, *(_by(values) for values in (spread.median, spread.smallest, spread.largest)))
    share = fingerprint.foreground_fraction
    shares = (f"{100 * values[0]:.3g}" for values in (share.median, share.smallest, share.largest))
    table.add_row("foreground, % of a case", *shares)
    empty = ", ".join(fingerprint.empty_cases[:5]) + (", ..." if len(fingerprint.empty_cases) > 5 else "")
    without = counted(len(fingerprint.empty_cases), "case")
    table.caption = escape(f"{without} without foreground{f': {empty}' if empty else ''}")
    return table


def _channels(fingerprint: Fingerprint) -> Table:
    table = Table("intensity in the foreground", "0.5 %", "5 %", "50 %", "95 %", "99.5 %")
    for name, percentiles in fingerprint.intensities:
        table.add_row(escape(name), *(f"{value:.5g}" for value in percentiles))
    return table


def _classes(fingerprint: Fingerprint) -> Table:
    sizes = "smallest, median, largest"
    table = Table("class", "% of voxels", "cases", "components", "per case", f"{sizes}, voxels", f"{sizes}, mm3")
    for label in fingerprint.classes:
        spreads = ((size.smallest[0], size.median[0], size.largest[0]) for size in (label.size_voxels, label.size_mm3))
        table.add_row(
            escape(f"{label.value} {label.name}"),
            f"{100 * label.fraction:.3g}",
            str(label.cases),
            str(label.components),
            f"{label.components_a_case:g}",
            *(", ".join(f"{value:.6g}" for value in spread) for spread in spreads),
        )
    return table


def _decisions(proposal: Proposal) -> Table:
    table = Table("decision", "value", "because")
    for decision in proposal.decisions:
        table.add_row(*map(escape, (decision.name, decision.value, decision.reason)))
    return table


def _by(values: tuple[float, ...]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
