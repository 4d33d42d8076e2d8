"""Rows of the studies' tables, for the tests of what reads and writes them."""

from __future__ import annotations

from benchmarks.evidence.studies import Run

RUN = Run("compound", "phantoms", "iou", "voxels", 0, 0)
CASE = {"patient": "p", "case": "c", "label": 1, "iou": 0.5, "dice": 2 / 3, "lesion_f1": 1.0}
SUMMARY = {"iou": 0.5, "epochs": 60, "steps": 8, "cpu_seconds": 90, "train_seconds": 70, "evaluate_seconds": 15}
