"""The mathematics: tensors and modules in, rates out. Start with `reference.py`."""
