"""Writes docs/tutorials/ from the scripts in examples/, whose cells begin with `# %%`: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"


def render_page(script: Path) -> str:
    """The page of a script: text cells as Markdown, code cells as code, and the figure below its title."""
    page = []
    for cell in re.split(r"^# %% *", script.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if kind == "[markdown]":
            page.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            page.append(f"```py\n{body.strip()}\n```")
    title, _, rest = page[0].partition("\n\n")
    head = (
        f"{title}\n\nThis page is the script `examples/{script.name}`. It runs in less than a minute on two cores.\n\n"
    )
    return head + "\n\n".join([rest, f"![The figure that the script draws]({script.stem}.png)", *page[1:]]) + "\n"


def pages() -> dict[str, str]:
    """File name -> content of every page."""
    return {f"{script.stem}.md": render_page(script) for script in sorted((ROOT / "examples").glob("*.py"))}


if __name__ == "__main__":
    for name, content in pages().items():
        (TUTORIALS / name).write_text(content, encoding="utf-8")
