"""What several test modules share: models, data, runs, references, and where the repository lies."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
