"""Pixel diffusion on a small budget: speed of networks, training recipes, and scores of `reconstruction`.

Only training images of FashionMNIST are used. `recipes` trains on 55,000 of them for the same CPU time each and prints
the error of the denoised image at five noise levels on 500 others; `scores` prints the AUROC of every indicator on
images that the given model was not trained on, changed in six ways (the dev sources).

    python benchmarks/pixel_budget.py speed
    python benchmarks/pixel_budget.py recipes --seconds 90
    python benchmarks/pixel_budget.py scores model/ --count 300 --statistics 400
"""

from __future__ import annotations

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from farout import DiffusionModel
from farout.data.batching import PreparedImages
from farout.data.sources import open_source
from farout.detectors.reconstruction import Reconstruction
from farout.diffusion.config import DiffusionConfig
from farout.diffusion.denoiser import NetworkDenoiser, expand_dims
from farout.diffusion.losses import denoising_loss, sample_sigmas
from farout.diffusion.train import build_model

CHANGES = ("rot90", "rot180", "blur", "contrast", "noise", "patch")
LEVELS = (20, 80, 200, 400, 600)
EDM = {"prediction": "v_prediction", "levels": "log_normal"}
RECIPES: dict[str, dict[str, object]] = {
    "tiny, epsilon, uniform t (the earlier preset)": {"network": "tiny"},
    "compact patches, epsilon, uniform t": {"network": "compact", "patch": 2},
    "compact patches, v, uniform t": {"network": "compact", "patch": 2, "prediction": "v_prediction"},
    "compact patches, v, log-normal sigma (the preset)": {"network": "compact", "patch": 2, **EDM},
    "the same with weights min(1 / sigma^2, 5) (min-SNR)": {"network": "compact", "patch": 2, **EDM, "min_snr": True},
    "mini patches, v, log-normal sigma": {"network": "mini", "patch": 2, **EDM},
}
HORIZONS = {10: 0.9, 50: 0.98, 200: 0.995}
"""Decay of the average of weights by its horizon in updates; tables are of 50, and the others of the preset alone."""


def measure_speed(arguments: argparse.Namespace) -> None:
    """Images per CPU second of one training step and of one evaluation with batches of 64."""
    source = open_source("fashion_mnist:train", limit=64)
    for network, patch in (("tiny", 1), ("compact", 2), ("mini", 2)):
        for precision in ("fp32", "bf16"):
            config = DiffusionConfig(network=network, patch=patch, prediction="v_prediction")
            model = build_model(config, config.preprocess(source))
            images = PreparedImages(source, model.preprocessing)
            x0 = model.encode(torch.stack([images[i] for i in range(64)]))
            denoiser = model.denoiser(precision=precision)
            optimizer = torch.optim.AdamW(model.network.parameters())
            rates = []
            for trains in (True, False):
                generator = torch.Generator().manual_seed(0)
                start, count = 0.0, -1  # the first call prepares kernels
                while count < 1 or time.process_time() - start < arguments.seconds:
                    if count == 0:
                        start = time.process_time()
                    if trains:
                        optimizer.zero_grad()
                        denoising_loss(denoiser, x0, generator, config.objective).backward()
                        optimizer.step()
                    else:
                        with torch.no_grad():
                            denoiser(x0, torch.ones(64))
                    count += 1
                rates.append(round(64 * count / (time.process_time() - start)))
            print(f"| {network} | {patch} | {precision} | {model.parameters / 1e6:.2f} | {rates[0]} | {rates[1]} |")


