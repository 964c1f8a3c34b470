"""Effect of reduced decoding on scores: Tiny-ImageNet and textures, enlarged to photographs.

    python benchmarks/reduced_decoding.py --images 200 --side 2048

The images are enlarged (bicubic, grain added, JPEG of quality 90), and one detector is fitted with full decoding. It
scores other images of Tiny-ImageNet and textures with full and with reduced decoding: the differences are in standard
deviations of the calibration scores. A second one is fitted to the same split, and scores, with reduced decoding.
"""

import argparse
import io
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

import farout
from farout.data.decoding import to_pil
from farout.data.splits import split_source
from farout.detectors.fit_settings import FitSettings
from farout.detectors.fitting import fit_to_split
from farout.detectors.knn import KNN
from farout.detectors.mahalanobis import Mahalanobis

METHODS = {"mahalanobis": Mahalanobis, "knn": KNN}


def write_photographs(source: str, folder: Path, count: int, side: int) -> Path:
    """Write enlarged images of a source as JPEG files of 3:4."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    images = farout.open_source(source, limit=count)
    for index in range(len(images)):
        large = to_pil(images[index]).convert("RGB").resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        grain = draws.normal(0, 4, (side, side * 4 // 3, 1))
        pixels = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        (folder / f"{index:05d}.jpg").write_bytes(file.getvalue())
    return folder


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="images of the fit; half as many of each test set")
    parser.add_argument("--side", type=int, default=2048, help="height of the photographs")
    parser.add_argument("--method", choices=METHODS, default="mahalanobis")
    arguments = parser.parse_args()
    cpu = farout.Runtime(device="cpu", precision="fp32", workers=2, cache=False)
    with TemporaryDirectory() as temporary:
        sources = {"train": "tiny_imagenet:train", "test": "tiny_imagenet:test", "ood": "textures:test"}
        counts = {"train": arguments.images, "test": arguments.images // 2, "ood": arguments.images // 2}
        folders = {
            name: write_photographs(source, Path(temporary, name), counts[name], arguments.side)
            for name, source in sources.items()
        }
        source = farout.open_source(folders["train"])
        split = split_source(source, statistics=400, train=False, groups="none")
        detectors, scores = {}, {}
        for is_reduced in (False, True):
            detector = METHODS[arguments.method]()
            detector.features = detector.build_features()
            fit_to_split(detector, source.with_reduced_decoding(is_reduced), split, FitSettings(runtime=cpu))
            detectors[is_reduced] = detector
            scores[is_reduced] = {name: detector.score(folders[name]).score for name in ("test", "ood")}
        full = detectors[False]
        deviation = float(np.std(full.calibration_scores[full.score_name]))
        full.preprocessing = replace(full.preprocessing, reduced_decoding=True)
        changed = {name: full.score(folders[name]).score for name in ("test", "ood")}
    for is_reduced, name in ((False, "full"), (True, "reduced")):
        test, ood = scores[is_reduced]["test"], scores[is_reduced]["ood"]
        auroc = roc_auc_score([0] * len(test) + [1] * len(ood), np.concatenate([test, ood]))
        print(f"fitted and scored with {name} decoding: AUROC {auroc:.4f}")
    for name in ("test", "ood"):
        shift = (changed[name] - scores[False][name]) / deviation
        print(
            f"{name}, fitted with full decoding: mean shift {shift.mean():+.4f}, mean difference "
            f"{np.abs(shift).mean():.4f}, largest {np.abs(shift).max():.4f} standard deviations of the calibration"
        )


if __name__ == "__main__":
    main()
