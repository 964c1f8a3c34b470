"""Outliers edited with a tiny Stable Diffusion folder of random weights: classes and words as prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farout import SONA, SDEdit
from farout.cli import main
from farout.core.errors import FaroutError, MisleadingResultWarning, StoreError
from farout.diffusion.conditioning.prompt_contexts import PromptContexts
from farout.diffusion.conditioning.prompts import Prompts
from farout.diffusion.conditioning.text_encoder import TextEncoder
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from farout.synthesis.base import OutlierFolder, Synthesizer
from farout.synthesis.editing.prompt_config import PAPER_TEMPLATE, PromptConfig
from farout.synthesis.editing.targets import TargetSampler
from farout.synthesis.editing.words import filter_words, read_word_list
from small import CPU, conditional, in_order, pictures, stable_diffusion
from tolerances import SONA_SHARE, assert_close, assert_same_images, assert_same_manifests, assert_same_pixels

pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings(
        "ignore:.*native size:farout.core.errors.MisleadingResultWarning",
        "ignore:.* sampled images are gray:farout.core.errors.MisleadingResultWarning",
    ),
]

NAMES = ("cat", "dog", "the_kite")
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, Path]:
    """By the prediction type of their networks."""
    return {name: stable_diffusion(root / name, name) for name in PREDICTIONS}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["epsilon"]


@pytest.fixture(scope="module")
def images(root: Path) -> Path:
    for number, name in enumerate(NAMES):
        pictures(root / "labelled" / name, 3, seed=number)
    return root / "labelled"


@pytest.fixture(scope="module")
def words(root: Path) -> str:
    """Four valid words, one of them twice, and two that are named like classes."""
    path = root / "words.txt"
    path.write_text("bird\nCat\n\nsnow_leopard\nkite\n  tin  \nbird\nlion\n", encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def few(root: Path) -> str:
    """Two valid words."""
    (root / "few.txt").write_text("bird\nlion\n")
    return str(root / "few.txt")


def synthesize(images: Any, out: Path, method: Synthesizer, diffusion: Any, **settings: Any) -> OutlierFolder:
    return method.synthesize(images, out, diffusion=diffusion, **{"count": 4, "runtime": CPU, **settings})


def files(folder: OutlierFolder) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in (folder.folder / "images").rglob("*.png")}
    return {**found, "manifest.csv": (folder.folder / "manifest.csv").read_bytes()}


def pixels(folder: OutlierFolder) -> Tensor:
    return in_order(folder).float() / 255


def load_generator(folder: Path, **settings: Any) -> DiffusionModel:
    space = PromptContexts(TextEncoder.read(folder), NAMES, **settings)
    return DiffusionModel.load(folder, conditioning=space)


# -- synthesis --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:3 of the 7 words:farout.core.errors.MisleadingResultWarning")
@pytest.mark.parametrize(
    "prediction",
    ["epsilon", *(pytest.param(name, marks=pytest.mark.slow) for name in PREDICTIONS if name != "epsilon")],
)
def test_words_are_added_with_every_prediction_type(
    folders: dict[str, Path], images: Path, words: str, tmp_path: Path, prediction: str
) -> None:
    method = SONA(steps=5, k_min=3, words=words)
    with pytest.warns(
        MisleadingResultWarning, match=r"3 of the 7 words of .* \(bird, Cat, kite\): they occur twice, or have the same"
    ):
        whole = synthesize(images, tmp_path / "o", method, folders[prediction])
    manifest = whole.manifest()
    assert set(manifest["target"]) <= {"bird", "snow leopard", "tin", "lion"}
    assert manifest["target"].nunique() > 1
    assert set(manifest["template"]) == {PAPER_TEMPLATE}
    assert manifest["class_name"].tolist() == [*NAMES, "cat"]
    assert tuple(whole.source()[0].shape) == (3, 16, 16)
    parts = synthesize(images, tmp_path / "parts", method, folders[prediction], runtime=replace(CPU, batch_size=3))
    assert_same_images(parts.folder, whole.folder, SONA_SHARE)
    assert_same_manifests(parts.folder, whole.folder)


def test_the_baseline_gets_the_same_words(folder: Path, images: Path, few: str, tmp_path: Path) -> None:
    one = synthesize(images, tmp_path / "a", SONA(steps=6, words=few), folder).manifest()
    control = synthesize(images, tmp_path / "b", SDEdit(steps=6, guidance=7.5, words=few, targets="words"), folder)
    same = ["source", "target", "k", "level", "repeat", "template"]
    assert one[same].equals(control.manifest()[same])


def test_prompts_that_the_text_encoder_gets(
    folder: Path, images: Path, few: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt once, however many outliers use it; underscores are spaces, and the word table has precedence."""
    asked = list[str]()
    original = TextEncoder.__call__

    def watched(self: TextEncoder, prompts: Sequence[str]) -> Tensor:
        asked.extend(prompts)
        return original(self, prompts)

    monkeypatch.setattr(TextEncoder, "__call__", watched)
    synthesize(images, tmp_path / "o", SONA(steps=4, words=few), folder, count=20)
    classes = {"a photo of a cat", "a photo of a dog", "a photo of a the kite"}
    assert sorted(asked) == sorted({*classes, "a photo of a bird", "a photo of a lion", ""})
    asked.clear()
    method = SDEdit(steps=4, words=few, templates=("my {}", "one {} here"), class_words={"The Kite": "kite thing"})
    found = synthesize(images, tmp_path / "p", method, folder, count=20).manifest()
    assert sorted(asked) == sorted(set(asked))
    assert {"my kite thing", "one kite thing here", "my bird", "one lion here"} <= set(asked)
    assert set(found["template"]) == {"my {}", "one {} here"}


