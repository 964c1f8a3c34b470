"""Benchmarks: specifications are checked before any work, and shared entries are run once per seed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from farout.benchmark.benchmark_plan import plan_benchmark
from farout.benchmark.image_sets import ImageSets, explain_missing, missing_sets
from farout.benchmark.job_graph import RECORD_FILE
from farout.benchmark.presets import describe_preset, preset_names
from farout.benchmark.runner import preview_benchmark
from farout.benchmark.yaml_reader import parse_benchmark, read_benchmark, to_yaml
from farout.core.errors import FaroutError, SourceError, StoreError
from farout.core.store import write_json
from small import pictures

SMALL: dict[str, Any] = {
    "name": "small",
    "train": "sample_fashion:train@classes=0-7",
    "id": "sample_fashion:test@classes=0-7",
    "ood": {"near": ["sample_fashion:test@classes=8,9"], "far": ["sample_digits:test", "svhn:test"]},
    "networks": {
        "generator": {"kind": "diffusion", "preset": "classes", "training": {"steps": 3, "learning_rate": "1e-3"}},
        "classifier": {"kind": "classifier", "training": {"steps": 3}},
        "exposed": {"kind": "classifier", "preset": "ncis_tiny", "outliers": "noise", "reconstructions": "again"},
    },
    "outliers": {"noise": {"method": "class_noise", "diffusion": "generator", "count": 4}},
    "reconstructions": {"again": {"diffusion": "generator", "limit": 5}},
    "detectors": [
        {"method": "reconstruction", "diffusion": "generator", "arguments": {"levels": [50]}},
        {"method": "denoising", "diffusion": "generator", "classifier": "classifier"},
        {"method": "posthoc", "classifier": "classifier"},
        {"name": "exposed", "method": "posthoc", "classifier": "exposed"},
        "semantic",
        "knn",
    ],
}


def small(**changes: Any) -> dict[str, Any]:
    """The small benchmark with values at paths such as `networks.generator.kind` replaced."""
    content = copy.deepcopy(SMALL)
    for path, value in changes.items():
        *parents, last = [int(part) if part.isdigit() else part for part in path.split("__")]
        parent: Any = content
        for part in parents:
            parent = parent[part]
        parent[last] = value
    return content


# -- the specification --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"limits": 3}, ["limits", "did you mean limit?"]),
        ({"limit": "many"}, ["limit", "int", "many"]),
        ({"limit": 0}, ["limit must be at least 1"]),
        ({"seeds": [1, 1]}, ["seeds", "different"]),
        ({"seeds": [-1]}, ["seeds", "from 0"]),
        ({"alpha": 2}, ["alpha", "between 0 and 1"]),
        ({"detectors__0__statistics": 1}, ["detectors.reconstruction", "statistics", "at least 2"]),
        ({"protocol": "nativ"}, ["protocol", "nativ"]),
        ({"ood": {"near": ["a:test", "a:test"]}}, ["a:test", "once"]),
        ({"ood": ["a:test"]}, ["ood", "by group"]),
        ({"detectors": []}, ["lacks detectors"]),
        ({"networks__generator__kind": "difusion"}, ["networks.generator", "kind", "diffusion, classifier"]),
        ({"networks__generator__preset": "clases"}, ["networks.generator", "clases", "did you mean classes"]),
        ({"networks__generator__training": {"step": 3}}, ["networks.generator.training", "did you mean steps?"]),
        ({"networks__generator__training": {"steps": 0}}, ["networks.generator.training", "steps is 0"]),
        ({"networks__generator__training": {"steps": "many"}}, ["training", "steps", "int", "many"]),
        ({"networks__generator__model": {"protocol": "direct"}}, ["networks.generator", "direct", "native"]),
        ({"networks__generator__exposure": {"loss": "oe"}}, ["networks.generator", "exposure is for classifiers"]),
        ({"networks__generator__outliers": "noise"}, ["networks.generator", "for classifiers"]),
        ({"networks__generator__folder": "/nowhere"}, ["networks.generator", "/nowhere"]),
        ({"networks__classifier__outliers": "nois"}, ["networks.classifier", "'nois'", "did you mean noise?"]),
        ({"networks__exposed__outliers": None}, ["networks.exposed", "energy"]),
        ({"networks__a|b": {"kind": "diffusion"}}, ["'a|b'", "letters"]),
        ({"outliers__noise__method": "ncsi"}, ["outliers.noise", "did you mean ncis"]),
        ({"outliers__noise__diffusion": "classifier"}, ["outliers.noise", "classifier", "a diffusion model"]),
        ({"outliers__noise__diffusion": None}, ["outliers.noise", "requires a diffusion model"]),
        ({"outliers__noise__count": 0}, ["outliers.noise", "count"]),
        ({"networks__generator__preset": "tiny"}, ["classes"]),
        ({"reconstructions__again__levl": 0.5}, ["reconstructions.again", "did you mean level"]),
        ({"detectors__0": {"limit": 3}}, ["detectors[0] lacks a method", "reconstruction"]),
        ({"detectors__0": "recon"}, ["detectors.recon", "recon", "reconstruction"]),
        ({"detectors__0__arguments": {"levls": [3]}}, ["detectors.reconstruction.arguments", "did you mean levels"]),
        ({"detectors__0__arguments": {"mode": "fst"}}, ["detectors.reconstruction.arguments", "mode", "fst"]),
        ({"detectors__0__preset": "papr"}, ["detectors.reconstruction", "papr", "did you mean paper"]),
        ({"detectors__0__diffusion": None}, ["detectors.reconstruction", "requires a diffusion model"]),
        ({"detectors__1__classifier": "generator"}, ["detectors.denoising", "generator", "expected a classifier"]),
        ({"detectors__5": {"method": "knn", "diffusion": "generator"}}, ["detectors.knn", "takes no diffusion model"]),
        ({"detectors__4": "knn"}, ["two detectors are called knn"]),
        ({"detectors__4": {"name": "knn, random weights", "method": "knn"}}, ["random weights"]),
    ],
)
def test_mistakes_are_named_before_any_work(changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(FaroutError) as caught:
        parse_benchmark(small(**changes))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_every_setting_is_filled_in_and_read_back() -> None:
    """`bench.yaml` says all that decides a result, so that a later version's defaults change nothing."""
    spec = parse_benchmark(small())
    generator = spec.networks["generator"]
    assert generator.training.learning_rate == 1e-3, "YAML reads 1e-3 as a text"
    assert generator.training.ema == 0.998, "of the preset"
    assert generator.model.schedule == "linear", "of the preset"
    assert spec.detectors["reconstruction"].arguments["levels"] == (50,)
    assert spec.detectors["semantic"].method == "semantic"
    assert parse_benchmark(yaml.safe_load(to_yaml(spec))) == spec
    nested = parse_benchmark(small(outliers__noise={"method": "sona", "diffusion": "generator"}))
    assert nested.outliers["noise"].build_synthesizer().config["guidance"].scale == 10.0
    assert parse_benchmark(yaml.safe_load(to_yaml(nested))) == nested


