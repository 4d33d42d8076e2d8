"""Everything that a GPU is to show, by one command: `python -m benchmarks.gpu [--device cpu --quick]`.

Runs the tests that need the device, the benchmark of losses, what the check of a kernel costs, a short training of the
bundle and steps of its network with and without torch.compile, each with a share of the time limit, and writes
docs/results/gpu-NAME.md, unless a page stands there that it did not write. A part that fails or runs out of its time is
recorded as that, with the end of its output; all of its processes end, and the others go on. With `--device cpu
--quick` the same parts run in their smallest form, to try the command where there is no GPU; the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import monai
import torch

from monai_iou import kernel_report

ROOT = Path(__file__).parents[1]
LIMIT = 9 * 60  # seconds of all parts together
_MARK = "<!-- written by python -m benchmarks.gpu -->"  # a page without it is not replaced
_TAIL = 40  # lines that are shown of an output without a table, or of a part that did not pass


@dataclass(frozen=True)
class Part:
    """A command and its share of the time limit."""

    title: str
    command: list[str]
    share: float


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    part: Part
    status: str
    seconds: float
    output: str


def parts(device: str, quick: bool, folder: Path) -> list[Part]:
    """Return the parts of the report."""
    python = sys.executable
    # The package versions of the machine may be others than the pinned ones, and warn of other things.
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=default"]
    pytest += ["-m", "not slow", "--durations", "5"]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling kernels
        pytest += ["-n", str(min(15, max(1, (os.cpu_count() or 2) - 1)))]
    tests = ["tests/voxels/test_self_check.py"] if device == "cpu" else ["tests/voxels/test_cuda.py"]
    names = ("triton", "triton_labels", "triton_slopes", "triton_errors", "triton_regions", "self_check")
    tests += [] if device == "cpu" else [f"tests/voxels/test_{name}.py" for name in names]
    tests += [] if device == "cpu" else ["tests/voxels/test_kernels.py::test_triton_equals_reference_in_every_branch"]
    losses = [python, "-m", "benchmarks.losses", "--device", device, "--output", str(folder / "losses")]
    losses += ["--size", "2x32", "--dtype", "float32"] if quick else ["--size", "2x128", "--size", "14x96"]
    losses += ["--only", "Dice", "--only", "IoU", "--only", "Lovasz", "--without", "torch.compile"]  # it takes minutes
    first_call = [python, "-m", "benchmarks.first_call", "--device", device, *(["--side", "32"] if quick else [])]
    training = [python, "-m", "benchmarks.training", "--patch", "48", "48", "32", "--output", str(folder / "training")]
    training += ["--epochs", "2", "--steps", "2"] if quick else []
    network = [python, "-m", "benchmarks.network", "--device", device]
    network += ["--patch", "32", "32", "32", "--channels", "4", "--batch", "1", "--turns", "1"] if quick else []
    return [
        Part("Tests", [*pytest, *tests], 0.45),
        Part("Losses", losses, 0.2),
        Part("The check of a kernel", first_call, 0.1),
        Part("A short training", training, 0.15),
        Part("A step of the network", network, 0.1),
    ]


def run(part: Part, seconds: float) -> Outcome:
    """Run a part for at most so many seconds; nothing that it started goes on while the next one is measured."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        part.command, cwd=ROOT, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        status = "passed" if process.returncode == 0 else f"failed with code {process.returncode}"
    except subprocess.TimeoutExpired:
        _end(process)
        output, _ = process.communicate()
        status = f"stopped after its {seconds:.0f} s"
    finally:
        _end(process)
    return Outcome(part, status, time.perf_counter() - start, output)


def _end(process: subprocess.Popen[str]) -> None:
    """End all processes of a part that still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def report(outcomes: list[Outcome], device: str, name: str, quick: bool) -> str:
    """Return the report as Markdown."""
    lines = [f"# {name}", "", _MARK, ""]
    if device == "cpu":
        lines += ["A trial of the command on a CPU: nothing here was measured on a GPU.", ""]
    lines += [
        f"{datetime.datetime.now(datetime.timezone.utc):%d %B %Y}, torch {torch.__version__}, "
        f"MONAI {monai.__version__}, {torch.get_num_threads()} threads{', smallest sizes' if quick else ''}.",
        "",
        "| part | result | seconds |",
        "| --- | --- | --- |",
        *(f"| {outcome.part.title} | {outcome.status} | {outcome.seconds:.0f} |" for outcome in outcomes),
        "",
        "Kernels before the first loss:",
        "",
        *(f"- {where}: {sentence}" for where, sentence in kernel_report().items()),
    ]
    for outcome in outcomes:
        command = " ".join(["python", *outcome.part.command[1:]])
        lines += ["", f"## {outcome.part.title}", "", f"`{command}`", "", *_shown(outcome)]
    return "\n".join(lines) + "\n"


def _shown(outcome: Outcome) -> list[str]:
    """Return tables as they are and, without one or if the part did not pass, the end of the output as code."""
    lines = outcome.output.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    if rows and outcome.status == "passed":
        return rows
    return [*rows, *([""] if rows else []), "```text", *lines[-_TAIL:], "```"]


def device_name(device: str) -> str:
    """Return the device's name as a part of a file's name."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"trial-on-cpu-{platform.machine()}"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def main() -> int:
    """Run the parts and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="smallest sizes")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of all parts together (default: 540)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="folder of the report")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("Expected a CUDA device, but found none: try the command with --device cpu --quick.", file=sys.stderr)
        return 1
    name = device_name(options.device)
    path = options.output / f"gpu-{name}.md"
    if path.exists() and _MARK not in path.read_text(encoding="utf-8"):
        message = f"Expected {path} to be written by this command, but got another page: move it, or set --output."
        print(message, file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        outcomes = []
        left = options.limit
        chosen = parts(options.device, options.quick, Path(folder))
        for index, part in enumerate(chosen):
            seconds = left * part.share / sum(other.share for other in chosen[index:])  # what is saved is handed on
            outcomes.append(run(part, seconds))
            left -= outcomes[-1].seconds
            print(f"{part.title}: {outcomes[-1].status}, {outcomes[-1].seconds:.0f} s", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    path.write_text(report(outcomes, options.device, name, options.quick), encoding="utf-8")
    print(f"written: {path}")
    return 0 if all(outcome.status == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # otherwise a part, in a session of its own, would go on
    sys.exit(main())
