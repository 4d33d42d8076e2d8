"""Read datasets of images and labels, split them, and make phantoms."""
