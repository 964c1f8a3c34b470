"""The contract of synthesizers: every registered synthesizer passes these tests."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from farout import SONA, ClassNoise
from farout.core.config import flatten_config
from farout.core.errors import FaroutError, SourceError, StoreError
from farout.core.runtime import Runtime
from farout.data.sources import open_source
from farout.synthesis import SYNTHESIZERS
from farout.synthesis.base import OutlierFolder, SynthesisContext, Synthesizer, SyntheticImages, read_outliers
from small import classifier, conditional, model, pictures
from tolerances import SONA_SHARE, assert_same_images, assert_same_manifests

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings(
        "ignore::farout.core.errors.TooFewImagesWarning",
        "ignore:only .* are nearest to their own class's vector:farout.core.errors.MisleadingResultWarning",
    ),
]

NAMES = sorted(SYNTHESIZERS)
COUNT = 7


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labelled images of the classes that `conditional()` knows, brighter from class to class."""
    root = tmp_path_factory.mktemp("images") / "labelled"
    for number, name in enumerate("abc"):
        pictures(root / name, 12, low=20 + 60 * number, seed=number)
    return root


@pytest.fixture(scope="module", params=NAMES)
def method(request: pytest.FixtureRequest) -> type[Synthesizer]:
    return SYNTHESIZERS[request.param].load()


@pytest.fixture(scope="module")
def whole(method: type[Synthesizer], images: Path, tmp_path_factory: pytest.TempPathFactory) -> OutlierFolder:
    """Seven outliers, generated in one run."""
    return synthesize(method, images, tmp_path_factory.mktemp("outliers") / "whole")


def synthesize(
    method: type[Synthesizer], images: Any, out: Path, *, batch_size: int = 64, **settings: Any
) -> OutlierFolder:
    judge = classifier() if method.requirements.classifier else None
    given: dict[str, Any] = {"diffusion": conditional(), "classifier": judge, "count": COUNT}
    runtime = Runtime(device="cpu", precision="fp32", batch_size=batch_size, workers=0)
    tiny = method(**method.test_arguments)
    return tiny.synthesize(images, out, **{**given, "runtime": runtime, **settings})


def agreeing_share(method: type[Synthesizer]) -> float:
    """The share of images that must agree with those of another batch size."""
    return SONA_SHARE if issubclass(method, SONA) else 1


def files(folder: Path) -> dict[str, bytes]:
    """Images and manifest."""
    found = {path.name: path.read_bytes() for path in (folder / "images").rglob("*") if path.is_file()}
    return {**found, "manifest.csv": (folder / "manifest.csv").read_bytes()}


def test_there_are_synthesizers() -> None:
    assert "class_noise" in NAMES


def test_a_folder_of_outliers_is_a_source_with_a_manifest(whole: OutlierFolder, images: Path) -> None:
    assert (whole.images, whole.requested, whole.generated) == (COUNT, COUNT, COUNT)
    source = open_source(whole.folder / "images")
    manifest = whole.manifest()
    assert manifest.columns[:6].tolist() == ["key", "source", "label", "class_name", "seed", "index"]
    assert sorted(manifest["key"]) == sorted(source.keys)
    assert manifest["index"].tolist() == list(range(COUNT))
    assert (manifest["seed"] == 0).all()
    classes = dict(zip(source.keys, [source.class_names[label] for label in source.labels]))
    names = dict(zip(manifest["key"], manifest["class_name"]))
    assert names == classes, "the folder has the name of the class"
    assert ["abc"[label] for label in manifest["label"]] == manifest["class_name"].tolist()
    assert set(manifest["source"]) <= {"", *open_source(images).keys}
    assert not manifest.isna().to_numpy()[:, :6].any()


def test_every_setting_is_stored(whole: OutlierFolder, method: type[Synthesizer]) -> None:
    tiny = method(**method.test_arguments)
    settings = whole.settings()
    assert settings["method"] in NAMES
    assert set(settings["config"]) == set(flatten_config(tiny.config))
    assert settings["seed"] == 0
    assert settings["diffusion"] in (None, conditional().content_hash)
    assert set(flatten_config(tiny.config)) <= set(whole.manifest().columns)
    assert read_outliers(whole.folder).images == COUNT


