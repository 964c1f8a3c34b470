"""Cost of the feature cache by the number of images: writing, opening, and looking up in order and at random.

    python benchmarks/feature_cache.py --rows 10000 100000 1000000 --width 1000 --out /tmp/feature-cache

Writing 1,000,000 rows of 1,000 features takes 4 GB. Each phase runs in a process of its own, whose peak resident memory
is that of the libraries plus what the cache needs. Opening and look-ups read files that the system may still hold in
memory; `--drop` is a command that empties its cache before each phase: `sync; echo 3 > /proc/sys/vm/drop_caches`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from farout.features.feature_store import FeatureStore

ROWS_PER_CALL = 16
"""Number of images that a detector computes at a time on a CPU."""


def hash_image(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8), digest_size=16).digest()


def open_store(folder: Path, width: int) -> FeatureStore:
    store = FeatureStore(folder, width, {"format": 4})
    store.refresh()
    return store


def write(folder: Path, rows: int, width: int) -> float:
    """Seconds to store the rows, without drawing them."""
    store, seconds = open_store(folder, width), 0.0
    generator = np.random.default_rng(0)
    for start in range(0, rows, ROWS_PER_CALL):
        features = generator.random((ROWS_PER_CALL, width), dtype=np.float32)
        added = {hash_image(start + number): features[number] for number in range(min(ROWS_PER_CALL, rows - start))}
        started = time.perf_counter()
        store.add(added)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    store.flush()
    return seconds + time.perf_counter() - started


def look_up(folder: Path, rows: int, width: int, order: str) -> tuple[float, float]:
    """Seconds to open the cache, and to read up to 100,000 rows one by one."""
    started = time.perf_counter()
    store = open_store(folder, width)
    opened = time.perf_counter() - started
    numbers = np.arange(min(rows, 100_000))
    if order == "random":
        numbers = np.random.default_rng(1).choice(rows, len(numbers), replace=False)
    hashes = [hash_image(number + (rows if order == "missing" else 0)) for number in numbers.tolist()]
    started = time.perf_counter()
    found = sum(len(store.read([image_hash])) for image_hash in hashes)
    seconds = time.perf_counter() - started
    if found != (0 if order == "missing" else len(hashes)):
        raise SystemExit(f"{found} of {len(hashes)} rows were found")
    return opened, seconds / len(hashes)


def measure(phase: str, folder: Path, rows: int, width: int) -> dict[str, float]:
    """Run one phase in this process."""
    kind = folder / "features" / f"{rows:016x}"
    if phase == "write":
        shutil.rmtree(kind, ignore_errors=True)
        result = {"us per row": write(kind, rows, width) / rows * 1e6}
    else:
        opened, per_row = look_up(kind, rows, width, phase)
        result = {"s to open": opened, "us per row": per_row * 1e6}
    files = list(kind.glob("*.arrow"))
    result |= {"files": len(files), "MiB on disk": sum(file.stat().st_size for file in files) / 2**20}
    return {**result, "MiB resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--drop", help="command that runs before each phase")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.phase:
        print(json.dumps(measure(arguments.phase, arguments.out, arguments.rows[0], arguments.width)))
        return
    for rows in arguments.rows:
        for phase in ("write", "in order", "random", "missing"):
            if arguments.drop:
                subprocess.run(arguments.drop, shell=True, check=True)
            settings = ["--rows", rows, "--width", arguments.width, "--out", arguments.out, "--phase", phase]
            result = subprocess.run(
                [sys.executable, __file__, *map(str, settings)],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "FAROUT_CACHE_LIMIT": "none"},
            )
            figures = ", ".join(f"{name} {value:,.3g}" for name, value in json.loads(result.stdout).items())
            print(f"{rows:,} rows, {phase}: {figures}", flush=True)
        shutil.rmtree(arguments.out / "features" / f"{rows:016x}")


if __name__ == "__main__":
    main()
