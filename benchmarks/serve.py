"""Requests per second and latency of `farout serve` by concurrency, against the bare `Scorer` on the same images.

One run takes less than two minutes on a quiet machine with two cores:

    python benchmarks/serve.py --threads 1

Each request has one image. Client and service share the machine, so the client's time is part of the result.
"""

from __future__ import annotations

import argparse
import http.client
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

import farout
from farout.data.decoding import to_pil
from farout.data.sources import open_source
from farout.detectors import DETECTORS

Result = tuple[np.ndarray, float]
"""The latency of each call, and the time from the start of the first to the end of the last, in seconds."""


def encode_images(source: str, count: int) -> list[bytes]:
    """PNG files of the first images of a source."""
    opened, encoded = open_source(source, limit=count), []
    for index in range(len(opened)):
        file = io.BytesIO()
        to_pil(opened[index]).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded


def measure(call: Callable[[Any], object], images: Sequence[Any], concurrency: int, seconds: float) -> Result:
    """Call from `concurrency` threads, with the arguments in turn, for about this many seconds."""
    latencies: list[float] = []
    lock, start = threading.Lock(), threading.Barrier(concurrency)

    def work(offset: int) -> None:
        start.wait()
        end = time.perf_counter() + seconds
        for image in itertools.islice(itertools.cycle(images), offset, None):
            started = time.perf_counter()
            if started > end:
                return
            call(image)
            with lock:
                latencies.append(time.perf_counter() - started)

    threads = [threading.Thread(target=work, args=(number * 7 % len(images),)) for number in range(concurrency)]
    started_all = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return np.array(latencies), time.perf_counter() - started_all


def start_service(detector: Path, threads: int, *flags: str) -> tuple[subprocess.Popen[str], str]:
    """Start `farout serve` on a free port and wait until it answers; returns the process and its address."""
    command = [sys.executable, "-m", "farout", "serve", str(detector), "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"serving .* at http://(\S+)", line):
            return process, match[1]
    raise SystemExit("the service did not start")


def post_image(address: str) -> Callable[[bytes], object]:
    """A function that scores one image, with one connection per thread."""
    local = threading.local()
    parts = urlsplit(f"//{address}")

    def post(image: bytes) -> object:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=120)
        local.connection.request("POST", "/score", image, {"Content-Type": "application/octet-stream"})
        response = local.connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise SystemExit(f"status {response.status}: {body.decode()}")
        return json.loads(body)

    return post


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="knn", help="a detector of features of the default backbone")
    parser.add_argument("--images", default="sample_fashion:test")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, in the service and for the Scorer")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    images = encode_images(arguments.images, 256)
    runtime = {"cache": False, "precision": arguments.precision}
    with tempfile.TemporaryDirectory() as folder:
        detector = Path(folder) / "detector"
        fitted = DETECTORS[arguments.method].load()()
        fitted.fit("sample_fashion:train", limit=200, alpha=0.1).save(detector)
        scorer = farout.Scorer(detector, **runtime)
        scorer({"image": images[:1]})
        print(f"{arguments.method}, {len(images)} images, {arguments.threads} threads, {arguments.precision}")
        print(f"{'':28}{'images/s':>10}{'p50 ms':>10}{'p95 ms':>10}{'p99 ms':>10}")

        def show(name: str, result: Result, images_per_call: int = 1) -> None:
            latencies, seconds = result
            rate = images_per_call * len(latencies) / seconds
            cells = "".join(f"{1000 * np.quantile(latencies, q):>10.1f}" for q in (0.5, 0.95, 0.99))
            print(f"{name:28}{rate:>10.1f}{cells}", flush=True)

        show("Scorer, one image", measure(lambda image: scorer({"image": [image]}), images, 1, arguments.seconds))
        for size in (8, 32):
            tables = [images[start : start + size] for start in range(0, len(images) - size + 1, size)]
            result = measure(lambda table: scorer({"image": table}), tables, 1, arguments.seconds)
            show(f"Scorer, {size} images", result, size)
        flags = ["--no-cache", "--precision", arguments.precision, "--processes", str(arguments.processes)]
        process, address = start_service(detector, arguments.threads, *flags)
        try:
            post = post_image(address)
            measure(post, images, 1, 1.0)
            for concurrency in arguments.concurrency:
                show(f"serve, concurrency {concurrency}", measure(post, images, concurrency, arguments.seconds))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
