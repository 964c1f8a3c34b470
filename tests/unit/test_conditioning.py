"""Conditioning adapters: labels and vectors, the null condition, folders, guidance."""

import sys
from pathlib import Path

import diffusers
import pytest
import torch

from farout.core.errors import FaroutError, MissingExtraError, StoreError
from farout.diffusion.conditioning.base import Condition
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.conditioning.class_tokens import ClassTokens
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.denoiser import GuidedDenoiser
from farout.diffusion.model import DiffusionModel
from small import by_tokens, conditional, model, stable_diffusion, tiny_unet

pytestmark = pytest.mark.numerics


def test_a_label_means_its_vector() -> None:
    given = conditional()
    labels = torch.tensor([2, 0, 1])
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 1.0, 5.0])
    with torch.no_grad():
        by_label = given.denoiser()(x, sigma, given.conditioning(labels))
        by_vector = given.denoiser()(x, sigma, given.conditioning(given.conditioning.class_vectors()[labels]))
        by_number = given.denoiser()(x, sigma, Condition({"class_labels": labels}))
    assert torch.equal(by_label, by_vector)
    assert torch.equal(by_label, by_number), "the network itself looks numbers up, as diffusers' does"
    assert given.conditioning.class_vectors().shape == (3, given.conditioning.dim)


def test_gradients_in_the_vectors_are_those_of_finite_differences() -> None:
    given = conditional()
    given.network.double()
    network, vectors = given.network, given.conditioning.class_vectors()[:2].double()
    x, t = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([10.0, 500.0], dtype=torch.float64)

    def answer(v: torch.Tensor) -> torch.Tensor:
        return network(x, t, **given.conditioning(v).tensors).sample.square().mean()

    wanted = vectors.clone().requires_grad_()
    answer(wanted).backward()
    direction = torch.randn(vectors.shape, dtype=torch.float64)
    step = 1e-5
    difference = (answer(vectors + step * direction) - answer(vectors - step * direction)) / (2 * step)
    torch.testing.assert_close((wanted.grad * direction).sum(), difference.detach(), rtol=1e-5, atol=1e-10)
    assert float(wanted.grad.abs().max()) > 0


def test_the_null_condition_is_the_row_after_the_last_class() -> None:
    given = conditional(classes=2)
    null = given.conditioning.null_condition(3).tensors["class_labels"]
    assert torch.equal(null, given.network.class_embedding.weight[2].expand(3, -1))
    x, sigma = torch.randn(3, 1, 8, 8), torch.ones(3)
    with torch.no_grad():
        without = given.denoiser()(x, sigma)
        assert torch.equal(without, given.denoiser()(x, sigma, given.conditioning.null_condition(3)))


@pytest.mark.parametrize("labels", [torch.tensor([0, 3]), torch.tensor([-1])])
def test_labels_outside_the_table_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(FaroutError, match="0 to 2"):
        conditional().conditioning(labels)


