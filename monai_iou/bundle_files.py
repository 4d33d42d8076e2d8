"""Finding the bundle that is shipped with the package, and copying it."""

from __future__ import annotations

import contextlib
import filecmp
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

from monai_iou.files import OutputError, prepare, temporary_name

__all__ = ["BUNDLE_NAME", "TRAINED_MODELS", "bundle_path", "copy_bundle", "trained_model_path"]


OWN_PREFIX = ".monai_iou"  # of temporary files and locks
LAST = "configs"  # of a bundle to appear in a new folder
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


def copy_bundle(destination: str | os.PathLike[str], option: str = "destination") -> Path:
    """Copy the shipped bundle to a folder where it can be edited; a failed copy leaves no files behind.

    A copy whose process was killed is completed by the next one.

    Args:
        destination: a folder that does not exist yet or is empty, or holds a part of the bundle that was not changed.
        option: the name of the option that gives the folder, for the error message.

    Returns:
        The folder of the new bundle.

    Raises:
        ValueError: if `destination` is a file or a folder that is not empty.
        OutputError: if the folder or a file cannot be made or written, or the disk is full.
        FileNotFoundError: if the installation is incomplete.

    Example:
        >>> import tempfile
        >>> from monai_iou.bundle_files import copy_bundle
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (copy_bundle(f"{folder}/mine") / "configs" / "train.json").is_file()
        True
    """
    _check_vacant(destination)
    source, target = bundle_path(), Path(destination).resolve()
    is_new = not target.exists()
    try:
        prepare(target, option)
        # Inside the folder: it may be mounted, its parent may be read-only, and the user's shell may stand in it.
        with tempfile.TemporaryDirectory(prefix=temporary_name(), dir=target) as temporary:
            partial = Path(temporary) / BUNDLE_NAME  # so that the date of the temporary folder remains its own
            # The bundle of a checkout may contain results of a training, which must not be copied.
            shutil.copytree(
                source,
                partial,
                ignore=shutil.ignore_patterns("models", "eval", "predictions", "__pycache__"),
            )
            _make_editable(partial)
            _move_children(partial, target)
    except BaseException as error:
        if is_new:
            with contextlib.suppress(OSError):
                target.rmdir()
        if not isinstance(error, OSError):
            raise
        why = error.strerror or error
        if isinstance(error, shutil.Error):  # a list of the files that `copytree` left out, with the errors as text
            why = re.sub(r"^\[\w+ \d+\] ", "", error.args[0][0][2]).partition(": ")[0]
        message = (
            f"Expected to copy the bundle to `{target}`, but got the error '{why}': free space or choose another "
            "folder."
        )
        raise OutputError(message) from error
    return target


def _check_vacant(folder: str | os.PathLike[str]) -> None:
    """Check that a folder does not exist yet or is empty, but for this package's own files and a copy that was killed.

    Raises:
        ValueError: it is a file or holds something else.
    """
    path = Path(folder)
    if path.exists() and not (path.is_dir() and all(_is_own(each) for each in path.iterdir())):
        message = f"Expected `{folder}` to be a new or empty folder, but it exists: name another one."
        raise ValueError(message)


def _is_own(path: Path) -> bool:
    """Whether a path is a temporary file or lock, or what a killed copy moved before the configs, unchanged."""
    return path.name.startswith(OWN_PREFIX) or (path.name != LAST and _is_same(path, bundle_path() / path.name))


def _is_same(path: Path, original: Path) -> bool:
    """Whether two files, or two folders in all of their files, have the same content."""
    if original.is_file():
        return path.is_file() and filecmp.cmp(path, original, shallow=False)
    names, others = ({each.relative_to(root) for each in root.rglob("*")} for root in (path, original))
    return original.is_dir() and names == others and all(_is_same(path / name, original / name) for name in names)


def _make_editable(folder: Path) -> None:
    """Let the owner write to every file and folder: an installation may be read-only, and so is then its copy.

    A folder that its owner cannot write to cannot be moved to another one either.
    """
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode | (stat.S_IRWXU if path.is_dir() else stat.S_IWUSR))


def _move_children(source: Path, target: Path) -> None:
    """Move what is not there yet, the configs last: whoever finds them finds a complete bundle."""
    moved: list[Path] = []
    try:
        for child in sorted(source.iterdir(), key=lambda path: path.name == LAST):
            if not (target / child.name).exists():  # otherwise a copy that was killed had moved it
                moved.append(child.rename(target / child.name))
    except BaseException:
        for path in moved:
            path.rename(source / path.name)
        raise
