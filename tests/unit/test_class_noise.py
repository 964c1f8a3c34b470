"""Class embeddings with noise, their decoding, and the command that generates outliers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from farout import ClassNoise, read_outliers
from farout.cli import main
from farout.core.errors import FaroutError, MisleadingResultWarning, StoreError
from farout.core.runtime import Runtime
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.sampling import Sampler
from farout.synthesis.class_space import class_table_std, decode_vectors
from farout.synthesis.generator_check import recognition_rate
from small import CPU, by_tokens, classifier, conditional, in_order, model, pictures, without_null
from tolerances import assert_same_images, assert_same_pixels

pytestmark = pytest.mark.numerics


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in "abc":
        pictures(tmp_path / "labelled" / name, 2, seed=ord(name))
    return tmp_path / "labelled"


@pytest.mark.parametrize("fresh", [conditional, by_tokens])
def test_without_noise_outliers_are_samples_of_the_classes(fresh: Any, images: Path, tmp_path: Path) -> None:
    made = ClassNoise(scale=0, steps=4).synthesize(images, tmp_path / "o", count=5, diffusion=fresh(), runtime=CPU)
    samples = Sampler(fresh(), steps=4, guidance=2.0).sample_images(range(5), [0, 1, 2, 0, 1])
    assert_same_pixels(in_order(made), (samples * 255).round().to(torch.uint8))


def test_the_noise_has_the_scale_of_the_class_table(images: Path, tmp_path: Path) -> None:
    network = conditional()
    space = network.conditioning
    assert space is not None
    method = ClassNoise(scale=1.5, steps=2)
    made = method.synthesize(images, tmp_path / "o", count=60, diffusion=network, runtime=CPU)
    expected = 1.5 * class_table_std(space) * space.dim**0.5
    assert made.manifest()["distance"].mean() == pytest.approx(expected, rel=0.1)
    assert (made.manifest()["scale"] == 1.5).all()
    assert (made.manifest()["guidance"] == 2.0).all()


@pytest.mark.parametrize("fresh", [conditional, by_tokens])
def test_outliers_can_have_another_size_than_the_generator(fresh: Any, images: Path, tmp_path: Path) -> None:
    """On disk too; with the generator's own size, the same images as without `size`."""
    given: dict[str, Any] = {"count": 4, "diffusion": fresh(), "runtime": CPU}
    plain, own, large = (
        ClassNoise(steps=2, size=size).synthesize(images, tmp_path / f"o{size}", **given) for size in (None, 8, 12)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.source(), own.source(), strict=True))
    assert {tuple(image.shape) for image in large.source()} == {(1, 12, 12)}
    again = ClassNoise(steps=2, size=12)
    again.synthesize(images, tmp_path / "one", **{**given, "runtime": replace(CPU, batch_size=1)})
    assert_same_images(tmp_path / "one", large.folder)
    noise = Sampler(fresh().with_image_size(12), steps=2).sample_images([0], [0])
    assert noise.shape == (1, 1, 12, 12)


