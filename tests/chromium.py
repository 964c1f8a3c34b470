"""Pages in a headless Chromium, where one is installed."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
)


_HOST = """<!doctype html><body><script>
const framed = (width) => new Promise((done) => {{
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${{width}}px; height: 900px`;
  frame.srcdoc = {page};
  frame.onload = () => done(frame.contentWindow.eval({question}));
  document.body.append(frame);
}});
(async () => {{
  const found = [];
  for (const width of {widths}) found.push(await framed(width));
  const answer = document.createElement("pre");
  answer.id = "answer";
  answer.textContent = JSON.stringify(found);
  document.body.append(answer);
}})();
</script></body>"""
"""A page in a frame of each width, because a window has a minimum width."""


def evaluate_in_browser(page: Path, question: str, widths: Sequence[int] = (1280,)) -> list[Any]:
    """Value of a JavaScript expression, or of its promise, on a page of each width; must be JSON."""
    words = [json.dumps(text).replace("<", r"\u003c") for text in (page.read_text(encoding="utf-8"), question)]
    with tempfile.TemporaryDirectory() as folder:
        host = Path(folder) / "host.html"
        host.write_text(_HOST.format(widths=list(widths), page=words[0], question=words[1]), encoding="utf-8")
        command = [str(CHROMIUM), *_FLAGS.split(), f"--user-data-dir={folder}/user", "--window-size=1400,1000"]
        waiting = ["--virtual-time-budget=20000", "--dump-dom", host.as_uri()]
        done = subprocess.run([*command, *waiting], capture_output=True, text=True, timeout=300, check=True)
    found = re.search('<pre id="answer">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, "the page's own script has failed"
    return list(json.loads(unescape(found[1])))


LAYOUT = """(() => {
  document.querySelectorAll("details").forEach(e => e.open = true);
  const wide = [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest("svg") &&
    e.getBoundingClientRect().right > innerWidth + 1);
  const controls = "select, button, summary, input, a[href], [tabindex]";
  const focusable = [...document.querySelectorAll(controls)].filter(e => e.checkVisibility());
  const dead = focusable.filter(e => { e.focus(); return document.activeElement !== e || e.tabIndex < 0; });
  const rim = e => { e.focus({focusVisible: true}); return getComputedStyle(e).outlineStyle; };
  const bare = focusable.filter(e => rim(e) === "none");
  const names = some => some.map(e => e.outerHTML.slice(0, 200));
  return {width: innerWidth, scroll: document.documentElement.scrollWidth, wide: names(wide),
    focusable: focusable.length, dead: names(dead), bare: names(bare)};
})()"""
"""Elements that extend beyond the window, and controls that Tab does not reach or whose focus is invisible."""


def check_layout(page: Path) -> int:
    """Assert that nothing scrolls sideways on a desktop or a phone, and that the focus is visible on every control;
    return the number of controls.
    """
    widths = (1280, 375)
    counts = []
    for width, found in zip(widths, evaluate_in_browser(page, LAYOUT, widths)):
        assert found["width"] == width
        assert found["scroll"] <= width
        assert not found["wide"]
        assert not found["dead"]
        assert not found["bare"]
        counts.append(int(found["focusable"]))
    return min(counts)
