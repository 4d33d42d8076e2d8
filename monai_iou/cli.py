"""The `monai-iou` command. The only file that prints.

Loaded by path from `monai_iou_command`, so nothing at its top level may import `monai_iou`, torch or MONAI: each
command imports what it needs. Exit codes: 0 done, 1 the work failed, 2 the command line was wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """IoU losses, metrics and a bundle for MONAI: demo, train, evaluate, compare."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: `sys.argv[1:]`) and return its exit code."""
    try:
        result = cli.main(args=None if argv is None else list(argv), prog_name="monai-iou", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        click.echo("Aborted.", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return int(result or 0)


if __name__ == "__main__":
    sys.exit(main())
