"""How much bf16 changes scores: every detector, fitted in fp32, scores the same images in fp32 and in bf16.

Differences are in standard deviations of the calibration scores, which are those of fp32.

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
import torch
from sklearn.metrics import roc_auc_score

from farout import Classifier, DiffusionModel
from farout.core import registry
from farout.core.runtime import Runtime
from farout.detectors.base import Detector


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--diffusion", required=True)
    parser.add_argument("--classifier", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", default="fashion_mnist:train")
    parser.add_argument("--id", default="fashion_mnist:test")
    parser.add_argument("--ood", default="mnist:test")
    parser.add_argument("--count", type=int, default=150)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    diffusion, classifier = DiffusionModel.load(given.diffusion), Classifier.load(given.classifier)
    rows: list[dict[str, Any]] = []
    for name in sorted(registry.members("detectors")):
        detector: Detector = registry.find("detectors", name).load()()
        models: dict[str, Any] = {"classifier": classifier} if "classifier" in detector.needs else {}
        if "diffusion" in detector.needs and detector.diffusion_of == "images":
            models["diffusion"] = diffusion
        detector.fit(given.images, limit=600, **models, runtime=Runtime(precision="fp32", cache=False))
        scores = {}
        for precision in ("fp32", "bf16"):
            detector.use(detector.diffusion, Runtime(precision=precision, cache=False))
            scores[precision] = [detector.score(source, limit=given.count) for source in (given.id, given.ood)]
        scale = np.std(detector.calibration_scores[detector.score_name])
        exact, coarse = (np.concatenate([part.score for part in scores[name]]) for name in ("fp32", "bf16"))
        flags = [np.concatenate([np.asarray(part.is_ood) for part in scores[name]]) for name in ("fp32", "bf16")]
        labels = np.repeat([0, 1], [len(part) for part in scores["fp32"]])
        difference = np.abs(coarse - exact) / scale
        rows.append(
            {
                "detector": name,
                "median": np.median(difference),
                "p95": np.quantile(difference, 0.95),
                "largest": difference.max(),
                "flags changed": int((flags[0] != flags[1]).sum()),
                "images": len(exact),
                "AUROC fp32": roc_auc_score(labels, exact),
                "AUROC bf16": roc_auc_score(labels, coarse),
            }
        )
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(given.out, index=False)


if __name__ == "__main__":
    main()