def test_files_and_flags(tmp_path: Path) -> None:
    content = {name: value for name, value in small().items() if name != "name"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    spec = read_benchmark(path, limit=7, seeds=(3, 4), runtime={"batch_size": 8})
    assert (spec.name, spec.limit, spec.seeds, spec.runtime.batch_size) == ("mine", 7, (3, 4), 8)
    with pytest.raises(FaroutError, match="did you mean sample"):
        read_benchmark("sampl")
    with pytest.raises(FaroutError, match="no file"):
        read_benchmark(tmp_path / "other.yaml")
    path.write_text("a: [")
    with pytest.raises(FaroutError, match="is not a YAML file"):
        read_benchmark(path)
    path.write_text("# nothing yet\n")
    with pytest.raises(FaroutError, match="lacks train, id, ood, detectors"):
        read_benchmark(path)
    path.write_text(yaml.safe_dump({**content, "runtime": "cpu"}))
    with pytest.raises(FaroutError, match="runtime requires settings by name, got 'cpu'"):
        read_benchmark(path, runtime={"batch_size": 8})


@pytest.mark.parametrize(
    "name", [name if name == "sample" else pytest.param(name, marks=pytest.mark.slow) for name in preset_names()]
)
def test_presets_can_be_planned(name: str) -> None:
    spec = read_benchmark(name)
    plan = plan_benchmark(spec, "out", missing_sets(spec))
    assert not plan.unused
    assert describe_preset(name) == spec.about != ""
    assert {"near", "far"} == set(spec.ood)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "benchmarks").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_benchmarks_of_the_repository_can_be_planned(path: Path) -> None:
    assert not plan_benchmark(read_benchmark(path), "out").unused


