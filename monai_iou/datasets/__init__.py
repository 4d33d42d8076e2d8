"""Read datasets of images and labels, split them, and make phantoms."""

from monai_iou.datasets.cases import Case, CaseFacts, DatasetError
from monai_iou.datasets.folder import SegmentationFolder, read_folder
from monai_iou.datasets.label_counts import LabelCounts, count_label_files
from monai_iou.datasets.phantoms import Phantom, make_phantom, write_phantom_dataset
from monai_iou.datasets.splits import check_folds, count_patients, fold_cases, split_cases

__all__ = [
    "Case",
    "CaseFacts",
    "DatasetError",
    "LabelCounts",
    "Phantom",
    "SegmentationFolder",
    "check_folds",
    "count_label_files",
    "count_patients",
    "fold_cases",
    "make_phantom",
    "read_folder",
    "split_cases",
    "write_phantom_dataset",
]
