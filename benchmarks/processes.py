"""Speed of `farout score` in several processes against one: images/s of whole runs, loading of the workers included.

    python benchmarks/processes.py cifar10:train cifar10:test --limit 4000

Each run is a command of its own with the feature cache off. One process has one thread, and each of several has one, so
that the ratio says what another core is worth.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from farout import Mahalanobis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("normal", help="source that the detector is fitted on")
    parser.add_argument("images", help="source that is scored")
    parser.add_argument("--limit", type=int, default=4000, help="number of images that are scored")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        detector = Path(folder, "detector")
        Mahalanobis().fit(arguments.normal, limit=300, statistics=200).save(detector)
        print("| processes | seconds | images/s | against the first |\n|---|---|---|---|")
        first = None
        for processes in arguments.processes:
            command = [
                sys.executable, "-m", "farout", "score", str(detector), arguments.images, "--no-cache",
                "--out", str(Path(folder, str(processes))), "--limit", str(arguments.limit),
                "--processes", str(processes), "--workers", "0",
            ]  # fmt: skip
            # the threads of the parent are divided among its workers
            environment = {**os.environ, "OMP_NUM_THREADS": str(processes)}
            started = time.perf_counter()
            subprocess.run(command, check=True, env=environment, capture_output=True)
            seconds = time.perf_counter() - started
            first = first or seconds
            print(f"| {processes} | {seconds:.1f} | {arguments.limit / seconds:.1f} | {first / seconds:.2f} |")


if __name__ == "__main__":
    main()
