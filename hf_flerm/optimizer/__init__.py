"""Optimizer steps: their updates, the scales of their learning rates, and the properties of optimizer classes."""
