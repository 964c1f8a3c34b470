"""`evaluate`: the table's columns, roles and controls, and intervals that know which images belong together."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from torch import Tensor

from farout.core.errors import (
    ConstantScoresWarning,
    FaroutError,
    MisleadingResultWarning,
    StoreError,
    TooFewImagesWarning,
)
from farout.core.runtime import Runtime
from farout.data.batching import Batch
from farout.data.preprocessing import Preprocessing
from farout.detectors.base import Detector, Measurements
from farout.detectors.mahalanobis import Mahalanobis
from farout.detectors.reconstruction import Reconstruction
from farout.evaluation import metrics
from farout.evaluation.baselines import with_random_weights
from farout.evaluation.evaluate import COLUMNS, evaluate, evaluate_scores
from farout.evaluation.metrics import auroc
from farout.evaluation.trivial_baselines import INDICATORS, TrivialBaselines
from farout.scoring.folder import read_scores
from small import model, pictures

pytestmark = pytest.mark.usefixtures("cheap_perceptual", "few_draws")

NOTHING = {"standard_baselines": False, "trivial_baselines": False}

DESIGN = (
    "detector, preset, indicator, protocol, id, ood, ood_group, role, seed, auroc, auroc_low, auroc_high, aupr_in, "
    "aupr_out, fpr95, fpr95_low, fpr95_high, alpha, false_alarm, detection, nfe, gmacs, images_per_s, peak_mib, "
    "fit_s, n_id, n_ood"
)


class Brightness(Detector):
    """Scores that a flip does not change, with a second indicator that says nothing."""

    def __init__(self, *, score: str = "mean") -> None:
        self.centre = 0.0

    def measure(self, batch: Batch, maps: bool = False) -> Measurements:
        total = (batch.images * 255).round().sum((1, 2, 3))  # of whole numbers: exact in any order
        values = total[:, None, None, None] / (255 * batch.images[0].numel())
        return Measurements(batch.keys, values, (0.0,), ("mean",))

    def fit_statistics(self, measurements: Measurements) -> None:
        self.centre = float(measurements.values.mean())

    def compute_scores(self, measurements: Measurements) -> dict[str, Tensor]:
        values = measurements.values[:, 0, 0, 0].double()
        return {"mean": values, "constant": torch.zeros_like(values)}


@pytest.fixture(scope="module")
def few_draws() -> Iterator[None]:
    """Bootstraps of 100 draws: these tests are about what is resampled, not about how closely."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(metrics.detection_metrics.__kwdefaults__, "draws", 100)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    pictures(root / "good", 60)
    pictures(root / "test", 20, seed=5)
    pictures(root / "far", 16, low=0, spread=255, seed=7)
    (root / "far" / "broken.png").write_text("not a picture")
    return root


@pytest.fixture(scope="module")
def detector(place: Path) -> Detector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Reconstruction(levels=(50, 200), draws=1)
        return made.fit(place / "good", model(), alpha=0.1, statistics=30, runtime=Runtime(batch_size=8))


@pytest.fixture(scope="module")
def table(place: Path, detector: Detector) -> pd.DataFrame:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ood = [place / "far", f"{place / 'test'}@vflip"]
        evaluate(detector, place / "test", ood, place / "out", random_weights_baseline=True)
    return pd.read_csv(place / "out" / "metrics.csv", keep_default_na=False, na_values=[""])


def brightness(place: Path) -> Detector:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Brightness().fit(place / "good", alpha=0.1, statistics=30)


