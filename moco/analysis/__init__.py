"""Evaluation of trained networks: accuracies, units, maps and films."""
