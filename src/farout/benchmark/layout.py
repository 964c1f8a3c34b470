"""The tables of a benchmark for readers: Markdown and LaTeX, from the same cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from farout.benchmark.plan import Plan
from farout.benchmark.table import MARKERS, words_of
from farout.evaluation.scored_datasets import OWN

__all__ = ["COSTS", "Board", "boards", "latex", "markdown", "untested"]

COSTS = {"nfe": "NFE", "gmacs": "GMACs", "images_per_s": "img/s", "fit_s": "fit, s"}
"""Columns of cost, and their heads."""
_BELOW, _CONSTANT = "†", "‡"


@dataclass(frozen=True)
class Cell:
    """A text, and whether it is among the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Board:
    """A table: a caption, heads, and rows; a rule stands before row number `rule`, where the controls begin."""

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    rule: int


def boards(plan: Plan, metrics: pd.DataFrame, groups: pd.DataFrame) -> list[Board]:
    """Means of groups with costs, and the AUROC of every set; of the methods' own scores."""
    own = metrics[metrics["indicator"] == OWN]
    control = {name: "control" in words_of(part["marker"].iloc[0]) for name, part in own.groupby("detector")}
    names = sorted(dict.fromkeys(own["detector"]), key=lambda name: control[name])
    rule = sum(not control[name] for name in names)
    by_group = groups[groups["indicator"] == OWN]
    return [
        Board("Means over the sets of a group, and costs of an image.", *_means(plan, own, by_group, names), rule),
        Board(_caption(plan), *_sets(plan, own, names), rule),
    ]


def _caption(plan: Plan) -> str:
    spread = "mean and deviation over seeds" if len(plan.spec.seeds) > 1 else "with its 95 % interval"
    return f"AUROC, {spread}; bold: no method is significantly higher (paired 95 % interval) in any seed."


def _named(own: pd.DataFrame, name: str) -> Cell:
    """A detector's name; a star where it has seen other images."""
    marker = words_of(own.loc[own["detector"] == name, "marker"].iloc[0])
    return Cell(name + " *" * ("backbone" in marker))


