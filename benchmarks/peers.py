"""farout next to pytorch-ood and anomalib: same images, same backbone, same machine, one run.

    FAROUT_DATA=… python benchmarks/peers.py run --out peers/ --anomalib-python peers-venv/bin/python
    python benchmarks/peers.py table --out peers/

Images are prepared once: resized to their set's native size, then to 224 pixels, and rounded to 8 bits. Every method
then gets these arrays in a process of its own, so that the highest resident memory is its own, and computes features
with EfficientNet-lite0 and the weights of one file. AUROC with DeLong's 95 % intervals; CPU time of the process, which
other work on the machine does not change much, and wall-clock time. A peer that is not installed, and a method that
fails, is listed with the reason.

anomalib requires other versions than farout, so that it needs an environment of its own (pip 25.1 or newer):

    python -m venv peers-venv && peers-venv/bin/pip install --group peers

What differs between the packages is left as their users get it: farout holds out a fifth of the images for p-values,
and computes in bf16 where the processor does (`(fp32)`: as the others). pytorch-ood gets the features of all layers
that farout's methods use, ViM the features before ImageNet's classifier, which it requires. `classes`: with labels.
anomalib's models are called without Lightning: PaDiM on strides 4 to 16 with 100 of 176 features, PatchCore on strides
8 and 16, 9 neighbors, and 1 % of the positions as coreset (its default, 10 %, takes ten times as long; --coreset).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

# The process of a method of anomalib cannot import farout, whose requirements differ.

BACKBONE, SIZE, BATCH = "tf_efficientnet_lite0", 224, 32
Scorer = Callable[[np.ndarray], np.ndarray]
"""Images (n, 3, size, size), uint8 -> scores (n,)."""
Fitter = Callable[[np.ndarray, np.ndarray], Scorer]
"""Images and labels (n,) of the fit -> a function that scores images."""

TASKS: dict[str, tuple[str, str, dict[str, str]]] = {
    "fashion_mnist": (
        "fashion_mnist:train",
        "fashion_mnist:test",
        {"mnist": "mnist:test", "vflip": "fashion_mnist:test@vflip", "patch": "fashion_mnist:test@patch"},
    ),
    "cifar10": (
        "cifar10:train",
        "cifar10:test",
        {
            "tiny_imagenet": "tiny_imagenet:test@classes=0,2-9,17-25,27-34,36-46,48-53,55-57,59-81,84-99",
            "textures": "textures:test",
            "patch": "cifar10:test@patch",
        },
    ),
    "bags": (
        "fashion_mnist:train@classes=8",
        "fashion_mnist:test@classes=8",
        {"patch": "fashion_mnist:test@patch,classes=8", "vflip": "fashion_mnist:test@vflip,classes=8"},
    ),
}
"""Training set, in-distribution test set and OOD sets; `bags` is one kind of object, as in industrial inspection."""


def prepare_task(name: str, folder: Path, count: int, test: int) -> None:
    """Write arrays `train`, `labels`, `id` and one per OOD set, of images at the backbone's size."""
    from farout.data.preprocessing import Preprocessing
    from farout.data.sources import open_source

    train, inside, sets = TASKS[name]
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source(train, limit=count)
    preprocessing = Preprocessing.for_source(source, size=SIZE, channels=3, protocol="native")

    def write(file: str, images: Iterator[Any]) -> None:
        rounded = [(255 * preprocessing(image)).round().byte().numpy() for image in images]
        np.save(folder / f"{file}.npy", np.stack(rounded))

    write("train", iter(source))
    np.save(folder / "labels.npy", np.array([source.label(i) for i in range(len(source))]))
    for file, spec in {**{f"ood-{name}": spec for name, spec in sets.items()}, "id": inside}.items():  # `id` is last
        source = open_source(spec, limit=4 * test)
        # variants of in-distribution test images are those of others than the ones that are scored as they are
        half = 0 if file == "id" else 1
        chosen = [i for i, key in enumerate(source.keys) if zlib.crc32(str(key).encode()) % 2 == half][:test]
        write(file, (source[i] for i in chosen))


