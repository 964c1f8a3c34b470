"""Outliers edited from images: random choices, targets, invalid inputs, rejection by a classifier, and the page."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from farout import SONA, SDEdit
from farout.classifiers.model import Classifier
from farout.cli import main
from farout.core.errors import FaroutError, MisleadingResultWarning, StoreError, UnreadableImageError
from farout.core.runtime import Runtime
from farout.data.sources import open_source
from farout.diffusion.model import DiffusionModel
from farout.synthesis.base import OutlierFolder, Synthesizer
from farout.synthesis.editing.base import interleave_classes
from farout.synthesis.editing.sona_guidance import SonaConfig
from farout.synthesis.editing.words import filter_words, find_nearest_words
from farout.synthesis.quality import color_similarity, measure_quality, summarize_quality, write_quality
from small import CPU, autoencoder, classifier, conditional, in_order, pictures, two_classes
from tolerances import GRAY_LEVELS, SONA_SHARE, assert_same_images, assert_same_manifests, assert_same_pixels

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings(
        "ignore:the diffusion model knows [23] classes:farout.core.errors.MisleadingResultWarning"
    ),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images of a and three of b; the generator knows c, d and e as well."""
    return two_classes(tmp_path_factory.mktemp("images") / "labelled")


def generator(**settings: Any) -> DiffusionModel:
    return conditional(classes=5, **settings)


def judge(names: str = "ab") -> Classifier:
    made = classifier(classes=len(names))
    return Classifier(made.module, made.mean, made.std, made.preprocessing, class_names=names, network=made.network)


def synthesize(images: Any, out: Path, method: Synthesizer | None = None, **settings: Any) -> OutlierFolder:
    given = {"count": 20, "diffusion": generator(), "runtime": CPU, **settings}
    return (method or SONA(steps=6)).synthesize(images, out, **given)


def pixels(folder: OutlierFolder) -> torch.Tensor:
    return in_order(folder).float() / 255


# random choices


def test_classes_alternate_until_they_have_no_more_images() -> None:
    assert interleave_classes([0, 0, 0, 7, 7, 0]) == [0, 3, 1, 4, 2, 5]