def test_class_and_target_use_the_same_template(folder: Path, few: str) -> None:
    model = load_generator(folder)
    templates = ("a {}", "the {}", "my {} here")
    draw = TargetSampler(model, range(3), "words", prompts=PromptConfig(few, templates))
    generator, seen = torch.Generator().manual_seed(0), set[str]()
    for turn in range(12):
        target = draw(turn % 3, generator)
        for name, condition in ((NAMES[turn % 3], target.class_condition), (target.name, target.condition)):
            wanted = model.conditioning.encoder([target.template.replace("{}", name)])
            assert_close(condition.tensors["encoder_hidden_states"], wanted)
        seen.add(target.template)
    assert seen == set(templates)


def test_words_change_images(folder: Path, images: Path, tmp_path: Path) -> None:
    """The random choices are the same; only the target and its prompt differ."""
    for name in ("bird", "snow leopard"):
        (tmp_path / f"{name}.txt").write_text(name)
    strong, bird = {"guidance": 30.0}, {"words": str(tmp_path / "bird.txt")}
    variants: tuple[dict[str, Any], ...] = (
        {**bird, **strong},
        {"words": str(tmp_path / "snow leopard.txt"), **strong},
        {**bird, "templates": ("{}",), **strong},
        {"targets": "none"},
    )
    found = [
        pixels(synthesize(images, tmp_path / f"o{number}", SDEdit(steps=6, k_min=5, **variant), folder, count=3))
        for number, variant in enumerate(variants)
    ]
    for number, one in enumerate(found):
        assert not any(torch.equal(one, other) for other in found[number + 1 :])


