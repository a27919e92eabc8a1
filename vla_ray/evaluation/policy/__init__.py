"""Predicted trajectories against the right ones, and whether they follow the instruction."""
