"""Filling the package's page templates, and numbers for people."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from monai_iou.tables import counted


def render(template: str, context: Mapping[str, Any]) -> str:
    """Fill one of the package's templates; every value is escaped unless it is markup made here."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("monai_iou.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["counted"] = counted
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    return environment.get_template(template).render(context)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: fixed digits, a dash where it is undefined.

    >>> number(0.12345), number(float("nan")), number(float("inf"))
    ('0.123', '-', '∞')
    """
    if value is None or math.isnan(value):
        return "-"
    return "∞" if math.isinf(value) else f"{value:.{digits}f}"


def readable(name: str) -> str:
    r"""A name with its bytes that are no text as escape sequences, as in the tables.

    >>> readable("a\udcff")
    'a\\udcff'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def restored(name: str) -> str:
    r"""The name that a table has in its readable form.

    >>> restored(readable("a\udcff")) == "a\udcff", restored("a")
    (True, 'a')
    """
    return re.sub(r"\\u(dc[89a-f][0-9a-f])", lambda escape: chr(int(escape[1], 16)), name)
