"""Classes as one token of a prompt: what is exchanged, where it stands, and what it is called."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError, StoreError
from farout.diffusion.conditioning.prompt_tokens import PromptTokens
from farout.diffusion.conditioning.prompts import Prompts, Word, read_word_table, resolve_class_words
from farout.diffusion.conditioning.text_encoder import TextEncoder
from farout.diffusion.model import DiffusionModel
from small import stable_diffusion
from tolerances import assert_close

pytest.importorskip("transformers")

pytestmark = pytest.mark.numerics

NAMES = ("cat", "dog", "the kite")
WORDS = {"the kite": "kite bird"}
LABELS = torch.tensor([2, 0, 1, 2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.read(folder)


def tokens(encoder: TextEncoder, **settings: Any) -> PromptTokens:
    return PromptTokens(encoder, NAMES, resolve_class_words(NAMES, WORDS), **settings)


def plain(folder: Path, prompts: list[str]) -> Tensor:
    """What transformers answers."""
    import transformers

    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    numbers = tokenizer(prompts, padding="max_length", max_length=32, return_tensors="pt").input_ids
    with torch.no_grad():
        return encoder(numbers).last_hidden_state


def context(condition: Any) -> Tensor:
    return condition.tensors["encoder_hidden_states"]


# -- the token --------------------------------------------------------------------------------------------------------


def test_its_own_vector_gives_the_plain_encoders_answer(folder: Path, encoder: TextEncoder) -> None:
    space = tokens(encoder)
    prompts = ["An image of a cat", "An image of a dog", "An image of a kite bird", ""]
    assert space.prompts == tuple(prompts[:3])
    wanted = plain(folder, prompts)
    by_label, by_vector = space(LABELS), space(space.class_vectors()[LABELS], LABELS)
    assert torch.equal(context(by_label), context(by_vector))
    torch.testing.assert_close(context(by_label), wanted[LABELS], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(context(space.null_condition(2)), wanted[[3, 3]], atol=1e-6, rtol=1e-5)
    assert (space.num_classes, space.dim, space.class_vectors().shape) == (3, 6, (3, 6))
    own = encoder.tokenizer.convert_tokens_to_ids(["cat</w>", "dog</w>", "kite</w>"])
    assert torch.equal(space.class_vectors(), encoder.module.get_input_embeddings().weight[own])


def test_only_the_chosen_token_changes(encoder: TextEncoder) -> None:
    """What goes into the encoder's layers differs in one place alone, that of the name; positions stay."""
    space, seen = tokens(encoder), list[Tensor]()
    inputs = next(part for name, part in encoder.module.named_modules() if name.endswith("embeddings"))
    handle = inputs.register_forward_hook(lambda *given: seen.append(given[-1].detach()[:4]))
    vectors = space.class_vectors()[LABELS] + 1
    first = context(space(LABELS))
    second = context(space(vectors, LABELS))
    handle.remove()
    places = torch.tensor([11, 11, 11, 11])  # the start, then letters: an image of a
    pieces = encoder.token_strings(encoder.token_ids(space.prompts[2]))
    assert pieces[10:] == ["kite</w>", "bird</w>"]
    difference = seen[1] - seen[0]
    torch.testing.assert_close(difference[torch.arange(4), places], torch.ones(4, 6))
    difference[torch.arange(4), places] = 0
    assert not bool(difference.any())
    assert_close(first[:, :11], second[:, :11])  # the mask is causal
    assert bool((first[:, 11:] != second[:, 11:]).any(-1).all())


def test_gradients_reach_the_vectors_and_no_weight(folder: Path, encoder: TextEncoder) -> None:
    space = tokens(encoder)
    given = DiffusionModel.load(folder, class_names=NAMES, prompts=Prompts(words=WORDS))
    vectors = space.class_vectors()[LABELS].requires_grad_()
    x = given.encode(torch.rand(4, 3, 16, 16))
    given.denoiser()(x, torch.ones(4), given.conditioning(vectors, LABELS)).square().sum().backward()
    assert bool((vectors.grad.abs().sum(1) > 0).all())
    weights = list(given.conditioning.encoder.module.parameters())
    assert not any(value.requires_grad or value.grad is not None for value in weights)
    direction = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def summed(vectors: Tensor) -> Tensor:
        return context(space(vectors, LABELS))[:, :, 0].double().square().sum()

    wanted = space.class_vectors()[LABELS].requires_grad_()
    summed(wanted).backward()
    with torch.no_grad():
        step = 3e-4  # of vectors whose entries are about 0.02
        difference = (summed(wanted + step * direction) - summed(wanted - step * direction)) / (2 * step)
    torch.testing.assert_close((wanted.grad * direction).sum().double(), difference, rtol=1e-2, atol=0)


def test_contexts_do_not_depend_on_batch_or_precision(encoder: TextEncoder) -> None:
    space = tokens(encoder)
    labels = torch.arange(21) % 3
    vectors = space.class_vectors()[labels] + 0.01 * torch.randn(21, 6, generator=torch.Generator().manual_seed(0))
    whole = context(space(vectors, labels))
    for some in ([0], [4, 20, 7], list(range(9))):
        assert_close(context(space(vectors[some], labels[some])), whole[some])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(context(space(vectors, labels)), whole)


