"""Memory and time of `farout score` by the number of images, up to a million, with a small network.

Images of 28 pixels, each a different one, are written as PNG into parquet files of 1,000 rows. `knn` on an untrained
network of 32 pixels is fitted once. Each number of images is then scored by one process, `farout score`, whose highest
resident memory the operating system reports when it ends. That of a run with 100 images is the memory of the model and
of the libraries alone.

    python benchmarks/million.py --out /tmp/million --images 1000 10000 100000 1000000

Images and detector are used again if they exist; the time per image is that beyond the run with 100 images.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGES_PER_FILE = 1000
FEW = 100
"""Number of images of the run whose memory is that of the model alone."""


def draw_images(number: int, count: int) -> np.ndarray:
    """Images (count, 28, 28), uint8, seeded by the number of their file: bright spots on noise, one in 100 inverted."""
    generator = np.random.default_rng(number)
    row, column, radius = generator.uniform([[8], [8], [3]], [[20], [20], [7]], (3, count))
    side = np.arange(28)
    distance = np.square(side[:, None] - row[:, None, None]) + np.square(side - column[:, None, None])
    spots = 180 * np.exp(-distance / (2 * np.square(radius))[:, None, None])
    images = (spots + generator.integers(0, 60, (count, 28, 28))).astype(np.uint8)
    return np.where(generator.random((count, 1, 1)) < 0.01, 255 - images, images)


def encode_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write_images(path: Path, number: int, count: int) -> None:
    table = pa.table({"image": [encode_png(image) for image in draw_images(number, count)]})
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="none")
    temporary.rename(path)


def create_source(folder: Path, count: int) -> Path:
    """A folder of parquet files with this many images; the files are links to those of larger sources."""
    source = folder / f"images-{count}"
    for start in range(0, count, IMAGES_PER_FILE):
        rows, number = min(IMAGES_PER_FILE, count - start), start // IMAGES_PER_FILE
        file = folder / "files" / f"{number:06d}-{rows}.parquet"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_images(file, number, rows)
        link = source / f"{number:06d}.parquet"
        if not link.is_file():
            link.parent.mkdir(exist_ok=True)
            os.link(file, link)
    return source


def run(*words: str) -> tuple[float, float, float]:
    """Run a farout command in a process of its own; seconds, seconds of CPU, and the highest resident memory in MiB.

    With processes that it starts, the memory is that of the largest one.
    """
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "farout", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"farout {shlex.join(words)} ended with {process.returncode}")
    memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, memory


def fit_detector(folder: Path, backbone: str) -> Path:
    detector = folder / f"detector-{backbone}"
    if not detector.is_dir():
        images = folder / "normal.parquet"
        write_images(images, 2**31, 2000)
        words = ["fit", "knn", str(images), "--out", str(detector), "--backbone", backbone, "--weights", "random"]
        run(*words, "--size", "32", "--alpha", "0.01", "--groups", "none", "--device", "cpu", "--no-cache")
    return detector


def measure(folder: Path, detector: Path, count: int, settings: list[str]) -> tuple[float, float, float, float]:
    """Score this many images into a new folder, which must be complete; seconds, seconds of CPU, and MiB of memory and
    of the page.
    """
    source, out = create_source(folder, count), folder / f"results-{count}"
    shutil.rmtree(out, ignore_errors=True)
    seconds, cpu, memory = run("score", str(detector), str(source), "--out", str(out), *settings)
    with (out / "scores.csv").open("rb") as file:
        rows = sum(1 for _ in file) - 1
    if rows != count or not (out / "manifest.json").is_file():
        raise SystemExit(f"{out} has scores of {rows} images, expected {count}")
    return seconds, cpu, memory, (out / "page.html").stat().st_size / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of images, detector and results")
    parser.add_argument("--images", nargs="+", type=int, default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--backbone", default="test_resnet", help="name of a timm network")
    parser.add_argument("--settings", default="--no-cache", help="further settings of `farout score`, as one text")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    detector = fit_detector(arguments.out, arguments.backbone)
    settings = shlex.split(arguments.settings)
    start, start_cpu, model, _ = measure(arguments.out, detector, FEW, settings)
    print(f"model alone: {model:.0f} MiB, {start:.1f} s with {FEW} images", flush=True)
    print("| images | seconds | ms per image | ms of CPU per image | MiB | MiB beyond the model | page in MiB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for count in arguments.images:
        seconds, cpu, memory, page = measure(arguments.out, detector, count, settings)
        each, cpu_each = 1000 * (seconds - start) / count, 1000 * (cpu - start_cpu) / count
        times, sizes = (
            f"{seconds:.1f} | {each:.3f} | {cpu_each:.3f}",
            f"{memory:.0f} | {memory - model:.0f} | {page:.2f}",
        )
        print(f"| {count:,} | {times} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
