"""Frames and images: from a folder to augmented batches."""
