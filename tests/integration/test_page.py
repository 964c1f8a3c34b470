"""The page of a scored folder: one safe file that opens anywhere."""

import html
import re
import shutil
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from chromium import check_layout, evaluate_in_browser, needs_chromium
from farout.data.batching import Batch
from farout.detectors.base import Detector, Measurements
from farout.detectors.calibration import benjamini_hochberg
from farout.detectors.declarations import HeatMaps
from farout.detectors.reconstruction import Reconstruction
from farout.evaluation.trivial_baselines import TrivialBaselines
from farout.report import rendering, score_page
from farout.report.rendering import png_data_url
from farout.report.score_page import _color_map
from farout.scoring.folder import score_folder
from small import model, pictures

HOSTILE = '<script>alert(1)<script> & "quoted" it\'s.png'


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes what it did not open"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pictures(tmp_path_factory.mktemp("page") / "far", 6, low=0, spread=255, seed=3)
    if sys.platform != "win32":
        (folder / "000.png").rename(folder / HOSTILE)
    (folder / "broken <b>.png").write_text("no")
    pictures(folder / "good", 4, seed=8)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("page") / "good", 60)


@pytest.fixture(scope="module", params=["reconstruction", "controls"])
def detector(request: pytest.FixtureRequest, good: Path) -> Detector:
    """One with maps and one without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "controls":
            return TrivialBaselines().fit(good, alpha=0.1, statistics=30)
        return Reconstruction(levels=(50, 200), draws=1).fit(good, model(), alpha=0.1, statistics=30)


@pytest.fixture(scope="module")
def folder(detector: Detector, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "r"
    score_folder(detector, images, out)
    return out


@pytest.fixture
def page(folder: Path) -> str:
    return (folder / "page.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_from_outside(page: str) -> None:
    """A page that phones home tells others what was scored, and is broken without a network."""
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", "", page))
    for tag, attributes in Tags(page).found:
        assert tag not in ("link", "iframe", "object", "embed", "form", "base"), tag
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "action", "data"):
            if name in attributes and not (tag == "use" and str(attributes[name]).startswith("#")):
                assert re.match("data:image/(png|jpeg);base64,", str(attributes[name]))
    templates = Path(rendering.__file__).parent / "templates"
    expected = ["vendor/sortable.js", "vendor/sortable.a11y.js", "filter_tables.js"]
    scripts = re.findall(r"<script>\s*(.*?)\s*</script>", page, re.DOTALL)
    assert scripts == [(templates / name).read_text(encoding="utf-8").strip() for name in expected]
    assert page.count("<script") == len(scripts)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page), "only references inside the page"


def test_names_are_text_and_never_markup(page: str) -> None:
    tags = Tags(page)
    assert not tags.open, "every tag is closed"
    if sys.platform != "win32":
        assert "<script>alert" not in page
        assert HOSTILE in "".join(tags.words)
    assert "broken <b>.png" in "".join(tags.words)
    assert ("b", {}) in tags.found, "the page's own markup is left"
    assert html.escape("broken <b>.png") in page


def test_every_card_is_there_with_its_numbers(page: str, folder: Path) -> None:
    frame = pd.read_csv(folder / "scores.csv")
    words = "".join(Tags(page).words)
    cards = [attributes for tag, attributes in Tags(page).found if str(attributes.get("class")).split()[0] == "card"]
    scored = frame[frame["status"] == "ok"]
    assert len(cards) == len(scored) == 10
    flagged = scored[scored["is_ood"].astype(str) == "True"]
    assert len(flagged) > 0, "a test without flagged images would say nothing"
    assert sum("flagged" in str(card["class"]).split() for card in cards) == len(flagged)
    assert words.count(", flagged") == len(flagged)
    for _, row in scored.iterrows():
        assert row["key"] in words
        assert f"score {row['score']:.4g}, p = {row['p_value']:.4f}" in words
    shown = [html.unescape(name) for name in re.findall(r'<p class="name">(.*?)</p>', page)]
    assert shown == scored.sort_values("score", ascending=False)["key"].tolist(), "the furthest comes first"


def test_pictures_are_those_of_the_method(page: str, detector: Detector) -> None:
    captions = set(re.findall(r"<figcaption>(.*?)</figcaption>", page))
    maps = isinstance(detector, Reconstruction)
    assert captions == ({"image", "reconstruction", "map"} if maps else set()), "a single picture needs no caption"
    assert ("Maps show" in page) == maps


def test_the_scale_of_maps_is_the_detectors(good: Path, images: Path, tmp_path: Path) -> None:
    """Maps in another unit would be all dark, under a caption that is not true."""

    class Differences(Reconstruction):
        heat_maps = HeatMaps("mean absolute differences", 0.25, frozenset({"blurred"}))

        def measure(self, batch: Batch, maps: bool = False) -> Measurements:
            measured = super().measure(batch, maps)
            if maps and "reconstruction" in measured.pictures:
                half = torch.full((len(batch.keys), 1, 8, 8), 0.25)
                measured.pictures = {**measured.pictures, "halved": half, "blurred": half}
                measured.maps = half[:, 0]
            return measured

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        score_folder(
            Differences(levels=(50,), draws=1).fit(good, model(), alpha=0.1, statistics=30), images, tmp_path / "r"
        )
    page = (tmp_path / "r" / "page.html").read_text(encoding="utf-8")
    assert "Maps show mean absolute differences (dark: 0, brightest: 0.25 or more)" in page
    shown = {name: data for data, name in re.findall(r'src="(data:[^"]*)"[^>]*><figcaption>(.*?)</figcaption>', page)}
    assert set(shown) == {"image", "reconstruction", "halved", "blurred", "map"}
    assert shown["blurred"] == shown["map"] == png_data_url(_color_map(torch.ones(1, 8, 8), 1.0)[0])
    assert shown["halved"] == png_data_url(torch.full((1, 8, 8), 0.25))


def test_the_threshold_separates_flagged_images(page: str, folder: Path) -> None:
    """Reading the page, one sees which scores are flagged."""
    found = re.search(r"Images above the threshold of (\S+) are flagged", page)
    assert found is not None
    threshold = float(found[1])
    assert f"threshold {found[1]}</text>" in page, "the dashed line of the chart"
    frame = pd.read_csv(folder / "scores.csv")
    scored = frame[frame["status"] == "ok"]
    flags = scored["is_ood"].astype(str) == "True"
    assert scored["score"][flags].min() > threshold * (1 - 1e-3)
    assert scored["score"][~flags].max() < threshold * (1 + 1e-3)


def test_too_few_calibration_images_flag_nothing_and_show_no_threshold(
    good: Path, images: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few = TrivialBaselines().fit(good, alpha=0.1, statistics=30)
        few.alpha = 0.001
        score_folder(few, images, tmp_path / "r")
    page = (tmp_path / "r" / "page.html").read_text()
    assert "threshold" not in page
    assert "nothing is flagged" in page
    assert "would be flagged" not in page


def test_settings_are_yaml_without_empty_entries(detector: Detector, folder: Path) -> None:
    page = (folder / "page.html").read_text(encoding="utf-8")
    settings = dict(re.findall(r'<dt>(.*?)</dt><dd class="yaml">(.*?)</dd>', page, re.DOTALL))
    if isinstance(detector, Reconstruction):
        assert settings["method"] == "reconstruction"
        assert "levels: [50, 200]" in settings["config"].splitlines()
    assert not [text for text in settings.values() if not text or "None" in text or "null" in text]


class Placed(TrivialBaselines):
    """The controls, with the five numbers as a place among good images."""

    def compute_embedding(self, measurements: Measurements) -> np.ndarray:
        assert measurements.values is not None
        return measurements.values[:, 0, 0].double().numpy()


def shown_good(page: str) -> list[tuple[str, bool, str]]:
    """Of every good image on a page: which it is, whether its picture is there, and the words below it."""
    found = re.findall(
        r'<figure>(<img src="data:[^"]*" alt="([^"]*)">)?<figcaption class="reference">(.*?)</figcaption>', page
    )
    return [(alt, bool(picture), words.strip()) for picture, alt, words in found]


@pytest.fixture
def placed(good: Path, tmp_path: Path) -> tuple[Detector, Path]:
    """A detector that was fitted to a folder of its own."""
    own = Path(shutil.copytree(good, tmp_path / "own"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Placed().fit(own, alpha=0.1, statistics=30), own


def test_the_nearest_good_images_stand_below(placed: tuple[Detector, Path], tmp_path: Path) -> None:
    detector, own = placed
    score_folder(detector, own, tmp_path / "r", top_images=60)
    page = (tmp_path / "r" / "page.html").read_text(encoding="utf-8")
    cards = re.split(r'<div class="card[" ]', page)[1:]
    assert len(cards) == 60
    fitted = set(detector.statistics.keys)
    for card in cards:
        name = re.search(r'<p class="name">(.*?)</p>', card)
        assert name is not None
        (first, *others) = [each for each in shown_good(card) if each[0].startswith("normal image")]
        assert len(others) == 2
        assert all(there for _, there, _ in (first, *others))
        gaps = [float(words) for _, _, words in (first, *others)]
        assert gaps == sorted(gaps)
        assert (first == (f"normal image {name[1]}", True, "0.000")) == (name[1] in fitted), (
            "nothing is nearer than itself"
        )


def test_images_that_have_changed_since_the_fit_are_not_shown(
    placed: tuple[Detector, Path], images: Path, tmp_path: Path
) -> None:
    """Another picture of the same name would be a lie."""
    detector, own = placed
    for path in own.iterdir():
        Image.new("L", (8, 8), 90).save(path)
    score_folder(detector, images, tmp_path / "changed")
    shutil.rmtree(own)
    score_folder(detector, images, tmp_path / "gone")
    for place in ("changed", "gone"):
        page = (tmp_path / place / "page.html").read_text(encoding="utf-8")
        found = shown_good(page)
        assert len(found) == 10 * 3 + 6
        assert not [alt for alt, there, _ in found if there]
        assert all(".png" in words for _, _, words in found), "keys stand for them"
        assert "is not available or has changed" in page


def test_a_hub_is_not_asked_for_good_images(
    placed: tuple[Detector, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farout.data.sources.list_hub", lambda *given: pytest.fail("the hub was asked"))
    detector, _ = placed
    detector.provenance["source"] = "hf://someone/something:train"
    score_folder(detector, images, tmp_path / "r")
    assert "is not available" in (tmp_path / "r" / "page.html").read_text(encoding="utf-8")


def test_the_good_images_that_score_highest_are_there(page: str, detector: Detector) -> None:
    scores = detector.score_measurements(detector.calibration)
    order = np.argsort(-scores.score, kind="stable")[:6]
    expected = [(f"calibration image {scores.keys[i]}", True, f"{scores.score[i]:.4g}") for i in order]
    assert [each for each in shown_good(page) if each[0].startswith("calibration")] == expected


@pytest.mark.parametrize("fdr", [None, 0.6])
def test_flagged_and_selected_images_are_listed(detector: Detector, images: Path, tmp_path: Path, fdr: float) -> None:
    score_folder(detector, images, tmp_path / "r", fdr=fdr)
    frame = pd.read_csv(tmp_path / "r" / "scores.csv")
    page = (tmp_path / "r" / "page.html").read_text(encoding="utf-8")
    table = re.search(r'<table class="list wide sortable">(.*?)</table>', page, re.DOTALL)
    assert table is not None
    cells = (5 if fdr else 3) * "<td[^>]*>(.*?)</td>"
    rows = [[html.unescape(cell) for cell in row] for row in re.findall(f"<tr>{cells}</tr>", table[1])]
    scored = frame[frame["status"] == "ok"].sort_values("score", ascending=False)
    flagged = scored["is_ood"].astype(str) == "True"
    if fdr is None:
        assert [row[0] for row in rows] == scored["key"][flagged].tolist()
        assert "selected" not in page.lower(), "nobody asked for a selection"
        return
    chosen = benjamini_hochberg(scored["p_value"], fdr)
    some = scored.assign(chosen=chosen, flagged=flagged)[flagged | chosen]
    assert [row[0] for row in rows] == some["key"].tolist()
    assert [row[3] for row in rows] == ["yes" if one else "no" for one in some["flagged"]]
    assert [row[4] for row in rows] == ["yes" if one else "no" for one in some["chosen"]]
    assert page.count("; selected") == int(chosen.sum())
    assert f"<summary>{flagged.sum()} flagged, {chosen.sum()} selected</summary>" in page
    assert chosen.tolist() == scored["selected"].tolist()
    assert chosen.any(), "a test without selected images would say nothing"


def test_skipped_images_do_not_shift_the_pictures(detector: Detector, images: Path, tmp_path: Path) -> None:
    """The table has no rows for them, and the source has."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "000-broken.png").write_text("no")
    for path in sorted((images / "good").iterdir()):
        shutil.copy(path, tmp_path / "new" / f"good-{path.name}")
    pages = []
    for policy in ("nan", "skip"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            score_folder(detector, tmp_path / "new", tmp_path / policy, policy=policy)
        page = (tmp_path / policy / "page.html").read_text(encoding="utf-8")
        pages.append(page[page.index("<h2>Images with the highest") : page.index("<h2>Calibration images")])
    assert pages[0].count('alt="image of good-00') == 4
    assert pages[0] == pages[1]


def test_images_that_have_disappeared_since_they_were_scored_have_no_picture(
    detector: Detector, images: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_page, "iterate_batches", lambda *_: iter(()))
    score_folder(detector, images, tmp_path / "r")
    without = (tmp_path / "r" / "page.html").read_text(encoding="utf-8")
    assert 'alt="image of' not in without
    assert without.count('<p class="name">') == page.count('<p class="name">') == 10


def test_long_lists_are_cut(
    detector: Detector, images: Path, folder: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A browser cannot show a million rows."""
    monkeypatch.setattr(score_page, "LISTED_ROWS", 1)
    many = Path(shutil.copytree(images, tmp_path / "many"))
    (many / "also broken.png").write_text("no")
    score_folder(detector, many, tmp_path / "r", fdr=0.6)
    short = (tmp_path / "r" / "page.html").read_text(encoding="utf-8")
    frame = pd.read_csv(tmp_path / "r" / "scores.csv")
    highest = frame.loc[frame["score"].idxmax(), "key"]
    lists = [re.findall(r"<tr><td>(.*?)</td>", part) for part in re.findall("<tbody>(.*?)</tbody>", short, re.DOTALL)]
    assert [[html.unescape(key) for key in keys] for keys in lists] == [[highest], ["also broken.png"]]
    assert "The 1 highest scores; scores.csv lists all images." in short
    assert "The first 1 of 2; manifest.json lists all reasons." in short
    assert "lists all" not in page, "nothing is cut there"
    assert short.count('<p class="name">') == page.count('<p class="name">')


@needs_chromium
def test_a_browser_shows_it_without_scrolling_sideways(folder: Path) -> None:
    assert check_layout(folder / "page.html") >= 1 + 2 + 3 + 2, "details, two search boxes, and the heads of two tables"


USE_TABLE = """(() => {
  document.querySelectorAll("details").forEach(e => e.open = true);
  const table = document.querySelector("table.list");
  const rows = () => [...table.querySelectorAll("tbody tr")].filter(e => e.checkVisibility());
  const keys = () => rows().map(e => e.cells[0].textContent);
  const pause = () => new Promise(done => setTimeout(done, 50));
  const filter = async text => {
    const box = table.previousElementSibling;
    box.value = text; box.dispatchEvent(new Event("input")); await pause();
    return keys();
  };
  return (async () => {
    const found = {first: keys()};
    table.tHead.rows[0].cells[1].click(); await pause(); found.descending = keys();
    table.tHead.rows[0].cells[1].click(); await pause(); found.ascending = keys();
    found.some = await filter("  .PNG 00"); found.none = await filter("no such image"); found.all = await filter("");
    found.scripts = document.querySelectorAll("script").length;
    return found;
  })();
})()"""


@needs_chromium
def test_a_browser_sorts_and_filters_the_table(folder: Path) -> None:
    (found,) = evaluate_in_browser(folder / "page.html", USE_TABLE)
    assert found["descending"] == found["first"] == found["ascending"][::-1]
    assert sorted(found["all"]) == sorted(found["first"])
    assert found["some"] == [key for key in found["ascending"] if ".png" in key and "00" in key]
    assert found["none"] == []
    assert found["scripts"] == 3, "no script came from a file name"
