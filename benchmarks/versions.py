"""Another version of this project in a process of its own, so that two of them can take turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Whatever a library prints belongs to the log: the answers have a pipe of their own.
PREFACE = "import os, sys; answers = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1)\n"


class Version:
    """A process that runs a program with the package of one checkout, with one thread.

    Args:
        checkout: folder that holds `monai_iou`.
        program: text of the program. It prints to `answers` a JSON list, of which the first item is
            `monai_iou.__file__`, and then a number of seconds for every line that it reads.
        given: its arguments.
        folder: where it runs; a log there gets what it writes besides.

    Attributes:
        about: the other items of its list.
    """

    def __init__(self, checkout: Path, program: str, given: Sequence[str], folder: Path) -> None:
        checkout = checkout.resolve()
        self._log = folder / f"{'_'.join(checkout.parts[1:])}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PREFACE + program, *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
                cwd=folder,
            )
        file, *about = json.loads(self._answer())
        self.about: list[Any] = about
        if not Path(file).is_relative_to(checkout):
            message = f"Expected the package of {checkout}, but got {file}: give the folder that holds `monai_iou`."
            raise SystemExit(message)

    def seconds(self, task: str = "") -> float:
        """Return the program's answer to a line."""
        assert self._process.stdin is not None
        print(task, file=self._process.stdin, flush=True)
        return float(self._answer())

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = self._log.read_text(encoding="utf-8")[-2000:]
            message = f"The process of one version ended with the code {self._process.wait()}:\n{log}"
            raise SystemExit(message)
        return line