# Methods. Each function imports what it uses.


def fit_farout(method: str, weights: str, precision: str = "auto", **settings: Any) -> Fitter:
    def fit(images: np.ndarray, labels: np.ndarray) -> Scorer:
        import torch
        from torch.utils.data import TensorDataset

        from farout.core.runtime import Runtime
        from farout.detectors import DETECTORS

        runtime = Runtime(precision=precision, cache=False, workers=0)  # type: ignore[arg-type]
        detector = DETECTORS[method].load()(backbone=BACKBONE, weights=weights, size=SIZE, **settings)
        given = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels)) if "classes" in settings else images
        detector.fit(given, runtime=runtime, groups="none")
        return lambda images: detector.score(images).score

    return fit


def build_encoder(weights: str, head: bool) -> Any:
    """The backbone as a network from images (B, 3, size, size), uint8, to features (B, d): pooled features of all
    layers, or with `head` those before the classifier.
    """
    import timm
    import torch
    from safetensors.torch import load_file

    if head:
        network: Any = timm.create_model(BACKBONE)
        network.load_state_dict(load_file(weights))
    else:
        network = timm.create_model(BACKBONE, features_only=True)
        load_features(network, weights)
    network.eval().requires_grad_(False)

    def encode(images: Any) -> Any:
        x = images.float() / 127.5 - 1
        if head:
            return network.forward_head(network.forward_features(x), pre_logits=True)
        return torch.cat([level.mean((2, 3)) for level in network(x)], dim=1)

    return encode, network


def load_features(network: Any, weights: str) -> None:
    """Load the weights of a network without its head."""
    from safetensors.torch import load_file

    missing, unexpected = network.load_state_dict(load_file(weights), strict=False)
    if missing or any(not name.startswith(("conv_head", "bn2", "classifier")) for name in unexpected):
        raise RuntimeError(f"the weights do not match: missing {missing}, unexpected {unexpected}")