def _means(
    plan: Plan, own: pd.DataFrame, groups: pd.DataFrame, names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    kept = [group for group in plan.spec.ood if (groups["group"] == group).any()]
    heads = [f"{group} {metric}" for group in kept for metric in ("AUROC", "FPR95")]
    table = groups.set_index(["detector", "group"])
    costs = own.groupby("detector")[list(COSTS)].mean()
    rows = []
    for name in names:
        cells = [_named(own, name)]
        for group in kept:
            found = table.loc[(name, group)] if (name, group) in table.index else None
            cells += [
                Cell("" if found is None else _spread(found[metric], found[f"{metric}_std"]))
                for metric in ("auroc", "fpr95")
            ]
        cells += [Cell(_number(costs.loc[name, column])) for column in COSTS]
        rows.append(tuple(cells))
    return ("detector", *heads, *COSTS.values()), tuple(rows)


def _spread(value: float, deviation: float) -> str:
    return "" if value != value else f"{value:.3f}" + (f" ± {deviation:.3f}" if deviation == deviation else "")


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _sets(plan: Plan, own: pd.DataFrame, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[tuple[Cell, ...], ...]]:
    sets = [source for source in plan.spec.sources if (own["ood"] == source).any()]
    rows = []
    for name in names:
        cells = [_named(own, name)]
        for source in sets:
            part = own[(own["detector"] == name) & (own["ood"] == source)]
            cells.append(Cell(_area(part), "unbeaten" in _words(part)))
        rows.append(tuple(cells))
    return ("detector", *(_set_head(plan, own, source) for source in sets)), tuple(rows)


def _words(part: pd.DataFrame) -> set[str]:
    """All markers of some rows."""
    return {word for text in part["marker"] for word in words_of(text)}


def _set_head(plan: Plan, own: pd.DataFrame, source: str) -> str:
    words = _words(own[own["ood"] == source])
    told = [word for word in ("size", "overlap") if word in words]
    return f"{source} ({', '.join([plan.spec.group(source), *told])})"


def _area(part: pd.DataFrame) -> str:
    """AUROC of a set, over seeds; of one seed with its interval."""
    if not len(part) or not part["auroc"].notna().any():
        return ""
    sign = _CONSTANT * ("constant" in _words(part)) + _BELOW * bool(part["auroc"].mean() < 0.5)
    if len(part) > 1:
        return _spread(part["auroc"].mean(), part["auroc"].std(ddof=1)) + sign
    low, high = part["auroc_low"].iloc[0], part["auroc_high"].iloc[0]
    return f"{part['auroc'].iloc[0]:.3f} ({low:.3f} to {high:.3f}){sign}"


def _notes(plan: Plan, metrics: pd.DataFrame) -> list[str]:
    """What the signs mean that stand in the tables, and which sets are not here."""
    used = _words(metrics[metrics["indicator"] == OWN])
    signs = {"backbone": "*", "constant": _CONSTANT, "below half": _BELOW, "size": "size:", "overlap": "overlap:"}
    notes = [f"{sign} {MARKERS[word]}" for word, sign in signs.items() if word in used]
    return notes + untested(plan)


def untested(plan: Plan) -> list[str]:
    """Which sets are not scored, and why, in words."""
    told = {source: why if source in why else f"{source}: {why}" for source, why in plan.untested.items()}
    return [f"untested ({plan.spec.group(source)}): {why}" for source, why in told.items()]


def _about(plan: Plan, metrics: pd.DataFrame, machine: str) -> str:
    spec = plan.spec
    counts = (
        f"{metrics['n_id'].max():.0f} in-distribution and {metrics['n_ood'].min():.0f} to {metrics['n_ood'].max():.0f}"
    )
    seeds = f"seed{'s' * (len(spec.seeds) > 1)} {', '.join(map(str, spec.seeds))}"
    fitted = f"fitted on {spec.train}, in-distribution {spec.id}, protocol {spec.protocol}"
    return f"{fitted}; {counts} out-of-distribution images a set, {seeds}; {machine}."


def markdown(plan: Plan, metrics: pd.DataFrame, tables: Sequence[Board], machine: str) -> str:
    """`results.md`."""
    parts = [f"# {plan.spec.name}", plan.spec.about, _about(plan, metrics, machine)]
    for board in tables:
        head = [board.heads, ("---",) * len(board.heads)]
        body = [[_bold(cell, "**{}**".format) for cell in row] for row in board.rows]
        lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in [*head, *body]]
        parts += [board.caption, "\n".join(lines)]
    parts.append("\n".join(f"- {note}" for note in _notes(plan, metrics)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _bold(cell: Cell, mark: Callable[[str], str]) -> str:
    return mark(cell.text) if cell.best and cell.text else cell.text


_ESCAPES = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", _BELOW: r"$^\dagger$", _CONSTANT: r"$^\ddagger$",
}  # fmt: skip


def _tex(text: str) -> str:
    return "".join(_ESCAPES.get(sign, sign) for sign in text)


def latex(plan: Plan, metrics: pd.DataFrame, tables: Sequence[Board], machine: str) -> str:
    """`results.tex`: tables for `\\input`, with the rules of the package booktabs."""
    parts = [f"% {plan.spec.name}: {_about(plan, metrics, machine)}"]
    for board in tables:
        lines = [
            [_bold(Cell(_tex(cell.text), cell.best), r"\textbf{{{}}}".format) for cell in row] for row in board.rows
        ]
        body = [" & ".join(row) + r" \\" for row in lines]
        if 0 < board.rule < len(body):
            body.insert(board.rule, r"\midrule")
        parts += [
            r"\begin{table}", r"\centering", rf"\caption{{{_tex(board.caption)}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(board.heads) - 1)}}}", r"\toprule",
            " & ".join(map(_tex, board.heads)) + r" \\", r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
            r"\end{table}", "",
        ]  # fmt: skip
    return "\n".join([*parts, *(f"% {note}" for note in _notes(plan, metrics))]) + "\n"
