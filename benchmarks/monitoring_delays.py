"""False alarms and detection delays of `farout.Monitor` on simulated scores, for docs/monitoring.md.

    python benchmarks/monitoring_delays.py [--streams 200]

Scores are normal with variance 1; the scores of changed images are higher. Prints two Markdown tables.
"""

from __future__ import annotations

import argparse
import math

import numpy as np

import farout
from farout.detectors.calibration import compute_p_values

STATISTICS = ("martingale", "shiryaev-roberts")
CHANGES = {
    "all scores higher by 1 standard deviation": (1.0, 1.0),
    "all scores higher by 3 standard deviations": (3.0, 1.0),
    "one image in ten higher by 6": (6.0, 0.1),
    "one image in fifty higher by 6": (6.0, 0.02),
}
AFTER = 3000
"""Images after the change; a change that raises no alarm among them counts as missed."""


def monitor_stream(
    n: int, normal: int, changed: int, change: tuple[float, float], statistic: str, seed: int
) -> list[int]:
    """Numbers of the images at which there was an alarm."""
    generator = np.random.default_rng(seed)
    calibration, scores = generator.normal(size=n), generator.normal(size=normal + changed)
    shift, share = change
    scores[normal:] += shift * (generator.random(changed) < share)
    monitor = farout.Monitor(n, statistic=statistic, seed=seed)
    monitor.update(compute_p_values(scores, calibration))
    return [alarm.image for alarm in monitor.alarms]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=200)
    streams = parser.parse_args().streams

    print(
        "| calibration images | streams with a false alarm (martingale) | images per false alarm (Shiryaev-Roberts) |"
    )
    print("| --- | --- | --- |")
    length = 10_000
    for n in (20, 50, 200, 1000):
        alarms = [
            [len(monitor_stream(n, length, 0, (0.0, 1.0), statistic, seed)) for seed in range(streams)]
            for statistic in STATISTICS
        ]
        share = np.mean([count > 0 for count in alarms[0]])
        print(f"| {n} | {100 * share:.1f} % | {streams * length / max(1, sum(alarms[1])):,.0f} |", flush=True)

    print("\n| change | calibration images | normal images before | martingale | Shiryaev-Roberts |")
    print("| --- | --- | --- | --- | --- |")
    for name, change in CHANGES.items():
        for n in (50, 200, 1000):
            for normal in (0, 500, 5000):
                cells = []
                for statistic in STATISTICS:
                    delays = []
                    for seed in range(max(1, streams // 4)):
                        alarms_after = [
                            image - normal
                            for image in monitor_stream(n, normal, AFTER, change, statistic, seed)
                            if image > normal
                        ]
                        delays.append(alarms_after[0] if alarms_after else math.inf)
                    median, late = np.quantile(delays, [0.5, 0.9], method="inverted_cdf")
                    cells.append(
                        " (".join(f"{x:.0f}" if x < math.inf else f"over {AFTER}" for x in (median, late)) + ")"
                    )
                print(f"| {name} | {n} | {normal} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