def test_every_image_is_used_before_one_is_repeated(images: Path, tmp_path: Path) -> None:
    manifest = synthesize(images, tmp_path / "o").manifest()
    keys = open_source(images).keys
    assert sorted(manifest["source"][:8]) == sorted(keys)
    assert manifest["source"][8:16].tolist() == manifest["source"][:8].tolist()
    assert manifest["repeat"].tolist() == [0] * 8 + [1] * 8 + [2] * 4
    assert [key.split("/")[0] for key in manifest["source"]] == manifest["class_name"].tolist()
    assert manifest["class_name"].tolist()[:8] == ["a", "b", "a", "b", "a", "b", "a", "a"]
    assert set(manifest["target"]) <= {"c", "d", "e"}
    assert manifest["target"].nunique() > 1
    assert set(manifest["k"]) <= set(range(1, 6))
    assert manifest["k"].nunique() > 2
    assert manifest["level"].tolist() == [(1000 * (k - 1) // 6 + 2) / 1000 for k in manifest["k"]]
    assert {"guidance.scale", "seed", "targets"} <= set(manifest)


def test_random_choices_depend_on_the_image_only(images: Path, tmp_path: Path) -> None:
    """The same images under the same keys, without some of them."""
    whole = synthesize(images, tmp_path / "o", count=8)
    fewer = shutil.copytree(images, tmp_path / "fewer")
    (fewer / "a" / "000.png").unlink()
    some = synthesize(fewer, tmp_path / "s", count=7)
    one, two = (dict(zip(each.manifest()["source"], in_order(each))) for each in (whole, some))
    assert set(one) - set(two) == {"a/000.png"}
    assert_same_pixels(torch.stack([one[key] for key in two]), torch.stack([*two.values()]), SONA_SHARE)


def test_the_number_of_steps_of_images(images: Path, tmp_path: Path) -> None:
    manifest = synthesize(images, tmp_path / "o", SONA(steps=6, k_min=3, k_max=4)).manifest()
    assert set(manifest["k"]) == {3, 4}


def test_without_guidance_both_methods_give_the_same_images(images: Path, tmp_path: Path) -> None:
    """The baseline starts from the same noised images: only the guidance differs."""
    still = SONA(steps=6, guidance=SonaConfig(scale=0.0))
    one, two = (
        synthesize(images, tmp_path / "a", still),
        synthesize(images, tmp_path / "b", SDEdit(steps=6, guidance=0.0)),
    )
    same = ["source", "target", "k", "level", "repeat"]
    pd.testing.assert_frame_equal(one.manifest()[same], two.manifest()[same])
    assert_same_pixels(in_order(one), in_order(two))
    guided = synthesize(images, tmp_path / "c", SDEdit(steps=6, guidance=2.0))
    assert int((in_order(guided).int() - in_order(two).int()).abs().max()) > GRAY_LEVELS


def test_few_steps_hardly_change_an_image(images: Path, tmp_path: Path) -> None:
    found = synthesize(images, tmp_path / "o", SONA(steps=50, k_max=1))
    source = open_source(images)
    originals = torch.stack([source[source.keys.index(key)] for key in found.manifest()["source"]]).float() / 255
    assert float((pixels(found) - originals).abs().mean()) < 0.05


@pytest.mark.parametrize("kind", ["unseen", "others", "mixtures", "none"])
def test_kinds_of_targets(images: Path, tmp_path: Path, kind: Any) -> None:
    source = shutil.copytree(images, tmp_path / "three")
    pictures(source / "c", 3, seed=9)
    found = synthesize(source, tmp_path / "o", SONA(steps=5, targets=kind)).manifest()
    targets = set(zip(found["class_name"], found["target"]))
    expected = {
        "unseen": {(own, other) for own in "abc" for other in "de"},
        "others": {(own, other) for own in "abc" for other in "abcde" if own != other},
        "mixtures": {("a", "b + c"), ("b", "a + c"), ("c", "a + b")},
        "none": {(own, "") for own in "abc"},
    }
    assert targets <= expected[kind]
    assert len({target for _, target in targets}) > (kind != "none")


def test_named_targets_and_auto(images: Path, tmp_path: Path) -> None:
    named = synthesize(images, tmp_path / "o", SONA(steps=5, target_classes=("e", "2"))).manifest()
    assert set(named["target"]) == {"c", "e"}
    everything = shutil.copytree(images, tmp_path / "all")
    pictures(everything / "c", 3, seed=9)
    without = synthesize(everything, tmp_path / "p", SONA(steps=5), diffusion=conditional(classes=3)).manifest()
    assert set(without["target"]) == {"b + c", "a + c", "a + b"}


# models


def test_latents_are_sampled_for_each_image_alone(images: Path, tmp_path: Path) -> None:
    """Images of 10 x 10 as latents of 5 x 5, which the network needs padded to 6 x 6."""
    model = generator(size=(10, 10), autoencoder=autoencoder(latent=1))
    assert (model.latent_shape, model.shape) == ((1, 5, 5), (1, 6, 6))
    with pytest.warns(MisleadingResultWarning, match="native size"):
        whole = synthesize(images, tmp_path / "o", diffusion=model)
    for size in (1, 3):
        runtime = Runtime(device="cpu", precision="fp32", workers=0, batch_size=size)
        with pytest.warns(MisleadingResultWarning, match="native size"):
            parts = synthesize(images, tmp_path / str(size), diffusion=model, runtime=runtime)
        assert_same_images(parts.folder, whole.folder, SONA_SHARE)


def test_values_are_clipped_to_the_range_of_images(images: Path, tmp_path: Path) -> None:
    loud = SonaConfig(scale=300.0)
    clipped, free = (synthesize(images, tmp_path / str(c), SONA(steps=6, guidance=loud, clip=c)) for c in (True, False))
    assert not torch.equal(pixels(clipped), pixels(free))


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2m", "unipc"])
def test_every_solver_that_can_be_guided_generates_outliers(images: Path, tmp_path: Path, solver: str) -> None:
    assert synthesize(images, tmp_path / "o", SONA(steps=6, solver=solver), count=4).generated == 4


# invalid inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "mixtures"}, "requires three classes with images, there are 2"),
        ({"target_classes": ("a", "d")}, "a has images and so is in-distribution"),
        ({"target_classes": ("x",)}, "there is no class 'x'"),
        ({"target_classes": ("d",), "targets": "others"}, "do not go together"),
        ({"solver": "plms"}, "plms evaluates the network more than once per step"),
        ({"solver": "euler"}, "there is no solver 'euler'"),
        ({"steps": 2000}, "steps must be 1 to 1000"),
        ({"reject": 0.5}, "SONA requires a classifier"),
    ],
)
def test_invalid_inputs_are_refused_before_anything_is_written(
    images: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(FaroutError, match=message):
        synthesize(images, tmp_path / "o", SONA(**settings))
    assert not (tmp_path / "o").exists()


def test_models_and_classifiers_that_cannot_be_used(images: Path, tmp_path: Path) -> None:
    nameless = generator()
    nameless.conditioning.has_null = False  # type: ignore[union-attr]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"diffusion": nameless}, "no null condition"),
        ({"diffusion": conditional(classes=2)}, "no targets are left"),
        ({"diffusion": conditional(classes=2), "method": SONA(targets="unseen")}, "no targets are left"),
        ({"classifier": judge("xyz")}, "does not know a, b"),
        ({"classifier": classifier(channels=3, classes=2)}, "1 channels, the classifier that judges them 3"),
    ]
    for settings, message in cases:
        with pytest.raises(FaroutError, match=message):
            synthesize(images, tmp_path / "o", **settings)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "settings",
    [{"k_min": 0}, {"k_min": 5, "k_max": 4}, {"k_max": 21}, {"reject": 1.0}, {"attempts": 0}, {"pictures": -1}],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(FaroutError, match=next(iter(settings))):
        SONA(**settings)


