"""HTML pages from the templates in `templates/`, and images as data URLs inside them."""

from __future__ import annotations

import base64
import io
import math
import re
from typing import Any

import jinja2
from torch import Tensor

from farout.data.decoding import to_pil

__all__ = ["data_url", "png_data_url", "render_template"]


def render_template(template: str, **values: Any) -> str:
    """Fill in a template of `templates/`; values are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("farout.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _split_at_punctuation
    environment.filters["cost"] = _format_cost
    text = environment.get_template(template).render(**values)
    return text.encode("utf-8", "backslashreplace").decode()  # paths may contain bytes that are not UTF-8


def _split_at_punctuation(text: str) -> list[str]:
    """Parts of a name such as `set:split@variant` between which a line may be broken."""
    return re.findall(r"[^:@_=/,-]+[:@_=/,-]*|[:@_=/,-]+", text)


def _format_cost(value: float) -> str:
    """Three digits, or an integer from 100 on; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def data_url(data: bytes, image_format: str = "png") -> str:
    """Data URL of an encoded image."""
    return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"


def png_data_url(image: Tensor) -> str:
    """Data URL of an image as `to_pil` accepts it."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return data_url(buffer.getvalue())
