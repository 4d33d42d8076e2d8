"""What the bundle's configs call: data, settings, training, checkpoints, inference."""