def test_settings_without_effect_are_refused_unless_of_a_preset() -> None:
    given: dict[str, Any]
    for given in ({"attempts": 6}, {"targets": "none", "guidance": 3.0}):
        with pytest.raises(FaroutError, match=f"{list(given)[-1]} is .*, but is only used .*default"):
            SDEdit(**given)
    SDEdit(reject=0.5, attempts=6)
    SDEdit(targets="none", guidance=2.0)
    SDEdit.from_preset("paper", targets="none")


def test_classes_with_similar_names_are_not_targets(tmp_path: Path) -> None:
    for name in ("assault rifle", "newt"):
        pictures(tmp_path / "i" / name, 3)
    model = generator()
    model.conditioning.class_names = ("assault rifle", "newt", "Rifle", "smooth_newt", "cat")  # type: ignore[union-attr]
    with pytest.warns(MisleadingResultWarning, match="Rifle, smooth_newt are not used as targets"):
        found = synthesize(tmp_path / "i", tmp_path / "o", diffusion=model)
    assert set(found.manifest()["target"]) == {"cat"}
    wished = synthesize(tmp_path / "i", tmp_path / "p", SONA(steps=5, target_classes=("Rifle",)), diffusion=model)
    assert set(wished.manifest()["target"]) == {"Rifle"}
    model.conditioning.class_names = ("assault rifle", "newt", "rifle", "smooth newt", "NEWT")  # type: ignore[union-attr]
    with pytest.warns(MisleadingResultWarning), pytest.raises(FaroutError, match="no targets are left"):
        synthesize(tmp_path / "i", tmp_path / "q", diffusion=model)


