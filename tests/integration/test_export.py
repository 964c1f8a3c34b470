"""Exported graphs give the detector's scores without farout, or are not written."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import farout
from farout.cli import main
from farout.core import graph_files, store
from farout.core.errors import FaroutError, MissingExtraError, StoreError
from farout.core.graph_files import open_graph
from farout.detectors import DETECTORS
from farout.detectors import export as detector_export
from farout.detectors.base import Detector
from farout.detectors.export import export_detector
from farout.detectors.exported_detector import ExportedDetector
from farout.diffusion.export import export_denoiser
from farout.diffusion.exported_denoiser import ExportedDenoiser
from farout.diffusion.model import DiffusionModel
from small import CPU, by_tokens, classifier, conditional, latent, model, pictures

TINY = {"backbone": "test_efficientnet", "weights": "random", "size": 32}
OUTPUTS = ("score", "p_value", "is_ood")
FORMATS = ("onnx", "openvino", "torch")
RUNNER = """
import sys
import numpy as np
images = np.load(sys.argv[2])
if sys.argv[1] == "onnx":
    import onnxruntime
    run = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    outputs = [run.run(["score", "p_value", "is_ood"], {"images": batch}) for batch in (images, images[:1])]
elif sys.argv[1] == "openvino":
    import openvino
    run = openvino.Core().compile_model("model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [run([batch]) for batch in (images, images[:1])]
    outputs = [[np.array(each[name]) for name in ("score", "p_value", "is_ood")] for each in found]
else:
    import torch
    run = torch.export.load("model.pt2").module()
    outputs = [[value.numpy() for value in run(torch.from_numpy(batch))] for batch in (images, images[:1])]
assert "farout" not in sys.modules
np.savez(sys.argv[3], *outputs[0], alone=outputs[1][0])
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images") / "good", 60)


@pytest.fixture(scope="module")
def detector(images: Path) -> Detector:
    return farout.KNN(**TINY).fit(images, statistics=30, alpha=0.1, runtime=CPU)


@pytest.fixture(scope="module")
def folder(detector: Detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    detector.save(path := tmp_path_factory.mktemp("detector") / "knn")
    return path


def as_rgb(folder: Path) -> torch.Tensor:
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(pixels).transpose(0, 3, 1, 2).copy())


def assert_agrees(detector: Detector, source: Path) -> None:
    """The module that is exported gives the scores, p-values and flags of `score`, in batches of 1 and 7."""
    scores, pixels, module = detector.score(source), as_rgb(source), ExportedDetector(detector).eval()
    unit = np.std(detector.calibration_scores[detector.score_name])
    with torch.no_grad():
        for batch in (pixels[:7], pixels[:1]):
            score = module(batch)[0].numpy()
            np.testing.assert_allclose(score, scores.score[: len(batch)], rtol=0, atol=1e-4 * unit)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("knn", {"score": "mean"}),
        ("mahalanobis", {"score": "distance"}),
        ("mahalanobis", {"score": "layers", "standardize": "none"}),
        ("pca", {"score": "residual"}),
        ("pca", {"score": "fraction"}),
        ("gmm", {"score": "density"}),
        ("gmm", {"score": "inside"}),
        ("autoencoder", {"score": "mfsim", "updates": 20}),
        ("autoencoder", {"score": "mse", "updates": 20}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["score"],
)
def test_scores_of_features_are_those_of_the_detector(images: Path, method: str, settings: dict[str, Any]) -> None:
    fitted = DETECTORS[method].load()(**TINY, **settings).fit(images, statistics=30, alpha=0.1, runtime=CPU)
    assert_agrees(fitted, images)


def test_scores_of_classes_are_those_of_the_detector(tmp_path: Path) -> None:
    for number, name in enumerate("ab"):
        pictures(tmp_path / "labelled" / name, 25, low=40 + 60 * number, seed=number)
    pictures(tmp_path / "new", 8)
    fitted = farout.Mahalanobis(**TINY, classes=True).fit(tmp_path / "labelled", alpha=0.1, runtime=CPU)
    for score in ("conditional", "relative"):
        assert_agrees(fitted.with_scoring(score=score), tmp_path / "new")


def test_all_scores_of_semantic_are_those_of_the_detector(images: Path) -> None:
    semantic = DETECTORS["semantic"].load()
    tiny = {**semantic.test_arguments, **TINY}
    fitted = semantic(**tiny, sigmas=(0.25, 1.0)).fit(images, statistics=20, alpha=0.1, runtime=CPU)
    for score in ("combined", "empirical_norm", "residual_norm", "residual_error", "distance"):
        assert_agrees(fitted.with_scoring(score=score), images)
    tiny |= {"denoiser": "lfdn", "bottleneck": 64}
    fitted = semantic(**tiny, regret=True).fit(images, statistics=20, alpha=0.1, runtime=CPU)
    for score in ("mse", "mfsim", "mfsim_released", "calibrated_mse", "calibrated_mfsim", "distance", "fused", "lr"):
        assert_agrees(fitted.with_scoring(score=score), images)
    for settings in ({"sampler": "ddim", "levels": (3, 20)}, {"sampler": "released", "levels": (3,)}):
        assert_agrees(semantic(**tiny, **settings).fit(images, statistics=20, alpha=0.1, runtime=CPU), images)
    with pytest.raises(FaroutError, match="noise=shared"):
        semantic(**tiny, noise="image").fit(images, statistics=20, alpha=0.1, runtime=CPU).build_score_module()


def test_all_scores_of_patches_are_those_of_the_detector(images: Path) -> None:
    patches = DETECTORS["patches"].load()
    fitted = patches(**{**patches.test_arguments, **TINY}).fit(images, statistics=20, alpha=0.1, runtime=CPU)
    for score in ("diffusion_top", "diffusion_mean", "knn_top", "knn_mean"):
        assert_agrees(fitted.with_scoring(score=score), images)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_scores_of_a_classifier_are_those_of_the_detector(images: Path) -> None:
    posthoc = DETECTORS["posthoc"].load()
    network = classifier(classes=4)
    fitted = posthoc().fit(images, classifier=network, statistics=40, alpha=0.1, runtime=CPU)
    for score in [
        "msp",
        "max_logit",
        "energy",
        "gen",
        "react",
        "dice",
        "ash",
        "scale",
        "vim",
        "knn",
        "she",
        "mahalanobis",
        "rmds",
    ]:
        assert_agrees(fitted.with_scoring(score=score), images)
    shaped = posthoc(shaping="maps", score="ash").fit(images, classifier=network, statistics=40, alpha=0.1, runtime=CPU)
    with pytest.raises(FaroutError, match="shaping=pooled"):
        shaped.build_score_module()
    with pytest.raises(FaroutError, match="requires a gradient"):
        posthoc(score="odin").build_score_module()


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_graph_runs_without_farout(
    folder: Path, images: Path, tmp_path: Path, file_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if file_format != "torch":
        pytest.importorskip("onnxscript" if file_format == "onnx" else "openvino")
    out = tmp_path / "graph"
    assert main(["export", str(folder), "--format", file_format, "--out", str(out)]) == 0, capsys.readouterr().err
    store.check_hashes(out)
    parity, config = (json.loads((out / name).read_text()) for name in ("parity.json", "config.json"))
    assert parity["max_difference"] <= 1e-3
    assert parity["compared_on"] == "calibration images"
    assert config["graph"]["inputs"]["images"] == {"type": "uint8", "shape": [None, 3, 8, 8]}
    root = str(Path(farout.__file__).parent).encode()
    assert not [path.name for path in out.glob("model*") if root in path.read_bytes()], "names of files of this machine"

    np.save(tmp_path / "images.npy", as_rgb(images).numpy())
    words = [sys.executable, "-c", RUNNER, file_format, str(tmp_path / "images.npy"), str(tmp_path / "found.npz")]
    done = subprocess.run(words, cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = np.load(tmp_path / "found.npz"), farout.load(folder, device="cpu").score(images)
    unit = np.std(expected.calibration)
    np.testing.assert_allclose(found["arr_0"], expected.score, rtol=0, atol=1e-3 * unit)
    np.testing.assert_allclose(found["alone"], expected.score[:1], rtol=0, atol=1e-3 * unit)
    new = ~np.isin(expected.score, expected.calibration)  # a calibration image is compared with itself
    np.testing.assert_allclose(found["arr_1"][new], expected.p_value[new], rtol=1e-6)
    assert np.array_equal(found["arr_2"][new], expected.is_ood[new])


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "openvino"])
def test_a_graph_of_any_size_resizes_as_the_detector_does(detector: Detector, tmp_path: Path, file_format: str) -> None:
    pytest.importorskip("onnxscript" if file_format == "onnx" else "openvino")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for number, size in enumerate([(8, 8), (31, 17), (17, 40), (90, 33)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(mixed / f"{number}.png")
    result = export_detector(detector, tmp_path / "graph", format=file_format, images=mixed, any_size=True)
    assert result.parity["images"] == 4
    assert result.parity["compared_on"] == "other images"
    assert result.parity["max_difference"] <= 1e-3


@pytest.mark.parametrize("build", [model, conditional, by_tokens, latent], ids=lambda build: build.__name__)
def test_a_denoiser_as_a_module_is_the_denoiser(build: Any) -> None:
    diffusion: DiffusionModel = build()
    module = ExportedDenoiser(diffusion).eval()
    levels = torch.linspace(0, diffusion.schedule.num_levels - 1, 7, dtype=torch.float64)
    sigma = diffusion.schedule.sigma_of(levels).float()
    x = sigma[:, None, None, None] * torch.randn(7, *diffusion.shape, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(7) % 3
    condition = None if diffusion.conditioning is None else diffusion.conditioning(classes)
    with torch.no_grad():
        expected = diffusion.denoiser()(x, sigma, condition)
        found = module(x, sigma, *([classes] if module.has_classes else []))
        assert float(((found - expected).abs() / sigma[:, None, None, None].clamp(min=1)).max()) < 1e-5
        if module.null_class is not None:
            without = module(x, sigma, torch.full((7,), module.null_class))
            torch.testing.assert_close(without[0], diffusion.denoiser()(x[:1], sigma[:1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "file_format"),
    [(by_tokens, "onnx"), (model, "openvino"), (conditional, "torch")],
    ids=["onnx", "openvino", "torch"],
)
def test_a_denoiser_runs_without_farout(build: Any, tmp_path: Path, file_format: str) -> None:
    if file_format != "torch":
        pytest.importorskip("onnxscript" if file_format == "onnx" else "openvino")
    build().save(tmp_path / "model")
    result = export_denoiser(tmp_path / "model", tmp_path / "graph", format=file_format)
    assert result.parity["max_difference"] <= 1e-3
    config = json.loads((tmp_path / "graph" / "config.json").read_text())
    assert list(config["graph"]["inputs"]) == ["x", "sigma", *(["classes"] if build is not model else [])]
    run = open_graph(tmp_path / "graph", file_format, ["x0"])
    arrays = [np.zeros((70, 1, 8, 8), np.float32), np.full(70, 2.0, np.float32), np.arange(70) % 3]
    assert run(*arrays[: len(config["graph"]["inputs"])])["x0"].shape == (70, 1, 8, 8)


# -- what is refused ------------------------------------------------------------------------------------------------


class _Wrong(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.double().mean((1, 2, 3))


def test_a_graph_with_other_scores_is_not_written(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(detector), "build_score_module", lambda self: _Wrong())
    with pytest.raises(FaroutError, match="nothing was written"):
        export_detector(detector, tmp_path / "graph", format="torch")
    with pytest.raises(FaroutError, match="limit is 0; expected at least 1"):
        export_detector(detector, tmp_path / "graph", format="torch", limit=0)
    assert not list(tmp_path.iterdir())


def test_an_error_of_a_runtime_is_one_line(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("Unsupported version\nof the graph")

    monkeypatch.setattr(torch.export, "load", fail)
    with pytest.raises(FaroutError, match=r"cannot write or run this network as torch \(Unsupported version\)"):
        export_detector(detector, tmp_path / "graph", format="torch")
    assert not list(tmp_path.iterdir())


def test_a_graph_with_other_flags_is_not_written(
    detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(ExportedDetector):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            score, p_value, is_ood = super().forward(images)
            return score, p_value, ~is_ood

    monkeypatch.setattr(detector_export, "ExportedDetector", Wrong)
    with pytest.raises(FaroutError, match="p-value or flag"):
        export_detector(detector, tmp_path / "graph", format="torch")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_names_what_can(images: Path, tmp_path: Path) -> None:
    fitted = DETECTORS["msma"].load()().fit(images, diffusion=model(), statistics=30, alpha=0.1, runtime=CPU)
    with pytest.raises(FaroutError, match="export the denoiser of its diffusion model"):
        export_detector(fitted, tmp_path / "graph", format="torch")
    with pytest.raises(FaroutError, match="has not been fitted"):
        export_detector(farout.KNN(**TINY), tmp_path / "graph", format="torch")
    on_arrays = farout.KNN().fit_features(np.random.default_rng(0).normal(size=(60, 4)))
    with pytest.raises(FaroutError, match="a detector fitted to plain features cannot be exported"):
        export_detector(on_arrays, tmp_path / "graph", format="torch")
    with pytest.raises(FaroutError, match="there is no format 'tflite'"):
        export_detector(fitted, tmp_path / "graph", format="tflite")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_detector_in_bf16_is_refused(images: Path, tmp_path: Path) -> None:
    runtime = farout.Runtime(device="cpu", precision="bf16", workers=0)
    fitted = farout.KNN(**TINY).fit(images, statistics=30, alpha=0.1, runtime=runtime)
    with pytest.raises(FaroutError, match="--precision fp32"):
        export_detector(fitted, tmp_path / "graph", format="torch")


def test_a_missing_library_names_the_extra(detector: Detector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, file_format in (("onnxruntime", "onnx"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingExtraError, match=rf"farout\[{file_format}\]"):
            export_detector(detector, tmp_path / "graph", format=file_format)


def test_images_that_are_gone_have_to_be_given(images: Path, tmp_path: Path) -> None:
    own = pictures(tmp_path / "own", 40, seed=3)
    fitted = farout.KNN(**TINY).fit(own, statistics=20, alpha=0.1, runtime=CPU)
    for path in own.iterdir():
        path.unlink()
    pictures(tmp_path / "own" / "others", 3)
    with pytest.raises(FaroutError, match="--images SOURCE"):
        export_detector(fitted, tmp_path / "graph", format="torch")
    in_memory = farout.KNN(**TINY).fit(list(as_rgb(images)), statistics=20, alpha=0.1, runtime=CPU)
    with pytest.raises(FaroutError, match="--images SOURCE"):
        export_detector(in_memory, tmp_path / "graph", format="torch")


def test_nobodys_folder_is_replaced(
    folder: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("traced before the folder was checked")

    monkeypatch.setattr(graph_files, "_trace", never)
    for wrong in (images, folder):
        assert main(["export", str(folder), "--format", "torch", "--out", str(wrong)]) == 1
        assert "not replaced" in capsys.readouterr().err
    model().save(tmp_path / "model")
    with pytest.raises(StoreError, match="not replaced"):
        export_denoiser(tmp_path / "model", images, format="torch")
    assert (
        main(["export", str(tmp_path / "model"), "--format", "torch", "--any-size", "--out", str(tmp_path / "g")]) == 1
    )
    assert "for detectors only" in capsys.readouterr().err