def fit_pytorch_ood(method: str, weights: str, use_labels: bool = False, **settings: Any) -> Fitter:
    def fit(images: np.ndarray, labels: np.ndarray) -> Scorer:
        import torch
        from pytorch_ood import detector as detectors
        from torch.utils.data import DataLoader, TensorDataset

        encode, network = build_encoder(weights, head=method == "ViM")
        if method == "ViM":
            settings.update(w=network.classifier.weight, b=network.classifier.bias)
        detector = getattr(detectors, method)(encode, **settings)
        classes = np.unique(labels, return_inverse=True)[1] if use_labels else np.zeros(len(images), np.int64)
        detector.fit(DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(classes)), BATCH))

        def score(images: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                parts = [detector.predict(batch) for batch in torch.from_numpy(images).split(BATCH)]
            return torch.cat(parts).numpy()

        return score

    return fit


def fit_anomalib(method: str, weights: str, coreset: float = 0.01) -> Fitter:
    def fit(images: np.ndarray, labels: np.ndarray) -> Scorer:
        import torch

        torch.manual_seed(0)
        # indices of the layers with strides 4, 8 and 16
        if method == "PatchCore":
            from anomalib.models.image.patchcore.torch_model import PatchcoreModel

            model: Any = PatchcoreModel([2, 3], BACKBONE, pre_trained=False)
        else:
            from anomalib.models.image.padim.torch_model import PadimModel

            model = PadimModel(BACKBONE, [1, 2, 3], pre_trained=False, n_features=100)
        load_features(model.feature_extractor.feature_extractor, weights)

        def prepare(batch: Any) -> Any:
            return batch.float() / 127.5 - 1

        model.train()
        for batch in torch.from_numpy(images).split(BATCH):
            model(prepare(batch))
        if method == "PatchCore":
            model.subsample_embedding(coreset)
        else:
            model.fit()
        model.eval()

        def score(images: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                parts = [model(prepare(batch)).pred_score for batch in torch.from_numpy(images).split(BATCH)]
            return torch.cat(parts).flatten().numpy()

        return score

    return fit


def methods(weights: str, coreset: float) -> dict[str, tuple[str, Fitter]]:
    """The package and the fit of every method."""
    return {
        "farout mahalanobis": ("farout", fit_farout("mahalanobis", weights)),
        "farout mahalanobis (fp32)": ("farout", fit_farout("mahalanobis", weights, "fp32")),
        "farout mahalanobis, classes": ("farout", fit_farout("mahalanobis", weights, classes=True)),
        "farout knn": ("farout", fit_farout("knn", weights)),
        "farout knn (fp32)": ("farout", fit_farout("knn", weights, "fp32")),
        "farout semantic": ("farout", fit_farout("semantic", weights)),
        "pytorch-ood Mahalanobis": ("pytorch-ood", fit_pytorch_ood("Mahalanobis", weights)),
        "pytorch-ood Mahalanobis, classes": ("pytorch-ood", fit_pytorch_ood("Mahalanobis", weights, use_labels=True)),
        "pytorch-ood KNN": ("pytorch-ood", fit_pytorch_ood("KNN", weights)),
        "pytorch-ood KNN, k=1": ("pytorch-ood", fit_pytorch_ood("KNN", weights, k=1)),
        "pytorch-ood ViM": ("pytorch-ood", fit_pytorch_ood("ViM", weights, d=512)),
        "farout patches": ("farout", fit_farout("patches", weights)),
        "farout patches, knn_top": ("farout", fit_farout("patches", weights, score="knn_top")),
        "farout patches, knn_top (fp32)": ("farout", fit_farout("patches", weights, "fp32", score="knn_top")),
        "anomalib PaDiM": ("anomalib", fit_anomalib("PaDiM", weights)),
        "anomalib PatchCore": ("anomalib", fit_anomalib("PatchCore", weights, coreset)),
    }


def measure(folder: Path, fitter: Fitter, package: str, threads: int) -> dict[str, Any]:
    """Fit and score in this process; seconds, memory, and the scores of every set."""
    import resource

    import torch

    torch.set_num_threads(threads)
    memory_unit = 2**20 if sys.platform == "darwin" else 2**10

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / memory_unit

    images, labels = np.load(folder / "train.npy"), np.load(folder / "labels.npy")
    before = peak()
    started, cpu = time.perf_counter(), time.process_time()
    score = fitter(images, labels)
    fit, fit_cpu = time.perf_counter() - started, time.process_time() - cpu
    del images
    after_fit, scores, seconds, cpu_seconds, count = peak(), {}, 0.0, 0.0, 0
    for file in sorted(folder.glob("*.npy")):
        if file.stem == "id" or file.stem.startswith("ood-"):
            part = np.load(file)
            started, cpu = time.perf_counter(), time.process_time()
            scores[file.stem] = np.asarray(score(part), dtype=np.float64).tolist()
            seconds, cpu_seconds, count = (
                seconds + time.perf_counter() - started,
                cpu_seconds + time.process_time() - cpu,
                count + len(part),
            )
    return {
        "version": importlib.metadata.version(package),
        "torch": torch.__version__,
        "fit_seconds": fit,
        "fit_cpu": fit_cpu,
        "images_per_second": count / seconds,
        "images_per_cpu_second": count / cpu_seconds,
        "mib_images": before,
        "mib_fit": after_fit,
        "mib": peak(),
        "scores": scores,
    }


def run_method(arguments: argparse.Namespace, task: str, name: str, package: str, result: Path) -> None:
    """Measure a method in a process of its own; what it writes to the standard error is kept if it fails."""
    python = arguments.anomalib_python if package == "anomalib" else sys.executable
    settings = ["--out", arguments.out, "--weights", arguments.weights, "--coreset", arguments.coreset]
    settings += ["--threads", arguments.threads, "--task", task, "--method", name]
    command = [python, __file__, "measure", *map(str, settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"ended with status {process.returncode}"])[-1]
        result.write_text(json.dumps({"failed": reason}))
        print(f"  {name}: {reason}", flush=True)


def print_tables(folder: Path) -> None:
    from farout.evaluation.intervals import auroc_interval

    print(f"{processor_name()}, Python {platform.python_version()}")
    for task in sorted(path for path in folder.iterdir() if path.is_dir()):
        results = {file.stem: json.loads(file.read_text()) for file in sorted(task.glob("*.json"))}
        failed = {name: result["failed"] for name, result in results.items() if "failed" in result}
        results = {name: result for name, result in results.items() if name not in failed}
        if not results:
            continue
        versions = {f"{name.split()[0]} {r['version']} (torch {r['torch']})" for name, r in results.items()}
        count = len(np.load(task / "train.npy", mmap_mode="r"))
        sets = [name for name in next(iter(results.values()))["scores"] if name != "id"]
        print(f"\n{task.name}, {count} images to fit; {', '.join(sorted(versions))}\n")
        heads = [name.removeprefix("ood-") for name in sets]
        heads += ["fit, s of CPU", "images per s of CPU", "MiB", "MiB beyond start and images"]
        print(f"| method | {' | '.join(heads)} |")
        print("| --- " * (len(heads) + 1) + "|")
        order = list(methods("", 0))
        for name, result in sorted(results.items(), key=lambda item: order.index(item[0])):
            areas = [auroc_interval(*(np.array(result["scores"][part]) for part in ("id", other))) for other in sets]
            cells = [f"{area:.3f} ({low:.3f} to {high:.3f})" for area, low, high in areas]
            cells += [f"{result['fit_cpu']:.1f}", f"{result['images_per_cpu_second']:.1f}"]
            cells += [f"{result['mib']:.0f}", f"{result['mib'] - result['mib_images']:.0f}"]
            print(f"| {name} | {' | '.join(cells)} |")
        for name, reason in failed.items():
            print(f"\n{name} was not measured: {reason}")


def processor_name() -> str:
    """Name and instruction set of the processor."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def default_weights() -> Path | None:
    data = os.environ.get("FAROUT_DATA")
    return Path(data).parent / "weights" / f"{BACKBONE}.safetensors" if data else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "measure"], help="`measure` is what `run` starts per method")
    parser.add_argument("--out", type=Path, required=True, help="folder of the images and results; finished ones stay")
    parser.add_argument("--weights", type=Path, default=default_weights(), help="weights of timm's network")
    parser.add_argument("--anomalib-python", default=sys.executable, help="interpreter with anomalib")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=[""], help="only methods whose names contain one of these")
    parser.add_argument("--images", type=int, default=200, help="images of a fit")
    parser.add_argument("--test", type=int, default=300, help="images of each set that is scored")
    parser.add_argument("--coreset", type=float, default=0.01, help="share of PatchCore's positions that are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.action == "table":
        print_tables(arguments.out)
        return
    if arguments.weights is None:
        parser.error("give --weights FILE, or set FAROUT_DATA to a folder next to weights/")
    table = methods(str(arguments.weights.resolve()), arguments.coreset)
    if arguments.action == "measure":
        package, fitter = table[arguments.method]
        folder = arguments.out / arguments.task
        result = measure(folder, fitter, package, arguments.threads)
        (folder / f"{arguments.method}.json").write_text(json.dumps(result))
        return
    for task in arguments.tasks:
        folder = arguments.out / task
        if not (folder / "id.npy").is_file():
            prepare_task(task, folder, arguments.images, arguments.test)
        print(task, flush=True)
        for name, (package, _) in table.items():
            result_file = folder / f"{name}.json"
            if any(part in name for part in arguments.methods) and not result_file.is_file():
                run_method(arguments, task, name, package, result_file)
    print_tables(arguments.out)


if __name__ == "__main__":
    main()
