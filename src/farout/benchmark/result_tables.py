"""The tables of a benchmark for readers, as cells, Markdown and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from farout.benchmark.benchmark_plan import BenchmarkPlan
from farout.benchmark.metrics import MARKERS, split_markers
from farout.evaluation.scored_datasets import METHOD_SCORE

__all__ = ["COST_COLUMNS", "ResultTable", "list_untested", "make_tables", "to_latex", "to_markdown"]

COST_COLUMNS = {"nfe": "NFE", "gmacs": "GMACs", "images_per_s": "img/s", "fit_s": "fit, s"}
"""Columns of cost with their heads."""
_BELOW_HALF, _CONSTANT = "†", "‡"


@dataclass(frozen=True)
class Cell:
    """A text; `best` ones are bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class ResultTable:
    """A table; the first `methods` rows are methods, the others baselines."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    methods: int


def make_tables(plan: BenchmarkPlan, metrics: pd.DataFrame, groups: pd.DataFrame) -> list[ResultTable]:
    """Two tables of each detector's own score: means over groups with costs, and the AUROC of every set."""
    own = metrics[metrics["indicator"] == METHOD_SCORE]
    is_baseline = {name: "baseline" in _all_markers(part) for name, part in own.groupby("detector")}
    names = sorted(dict.fromkeys(own["detector"]), key=lambda name: is_baseline[name])
    methods = sum(not is_baseline[name] for name in names)
    interval = "mean and standard deviation over seeds" if len(plan.spec.seeds) > 1 else "with its 95 % interval"
    caption = f"AUROC, {interval}; bold: no method is significantly higher (paired 95 % interval) in any seed."
    means = _mean_rows(plan, own, groups[groups["indicator"] == METHOD_SCORE], names)
    return [
        ResultTable("Means over the sets of a group, and cost per image.", *means, methods),
        ResultTable(caption, *_set_rows(plan, own, names), methods),
    ]


