"""Pages from the templates beside this file."""

from __future__ import annotations

import re
from typing import Any

import jinja2

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """A template of `templates/` filled with values, which are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("farout.evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template).render(**values)


def _breakable(text: str) -> list[str]:
    """The pieces of a name, such as `set:split@variant`, between which a line may end."""
    return re.findall(r"[^:@_=/,-]+[:@_=/,-]*|[:@_=/,-]+", text)
