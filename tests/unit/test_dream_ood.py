"""Dream-OOD: the boundary of a class, classifiers towards class vectors, the stages' files, and the command."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from farout import DreamOOD
from farout.classifiers.config import ClassifierConfig
from farout.classifiers.model import Classifier
from farout.classifiers.networks import NetworkSpec
from farout.cli import main
from farout.cli.command_parser import parse
from farout.core import store
from farout.core.errors import FaroutError, MisleadingResultWarning, StoreError, TooFewImagesWarning
from farout.core.runtime import Runtime
from farout.diffusion.model import DiffusionModel
from farout.synthesis import SYNTHESIZERS, dream_ood
from farout.synthesis.dream_ood import boundary as _boundary
from farout.synthesis.dream_ood.alignment import AlignmentConfig, normalize_class_vectors, read_aligned_images
from farout.synthesis.dream_ood.boundary import (
    BoundaryConfig,
    ClassBoundary,
    distance_to_kth_neighbor,
    extend_samples,
    read_samples,
    select_candidates,
)
from farout.training.loop import TrainingRun
from small import CPU, conditional, pictures
from tolerances import assert_close

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.filterwarnings(
        r"ignore:the diffusion model knows 1 class \(b\):farout.core.errors.MisleadingResultWarning",
        "ignore:only .* are nearest to their own class's vector:farout.core.errors.MisleadingResultWarning",
    ),
]

MODEL = ClassifierConfig(network="wrn16_1", crop_padding=1, flip=False)
SHORT = AlignmentConfig(steps=4, batch_size=8, warmup=0)
FEW = BoundaryConfig(select=3, points=2, candidates=20, kept=2)


def units(count: int, dim: int = 16, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Random unit vectors around a common direction."""
    generator = torch.Generator().manual_seed(seed)
    middle = functional.normalize(torch.randn(dim, generator=generator), dim=0)
    noise = torch.randn(count, dim, generator=generator) / math.sqrt(dim)
    return functional.normalize(middle + spread * noise, dim=1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two of the generator's three classes, which differ in brightness."""
    for name, low in (("a", 20), ("c", 160)):
        pictures(tmp_path / "labelled" / name, 12, low=low, seed=ord(name))
    return tmp_path / "labelled"


def method(**settings: Any) -> DreamOOD:
    return DreamOOD(**{"model": MODEL, "alignment": SHORT, "boundary": FEW, "steps": 2, **settings})


def synthesize(images: Path, out: Path, how: DreamOOD | None = None, **settings: Any) -> Any:
    given = {"count": 9, "diffusion": conditional(), "runtime": CPU, **settings}
    return (how or method()).synthesize(images, out, **given)


# the boundary


@pytest.mark.parametrize("k", [1, 4, 30])
def test_neighbors_are_found_by_brute_force(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points, bank = units(21, seed=1), units(30, seed=2)
    expected = np.sort(np.linalg.norm(points.numpy()[:, None] - bank.numpy()[None], axis=2), axis=1)[:, k - 1]
    assert np.allclose(distance_to_kth_neighbor(points, bank, k), expected, atol=1e-6)
    monkeypatch.setattr(_boundary, "_MAX_COSINES", 100)
    assert np.allclose(distance_to_kth_neighbor(points, bank, k), expected, atol=1e-6), "in pieces"


def test_a_neighbor_that_is_equal_has_distance_zero() -> None:
    bank = units(10)
    assert float(distance_to_kth_neighbor(bank[:3], bank, 1).max()) == 0


def test_ranks_beyond_the_bank_are_refused() -> None:
    with pytest.raises(FaroutError, match=r"\(M, D\) and \(N, D\)"):
        distance_to_kth_neighbor(units(3, dim=4), units(3, dim=5), 1)
    with pytest.raises(FaroutError, match="no neighbor number 4 among 3"):
        distance_to_kth_neighbor(units(3), units(3), 4)


def test_an_image_is_not_its_own_neighbor() -> None:
    features = units(20)
    boundary = ClassBoundary(features, BoundaryConfig(k=1, select=4), 0, 0)
    apart = (torch.cdist(features, features) + 9 * torch.eye(20)).min(1).values
    assert torch.allclose(boundary.distances, apart, atol=1e-5)
    assert boundary.boundary.tolist() == apart.argsort(descending=True)[:4].tolist()


def test_the_corrected_filter_keeps_the_farthest_and_the_published_one_does_not() -> None:
    distances = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    corrected, published = (select_candidates(distances, 2, filter=name) for name in ("corrected", "published"))
    assert torch.equal(corrected, distances.argsort(dim=1, descending=True)[:, :2])
    # the released code: a table of candidates by points, filled with values stored point by point
    table = distances.flatten().numpy().reshape(10, 4)
    assert published.tolist() == [np.argsort(-table[:, point])[:2].tolist() for point in range(4)]
    kept, wrong = (distances.gather(1, places).mean() for places in (corrected, published))
    assert float(kept) > 0.8
    assert float(wrong) < 0.7, "nearly arbitrary ones: 0.5 on average"
    assert torch.equal(select_candidates(distances, 2, largest=False), distances.argsort(dim=1)[:, :2])


def test_samples_are_on_the_sphere_around_the_boundary() -> None:
    sampling = BoundaryConfig(select=5, points=3, candidates=40, kept=2)
    boundary = ClassBoundary(units(30), sampling, 0, 1)
    drawn = boundary.sample_round(0)
    assert drawn.vectors.shape == (6, 16)
    assert torch.allclose(drawn.vectors.norm(dim=1), torch.ones(6))
    assert torch.allclose(
        drawn.distances, distance_to_kth_neighbor(drawn.vectors, boundary.features, boundary.k), atol=1e-6
    )
    assert drawn.boundary_rows[:3].tolist() == drawn.boundary_rows[3:].tolist(), "the best of each point come first"
    assert len(set(drawn.boundary_rows[:3].tolist())) == 3
    assert set(drawn.boundary_rows.tolist()) <= set(boundary.boundary.tolist())
    assert bool((drawn.distances[:3] >= drawn.distances[3:]).all())


@pytest.mark.parametrize(("side", "extreme"), [("outliers", torch.amax), ("inliers", torch.amin)])
def test_the_extreme_candidates_are_kept(side: Any, extreme: Any) -> None:
    few, every = (
        ClassBoundary(units(30), BoundaryConfig(side=side, points=3, candidates=25, kept=kept), 0, 0).sample_round(0)
        for kept in (1, 25)
    )
    assert torch.equal(few.distances, extreme(every.distances.reshape(25, 3), 0))


def test_inliers_are_sampled_around_the_center() -> None:
    features = units(40)
    nearest, farthest = (ClassBoundary(features, BoundaryConfig(side=side), 0, 0) for side in ("inliers", "outliers"))
    assert set(nearest.boundary.tolist()).isdisjoint(farthest.boundary.tolist())
    inner = BoundaryConfig(side="inliers", noise=0.28)
    assert float(ClassBoundary(features, inner, 0, 0).sample_round(0).distances.median()) < float(
        nearest.distances.median()
    )


@pytest.mark.parametrize("noise", [0.28, 1.94])
@pytest.mark.parametrize("dim", [32, 768])
def test_the_length_of_the_noise_does_not_depend_on_the_dimension(dim: int, noise: float) -> None:
    boundary = ClassBoundary(units(10, dim), BoundaryConfig(noise=noise, candidates=400, kept=400), 0, 0)
    drawn = boundary.sample_round(0)
    cosines = (drawn.vectors * boundary.features[drawn.boundary_rows]).sum(1)
    assert float(cosines.acos().mean()) == pytest.approx(math.atan(noise), rel=0.03)


def test_small_classes_use_a_lower_rank_with_a_warning() -> None:
    assert [BoundaryConfig(k=300).neighbor_rank(count) for count in (2, 3, 100, 500, 1000)] == [1, 1, 60, 300, 300]
    assert [BoundaryConfig().neighbor_rank(count) for count in (2, 100, 500)] == [1, 60, 300]
    assert [BoundaryConfig(select=50).boundary_size(count) for count in (2, 100)] == [2, 50]
    assert [BoundaryConfig().boundary_size(count) for count in (2, 500)] == [1, 50]
    with pytest.warns(TooFewImagesWarning, match=r"2 of 3 classes are too small for k 300; .* 'b' with 20 .* gets 12"):
        BoundaryConfig(k=300).check_class_sizes([500, 20, 30], "abc")
    with pytest.warns(TooFewImagesWarning, match=r"1 of 2 .* select 200; .* gets 150"):
        BoundaryConfig(select=200).check_class_sizes([500, 150], "ab")
    with pytest.raises(FaroutError, match="'b' has 1 readable image,"):
        BoundaryConfig().check_class_sizes([5, 1], "ab")


def test_small_classes_cause_no_warning_with_relative_settings(recwarn: pytest.WarningsRecorder) -> None:
    BoundaryConfig().check_class_sizes([2, 3, 5000], "abc")
    assert not recwarn


@pytest.mark.parametrize(
    "wrong", [{"k": 0}, {"select": 0}, {"noise": 0}, {"kept": 21, "candidates": 20}, {"points": 0}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(FaroutError, match=f"option {next(iter(wrong))} is"):
        BoundaryConfig(**wrong)


def test_the_published_settings() -> None:
    paper, large, inner = (DreamOOD.from_preset(name) for name in ("paper", "paper_imagenet", "inliers"))
    lengths = [one.boundary.noise for one in (paper, large, inner)]
    assert [length / math.sqrt(768) for length in lengths] == pytest.approx([0.07, 0.03, 0.01])
    assert (paper.boundary.k, paper.boundary.select, paper.boundary.candidates) == (300, 50, 1500)
    assert paper.prompts.generation == large.prompts.generation == "A high-quality image of the {}"
    assert (paper.model.network, paper.alignment.steps, paper.alignment.batch_size) == ("resnet34", 39200, 256)
    assert (large.boundary.select, large.alignment.batch_size) == (200, 160)
    assert (inner.boundary.side, inner.boundary.select, inner.boundary.kept) == ("inliers", 1000, 1)


def test_a_file_grows_by_whole_rounds(tmp_path: Path) -> None:
    """Round by round or at once, and whatever other classes there are, the first samples are the same."""
    index, anchor = torch.arange(100, 130), 3 * units(1)[0]

    def extended(folder: Path, *wanted: int) -> dict[str, Tensor]:
        for count in wanted:
            extend_samples(folder, ClassBoundary(units(30), FEW, 0, 2), index, anchor, count)
        return read_samples(folder)[2]

    extend_samples(tmp_path / "one", ClassBoundary(units(30), FEW, 0, 1), index, anchor, 5)
    bit_by_bit, at_once = extended(tmp_path / "one", 1, 3, 9), extended(tmp_path / "two", 9)
    assert len(at_once["vectors"]) == 12
    assert all(torch.equal(bit_by_bit[name], at_once[name]) for name in at_once)
    assert torch.allclose(at_once["vectors"].norm(dim=1), torch.full((12,), 3.0))
    assert len(at_once["vectors"].unique(dim=0)) == 12
    other = read_samples(tmp_path / "one")[1]["vectors"]
    assert not torch.equal(other[:4], at_once["vectors"][:4]), "each class has its own random numbers"
    before = (tmp_path / "one" / "00002.safetensors").stat().st_mtime_ns
    extended(tmp_path / "one", 12)
    assert (tmp_path / "one" / "00002.safetensors").stat().st_mtime_ns == before


# the alignment


def test_class_vectors_without_distinct_directions_are_refused() -> None:
    vectors = torch.eye(3)
    assert torch.equal(normalize_class_vectors(5 * vectors, "abc"), vectors)
    wrong = {
        "'a' and 'c' point the same way": torch.tensor([[1.0, 2, 0], [0, 1, 0], [2, 4, 0]]),
        "'b' has no direction": torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1]]),
        "3 classes require a vector each": torch.eye(2),
    }
    for message, given in wrong.items():
        with pytest.raises(FaroutError, match=message):
            normalize_class_vectors(given, "abc")
    with pytest.raises(FaroutError, match=r"one class \(a\)"):
        normalize_class_vectors(torch.eye(1), "a")


def test_a_classifier_of_directions_is_saved_and_loaded(tmp_path: Path) -> None:
    directions = 10 * torch.eye(5)[:3]
    spec = NetworkSpec("wrn16_1", 3, 1, (8, 8), space=5)
    module = spec.build()
    module.head.weight.data.copy_(directions)
    classifier = Classifier.from_module(module, [0.5], [0.5], size=8, channels=1, network=spec)
    classifier.save(tmp_path / "c")
    again, probe = Classifier.load(tmp_path / "c"), torch.rand(4, 1, 8, 8)
    outputs = again.outputs(probe)
    assert again.content_hash == classifier.content_hash
    assert torch.allclose(outputs.features.norm(dim=1), torch.ones(4))
    assert torch.allclose(outputs.logits, 10 * outputs.features[:, :3])
    assert not again.has_maps
    assert not again.head.weight.requires_grad
    assert "space" not in NetworkSpec("wrn16_1", 3).to_dict(), "the hashes of other classifiers do not change"


def test_alignment_moves_images_to_their_classes(images: Path, tmp_path: Path) -> None:
    pictures(images / "b", 12, low=90, seed=9)
    shares = []
    for steps in (1, 30):
        how = method(alignment=AlignmentConfig(steps=steps, batch_size=12, warmup=0))
        synthesize(images, tmp_path / str(steps), how, stage="align")
        found = read_aligned_images(tmp_path / str(steps) / "align")
        assert torch.allclose(found.features.norm(dim=1), torch.ones(36))
        shares.append(float(found.is_correct.float().mean()))
    assert shares[0] < 0.7
    assert shares[1] > 0.9
    anchors = conditional().conditioning.class_vectors()
    nearest = (found.features @ functional.normalize(anchors, dim=1).mT).argmax(1)
    assert torch.equal(nearest == found.labels, found.is_correct)
    head = Classifier.load(tmp_path / "30" / "align" / "classifier").head.weight
    assert torch.allclose(head, functional.normalize(anchors, dim=1) / 0.1), "the class vectors are not trained"


def test_a_poor_alignment_causes_a_warning(images: Path, tmp_path: Path) -> None:
    with pytest.warns(MisleadingResultWarning, match="are nearest to their own class's vector"):
        synthesize(
            images, tmp_path / "o", method(alignment=AlignmentConfig(steps=1, batch_size=4, warmup=0)), stage="align"
        )


@pytest.mark.slow
def test_features_of_augmented_images_do_not_depend_on_the_batch(images: Path, tmp_path: Path) -> None:
    varied = AlignmentConfig(steps=2, batch_size=8, warmup=0, augmented=True)
    for size in (1, 5):
        runtime = Runtime(device="cpu", precision="fp32", batch_size=size, workers=0)
        synthesize(images, tmp_path / str(size), method(alignment=varied), stage="align", runtime=runtime)
    plain = AlignmentConfig(steps=2, batch_size=8, warmup=0)
    synthesize(images, tmp_path / "plain", method(alignment=plain), stage="align")
    one, five, other = (read_aligned_images(tmp_path / name / "align").features for name in ("1", "5", "plain"))
    assert_close(five, one)
    assert not torch.allclose(one, other, atol=1e-3)


def test_an_interrupted_training_goes_on(images: Path, tmp_path: Path) -> None:
    synthesize(images, tmp_path / "whole", stage="align")
    update, updates = TrainingRun._update, list[int]()

    def interrupted(self: TrainingRun, batches: Any) -> None:
        updates.append(self.completed)
        if len(updates) == 3:
            raise KeyboardInterrupt
        update(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            synthesize(images, tmp_path / "o", stage="align")
        assert (tmp_path / "o" / "align" / "training").is_dir()
        synthesize(images, tmp_path / "o", stage="align", resume=True)
    assert updates == [0, 1, 2, 2, 3], "two updates, one that was lost, two more"
    whole, again = (read_aligned_images(tmp_path / name / "align") for name in ("whole", "o"))
    assert torch.equal(whole.features, again.features)
    assert sorted(path.name for path in (tmp_path / "o" / "align").iterdir()) == ["classifier", "features.safetensors"]


# all stages


def test_every_stage_leaves_its_files(images: Path, tmp_path: Path) -> None:
    """Classes a and c of the generator's three have images; the other one gets no outliers."""
    out = tmp_path / "o"
    synthesize(images, out, stage="align")
    assert set(read_aligned_images(out / "align").labels.tolist()) == {0, 2}
    assert Classifier.load(out / "align" / "classifier").class_names == ("a", "c")
    assert not (out / "samples").exists()
    synthesize(images, out, stage="sample", resume=True)
    drawn = read_samples(out / "samples")
    assert {label: len(each["vectors"]) for label, each in drawn.items()} == {0: 8, 2: 8}, "whole rounds"
    anchors = conditional().conditioning.class_vectors()
    for label, each in drawn.items():
        assert torch.allclose(each["vectors"].norm(dim=1), anchors[label].norm())
        cosines = functional.cosine_similarity(each["vectors"], anchors[label][None])
        assert torch.allclose(each["cosine"], cosines, atol=1e-6)
    assert not (out / "images").exists()
    manifest = synthesize(images, out, resume=True).manifest()
    assert manifest["class_name"].tolist() == ["a", "c"] * 4 + ["a"]
    order = [drawn[label]["distance"][place] for place in range(4) for label in (0, 2)] + [drawn[0]["distance"][4]]
    assert manifest["distance"].tolist() == pytest.approx([float(each) for each in order])
    assert {"boundary_distance", "cosine"} <= set(manifest.columns)
    assert [key[0] for key in manifest["boundary_image"]] == manifest["class_name"].tolist(), "images of the same class"


def test_a_longer_run_continues_the_sampling(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize(images, tmp_path / "whole", stage="sample", count=20)
    synthesize(images, tmp_path / "o", stage="sample", count=4)
    first = read_samples(tmp_path / "o" / "samples")
    extend, done = dream_ood.extend_samples, []

    def stops(*given: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(1)
        extend(*given)

    with monkeypatch.context() as patch:
        patch.setattr(dream_ood, "extend_samples", stops)
        with pytest.raises(KeyboardInterrupt):
            synthesize(images, tmp_path / "o", stage="sample", count=20, resume=True)
    synthesize(images, tmp_path / "o", stage="sample", count=20, resume=True)
    whole, again = (read_samples(tmp_path / name / "samples") for name in ("whole", "o"))
    for label, each in whole.items():
        assert all(torch.equal(each[name], again[label][name]) for name in each)
        assert torch.equal(first[label]["vectors"], each["vectors"][: len(first[label]["vectors"])])


def test_the_sampled_vectors_are_decoded(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(
        "farout.synthesis.class_space.decode_vectors",
        lambda sampler, vectors, *_: seen.append(vectors) or torch.zeros(len(vectors), 1, 8, 8),
    )
    synthesize(images, tmp_path / "o", count=4)
    drawn = read_samples(tmp_path / "o" / "samples")
    expected = [drawn[label]["vectors"][place] for place in (0, 1) for label in (0, 2)]
    assert torch.equal(seen[0], torch.stack(expected))


def alike() -> DiffusionModel:
    """A generator that does not distinguish two of its classes."""
    model = conditional()
    table = model.conditioning._weight.data
    table[2] = 2 * table[0]
    return model


def test_what_cannot_work_is_refused_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    single = pictures(tmp_path / "single" / "a", 5).parent
    lonely = pictures(tmp_path / "lonely" / "a", 5).parent
    pictures(lonely / "b", 1)
    wrong: list[tuple[Path, dict[str, Any], str]] = [
        (single, {}, r"one class \(a\)"),
        (lonely, {}, "'b' has 1 readable image,"),
        (images, {"diffusion": alike()}, "'a' and 'c' point the same way"),
    ]
    for source, settings, message in wrong:
        with pytest.raises(FaroutError, match=message):
            synthesize(source, tmp_path / "o", **settings)
    assert not (tmp_path / "o").exists()


def test_directions_of_another_space_are_refused(images: Path, tmp_path: Path) -> None:
    synthesize(images, tmp_path / "o", stage="align")
    path = tmp_path / "o" / "align" / "features.safetensors"
    found = store.load_tensors(path)
    store.save_tensors(path, {**found, "feature": found["feature"][:, :7]})
    with pytest.raises(StoreError, match="7 dimensions, the generator's class vectors have 32"):
        synthesize(images, tmp_path / "o", stage="sample", resume=True)


def test_other_settings_are_refused_with_a_list_of_differences(images: Path, tmp_path: Path) -> None:
    synthesize(images, tmp_path / "o", stage="align")
    for settings, name in (
        ({"boundary": BoundaryConfig(filter="published")}, r"boundary\.filter"),
        ({"alignment": AlignmentConfig(steps=5, batch_size=8, warmup=0)}, r"alignment\.steps"),
    ):
        with pytest.raises(StoreError, match=name):
            synthesize(images, tmp_path / "o", method(**settings), resume=True)


@pytest.mark.parametrize("name", sorted(SYNTHESIZERS))
def test_flags_have_the_defaults_of_the_method(name: str) -> None:
    kind = SYNTHESIZERS[name].load()
    words = [name, "images", "--diffusion", "model", "--out", "out"]
    for preset in (None, *kind.presets):
        wanted = kind() if preset is None else kind.from_preset(preset)
        call: Any = parse("synthesize", [*words, *([] if preset is None else ["--preset", preset])])
        assert call.arguments["arguments"] == wanted.config


def test_the_command_and_its_page(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditional().save(tmp_path / "model")
    words = ["synthesize", "dream_ood", str(images), "--diffusion", str(tmp_path / "model"), "--count", "4"]
    words += ["--alignment.steps", "3", "--alignment.batch-size", "8", "--boundary.candidates", "9", "--steps", "2"]
    out = tmp_path / "o"
    assert main([*words, "--stage", "align", "--out", str(out)]) == 0, capsys.readouterr().err
    page = (out / "page.html").read_text()
    assert "24 images were aligned with the class vectors" in page
    assert "<img" not in page
    assert main([*words, "--resume", "--out", str(out)]) == 0, capsys.readouterr().err
    assert len(list((out / "images").rglob("*.png"))) == 4
    page = (out / "page.html").read_text()
    assert (page.count("<svg"), page.count("<img")) == (1, 2 * 4 + 4), (
        "a histogram, four images and two outliers of each class"
    )
    assert "Medians: training" in page
    assert "http" not in page