def test_unreadable_images_do_not_change_the_others(images: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(images, tmp_path / "damaged")
    (damaged / "b" / "000.png").write_text("not a picture")
    with pytest.raises(UnreadableImageError, match="b/000"):
        synthesize(damaged, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    some, whole = (
        synthesize(damaged, tmp_path / "o", policy="skip", count=7),
        synthesize(images, tmp_path / "w", count=8),
    )
    one, two = (dict(zip(each.manifest()["source"], in_order(each))) for each in (some, whole))
    assert set(two) - set(one) == {"b/000.png"}
    assert_same_pixels(torch.stack([*one.values()]), torch.stack([two[key] for key in one]), SONA_SHARE)
    for path in damaged.rglob("*.png"):
        path.write_text("not a picture")
    with pytest.raises(FaroutError, match="none of the 8 images"):
        synthesize(damaged, tmp_path / "n", policy="skip")


# quality


@pytest.mark.slow
def test_outliers_that_still_show_their_class_are_generated_again(images: Path, tmp_path: Path) -> None:
    plain = measure_quality(synthesize(images, tmp_path / "a"), open_source(images), judge(), CPU)
    limit = float(plain["source_class_probability"].median())
    picky = SONA(steps=6, reject=limit, attempts=6)
    found = synthesize(images, tmp_path / "b", picky, classifier=judge())
    manifest = found.manifest()
    assert float(manifest["source_class_probability"].mean()) < float(plain["source_class_probability"].mean())
    accepted = manifest["source_class_probability"] <= limit
    assert accepted.mean() > (plain["source_class_probability"] <= limit).mean()
    assert manifest["attempt"].max() > 0
    kept, first = torch.tensor((manifest["attempt"] == 0).tolist()), synthesize(images, tmp_path / "c")
    assert_same_pixels(in_order(found)[kept], in_order(first)[kept], SONA_SHARE)
    runtime = Runtime(device="cpu", precision="fp32", workers=0, batch_size=3)
    again = synthesize(images, tmp_path / "d", picky, classifier=judge(), runtime=runtime)
    assert_same_manifests(again.folder, found.folder)
    assert_same_images(again.folder, found.folder, SONA_SHARE)
    other = judge()
    torch.nn.init.ones_(other.head.bias)
    with pytest.raises(StoreError, match=r"classifier: .* before"):
        synthesize(images, tmp_path / "b", picky, classifier=other, resume=True)


def test_a_classifier_without_rejection_changes_nothing(images: Path, tmp_path: Path) -> None:
    plain, seen = synthesize(images, tmp_path / "a"), synthesize(images, tmp_path / "b", classifier=judge())
    assert (tmp_path / "a" / "manifest.csv").read_bytes() == (tmp_path / "b" / "manifest.csv").read_bytes()
    assert torch.equal(pixels(plain), pixels(seen))


def test_color_similarity() -> None:
    one = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(color_similarity(one, one.flip(3)), torch.ones(2))
    assert color_similarity(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)).item() == 0
    half = torch.cat([torch.zeros(1, 1, 4, 8), torch.ones(1, 1, 4, 8)], dim=2)
    assert color_similarity(half, torch.ones(1, 1, 8, 8)).item() == pytest.approx(0.5)


def test_quality_compares_each_outlier_with_its_source_image(images: Path, tmp_path: Path) -> None:
    found = synthesize(images, tmp_path / "o")
    rated = measure_quality(found, open_source(images), judge(), CPU).set_index("key")
    manifest = found.manifest().set_index("key")
    assert set(rated.index) == set(manifest.index)
    key = manifest.index[7]
    own = "ab".index(manifest["class_name"][key])
    source = open_source(images)
    outlier, original = (
        torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32))[None, None] / 255
        for path in (found.folder / "images" / key, images / manifest["source"][key])
    )
    chances = judge().outputs(outlier).logits.softmax(1)[0]
    assert rated["source_class_probability"][key] == pytest.approx(float(chances[own]), abs=1e-5)
    assert rated["is_source_class"][key] == (int(chances.argmax()) == own)
    assert rated["color_similarity"][key] == pytest.approx(float(color_similarity(outlier, original)))
    parts = summarize_quality(rated)
    assert parts[0]["outliers"] == sum(part["outliers"] for part in parts[1:]) == 20
    assert parts[0]["is_source_class"] == pytest.approx(rated["is_source_class"].mean())
    assert len(source) == 8
    write_quality(rated.reset_index(), found)
    assert len(pd.read_csv(found.folder / "quality.csv")) == 20
    write_quality(None, found)
    assert not (found.folder / "quality.csv").exists(), "that of an earlier run"


