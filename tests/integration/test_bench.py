"""Benchmarks: what is asked for is checked before any work, and what is named once is made once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from farout.benchmark.folder import differences, open_folder
from farout.benchmark.plan import make_plan
from farout.benchmark.presets import about, preset_names
from farout.benchmark.reading import as_yaml, parse_spec, read_spec
from farout.benchmark.sets import Sets, absent_sets, why_absent
from farout.core.errors import FaroutError, SourceError, StoreError
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
        *way, last = [int(step) if step.isdigit() else step for step in path.split("__")]
        place: Any = content
        for step in way:
            place = place[step]
        place[last] = value
    return content


# -- what is asked for --------------------------------------------------------------------------------------------


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
        parse_spec(small(**changes))
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_every_setting_is_filled_in_and_read_back() -> None:
    """`bench.yaml` says all that decides a result, so that a later version's defaults change nothing."""
    spec = parse_spec(small())
    generator = spec.networks["generator"]
    assert generator.training.learning_rate == 1e-3, "YAML reads 1e-3 as a text"
    assert generator.training.ema == 0.998, "of the preset"
    assert generator.model.schedule == "linear", "of the preset"
    assert spec.detectors["reconstruction"].arguments["levels"] == (50,)
    assert spec.detectors["semantic"].method == "semantic"
    assert parse_spec(yaml.safe_load(as_yaml(spec))) == spec
    nested = parse_spec(small(outliers__noise={"method": "sona", "diffusion": "generator"}))
    assert nested.outliers["noise"].made().config["guidance"].scale == 10.0
    assert parse_spec(yaml.safe_load(as_yaml(nested))) == nested


def test_files_and_flags(tmp_path: Path) -> None:
    content = {name: value for name, value in small().items() if name != "name"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    spec = read_spec(path, limit=7, seeds=(3, 4), runtime={"batch_size": 8})
    assert (spec.name, spec.limit, spec.seeds, spec.runtime.batch_size) == ("mine", 7, (3, 4), 8)
    with pytest.raises(FaroutError, match="did you mean sample"):
        read_spec("sampl")
    with pytest.raises(FaroutError, match="no file"):
        read_spec(tmp_path / "other.yaml")
    path.write_text("a: [")
    with pytest.raises(FaroutError, match="is not a YAML file"):
        read_spec(path)
    path.write_text("# nothing yet\n")
    with pytest.raises(FaroutError, match="lacks train, id, ood, detectors"):
        read_spec(path)
    path.write_text(yaml.safe_dump({**content, "runtime": "cpu"}))
    with pytest.raises(FaroutError, match="runtime requires settings by name, got 'cpu'"):
        read_spec(path, runtime={"batch_size": 8})


@pytest.mark.parametrize(
    "name", [name if name == "sample" else pytest.param(name, marks=pytest.mark.slow) for name in preset_names()]
)
def test_presets_can_be_planned(name: str) -> None:
    spec = read_spec(name)
    plan = make_plan(spec, "out", absent_sets(spec))
    assert not plan.unused
    assert about(name) == spec.about != ""
    assert {"near", "far"} == set(spec.ood)


def test_openoods_groups() -> None:
    spec = read_spec("openood_imagenet200")
    assert spec.ood["near"] == ("ssb_hard:test", "ninco:test")
    assert spec.ood["far"] == ("inaturalist:test", "textures:test", "openimage_o:test")
    assert spec.group("ninco:test") == "near"


# -- the plan -----------------------------------------------------------------------------------------------------


def test_what_is_shared_is_made_once_a_seed_and_before_it_is_needed() -> None:
    plan = make_plan(parse_spec(small(seeds=[0, 5])), "out", {"svhn:test": "why"})
    ids = [job.id for job in plan.jobs]
    assert len(ids) == len(set(ids))
    for seed in (0, 5):
        assert ids.count(f"networks/generator-{seed}") == 1, "five entries name it"
        assert ids.count(f"rated/trivial_controls-{seed}") == 1
    for job in plan.jobs:
        assert all(ids.index(needed) < ids.index(job.id) for needed in job.needs)
    exposed = plan.job("networks", "exposed", 5)
    assert set(exposed.needs) == {"outliers/noise-5", "reconstructions/again-5"}
    assert exposed.folder == Path("out/networks/exposed-5")
    rated = plan.job("rated", "knn", 0)
    assert rated.sources == (plan.spec.id, "sample_fashion:test@classes=8,9", "sample_digits:test")
    assert plan.untested == {"svhn:test": "why"}


@pytest.mark.slow
def test_controls_that_would_be_the_same_are_one() -> None:
    """Fresh weights know nothing of the outliers that a classifier has learnt from."""
    plan = make_plan(parse_spec(small()), "out")
    assert plan.controls["exposed"] == plan.controls["posthoc"] == "posthoc, random weights"
    assert plan.job("detectors", "posthoc, random weights", 0).control_of == "posthoc"
    assert set(plan.controls) == {"reconstruction", "denoising", "posthoc", "exposed", "semantic", "knn"}
    other = small(networks__exposed__exposure={"loss": "k+1"})
    assert make_plan(parse_spec(other), "out").controls["exposed"] == "exposed, random weights", "one class more"
    other = small(detectors__5={"method": "knn", "arguments": {"weights": "random"}})
    assert "knn" not in make_plan(parse_spec(other), "out").controls
    none = make_plan(parse_spec(small(random_weights=False, trivial=False)), "out")
    assert len(none.rated) == len(none.spec.detectors)


def test_a_circle_is_refused() -> None:
    content = small(outliers__noise={"method": "sona", "diffusion": "generator", "arguments": {"reject": 0.5}})
    content["outliers"]["noise"]["classifier"] = "exposed"
    with pytest.raises(FaroutError, match=r"networks.exposed -> outliers.noise -> networks.exposed"):
        make_plan(parse_spec(content), "out")


def test_what_nothing_needs_is_told() -> None:
    content = small(networks__spare={"kind": "classifier"})
    assert make_plan(parse_spec(content), "out").unused == ("networks.spare",)


# -- the folder ---------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> list[str]:
    old, new = (yaml.safe_load(as_yaml(parse_spec(content))) for content in (small(), small(**changes)))
    return list(differences(old, new))


@pytest.mark.slow
def test_a_benchmark_may_grow_but_not_change() -> None:
    more = [*SMALL["detectors"], "mahalanobis"]
    assert not changed(seeds=[0, 1], detectors=more, about="new", runtime={"workers": 1})
    assert not changed(ood={**SMALL["ood"], "other": ["mnist:test"]})
    assert changed(limit=5) == ["limit: None before, 5 now"]
    assert not changed(runtime={"batch_size": 8})
    assert changed(runtime={"precision": "bf16"}) == ["runtime.precision: auto before, bf16 now"]
    assert changed(seeds=[1]) == ["seeds: 0 before, not now"]
    assert changed(detectors=SMALL["detectors"][:-1]) == ["detectors: knn before, not now"]
    assert changed(ood={"near": ["mnist:test"]})[0].startswith("ood.near: sample_fashion:test@classes=8,9 before")
    steps = changed(networks__generator__training={"steps": 4})
    assert "networks.generator.training.steps: 3 before, 4 now" in steps


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    open_folder(tmp_path / "out", parse_spec(small()))
    before = (tmp_path / "out" / "bench.yaml").read_text()
    with pytest.raises(StoreError, match="limit: None before, 9 now"):
        open_folder(tmp_path / "out", parse_spec(small(limit=9)))
    assert (tmp_path / "out" / "bench.yaml").read_text() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="not the folder of a benchmark"):
        open_folder(tmp_path / "mine", parse_spec(small()))


