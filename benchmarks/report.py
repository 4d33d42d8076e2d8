"""Open an evaluation report of many cases in Chromium, and print its size, its elements and the time until it is there.

    python benchmarks/report.py [--cases 2000] [--turns 3]

Two cases are evaluated, and their rows repeated with random scores. The time is that of the browser itself, from the
start of the navigation to the end of its load event, scripts and layout included; the load of the machine is printed
beside it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import nibabel
import numpy as np

from monai_iou.evaluation.evaluate import evaluate_folders
from monai_iou.evaluation.report import report_text
from monai_iou.evaluation.request import Request

OPTIONS = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --dump-dom"
PROBE = """<script>addEventListener('load', () => {
  const nodes = document.getElementsByTagName('*').length, height = document.documentElement.scrollHeight;
  const out = document.createElement('pre');
  out.id = 'found';
  out.textContent = `${Math.round(performance.now())} ${nodes} ${height}`;
  document.body.append(out);
});</script>"""


def report_of(folder: Path, cases: int) -> str:
    """The page of so many cases."""
    reference = np.zeros((12, 12, 8), np.uint8)
    reference[3:8, 3:8, 2:6] = 1
    for i in range(2):
        for kind, array in (("references", reference), ("predictions", np.roll(reference, 1 + i, axis=0))):
            (folder / kind).mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / kind / f"case{i}.nii")
    done = evaluate_folders(Request(folder / "predictions", folder / "references", folder / "out"))
    rng = np.random.default_rng(0)
    rows = done.rows
    done.rows = [
        {**rows[i % 2], "case": f"case{i:05}", "iou": float(rng.random()), "hd95_mm": float(rng.exponential())}
        for i in range(cases)
    ]
    return report_text(done)


def main() -> None:
    """Print one line for each turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        parser.error("Expected Chromium or Chrome on the PATH, but got none: install one.")
    with tempfile.TemporaryDirectory() as name:
        page = Path(name) / "page.html"
        text = report_of(Path(name), options.cases)
        page.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        command = [browser, *OPTIONS.split(), f"--user-data-dir={name}/profile", page.as_uri()]
        for _ in range(options.turns):
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = re.search(r'<pre id="found">(\d+) (\d+) (\d+)</pre>', shown)
            ms, nodes, height = map(int, found.groups()) if found else (0, 0, 0)
            print(
                f"report: {options.cases} cases, {len(text) / 1e6:.2f} MB, {nodes} elements, {height} px, "
                f"{ms / 1000:.2f} s to load, load {os.getloadavg()[0]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
