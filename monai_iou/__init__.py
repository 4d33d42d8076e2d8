"""IoU (Jaccard) losses and metrics for MONAI, for foregrounds that are a tiny part of the volume."""

__version__ = "0.1.0"

__all__ = ["__version__"]