class Converted(nn.Module):
    """A network that predicts eps, answering in v or x0: z (B, C, H, W) and levels t (B,)."""

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, prediction: str) -> None:
        super().__init__()
        self.network, self.schedule, self.prediction = network, schedule, prediction
        self.config = network.config

    def forward(self, z: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        eps = self.network(z, t, **condition).sample
        signal = self.schedule.abar[t.long()].float()[:, None, None, None]
        clean = (z - (1 - signal).sqrt() * eps) / signal.sqrt()
        v = signal.sqrt() * eps - (1 - signal).sqrt() * clean
        return {"epsilon": eps, "v_prediction": v, "sample": clean}[self.prediction]


@pytest.mark.slow
def test_the_prediction_type_makes_no_difference(folder: Path, images: Path, few: str, tmp_path: Path) -> None:
    """One network that predicts eps, v or x0 gives the same outliers up to rounding."""
    found = []
    for prediction in PREDICTIONS:
        model = load_generator(folder)
        model.network, model.prediction = Converted(model.network, model.schedule, prediction), prediction
        found.append(pixels(synthesize(images, tmp_path / prediction, SONA(steps=6, k_min=4, words=few), model)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2 / 255, rtol=0)
    plain = synthesize(images, tmp_path / "plain", SDEdit(steps=6, k_min=4, words=few, guidance=0.0), folder)
    assert float((pixels(plain) - found[0]).abs().max()) > 5 / 255, "guided images differ by more"


def test_a_resumed_run_requires_the_same_words(folder: Path, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.txt"
    path.write_text("bird\nlion")
    method = SDEdit(steps=4, words=str(path))
    whole = synthesize(images, tmp_path / "whole", method, folder)
    synthesize(images, tmp_path / "o", method, folder, count=3)
    done = synthesize(images, tmp_path / "o", method, folder, resume=True)
    assert_same_images(done.folder, whole.folder)
    assert_same_manifests(done.folder, whole.folder)
    path.write_text("bird\ntin")
    with pytest.raises(StoreError, match=r"word_list: .* before"):
        synthesize(images, tmp_path / "o", method, folder, resume=True)


@pytest.mark.parametrize("targets", ["others", "mixtures", "none"])
def test_other_targets(folder: Path, images: Path, tmp_path: Path, targets: Any) -> None:
    found = synthesize(images, tmp_path / "o", SDEdit(steps=4, targets=targets), folder, count=3).manifest()
    mixed = ["dog + the_kite", "cat + the_kite", "cat + dog"]
    expected = {"mixtures": [[name] for name in mixed], "none": [[""]] * 3}
    others = [[name for name in NAMES if name != own] for own in NAMES]
    for name, allowed in zip(found["target"], expected.get(targets, others), strict=True):
        assert name in allowed


# -- words ------------------------------------------------------------------------------------------------------------


def test_lists_of_words(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffgreat white_shark\r\n\r\n newt \r\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("class,word,suffix\nn01,great,white shark\nn02,newt,\n")
    (tmp_path / "c.yaml").write_text("n01: great white shark\nn02: newt\n")
    for name in ("a.txt", "b.csv", "c.yaml"):
        assert read_word_list(str(tmp_path / name)) == ("great white shark", "newt")
    known = read_word_list("imagenet")
    assert len(set(known)) == 1000
    assert {"tench", "great white shark"} <= set(known)
    assert "assault rifle" not in filter_words(known, ["rifle"])


def test_the_nearest_words(folder: Path, words: str) -> None:
    """Compared with the outputs of the library at the end of each prompt."""
    import transformers

    model, said = load_generator(folder), ("bird", "snow leopard", "tin", "lion")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")

    def ends(names: Sequence[str]) -> Tensor:
        with torch.no_grad():
            rows = [encoder(tokenizer(f"my {name}", return_tensors="pt").input_ids) for name in names]
        return nn.functional.normalize(torch.stack([row.last_hidden_state[0, -1] for row in rows]), dim=1)

    order = (ends(NAMES) @ ends(said).T).argsort(1, descending=True)
    prompts = PromptConfig(words, ("my {}", PAPER_TEMPLATE), nearest=2)
    with pytest.warns(MisleadingResultWarning, match="not used as targets"):
        draw = TargetSampler(model, range(3), prompts=prompts)
    generator = torch.Generator().manual_seed(0)
    for label in range(3):
        drawn = {draw(label, generator).name for _ in range(20)}
        assert drawn == {said[place] for place in order[label, :2]}


def test_words_are_compared_with_names_and_words_of_classes(folder: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("big bird\nthe kite\nlion")
    method = SDEdit(steps=4, words=str(tmp_path / "w.txt"), class_words={"the kite": "bird"})
    with pytest.warns(MisleadingResultWarning, match=r"2 of the 3 words .* \(big bird, the kite\)"):
        found = synthesize(images, tmp_path / "o", method, folder, count=3)
    assert set(found.manifest()["target"]) == {"lion"}


# -- invalid inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "words"}, "targets 'words' requires words; give words=FILE"),
        ({"targets": "others", "words": "w.txt"}, "'others' and words 'w.txt' do not go together"),
        ({"target_classes": ("c",), "words": "w.txt"}, "target_classes c and words 'w.txt' do not go together"),
        ({"nearest": 3}, "nearest chooses among words"),
        ({"nearest": 0, "words": "w.txt"}, "nearest must be 1 or more, got 0"),
        ({"templates": ()}, "templates requires at least one"),
        ({"templates": ("a photo",)}, r"must contain \{\} once"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FaroutError, match=message):
        SONA(**settings)


def test_invalid_prompts_are_refused_before_anything_is_written(
    folder: Path, images: Path, few: str, tmp_path: Path
) -> None:
    (tmp_path / "known.txt").write_text("cat\nDOG\nkite\n")
    (tmp_path / "long.txt").write_text("bird\n" + "x" * 40)
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, r"knows no class without images; give words \(words=FILE"),
        ({"targets": "unseen"}, "no targets are left"),
        ({"words": str(tmp_path / "known.txt")}, r"all of the 3 words .* \(cat, DOG, kite\).*\(cat, dog, the_kite\)"),
        ({"words": str(tmp_path / "long.txt")}, "the text encoder accepts 32"),
        ({"words": few, "templates": ("x" * 40 + " {}",)}, "the text encoder accepts 32"),
        ({"words": few, "nearest": 3}, "nearest must be 1 to 2"),
        ({"words": few, "class_words": {"zebra": "zebra"}}, "has none of the classes cat, dog"),
        ({"words": few, "class_words": {"dog": "cat"}}, "'cat' and 'dog' are both 'cat'"),
    ]
    for settings, message in cases:
        with pytest.raises(FaroutError, match=message):
            synthesize(images, tmp_path / "o", SONA(steps=6, **settings), folder)
    assert not (tmp_path / "o").exists()


def test_unreadable_word_lists_are_refused_before_networks_are_loaded(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionModel, "load", None)
    (tmp_path / "empty.txt").write_text("\n_\n")
    for words, message in (("cifar100", "one word a line.* or imagenet; cifar100 cannot"), ("empty.txt", "is empty")):
        path = words if words == "cifar100" else str(tmp_path / words)
        with pytest.raises(FaroutError, match=message):
            synthesize(images, tmp_path / "o", SONA(words=path), folder)


def test_other_generators_refuse_words(folder: Path, few: str, tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        pictures(tmp_path / "letters" / name, 2, seed=number)
    cases: tuple[dict[str, Any], ...] = ({"words": few}, {"templates": ("{}",)}, {"class_words": {"a": "b"}})
    for settings in cases:
        with pytest.raises(
            FaroutError, match=rf"{next(iter(settings))}=.* would have no effect.* own classes \(class_vectors"
        ):
            synthesize(tmp_path / "letters", tmp_path / "o", SONA(steps=6, **settings), conditional())
    names, prompts = list("abc"), Prompts(vector="context")
    fixed = DiffusionModel.load(folder, class_names=names, prompts=prompts)
    with pytest.raises(FaroutError, match=r"words=.* would have no effect.*text_tokens"):
        synthesize(tmp_path / "letters", tmp_path / "o", SONA(steps=6, words=few), fixed)
    assert not (tmp_path / "o").exists()


# -- folders and the command ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_saved_generator_accepts_words(folder: Path, images: Path, few: str, tmp_path: Path) -> None:
    model = load_generator(folder, words=[("cat", ""), ("dog", ""), ("the", "kite")], template=PAPER_TEMPLATE)
    model.save(tmp_path / "m")
    saved = DiffusionModel.load(tmp_path / "m")
    assert saved.content_hash == model.content_hash
    assert saved.conditioning.describe() == model.conditioning.describe()
    vectors = model.conditioning.class_vectors()
    assert vectors.shape == (3, model.conditioning.dim)
    by_vector, by_label = (saved.conditioning(given) for given in (vectors, torch.arange(3)))
    assert torch.equal(*(each.tensors["encoder_hidden_states"] for each in (by_vector, by_label)))
    assert torch.equal(saved.conditioning.to_text_tokens().class_vectors(), vectors)
    method = SDEdit(steps=4, words=few)
    ways = [
        synthesize(images, tmp_path / f"o{n}", method, each) for n, each in enumerate((folder, tmp_path / "m", model))
    ]
    for way in ways[1:]:
        assert_same_images(way.folder, ways[0].folder)
        assert_same_manifests(way.folder, ways[0].folder)
    with pytest.raises(FaroutError, match=r"class_words=.* would have no effect"):
        synthesize(images, tmp_path / "p", SDEdit(words=few, class_words={"cat": "pet"}), tmp_path / "m")
    with pytest.raises(FaroutError, match="leave class_names and prompts out"):
        DiffusionModel.load(folder, class_names=NAMES, conditioning=model.conditioning)
    with pytest.raises(FaroutError, match="names its own classes"):
        DiffusionModel.load(tmp_path / "m", conditioning=model.conditioning)


def test_a_generator_with_token_vectors_accepts_words(folder: Path, images: Path, few: str, tmp_path: Path) -> None:
    """A folder that was saved for NCIS keeps its text encoder."""
    prompts = Prompts(words={"the kite": "kite"})
    DiffusionModel.load(folder, class_names=NAMES, prompts=prompts).save(tmp_path / "m")
    method = SDEdit(steps=4, words=few, class_words={"the kite": "kite"})
    whole = synthesize(images, tmp_path / "o", method, folder, count=3)
    other = synthesize(images, tmp_path / "p", SDEdit(steps=4, words=few), tmp_path / "m", count=3)
    assert_same_pixels(in_order(whole), in_order(other))


def test_the_command_takes_the_original_folder(
    folder: Path, images: Path, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the published settings except the number of images; the page shows the words."""
    (tmp_path / "called.csv").write_text("class,word,suffix\nthe kite,kite,thing\n")
    asked = ["synthesize", "sona", str(images), "--diffusion", str(folder), "--preset", "paper", "--words", words]
    asked += ["--templates", PAPER_TEMPLATE, "the {}", "--nearest", "2", "--class-words", str(tmp_path / "called.csv")]
    asked += ["--count", "3", "--k-min", "21", "--k-max", "24", "--device", "cpu"]
    assert main([*asked, "--out", str(tmp_path / "o")]) == 0, capsys.readouterr().err
    assert "warning: 3 of the 7 words" in capsys.readouterr().err
    found = OutlierFolder(tmp_path / "o", 3, 3, 3)
    settings = found.settings()
    assert settings["config"]["templates"] == [PAPER_TEMPLATE, "the {}"]
    assert (settings["config"]["steps"], settings["config"]["guidance.class_warmup"]) == (50, 10)
    page = (tmp_path / "o" / "page.html").read_text()
    for own, target in zip(found.manifest()["class_name"], found.manifest()["target"], strict=True):
        assert f"{own} to {target}," in page
    assert page.count('alt="regions of') == 3
    assert main([*asked[:7], "--out", str(tmp_path / "p")]) == 1
    assert "--words imagenet" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
