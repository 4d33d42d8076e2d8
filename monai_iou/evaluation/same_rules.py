"""Whether evaluated folders were scored by the same rules, so that their scores differ by the predictions alone."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from monai_iou.evaluation.paired_scores import CompareError, Evaluated, is_in, paired_keys, unknown_cases
from monai_iou.evaluation.rules import split_width
from monai_iou.metrics import CHALLENGES
from monai_iou.tables import enumerated

__all__ = ["check_rules"]

SAME_VOLUME = 1e-6  # relative: formats keep the size of a voxel in single or double precision
MATCHED = ("lesion_f1", "pq", "sq", "rq")


@dataclass(frozen=True)
class _Rule:
    """What scores depend on.

    Args:
        options: of `monai-iou evaluate`, for messages.
        metrics: that depend on it; empty for all.
        of: the rule for a label in words, from the options in summary.json.
    """

    options: str
    metrics: tuple[str, ...]
    of: Callable[[Mapping[str, Any], str], str]


def check_rules(evaluated: Sequence[Evaluated], metrics: Sequence[str]) -> list[str]:
    """Check that folders were scored by the same rules and against the same references.

    What an earlier version did not write into summary.json cannot be compared, and counts as equal. `--missing` and
    `--present` change no score that is compared.

    Args:
        evaluated: the folders.
        metrics: that are compared.

    Returns:
        Notes on differences that change no compared score, or of which this is not certain.

    Raises:
        CompareError: two folders differ in something that one of the metrics depends on.
    """
    notes: list[str] = []
    for first, second in itertools.combinations(evaluated, 2):
        for rule in RULES:
            notes += _compare_rule(rule, first, second, metrics)
        notes += _compare_references(first, second)
        notes += [*_left_out(first, second), *_left_out(second, first), *_unknown(first, second)]
        notes += _compare_resampling(first, second)
    return notes


def _left_out(one: Evaluated, other: Evaluated) -> Iterator[str]:
    """What only one folder has scores of: the means of the comparison are not those of its own report."""
    labels = [label for label in one.labels if label not in other.labels]
    if labels:
        yield f"`{one.folder}` has {enumerated('label', labels)} and `{other.folder}` does not: {_out(labels)}."
    scored = [*one.scores, *((case, label) for case in sorted(one.failed - one.unscored) for label in one.labels)]
    shared = [key for key in scored if key[1] in other.labels]
    cases = dict.fromkeys(case for case, _ in shared)
    lacking = [key for key in shared if not is_in(other, key)]
    missing = list(dict.fromkeys(case for case, _ in lacking if case not in other.failed))
    if missing:
        yield (
            f"`{other.folder}` was not asked for {len(missing)} of the {len(cases)} cases of `{one.folder}`, such as "
            f"`{missing[0]}`: {_out(missing)}."
        )
    # Where no compared folder knows what there was to find, `_unknown` tells it of both.
    unscored = list(dict.fromkeys(key[0] for key in lacking if key[0] in other.failed and key in other.known))
    if unscored:
        yield (
            f"`{other.folder}` has no score for {len(unscored)} of the {len(cases)} cases of `{one.folder}`, such as "
            f"`{unscored[0]}`, not even as an empty prediction (its failures.csv says why): {_out(unscored)}."
        )


def _out(what: Sequence[str]) -> str:
    return "it is left out" if len(what) == 1 else "they are left out"


def _unknown(first: Evaluated, second: Evaluated) -> Iterator[str]:
    """What both failed at, where nobody knows what there was to find: the true difference may be smaller."""
    labels = [label for label in first.labels if label in second.labels]
    unknown = sorted({case for label in labels for case in unknown_cases(first, second, label)})
    if unknown:
        yield (
            f"Cases that both `{first.folder}` and `{second.folder}` failed at, and of which no compared folder has a "
            f"score: {len(unknown)}, such as `{unknown[0]}`. They are left out."
        )


def _compare_rule(rule: _Rule, first: Evaluated, second: Evaluated, metrics: Sequence[str]) -> Iterator[str]:
    found = _difference(rule, first, second)
    if found is None:
        return
    depending = [metric for metric in metrics if not rule.metrics or metric in rule.metrics]
    folders = f"`{first.folder}` and `{second.folder}`"
    if not depending:
        yield f"{folders} were evaluated with different {rule.options} ({found}), on which no compared score depends."
        return
    others = len(depending) < len(metrics)
    scores = ", ".join(depending) if others else "every score"
    leave = f", or leave {', '.join(depending)} out of `--metrics`" if others else ""
    message = (
        f"Expected {folders} to be scored by the same rules, but got {found} by {rule.options}, on which {scores} "
        f"depend{'s' if len(depending) == 1 or not others else ''}: evaluate both with the same {rule.options}{leave}."
    )
    raise CompareError(message)


def _difference(rule: _Rule, first: Evaluated, second: Evaluated) -> str | None:
    """Both rules in words, for the first label for which they differ."""
    for label in first.labels:
        try:
            a, b = (rule.of(one.options, label) for one in (first, second))
        except (KeyError, TypeError, ValueError, AttributeError):  # an earlier version did not write it
            continue
        if label in second.labels and a != b:
            return f"`{a}` and `{b}` for label {label}"
    return None


def _compare_references(first: Evaluated, second: Evaluated) -> Iterator[str]:
    """Refuse other volumes; files that differ may hold the same labels, compressed or named anew."""
    keys = [key for key in paired_keys(first, second) if key in first.scores and key in second.scores]
    volumes = {key: (first.scores[key]["reference_ml"], second.scores[key]["reference_ml"]) for key in keys}
    other = [key for key, (a, b) in volumes.items() if abs(a - b) > SAME_VOLUME * max(a, b)]  # never true for NaN
    if other:
        case, label = other[0]
        a, b = volumes[other[0]]
        message = (
            f"Expected `{first.folder}` and `{second.folder}` to be scored against the same references, but got "
            f"{a:g} and {b:g} ml in that of `{case}`, label {label}, and other volumes in {len(other)} of {len(keys)} "
            "rows: evaluate both against the same references."
        )
        raise CompareError(message)
    cases = dict.fromkeys(case for case, _ in keys if case in first.references and case in second.references)
    changed = [case for case in cases if first.references[case] != second.references[case]]
    if changed:
        yield (
            f"`{first.folder}` and `{second.folder}` were scored against different files of references in "
            f"{len(changed)} of {len(cases)} cases, such as `{changed[0]}`, with the same volumes: make sure that they "
            "hold the same labels."
        )


def _compare_resampling(first: Evaluated, second: Evaluated) -> Iterator[str]:
    if "resample" in first.options and "resample" in second.options:
        without, resampled = sorted((first, second), key=lambda one: one.options["resample"] is not None)
        if without.options["resample"] is None and resampled.options["resample"] is not None and without.failed:
            yield (
                f"Predictions on other grids are refused in `{without.folder}`, where {len(without.failed)} of the "
                f"cases failed, and resampled in `{resampled.folder}`: evaluate both with the same `--resample`."
            )


def _structure(options: Mapping[str, Any], label: str) -> str:
    return "+".join(str(value) for value in sorted(options["structures"][label]))


def _kind(options: Mapping[str, Any], label: str) -> str:
    return "lesion numbers" if "lesions as numbered" in options["lesion_rule"] else "labels"


def _ignored(options: Mapping[str, Any], label: str) -> str:
    return "nothing ignored" if options["ignore"] is None else f"{options['ignore']} ignored"


def _tolerance(options: Mapping[str, Any], label: str) -> str:
    return f"{float(options['tolerances_mm'].get(label, options['tolerance_mm']))} mm"


def _boundary(options: Mapping[str, Any], label: str) -> str:
    number, unit = split_width(options["boundary"])
    return f"{number} {unit}"


def _boundary_distance(options: Mapping[str, Any], label: str) -> str:
    _boundary(options, label)  # who does not know the width does not know the distance either
    return str(options.get("boundary_distance", "euclidean"))  # an earlier version had no other


def _match(options: Mapping[str, Any], label: str) -> str:
    return str(options["lesion_rule"].partition("; ")[0].removeprefix("found: "))


def _components(options: Mapping[str, Any], label: str) -> str:
    # Earlier versions did not name the neighbours in a slice, which follow from those in a volume.
    return re.sub(r" \(\d in a slice\)", "", str(options["lesion_rule"].partition("; ")[2]))


def _challenge(column: str) -> Callable[[Mapping[str, Any], str], str]:
    """Whose score a column holds: some challenges call theirs as ours is called."""

    def whose(options: Mapping[str, Any], label: str) -> str:
        like = options["like"]
        return f"the {column} of {like}" if like is not None and column in CHALLENGES[like].columns else f"our {column}"

    return whose


# In the order in which a message names them: the first that differs explains the others.
RULES = (
    _Rule("`--labels` or `--regions`", (), _structure),
    _Rule("`--instances`", (), _kind),
    _Rule("`--ignore`", (), _ignored),
    _Rule("`--tolerance`", ("nsd",), _tolerance),
    _Rule("`--boundary`", ("boundary_iou",), _boundary),
    _Rule("`--boundary-distance`", ("boundary_iou",), _boundary_distance),
    _Rule("`--match`, `--strict` and `--pairing`", MATCHED, _match),
    _Rule("`--connectivity`, `--dilation` and `--min-volume`", (*MATCHED, "cc_iou"), _components),
    _Rule("`--like`", ("dice",), _challenge("dice")),
)
