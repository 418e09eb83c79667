"""One training run: when to measure, on which data, and how the results are used."""
