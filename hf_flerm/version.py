"""The installed version of the package; `pyproject.toml` sets it."""

from importlib.metadata import version

__version__ = version("hf_flerm")
