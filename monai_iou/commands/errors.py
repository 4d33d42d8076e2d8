"""How a command ends that cannot go on: exit code 2 for a wrong command line, 1 for failed work, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

__all__ = ["reported"]


@contextmanager
def reported(*usage: type[Exception]) -> Iterator[None]:
    """End the command with an error's sentence; the classes in `usage` are the command line's own fault."""
    try:
        yield
    except usage as error:
        raise click.UsageError(str(error)) from error
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from error
