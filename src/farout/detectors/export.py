"""Exports a detector as one graph, and compares the graph's scores with the detector's."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farout.core import store
from farout.core.errors import FaroutError, UnreadableImageError
from farout.core.exported_folder import KIND, Export, write_export
from farout.core.graph_files import Format, GraphInput, check_runtime, open_graph
from farout.core.names import find_path
from farout.core.progress import task
from farout.data.image_source import ImageSource
from farout.data.preprocessing_graph import PreprocessingGraph
from farout.detectors.base import Detector, load
from farout.detectors.calibration import check_fitted, compute_p_values
from farout.detectors.exported_detector import ExportedDetector
from farout.detectors.saving import describe_detector

__all__ = ["export_detector"]

_TOLERANCE = 1e-3
"""Largest difference of scores, in standard deviations of the calibration scores."""
_BATCH = 16
_OUTPUTS = ("score", "p_value", "is_ood")


def export_detector(
    detector: Detector | str | Path,
    out: str | Path,
    *,
    format: Format = "onnx",
    images: Any = None,
    limit: int | None = None,
    any_size: bool = False,
) -> Export:
    """Write a detector as one graph: RGB images in; score, p-value and flag out.

    The graph is then run on calibration images, and nothing is written where a score differs from the detector's by
    more than 1e-3 standard deviations of the calibration scores.

    Args:
        detector: a fitted detector or its folder.
        out: a new folder, or that of an export, which is replaced.
        format: `onnx`, `openvino` or `torch`.
        images: source of the calibration images, or of other normal images; None: that of the fit.
        limit: compare a seeded random sample of this many images; None: all.
        any_size: take images of any size, which the graph resizes exactly as Pillow does; else of the native size.

    Raises FaroutError for a detector that cannot be exported, where no images can be read to compare scores on, and
    where the graph's scores differ.
    """
    check_runtime(format)
    store.check_replaceable(out, KIND)
    fitted = load(find_path(detector), device="cpu") if isinstance(detector, str | Path) else detector
    check_fitted(fitted)
    if not hasattr(fitted, "preprocessing"):
        raise FaroutError("a detector fitted to plain features cannot be exported: it has no backbone")
    if limit is not None and limit < 1:
        raise FaroutError(f"limit is {limit}; expected at least 1, or None for all images")
    if fitted.precision != "fp32":
        raise FaroutError(
            f"this detector was fitted with precision {fitted.precision}, and graphs compute in fp32, with other "
            "p-values; fit it again with --precision fp32"
        )
    module = ExportedDetector(fitted, any_size).eval()
    source, expected = _choose_images(fitted, images, limit)
    height, width = module.preprocessing.input_size or (64, 48)
    example = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    inputs = [GraphInput("images", example, any_size)]

    def compare(folder: Path) -> dict[str, Any]:
        run = open_graph(folder, format, _OUTPUTS)
        return _compare_scores(run, source, expected, fitted, module.preprocessing)

    return write_export(
        module,
        inputs,
        {"score": "float64 (B,)", "p_value": "float64 (B,)", "is_ood": "bool (B,)"},
        Path(out),
        format,
        about=_describe(fitted, module.preprocessing),
        compare=compare,
        card=_card(fitted, module.preprocessing, format),
    )


def _choose_images(
    detector: Detector, images: Any, limit: int | None
) -> tuple[ImageSource, Mapping[str, float] | None]:
    """The calibration images with their scores by key; or other images, without scores, if they were given."""
    about = detector.provenance
    given = images if images is not None else about.get("calibration_source", about.get("source"))
    if given is None:
        raise FaroutError(
            "the detector was fitted on images in memory; give them, or other normal images, to compare scores on "
            "(--images SOURCE)"
        )
    try:
        source = detector.open_images(given, policy="skip", reading=detector.reading_of_fit)
    except (FaroutError, OSError) as error:
        raise FaroutError(f"{error}; give images to compare scores on (--images SOURCE)") from error
    scores = detector.compute_scores(detector.calibration)[detector.score_name].double().tolist()
    calibration = dict(zip(detector.calibration.keys, scores, strict=True))
    generator = np.random.default_rng(detector.seed)
    chosen = []
    for index in generator.permutation([index for index, key in enumerate(source.keys) if key in calibration]).tolist():
        try:
            if source.content_hash(index) in detector.calibration_hashes:
                chosen.append(index)
        except UnreadableImageError:
            continue
        if len(chosen) == limit:
            break
    is_calibration = bool(chosen)
    if not chosen and images is None:
        raise FaroutError(
            f"{source.name} no longer contains the calibration images; give images to compare scores on "
            "(--images SOURCE)"
        )
    if not is_calibration:
        chosen = generator.permutation(len(source))[:limit].tolist()
    return source.subset(sorted(chosen)), calibration if is_calibration else None


def _compare_scores(
    run: Callable[..., Mapping[str, np.ndarray]],
    source: ImageSource,
    expected: Mapping[str, float] | None,
    detector: Detector,
    preprocessing: PreprocessingGraph,
) -> dict[str, Any]:
    """The parity report; raises FaroutError where scores, p-values or flags differ."""
    calibration = detector.calibration_scores[detector.score_name]
    unit = float(np.std(calibration)) or max(1.0, float(np.abs(calibration).max()))
    if expected is None:
        computed = detector.score(source)
        expected = dict(zip(computed.keys, computed.score.tolist(), strict=True))
    keys: list[str] = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in _OUTPUTS}
    batch_difference = 0.0
    with task("comparing scores", len(source)) as bar:
        for batch_keys, images in _load_pixels(source, preprocessing):
            outputs = run(images)
            if not keys and len(batch_keys) > 1:  # the same image in a batch of one
                alone = run(images[:1])["score"]
                batch_difference = float(np.abs(alone - outputs["score"][:1]).max()) / unit
            keys += batch_keys
            for name in _OUTPUTS:
                found[name].append(outputs[name])
            bar.advance(len(batch_keys))
    if not keys:
        raise FaroutError(f"no image of {source.name} can be read, so the scores cannot be compared")
    score, p_value, is_ood = (np.concatenate(found[name]) for name in _OUTPUTS)
    reference = np.array([expected[key] for key in keys])
    differences = np.where(np.isnan(score) & np.isnan(reference), 0.0, np.abs(score - reference)) / unit
    worst = int(np.argmax(np.where(np.isnan(differences), np.inf, differences)))
    report: dict[str, Any] = {
        "images": len(keys),
        "compared_on": "calibration images" if set(keys) <= set(detector.calibration.keys) else "other images",
        "max_difference": float(differences[worst]),
        "mean_difference": float(differences.mean()),
        "batch_difference": batch_difference,
        "unit": "standard deviations of the calibration scores",
        "tolerance": _TOLERANCE,
        "processor": platform.machine(),
    }
    if not max(report["max_difference"], batch_difference) <= _TOLERANCE:
        raise FaroutError(
            f"the graph's scores differ from the detector's by up to {report['max_difference']:.3g} standard "
            f"deviations of the calibration scores ({keys[worst]}), expected at most {_TOLERANCE:g}; nothing was "
            "written"
        )
    # A score next to a calibration score, its own for example, may be on the other side of it.
    low, high = (compute_p_values(reference + sign * _TOLERANCE * unit, calibration) for sign in (1, -1))
    alpha = detector.alpha * (1 + 1e-12)
    valid = np.isnan(reference) | (
        (p_value >= low - 1e-6) & (p_value <= high + 1e-6) & ((high <= alpha) <= is_ood) & (is_ood <= (low <= alpha))
    )
    if not valid.all():
        key = keys[int(np.argmin(valid))]
        raise FaroutError(f"the graph's p-value or flag of {key} differs from the detector's; nothing was written")
    return report


def _load_pixels(source: ImageSource, preprocessing: PreprocessingGraph) -> Iterator[tuple[list[str], np.ndarray]]:
    """Keys and RGB images, uint8 (B, 3, H, W), as the graph takes them; a batch has images of one size."""
    keys: list[str] = []
    images: list[Tensor] = []
    for index, key in enumerate(source.keys):
        try:
            image = source.read_pixels(index, preprocessing.preprocessing.least_size)
        except UnreadableImageError:
            continue
        if preprocessing.input_size is not None:
            image = preprocessing.preprocessing.resize_first(image)
        image = image.expand(3, -1, -1)
        if images and (len(images) == _BATCH or images[0].shape != image.shape):
            yield keys, torch.stack(images).numpy()
            keys, images = [], []
        keys.append(key)
        images.append(image)
    if images:
        yield keys, torch.stack(images).numpy()


def _describe(detector: Detector, preprocessing: PreprocessingGraph) -> dict[str, Any]:
    """What the graph contains, for `config.json`."""
    facts = describe_detector(detector)
    height, width = preprocessing.input_size or (None, None)
    return {
        "content": "detector",
        "method": facts["method"],
        "settings": facts["config"],
        "score": detector.score_name,
        "alpha": detector.alpha,
        "calibration_images": len(detector.calibration),
        "fingerprint": detector.fingerprint,
        "images": {
            "channels": "RGB; gray images as three equal channels",
            "range": [0, 255],
            "height": height,
            "width": width,
            "steps_before": preprocessing.steps_before,
            "preprocessing": preprocessing.preprocessing.to_dict(),
        },
        "in_the_graph": [
            "resizing to the size of the networks",
            "channels",
            "scaling to [0, 1]",
            "networks",
            "statistics",
            "score",
            "p-value",
            "flag",
        ],
        "not_in_the_graph": ["decoding of files", *preprocessing.steps_before],
    }


def _card(detector: Detector, preprocessing: PreprocessingGraph, file_format: Format) -> str:
    """The model card."""
    method = describe_detector(detector)["method"]
    run = {
        "onnx": [
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])',
            'score, p_value, is_ood = session.run(["score", "p_value", "is_ood"], {"images": images})',
        ],
        "openvino": [
            "import openvino",
            "",
            "# without f32, processors with bf16 compute other scores",
            'graph = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
            "outputs = graph([images])",
            'score, p_value, is_ood = outputs["score"], outputs["p_value"], outputs["is_ood"]',
        ],
        "torch": [
            "import torch",
            "",
            "# a pickle may be part of this file: load your own exports only",
            'graph = torch.export.load("model.pt2").module()',
            "score, p_value, is_ood = graph(torch.from_numpy(images))",
        ],
    }[file_format]
    lines = [
        f"# A farout detector as a graph: {method}",
        "",
        f"Images in; score ({detector.score_name}, higher = more anomalous), p-value and flag (p-value <= "
        f"{detector.alpha:g}) out. `config.json` describes inputs and outputs, `parity.json` how the scores were "
        "compared with the detector's.",
        "",
        "```python",
        "import numpy as np",
        "from PIL import Image, ImageOps",
        *run[:1],
        "",
        *_loading_lines(preprocessing),
        "",
        *run[2:],
        "```",
        "",
        "farout composites transparent images on white, and converts images of more than 8 bits by a value range; "
        "`convert` does neither.",
        "",
    ]
    return "\n".join(lines)


def _loading_lines(graph: PreprocessingGraph) -> list[str]:
    """Python that loads one image as the graph takes it."""
    lines = ['image = ImageOps.exif_transpose(Image.open("image.png")).convert("RGB")']
    if graph.input_size is not None:
        preprocessing, (height, width) = graph.preprocessing, graph.input_size
        if preprocessing.crop is not None:
            crop = preprocessing.crop
            lines += [
                f"width, height = min({crop}, image.width), min({crop}, image.height)",
                "left, top = (image.width - width) // 2, (image.height - height) // 2",
                "image = image.crop((left, top, left + width, top + height))",
            ]
        kernel = f"Image.Resampling.{preprocessing.kernel.upper()}"
        if preprocessing.fill:
            lines.append(f"image = ImageOps.fit(image, ({width}, {height}), {kernel})  # up to rounding of the crop")
        else:
            lines.append(f"image = image.resize(({width}, {height}), {kernel})")
        if preprocessing.protocol == "common":
            lines += [
                "file = io.BytesIO()",
                f'image.save(file, "JPEG", quality={preprocessing.jpeg_quality}, subsampling="4:2:0")',
                "image = Image.open(file)",
            ]
            lines.insert(0, "import io\n")
    lines.append("images = np.asarray(image).transpose(2, 0, 1)[None].copy()  # uint8 (B, 3, height, width)")
    return lines