def _mean_rows(
    plan: BenchmarkPlan, own: pd.DataFrame, groups: pd.DataFrame, names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    shown_groups = [group for group in plan.spec.ood if (groups["ood_group"] == group).any()]
    heads = [f"{group} {metric}" for group in shown_groups for metric in ("AUROC", "FPR95")]
    by_group = {(row["detector"], row["ood_group"]): row for row in groups.to_dict("records")}
    costs = own.groupby("detector")[list(COST_COLUMNS)].mean()
    rows = []
    for name in names:
        cells = [_name_cell(own, name)]
        for group in shown_groups:
            row = by_group.get((name, group))
            for metric in ("auroc", "fpr95"):
                cells.append(Cell("" if row is None else _format_mean(row[metric], row[f"{metric}_std"])))
        for cost in costs.loc[name].to_numpy(dtype=float):
            cells.append(Cell("" if math.isnan(cost) else f"{cost:.3g}" if cost < 100 else f"{cost:.0f}"))
        rows.append(tuple(cells))
    return ("detector", *heads, *COST_COLUMNS.values()), tuple(rows)


def _set_rows(
    plan: BenchmarkPlan, own: pd.DataFrame, names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    sets = [source for source in plan.spec.ood_sources if (own["ood"] == source).any()]
    heads = ["detector"]
    for source in sets:
        markers = _all_markers(own[own["ood"] == source])
        shown = [marker for marker in ("size", "overlap") if marker in markers]
        heads.append(f"{source} ({', '.join([plan.spec.group_of(source), *shown])})")
    rows = []
    for name in names:
        cells = [_name_cell(own, name)]
        for source in sets:
            part = own[(own["detector"] == name) & (own["ood"] == source)]
            cells.append(Cell(_format_auroc(part), "best" in _all_markers(part)))
        rows.append(tuple(cells))
    return tuple(heads), tuple(rows)


def _name_cell(own: pd.DataFrame, name: str) -> Cell:
    """A detector's name, with a star if it was pretrained on other images."""
    return Cell(name + " *" * ("pretrained" in split_markers(own.loc[own["detector"] == name, "marker"].iloc[0])))


def _all_markers(rows: pd.DataFrame) -> set[str]:
    return {word for cell in rows["marker"] for word in split_markers(cell)}


def _format_mean(value: float, deviation: float) -> str:
    return "" if pd.isna(value) else f"{value:.3f}" + ("" if pd.isna(deviation) else f" ± {deviation:.3f}")


def _format_auroc(rows: pd.DataFrame) -> str:
    """The AUROC on a set: mean over seeds with standard deviation, or of one seed with its interval."""
    if not rows["auroc"].notna().any():
        return ""
    sign = _CONSTANT * ("constant" in _all_markers(rows)) + _BELOW_HALF * bool(rows["auroc"].mean() < 0.5)
    if len(rows) > 1:
        return _format_mean(rows["auroc"].mean(), rows["auroc"].std(ddof=1)) + sign
    low, high = rows["auroc_low"].iloc[0], rows["auroc_high"].iloc[0]
    return f"{rows['auroc'].iloc[0]:.3f} ({low:.3f} to {high:.3f}){sign}"


def list_untested(plan: BenchmarkPlan) -> list[str]:
    """A line for every set that is not available, with the reason."""
    reasons = {source: why if source in why else f"{source}: {why}" for source, why in plan.untested.items()}
    return [f"untested ({plan.spec.group_of(source)}): {reason}" for source, reason in reasons.items()]


def _explain_signs(plan: BenchmarkPlan, metrics: pd.DataFrame) -> list[str]:
    """The meaning of the signs that the tables contain, and the sets that are not available."""
    used = _all_markers(metrics[metrics["indicator"] == METHOD_SCORE])
    signs = {
        "pretrained": "*",
        "constant": _CONSTANT,
        "below half": _BELOW_HALF,
        "size": "size:",
        "overlap": "overlap:",
    }
    return [f"{sign} {MARKERS[word]}" for word, sign in signs.items() if word in used] + list_untested(plan)


def _describe_setup(plan: BenchmarkPlan, metrics: pd.DataFrame, machine: str) -> str:
    spec, id_count, ood_counts = plan.spec, metrics["n_id"].max(), metrics["n_ood"]
    return (
        f"fitted on {spec.train}, in-distribution {spec.id}, protocol {spec.protocol}; {id_count:.0f} in-distribution "
        f"and {ood_counts.min():.0f} to {ood_counts.max():.0f} out-of-distribution images per set, "
        f"seed{'s' * (len(spec.seeds) > 1)} {', '.join(map(str, spec.seeds))}; {machine}."
    )


def to_markdown(plan: BenchmarkPlan, metrics: pd.DataFrame, tables: Sequence[ResultTable], machine: str) -> str:
    """The content of `results.md`."""
    parts = [f"# {plan.spec.name}", plan.spec.about, _describe_setup(plan, metrics, machine)]
    for table in tables:
        head = [table.heads, ("---",) * len(table.heads)]
        body = [[_mark_best(cell, "**{}**".format) for cell in row] for row in table.rows]
        lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in [*head, *body]]
        parts += [table.caption, "\n".join(lines)]
    parts.append("\n".join(f"- {note}" for note in _explain_signs(plan, metrics)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _mark_best(cell: Cell, mark: Callable[[str], str]) -> str:
    return mark(cell.text) if cell.best and cell.text else cell.text


_LATEX_ESCAPES = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", _BELOW_HALF: r"$^\dagger$", _CONSTANT: r"$^\ddagger$",
}  # fmt: skip


def _escape_latex(text: str) -> str:
    return "".join(_LATEX_ESCAPES.get(sign, sign) for sign in text)


def to_latex(plan: BenchmarkPlan, metrics: pd.DataFrame, tables: Sequence[ResultTable], machine: str) -> str:
    """The content of `results.tex`: tables for `\\input`, with the rules of the package booktabs."""
    parts = [f"% {plan.spec.name}: {_describe_setup(plan, metrics, machine)}"]
    for table in tables:
        rows = [
            [_mark_best(Cell(_escape_latex(cell.text), cell.best), r"\textbf{{{}}}".format) for cell in row]
            for row in table.rows
        ]
        body = [" & ".join(row) + r" \\" for row in rows]
        if 0 < table.methods < len(body):
            body.insert(table.methods, r"\midrule")
        parts += [
            r"\begin{table}", r"\centering", rf"\caption{{{_escape_latex(table.caption)}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(table.heads) - 1)}}}", r"\toprule",
            " & ".join(map(_escape_latex, table.heads)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
            r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join([*parts, *(f"% {note}" for note in _explain_signs(plan, metrics))]) + "\n"
