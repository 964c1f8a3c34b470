"""Pages from the templates beside this file, and pictures as the data addresses that they bear."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import jinja2
from torch import Tensor

from farout.data.decoding import to_pil

__all__ = ["data_address", "png_address", "render"]


def render(template: str, **values: Any) -> str:
    """A template of `templates/` filled with values, which are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("farout.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template(template).render(**values)


def _breakable(text: str) -> list[str]:
    """The pieces of a name, such as `set:split@variant`, between which a line may end."""
    return re.findall(r"[^:@_=/,-]+[:@_=/,-]*|[:@_=/,-]+", text)


def data_address(data: bytes, kind: str = "png") -> str:
    """The data address of an encoded picture."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png_address(image: Tensor) -> str:
    """The data address of an image as `to_pil` takes it."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return data_address(buffer.getvalue())