def test_outliers_are_different_images(whole: OutlierFolder) -> None:
    pixels = torch.stack(list(whole.source())).float()
    assert pixels.shape == (COUNT, 1, 8, 8)
    assert float(pixels.flatten(1).std(1).min()) > 1, "images are not constant"
    assert len(pixels.flatten(1).unique(dim=0)) == COUNT


def test_outliers_have_all_classes(whole: OutlierFolder) -> None:
    assert set(whole.manifest()["class_name"]) == set("abc")


def test_two_runs_are_equal_and_seeds_differ(
    whole: OutlierFolder, method: type[Synthesizer], images: Path, tmp_path: Path
) -> None:
    again, other = synthesize(method, images, tmp_path / "a"), synthesize(method, images, tmp_path / "b", seed=1)
    assert files(again.folder) == files(whole.folder)
    one, two = (torch.stack(list(folder.source())) for folder in (whole, other))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_the_batch_size_does_not_change_images(
    whole: OutlierFolder, method: type[Synthesizer], images: Path, tmp_path: Path, batch_size: int
) -> None:
    parts = synthesize(method, images, tmp_path / "s", batch_size=batch_size)
    assert_same_images(parts.folder, whole.folder, agreeing_share(method))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, method: type[Synthesizer], at: int) -> None:
    """Interrupt the run before it generates image `at`."""
    original = method.generate

    def stops(
        self: Synthesizer, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]
    ) -> SyntheticImages:
        if at in indices:
            raise KeyboardInterrupt
        return original(self, context, indices, labels)

    monkeypatch.setattr(method, "generate", stops)


def test_an_interrupted_run_is_resumed(method: type[Synthesizer], images: Path, tmp_path: Path) -> None:
    """The files equal those of an uninterrupted run: batches have fixed boundaries and are computed whole."""
    whole = synthesize(method, images, tmp_path / "whole", batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, method, 4)
        with pytest.raises(KeyboardInterrupt):
            synthesize(method, images, tmp_path / "s", batch_size=2)
    assert len(read_outliers(tmp_path / "s").manifest()) == 4
    # an image is missing, and the last line of the manifest is incomplete
    manifest = tmp_path / "s" / "manifest.csv"
    manifest.write_bytes(manifest.read_bytes()[:-3])
    next((tmp_path / "s" / "images" / "b").glob("*.png")).unlink()
    done = synthesize(method, images, tmp_path / "s", batch_size=2, resume=True)
    assert (done.images, done.generated) == (COUNT, COUNT - 2)
    assert files(done.folder) == files(whole.folder)
    assert synthesize(method, images, tmp_path / "s", resume=True).generated == 0


@pytest.mark.slow
def test_a_longer_run_adds_images(
    whole: OutlierFolder, method: type[Synthesizer], images: Path, tmp_path: Path
) -> None:
    synthesize(method, images, tmp_path / "s", count=3)
    done = synthesize(method, images, tmp_path / "s", resume=True)
    assert done.generated == COUNT - 3
    assert_same_images(done.folder, whole.folder, agreeing_share(method))
    assert_same_manifests(done.folder, whole.folder)
    fewer = synthesize(method, images, tmp_path / "s", count=2, resume=True)
    assert (fewer.images, fewer.requested, fewer.generated) == (COUNT, 2, 0)


@pytest.mark.slow
def test_single_stages_give_the_same_files(
    whole: OutlierFolder, method: type[Synthesizer], images: Path, tmp_path: Path
) -> None:
    for number, stage in enumerate(method.stages):
        done = synthesize(method, images, tmp_path / "s", stage=stage, resume=number > 0)
        assert done.images == (COUNT if stage == method.stages[-1] else 0)
    assert files(tmp_path / "s") == files(whole.folder)
    with pytest.raises(FaroutError, match="no stage 'x'; it has"):
        synthesize(method, images, tmp_path / "t", stage="x")


class Unfinished(ClassNoise):
    """Lists a stage but does not implement it."""

    stages = ("think", "images")