# the command and its page


def test_the_command_writes_a_page_of_pairs(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator().save(tmp_path / "model")
    judge().save(tmp_path / "judge")
    words = ["synthesize", "sona", str(images), "--diffusion", str(tmp_path / "model"), "--steps", "6"]
    words += ["--guidance.scale", "5", "--target-classes", "c", "e", "--pictures", "6", "--count", "10", "--no-clip"]
    words += ["--classifier", str(tmp_path / "judge"), "--device", "cpu", "--out", str(tmp_path / "o")]
    assert main(words) == 0, capsys.readouterr().err
    assert "quality.csv" in capsys.readouterr().out
    assert OutlierFolder(tmp_path / "o", 10, 10, 10).settings()["config"]["clip"] is False
    found = pd.read_csv(tmp_path / "o" / "quality.csv")
    assert len(found) == 10
    manifest = pd.read_csv(tmp_path / "o" / "manifest.csv")
    shown = sum(1 for k in manifest["k"][:6] if k > 1)  # one step is the warm-up of six
    assert len(list((tmp_path / "o" / "regions").glob("*.png"))) == shown > 0
    page = (tmp_path / "o" / "page.html").read_text()
    assert page.count("<figure>") == 10
    assert page.count('alt="regions of') == shown
    assert "a to c" in page or "a to e" in page
    assert "still of their class" in page
    assert "http" not in page


def test_region_images_show_guided_steps(images: Path, tmp_path: Path) -> None:
    found = synthesize(images, tmp_path / "o", SONA(steps=20, pictures=3, k_min=10), count=5)
    for index in range(3):
        picture = np.asarray(Image.open(found.folder / "regions" / f"{index:06d}.png"))
        assert picture.shape == (8, 32, 3)
        shares = picture.reshape(8, 4, 8, 3).mean((0, 2)) / 255
        assert (np.abs(shares[:, [0, 2]] - 0.1) < 0.02).all(), "a tenth is removed, a tenth kept"
        assert (shares[:, 1] <= 0.12).all()
    assert not (found.folder / "regions" / "000003.png").exists()


def test_the_papers_preset_has_the_papers_steps() -> None:
    paper = SONA.from_preset("paper")
    assert (paper.steps, paper.k_min, paper.k_max) == (50, 1, 49)
    assert paper.guidance == SonaConfig().for_steps(50)
    assert paper.guidance.for_steps(50).warmups == (20, 10, 10)
    assert SONA().guidance.for_steps(20).warmups == (8, 4, 4)
    assert SDEdit.from_preset("paper").guidance == 7.5


# words


def test_words_that_name_known_classes_are_removed() -> None:
    known = ["assault rifle", "Newt", "missile", "t-shirt_top"]
    words = ["rifle", "smooth newt", "Missile", "cat", "CAT", "snow_leopard", "leopard", "shirt", "  ", "rifleman"]
    assert filter_words(words, known) == ("cat", "snow_leopard", "leopard", "shirt", "rifleman")
    assert filter_words(["b", "a", "b"], []) == ("b", "a")
    assert filter_words(["house/cat, tabby"], ["cat tabby"]) == ()


def test_nearest_words() -> None:
    words = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0]])
    known = torch.tensor([[5.0, 0.1], [0.0, 1.0]])
    assert find_nearest_words(words, known, 2).tolist() == [[0, 2], [1, 2]]
    with pytest.raises(FaroutError, match="1 to 4"):
        find_nearest_words(words, known, 5)