def compare_recipes(arguments: argparse.Namespace) -> None:
    """Mean squared errors of x0 at LEVELS after the same CPU time, with averaged weights.

    min-SNR (Hang et al. 2023) limits the weight of the squared error of x0, which is 1 / sigma^2 in predictions of the
    noise and 1 + 1 / sigma^2 in those of v.
    """
    source = open_source("fashion_mnist:train", limit=None)
    order = np.random.default_rng(0).permutation(len(source))
    for name, settings in RECIPES.items():
        torch.manual_seed(0)
        settings = dict(settings)
        min_snr = settings.pop("min_snr", False)
        config = DiffusionConfig(**settings)  # type: ignore[arg-type]
        model = build_model(config, config.preprocess(source))
        images = PreparedImages(source, model.preprocessing)
        denoiser = NetworkDenoiser(model.network, model.schedule, model.prediction, precision=arguments.precision)
        model.network.to(memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(model.network.parameters(), lr=1e-3, weight_decay=0)
        averages = {
            horizon: torch.optim.swa_utils.AveragedModel(
                model.network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
            )
            for horizon, decay in HORIZONS.items()
            if horizon == 50 or "(the preset)" in name
        }
        generator = torch.Generator().manual_seed(0)
        spent, steps = 0.0, 0
        while spent < arguments.seconds:
            chosen = torch.randint(5000, len(order), (64,), generator=generator)
            x0 = model.encode(torch.stack([images[int(order[i])] for i in chosen]))
            start = time.process_time()
            progress = min(1.0, spent / arguments.seconds)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min((steps + 1) / 30, 0.5 * (1 + np.cos(np.pi * progress)))
            optimizer.zero_grad()
            if min_snr:
                sigma = sample_sigmas(len(x0), model.schedule, config.levels, generator)
                noised = x0 + expand_dims(sigma, x0) * torch.randn(x0.shape, generator=generator)
                weights = expand_dims(torch.minimum(1 / sigma**2, torch.tensor(5.0)), x0)
                (weights * (denoiser(noised, sigma) - x0).square()).mean().backward()
            else:
                denoising_loss(denoiser, x0, generator, config.objective).backward()
            torch.nn.utils.clip_grad_norm_(model.network.parameters(), 1.0)
            optimizer.step()
            for average in averages.values():
                average.update_parameters(model.network)
            spent, steps = spent + time.process_time() - start, steps + 1
        held = model.encode(torch.stack([images[int(i)] for i in order[:500]]))
        for horizon, average in averages.items():
            denoiser.network = average.module.eval()
            errors = []
            for t in LEVELS:
                noise = torch.randn(500, 1, 28, 28, generator=torch.Generator().manual_seed(t))
                noise = torch.nn.functional.pixel_unshuffle(noise, model.patch)
                sigma = model.schedule.sigma_of(t).float()
                with torch.no_grad():
                    x0 = denoiser(held + sigma * noise, sigma.expand(500))
                errors.append(float((x0 - held).square().mean()))
            row = [name, str(horizon), str(steps), *(f"{error:.4f}" for error in errors)]
            print(f"| {' | '.join(row)} |", flush=True)


def compare_scores(arguments: argparse.Namespace) -> None:
    """AUROC of every indicator on the dev sources."""
    model = DiffusionModel.load(arguments.model)
    source = open_source("fashion_mnist:train")
    unseen = [i for i in range(len(source)) if source.content_hash(i) not in model.trained_on]
    chosen = np.random.default_rng(arguments.seed).permutation(unseen)
    count, first = arguments.count, arguments.statistics
    detector = Reconstruction()
    fit_images = source.subset(chosen[: 2 * first].tolist())
    detector.fit(fit_images, diffusion=model, statistics=first, groups="none", seed=arguments.seed)
    own = detector.score(source.subset(chosen[2 * first : 2 * first + count].tolist()))
    changed = chosen[2 * first + count : 2 * first + 2 * count]
    tables = {}
    for change in CHANGES:
        others = open_source(f"fashion_mnist:train@{change}")
        tables[change] = detector.score(others.subset(changed.tolist()))
    print("| score | " + " | ".join(CHANGES) + " | mean |")
    for name in own.indicators:
        values = []
        for table in tables.values():
            is_changed = [0] * len(own) + [1] * len(table)
            values.append(roc_auc_score(is_changed, np.concatenate([own.indicators[name], table.indicators[name]])))
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in (*values, np.mean(values))) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--seconds", type=float, default=5)
    speed.set_defaults(run=measure_speed)
    recipes = commands.add_parser("recipes")
    recipes.add_argument("--seconds", type=float, default=90)
    recipes.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    recipes.set_defaults(run=compare_recipes)
    scores = commands.add_parser("scores")
    scores.add_argument("model")
    scores.add_argument("--count", type=int, default=300)
    scores.add_argument("--statistics", type=int, default=400)
    scores.add_argument("--seed", type=int, default=0)
    scores.set_defaults(run=compare_scores)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
