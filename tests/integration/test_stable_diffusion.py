"""NCIS and its stages with a tiny Stable Diffusion folder of random weights."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from farout import NCIS, ClassNoise, read_outliers, reconstruct
from farout.cli import main
from farout.core.errors import FaroutError
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sampling import Sampler
from farout.synthesis.class_space import class_table_std, decode_vectors
from farout.synthesis.ncis.inversion import InversionConfig, Inverter, read_embeddings
from farout.synthesis.ncis.manifold import ManifoldConfig
from small import CPU, conditional, in_order, pictures, stable_diffusion
from tolerances import GRAY_LEVELS, assert_close, assert_same_images, assert_same_manifests, assert_same_pixels

pytest.importorskip("transformers")
pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore::farout.core.errors.TooFewImagesWarning")]

SMALL = ManifoldConfig(layers=2, steps=4, validations=1, candidates=20, kept=2)
FEW = InversionConfig(steps=2, draws=4, lr_scale=0.7)
LABELS = torch.tensor([2, 0, 1, 0])
NAMES, WORDS = ("cat", "dog", "the kite"), {"the kite": "kite bird"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By the prediction type of their networks."""
    root = tmp_path_factory.mktemp("sd")
    return {name: stable_diffusion(root / name, name) for name in ("epsilon", "v_prediction")}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog", "the kite")):
        pictures(tmp_path / "labelled" / name, 4, seed=number)
    return tmp_path / "labelled"


def loaded(folder: Path, **prompts: Any) -> DiffusionModel:
    return DiffusionModel.load(folder, class_names=NAMES, prompts=Prompts(words=WORDS, **prompts))