def test_wrong_shapes_tables_and_networks_are_refused() -> None:
    given = conditional()
    with pytest.raises(FaroutError, match=r"\(B, 32\)"):
        given.conditioning(torch.randn(2, 5))
    with pytest.raises(FaroutError, match=r"\(B,\)"):
        given.conditioning(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(FaroutError, match="unconditional"):
        ClassVectors(tiny_unet(), ["a"], has_null=False)
    with pytest.raises(FaroutError, match="4 rows"):
        ClassVectors(tiny_unet(classes=3), ["a", "b"], has_null=True)
    with pytest.raises(FaroutError, match="more than once"):
        ClassVectors(tiny_unet(classes=3), ["a", "b", "a"], has_null=True)


def test_a_missing_null_condition_is_an_error() -> None:
    given = conditional()
    given.conditioning = ClassVectors(given.network, ["a", "b", "c", "d"], has_null=False)
    for call in (
        lambda: given.conditioning.null_condition(1),
        lambda: given.denoiser()(torch.randn(1, 1, 8, 8), torch.ones(1)),
    ):
        with pytest.raises(FaroutError, match="label_dropout"):
            call()


def test_guidance_calls_the_network_once_with_both_branches() -> None:
    given = conditional()
    calls = []
    given.network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    x, sigma, condition = torch.randn(3, 1, 8, 8), torch.ones(3), given.conditioning(torch.tensor([0, 1, 2]))
    denoiser = given.denoiser(batch_size=6)
    with torch.no_grad():
        plain = denoiser(x, sigma, condition)
        without = denoiser(x, sigma)
        calls.clear()
        assert torch.equal(GuidedDenoiser(denoiser, 1, given.conditioning.null_condition)(x, sigma, condition), plain)
        assert calls == [3]
        calls.clear()
        guided = GuidedDenoiser(denoiser, 3, given.conditioning.null_condition)(x, sigma, condition)
    assert calls == [6]
    torch.testing.assert_close(guided, without + 3 * (plain - without), rtol=1e-4, atol=1e-4)


def test_folders_keep_the_classes_and_diffusers_reads_them(tmp_path: Path) -> None:
    given = conditional()
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 1.0, 5.0]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        wanted = given.denoiser()(x, sigma, given.conditioning(labels))
    given.save(tmp_path / "m")
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.content_hash == given.content_hash
    assert loaded.conditioning.describe() == given.conditioning.describe()
    with torch.no_grad():
        assert torch.equal(loaded.denoiser()(x, sigma, loaded.conditioning(labels)), wanted)
    assert "3 (a, b, c)" in (tmp_path / "m" / "README.md").read_text()
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path / "m").unet
    t = given.schedule.t_of(sigma).float()
    with torch.no_grad():
        answer = theirs(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt(), t, class_labels=labels).sample
    torch.testing.assert_close(x - sigma.reshape(-1, 1, 1, 1) * answer, wanted, rtol=1e-4, atol=1e-4)


def test_classes_are_part_of_the_identity_and_of_the_control() -> None:
    given = conditional()
    other = conditional()
    other.conditioning = ClassVectors(other.network, ["x", "y", "z"], has_null=True)
    assert other.content_hash != given.content_hash
    control = given.with_random_weights(1)
    assert control.conditioning.class_names == given.conditioning.class_names
    assert torch.equal(control.conditioning.class_vectors(), control.network.class_embedding.weight[:3])
    assert not torch.equal(control.conditioning.class_vectors(), given.conditioning.class_vectors())
    assert given.gmacs == pytest.approx(model().gmacs, rel=0.01)


def test_class_tokens_keep_the_same_contract(tmp_path: Path) -> None:
    given = by_tokens()
    conditioning, labels = given.conditioning, torch.tensor([2, 0, 1])
    assert (conditioning.num_classes, conditioning.dim, conditioning.class_vectors().shape) == (3, 12, (3, 12))
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.3, 1.0, 5.0])
    with torch.no_grad():
        wanted = given.denoiser()(x, sigma, conditioning(labels))
        assert torch.equal(given.denoiser()(x, sigma, conditioning(conditioning.class_vectors()[labels])), wanted)
        null = given.denoiser()(x, sigma)
        guided = GuidedDenoiser(given.denoiser(), 3, conditioning.null_condition)(x, sigma, conditioning(labels))
    torch.testing.assert_close(guided, null + 3 * (wanted - null), rtol=1e-4, atol=1e-4)
    vectors = conditioning.class_vectors().requires_grad_()
    given.denoiser()(x, sigma, conditioning(vectors)).sum().backward()
    assert float(vectors.grad.abs().min()) > 0
    given.save(tmp_path / "m")
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.content_hash == given.content_hash
    with torch.no_grad():
        assert torch.equal(loaded.denoiser()(x, sigma, loaded.conditioning(labels)), wanted)
    diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "m" / "unet")
    assert given.gmacs > 0
    control = given.with_random_weights(1)
    assert not torch.equal(control.conditioning.class_vectors(), conditioning.class_vectors()), (
        "its table has learnt nothing"
    )
    (tmp_path / "m" / "conditioning.safetensors").unlink()
    with pytest.raises(StoreError, match="conditioning"):
        DiffusionModel.load(tmp_path / "m")


