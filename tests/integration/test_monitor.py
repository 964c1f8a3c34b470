"""`farout monitor`: results in time order, alarms for scripts, and inputs that do not go together."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import farout
from farout.cli import main
from farout.cli.steps import read_steps
from farout.core.csv_files import read_csv
from farout.core.errors import FaroutError, StoreError, TooFewImagesWarning
from farout.core.store import read_sealed_json
from farout.detectors.calibration import compute_p_values
from small import CPU, pictures

N = 99
CALIBRATION = np.random.default_rng(0).normal(size=N)


def write_table(path: Path, rows: int, shift: float = 0.0, seed: int = 1, **columns: Any) -> Path:
    scores = np.random.default_rng(seed).normal(size=rows) + shift
    keys = [f"frame_{row}.png" for row in range(rows)]
    table = pd.DataFrame({"key": keys, "score": scores, "p_value": compute_p_values(scores, CALIBRATION)} | columns)
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two detectors, and images scored by both; one image cannot be read."""
    root = tmp_path_factory.mktemp("monitor")
    images, new = pictures(root / "images", 60), pictures(root / "new", 12, seed=3)
    (root / "new" / "broken.png").write_text("no picture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, variance in (("a", 0.5), ("b", 0.9)):
            detector = farout.PCA(size=32, variance=variance).fit(images, statistics=30, alpha=0.1, runtime=CPU)
            detector.save(root / name)
            farout.score_folder(detector, new, root / f"scored-{name}")
    return root


# -- results --------------------------------------------------------------------------------------------------------


def test_a_scored_folder_needs_nothing_else(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(place / "scored-a"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "12 images" in printed
    assert "1 unreadable" in printed
    assert "order: rows as they are in the results" in printed
    summary = read_sealed_json(tmp_path / "out" / "monitor.json")
    detector = farout.load(place / "a")
    assert summary["detector"] == detector.fingerprint
    assert summary["settings"]["calibration_images"] == len(detector.calibration)
    assert summary["settings"]["alpha"] == 0.1
    assert summary["counts"] == {"ok": 12, "unreadable": 1}
    table = read_csv(tmp_path / "out" / "monitor.csv")
    scores = read_csv(place / "scored-a" / "scores.csv")
    assert table["key"].tolist() == scores["key"].tolist()
    assert table["p_value"].tolist() == pytest.approx(scores["p_value"].tolist(), nan_ok=True)
    broken = table[table["key"] == "broken.png"].iloc[0]
    assert broken["status"] == "unreadable"
    assert broken[["p_value", "flagged", "log10_martingale"]].isna().all()
    page = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert not re.search(r'(src|href)="https?:', page)


def test_an_alarm_has_a_time_and_an_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second table is the earlier one; the change is in the first one."""
    start = pd.Timestamp("2026-05-01T00:00:00Z")
    minutes = pd.date_range(start, periods=500, freq="min")
    later = write_table(tmp_path / "later.csv", 200, 2.0, 2, time=[each.isoformat() for each in minutes[300:]])
    earlier = write_table(tmp_path / "earlier.parquet", 300, time=minutes[:300])
    words = ["monitor", str(later), str(earlier), "--out", str(tmp_path / "out"), "--calibration-images", str(N)]
    assert main(words) == 0
    assert main([*words, "--fail-on-alarm"]) == 3
    assert "ALARM at image 3" in capsys.readouterr().out
    summary = read_sealed_json(tmp_path / "out" / "monitor.json")
    assert summary["order"] == "column time"
    [alarm] = summary["alarms"]
    assert 300 < alarm["row"] < 350
    assert pd.Timestamp(alarm["time"]) == minutes[alarm["row"] - 1]
    table = read_csv(tmp_path / "out" / "monitor.csv", texts=("key", "time", "result"))
    assert table["result"].tolist() == [str(earlier)] * 300 + [str(later)] * 200
    assert table["alarm"].sum() == 1
    assert table["log10_martingale"][299] < 1.5
    assert alarm["key"] in (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert main(["monitor", str(earlier), *words[3:], "--fail-on-alarm"]) == 0, "no alarm, and the folder is replaced"
    assert read_sealed_json(tmp_path / "out" / "monitor.json")["rows"] == 300


def test_time_orders(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", 12)
    shuffled = read_csv(table).sample(frac=1, random_state=0)
    shuffled.to_csv(table, index=False)
    settings: dict[str, Any] = {"calibration_images": N}
    for number, key in enumerate(shuffled["key"]):
        (tmp_path / key).write_bytes(b"")
        os.utime(tmp_path / key, (number, 1_000_000_000 - number))

    def keys(by: Any) -> list[str]:
        farout.monitor_results([table], tmp_path / "out", by=by, **settings)
        return list(read_csv(tmp_path / "out" / "monitor.csv")["key"])

    assert keys("row") == keys(None) == shuffled["key"].tolist()
    assert keys("key") == [f"frame_{row}.png" for row in range(12)]
    assert keys("mtime") == shuffled["key"].tolist()[::-1]
    with pytest.raises(FaroutError, match="has no column time"):
        keys("time")
    (tmp_path / "frame_3.png").unlink()
    with pytest.raises(FaroutError, match=r"frame_3.png cannot be found; give another order"):
        keys("mtime")


def test_scores_without_p_values_with_their_detector(place: Path, tmp_path: Path) -> None:
    table = read_csv(place / "scored-a" / "scores.csv")
    table[["key", "score"]].to_csv(tmp_path / "scores.csv", index=False)
    with pytest.raises(StoreError, match="has no column p_value; give the detector of the scores with --detector"):
        farout.monitor_results([tmp_path / "scores.csv"], tmp_path / "out")
    done = farout.monitor_results([tmp_path / "scores.csv"], tmp_path / "out", detector=place / "a")
    expected = farout.monitor_results([place / "scored-a"], tmp_path / "expected", detector=place / "a")
    assert done.monitor.log10_martingale == expected.monitor.log10_martingale
    assert done.monitor.alpha == 0.1
    table.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(StoreError, match="give the detector that computed the scores"):
        farout.monitor_results([tmp_path / "other.csv"], tmp_path / "out", detector=place / "b")


def test_a_watched_folder_while_a_row_is_written(place: Path, tmp_path: Path) -> None:
    with farout.FolderWatcher(farout.Scorer(place / "a"), place / "new", tmp_path / "rows", settle=0) as watcher:
        for _ in range(3):  # a file is scored when it is seen again unchanged
            list(watcher.poll())
    with (tmp_path / "rows" / "scores.csv").open("a") as file:
        file.write("2026-05-01T00:00:00Z,late.png,0.")
    done = farout.monitor_results([tmp_path / "rows"], tmp_path / "out")
    assert done.monitor.status == {"ok": 12, "unreadable": 1}
    assert done.summary["order"] == "column time"
    assert done.monitor.calibration_images == len(farout.load(place / "a").calibration)
    with pytest.raises(StoreError, match="another detector"):
        farout.monitor_results([tmp_path / "rows", place / "scored-b"], tmp_path / "out", by="row")
    farout.monitor_results([tmp_path / "rows", place / "scored-a"], tmp_path / "out", by="mtime")


def test_selection_and_repeated_alarms(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", 400, 3.0)
    words = ["monitor", str(table), "--out", str(tmp_path / "out"), "--calibration-images", str(N), "--fdr", "0.5"]
    assert main([*words, "--fdr-method", "lord++", "--statistic", "shiryaev-roberts", "--threshold", "50"]) == 0
    summary = json.loads((tmp_path / "out" / "monitor.json").read_text())
    assert len(summary["alarms"]) > 1
    assert summary["selected"] == read_csv(tmp_path / "out" / "monitor.csv")["selected"].sum() > 0
    with pytest.warns(TooFewImagesWarning, match="at least 186 are necessary"):
        farout.monitor_results([table], tmp_path / "out", calibration_images=N, fdr=0.1)


def test_a_chain_monitors_its_own_scores(place: Path, tmp_path: Path) -> None:
    chain = tmp_path / "chain.yaml"
    chain.write_text(
        f"steps:\n- score: {{detector: {place / 'a'}, source: {place / 'new'}, out: scores}}\n"
        "- monitor: {results: scores, out: monitoring}\n"
        f"- monitor: {{results: [scores, {place / 'scored-a'}], out: both}}\n"
    )
    steps = read_steps(str(chain))
    assert [step.inputs for step in steps] == [(), ("scores",), ("scores",)]
    assert steps[2].command_line(tmp_path)[1:3] == [str(tmp_path / "scores"), str(place / "scored-a")]
    assert steps[1].parse(tmp_path).arguments["results"] == [str(tmp_path / "scores")]


# -- inputs that do not go together ---------------------------------------------------------------------------------


def test_results_of_two_detectors_are_refused(place: Path, tmp_path: Path) -> None:
    both = [place / "scored-a", place / "scored-b"]
    with pytest.raises(StoreError, match=r"scored-b has scores of another detector than .*scored-a"):
        farout.monitor_results(both, tmp_path / "out")
    with pytest.raises(StoreError, match="another detector than the given detector"):
        farout.monitor_results(both[:1], tmp_path / "out", detector=place / "b")
    with pytest.raises(FaroutError, match="calibration_images is 5, but the detector of the results has"):
        farout.monitor_results(both[:1], tmp_path / "out", calibration_images=5)
    for same in (both[0], both[0] / "scores.csv"):
        with pytest.raises(FaroutError, match="is given twice"):
            farout.monitor_results([both[0], same], tmp_path / "out")
    with pytest.raises(FaroutError, match=r"s3://bucket/scores is on an object store.*copy the folder"):
        farout.monitor_results(["s3://bucket/scores"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("key,score,p_value\n", "no image has a p-value (no rows)"),
        ("key,score,p_value,status\na,,,unreadable\nb,,,unreadable\n", "no image has a p-value (2 unreadable)"),
        ("key,p_value\na,0.5\n", "requires columns key and score"),
        ("key,score,p_value\na,1,0.123456\n", "a has the p-value 0.123456, which is no multiple of 1 / 100"),
        ("key,score,p_value,time\na,1,0.5,noon\n", "a has the time 'noon'; every row requires a number or"),
        ("key,score,p_value,time\na,1,0.5,\nb,1,0.5,3\n", "a has the time 'nan'"),
    ],
)
def test_tables_that_cannot_be_monitored(
    tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text(content)
    command = ["monitor", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--calibration-images", "99"]
    assert main(command) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_without_the_size_of_the_calibration(tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="give --calibration-images, or the folder of the detector"):
        farout.monitor_results([write_table(tmp_path / "t.csv", 5)], tmp_path / "out")
    with pytest.warns(TooFewImagesWarning, match="nothing can be flagged"):
        farout.monitor_results([write_table(tmp_path / "t.csv", 5)], tmp_path / "o", calibration_images=N, alpha=0.001)


def test_times_of_two_kinds_are_refused(tmp_path: Path) -> None:
    dates = write_table(tmp_path / "dates.csv", 2, time=["2026-05-01", "2026-05-02"])
    numbers, none = write_table(tmp_path / "numbers.csv", 2, time=[1, 2]), write_table(tmp_path / "none.csv", 2)
    with pytest.raises(FaroutError, match="numbers in one result and dates in another"):
        farout.monitor_results([dates, numbers], tmp_path / "out", calibration_images=N)
    with pytest.raises(FaroutError, match=r"dates.csv has a column time and .*none.csv has none; choose .* --by"):
        farout.monitor_results([dates, none], tmp_path / "out", calibration_images=N)


def test_folders_with_other_files_are_not_replaced(place: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="contains other files"):
        farout.monitor_results([place / "scored-a"], place / "scored-a")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file"):
        farout.monitor_results([place / "scored-a"], tmp_path / "file")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".monitor.csv.x1y2").write_text("of a run that was killed")
    farout.monitor_results([place / "scored-a"], tmp_path / "out")
    assert {"monitor.csv", "monitor.json", "page.html"} < {path.name for path in (tmp_path / "out").iterdir()}


def test_names_of_images_are_text_on_the_page_and_in_the_table(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.csv", 3, 9.0)
    table.write_text(table.read_text().replace("frame_1.png", '"=<script>alert(1)</script>"'))
    done = farout.monitor_results([table], tmp_path / "out", calibration_images=N, threshold=1.5)
    assert done.monitor.alarms
    assert "<script>alert" not in (tmp_path / "out" / "page.html").read_text()
    assert "\n=" not in (tmp_path / "out" / "monitor.csv").read_text()
