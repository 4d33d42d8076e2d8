"""Reading volumes and comparing their grids: the only code of the package that reads image files."""