def test_a_table_is_part_of_the_identity() -> None:
    given, other = by_tokens(), by_tokens()
    other.conditioning = ClassTokens.create_random(["a", "b", "c"], 2, 6, has_null=True)
    assert given.content_hash != other.content_hash, "the tokens differ, the networks do not"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    return stable_diffusion(tmp_path_factory.mktemp("sd") / "model")


def test_class_names_become_prompts(folder: Path, tmp_path: Path) -> None:
    import transformers

    given = DiffusionModel.load(folder, class_names=["cat", "dog"])
    conditioning = given.conditioning
    assert (conditioning.class_names, conditioning.dim, conditioning.has_null) == (("cat", "dog"), 32 * 6, True)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    prompts = tokenizer(["An image of a dog", ""], padding="max_length", max_length=32, return_tensors="pt")
    with torch.no_grad():
        contexts = encoder(prompts.input_ids).last_hidden_state
    dog = conditioning(torch.tensor([1])).tensors["encoder_hidden_states"]
    torch.testing.assert_close(dog, contexts[:1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        conditioning.null_condition(1).tensors["encoder_hidden_states"], contexts[1:], atol=1e-6, rtol=1e-5
    )
    vectors = conditioning.class_vectors().requires_grad_()
    x = given.encode(torch.rand(2, 3, 16, 16))
    given.denoiser()(x, torch.ones(2), conditioning(vectors)).sum().backward()
    assert float(vectors.grad.abs().sum()) > 0
    given.save(tmp_path / "m")
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.content_hash == given.content_hash, "the contexts are kept; the text encoder is not needed any more"
    assert loaded.conditioning.describe()["template"] == "An image of a {}"
    assert torch.equal(given.with_random_weights().conditioning.class_vectors(), conditioning.class_vectors()), (
        "what it is told stays"
    )


def test_text_requires_names_a_template_and_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FaroutError, match=r"synthesize.*class_names="):
        DiffusionModel.load(folder)
    with pytest.raises(FaroutError, match=r"contain \{\} once"):
        DiffusionModel.load(folder, class_names=["cat", "dog"], prompts=Prompts("a photo"))
    with pytest.raises(FaroutError, match="accepts 32"):
        DiffusionModel.load(folder, class_names=["cat", "dog" * 20])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"farout\[text\]"):
        DiffusionModel.load(folder, class_names=["cat", "dog"])


def test_a_broken_text_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "m")
    config = tmp_path / "m" / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace("CLIPTextModel", "EvilModel"))
    with pytest.raises(StoreError, match="EvilModel"):
        DiffusionModel.load(tmp_path / "m", class_names=["cat", "dog"])


def test_a_foreign_class_conditional_folder(tmp_path: Path) -> None:
    """Nothing says whether its last row means none, so there is no null condition."""
    tiny_unet(classes=3).save_pretrained(tmp_path / "m" / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "m" / "scheduler")
    foreign = DiffusionModel.load(tmp_path / "m").conditioning
    assert (foreign.class_names, foreign.has_null) == (("0", "1", "2", "3"), False)
    assert DiffusionModel.load(tmp_path / "m", class_names=["x", "y", "z"]).conditioning.num_classes == 3
    with pytest.raises(FaroutError, match="4 rows"):
        DiffusionModel.load(tmp_path / "m", class_names=["x", "y"])
    with pytest.raises(FaroutError, match="no text encoder"):
        DiffusionModel.load(tmp_path / "m", prompts=Prompts())


def test_names_where_they_have_no_use(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "theirs" / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "theirs" / "scheduler")
    with pytest.raises(FaroutError, match="unconditional"):
        DiffusionModel.load(tmp_path / "theirs", class_names=["a", "b"])
    conditional().save(tmp_path / "ours")
    with pytest.raises(FaroutError, match="its own classes"):
        DiffusionModel.load(tmp_path / "ours", class_names=["a", "b", "c"])
