"""Where suites keep what is dear and always the same: unpacked backbones and fine-tuned experts."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``$MERGANSER_CACHE``, else ``$XDG_CACHE_HOME/merganser``, else ``~/.cache/merganser``."""
    if told := os.environ.get("MERGANSER_CACHE"):
        return Path(told)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser"
