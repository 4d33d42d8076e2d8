"""Finding the bundle that is shipped with the package, and copying it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from monai_iou.files import TEMPORARY_PREFIX

__all__ = ["BUNDLE_NAME", "TRAINED_MODELS", "bundle_path", "copy_bundle", "trained_model_path"]


BUNDLE_NAME = "small_foreground_segmentation"
TRAINED_MODELS = ("hippocampus_mr",)  # each has a README.md with its data, licence and scores


def bundle_path() -> Path:
    """Return the folder of the shipped bundle, which is inside the installed package or next to it in a checkout.

    Raises:
        FileNotFoundError: if the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "bundles", package.parent / "bundles"):
        if (folder / BUNDLE_NAME / "configs" / "train.json").is_file():
            return folder / BUNDLE_NAME
    message = f"Expected the bundle `{BUNDLE_NAME}` in `{package}`, but it was not found: install monai-iou again."
    raise FileNotFoundError(message)


def trained_model_path(name: str) -> Path | None:
    """Return the folder of a trained model that is shipped with the package, None if `name` is not one of them.

    Args:
        name: one of `TRAINED_MODELS`.

    Raises:
        FileNotFoundError: if the installation is incomplete.

    Example:
        >>> from monai_iou.bundle_files import trained_model_path
        >>> (trained_model_path("hippocampus_mr") / "models" / "model.pt").is_file()
        True
        >>> trained_model_path("liver_ct") is None
        True
    """
    return bundle_path().parent / name if name in TRAINED_MODELS else None


def copy_bundle(destination: str | os.PathLike[str]) -> Path:
    """Copy the shipped bundle to a folder where it can be edited; a failed copy leaves no files behind.

    Args:
        destination: a folder that does not exist yet or is empty.

    Returns:
        The folder of the new bundle.

    Raises:
        ValueError: if `destination` is a file or a folder that is not empty.
        OSError: if the files cannot be written.

    Example:
        >>> import tempfile
        >>> from monai_iou.bundle_files import copy_bundle
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (copy_bundle(f"{folder}/mine") / "configs" / "train.json").is_file()
        True
    """
    target = Path(destination).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        message = f"Expected `{destination}` to be a new or empty folder, but it exists: name another one."
        raise ValueError(message)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=target.parent))
    try:
        # The bundle of a checkout may contain results of a training, which must not be copied.
        shutil.copytree(
            bundle_path(),
            partial,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("models", "eval", "predictions", "__pycache__"),
        )
        if target.exists():
            target.rmdir()
        partial.chmod(0o777 & ~_umask())  # a temporary folder is readable by its owner only
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
