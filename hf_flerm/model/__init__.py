"""Helpers for models: canonical parameter names, and context managers that change a model and restore it."""
