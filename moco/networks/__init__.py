"""Networks: architectures, their layers, and checkpoints of any library."""