def test_groups_of_openood() -> None:
    spec = read_benchmark("openood_imagenet200")
    assert spec.ood["near"] == ("ssb_hard:test", "ninco:test")
    assert spec.ood["far"] == ("inaturalist:test", "textures:test", "openimage_o:test")
    assert spec.group_of("ninco:test") == "near"


# -- the plan -----------------------------------------------------------------------------------------------------


def test_shared_entries_run_once_per_seed_before_they_are_used() -> None:
    plan = plan_benchmark(parse_benchmark(small(seeds=[0, 5])), "out", {"svhn:test": "why"})
    ids = [job.name for job in plan.jobs]
    assert len(ids) == len(set(ids))
    for seed in (0, 5):
        assert ids.count(f"networks/generator-{seed}") == 1, "five entries use it"
        assert ids.count(f"evaluations/trivial_baselines-{seed}") == 1
    for job in plan.jobs:
        assert all(ids.index(needed) < ids.index(job.name) for needed in job.inputs)
    exposed = plan.job("networks", "exposed", 5)
    assert set(exposed.inputs) == {"outliers/noise-5", "reconstructions/again-5"}
    assert exposed.output == Path("out/networks/exposed-5")
    evaluation = plan.job("evaluations", "knn", 0)
    assert evaluation.sources == (plan.spec.id, "sample_fashion:test@classes=8,9", "sample_digits:test")
    assert plan.untested == {"svhn:test": "why"}


@pytest.mark.slow
def test_equal_random_weights_baselines_are_evaluated_once() -> None:
    """Random weights do not depend on the outliers that a classifier was trained with."""
    plan = plan_benchmark(parse_benchmark(small()), "out")
    assert plan.random_weights["exposed"] == plan.random_weights["posthoc"] == "posthoc, random weights"
    assert plan.job("detectors", "posthoc, random weights", 0).baseline_of == "posthoc"
    assert set(plan.random_weights) == {"reconstruction", "denoising", "posthoc", "exposed", "semantic", "knn"}
    other = small(networks__exposed__exposure={"loss": "k+1"})
    assert plan_benchmark(parse_benchmark(other), "out").random_weights["exposed"] == "exposed, random weights", (
        "one class more"
    )
    other = small(detectors__5={"method": "knn", "arguments": {"weights": "random"}})
    assert "knn" not in plan_benchmark(parse_benchmark(other), "out").random_weights
    none = plan_benchmark(parse_benchmark(small(random_weights_baselines=False, trivial_baselines=False)), "out")
    assert len(none.evaluations) == len(none.spec.detectors)


def test_circular_dependencies_are_refused() -> None:
    content = small(outliers__noise={"method": "sona", "diffusion": "generator", "arguments": {"reject": 0.5}})
    content["outliers"]["noise"]["classifier"] = "exposed"
    with pytest.raises(FaroutError, match=r"networks.exposed -> outliers.noise -> networks.exposed"):
        plan_benchmark(parse_benchmark(content), "out")


def test_unused_entries_are_listed() -> None:
    content = small(networks__spare={"kind": "classifier"})
    assert plan_benchmark(parse_benchmark(content), "out").unused == ("networks.spare",)


# -- the folder ---------------------------------------------------------------------------------------------------


def outdated(folder: Path, **changes: Any) -> dict[str, str]:
    """The jobs whose results do not fit a changed benchmark, with the reason; the unchanged one is finished."""
    jobs = plan_benchmark(parse_benchmark(small()), folder).jobs
    for job in jobs:
        path = job.output / (job.completed_by or "config.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    records = {
        job.name: {"settings": job.settings, "sources": list(job.sources), "kind": job.kind, "done": True}
        for job in jobs
    }
    write_json(folder / RECORD_FILE, {"jobs": records})
    return dict(plan_benchmark(parse_benchmark(small(**changes)), folder).graph.states().outdated)