def test_impossible_sizes_are_refused_before_any_work(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conditional().save(tmp_path / "m")
    words = ["synthesize", "class_noise", str(images), "--diffusion", str(tmp_path / "m"), "--out", str(tmp_path / "o")]
    for size in ("9", "0", "-4"):
        assert main([*words, f"--size={size}"]) == 1
        assert f"a multiple of 2, or its own 8 x 8; got {size}" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()
    padded = conditional(size=(7, 7))
    assert padded.with_image_size(7).shape == padded.shape == (1, 8, 8), "the original size, which the network pads"


def test_only_classes_with_images_get_outliers(images: Path, tmp_path: Path) -> None:
    for path in (images / "b").iterdir():
        path.unlink()
    (images / "b").rmdir()
    with pytest.warns(MisleadingResultWarning, match=r"knows 1 class \(b\)"):
        made = ClassNoise(steps=2).synthesize(images, tmp_path / "o", count=4, diffusion=conditional(), runtime=CPU)
    assert made.manifest()["class_name"].tolist() == ["a", "c", "a", "c"]
    assert made.manifest()["label"].tolist() == [0, 2, 0, 2], "labels are those of the generator"


def test_runs_with_other_arguments_are_refused(images: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"diffusion": conditional(), "runtime": CPU, "count": 2}
    ClassNoise(steps=2).synthesize(images, tmp_path / "o", **given)
    with pytest.raises(
        StoreError, match=r"generated with other settings \(scale: 1.0 before, 2.0 now; guidance: 2.0 before, 1.0 now\)"
    ):
        ClassNoise(scale=2.0, guidance=1.0, steps=2).synthesize(images, tmp_path / "o", resume=True, **given)


def test_guidance_requires_a_null_condition(images: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"diffusion": without_null(), "runtime": CPU, "count": 2}
    with pytest.raises(FaroutError, match="no null condition"):
        ClassNoise(steps=2).synthesize(images, tmp_path / "o", **given)
    assert not (tmp_path / "o").exists()
    assert ClassNoise(steps=2, guidance=1.0).synthesize(images, tmp_path / "o", **given).generated == 2


def test_settings_that_cannot_work_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="scale must be 0 or more"):
        ClassNoise(scale=-1)
    for method, message in (
        (ClassNoise(solver="euler"), "no solver 'euler'"),
        (ClassNoise(solver="pndm4", steps=2), "warms up"),
    ):
        with pytest.raises(FaroutError, match=message):
            method.synthesize(images, tmp_path / "o", diffusion=conditional(), runtime=CPU)
    with pytest.raises(FaroutError, match="has no preset 'x'"):
        ClassNoise.from_preset("x")


def test_decoding_refuses_vectors_of_another_model() -> None:
    sampler = Sampler(conditional(), steps=2)
    space = conditional().conditioning
    assert space is not None
    with pytest.raises(FaroutError, match="unconditional"):
        decode_vectors(Sampler(model(), steps=2), torch.zeros(1, 4), [0])
    with pytest.raises(FaroutError, match="shape"):
        decode_vectors(sampler, torch.zeros(1, space.dim + 1), [0])
    with pytest.raises(FaroutError, match="not finite"):
        decode_vectors(sampler, torch.full((1, space.dim), float("inf")), [0])
    assert isinstance(space(space.class_vectors()), Condition)


