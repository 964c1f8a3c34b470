"""Pages from the templates beside this file."""

from __future__ import annotations

from typing import Any

import jinja2

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """A template of `templates/` filled with values, which are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("farout.evaluation"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(**values)
