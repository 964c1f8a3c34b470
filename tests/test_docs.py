"""The documentation: its reference is made from the signatures, its links lead somewhere, and its commands exist."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_reference_of_commands_is_what_the_signatures_say_now() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))["reference"]()
    written = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert written == made, "docs/commands.md is out of date: `make docs` writes it anew"
