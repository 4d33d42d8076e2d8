"""Read volumes and compare their grids: every file that is read goes through here."""
