"""The `monai-iou` command from within the package; its entry point is `monai_iou_command`, which is faster to start.

Exit codes: 0 done; 1 the work failed, or a file or folder cannot be used; 2 the command line was wrong; 130 ended by
Ctrl-C; 128 + N ended by the signal N, such as 143 by SIGTERM.
"""

from __future__ import annotations

import sys

from monai_iou.commands.group import cli, main

__all__ = ["cli", "main"]

if __name__ == "__main__":
    sys.exit(main())
