"""A model from outside: canonical parameter names, and states of it that are set for a block and put back."""
