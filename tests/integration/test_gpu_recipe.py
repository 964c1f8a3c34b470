"""The recipe in recipes/gpu/ at its toy size: it trains, packs, evaluates, continues, and its weights can be joined."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from farout import Classifier, DiffusionModel
from farout.core.errors import FaroutError
from farout.diffusion.unets import build_network, network_config

SCRIPT = Path(__file__).parents[2] / "recipes" / "gpu" / "cifar10.py"


def test_the_network_is_the_published_one_of_ddpm_for_cifar10() -> None:
    """The configuration of google/ddpm-cifar10-32 on the Hugging Face hub."""
    network = build_network("cifar", 3, 32)
    published = {
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": (128, 256, 256, 256),
        "center_input_sample": False,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    assert {name: network_config(network)[name] for name in published} == published
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307


def test_the_recipe_trains_that_network_in_bf16_compiled() -> None:
    recipe = runpy.run_path(str(SCRIPT))["cifar10_recipe"]()
    training = recipe.training
    assert (recipe.generator.network, recipe.generator.protocol) == ("cifar", "common")
    assert (training.precision, training.compile, training.channels_last) == ("bf16", True, True)


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPT))
    script["Run"](tmp_path, script["toy_recipe"]()).plan(5.0, 5)
    assert script["Run"](tmp_path, script["toy_recipe"]()).plan(5.0, 5)["steps"] == 5
    for recipe, minutes, steps in (("cifar10_recipe", 5.0, 5), ("toy_recipe", 60.0, None)):
        with pytest.raises(FaroutError, match="give these or another folder"):
            script["Run"](tmp_path, script[recipe]()).plan(minutes, steps)


@pytest.mark.slow
def test_the_toy_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["run", str(tmp_path / "run"), "--toy"])
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    detectors = ["reconstruction", "trivial_baselines", "msma", "diffpath", "denoising"]
    assert [row["detector"] for row in results["results"]] == detectors
    assert all(0 <= row["auroc"] <= 1 and row["n_ood"] == 8 for row in results["results"])
    page = (tmp_path / "run" / "results.md").read_text(encoding="utf-8")
    assert all(name in page for name in detectors)
    assert page in capsys.readouterr().out

    seconds = results["seconds"]["train the generator"]
    main(["run", str(tmp_path / "run"), "--toy"])
    again = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert again["seconds"]["train the generator"] == seconds, "what is finished is not trained again"
    aurocs = [[row["auroc"] for row in each["results"]] for each in (results, again)]
    assert aurocs[0] == aurocs[1]

    parts, weights = tmp_path / "run" / "parts", tmp_path / "weights"
    assert max(path.stat().st_size for path in parts.iterdir()) < 16 * 2**20
    main(["join", str(parts), str(weights)])
    trained, joined = (DiffusionModel.load(folder / "generator") for folder in (tmp_path / "run", weights))
    for one, other in zip(trained.network.parameters(), joined.network.parameters(), strict=True):
        assert torch.equal(one.bfloat16(), other.bfloat16())
    assert joined.trained_on == trained.trained_on
    assert Classifier.load(weights / "classifier").class_names

    part = next(parts.glob("weights.tar.xz.*"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(FaroutError, match="is damaged"):
        main(["join", str(parts), str(tmp_path / "damaged")])
    part.unlink()
    with pytest.raises(FaroutError, match="is missing"):
        main(["join", str(parts), str(tmp_path / "damaged")])
