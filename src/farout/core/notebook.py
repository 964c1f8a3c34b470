"""Tables as HTML for notebooks."""

from __future__ import annotations

import pandas as pd

__all__ = ["render_table"]

_STYLE = "<style>.farout td, .farout th {text-align: right; padding: 0 .6em}</style>"


def render_table(table: pd.DataFrame, float_format: str) -> str:
    """HTML of a table without its index; `float_format` is that of `format`, such as `.3f`."""
    rendered = table.to_html(
        index=False, float_format=lambda value: format(value, float_format), na_rep="", border=0, classes="farout"
    )
    return f"{_STYLE}{rendered}"
