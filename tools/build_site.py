"""Builds the documentation site into site/, with warnings as errors: `make docs`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Runs Zensical and returns its exit status; 1 also for a docstring that does not fit its signature."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    build = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(re.sub(r"\x1b\[[0-9;]*m", "", build.stdout), end="")  # colors are written to files too
    # `--strict` covers links, anchors and missing names; the parser of docstrings only logs its warnings
    return build.returncode or int("griffe:" in build.stdout)


if __name__ == "__main__":
    sys.exit(main())