def latents(network: DiffusionModel) -> torch.Tensor:
    return network.encode(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


# -- inversion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_batch_gives_the_vectors_of_each_image_alone(folders: dict[str, Path], prediction: str) -> None:
    """The published loop, written out with the libraries' own calls; classes have different prompts."""
    network = loaded(folders[prediction])
    assert network.prediction == prediction
    space, x0, keys = network.conditioning, latents(network), ["a", "b", "c", "d"]
    inverter = Inverter(network, FEW, 0, CPU)
    vectors, losses = inverter(x0, LABELS, keys)
    levels, encoder = FEW.timesteps(network.schedule), space.encoder
    embedding = encoder.module.get_input_embeddings()
    for place, label in enumerate(LABELS.tolist()):
        vector = space.class_vectors()[label].clone().requires_grad_()
        optimizer = torch.optim.Adam([vector], lr=FEW.learning_rate(space))
        numbers = encoder.tokenize([space.prompts[label]])
        for step in range(FEW.steps):
            places, noise = FEW.sample_noise(keys[place], x0.shape[1:], step, 0)
            abar = network.schedule.abar[levels[places]].float().reshape(-1, 1, 1, 1)
            noisy = abar.sqrt() * x0[place] + (1 - abar).sqrt() * noise
            put = embedding.register_forward_hook(
                lambda _m, _i, out, vector=vector: torch.cat([out[:, :11], vector[None, None], out[:, 12:]], 1)
            )
            told = encoder.module(numbers).last_hidden_state
            put.remove()
            answer = network.network(noisy, levels[places], encoder_hidden_states=told.expand(4, -1, -1)).sample
            target = noise if prediction == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * x0[place]
            loss = (answer - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            torch.testing.assert_close(losses[place, step], loss.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(vectors[place], vector.detach(), rtol=1e-4, atol=1e-4)


def test_batches_and_parts_of_the_draws_change_little(folders: dict[str, Path]) -> None:
    network = loaded(folders["epsilon"])
    x0, keys = latents(network), ["a", "b", "c", "d"]
    inverter = Inverter(network, FEW, 0, CPU)
    whole, losses = inverter(x0, LABELS, keys)
    for some in ([1], [3, 0]):
        vectors, loss = inverter(x0[some], LABELS[some], [keys[place] for place in some])
        # Adam's first step has the same length for a gradient near zero, whose sign depends on rounding
        near = (vectors - whole[some]).abs() < 1e-3 * class_table_std(network.conditioning)
        assert float(near.float().mean()) > 0.97
        assert_close(loss, losses[some])
    parts = Inverter(network, replace(FEW, pull=2.0), 0, replace(CPU, batch_size=3))
    one = Inverter(network, replace(FEW, pull=2.0), 0, CPU)
    start = network.conditioning.class_vectors()[LABELS]
    for found, wanted in zip(
        parts.loss_and_gradient(x0, start + 0.1, start, keys, 0, LABELS),
        one.loss_and_gradient(x0, start + 0.1, start, keys, 0, LABELS),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_autoencoder_encodes_an_image_once(
    folders: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[int]()
    original = DiffusionModel.encode
    monkeypatch.setattr(
        DiffusionModel, "encode", lambda self, rows, noise=None: seen.append(len(rows)) or original(self, rows, noise)
    )
    method = NCIS(inversion=FEW, manifold=SMALL, prompts=Prompts(words=WORDS))
    method.synthesize(images, tmp_path / "o", diffusion=folders["epsilon"], runtime=CPU, stage="embed")
    assert sum(seen) == 12


# -- synthesis --------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (folder / "images").rglob("*.png")}
    return {**found, "manifest.csv": (folder / "manifest.csv").read_bytes()}


@pytest.mark.slow
def test_the_command_takes_the_original_folder(
    folders: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All four stages one by one, in batches of another size, and resumed, agree with one run."""
    (tmp_path / "words.csv").write_text("class,word,suffix\nthe kite,kite,bird\n")
    words = ["synthesize", "ncis", str(images), "--diffusion", str(folders["epsilon"]), "--device", "cpu"]
    words += ["--precision", "fp32", "--prompts.words", str(tmp_path / "words.csv")]
    words += ["--prompts.template", "a {}", "--prompts.generation", "the {}", "--inversion.draws", "4"]
    words += ["--inversion.steps", "1", "--manifold.layers", "2", "--manifold.steps", "4", "--steps", "2"]
    words += ["--guidance", "7.5"]
    one, parts = tmp_path / "one", tmp_path / "parts"
    assert main([*words, "--out", str(one), "--count", "7"]) == 0, capsys.readouterr().err
    for stage in ("embed", "sample"):
        done = [*words, "--out", str(parts), "--stage", stage, "--batch-size", "3", "--resume"]
        assert main([*done, "--count", "4"]) == 0, capsys.readouterr().err
    for count, size in (("4", "1"), ("7", "2")):
        done = [*words, "--out", str(parts), "--count", count, "--batch-size", size, "--resume"]
        assert main(done) == 0, capsys.readouterr().err
    assert_same_images(parts, one)
    assert_same_manifests(parts, one)
    made = read_outliers(one)
    assert made.images == 7
    assert read_embeddings(one / "embeddings").vectors.shape == (12, 6)
    assert load_file(one / "samples.safetensors")["vectors"].shape[1] == 6
    assert tuple(made.source()[0].shape) == (3, 16, 16)
    assert made.manifest()["class_name"].tolist() == ["cat", "dog", "the kite"] * 2 + ["cat"]
    assert made.settings()["config"]["prompts.generation"] == "the {}"
    assert main([*words, "--out", str(one), "--count", "8", "--resume", "--prompts.generation", "a {}"]) == 1
    assert "prompts.generation: the {} before, a {} now" in capsys.readouterr().err


def test_a_folder_that_predicts_v(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    method = NCIS(inversion=replace(FEW, steps=1), manifold=SMALL, steps=2, prompts=Prompts(words=WORDS))
    made = method.synthesize(images, tmp_path / "o", diffusion=folders["v_prediction"], count=4, runtime=CPU)
    assert made.images == 4


def test_names_of_several_tokens_are_refused_before_anything_is_written(
    folders: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["synthesize", "ncis", str(images), "--diffusion", str(folders["epsilon"]), "--out", str(tmp_path / "o")]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert "'the kite' requires a name of one token" in told
    assert "--prompts.words FILE" in told
    assert main([*words, "--prompts.generation", "a{}", "--prompts.words", '{"the kite": "kite"}']) == 1
    assert "prompt 'acat'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_contexts_accept_any_name(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    manifold = replace(SMALL, orthogonal_map="cayley")
    method = NCIS(inversion=replace(FEW, steps=1), manifold=manifold, steps=2, prompts=Prompts(vector="context"))
    given: dict[str, Any] = {"count": 3, "runtime": CPU}
    made = method.synthesize(images, tmp_path / "o", diffusion=folders["epsilon"], **given)
    assert load_file(tmp_path / "o" / "samples.safetensors")["vectors"].shape[1] == 32 * 6
    assert made.images == 3


def test_other_generators_refuse_prompts(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        pictures(tmp_path / "letters" / name, 2, seed=number)
    given: dict[str, Any] = {"count": 3, "runtime": CPU}
    for prompts, message in (
        (Prompts("a {}"), r"prompts.template='a \{\}' would have no effect.*class_vectors"),
        (NCIS.from_preset("paper").prompts, r"--prompts.generation None --prompts.split-words raise"),
    ):
        with pytest.raises(FaroutError, match=message):
            ClassNoise(steps=2, prompts=prompts).synthesize(
                tmp_path / "letters", tmp_path / "o", diffusion=conditional(), **given
            )
    assert not (tmp_path / "o").exists()
    network = loaded(folders["epsilon"])
    with pytest.raises(FaroutError, match=r"prompts.words="):
        ClassNoise(prompts=Prompts(words=WORDS)).synthesize(images, tmp_path / "o", diffusion=network, **given)
    network.save(tmp_path / "saved")
    generation = ClassNoise(steps=2, prompts=Prompts(generation="the {}"))
    for number, diffusion in enumerate((network, tmp_path / "saved")):
        generation.synthesize(images, tmp_path / f"o{number}", diffusion=diffusion, **given)
    assert files(tmp_path / "o0") == files(tmp_path / "o1")


# -- generation -------------------------------------------------------------------------------------------------------


def test_the_papers_preset_has_two_templates(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    paper = NCIS.from_preset("paper")
    assert paper.prompts == Prompts("An image of a {}", "A high-quality image of the {}", split_words="first_token")
    few = {"inversion": replace(paper.inversion, steps=1, draws=2), "manifold": SMALL, "solver": "ddim", "steps": 2}
    prompts = replace(paper.prompts, words=WORDS)
    method, seen = NCIS.from_preset("paper", **few, prompts=prompts), list[str]()
    original = method.sampler

    def watched(work: Any) -> Any:
        sampler = original(work)
        assert work.generator.conditioning.template == "An image of a {}"
        seen.append(sampler.model.conditioning.template)
        return sampler

    method.sampler = watched  # type: ignore[method-assign]
    method.synthesize(images, tmp_path / "o", diffusion=folders["epsilon"], count=2, runtime=CPU)
    assert set(seen) == {"A high-quality image of the {}"}


def test_a_class_vector_gives_the_samples_of_its_class(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    network = loaded(folders["epsilon"])
    given: dict[str, Any] = {"count": 4, "runtime": CPU}
    method = ClassNoise(scale=0, steps=2, prompts=Prompts(words=WORDS))
    made = method.synthesize(images, tmp_path / "o", diffusion=folders["epsilon"], **given)
    sampler = Sampler(network, steps=2, guidance=2.0)
    labels, indices = [0, 1, 2, 0], range(4)
    samples = sampler.sample_images(indices, labels)
    assert_close(decode_vectors(sampler, network.conditioning.class_vectors()[labels], indices, labels), samples)
    assert_same_pixels(in_order(made), (samples * 255).round().to(torch.uint8))


def test_another_size_of_the_autoencoders_steps(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    """Images of 16 x 16 with latents of half that size, which the network halves again: 22 gives 11, padded to 12."""
    given: dict[str, Any] = {"diffusion": folders["epsilon"], "count": 3, "runtime": CPU}
    prompts = Prompts(words=WORDS)
    for size in (24, 22):
        made = ClassNoise(steps=2, size=size, prompts=prompts).synthesize(images, tmp_path / f"o{size}", **given)
        assert {tuple(image.shape) for image in made.source()} == {(3, size, size)}
    with pytest.raises(FaroutError, match=r"autoencoder downsamples images by 2.*got 21"):
        ClassNoise(steps=2, size=21, prompts=prompts).synthesize(images, tmp_path / "odd", **given)
    assert not (tmp_path / "odd").exists()


def test_noise_on_contexts_depends_on_the_image(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:

    def made(name: str, noise: float, count: int, size: int) -> torch.Tensor:
        method = ClassNoise(scale=0, steps=2, prompts=Prompts(words=WORDS, context_noise=noise))
        runtime = replace(CPU, batch_size=size)
        given: dict[str, Any] = {"diffusion": folders["epsilon"], "count": count, "runtime": runtime}
        return in_order(method.synthesize(images, tmp_path / name, **given))

    without, some, more = made("a", 0, 4, 4), made("b", 0.5, 2, 2), made("c", 0.5, 4, 3)
    assert_same_pixels(some, more[:2])
    assert int((some.int() - without[:2].int()).abs().max()) > GRAY_LEVELS


def test_images_are_reconstructed_under_prompts_of_their_classes(
    folders: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the original folder, from a model loaded with class names, and under the empty prompt."""
    words = ["--diffusion", str(folders["epsilon"]), "--steps", "2", "--device", "cpu", "--precision", "fp32"]
    assert main(["reconstruct", str(images), *words, "--out", str(tmp_path / "o")]) == 0, capsys.readouterr().err
    network = DiffusionModel.load(folders["epsilon"], class_names=NAMES)
    reconstruct(images, network, tmp_path / "told", steps=2, runtime=CPU)
    assert_same_images(tmp_path / "o", tmp_path / "told")
    assert_same_manifests(tmp_path / "o", tmp_path / "told")
    assert len(files(tmp_path / "o")) == 12 + 1
    for name, source in (("null", images), ("bare", images / "cat")):
        done = ["reconstruct", str(source), *words, "--no-classes", "--out", str(tmp_path / name)]
        assert main(done) == 0, capsys.readouterr().err
    assert files(tmp_path / "null") != files(tmp_path / "o")
    assert len(files(tmp_path / "bare")) == 4 + 1
    assert main(["reconstruct", str(images / "cat"), *words, "--out", str(tmp_path / "x")]) == 1
    assert "has no labels" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_an_error(folders: dict[str, Path], images: Path, tmp_path: Path) -> None:
    shutil.copytree(folders["epsilon"], tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "tokenizer")
    with pytest.raises(FaroutError, match=r"tokenizer of .* cannot be read"):
        NCIS(prompts=Prompts(words=WORDS)).synthesize(images, tmp_path / "o", diffusion=tmp_path / "m", runtime=CPU)
