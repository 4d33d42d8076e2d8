"""Running a bundle's configs in this process, as `python -m monai.bundle run` does, with its errors in one sentence."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai_iou.planning.own_errors import own_error
from monai_iou.workflow.config_errors import ConfigError, explained
from monai_iou.workflow.literal import with_literal_paths
from monai_iou.workflow.log_file import close_log, log_failure, log_file
from monai_iou.workflow.run_lock import release_unused
from monai_iou.workflow.undefined_references import DEFINE, DEFINE_IN_INFERENCE, check_references

__all__ = ["run_configs"]

# Said of every bundle, and answered in docs/bundle.md: of MONAI's loading of configs, and of a plan in another folder.
KNOWN_NOTICES = ("Not all config files are in", "Setting logging properties based on config")


def run_configs(files: Sequence[Path], overrides: Mapping[str, Any], kind: str = "train") -> Any:
    """Run configs and return the ConfigWorkflow.

    Args:
        files: the configs, later ones over earlier ones.
        overrides: key -> value, over all configs. Paths are taken as they are, whatever signs they hold.
        kind: MONAI's `workflow_type`, "train" or "inference".

    Raises:
        ValueError: the run ended with a sentence of this package, which MONAI buries under errors of its own.
        OutputError: likewise.
        ConfigError: it ended with an error of other libraries or of a config, or a reference is to no key of it, which
            is found before anything runs.
    """
    from monai.bundle.workflows import ConfigWorkflow

    if kind == "train":
        close_log()  # of the fold before: this training opens its own
    with _without_notices(), _own_sentence(), contextlib.ExitStack() as ending:
        ending.callback(release_unused)
        keys = with_literal_paths(overrides)
        workflow = ConfigWorkflow(config_file=[str(path) for path in files], workflow_type=kind, **keys)
        workflow.parser.parse()
        check_references(workflow.parser, files, DEFINE_IN_INFERENCE if kind == "inference" else DEFINE)
        workflow.initialize()
        workflow.run()
        workflow.finalize()
    return workflow


@contextlib.contextmanager
def _own_sentence() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        own = error if isinstance(error, ConfigError) else own_error(error)
        if own is None:
            log = log_file()
            if log is None:  # where else would the traceback be?
                logging.getLogger("monai_iou").exception("The run ended with an error.")
            told = explained(error, "see the traceback above" if log is None else f"see the traceback in {log}")
            log_failure(told, error)
            raise told from error
        log_failure(own)
        if own is error:
            raise
        raise own from None


@contextlib.contextmanager
def _without_notices() -> Iterator[None]:
    logger = logging.getLogger("monai.bundle.workflows")

    def is_new(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(KNOWN_NOTICES)

    logger.addFilter(is_new)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "parsing config_file", UserWarning)
            yield
    finally:
        logger.removeFilter(is_new)
