"""Milliseconds per image of each stage of `farout score`, for small images and for photographs, next to their limits.

Everything runs in the main thread (no workers), so that the stages add up. The limits come from the speed of this
machine, measured in the same run: a matrix product in fp32, a copy of memory, and a read of the files again.

    python benchmarks/stages.py --small 2000 --photographs 64
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import farout
from farout.core.profiling import STAGES, record_profile
from farout.data.decoding import to_pil

PHOTOGRAPH = (4000, 3000)


def write_photographs(folder: Path, count: int) -> None:
    """Tiny-ImageNet images, enlarged to photographs of 12 megapixels, as JPEG files."""
    folder.mkdir()
    for number, pixels in enumerate(farout.open_source("tiny_imagenet:test", limit=count)):
        picture = to_pil(pixels).convert("RGB").resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:04d}.jpg", quality=90)


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The shortest time of some calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(title: str, source: str, count: int, out: Path, flops: float, bandwidth: float) -> None:
    """Fit a detector, score the images, and print the table of stages."""
    fitted = out / f"{title}-detector"
    runtime = farout.Runtime(precision="fp32", workers=0, cache=False)
    chosen = farout.FitSettings(limit=min(count, 40), statistics=4, alpha=0.3, groups="none", runtime=runtime)
    detector = farout.KNN().fit(source, **vars(chosen))
    detector.save(fitted)
    del detector
    with record_profile() as profile:
        detector = farout.load(fitted, precision="fp32", workers=0, cache=False)
        result = farout.score_folder(detector, source, out / f"{title}-scores", limit=count)
    opened = farout.open_source(source, limit=1)
    pixels = opened[0].numel()
    size = detector.preprocessing
    limits = {
        "decoding": (f"{pixels:,} bytes of pixels written once", pixels / bandwidth),
        "hashing": (f"{pixels:,} bytes read once", pixels / bandwidth),
        "resizing": (f"{pixels:,} bytes read, {size.size[0]} x {size.size[1]} float32 written",
                     (pixels + 12 * size.size[0] * size.size[1]) / bandwidth),
        "network": (f"{detector.cost().gmacs:.2f} GMAC", 2e9 * detector.cost().gmacs / flops),
    }  # fmt: skip
    if Path(source).is_dir():
        files = sorted(Path(source).iterdir())
        total = sum(path.stat().st_size for path in files)
        again = seconds(lambda: [path.read_bytes() for path in files], 2)
        limits["reading"] = (f"{total // len(files):,} bytes, cached by the system", again / len(files))
    images = sum(result.counts.values())
    print(f"\n{title}: {images} images, {images / profile.wall:.1f} images/s\n")
    print("| stage | seconds | share | ms per image | limit | ms per image at the limit |")
    print("| --- | ---: | ---: | ---: | --- | ---: |")
    for stage in (*STAGES, "other"):
        spent = profile.other if stage == "other" else profile.seconds.get(stage, 0.0)
        if spent:
            what, least = limits.get(stage, ("", 0.0))
            bound = f"{1000 * least:.3f}" if least else ""
            share = f"{100 * spent / profile.wall:.0f} %"
            print(f"| {stage} | {spent:.2f} | {share} | {1000 * spent / images:.3f} | {what} | {bound} |")


def time_scorer() -> None:
    """Print the CPU time of a call of a `Scorer` on one small image, less decoding, resizing and the network."""
    images = [np.full((32, 32, 3), value, np.uint8) for value in range(40)]
    runtime = farout.Runtime(precision="fp32", workers=0, cache=False)
    chosen = farout.FitSettings(statistics=4, alpha=0.3, groups="none", runtime=runtime)
    detector = farout.KNN(size=32).fit(images, **vars(chosen))
    scorer = farout.Scorer(detector)
    for image in images[:5]:
        scorer.score([image])
    times = []
    for image in images * 3:
        with record_profile() as profile:
            scorer.score([image])
        used = ("decoding", "hashing", "resizing", "network", "reading")
        times.append(profile.wall - sum(profile.seconds.get(stage, 0.0) for stage in used))
    print(f"\na call of a Scorer, besides decoding and network: {1000 * float(np.median(times)):.2f} ms (median)")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=2000, help="number of FashionMNIST images")
    parser.add_argument("--photographs", type=int, default=64, help="number of photographs of 12 megapixels")
    parser.add_argument("--threads", type=int, default=1, help="threads of the network")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    matrix, memory = torch.randn(2048, 2048), np.zeros(2**28, np.uint8)
    flops = 2 * 2048**3 / seconds(lambda: matrix @ matrix)
    bandwidth = len(memory) / seconds(memory.copy)
    print(f"{settings.threads} threads: {flops / 1e9:.0f} GFLOP/s (fp32), {bandwidth / 1e9:.1f} GB/s (copy)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure("small images", "fashion_mnist:test", settings.small, folder, flops, bandwidth)
        write_photographs(folder / "photographs", settings.photographs)
        measure("photographs", str(folder / "photographs"), settings.photographs, folder, flops, bandwidth)
        time_scorer()


if __name__ == "__main__":
    main()
