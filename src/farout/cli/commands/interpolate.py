"""`farout interpolate`."""

from __future__ import annotations

from farout.cli.terminal import print_text
from farout.report.interpolation import InterpolatedFolder

__all__ = ["print_interpolated_folder"]


def print_interpolated_folder(result: InterpolatedFolder) -> None:
    """Prints the number of images, the error of the inversion, and the paths."""
    error = f"RMS error of the decoded inversions {result.reconstruction_error:.4f}"
    print_text(f"{result.pairs} pairs, {result.images} images; {error}")
    for path in (result.folder, result.folder / "page.html"):
        print_text(f"  {path}")
