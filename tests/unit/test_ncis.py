"""NCIS: the files of its stages, vectors and noise shared by outliers, and the command."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from farout import NCIS, read_outliers
from farout.cli import main
from farout.core.errors import FaroutError, StoreError
from farout.data.sources import open_source
from farout.report.outlier_page import write_outlier_page
from farout.synthesis.ncis.inversion import InversionConfig, read_embeddings
from farout.synthesis.ncis.manifold import Manifold, ManifoldConfig
from farout.training.checkpoints import checkpoint_folders
from farout.training.loop import TrainingRun
from small import CPU, conditional, pictures

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings(
        r"ignore:the diffusion model knows 1 class \(b\):farout.core.errors.MisleadingResultWarning",
        "ignore::farout.core.errors.TooFewImagesWarning",
    ),
]

SMALL = ManifoldConfig(layers=2, steps=4, validations=1, candidates=20, kept=2)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in "ac":
        pictures(tmp_path / "labelled" / name, 6, seed=ord(name))
    return tmp_path / "labelled"


def ncis(**settings: Any) -> NCIS:
    return NCIS(**{"inversion": InversionConfig(steps=1, draws=2), "manifold": SMALL, "steps": 2, **settings})


def synthesize(images: Path, out: Path, method: NCIS | None = None, **settings: Any) -> Any:
    given = {"count": 9, "diffusion": conditional(), "runtime": CPU, **settings}
    return (method or ncis()).synthesize(images, out, **given)


def test_every_stage_leaves_its_files(images: Path, tmp_path: Path) -> None:
    """Classes a and c of the generator's three have images; the other one gets no outliers."""
    out = tmp_path / "o"
    synthesize(images, out, stage="embed")
    assert set(read_embeddings(out / "embeddings").labels.tolist()) == {0, 2}
    assert not (out / "manifold").exists()
    synthesize(images, out, stage="sample", resume=True)
    assert Manifold.load(out / "manifold").class_names == ("a", "c")
    drawn = load_file(out / "samples.safetensors")
    assert drawn["labels"].tolist() == [0] * 5 + [2] * 5
    assert not (out / "images").exists()
    done = synthesize(images, out, resume=True)
    manifest = done.manifest()
    assert manifest["class_name"].tolist() == ["a", "c"] * 4 + ["a"]
    assert manifest["distance"].tolist() == pytest.approx(drawn["distance"][[0, 5, 1, 6, 2, 7, 3, 8, 4]].tolist())


def test_the_sampled_vectors_are_decoded(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.Tensor, list[int], list[int]]] = []
    monkeypatch.setattr(
        "farout.synthesis.class_space.decode_vectors",
        lambda sampler, vectors, noises, labels, change: (
            seen.append((vectors, list(noises), list(labels))) or torch.zeros(len(vectors), 1, 8, 8)
        ),
    )
    synthesize(images, tmp_path / "o", ncis(images_per_vector=2), count=8)
    vectors, noises, labels = seen[0]
    drawn = load_file(tmp_path / "o" / "samples.safetensors")["vectors"]
    assert torch.equal(vectors, drawn[[0, 2, 0, 2, 1, 3, 1, 3]])
    assert noises == list(range(8))
    assert labels == [0, 2] * 4, "labels of the generator's classes a, b and c"
    synthesize(images, tmp_path / "fixed", ncis(fixed_noise=True), count=4)
    assert seen[1][1] == [0, 0, 0, 0]
    synthesize(images, tmp_path / "shared", ncis(fixed_noise=True, images_per_vector=2), count=8)
    assert seen[2][1] == [0, 0, 1, 1] * 2, "images of one vector differ"


