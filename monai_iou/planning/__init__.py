"""Choose a training for a dataset and a machine."""

from monai_iou.planning.fingerprint import Fingerprint
from monai_iou.planning.intensity import intensity_rule as _intensity  # noqa: F401  # its name before this was a folder
from monai_iou.planning.plan import Plan, make_plan, network_size
from monai_iou.planning.rules import Proposal, propose
from monai_iou.planning.size_rules import Decision
from monai_iou.planning.stored import load_plan

__all__ = ["Decision", "Fingerprint", "Plan", "Proposal", "load_plan", "make_plan", "network_size", "propose"]
