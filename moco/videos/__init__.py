"""Videos: from files to frames."""