def test_a_text_encoder_stored_in_half_precision_computes_in_float32(folder: Path, tmp_path: Path) -> None:
    import transformers

    encoder = TextEncoder.read(folder)
    encoder.write(tmp_path / "half")
    half = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").half()
    half.save_pretrained(tmp_path / "half" / "text_encoder")
    read = TextEncoder.read(tmp_path / "half")
    assert all(value.dtype == torch.float32 for value in read.module.parameters())
    found = context(tokens(read)(LABELS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, context(tokens(encoder)(LABELS)), atol=0.02, rtol=0.02)


def test_vectors_want_the_labels_of_their_prompts(encoder: TextEncoder) -> None:
    space = tokens(encoder)
    vectors = space.class_vectors()
    with pytest.raises(FaroutError, match="give labels with the vectors"):
        space(vectors)
    with pytest.raises(FaroutError, match="3 class vectors require a label each, got 4"):
        space(vectors, LABELS)
    with pytest.raises(FaroutError, match="0 to 2"):
        space(vectors, torch.tensor([0, 1, 3]))
    with pytest.raises(FaroutError, match=r"\(B, 6\)"):
        space(vectors[:, :4], torch.arange(3))
    with pytest.raises(FaroutError, match="3 classes require a word each, got 1"):
        PromptTokens(encoder, NAMES, [("cat", "")])
    apart = context(space(vectors[[2, 2]], torch.tensor([0, 2])))
    assert not torch.equal(*apart), "one vector in two prompts"


# -- names and prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "words", "template", "message"),
    [
        (["cat", "big dog"], None, "a {}", r"'big dog' requires .* are 3 tokens \(bi, g</w>, dog</w>\); give a table"),
        (["cat", "x dog"], {"x dog": "dogs kite"}, "a {}", r"'x dog' requires .* 'dogs' are 3 tokens"),
        (["cat", "?"], None, "a {}", r"'\?' requires .* '\?' the tokenizer lacks"),
        (
            ["dog", "cat"],
            None,
            "an image of a{}",
            r"class 'dog' \(dog</w>\) is not at the position of .* prompt 'an image of adog'",
        ),
        (["dog", "cat"], None, "{}s", r"class 'dog' .* prompt 'dogs'.*put spaces"),
        (["dog", "cat"], None, "a {} and a {}", r"must contain \{\} once"),
        (["dog", "cat"], None, "a" + " b" * 40 + " {}", "the text encoder accepts 32"),
        (["cat", "dog", "cat"], None, "a {}", "more than once"),
    ],
)
def test_what_is_no_prompt_names_class_and_prompt(
    encoder: TextEncoder, names: list[str], words: Mapping[str, str] | None, template: str, message: str
) -> None:
    with pytest.raises(FaroutError, match=message):
        PromptTokens(encoder, names, resolve_class_words(names, words), template)


def test_the_first_piece_of_a_split_word(folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    """As published, where asked for; a name of several words stays refused."""
    given = DiffusionModel.load(folder, class_names=["dogs", "cat"], prompts=Prompts(split_words="first_token"))
    space = given.conditioning
    own = encoder.tokenizer.convert_tokens_to_ids(["do", "cat</w>"])
    assert torch.equal(space.class_vectors(), encoder.module.get_input_embeddings().weight[own])
    wanted = plain(folder, ["An image of a dogs", "An image of a cat"])
    found = context(space(space.class_vectors(), torch.arange(2)))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert space.with_template("the {}").split_words == "first_token"
    given.save(tmp_path / "m")
    assert DiffusionModel.load(tmp_path / "m").content_hash == given.content_hash
    for name in ("big dog", "big_dog", "big-dog"):
        with pytest.raises(FaroutError, match=f"'{name}' requires a name of one token"):
            PromptTokens(encoder, [name, "cat"], split_words="first_token")


def test_tables_of_words(tmp_path: Path) -> None:
    names = ("aquarium_fish", "Kite", "cat")
    wanted = (Word("fish"), Word("kite", "flying bird"), Word("cat"))
    (tmp_path / "t.csv").write_text("class,word,suffix\nAquarium-Fish,fish,\nkite,kite,flying bird\nzebra,zebra\n")
    (tmp_path / "t.yaml").write_text("aquarium fish: fish\nkite: kite flying bird\n")
    tables = ({"aquarium fish": "fish", "kite": "kite flying bird"}, tmp_path / "t.csv", tmp_path / "t.yaml")
    for table in tables:
        assert resolve_class_words(names, table if isinstance(table, dict) else str(table)) == wanted
    assert resolve_class_words(("aquarium_fish", "maple_tree", "cat"), "cifar100") == (
        Word("fish"),
        Word("maple"),
        Word("cat"),
    )
    assert len(read_word_table("cifar100")) == 13
    assert resolve_class_words(names) == tuple(Word(name) for name in names)
    assert wanted[1].prompt("A {}!") == "A kite flying bird!"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("t.csv", "name,word\na,b\n", "requires the columns class, word"),
        ("t.csv", "class,word\na,b c\n", "one word for each class"),
        ("t.csv", "class,word\ncat\n", "one word for each class"),
        ("t.yaml", "- a\n- b\n", "got a list"),
        ("t.yaml", "a: [\n", "not valid YAML"),
        ("t.yaml", "cat: 3\n", "requires a word for a class, got 'cat': 3"),
        ("t.yaml", "big cat: a\nbig_cat: b\n", "'big_cat' twice"),
        ("t.yaml", "zebra: zebra\n", "has none of the classes cat, dog"),
        ("t.yaml", "cat: pet\ndog: Pet\n", "'cat' and 'dog' are both 'Pet'"),
        ("t.txt", "", r"\.csv or \.yaml, or one of cifar100"),
        ("no.csv", None, "cannot be read"),
    ],
)
def test_tables_that_say_nothing_are_refused(tmp_path: Path, file: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / file).write_text(text)
    with pytest.raises(FaroutError, match=message):
        resolve_class_words(("cat", "dog"), str(tmp_path / file))


