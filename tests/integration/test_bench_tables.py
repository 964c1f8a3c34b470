"""Tables of benchmarks from given rows: means, deviations, markers, best methods, Markdown and LaTeX."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from farout.benchmark.benchmark_plan import BenchmarkJob, BenchmarkPlan, plan_benchmark
from farout.benchmark.metrics import collect_metrics, mean_by_group, paired_differences, significantly_lower
from farout.benchmark.result_tables import make_tables, to_latex, to_markdown
from farout.benchmark.runner import BenchmarkReport
from farout.benchmark.yaml_reader import parse_benchmark
from farout.cli.bench import show_bench
from farout.data.sources import open_source
from farout.detectors.base import Scores
from farout.evaluation.scored_datasets import ScoredDataset

NEAR, ALSO, FAR = "sample_fashion:test@classes=8", "sample_fashion:test@classes=9", "sample_digits:test"


def plan(seeds: tuple[int, ...] = (0, 1)) -> BenchmarkPlan:
    content: dict[str, Any] = {
        "name": "hand_made",
        "train": "sample_fashion:train@classes=0-7",
        "id": "sample_fashion:test@classes=0-7",
        "ood": {"near": [NEAR, ALSO], "far": [FAR, "svhn:test"]},
        "seeds": list(seeds),
        "detectors": ["knn", {"name": "a_b", "method": "mahalanobis"}],
        "random_weights_baselines": False,
    }
    return plan_benchmark(parse_benchmark(content), "out", {"svhn:test": "svhn:test is not on this machine"})


def row(detector: str, ood: str, seed: int, auroc: float, marker: str = "", **more: Any) -> dict[str, Any]:
    known = {
        "bench": "hand_made", "detector": detector, "indicator": "score", "id": "i", "ood": ood, "seed": seed,
        "ood_group": "far" if ood == FAR else "near",
        "auroc": auroc, "auroc_low": auroc - 0.1, "auroc_high": auroc + 0.1,
        "aupr_in": 0.5, "aupr_out": 0.5, "fpr95": 1 - auroc, "false_alarm": 0.05, "detection": 0.5, "nfe": 1,
        "gmacs": 0.02, "images_per_s": 120.4, "fit_s": 1.0, "n_id": 20, "n_ood": 10, "marker": marker,
    }  # fmt: skip
    return {**known, **more}


ROWS = pd.DataFrame(
    [
        row("knn", NEAR, 0, 0.6, "pretrained"),
        row("knn", ALSO, 0, 0.8, "overlap;pretrained;best"),
        row("knn", NEAR, 1, 0.8, "pretrained"),
        row("knn", ALSO, 1, 1.0, "overlap;pretrained;best"),
        row("knn", FAR, 0, 0.4, "size;pretrained;below half"),
        row("knn", FAR, 1, 0.5, "size;pretrained"),
        row("a_b", NEAR, 0, 0.9, "best"),
        row("a_b", NEAR, 1, 0.9, "best"),
        row("trivial_baselines", NEAR, 0, 0.7, "baseline"),
    ]
)
PAIRS = pd.DataFrame(
    [
        {"first": "knn", "second": "a_b", "ood": NEAR, "low": -0.4, "high": -0.1, "difference": -0.3, "seed": 0},
        {"first": "a_b", "second": "knn", "ood": NEAR, "low": 0.1, "high": 0.4, "difference": 0.3, "seed": 0},
        {"first": "a_b", "second": "trivial_baselines", "ood": NEAR, "low": -2.0, "high": -1.0, "seed": 0},
        {"first": "knn", "second": "a_b", "ood": ALSO, "low": -0.1, "high": 0.1, "difference": 0.0, "seed": 0},
    ]
)


def test_means_over_sets_and_seeds() -> None:
    found = mean_by_group(plan(), ROWS).set_index(["detector", "ood_group"])
    near = found.loc[("knn", "near")]
    assert near["auroc"] == pytest.approx(0.8)
    assert near["auroc_std"] == pytest.approx(np.std([0.7, 0.9], ddof=1)), "over seeds, of the means over sets"
    assert near["fpr95"] == pytest.approx(0.2)
    assert (near["sets"], near["seeds"], near["untested"]) == (2, 2, 0)
    assert near["marker"] == "overlap;pretrained", "each once, in one order; a mean is not what is best"
    far = found.loc[("knn", "far")]
    assert (far["sets"], far["untested"]) == (1, 1)
    assert far["marker"] == "size;pretrained;below half"
    assert np.isnan(found.loc[("trivial_baselines", "near"), "auroc_std"]), "one seed has no deviation"
    unread = pd.DataFrame([row("knn", NEAR, 0, 0.6), row("knn", ALSO, 0, float("nan"))])
    assert mean_by_group(plan((0,)), unread).iloc[0][["auroc", "sets"]].tolist() == [0.6, 1], "a set without figures"
    none = unread.iloc[1:]
    assert make_tables(plan((0,)), none, mean_by_group(plan((0,)), none))[0].rows[0][1].text == ""


def test_the_best_methods_are_marked() -> None:
    means, sets = make_tables(plan(), ROWS, mean_by_group(plan(), ROWS))
    assert [line[0].text for line in sets.rows] == ["knn *", "a_b", "trivial_baselines"], "baselines come last"
    assert sets.methods == means.methods == 2
    assert sets.heads == ("detector", f"{NEAR} (near)", f"{ALSO} (near, overlap)", f"{FAR} (far, size)")
    knn, other, control = sets.rows
    assert (knn[1].best, other[1].best, control[1].best) == (False, True, False)
    assert knn[2].best
    assert knn[1].text == "0.700 ± 0.141"
    assert knn[3].text.endswith("†")
    assert other[2].text == ""
    assert not other[2].best
    assert means.heads == (
        "detector",
        "near AUROC",
        "near FPR95",
        "far AUROC",
        "far FPR95",
        "NFE",
        "GMACs",
        "img/s",
        "fit, s",
    )
    assert [cell.text for cell in means.rows[0][1:]] == [
        "0.800 ± 0.141", "0.200 ± 0.141", "0.450 ± 0.071", "0.550 ± 0.071", "1", "0.02", "120", "1",
    ]  # fmt: skip


def test_significantly_lower_methods() -> None:
    """A better baseline does not count, nor does an interval that contains zero."""
    assert significantly_lower(plan(), PAIRS) == {("knn", NEAR)}


def test_one_seed_has_its_interval() -> None:
    rows = ROWS[ROWS["seed"] == 0]
    sets = make_tables(plan((0,)), rows, mean_by_group(plan((0,)), rows))[1]
    assert sets.rows[0][1].text == "0.600 (0.500 to 0.700)"


def test_markdown_is_a_table() -> None:
    tables = make_tables(plan(), ROWS, mean_by_group(plan(), ROWS))
    text = to_markdown(plan(), ROWS, tables, "a machine")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * (2 + 3)
    assert {line.count("|") for line in lines[:5]} == {10}
    assert "**0.900 ± 0.000**" in text
    assert "untested (far): svhn:test is not on this machine" in text
    assert "seeds 0, 1" in text
    assert "all scores are equal" not in text, "signs that do not occur are not explained"


def test_a_narrow_console_breaks_no_head_of_a_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("farout.cli.tables._LOG", 80)
    groups = mean_by_group(plan(), ROWS)
    show_bench(iter([BenchmarkReport(plan(), ROWS, groups, tuple(make_tables(plan(), ROWS, groups)), (), ())]))
    text = capsys.readouterr().out
    assert re.search(r"NFE +GMACs +img/s +fit, s", text)
    assert not re.search(r"fit,\s*$", text, re.MULTILINE)


def test_latex_has_balanced_tables() -> None:
    tables = make_tables(plan(), ROWS, mean_by_group(plan(), ROWS))
    text = to_latex(plan(), ROWS, tables, "a machine")
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 2
    assert body.count(r"\toprule") == body.count(r"\bottomrule") == 2
    for board, part in zip(tables, re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", body, re.DOTALL)):
        rows = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert len(rows) == 1 + len(board.rows)
        assert {line.count(" & ") for line in rows} == {len(board.heads) - 1}
        assert part.count(r"\midrule") == 2, "below the heads, and before the controls"
    assert r"a\_b" in body
    assert r"\textbf{0.900 $\pm$ 0.000}" in body
    assert not re.search(r"(?<!\\)[_%&](?! )", body.replace("$^", "")), "signs of LaTeX's own are escaped"
    assert "untested (far): svhn:test" in text


def evaluation(entry: str, seed: int, folder: Path) -> BenchmarkJob:
    return BenchmarkJob(name=f"evaluations/{entry}-{seed}", kind="evaluations", output=folder, entry=entry, seed=seed)


# -- markers from scores ------------------------------------------------------------------------------------------


def side(spec: str, values: list[float], **indicators: list[float]) -> ScoredDataset:
    source = open_source(spec).subset(range(len(values)))
    keys, score = source.keys, np.array(values)
    found = {"energy": score, **{name: np.array(value) for name, value in indicators.items()}}
    nothing = np.zeros(len(values))
    return ScoredDataset(source, Scores(keys, score, nothing, nothing > 1, ("ok",) * len(values), found, None))


def test_rows_are_marked(tmp_path: Path) -> None:
    """Constant scores are read from the scores: an AUROC of one half alone does not tell."""
    job = evaluation("trivial_baselines", 0, tmp_path)
    rows = [
        row("trivial_baselines", NEAR, 0, 0.5, indicator=name, preset="", protocol="native", role="test", group="")
        for name in ("score", "flat", "even")
    ]
    rows.append({**rows[0], "ood": "another:set"})
    pd.DataFrame([{**each, "auroc": 0.4 if each["indicator"] == "even" else 0.5} for each in rows]).reindex(
        columns=[*pd.DataFrame(rows).columns, "peak_mib", "alpha", "fpr95_low", "fpr95_high"]
    ).drop(columns=["bench", "marker"]).to_csv(tmp_path / "metrics.csv", index=False)
    inside = side("sample_fashion:test", [1.0, 2.0, 3.0], flat=[7.0, 7.0, 7.0], even=[1.0, 2.0, 3.0])
    outside = side(NEAR, [1.0, 3.0], flat=[7.0, float("nan")], even=[2.0, 2.0])
    found = collect_metrics(plan(), [(job, [inside, outside])], {NEAR: {"markers": ["size", "overlap"]}}, PAIRS)
    assert found["marker"].tolist() == [
        "baseline;size;overlap",
        "baseline;size;overlap;constant",
        "baseline;size;overlap;below half",
    ], "sets that are not in the benchmark are left out"
    assert set(found["ood_group"]) == {"near"}
    assert set(found["bench"]) == {"hand_made"}
    methods = [pd.read_csv(tmp_path / "metrics.csv").assign(detector=name).iloc[:2] for name in ("knn", "a_b")]
    scored = []
    for table in methods:
        folder = tmp_path / table["detector"].iloc[0]
        folder.mkdir()
        table.to_csv(folder / "metrics.csv", index=False)
        scored.append((evaluation(folder.name, 0, folder), [inside, outside]))
    found = collect_metrics(plan(), scored, {NEAR: {"markers": []}}, PAIRS)["marker"].tolist()
    assert found == ["pretrained", "pretrained;constant", "pretrained;best", "pretrained;constant"], "by its own score"


def test_differences_are_listed_in_both_orders_within_a_seed(tmp_path: Path) -> None:
    inside, outside = side("sample_fashion:test@classes=0", [1.0, 2.0, 3.0]), side(FAR, [4.0, 5.0, 6.0])
    worse = [inside, side(FAR, [1.0, 5.0, 2.5])]
    jobs = [
        (evaluation("a_b", 0, tmp_path), [inside, outside]),
        (evaluation("knn", 0, tmp_path), worse),
        (evaluation("knn", 1, tmp_path), worse),
    ]
    found = paired_differences(jobs)
    assert len(found) == 2
    ahead = found.set_index("first")
    assert ahead.loc["a_b", "difference"] == pytest.approx(1 - 5.5 / 9)
    assert ahead.loc["knn", "difference"] == -ahead.loc["a_b", "difference"]
    assert ahead.loc["knn", "high"] == -ahead.loc["a_b", "low"]
