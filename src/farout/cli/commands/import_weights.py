"""`farout import`."""

from __future__ import annotations

from farout.cli.terminal import print_text
from farout.importing.import_weights import ImportedFolder

__all__ = ["print_imported_folder"]


def print_imported_folder(result: ImportedFolder) -> None:
    """Prints what was recognized, what was assumed, the folder and the next command."""
    print_text(f"Recognized: {result.summary} ({result.layout})")
    print_text(f"{result.network}; {result.parameters:,} parameters")
    for name, value in result.assumed.items():
        print_text(f"  assumed, not in the file: {name}: {value}")
    print_text(f"Written to {result.folder}; next: {result.next_command}")
