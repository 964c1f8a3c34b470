"""Time per row of networks by backend and precision, alternating in one run; a Markdown table.

    python benchmarks/backends.py
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/backends.py     # as on a processor without AVX-512

CPU time of one thread is the figure to compare on a machine that does other work; wall-clock time is next to it.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from farout.classifiers.networks import NetworkSpec
from farout.core.backends import Backend, NetworkRunner, explain_unusable_backend
from farout.core.devices import Precision
from farout.diffusion.group_norms import speed_up_group_norms
from farout.diffusion.unets import build_network
from farout.features.extractor import FeatureExtractor
from farout.features.feature_maps import NormalizedMaps, PooledMaps


class _Denoiser(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.network(x, t).sample.float()
        return output


class _Logits(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.network(x).float()
        return output


def _unet(name: Any, channels: int, side: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    network = build_network(name, channels, side).eval().to(memory_format=torch.channels_last)
    speed_up_group_norms(network)
    return _Denoiser(network), (torch.randn(32, channels, side, side), torch.rand(32) * 999)


def _backbone() -> tuple[nn.Module, tuple[Tensor, ...]]:
    extractor = FeatureExtractor.create("lite0")
    maps = NormalizedMaps(extractor.evaluated_network, extractor.mean, extractor.std, False, False)
    return PooledMaps(maps), (torch.rand(8, 3, 224, 224).contiguous(memory_format=torch.channels_last),)


def _classifier() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    network = NetworkSpec("resnet18", 10, 3, (32, 32)).build().eval().to(memory_format=torch.channels_last)
    return _Logits(network), (torch.rand(16, 3, 32, 32),)


NETWORKS = {
    "lite0, 224 px": _backbone,
    "U-Net tiny, 28 px": lambda: _unet("tiny", 1, 28),
    "U-Net compact, 28 px": lambda: _unet("compact", 4, 14),
    "resnet18, 32 px": _classifier,
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["eager", "openvino", "onnxruntime"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| network | rows | backend | precision | CPU ms per row | wall ms | times eager fp32 | ready after CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.networks:
        module, inputs = NETWORKS[name]()
        rows = len(inputs[0])
        runner = NetworkRunner(module, name)
        runs: dict[tuple[Backend, Precision], list[tuple[float, float]]] = {}
        ready: dict[tuple[Backend, Precision], float] = {}
        for backend in cast("list[Backend]", arguments.backends):
            for precision in get_args(Precision)[:2]:
                if not explain_unusable_backend(backend, inputs[0].device, precision):
                    started = time.process_time()
                    runner(*inputs, backend=backend, precision=precision)
                    ready[backend, precision] = time.process_time() - started
                    runs[backend, precision] = []
        for _ in range(arguments.repetitions):
            for (backend, precision), seconds in runs.items():
                cpu, wall = time.process_time(), time.perf_counter()
                runner(*inputs, backend=backend, precision=precision)
                seconds.append((time.process_time() - cpu, time.perf_counter() - wall))
        reference = median(cpu for cpu, _ in runs["eager", "fp32"])
        for (backend, precision), seconds in runs.items():
            cpu, wall = median(each[0] for each in seconds), median(each[1] for each in seconds)
            print(
                f"| {name} | {rows} | {backend} | {precision} | {1000 * cpu / rows:.2f} | {1000 * wall / rows:.2f} "
                f"| {reference / cpu:.2f} | {ready[backend, precision]:.1f} |"
            )


if __name__ == "__main__":
    main()