@pytest.mark.slow
def test_a_benchmark_may_grow_but_not_change(tmp_path: Path) -> None:
    more = [*SMALL["detectors"], "mahalanobis"]
    assert not outdated(tmp_path, seeds=[0, 1], detectors=more, about="new", runtime={"workers": 1})
    assert not outdated(tmp_path, ood={**SMALL["ood"], "other": ["mnist:test"]})
    assert not outdated(tmp_path, detectors=SMALL["detectors"][:-1]), "other results are left alone"
    found = outdated(tmp_path, limit=5)
    assert found["evaluations/knn-0"] == "limit: None before, 5 now"
    assert {name.split("/")[0] for name in found} == {"evaluations"}
    assert not outdated(tmp_path, runtime={"batch_size": 8})
    found = outdated(tmp_path, runtime={"precision": "bf16"})
    assert found["networks/generator-0"] == "precision: auto before, bf16 now"
    found = outdated(tmp_path, networks__generator__training={"steps": 4})
    assert found["networks/generator-0"].startswith("training.steps: 3 before, 4 now")
    assert found["outliers/noise-0"] == "networks/generator-0 is run again"
    assert "networks/classifier-0" not in found
    assert "evaluations/exposed-0" in found, "trained with outliers of the generator"
    assert "evaluations/semantic-0" not in found


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    content = {**small(), "networks": {}, "outliers": {}, "reconstructions": {}, "detectors": ["knn"]}
    plan = plan_benchmark(parse_benchmark(content), tmp_path)
    fitted = plan.job("detectors", "knn", 0)
    fitted.output.mkdir(parents=True)
    record = {"settings": {**fitted.settings, "alpha": 0.2}, "sources": [], "kind": "detectors", "done": True}
    write_json(tmp_path / RECORD_FILE, {"jobs": {fitted.name: record}})
    with pytest.raises(FaroutError, match=r"detectors/knn-0 was run with other settings \(alpha: 0.2 before, 0.05 now"):
        plan.graph.check()
    assert fitted.output.exists()
    plan.graph.delete_outdated()
    assert not fitted.output.exists()


def test_results_without_a_record_are_refused(tmp_path: Path) -> None:
    plan = plan_benchmark(parse_benchmark(small()), tmp_path / "out")
    plan.jobs[0].output.mkdir(parents=True)
    with pytest.raises(FaroutError, match="was not written by this command"):
        plan.graph.states()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="not the folder of a benchmark"):
        preview_benchmark(plan_benchmark(parse_benchmark(small()), tmp_path / "mine"))


# -- sets ---------------------------------------------------------------------------------------------------------


def test_missing_sets_are_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAROUT_DATA", str(tmp_path))
    assert explain_missing("sample_digits:test") is None
    assert "--hub" in str(explain_missing("svhn:test"))
    assert explain_missing("svhn:test", hub=True) is None
    assert "OpenOOD" in str(explain_missing("ninco:test", hub=True)), "no hub has it"
    assert "--hub" in str(explain_missing("hf://owner/name:test"))
    for wrong in ("sample_fashon:test", "svhn:tset", str(tmp_path / "nowhere")):
        with pytest.raises(SourceError):
            explain_missing(wrong)
    assert missing_sets(parse_benchmark(small())).keys() == {"svhn:test"}


@pytest.mark.slow
def test_trivial_differences_of_a_set_are_marked(tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("id", 2), ("other", 3)):
        pictures(tmp_path / name, 6, seed=seed)
    large = pictures(tmp_path / "large", 3, seed=4)
    for path in large.iterdir():
        Image.open(path).resize((9, 9)).save(path)
    (tmp_path / "other" / "copy.png").write_bytes((tmp_path / "train" / "000.png").read_bytes())
    ood = {"far": [str(tmp_path / "other"), str(large), "sample_digits:test"]}
    content = {"name": "x", "train": str(tmp_path / "train"), "id": str(tmp_path / "id"), "ood": ood}
    sets = ImageSets(parse_benchmark({**content, "detectors": ["knn"]}))
    assert sets.facts(ood["far"][0]).markers == ("overlap",), "an image of the training images"
    assert sets.facts(str(large)).markers == ("size",)
    Image.open(tmp_path / "id" / "000.png").resize((9, 9)).save(tmp_path / "id" / "000.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("not a picture")
    broken = ImageSets(parse_benchmark({**content, "ood": {"far": [str(tmp_path / "broken")]}, "detectors": ["knn"]}))
    assert broken.facts(str(tmp_path / "broken")).markers == (), "no image that can be read has no size"
    same = ImageSets(parse_benchmark(small(id="sample_fashion:test@classes=0-8", limit=20)))
    assert same.facts("sample_fashion:test@classes=8,9").markers == ("overlap",), "a class on both sides"
    apart = ImageSets(parse_benchmark(small(limit=20)))
    assert apart.facts("sample_fashion:test@classes=8,9").markers == ()
    assert apart.facts("sample_digits:test").used == 20
