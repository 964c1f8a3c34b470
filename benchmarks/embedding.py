"""InversionConfig of images into class vectors: many at once against one by one, and what fewer, stratified draws cost.

    FAROUT_DATA=… python benchmarks/embedding.py networks/ --count 32

The generator is the diffusion model of the first split of denoising.py. The loss is that of unguided denoising, on
draws of (t, noise) that no inversion has seen; `agreement` is the mean cosine of an image's way from its class's vector
with the way that 128 stratified draws give it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import fresh_images, machine, table
from denoising import SPLITS, spec
from torch import Tensor
from torch.nn.functional import cosine_similarity

from farout.core.runtime import Runtime
from farout.data.batching import batches
from farout.data.classes import class_numbers
from farout.diffusion.model import DiffusionModel
from farout.synthesis.ncis.inversion import InversionConfig, Inverter

REFERENCE = InversionConfig(steps=3, draws=128)
CASES = {
    "K = 32": InversionConfig(steps=3, draws=32, stratified=False),
    "K = 32, stratified": InversionConfig(steps=3, draws=32),
    "K = 8": InversionConfig(steps=3, stratified=False),
    "K = 8, stratified": InversionConfig(steps=3),
    "K = 8, stratified, 10 steps": InversionConfig(),
}


class Trial:
    """Images of one model, and how well vectors stand for them."""

    def __init__(self, model: DiffusionModel, train: str, count: int) -> None:
        source = fresh_images(train, model, count, seed=0)
        batch = next(iter(batches(source, model.preprocessing, count, workers=0)))
        assert model.conditioning is not None
        self.model, self.keys, self.x0 = model, batch.keys, model.encode(batch.images)
        self.labels = class_numbers(source, model.conditioning.class_names)
        self.start = model.conditioning.class_vectors()[self.labels]

    def inverter(self, inversion: InversionConfig, rows: int, seed: int = 0) -> Inverter:
        return Inverter(self.model, inversion, seed, Runtime(precision="fp32").resolved())

    def together(self, inversion: InversionConfig) -> tuple[Tensor, float]:
        """Vectors, and seconds an image: many in an optimiser, calls of 32 rows or K."""
        inverter = self.inverter(inversion, max(32, inversion.draws))
        started = time.perf_counter()
        vectors, _ = inverter(self.x0, self.labels, self.keys)
        return vectors, (time.perf_counter() - started) / len(self.keys)

    def one_by_one(self, inversion: InversionConfig) -> tuple[Tensor, float]:
        """The same with an optimiser for each image, and calls of K rows."""
        inverter = self.inverter(inversion, inversion.draws)
        started = time.perf_counter()
        single = [
            inverter(self.x0[i : i + 1], self.labels[i : i + 1], self.keys[i : i + 1])[0] for i in range(len(self.keys))
        ]
        return torch.cat(single), (time.perf_counter() - started) / len(self.keys)

    def loss(self, vectors: Tensor) -> Tensor:
        """Of each image, on draws of another seed."""
        inverter = self.inverter(InversionConfig(draws=32, stratified=True), 32, seed=1)
        return inverter.loss_and_gradient(self.x0, vectors, self.start, self.keys, 0)[0]


def rows(trial: Trial) -> list[list[str]]:
    """A line for each case."""
    reference = trial.together(REFERENCE)[0] - trial.start
    before, lines = trial.loss(trial.start), []
    for name, inversion in CASES.items():
        (vectors, seconds), (alone, slow) = trial.together(inversion), trial.one_by_one(inversion)
        gain = trial.loss(vectors) - before
        error = float(gain.std() / len(gain) ** 0.5)
        agreement = float(cosine_similarity(vectors - trial.start, reference).mean())
        lines.append(
            [
                *(name, f"{1 / seconds:.2f}", f"{1 / slow:.2f}", f"{float((vectors - alone).abs().max()):.1e}"),
                *(f"{agreement:.2f}", f"{1e4 * float(gain.mean()):+.1f} ({1e4 * error:.1f})"),
            ]
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", type=Path, help="folder of the networks of denoising.py, with split-0 trained")
    parser.add_argument("--count", type=int, default=32)
    given = parser.parse_args()
    model = DiffusionModel.load(given.networks / "split-0" / "diffusion")
    train = spec("train", [each for each in range(10) if each not in SPLITS[0]])
    trial = Trial(model, train, given.count)
    head = ["draws", "images/s together", "one by one", "largest difference", "agreement", "loss x 1e-4 (s.e.)"]
    print(f"n = {given.count}; {machine()}\n\n{table(head, rows(trial))}")


if __name__ == "__main__":
    main()
