"""The `monai-iou` command from within the package; its entry point is `monai_iou_command`, which is faster to start.

Exit codes: 0 done, 1 the work failed, 2 the command line was wrong.
"""

from __future__ import annotations

import sys

from monai_iou.commands.group import cli, main

__all__ = ["cli", "main"]

if __name__ == "__main__":
    sys.exit(main())