def test_settings_of_prompts_are_checked() -> None:
    wrong: list[tuple[Callable[[], Prompts], str]] = [
        (lambda: Prompts("an image"), r"contain \{\} once"),
        (lambda: Prompts(generation="{} {}"), r"contain \{\} once"),
        (lambda: Prompts(vector="pooled"), "vector must be"),
        (lambda: Prompts(vector="context", generation="the {}"), "leave it out"),
        (lambda: Prompts(context_noise=-1), "0 or more"),
        (lambda: Prompts(split_words="last"), "'raise' or 'first_token'"),
    ]
    for call, message in wrong:
        with pytest.raises(FaroutError, match=message):
            call()
    assert Prompts().changed == ()
    assert Prompts(words="cifar100", context_noise=0.1).changed == ("words", "context_noise")


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_saved_model_keeps_its_text_encoder(folder: Path, tmp_path: Path) -> None:
    given = DiffusionModel.load(folder, class_names=NAMES, prompts=Prompts(words=WORDS, template="the {}"))
    assert isinstance(given.conditioning, PromptTokens)
    given.save(tmp_path / "m")
    loaded = DiffusionModel.load(tmp_path / "m")
    assert loaded.content_hash == given.content_hash
    assert loaded.conditioning.describe() == given.conditioning.describe()
    assert loaded.preprocessing == given.preprocessing
    vectors = given.conditioning.class_vectors()[LABELS] + 0.1
    assert torch.equal(context(loaded.conditioning(vectors, LABELS)), context(given.conditioning(vectors, LABELS)))
    other = DiffusionModel.load(folder, class_names=NAMES, prompts=Prompts(words=WORDS))
    assert other.content_hash != given.content_hash, "another template"
    with torch.no_grad():
        next(other.conditioning.encoder.module.parameters())[0] += 1
    other.conditioning.encoder.write(tmp_path / "m")
    store.write_folder_hashes(tmp_path / "m")
    with pytest.raises(StoreError, match="hash differs"):
        DiffusionModel.load(tmp_path / "m")


def test_what_else_a_conditioning_offers(folder: Path) -> None:
    given = DiffusionModel.load(folder, class_names=NAMES, prompts=Prompts(words=WORDS))
    space = given.conditioning
    contexts = DiffusionModel.load(folder, class_names=NAMES, prompts=Prompts(words=WORDS, vector="context"))
    assert given.gmacs == contexts.gmacs > 0
    torch.testing.assert_close(
        space.to_text_tokens().class_vectors(), contexts.conditioning.class_vectors(), atol=1e-6, rtol=1e-5
    )
    assert torch.equal(given.with_random_weights().conditioning.class_vectors(), space.class_vectors()), (
        "what it is told stays"
    )
    trained = space.trainable_module(given.network)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), torch.tensor([1, 3])
    told = torch.cat([context(space(labels[:1])), context(space.null_condition(1))])
    with torch.no_grad():
        wanted = given.network(x, t, encoder_hidden_states=told).sample
        torch.testing.assert_close(trained(x, t, class_labels=labels).sample, wanted)
    elsewhere = space.with_template("A high-quality image of the {}")
    assert elsewhere.prompts[2] == "A high-quality image of the kite bird"
    assert torch.equal(elsewhere.class_vectors(), space.class_vectors())
    assert not torch.equal(context(elsewhere(LABELS)), context(space(LABELS)))
    assert given.with_conditioning(elsewhere).network is given.network
    assert given.conditioning is space


def test_two_text_encoders_are_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "xl")
    (tmp_path / "xl" / "text_encoder_2").mkdir()
    with pytest.raises(StoreError, match="two text encoders"):
        DiffusionModel.load(tmp_path / "xl", class_names=["cat", "dog"])