def test_the_command(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditional().save(tmp_path / "m")
    model().save(tmp_path / "plain")
    words = ["synthesize", "class_noise", str(images), "--diffusion", str(tmp_path / "m"), "--out", str(tmp_path / "o")]
    words += ["--steps", "2", "--device", "cpu", "--precision", "fp32", "--scale", "0.5"]
    assert main([*words, "--count", "3"]) == 0
    assert "3 outliers, 3 new" in capsys.readouterr().out
    assert main([*words, "--count", "4", "--resume"]) == 0
    assert "4 outliers, 1 new" in capsys.readouterr().out
    folder = read_outliers(tmp_path / "o")
    assert (folder.images, folder.settings()["config"]["scale"]) == (4, 0.5)
    assert json.loads((tmp_path / "o" / "config.json").read_text())["farout"]["kind"] == "outliers"
    wrong: list[tuple[list[str], int, str]] = [
        ([*words], 1, "give --resume"),
        ([*words, "--resume", "--seed", "1"], 1, "seed: 0 before, 1 now"),
        ([*words, "--preset", "paper"], 2, "no flag --preset"),
        (["synthesize", "clas_noise", *words[2:]], 2, "no synthesizer 'clas_noise'; did you mean class_noise?"),
        (["synthesize", "--out", "o"], 2, "METHOD SOURCE --diffusion DIR --out DIR"),
        (["synthesize", "class_noise", str(images), "--out", "o"], 2, "missing --diffusion"),
    ]
    for given, status, message in wrong:
        assert main(given) == status
        assert message in capsys.readouterr().err
    words[4] = str(tmp_path / "plain")
    words[6] = str(tmp_path / "p")
    assert main(words) == 1
    assert "unconditional" in capsys.readouterr().err
    assert main(["synthesize", "--help"]) == 0
    assert "class_noise" in capsys.readouterr().out


def test_a_generator_whose_samples_are_not_recognized_causes_a_warning(images: Path, tmp_path: Path) -> None:
    """An untrained generator and an untrained classifier agree by chance only; the images are the same without it."""
    settings: dict[str, Any] = {"count": 3, "diffusion": conditional(), "runtime": CPU}
    with pytest.warns(MisleadingResultWarning, match=r"recognizes \d+% of the generator's own samples"):
        judged = ClassNoise(steps=2).synthesize(images, tmp_path / "judged", classifier=classifier(), **settings)
    plain = ClassNoise(steps=2).synthesize(images, tmp_path / "plain", **settings)
    assert judged.settings() == plain.settings()


def test_a_generator_is_checked_once_per_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for every call on a folder, and not for a refused call; another classifier checks again."""
    asked: list[str] = []
    monkeypatch.setattr(
        "farout.synthesis.generator_check.recognition_rate",
        lambda sampler, judge, names: asked.append(judge.content_hash) or 0.5,
    )
    first, second = classifier(), classifier().with_random_weights(1)
    settings: dict[str, Any] = {"count": 3, "diffusion": conditional(), "runtime": CPU}
    for judge, more in ((first, {}), (first, {"resume": True, "count": 5}), (second, {"resume": True})):
        with pytest.warns(MisleadingResultWarning, match="recognizes 50% of the generator's own samples"):
            ClassNoise(steps=2).synthesize(images, tmp_path / "o", classifier=judge, **{**settings, **more})
    with pytest.raises(StoreError, match="give --resume"):
        ClassNoise(steps=2).synthesize(images, tmp_path / "o", classifier=first, **settings)
    first.class_names = ("a", "b", "x")
    with pytest.raises(FaroutError, match="does not know c"):
        ClassNoise(steps=2).synthesize(images, tmp_path / "p", classifier=first, **settings)
    assert not (tmp_path / "p").exists()
    assert asked == [classifier().content_hash, second.content_hash]


@pytest.mark.filterwarnings("ignore:the classifier recognizes:farout.core.errors.MisleadingResultWarning")
def test_a_run_builds_its_sampler_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Sampler] = []
    original = Sampler.__post_init__
    monkeypatch.setattr(Sampler, "__post_init__", lambda self: built.append(self) or original(self))
    few = Runtime(device="cpu", precision="fp32", batch_size=1, workers=0)
    method = ClassNoise(steps=2)
    method.synthesize(images, tmp_path / "o", count=4, diffusion=conditional(), classifier=classifier(), runtime=few)
    assert len(built) == 1
    method.synthesize(images, tmp_path / "p", count=1, diffusion=conditional(b_scale=2.0), runtime=few)
    assert [each.model.b_scale for each in built] == [1.0, 2.0]


def test_recognition_rate_is_the_share_of_correct_predictions() -> None:
    """A classifier without class names has the classes in the same order; one that lacks a class is refused."""
    sampler = Sampler(conditional(), steps=2)
    judge, names = classifier(), ("a", "b", "c")
    predictions = judge.outputs(sampler.sample_images(range(10), [i % 3 for i in range(10)])).logits.argmax(1).tolist()
    expected_rate = sum(place == number % 3 for number, place in enumerate(predictions)) / 10
    assert recognition_rate(sampler, judge, names, 10) == expected_rate
    judge.class_names = ("a", "b", "d")
    with pytest.raises(FaroutError, match="does not know c"):
        recognition_rate(sampler, judge, names)
