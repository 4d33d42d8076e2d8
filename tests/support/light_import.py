"""Import one module of the package in a new process without the package, which takes seconds with torch and MONAI."""

from __future__ import annotations

from pathlib import Path

import monai_iou

LIGHT_IMPORT = (
    "import sys, types; package = types.ModuleType('monai_iou'); "
    f"package.__path__ = [{str(Path(monai_iou.__file__).parent)!r}]; sys.modules['monai_iou'] = package\n"
)
