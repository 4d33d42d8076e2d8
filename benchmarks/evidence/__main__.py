"""Make the runs of a study that are missing, one row of its tables after the other.

    python -m benchmarks.evidence --study compound
    python -m benchmarks.evidence --study compound --quick       # under ten minutes: does all of it run?
    python -m benchmarks.evidence --study compound --only dice+ce iou+ce/3 --jobs 2
    python -m benchmarks.evidence --list

Every run is the shipped bundle by overrides, in a process of its own, with one thread unless its data name more. Its
rows are appended to RESULTS/NAME.csv and RESULTS/NAME-cases.csv once it is done; a kill loses the run that was being
made, and the same command goes on with what is missing. Exit code 1 if a run failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from benchmarks.evidence.datasets import ROOT
from benchmarks.evidence.running import run_all
from benchmarks.evidence.studies import STUDIES, select
from benchmarks.evidence.tables import missing


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=list(STUDIES), metavar="NAME")
    parser.add_argument("--list", action="store_true", help="name the studies and how many of their runs are done")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="data, losses, samplers, seed=N, fold=N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--quick", action="store_true", help="a few epochs of one seed; kept apart from the results")
    parser.add_argument("--results", type=Path, help="folder of the tables; docs/results, or OUTPUT with --quick")
    parser.add_argument("--output", type=Path, help="for data, logs and weights; runs/evidence, or runs/evidence-quick")
    options = parser.parse_args(arguments)
    if not options.list and options.study is None:
        parser.error(f"--study must be one of {', '.join(STUDIES)}")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, but is {options.jobs}")
    options.output = options.output or ROOT / "runs" / ("evidence-quick" if options.quick else "evidence")
    options.results = options.results or (options.output if options.quick else ROOT / "docs" / "results")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run, or list."""
    options = parse(arguments)
    if options.list:
        for study in STUDIES.values():
            runs = study.runs(quick=options.quick)
            done = len(runs) - len(missing(options.results, runs))
            print(f"{study.name}: {study.question} {done} of {len(runs)} runs")
        return 0
    runs = select(STUDIES[options.study].runs(quick=options.quick), options.only)
    if not runs:
        print(f"No run of {options.study} has any of {', '.join(options.only)}.", file=sys.stderr)
        return 2
    if STUDIES[options.study].needs_gpu and not options.quick and not torch.cuda.is_available():
        print(f"Expected a GPU for {options.study}, but torch finds none: try it with --quick.", file=sys.stderr)
        return 2
    output, results = options.output.resolve() / options.study, options.results.resolve()
    output.mkdir(parents=True, exist_ok=True)
    failed = run_all(runs, options.jobs, results, output, quick=options.quick)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
