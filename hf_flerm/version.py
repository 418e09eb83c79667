"""The version of the installed package; it is set in `pyproject.toml`."""

from importlib.metadata import version

__version__ = version("hf_flerm")