def test_an_interrupted_manifold_is_resumed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(images, tmp_path / "whole", stage="manifold")
    update, updates = TrainingRun._update, list[int]()

    def interrupted(self: TrainingRun, batches: Any) -> None:
        if self.completed == 3:
            raise KeyboardInterrupt
        update(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingRun, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synthesize(images, tmp_path / "o", stage="manifold")
    assert list(checkpoint_folders(tmp_path / "o" / "manifold.training")) == [3]
    monkeypatch.setattr(
        TrainingRun, "_update", lambda run, batches: updates.append(run.completed) or update(run, batches)
    )
    synthesize(images, tmp_path / "o", stage="manifold", resume=True)
    assert updates == [3], "only the last of four batches was missing"
    hashes = {Manifold.load(tmp_path / name / "manifold").content_hash for name in ("whole", "o")}
    assert len(hashes) == 1
    assert not (tmp_path / "o" / "manifold.training").exists()
    (tmp_path / "o" / "manifold.training").mkdir()  # stopped between the manifold and this
    synthesize(images, tmp_path / "o", stage="manifold", resume=True)
    assert not (tmp_path / "o" / "manifold.training").exists()


def test_another_manifold_is_refused_with_the_differing_setting(images: Path, tmp_path: Path) -> None:
    synthesize(images, tmp_path / "o", count=2)
    with pytest.raises(StoreError, match=r"manifold\.map"):
        synthesize(images, tmp_path / "o", ncis(manifold=ManifoldConfig(map="linear")), resume=True)


def test_a_class_of_one_image_is_named(images: Path, tmp_path: Path) -> None:
    pictures(images / "b", 1, seed=5)
    with pytest.raises(FaroutError, match="'b'"):
        synthesize(images, tmp_path / "o")


def test_settings_are_checked() -> None:
    with pytest.raises(FaroutError, match="images_per_vector"):
        NCIS(images_per_vector=0)
    paper = NCIS.from_preset("paper")
    assert paper.inversion.lr == 0.01
    assert paper.manifold.reg_weight == 1e-5


def test_the_command_takes_nested_settings_and_presets(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditional().save(tmp_path / "model")
    words = ["synthesize", "ncis", str(images), "--diffusion", str(tmp_path / "model"), "--preset", "linear"]
    words += [
        "--inversion.steps",
        "1",
        "--inversion.draws",
        "2",
        "--no-inversion.stratified",
        "--steps",
        "2",
        "--count",
        "4",
    ]
    assert main([*words, "--out", str(tmp_path / "o")]) == 0, capsys.readouterr().err
    assert Manifold.load(tmp_path / "o" / "manifold").config.map == "linear"
    assert read_outliers(tmp_path / "o").settings()["config"]["inversion.stratified"] is False
    assert len(list((tmp_path / "o" / "images").rglob("*.png"))) == 4
    page = (tmp_path / "o" / "page.html").read_text()
    assert (page.count("<svg"), page.count("<img")) == (1, 2 * 4 + 4), (
        "a histogram, four images and two outliers of each class"
    )
    assert "http" not in page
    assert "training" in page


def test_a_page_after_the_first_stage_describes_it(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditional().save(tmp_path / "model")
    words = ["synthesize", "ncis", str(images), "--diffusion", str(tmp_path / "model"), "--stage", "embed"]
    assert main([*words, "--inversion.draws", "2", "--out", str(tmp_path / "o")]) == 0, capsys.readouterr().err
    page = (tmp_path / "o" / "page.html").read_text()
    assert "12 images were embedded as class vectors" in page
    assert "<img" not in page


def test_a_class_of_one_image_is_refused_before_anything_is_embedded(tmp_path: Path) -> None:
    pictures(tmp_path / "few" / "a", 5)
    pictures(tmp_path / "few" / "b", 1)
    with pytest.raises(FaroutError, match="class 'b' has 1 vector"):
        NCIS(**NCIS.test_arguments).synthesize(
            tmp_path / "few", tmp_path / "o", count=4, diffusion=conditional(), runtime=CPU
        )
    assert not (tmp_path / "o").exists()


def test_classes_too_small_to_hold_vectors_out_are_refused_before_anything_is_embedded(
    images: Path, tmp_path: Path
) -> None:
    method = ncis(manifold=replace(SMALL, regularization="held_out"))
    with pytest.raises(FaroutError, match="too small to hold vectors out"):
        synthesize(images, tmp_path / "o", method)
    assert not (tmp_path / "o").exists()


def test_images_none_of_which_can_be_read_are_refused(images: Path, tmp_path: Path) -> None:
    for path in images.glob("*/*.png"):
        path.write_text("not a picture")
    with pytest.raises(FaroutError, match="class 'a' has 0 vectors"):
        synthesize(images, tmp_path / "o", policy="skip")
    assert not (tmp_path / "o").exists()


def test_held_out_distances_are_shown_as_soon_as_there_is_a_manifold(images: Path, tmp_path: Path) -> None:
    done = NCIS(**NCIS.test_arguments).synthesize(
        images, tmp_path / "o", count=4, diffusion=conditional(), runtime=CPU, stage="manifold"
    )
    text = write_outlier_page(done, open_source(images)).read_text(encoding="utf-8")
    assert "training" in text
    assert "drawn" not in text.partition("Medians")[2].partition("</p>")[0]
