"""New images: the same whatever the batch, one folder that is a source, and clear words for what cannot work."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from farout import NCIS, DreamOOD
from farout.cli import main
from farout.core.errors import FaroutError, StoreError
from farout.data.sources import open_source
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.model import DiffusionModel
from farout.diffusion.noise import image_noise
from farout.diffusion.sample_folder import write_samples
from farout.diffusion.sampling import Sampler, parse_class_labels, sample
from farout.diffusion.solvers.registry import SOLVERS
from small import conditional, model, tiny_unet, without_null
from tolerances import assert_close, assert_same_pixels

pytestmark = pytest.mark.numerics


def made(found: object) -> Tensor:
    return torch.cat(list(found))


# -- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_method_makes_images(solver: str) -> None:
    steps = None if solver == "probability_flow" else 6
    images = made(sample(model(), 2, solver=solver, steps=steps))
    assert images.shape == (2, 1, 8, 8)
    assert float(images.min()) >= 0
    assert float(images.max()) <= 1
    assert float(images.std()) > 0.01


def test_an_image_does_not_depend_on_its_batch() -> None:
    """From a shorter run, in another batch, next to other images, guided or not."""
    network = conditional()
    for guidance in (1.0, 3.0):
        settings = {"steps": 5, "guidance": guidance}
        whole = made(sample(network, 7, **settings))
        assert torch.equal(whole, made(sample(network, 7, **settings))), "the same call gives the same bits"
        assert_close(made(sample(network, 7, batch_size=2, **settings)), whole)
        assert_close(made(sample(network, 3, **settings)), whole[:3])
        some = Sampler(network, **settings).sample_images([5, 1], [2, 1])
        assert_close(some, whole[[5, 1]])


def test_seeds_and_classes_make_a_difference() -> None:
    network = conditional()
    first = made(sample(network, labels=[0, 0, 1], steps=5))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, made(sample(network, labels=[0, 0, 1], steps=5, seed=1)))
    assert_close(made(sample(network, labels=[0, 0], steps=5)), first[:2])
    assert not torch.allclose(first[1], made(sample(network, labels=[0, 1], steps=5))[1], atol=1e-3)


def test_guidance_is_the_papers_mixture() -> None:
    """Scale 1 costs one evaluation a step, another two: conditional and null."""
    network = conditional()
    counted = {}
    for guidance in (1.0, 3.0):
        sampler = Sampler(network, steps=4, guidance=guidance)
        denoiser = sampler.denoiser()
        plain = denoiser.denoiser  # type: ignore[attr-defined]
        inner = plain if guidance == 1 else plain.denoiser
        sampler._solver(denoiser, torch.randn(2, 1, 8, 8), sampler.path.repeat(2, 1), sampler.condition([0, 1]))
        counted[guidance] = inner.evaluations
    assert counted == {1.0: 8, 3.0: 16}
    one, three = (made(sample(network, labels=[0, 1], steps=4, guidance=g)) for g in (1.0, 3.0))
    assert not torch.equal(one, three)


def test_paths_start_at_the_largest_level() -> None:
    network = model()
    for spacing in ("even", "geometric"):
        path = Sampler(network, steps=10, spacing=spacing).path
        assert path[0] == network.schedule.sigma[-1].float()
        assert len(path) == 11
        assert path[-1] == 0
    levels = network.schedule.t_of(Sampler(network, steps=50).path[:-1])
    assert levels.tolist() == list(range(999, 0, -20))
    assert Sampler(network, "probability_flow").path.tolist() == [float(path[0]), 0.0]


@pytest.mark.parametrize("steps", [50, 20])
def test_leading_levels_are_those_of_stable_diffusion(steps: int) -> None:
    """The whole way against diffusers' own, with its scheduler as Stable Diffusion's folder sets it."""
    network = model()
    scheduler = diffusers.PNDMScheduler.from_config(
        {**network.schedule.to_diffusers_config(), "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
    )
    scheduler.set_timesteps(steps)
    sampler = Sampler(network, "plms", steps, "leading", clamp=False)
    levels = network.schedule.t_of(sampler.path).tolist()
    theirs = scheduler.timesteps.tolist()
    assert levels[:-1] == [theirs[0], *theirs[2:]], "their second evaluation is of the first step, repeated"
    assert levels[-2:] == [1, 0]
    assert levels[0] == 1000 - 1000 // steps + 1

    sample = image_noise(["0", "1"], network.shape, 0, network.schedule.num_levels - 1, 0)
    for t in scheduler.timesteps:
        with torch.no_grad():
            answer = network.network(sample, t).sample
        sample = scheduler.step(answer, t, sample).prev_sample
    found = sampler.sample_images([0, 1])
    assert 0 < float(found.mean()) < 1
    torch.testing.assert_close(found, network.decode(sample / network.schedule.abar[0].sqrt()), atol=1e-4, rtol=0)


def test_leading_levels_close_together() -> None:
    path = Sampler(model(), "ddim", 1000, "leading").path
    assert path[[0, -2, -1]].tolist() == [*model().schedule.sigma[[-1, 0]].float().tolist(), 0.0]


def test_the_papers_presets_walk_stable_diffusions_levels() -> None:
    for method, name in ((NCIS, "paper"), (DreamOOD, "paper"), (DreamOOD, "paper_imagenet")):
        how = method.from_preset(name).config
        levels = Sampler(model(), how["solver"], how["steps"], how["spacing"]).path
        assert model().schedule.t_of(levels[:-1]).tolist() == list(range(981, 0, -20))


# -- what cannot work -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        (model, {"guidance": 3.0}, "requires a class-conditional model"),
        (model, {"labels": [0]}, "unconditional"),
        (conditional, {"labels": [0, 3]}, "labels of this model are 0 to 2, got 3"),
        (without_null, {"guidance": 2.0}, "no null condition"),
        (model, {"solver": "euler"}, "no solver 'euler'; expected one of ddim"),
        (model, {"solver": "pndm4", "steps": 3}, "pndm4 warms up over 3 steps.*at least 4"),
        (model, {"solver": "probability_flow", "steps": 3}, "chooses its own steps"),
        (model, {"steps": 0}, "steps must be 1 to 1000"),
        (model, {"steps": 0, "spacing": "geometric"}, "steps must be 1 or more"),
        (model, {"steps": 1001, "spacing": "leading"}, "steps must be 1 to 1000"),
        (model, {"spacing": "trailing"}, "spacing is 'trailing'; expected one of even, geometric, leading"),
        (model, {"batch_size": 0}, "batch_size is 0; expected auto, or at least 1"),
        (model, {"count": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_call(network: object, settings: dict, message: str) -> None:
    count = None if "labels" in settings else settings.pop("count", 2)
    with pytest.raises(FaroutError, match=message):
        sample(network(), count, **settings)


def test_classes_by_name_or_number() -> None:
    network = conditional()
    assert parse_class_labels(network, ["all"]) == parse_class_labels(network, []) == (0, 1, 2)
    assert parse_class_labels(network, ["c,a"]) == parse_class_labels(network, ["c", "0"]) == (2, 0)
    for wanted, message in ((["d"], "no class 'd'; the model has a, b, c"), (["3"], "no class"), (["a,a"], "twice")):
        with pytest.raises(FaroutError, match=message):
            parse_class_labels(network, wanted)
    with pytest.raises(FaroutError, match="unconditional"):
        parse_class_labels(model(), ["a"])


# -- folders --------------------------------------------------------------------------------------------------------


def test_a_folder_of_samples_is_a_source_with_labels(tmp_path: Path) -> None:
    sampler = Sampler(conditional(), steps=4)
    done = write_samples(sampler, tmp_path / "s", 7, contact_sheet=True)
    assert (done.images, done.new) == (7, 7)
    source = open_source(tmp_path / "s")
    assert source.class_names == ("a", "b", "c")
    assert len(source) == 7
    expected = made(sample(conditional(), 7, steps=4))
    index = source.keys.index("b/000004.png")
    assert_same_pixels(source[index][None], (expected[4:5] * 255).round().to(torch.uint8))
    lines = [json.loads(line) for line in (tmp_path / "s" / "manifest.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 1, 2, 0, 1, 2, 0]
    assert lines[4] == {
        **{"key": "b/000004.png", "index": 4, "label": 1, "class": "b", "seed": 0, "solver": "dpm_solver_2m"},
        **{"steps": 4, "guidance": 1.0, "model": conditional().content_hash},
    }
    with Image.open(tmp_path / "s-contact-sheet.png") as sheet:
        margin = sheet.width - (3 * 50 + 2)
        assert (0 < margin < 30, sheet.height) == (True, 3 * 50 + 2)
        names = np.asarray(sheet)[:, :margin, 0] > 200
        assert [bool(names[row * 50 : row * 50 + 52].any()) for row in range(3)] == [True] * 3


def test_images_are_made_once(tmp_path: Path) -> None:
    sampler, out = Sampler(model(), steps=4, batch_size=2), tmp_path / "s"
    write_samples(sampler, out, 5)
    whole = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert sorted(whole) == [f"{index:06d}.png" for index in range(5)]
    (out / "000001.png").unlink()
    (out / "000003.png").unlink()
    stamp = (out / "000002.png").stat().st_mtime_ns
    done = write_samples(sampler, out, 6)
    assert (done.images, done.new) == (6, 3)
    assert (out / "000002.png").stat().st_mtime_ns == stamp
    again = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert {name: again[name] for name in whole} == whole
    assert write_samples(sampler, out, 2).new == 0
    assert len((out / "manifest.jsonl").read_text().splitlines()) == 6
    assert len(open_source(out)) == 6
    assert open_source(out).labels is None


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, out = Sampler(model(), steps=4, batch_size=2), tmp_path / "s"
    whole = Sampler.sample_images

    def stops(self: Sampler, indices: list[int], labels: list[int] | None = None) -> Tensor:
        if 2 in indices:
            raise KeyboardInterrupt
        return whole(self, indices, labels)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample_images", stops)
        with pytest.raises(KeyboardInterrupt):
            write_samples(sampler, out, 4)
    # fewer are asked for now: those of the first run stay in the folder, which is a source, so they are told
    done = write_samples(sampler, out, 1)
    assert (done.images, done.requested, done.new) == (2, 1, 0)
    assert len((out / "manifest.jsonl").read_text().splitlines()) == len(open_source(out)) == 2
    assert write_samples(sampler, out, 4).new == 2
    write_samples(sampler, tmp_path / "t", 4)
    for path in out.glob("*.png"):
        assert path.read_bytes() == (tmp_path / "t" / path.name).read_bytes()


def test_images_that_are_not_numbers_are_not_written(tmp_path: Path) -> None:
    """Networks overflow in fp16; black images would pass for samples."""
    network = model()
    with torch.no_grad():
        next(network.network.parameters()).fill_(float("nan"))
    with pytest.raises(FaroutError, match="not numbers; use precision fp32"):
        write_samples(Sampler(network, steps=4), tmp_path / "s", 1)
    assert not list((tmp_path / "s").glob("*.png"))


def test_no_classes_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FaroutError, match="classes is empty"):
        write_samples(Sampler(conditional(), steps=4), tmp_path / "s", 3, classes=[])
    assert not (tmp_path / "s").exists()


def test_another_configuration_does_not_mix_in(tmp_path: Path) -> None:
    write_samples(Sampler(conditional(), steps=4), tmp_path / "s", 3)
    for other, classes in (
        (Sampler(conditional(), steps=5), None),
        (Sampler(conditional(), steps=4, seed=1), None),
        (Sampler(conditional(), steps=4, guidance=2.0), None),
        (Sampler(conditional(), steps=4), [0, 1]),
        (Sampler(conditional(b_scale=2.0), steps=4), None),
    ):
        with pytest.raises(StoreError, match="generated with other settings"):
            write_samples(other, tmp_path / "s", 3, classes=classes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    with pytest.raises(StoreError, match="not replaced"):
        write_samples(Sampler(model(), steps=4), tmp_path / "mine", 1)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["a.txt"]


def test_class_names_that_are_no_folder_names(tmp_path: Path) -> None:
    unet, plain = tiny_unet(classes=5), model()
    names = ("T-shirt/top", "..", "a b", "A B", "images")
    network = DiffusionModel(
        unet, plain.schedule, plain.preprocessing, conditioning=ClassVectors(unet, names, has_null=True)
    )
    write_samples(Sampler(network, steps=3), tmp_path / "s", 5)
    folders = sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir())
    assert folders == ["1-", "2-a b", "3-A B", "4-images", "T-shirt_top"]
    source = open_source(tmp_path / "s")
    assert len(source) == 5
    assert set(source.class_names or ()) == set(names), "the classes come back as they were"


# -- command line ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    conditional().save(tmp_path / "m")
    model().save(tmp_path / "plain")
    words = ["sample", str(tmp_path / "m"), "--out", str(tmp_path / "s"), "--count", "4", "--steps", "5"]
    words += ["--solver", "pndm2", "--device", "cpu", "--precision", "fp32"]
    assert main([*words, "--classes", "c,a", "--guidance", "2", "--contact-sheet"]) == 0
    printed = capsys.readouterr().out
    assert "4 images" in printed
    assert "s-contact-sheet.png" in printed
    assert sorted(path.name for path in (tmp_path / "s").glob("*/*.png")) == [f"{i:06d}.png" for i in range(4)]
    assert {path.parent.name for path in (tmp_path / "s").glob("*/*.png")} == {"a", "c"}
    wrong = [
        (["--classes", "d"], "no class 'd'"),
        (["--solver", "euler"], "solver"),
        (["--solver", "pndm4", "--steps", "2"], "warms up"),
        ([], "generated with other settings"),
    ]
    for more, message in wrong:
        assert main([*words, *more]) in (1, 2)
        assert message in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "plain"), "--out", str(tmp_path / "p"), "--classes", "a"]) == 1
    assert "unconditional" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_estimates_are_kept_within_what_images_can_be() -> None:
    """Of pixels, unless one does not want it; latents have no such range."""
    network = conditional()
    x, sigma = 100 * torch.randn(2, 1, 8, 8), torch.full((2,), 100.0)
    for guidance in (1.0, 3.0):
        inside = Sampler(network, steps=4, guidance=guidance)
        outside = Sampler(network, steps=4, guidance=guidance, clamp=False)
        condition = inside.condition([0, 1])
        with torch.no_grad():
            free, kept = (sampler.denoiser()(x, sigma, condition) for sampler in (outside, inside))
        assert float(free.abs().max()) > 1
        torch.testing.assert_close(kept, free.clamp(-1, 1))
