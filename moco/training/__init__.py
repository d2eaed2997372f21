"""Training: one epoch, the run around it, and what makes it fast."""
