"""The page of a benchmark: one file of bounded size that loads nothing from outside."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from bench_folder import SKILLS, write_results
from chromium import check_layout, evaluate_in_browser, needs_chromium
from farout.benchmark.page import write_benchmark_page
from farout.core.errors import StoreError
from farout.core.files import hash_file
from farout.core.store import write_sealed_json
from farout.report.overlays import FOLDER, overlay_path
from farout.report.thumbnails import ThumbnailSet
from farout.scoring.folder import read_manifest
from small import pictures
from test_page import Tags

DATA = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+")
HOSTILE = '</script><b onload="x">&{{ 1 }}.png'


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    base = tmp_path_factory.mktemp("sets")
    names = [str(pictures(base / name, 40, seed=place)) for place, name in enumerate(("in", "near", "far"))]
    return names[0], names[1], names[2]


@pytest.fixture(scope="module")
def results(sets: tuple[str, str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("bench") / "b", sets[0], sets[1:], seeds=(0, 1))


@pytest.fixture(scope="module")
def page(results: Path) -> Path:
    return write_benchmark_page(results)


@pytest.fixture
def copy(results: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(results, tmp_path / "b"))


def text_of(folder: Path) -> str:
    return write_benchmark_page(folder).read_text(encoding="utf-8")


def leaderboard_rows(text: str, label: str) -> list[tuple[str, list[str], list[str]]]:
    """Detector with indicator, sort keys and cell texts of a table of the leaderboard."""
    table = re.search(f'<table class="leaderboard[^>]*aria-label="{label}".*?</table>', text, re.DOTALL)
    assert table is not None
    rows = re.findall('<tr role="row"[^>]*>\n<td(.*?)</tr>', table[0], re.DOTALL)
    names = [re.search('data-sort="(.*?)"', row) for row in rows]
    assert all(names)
    return [
        (
            name[1],
            re.findall('class="figure" data-sort="(.*?)"', row),
            re.findall('class="figure".*?</span>(.*?)</td>', row),
        )
        for row, name in zip(rows, names)
        if name
    ]


def test_nothing_is_fetched_from_outside(page: Path) -> None:
    text = DATA.sub("data:", page.read_text(encoding="utf-8"))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    outside = {address for address in re.findall(r"url\((.*?)\)", text) if not address.startswith("#")}
    assert outside == {"data:"}
    for tag, attributes in Tags(text).found:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base", "img"), tag
        assert not {"src", "srcset", "action"} & set(attributes)
        assert str(attributes.get("href", "#")).startswith("#"), "parts of the charts"
        assert not [name for name in attributes if name.startswith("on")]


def test_tags_are_closed_and_tables_are_named(page: Path) -> None:
    tags = Tags(page.read_text(encoding="utf-8"))
    assert not tags.open
    tables = [attributes for tag, attributes in tags.found if tag == "table"]
    assert len(tables) == 4 * 2 + 1, "four metrics of the scores and of the other indicators, and the cost"
    for tag, attributes in tags.found:
        assert "tabindex" not in attributes
        assert "disabled" not in attributes
        if tag in ("svg", "table") or attributes.get("role") == "img":
            assert attributes.get("aria-label") or attributes.get("aria-labelledby")
    heads = [attributes for tag, attributes in tags.found if tag == "th" and attributes.get("scope") == "col"]
    assert [head["aria-sort"] for head in heads if "aria-sort" in head] == ["descending"]


def test_values_are_those_of_the_tables(results: Path, page: Path) -> None:
    metrics, text = pd.read_csv(results / "metrics.csv"), page.read_text()
    for metric, title in (("auroc", "AUROC"), ("fpr95", "FPR95"), ("aupr_in", "AUPR-in"), ("aupr_out", "AUPR-out")):
        own = leaderboard_rows(text, title)
        others = leaderboard_rows(text, f"{title} of the other indicators")
        assert (len(own), len(others)) == (len(SKILLS), 2 * len(SKILLS)), "the own score and two indicators"
        for name, keys, cells in own + others:
            detector, indicator = name.split()
            part = metrics[(metrics["detector"] == detector) & (metrics["indicator"] == indicator)]
            for column, source in zip((2, 3), metrics["ood"].unique()):
                values = part.loc[part["ood"] == source, metric]
                assert float(keys[column]) == pytest.approx(values.mean(), abs=1e-6)
                cell = f"<b>{float(keys[column]):.3f}</b><small>± {values.std():.3f}</small>"
                assert cells[column].partition("<span")[0] == cell
    own_auroc = [float(keys[0]) for _, keys, _ in leaderboard_rows(text, "AUROC")]
    assert own_auroc == sorted(own_auroc, reverse=True), "the best comes first"


def test_baselines_are_marked_and_markers_explained(page: Path, results: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('<tr role="row" class="baseline">') == 4 * 3 + 1, "four metrics of three scores, and the cost"
    for words in ("a trivial baseline", "a small &lt;benchmark&gt;", "is not here"):
        assert words in text
    names = re.findall(r'class="detector"[^>]*><b>(.*?)</b> <span class="badge">(.*?)</span>', text)
    assert dict(names) == {"semantic": "pretrained", "knn": "pretrained", "trivial_<wbr>baselines": "baseline"}
    heads = re.search(r"<thead.*?</thead>", text, re.DOTALL)
    assert heads is not None
    assert heads[0].count('<span class="badge">size</span>') == 1
    assert "not explained" in text, "what size means"
    below = (pd.read_csv(results / "metrics.csv").groupby(["detector", "indicator", "ood"])["auroc"].min() < 0.5).sum()
    assert text.count('<span class="badge">below half</span>') == below + (below > 0)


def test_one_seed_is_shown_with_intervals(sets: tuple[str, str, str], tmp_path: Path) -> None:
    folder = write_results(tmp_path / "b", sets[0], sets[1:2], skills={"knn": (1.0, 0.4)})
    row = pd.read_csv(folder / "metrics.csv").iloc[0]
    text = text_of(folder)
    assert f"<small>{row['auroc_low']:.3f}–{row['auroc_high']:.3f}</small>" in text
    assert "Where detectors disagree" not in text, "a single detector cannot disagree"


def test_values_are_rounded_once(sets: tuple[str, str, str], tmp_path: Path) -> None:
    """Rounded to four digits first, 0.715478 would be 0.716."""
    folder = write_results(tmp_path / "b", sets[0], sets[1:2], skills={"knn": (1.0, 0.4)})
    metrics = pd.read_csv(folder / "metrics.csv")
    metrics.loc[metrics["indicator"] == "score", "auroc"] = 0.715478
    metrics.to_csv(folder / "metrics.csv", index=False)
    text = text_of(folder)
    assert "<b>0.715</b>" in text
    assert "<b>0.716</b>" not in text


def test_charts_have_the_values_of_the_tables(page: Path, results: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count('aria-label="ROC curves on') == 2
    metrics = pd.read_csv(results / "metrics.csv")
    first = metrics[(metrics["indicator"] == "score") & (metrics["seed"] == 0)]
    captions = re.findall(r"<figcaption>(.*?): AUROC (.*?), FPR95 (.*?)</figcaption>", text)
    methods = first[first["detector"] != "trivial_baselines"]
    expected = [(row["ood"], f"{row['auroc']:.3f}", f"{row['fpr95']:.3f}") for row in methods.to_dict("records")]
    assert captions == expected
    assert text.count('aria-label="AUROC on') == 4, "two groups by two costs"


def test_galleries_show_wrong_decisions(page: Path, results: Path) -> None:
    scores = pd.read_csv(results / "evaluations/semantic-0/scores/set0/scores.csv", dtype={"key": str})
    flagged = scores[scores["is_ood"]].sort_values("score", ascending=False)
    assert len(flagged), "a test without false alarms would be empty"
    gallery = page.read_text().split("False alarms on")[1].split("</ul>")[0]
    assert f"{len(flagged)} of 40 flagged" in gallery
    assert re.findall(r'class="name">(.*?)</span>', gallery) == flagged["key"].tolist()[:8]
    assert gallery.count('class="thumb') == len(flagged.head(8))


def test_the_image_with_the_largest_disagreement_comes_first(copy: Path) -> None:
    for place, name in enumerate(("semantic", "knn", "reconstruction")):
        path = copy / f"evaluations/{name}-0/scores/set1/scores.csv"
        table = pd.read_csv(path, dtype={"key": str})
        table.loc[table["key"] == "007.png", "score"] = (-99, 99, 99)[place]
        table.to_csv(path, index=False)
        about = read_manifest(path.parent)
        write_sealed_json(path.parent / "manifest.json", {**about, "files": {path.name: hash_file(path)}})
    part = text_of(copy).split("Where detectors disagree")[1].split("<summary>")[2]
    assert re.findall(r'class="name">(.*?)</span>', part)[0] == "007.png"
    assert re.findall(r"<span>(\w+)</span><i", part)[:3] == ["knn", "reconstruction", "semantic"]


def test_maps_are_shown_next_to_their_images(copy: Path) -> None:
    scores = pd.read_csv(copy / "evaluations/semantic-0/scores/set0/scores.csv", dtype={"key": str})
    key = scores.loc[scores["score"].idxmax(), "key"]
    path = copy / "evaluations/semantic-0/scores/set0" / FOLDER / overlay_path(key)
    path.parent.mkdir()
    Image.new("RGB", (300, 200), "red").save(path)
    assert f'aria-label="map of {key}"' in text_of(copy)


def test_missing_images_are_shown_by_key(copy: Path) -> None:
    for path in copy.glob("evaluations/*/scores/*/manifest.json"):
        about = read_manifest(path.parent)
        write_sealed_json(path, {**about, "source": about["source"].replace("near", "gone")})
    for name in ("metrics.csv",):
        (copy / name).write_text((copy / name).read_text().replace("near", "gone"))
    text = text_of(copy)
    assert "gone are not available" in text
    assert "False alarms on" in text


def test_a_detector_without_scores_is_in_the_tables_only(copy: Path) -> None:
    shutil.rmtree(copy / "evaluations" / "knn-0")
    text = text_of(copy)
    assert "<summary>knn</summary>" not in text
    assert "<b>knn</b>" in text
    shutil.rmtree(copy / "evaluations")
    assert "ROC curves" not in text_of(copy)


def test_names_are_escaped(sets: tuple[str, str, str], tmp_path: Path) -> None:
    folder = pictures(tmp_path / "odd", 6)
    (folder / "000.png").rename(folder / HOSTILE.replace("/", "_"))
    name = "a<b>'&, random weights"
    bench = write_results(tmp_path / "b", str(folder), sets[1:2], skills={name: (1.0, 0.4), "knn": (0.5, 0.0)})
    tags = Tags(text_of(bench))
    assert not tags.open
    assert not [attributes for _, attributes in tags.found if "onload" in attributes]
    assert name in "".join(tags.words)


@pytest.mark.parametrize("name", ["metrics.csv", "groups.csv", "bench.yaml", "provenance.json"])
def test_an_incomplete_folder_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    (copy / "page.html").write_text("an older page")
    with pytest.raises(StoreError, match=name):
        write_benchmark_page(copy)
    assert (copy / "page.html").read_text() == "an older page"


def test_a_table_without_a_required_column_is_refused(copy: Path) -> None:
    pd.read_csv(copy / "groups.csv").rename(columns={"auroc": "area"}).to_csv(copy / "groups.csv", index=False)
    with pytest.raises(StoreError, match=r"groups.csv has no column auroc"):
        write_benchmark_page(copy)


def test_thumbnails_are_limited() -> None:
    generator = np.random.default_rng(0)
    kept = ThumbnailSet(limit=9000)
    numbers = [
        kept.add("set", str(key), lambda: Image.fromarray(generator.integers(0, 255, (300, 400, 3), dtype=np.uint8)))
        for key in (0, 1, 1, 2, 3, 4)
    ]
    assert kept.is_full
    assert numbers[:3] == [0, 1, 1], "each is stored once"
    assert numbers[-1] is None
    assert sum(map(len, kept.urls)) <= 9000


@needs_chromium
def test_a_browser_shows_it_without_scrolling_sideways(page: Path) -> None:
    assert check_layout(page) > 8


USED = """(async () => {
  document.querySelectorAll("details").forEach(e => e.open = true);
  const [auroc, , fpr95] = document.querySelectorAll("table.leaderboard");
  const rows = table => [...table.tBodies[0].rows].filter(e => e.checkVisibility());
  const names = table => rows(table).map(e => e.querySelector("b").textContent);
  const press = async (table, column) => {
    table.tHead.rows[0].cells[column].click();
    await new Promise(done => setTimeout(done, 50));
  };
  const found = {first: names(auroc)};
  await press(auroc, 1); found.reversed = names(auroc);
  await press(auroc, 0); found.byName = names(auroc);
  const sorted = [...auroc.querySelectorAll("th[aria-sort]")];
  found.sort = sorted.map(e => [e.textContent, e.getAttribute("aria-sort")]);
  await press(fpr95, 1); found.fpr = rows(fpr95).map(e => Number(e.cells[1].dataset.sort));
  const box = auroc.previousElementSibling;
  box.value = "know knn"; box.dispatchEvent(new Event("input")); found.none = names(auroc);
  box.value = "KNN"; box.dispatchEvent(new Event("input")); found.some = names(auroc);
  return found;
})()"""


@needs_chromium
def test_a_browser_sorts_and_filters(page: Path) -> None:
    (found,) = evaluate_in_browser(page, USED)
    assert (found["first"][0], found["first"][-1]) == ("semantic", "trivial_baselines")
    assert found["reversed"] == found["first"][::-1]
    assert found["byName"] == sorted(SKILLS, reverse=True)
    assert found["sort"] == [["Detector", "descending"]]
    assert found["fpr"] == sorted(found["fpr"]), "the lowest error rate comes first"
    assert (found["none"], found["some"]) == ([], ["knn"])
