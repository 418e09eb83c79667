"""The `hf-flerm` command."""

from .main import app as app
