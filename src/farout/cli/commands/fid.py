"""`farout fid`."""

from __future__ import annotations

from farout.cli.tables import new_table, print_table
from farout.evaluation.fid import SetDistance

__all__ = ["print_distances"]


def print_distances(distances: SetDistance) -> None:
    """Prints one row per metric."""
    table = new_table()
    for title in ("metric", "value", "computed on"):
        table.add_column(title, no_wrap=True)
    sets = f"{distances.generated} generated and {distances.reference} real images, {distances.dimension} features"
    table.add_row(distances.frechet_name, f"{distances.frechet:.4g}", sets)
    subsets = f"{distances.subsets} subsets of {distances.subset_size}"
    table.add_row(distances.kernel_name, f"{distances.kernel:.4g} ± {distances.kernel_std:.2g}", subsets)
    print_table(table)