def test_a_stage_without_implementation_is_an_error(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="Unfinished lists the stage 'think' but does not implement `run_stage`"):
        synthesize(Unfinished, images, tmp_path / "s")


@pytest.mark.slow
def test_runs_with_other_settings_are_refused(
    whole: OutlierFolder, method: type[Synthesizer], images: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole.folder, tmp_path / "s")
    before = files(out)
    with pytest.raises(StoreError, match="already contains outliers; give --resume"):
        synthesize(method, images, out)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("seed: 0 before, 1 now", {"seed": 1}),
        ("precision: fp32 before, bf16 now", {"runtime": Runtime(device="cpu", precision="bf16", workers=0)}),
        ("data: .* before", {"limit": 30}),
    ]
    if method.requirements.diffusion:
        wrong.append(("diffusion: .* before", {"diffusion": conditional(b_scale=2.0)}))
    for message, settings in wrong:
        with pytest.raises(StoreError, match=f"generated with other settings.*{message}"):
            synthesize(method, images, out, resume=True, **settings)
    assert files(out) == before


@pytest.mark.slow
def test_runs_with_other_labels_are_refused(
    whole: OutlierFolder, method: type[Synthesizer], images: Path, tmp_path: Path
) -> None:
    """The same pixels and keys with other classes."""
    pixels = torch.stack(list(open_source(images)))
    out = tmp_path / "s"
    for number, labels in enumerate(([0, 1, 2] * 12, [2, 1, 0] * 12)):
        source = torch.utils.data.TensorDataset(pixels, torch.tensor(labels))
        settings: dict[str, Any] = {"diffusion": conditional_without_names()}
        if number == 0:
            synthesize(method, source, out, count=1, **settings)
        else:
            with pytest.raises(StoreError, match=r"labels: .* before"):
                synthesize(method, source, out, count=1, resume=True, **settings)


def conditional_without_names() -> Any:
    """A model of a set without class names, whose names are numbers."""
    network = conditional()
    assert network.conditioning is not None
    network.conditioning.class_names = ("0", "1", "2")
    return network


def test_other_files_are_not_touched(method: type[Synthesizer], images: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    for resume in (False, True):
        with pytest.raises(StoreError, match="not replaced"):
            synthesize(method, images, tmp_path / "mine", resume=resume)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a.txt"]


def test_invalid_inputs_are_refused_before_anything_is_written(
    method: type[Synthesizer], images: Path, tmp_path: Path
) -> None:
    strange = shutil.copytree(images, tmp_path / "strange")
    (strange / "c").rename(strange / "zebra")
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (images / "a", {}, "no labels"),
        (tmp_path / "nowhere", {}, "nowhere"),
        (strange, {}, "images of zebra"),
        (images, {"count": 0}, "count must be at least 1"),
    ]
    if method.requirements.diffusion:
        wrong.append((images, {"diffusion": None}, "requires a diffusion model"))
        wrong.append((images, {"diffusion": tmp_path / "nowhere"}, "nowhere"))
    if method.requirements.class_conditional:
        wrong.append((images, {"diffusion": model()}, "unconditional"))
    for source, settings, message in wrong:
        with pytest.raises((FaroutError, SourceError), match=message):
            synthesize(method, source, tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_an_unreadable_image_raises_or_is_skipped(method: type[Synthesizer], images: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(images, tmp_path / "damaged")
    (damaged / "a" / "003.png").write_text("not a picture")
    with pytest.raises(FaroutError, match="003"):
        synthesize(method, damaged, tmp_path / "s")
    assert synthesize(method, damaged, tmp_path / "s", policy="skip").generated == COUNT


def test_images_that_are_not_finite_are_refused(
    method: type[Synthesizer], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = method.generate

    def damaged(
        self: Synthesizer, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]
    ) -> SyntheticImages:
        found = original(self, context, indices, labels)
        return SyntheticImages(found.images * float("nan"), found.sources, found.columns)

    monkeypatch.setattr(method, "generate", damaged)
    with pytest.raises(FaroutError, match="not numbers"):
        synthesize(method, images, tmp_path / "s")
    assert not list((tmp_path / "s").rglob("*.png"))
