"""`farout export`."""

from __future__ import annotations

from farout.cli.terminal import print_text
from farout.core import store
from farout.core.errors import FaroutError
from farout.core.exported_folder import Export
from farout.core.graph_files import Format
from farout.core.names import find_path

__all__ = ["export", "print_export"]


def export(
    model: str,
    *,
    out: str,
    format: Format = "onnx",
    images: str | None = None,
    limit: int | None = None,
    any_size: bool = False,
) -> Export:
    """Write a detector, or the denoiser of a diffusion model, as a graph that runs without farout.

    Args:
        model: folder of a fitted detector or of a diffusion model.
        out: folder of the graph; it must be new, or contain an exported graph, which is replaced.
        format: `onnx` (for onnxruntime and others), `openvino`, or `torch` (a torch.export file).
        images: detectors: source of the calibration images, or of other normal images, on which the graph's scores are
            compared with the detector's; default: that of the fit.
        limit: detectors: compare the scores of a seeded random sample of this many images; default: all.
        any_size: detectors: the graph takes images of any size and resizes them itself, exactly as Pillow does;
            default: it takes images of the fitted native size.
    """
    folder = find_path(model)
    if store.kind_of(folder) == "detector":
        from farout.detectors.export import export_detector

        return export_detector(folder, out, format=format, images=images, limit=limit, any_size=any_size)
    if store.kind_of(folder) == "feature diffusion model":
        raise FaroutError(f"{folder} is a diffusion model of features, which is exported as part of its detector")
    if images is not None or limit is not None or any_size:
        raise FaroutError("images, limit and any_size are for detectors only, and this is a diffusion model")
    from farout.diffusion.export import export_denoiser

    return export_denoiser(folder, out, format=format)


def print_export(result: Export) -> None:
    """Prints the graph's file and its difference from the original."""
    parity = result.parity
    count = f"{parity['images']} {parity['compared_on']}" if "images" in parity else f"{parity['rows']} noisy images"
    print_text(f"{result.file} agrees on {count}: difference at most {parity['max_difference']:.2g} {parity['unit']}")
