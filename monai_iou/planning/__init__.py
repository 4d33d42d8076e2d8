"""Choose a training for a dataset and a machine."""
