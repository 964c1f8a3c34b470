"""How much bf16 changes scores: every detector, fitted in fp32, scores the same images in fp32 and in bf16.

Differences are in standard deviations of the calibration scores in fp32.

    farout train diffusion fashion_mnist:train --limit 6000 --preset classes --training.steps 400 --out diffusion/
    farout train classifier fashion_mnist:train --limit 6000 --training.steps 300 --out classifier/
    python benchmarks/precision.py --diffusion diffusion/ --classifier classifier/ --out precision.csv
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from farout import Classifier, DiffusionModel
from farout.core.runtime import Runtime
from farout.detectors import DETECTORS
from farout.detectors.base import Detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diffusion", help="folder, for the methods that use one")
    parser.add_argument("--classifier", help="folder, for the methods that use one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=sorted(DETECTORS))
    parser.add_argument("--images", default="fashion_mnist:train")
    parser.add_argument("--id", default="fashion_mnist:test")
    parser.add_argument("--ood", default="mnist:test")
    parser.add_argument("--fit-limit", type=int, default=600)
    parser.add_argument("--count", type=int, default=150)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    diffusion = DiffusionModel.load(arguments.diffusion) if arguments.diffusion else None
    classifier = Classifier.load(arguments.classifier) if arguments.classifier else None
    rows: list[dict[str, Any]] = []
    for name in arguments.methods:
        detector: Detector = DETECTORS[name].load()()
        networks: dict[str, Any] = {"classifier": classifier} if detector.requirements.classifier else {}
        if detector.requirements.diffusion == "images":
            networks["diffusion"] = diffusion
        runtime = Runtime(precision="fp32", cache=False)
        detector.fit(arguments.images, limit=arguments.fit_limit, **networks, runtime=runtime)
        scores, flags = {}, {}
        for precision in ("fp32", "bf16"):
            detector.attach_runtime(Runtime(precision=precision, cache=False))
            tables = [detector.score(source, limit=arguments.count) for source in (arguments.id, arguments.ood)]
            scores[precision] = np.concatenate([table.score for table in tables])
            flags[precision] = np.concatenate([table.is_ood for table in tables])
            is_ood_image = np.repeat([0, 1], [len(table) for table in tables])
        deviation = np.std(detector.calibration_scores[detector.score_name])
        difference = np.abs(scores["bf16"] - scores["fp32"]) / deviation
        rows.append(
            {
                "detector": name,
                "median": np.median(difference),
                "p95": np.quantile(difference, 0.95),
                "largest": difference.max(),
                "flags changed": int((flags["fp32"] != flags["bf16"]).sum()),
                "images": len(difference),
                "AUROC fp32": roc_auc_score(is_ood_image, scores["fp32"]),
                "AUROC bf16": roc_auc_score(is_ood_image, scores["bf16"]),
            }
        )
        table = pd.DataFrame(rows)
        table.to_csv(arguments.out, index=False)
        print(table.tail(1).to_string(index=False, header=len(rows) == 1), flush=True)


if __name__ == "__main__":
    main()
