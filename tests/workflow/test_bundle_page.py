"""What docs/bundle.md says of defaults and rules, held against the shipped configs and the code."""

from __future__ import annotations

import json
import re

from places import DOCS

from monai_iou.bundle_files import bundle_path
from monai_iou.planning import intensity, levels, plan

PAGE = (DOCS / "bundle.md").read_text(encoding="utf-8")
SHIPPED = [
    json.loads((bundle_path() / "configs" / f"{name}.json").read_text(encoding="utf-8"))
    for name in ("train", "evaluate", "inference")
]


def documented() -> dict[str, str]:
    """The default of each key in the table, as text."""
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", PAGE.split("## Keys\n")[1].split("\n## ")[0], re.MULTILINE)
    found = {}
    for names, values in rows:
        keys = re.findall(r"`(\w+)`", names)
        defaults = [values] if len(keys) == 1 else re.sub(r" \(.*\)", "", values).split(", ")
        assert len(keys) == len(defaults), names
        found |= dict(zip(keys, defaults, strict=True))
    return found


def shipped(key: str) -> object:
    return next(config[key] for config in SHIPPED if key in config)


def test_the_table_has_the_defaults_of_the_configs() -> None:
    compared = 0
    for key, text in documented().items():
        value = shipped(key)
        if isinstance(value, dict) or str(value).startswith("$"):  # components and expressions are told in words
            continue
        try:
            said = json.loads(text.strip("`"))
        except json.JSONDecodeError:
            said = text
        assert said == value, key
        compared += 1
    assert compared > 40


def test_other_defaults_of_evaluation_and_inference_are_named() -> None:
    train, evaluate, inference = SHIPPED
    assert "0.25 (0.5 in evaluation and inference)" in PAGE
    assert (train["sw_overlap"], evaluate["sw_overlap"], inference["sw_overlap"]) == (0.25, 0.5, 0.5)
    assert "`eval` in the bundle, and `predictions` for inference" in PAGE
    assert "/eval" in train["output_dir"]
    assert "/predictions" in inference["output_dir"]


def test_the_rules_have_the_numbers_of_the_code() -> None:
    page = re.sub(r"\s+", " ", PAGE)
    words = {4: "four"}
    assert f"halved as long as {levels.MIN_BOTTLENECK} voxels remain, at most {words[levels.MAX_LEVELS]} times" in page
    lower, upper = intensity.CT_PERCENTILES
    assert f"the {lower}th and {upper}th percentiles" in page
    assert f"differ by a factor of {plan.ANISOTROPIC:g} or more" in page
    assert f"up to {levels.MAX_CHANNELS} |" in page
