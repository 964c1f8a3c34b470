"""A page as a browser lays it out, where there is a Chromium to ask."""

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


def asked(page: Path, question: str, width: int = 1280) -> Any:
    """What a JavaScript expression comes to on a page in a window of that width; its value has to be JSON."""
    script = f"""<script>
const answer = document.createElement("pre");
answer.id = "answer";
answer.textContent = JSON.stringify({question});
document.body.append(answer);
</script>"""
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
        words = [str(CHROMIUM), *_FLAGS.split(), f"--user-data-dir={folder}/user", f"--window-size={width},900"]
        done = subprocess.run(
            [*words, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
    found = re.search('<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, "the page's own script has failed"
    return json.loads(unescape(found[1]))


LAYOUT = """(() => {
  const wide = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest("svg") &&
    e.getBoundingClientRect().right > innerWidth + 1);
  document.querySelectorAll("details").forEach(e => e.open = true);
  const focusable = [...document.querySelectorAll("select, button, summary, a[href]")].filter(e => e.checkVisibility());
  const dead = focusable.filter(e => { e.focus(); return document.activeElement !== e || e.tabIndex < 0; });
  const bare = focusable.filter(e => { e.focus({focusVisible: true}); return getComputedStyle(e).outlineStyle === "none"; });
  return {width: innerWidth, scroll: document.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 200)),
    focusable: focusable.length, dead: dead.map(e => e.outerHTML), bare: bare.map(e => e.outerHTML)};
})()"""
"""Whether anything reaches beyond the window, and what Tab cannot reach or does not show."""


def check_layout(page: Path, width: int) -> dict[str, Any]:
    """Asserts that nothing scrolls sideways and every control shows where the focus is."""
    found: dict[str, Any] = asked(page, LAYOUT, width)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert not found["wide"]
    assert not found["dead"]
    assert not found["bare"]
    return found