# -- sets ---------------------------------------------------------------------------------------------------------


def test_sets_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAROUT_DATA", str(tmp_path))
    assert why_absent("sample_digits:test") is None
    assert "--hub" in str(why_absent("svhn:test"))
    assert why_absent("svhn:test", hub=True) is None
    assert "OpenOOD" in str(why_absent("ninco:test", hub=True)), "no hub has it"
    assert "--hub" in str(why_absent("hf://owner/name:test"))
    for wrong in ("sample_fashon:test", "svhn:tset", str(tmp_path / "nowhere")):
        with pytest.raises(SourceError):
            why_absent(wrong)
    assert absent_sets(parse_spec(small())).keys() == {"svhn:test"}


@pytest.mark.slow
def test_traits_of_a_set_that_give_it_away(tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("id", 2), ("other", 3)):
        pictures(tmp_path / name, 6, seed=seed)
    large = pictures(tmp_path / "large", 3, seed=4)
    for path in large.iterdir():
        Image.open(path).resize((9, 9)).save(path)
    (tmp_path / "other" / "copy.png").write_bytes((tmp_path / "train" / "000.png").read_bytes())
    ood = {"far": [str(tmp_path / "other"), str(large), "sample_digits:test"]}
    content = {"name": "x", "train": str(tmp_path / "train"), "id": str(tmp_path / "id"), "ood": ood}
    sets = Sets(parse_spec({**content, "detectors": ["knn"]}))
    assert sets.facts(ood["far"][0]).markers == ("overlap",), "an image of the training images"
    assert sets.facts(str(large)).markers == ("size",)
    Image.open(tmp_path / "id" / "000.png").resize((9, 9)).save(tmp_path / "id" / "000.png")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_text("not a picture")
    broken = Sets(parse_spec({**content, "ood": {"far": [str(tmp_path / "broken")]}, "detectors": ["knn"]}))
    assert broken.facts(str(tmp_path / "broken")).markers == (), "no image that can be read has no size"
    same = Sets(parse_spec(small(id="sample_fashion:test@classes=0-8", limit=20)))
    assert same.facts("sample_fashion:test@classes=8,9").markers == ("overlap",), "a class on both sides"
    apart = Sets(parse_spec(small(limit=20)))
    assert apart.facts("sample_fashion:test@classes=8,9").markers == ()
    assert apart.facts("sample_digits:test").used == 20