def test_sources_given_as_objects_have_rows_of_their_own(place: Path, tmp_path: Path) -> None:
    images = torch.rand(3, 12, 3, 16, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = evaluate(brightness(place), images[0], [images[1], list(images[2])], tmp_path / "out", **NOTHING)
        assert dict.fromkeys(found.metrics["ood"]) == {"images 2": None, "images 3": None}
        with pytest.raises(FaroutError, match="must be a list of at least one source, got a Tensor"):
            evaluate(brightness(place), images[0], images[1], tmp_path / "out")


# -- the table ----------------------------------------------------------------------------------------------------


def test_the_columns_are_those_of_the_plan(table: pd.DataFrame) -> None:
    assert ", ".join(COLUMNS) == DESIGN
    assert list(table.columns) == COLUMNS


def test_one_row_per_detector_indicator_and_source(table: pd.DataFrame, detector: Detector) -> None:
    assert not table.duplicated(["detector", "indicator", "ood", "seed"]).any()
    own = table[table["detector"] == "reconstruction"]
    names = {"score", *detector.calibration_scores}
    for _, part in own.groupby("ood"):
        assert set(part["indicator"]) == names
    assert own["ood"].nunique() == 2


def test_score_is_the_detectors_own_indicator(table: pd.DataFrame, detector: Detector) -> None:
    for _, part in table[table["detector"] == "reconstruction"].groupby("ood"):
        rows = part.set_index("indicator").drop(columns=["detector", "preset"])
        assert rows.loc["score"].equals(rows.loc[detector.score_name])


def test_numbers_are_those_of_the_score_files(table: pd.DataFrame, place: Path, detector: Detector) -> None:
    folders = {path.name.rpartition("-")[0]: path for path in (place / "out" / "scores").iterdir()}
    inside = read_scores(next(p for n, p in folders.items() if n.endswith("_test")))
    far = read_scores(next(p for n, p in folders.items() if n.endswith("_far")))
    row = table[(table["detector"] == "reconstruction") & (table["indicator"] == "score")].iloc[0]
    readable = far.score[~np.isnan(far.score)]
    assert row["auroc"] == pytest.approx(auroc(inside.score, readable), abs=1e-12)
    assert (row["n_id"], row["n_ood"]) == (20, 16), "the unreadable image is in no metric"
    assert row["false_alarm"] == pytest.approx(np.mean(inside.is_ood))
    assert row["detection"] == pytest.approx(np.mean(far.is_ood[~np.isnan(far.score)]))
    assert row["alpha"] == detector.alpha
    assert 0 <= row["auroc_low"] <= row["auroc"] <= row["auroc_high"] <= 1
    assert 0 <= row["fpr95_low"] <= row["fpr95_high"] <= 1


def test_costs_are_counted(table: pd.DataFrame) -> None:
    cost = table.groupby("detector")[["nfe", "gmacs", "peak_mib"]].first()
    assert cost.loc["reconstruction", "nfe"] == 2, "two levels, one evaluation each"
    assert cost.loc["reconstruction", "gmacs"] > 0
    assert cost.loc["trivial_baselines", "nfe"] == 0
    assert (cost["peak_mib"] > 10).all()


def test_roles_come_from_the_catalogue(place: Path) -> None:
    """Choices are made on dev sources only; a wrong mark invites tuning on the test."""
    detector = brightness(place)
    inside = f"{place / 'good'}"
    ood = [f"{inside}@rot90", f"{inside}@hflip", place / "far", "sample_digits:test"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = evaluate(detector, inside, ood, place / "roles", limit=12, **NOTHING).metrics
    own = frame[frame["indicator"] == "score"]
    assert own["role"].tolist() == ["dev", "test", "test", "test"]


# -- controls -----------------------------------------------------------------------------------------------------


def test_controls_stand_beside_the_detector(table: pd.DataFrame) -> None:
    kinds = set(table["detector"])
    assert kinds == {"reconstruction", "trivial_baselines", "reconstruction_random_weights"}
    control = table[table["detector"] == "trivial_baselines"]
    assert set(control["indicator"]) == {"score", "all", *INDICATORS}
    both = [table[(table["detector"] == k) & (table["indicator"] == "score")] for k in sorted(kinds)]
    assert all(part["n_id"].tolist() == both[0]["n_id"].tolist() for part in both), "the same images"
    assert both[0]["auroc"].tolist() != both[1]["auroc"].tolist(), "other weights, other scores"


def test_a_frozen_backbone_has_random_weights_in_its_control(place: Path) -> None:
    """What a backbone's architecture alone tells of images belongs beside what its training adds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = Mahalanobis(size=32).fit(place / "good", alpha=0.1, limit=40)
        twin, diffusion, classifier = with_random_weights(fitted)
        assert (diffusion, classifier) == (None, None)
        twin.fit(place / "good", alpha=0.1, limit=40)
    assert twin.config == {**fitted.config, "weights": "random"}
    assert twin.backbone.content_hash != fitted.backbone.content_hash
    with pytest.raises(FaroutError, match="no network"):
        with_random_weights(brightness(place))


def test_controls_are_fitted_on_the_recorded_source(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who loads a detector years later gets controls without naming its images."""
    seen = []
    original = TrivialBaselines.fit

    def watching(self: TrivialBaselines, images: Any, *rest: Any, **settings: Any) -> Any:
        seen.append((images.name, settings["limit"]))
        return original(self, images, *rest, **settings)

    monkeypatch.setattr(TrivialBaselines, "fit", watching)
    detector = brightness(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(detector, place / "test", [place / "far"], place / "c1", baseline_limit=55)
        evaluate(detector, place / "test", [place / "far"], place / "c2", baseline_images=place / "test")
    assert seen == [(str(place / "good"), 55), (str(place / "test"), 1000)]


@pytest.mark.filterwarnings(
    "ignore:Brightness, :farout.core.errors.FaroutWarning", "ignore::farout.core.errors.TooFewImagesWarning"
)
def test_missing_control_images_warn_and_cost_no_result(place: Path) -> None:
    detector = brightness(place)
    detector.provenance["source"] = "/nowhere/at/all"
    with pytest.warns(MisleadingResultWarning, match="--baseline-images"):
        frame = evaluate(detector, place / "test", [place / "far"], place / "missing").metrics
    assert set(frame["detector"]) == {"Brightness"}
    few = pictures(place / "few", 3)
    with pytest.warns(MisleadingResultWarning, match="calibration at alpha 0.1 needs"):
        frame = evaluate(detector, place / "test", [place / "far"], place / "few-out", baseline_images=few).metrics
    assert len(frame) == 3


def test_messages_of_the_baselines_name_them(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The detector's warnings are not repeated as if they were about it, and each split is logged once."""
    detector = brightness(place)
    caplog.set_level("INFO")
    caplog.clear()  # the fit of the detector may have been logged
    with pytest.warns(TooFewImagesWarning, match=r"^baselines \(trivial_baselines\): "):
        evaluate(detector, place / "test", [place / "far"], place / "named", baseline_images=place / "good", limit=10)
    assert not [text for text in caplog.messages if "split into" in text and not text.startswith("baselines (")]
    detector.calibration_hashes = frozenset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(detector, place / "test", [place / "far"], place / "recalibrated", limit=10)
    assert any(
        text.startswith("baselines (trivial_baselines) are calibrated on 12 images of") for text in caplog.messages
    )


# -- images that belong together ----------------------------------------------------------------------------------


def test_variants_of_the_same_images_are_resampled_together(place: Path) -> None:
    """A score that flips do not change tells the flipped images apart in no resample: .5 with an interval of no width.
    Taken for independent images, the interval would be wide.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flipped = f"{place / 'test'}@vflip"
        frame = evaluate(brightness(place), place / "test", [flipped], place / "flips", **NOTHING).metrics
    row = frame[frame["indicator"] == "score"].iloc[0]
    assert row["auroc"] == row["auroc_low"] == row["auroc_high"] == 0.5


def test_unreadable_images_on_both_sides_are_no_shared_images(place: Path, tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "a", 15, seed=11), pictures(tmp_path / "b", 15, seed=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = evaluate(brightness(place), a, [b], tmp_path / "o1", **NOTHING).metrics
        for folder in (a, b):
            (folder / "zz.png").write_text("no")
        after = evaluate(brightness(place), a, [b], tmp_path / "o2", **NOTHING).metrics
    columns = ["auroc", "auroc_low", "auroc_high", "n_id", "n_ood"]
    pd.testing.assert_frame_equal(before[columns], after[columns])


@pytest.mark.filterwarnings("ignore:Brightness, constant:farout.core.errors.ConstantScoresWarning")
def test_sources_without_a_name_are_not_confused(place: Path, tmp_path: Path) -> None:
    """Two tensors of as many images have the same keys; the second must not be given the scores of the first."""
    generator = torch.Generator().manual_seed(0)
    dark, light = (torch.rand(20, 1, 8, 8, generator=generator) / 2 + low for low in (0, 0.5))
    frame = evaluate(brightness(place), dark, [light], tmp_path / "o", **NOTHING).metrics
    assert frame[frame["indicator"] == "score"]["auroc"].item() == 1.0


def test_an_evaluation_goes_on_without_measuring_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = brightness(place)
    given = (detector, place / "test", [place / "far"], tmp_path / "o")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = evaluate(*given, **NOTHING).metrics
        probes = []
        monkeypatch.setattr(Brightness, "measure", _only_probe(Brightness.measure, probes))
        second = evaluate(*given, **NOTHING).metrics
    columns = first.columns.drop(["images_per_s", "peak_mib"])
    pd.testing.assert_frame_equal(first[columns], second[columns])


def _only_probe(original: Any, probes: list) -> Any:
    def measure(self: Brightness, batch: Batch, maps: bool = False) -> Measurements:
        assert batch.keys == ("gray",), "only the cost is counted again"
        probes.append(batch)
        return original(self, batch, maps)

    return measure


def test_tables_of_an_earlier_run_do_not_stay(place: Path, tmp_path: Path) -> None:
    made, optional = brightness(place), {"differences.csv", "subsets.csv"}

    def there() -> set[str]:
        return {path.name for path in (tmp_path / "o").iterdir()} & optional

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate(made, place / "test", [place / "far"], tmp_path / "o", ood_subsets=2)
        assert there() == optional
        evaluate(made, place / "test", [place / "far"], tmp_path / "o", trivial_baselines=False)
    assert not there()


def test_no_sources_is_an_error(place: Path, tmp_path: Path) -> None:
    for wrong in ([], "sample_digits:test"):
        with pytest.raises(FaroutError, match="list of at least one"):
            evaluate(brightness(place), place / "test", wrong, tmp_path / "o")


def test_baselines_require_images(place: Path, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="baseline_limit is 0; expected 1 or more"):
        evaluate(brightness(place), place / "test", [place / "far"], tmp_path / "o", baseline_limit=0)


# -- anyone's scores ----------------------------------------------------------------------------------------------


def write(path: Path, scores: Any, **columns: Any) -> Path:
    keys = [f"{i}" for i in range(len(scores))]
    pd.DataFrame({"key": keys, "score": scores, **columns}).to_csv(path, index=False)
    return path


def test_plain_tables_are_rated(tmp_path: Path) -> None:
    inside = write(tmp_path / "in.csv", [0.0, 1.0, 2.0, 3.0], other=[1, 2, 3, 4])
    out = write(tmp_path / "out.csv", [2.5, 4.0, 5.0], other=[0, 0, 0])
    far = write(tmp_path / "far.csv", [9.0, 9.0])
    frame = evaluate_scores([inside, out, far], tmp_path / "r").metrics
    assert list(frame.columns) == COLUMNS
    assert frame["indicator"].tolist() == ["score", "other", "score"]
    assert frame["auroc"].tolist() == pytest.approx([11 / 12, 0.0, 1.0])
    assert (tmp_path / "r" / "metrics.csv").is_file()
    frame.to_parquet(tmp_path / "x.parquet")
    pd.read_csv(out).to_parquet(tmp_path / "out.parquet")
    again = evaluate_scores([inside, tmp_path / "out.parquet"]).metrics
    assert again["auroc"].tolist() == frame["auroc"].tolist()[:2]


def test_keys_that_read_like_missing_values_stay(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("key,score\nNA,1\nnull,2\n007,3\n")
    assert read_scores(tmp_path / "a.csv").keys == ("NA", "null", "007")


def test_constant_scores_warn_and_are_worth_one_half(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.csv", [1.0] * 9), write(tmp_path / "b.csv", [1.0] * 7)
    with pytest.warns(ConstantScoresWarning):
        frame = evaluate_scores([a, b]).metrics
    assert frame["auroc"].item() == 0.5


@pytest.mark.filterwarnings("ignore:Brightness, mean:farout.core.errors.FaroutWarning")
@pytest.mark.filterwarnings("ignore:.* are not numbers:farout.core.errors.NaNScoresWarning")
def test_a_constant_indicator_is_worth_one_half_and_is_named(place: Path) -> None:
    with pytest.warns(ConstantScoresWarning, match="constant, .*far: all scores are equal"):
        frame = evaluate(brightness(place), place / "test", [place / "far"], place / "constant", **NOTHING).metrics
    assert frame[frame["indicator"] == "constant"]["auroc"].item() == 0.5


@pytest.mark.parametrize("content", ["", "key,score\na,high\n", "name,value\na,1\n", "\x00\x01"])
def test_what_is_no_score_table_is_named(content: str, tmp_path: Path) -> None:
    good = write(tmp_path / "good.csv", [1.0, 2.0])
    (tmp_path / "bad.csv").write_text(content)
    with pytest.raises(StoreError, match=r"bad\.csv"):
        evaluate_scores([good, tmp_path / "bad.csv"])


# -- the trivial controls -----------------------------------------------------------------------------------------


def smooth(count: int, seed: int) -> list[Image.Image]:
    """Images of 32 x 32 pixels with structure at several scales."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        noise = Image.fromarray(generator.integers(0, 256, (32, 32), dtype=np.uint8))
        blurred = np.asarray(noise.filter(ImageFilter.GaussianBlur(1.5)), dtype=float)
        made.append(Image.fromarray(np.clip(128 + 2 * (blurred - 128), 0, 200).astype(np.uint8)))
    return made


def jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=20)
    return Image.open(buffer).convert("L")


CHANGES = {
    "block_edge_energy": jpeg,
    "laplacian_energy": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "color_mean": lambda image: image.point(lambda v: min(255, v + 50)),
    "color_variance": lambda image: image.point(lambda v: 128 + (v - 128) // 3),
    "png_size": lambda image: image.point(lambda v: v // 32 * 32),
}


@pytest.fixture(scope="module")
def controls() -> TrivialBaselines:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TrivialBaselines().fit(smooth(150, 0), alpha=0.1, statistics=100)


@pytest.mark.parametrize("name", INDICATORS)
def test_each_control_tells_what_its_name_says(name: str, controls: TrivialBaselines) -> None:
    """If a control missed its shortcut, a detector that lives by the shortcut would look like a method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inside, outside = controls.score(smooth(60, 1)), controls.score([CHANGES[name](i) for i in smooth(60, 2)])
    areas = {n: auroc(inside.indicators[n], outside.indicators[n]) for n in (*INDICATORS, "all")}
    assert areas[name] > 0.9, areas
    assert areas["all"] > 0.9, areas


def test_brightness_alone_moves_no_other_control(controls: TrivialBaselines) -> None:
    base = [image.point(lambda v: min(v, 200)) for image in smooth(60, 2)]
    inside = controls.score(base)
    brighter = controls.score([image.point(lambda v: v + 40) for image in base])
    for name in ("color_variance", "laplacian_energy", "block_edge_energy"):
        assert np.allclose(inside.indicators[name], brighter.indicators[name], atol=1e-3), name


def test_png_size_and_block_edges_are_what_they_say() -> None:
    batch = torch.zeros(2, 1, 16, 16)
    batch[1, :, :, 8:] = 1.0
    control = TrivialBaselines()
    control.preprocessing = Preprocessing(size=(16, 16), channels=1, native=(16, 16))
    values = control.measure(Batch(("a", "b"), batch, None, (0, 1))).values[:, 0, 0]
    assert values[0, INDICATORS.index("block_edge_energy")] == 0
    assert values[1, INDICATORS.index("block_edge_energy")] > 1e6, "all of the step lies on the grid's line"
    assert values[0, INDICATORS.index("color_variance")] == 0
    assert values[1, INDICATORS.index("color_mean")] == 0.5
    assert 0 < values[0, INDICATORS.index("png_size")] < 1


def test_an_evaluation_is_summarized_and_plotted(tmp_path: Path) -> None:
    inside = write(tmp_path / "in.csv", [0.0, 1.0, 2.0, 3.0])
    out = write(tmp_path / "<b>out.csv", [2.5, 4.0, 5.0])
    found = evaluate_scores([inside, out])
    assert repr(found).splitlines()[1].startswith(f"given on {out}: AUROC 0.917 (")
    html = found._repr_html_()
    assert "&lt;b&gt;out.csv" in html
    assert "0.917" in html
    axes = Figure().add_subplot()
    assert found.plot(axes) is axes
    assert axes.lines[0].get_xdata() == pytest.approx(11 / 12)
    assert axes.get_legend_handles_labels()[1] == ["given"]
