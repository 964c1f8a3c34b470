"""`farout demo`."""

from __future__ import annotations

from collections.abc import Iterator

from farout.benchmark.demo import OOD, summarize_demo
from farout.benchmark.demo import demo as run_demo
from farout.benchmark.job_graph import FinishedJob
from farout.benchmark.runner import BenchmarkReport
from farout.cli.tables import new_table, print_table
from farout.cli.terminal import print_text
from farout.core.errors import FaroutError, UsageError

__all__ = ["demo", "print_summary"]


def demo(
    *,
    out: str = "farout-demo",
    train: bool = False,
    steps: int | None = None,
    limit: int = 100,
    images: int = 1000,
    seed: int = 0,
) -> Iterator[FinishedJob | BenchmarkReport]:
    """Compare detectors on the built-in sample, in two minutes.

    Normal images are clothes (FashionMNIST). OOD images are handwritten digits (MNIST), and the same clothes upside
    down. Two detectors of diffusion and simple baselines are fitted with their defaults, and evaluated on images that
    none of them has seen. The diffusion model of images is part of the package.

    Args:
        out: folder of the demo's detectors, results and page; the same command continues an interrupted demo.
        train: train the diffusion model of images on the sample first, instead of using that of the package.
        steps: number of training steps with `--train`; default: 700, as the model of the package.
        limit: number of images scored of each set.
        images: number of sample images to fit the detectors on.
        seed: seed of all samples, weights and noise.
    """
    for name, value in (("limit", limit), ("images", images)):
        if value < 1:
            raise FaroutError(f"{name} must be at least 1, got {value}")
    if steps is not None and not train:
        raise UsageError("--steps has no effect without --train, which trains the diffusion model; add it")
    return run_demo(out, train=train, steps=steps, limit=limit, images=images, seed=seed)


def print_summary(items: Iterator[FinishedJob | BenchmarkReport]) -> None:
    """Prints the table of the demo when it is finished, what it shows, and what to do next."""
    report = [item for item in items if isinstance(item, BenchmarkReport)][-1]
    spec, summary, metrics = report.plan.spec, summarize_demo(report), report.metrics
    digits, flipped = (int(metrics.loc[metrics["ood_group"] == name, "n_ood"].max()) for name in OOD)
    is_trained = spec.networks["generator"].folder is None
    model = "was trained by this demo" if is_trained else "is part of the package; it was trained on other pictures"
    print_text(
        f"\nNormal images: {spec.train_limit:,} pictures of clothes (FashionMNIST) to fit the detectors, "
        f"{int(metrics['n_id'].max())} others to score.\n"
        f"OOD images: {digits} handwritten digits (MNIST), and {flipped} pictures of clothes upside down.\n"
        f"The diffusion model of reconstruction {model}.\nAll methods have their defaults, but reconstruction has "
        f"{spec.detectors['reconstruction'].statistics} instead of 400 statistics images.\n"
    )
    table = new_table()
    table.add_column("detector", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for title in (*(f"AUROC, {name}" for name in OOD), "mean", "false alarms", "images/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in summary.to_dict("records"):
        kind = "diffusion" if row["uses_diffusion"] else "baseline"
        numbers = [f"{row[name]:.3f}" for name in (*OOD, "mean")]
        table.add_row(row["detector"], kind, *numbers, f"{row['false_alarms']:.2f}", f"{row['images_per_s']:.0f}")
    print_table(table)
    print_text(
        "\nAUROC: how often an OOD image has a higher score than a normal one; 1 is perfect, 0.5 is chance. Its 95 % "
        f"interval\nis at most ±{summary['half_width'].max():.2f} here. False alarms: share of normal images that are "
        f"flagged at alpha = {spec.alpha:g}. Seed {spec.seeds[0]}.\n"
    )
    page = next(path for path in report.paths if path.suffix == ".html")
    print_text(
        f"Page with curves and images:   {page}\n"
        "On your own images:            farout fit semantic NORMAL/ --out detector/\n"
        "                               farout score detector/ NEW/ --out results/"
    )
