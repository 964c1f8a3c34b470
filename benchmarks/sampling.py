"""Solvers compared by the distance of generated images to test images, and by network evaluations per image.

    FAROUT_DATA=… python benchmarks/sampling.py MODEL --reference "fashion_mnist:test@classes=0,2-7,9" --count 256

MODEL is a folder of `farout train diffusion`. Every solver starts from the same noise and labels. Distances use the
built-in backbone (FD-lite0, KD-lite0) and are not FID and KID. With fewer images than features FD is biased upwards,
for all solvers alike.
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch

from farout.core.errors import FaroutError
from farout.diffusion.model import DiffusionModel
from farout.diffusion.sampling import Sampler
from farout.diffusion.solvers.registry import SOLVERS, is_adaptive
from farout.evaluation.fid import set_distance

BATCH_SIZE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", default="fashion_mnist:test")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS))
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--clamp", action=argparse.BooleanOptionalAction, default=True, help="as in farout sample")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    model = DiffusionModel.load(arguments.model)
    rows = 0

    def count_rows(network: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal rows
        rows += len(inputs[0])

    model.network.register_forward_pre_hook(count_rows)
    print("| solver | steps | evaluations per image | FD-lite0 | KD-lite0 | images/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in arguments.solvers:
        for steps in [None] if is_adaptive(name) else arguments.steps:
            try:
                sampler = Sampler(model, name, steps, guidance=arguments.guidance, clamp=arguments.clamp)
            except FaroutError as error:
                print(f"{name}, {steps} steps: {error}", flush=True)
                continue
            rows, started, parts = 0, time.perf_counter(), []
            for start in range(0, arguments.count, BATCH_SIZE):
                indices = range(start, min(start + BATCH_SIZE, arguments.count))
                conditioning = model.conditioning
                labels = None if conditioning is None else [i % conditioning.num_classes for i in indices]
                parts.append(sampler.sample_images(indices, labels))
            speed = arguments.count / (time.perf_counter() - started)
            evaluations = rows / arguments.count
            distance = set_distance(torch.cat(parts), arguments.reference, limit=2 * arguments.count)
            cells = [name, steps or "adaptive", f"{evaluations:.1f}", f"{distance.frechet:.2f}"]
            print("| " + " | ".join(map(str, [*cells, f"{distance.kernel:.4f}", f"{speed:.2f}"])) + " |", flush=True)


if __name__ == "__main__":
    main()
