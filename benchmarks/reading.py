"""CPU time of reading images by stage: full decoding against reduced decoding, in one run.

    python benchmarks/reading.py [--photograph FILE] [--repeat 5]

Without a file, the photograph is a synthetic one of 12 megapixels. All times are CPU milliseconds per image in one
thread, medians over the repetitions, in which the variants alternate. `small` is a gray PNG of 28 x 28 pixels.
"""

import argparse
import io
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from farout.data.decoding import content_hash, decode
from farout.data.image_source import ImageSource
from farout.data.in_memory import list_images
from farout.data.preprocessing import Preprocessing
from farout.data.read_settings import DEFAULT_READING


def create_photograph(height: int = 3000, width: int = 4000) -> bytes:
    """Noise at all scales, as JPEG of quality 90."""
    draws = np.random.default_rng(0)
    total = np.zeros((height, width, 3), np.float32)
    for side in (4, 16, 64, 256, 1024):
        noise = Image.fromarray(draws.integers(0, 256, (side, side, 3), dtype=np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) / side**0.5
    pixels = 255 * (total - total.min()) / (total.max() - total.min()) + draws.normal(0, 3, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def create_small() -> bytes:
    """A gray PNG of 28 x 28 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def build_stages(data: bytes, size: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """The stages of reading an encoded image for a network of this input size."""
    native_pixels = decode(data, "image").values
    channels, height, width = native_pixels.shape
    full = Preprocessing(size=size, channels=channels, native=(height, width))
    reduced = replace(full, reduced_decoding=True)
    small_pixels = decode(data, "image", least_size=reduced.least_size).values

    def read(preprocessing: Preprocessing) -> object:
        listing = list_images([data], DEFAULT_READING, require_range=True)
        image = ImageSource("images", listing, memory_mib=0).read(0, preprocessing.least_size)
        return preprocessing(image.pixels), image.identity

    return {
        "full: decode": lambda: decode(data, "image"),
        "full: hash of pixels": lambda: content_hash(native_pixels),
        "full: resize": lambda: full(native_pixels),
        "full: all": lambda: read(full),
        "reduced: decode and hash of bytes": lambda: decode(data, "image", least_size=reduced.least_size),
        "reduced: resize": lambda: reduced(small_pixels),
        "reduced: all": lambda: read(reduced),
    }


def measure(repeat: int, inner: int, stages: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU milliseconds of each stage; the stages alternate."""
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeat):
        for name, run in stages.items():
            start = time.process_time()
            for _ in range(inner):
                run()
            times[name].append(1000 * (time.process_time() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photograph", type=Path, help="JPEG file; default: a synthetic one")
    parser.add_argument("--size", type=int, default=224, help="side of the network's input")
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    photograph = arguments.photograph.read_bytes() if arguments.photograph else create_photograph()
    for title, data, inner in (("photograph", photograph, 1), ("small", create_small(), 200)):
        height, width = decode(data, title).values.shape[1:]
        size = (arguments.size, arguments.size) if title == "photograph" else (height, width)
        print(f"{title} ({height}x{width}, {len(data) / 1e6:.3g} MB, to {size[0]}x{size[1]}): CPU ms per image")
        times = measure(arguments.repeat, inner, build_stages(data, size))
        for name, value in times.items():
            print(f"  {name:<36}{value:10.3f}")
        print(f"  reduced is {times['full: all'] / times['reduced: all']:.1f} times as fast as full")


if __name__ == "__main__":
    main()
