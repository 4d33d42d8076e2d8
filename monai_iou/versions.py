"""The versions of packages, also of those that pip did not install, such as a clone on PYTHONPATH."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version

__all__ = ["version_of"]

OWN = "monai-iou"


def version_of(package: str) -> str:
    """Return the version of a package by the name that it is installed by.

    Args:
        package: its name. The version of this package is that of the code that runs, whatever is installed beside it.

    Returns:
        The version, or "not installed" without the metadata that pip writes.

    Example:
        >>> version_of("no-such-package")
        'not installed'
    """
    if package == OWN:
        return str(sys.modules[__package__].__version__)
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
