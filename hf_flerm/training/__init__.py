"""Following one training run: when to measure, with which data, and what to do with the result."""
