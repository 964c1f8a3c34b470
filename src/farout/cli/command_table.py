"""The commands of the command line: their functions and one line about each, without importing any of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COMMANDS", "Command", "find_command", "import_object"]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: one line for `farout --help`.
        function: "module:function" within farout. The signature of the function defines the flags.
        printer: "module:function" of the function that prints the result; empty: the command prints by itself.
        prints_folder: whether the printer is also given the arguments, for the folder that the result is written to.
        check: "module:function" of a function that is called with the same settings before anything is loaded, and
            raises FaroutError for settings that exclude each other.
        presets: "module:NAME" of the presets that `--preset` chooses from; presets of methods belong to the method.
        methods: "module:NAME" of the registry in which the first word, METHOD, is looked up.
        unused_runtime: fields of `Runtime` that are not flags of the command.
        other_defaults: defaults of fields of `Runtime` that are not those of the detector, in the words of the help.
        usage: arguments for the usage line; empty: made from the signature.
    """

    summary: str
    function: str
    printer: str = ""
    prints_folder: bool = False
    check: str = ""
    presets: str = ""
    methods: str = ""
    unused_runtime: tuple[str, ...] = ()
    other_defaults: Mapping[str, str] = field(default_factory=dict)
    usage: str = ""


COMMANDS = {
    "train diffusion": Command(
        "Train a diffusion model on images.",
        "diffusion.train:train_diffusion",
        "cli.commands.train_diffusion:print_diffusion_model",
        prints_folder=True,
        presets="diffusion.config:PRESETS",
    ),
    "train classifier": Command(
        "Train a classifier on labelled images.",
        "classifiers.train:train_classifier",
        "cli.commands.train_classifier:print_classifier",
        prints_folder=True,
        check="cli.commands.train_classifier:check_settings",
        presets="classifiers.presets:PRESETS",
    ),
    "fit": Command(
        "Fit a detector to normal images.",
        "cli.commands.fit:fit",
        "cli.commands.fit:print_detector",
        prints_folder=True,
        methods="detectors:DETECTORS",
    ),
    "score": Command(
        "Score images with a detector: table, measurements and HTML report.",
        "cli.commands.score:score",
        "cli.commands.score:print_scored_folder",
        check="cli.commands.score:check_settings",
        other_defaults={"cache": "that of the detector, but --no-cache with --watch"},
    ),
    "serve": Command(
        "Serve a detector over HTTP.",
        "cli.commands.serve:serve",
        "cli.commands.serve:print_end",
        other_defaults={"cache": "--no-cache, since images of clients are kept in memory only"},
    ),
    "calibrate": Command(
        "Recompute a detector's p-values from other normal images, without training.",
        "cli.commands.calibrate:calibrate",
        "cli.commands.calibrate:print_calibration",
        prints_folder=True,
    ),
    "evaluate": Command(
        "Evaluate a detector, or given scores, on out-of-distribution images.",
        "cli.commands.evaluate:evaluate",
        "cli.commands.evaluate:print_metrics",
        check="cli.commands.evaluate:check_settings",
        usage="DETECTOR --id SOURCE --ood SOURCE... --out DIR [settings]\n"
        "       farout evaluate --scores FILE FILE... [--out DIR]",
    ),
    "monitor": Command(
        "Watch the p-values of scored images over time: martingale, false-alarm rate, alarms.",
        "cli.commands.monitor:monitor",
        "cli.commands.monitor:print_monitored_results",
        prints_folder=True,
    ),
    "bench": Command(
        "Fit, score and compare several detectors on the same data and networks.",
        "cli.bench:bench",
        "cli.bench:show_bench",
    ),
    "sample": Command(
        "Generate images with a diffusion model.",
        "cli.commands.sample:sample",
        "cli.commands.sample:print_sampled_folder",
        unused_runtime=("workers", "cache", "backend"),
    ),
    "synthesize": Command(
        "Generate synthetic outliers from labelled images with a diffusion model.",
        "cli.commands.synthesize:synthesize",
        "cli.commands.synthesize:print_outlier_folder",
        methods="synthesis:SYNTHESIZERS",
        unused_runtime=("cache", "backend"),
    ),
    "reconstruct": Command(
        "Reconstruct images by image-to-image: add noise and denoise.",
        "cli.commands.reconstruct:reconstruct",
        "cli.commands.reconstruct:print_reconstructed_folder",
        unused_runtime=("cache", "backend"),
    ),
    "fid": Command(
        "Compute FID and KID of generated images, or the same distances on the built-in backbone.",
        "evaluation.fid:set_distance",
        "cli.commands.fid:print_distances",
    ),
    "export": Command(
        "Write a detector, or the denoiser of a diffusion model, as a graph that runs without farout.",
        "cli.commands.export:export",
        "cli.commands.export:print_export",
    ),
    "interpolate": Command(
        "Interpolate between pairs of images with a diffusion model: images and an HTML page.",
        "report.interpolation:write_interpolations",
        "cli.commands.interpolate:print_interpolated_folder",
    ),
    "chain": Command("Run several commands from one YAML file.", "cli.chain:chain"),
    "features extract": Command(
        "Compute features of images once, for all later fits and scores.",
        "features.extraction:extract_features",
        "cli.commands.features:print_extraction",
    ),
    "features list": Command(
        "List the stored features with their sizes, last use and the size limit.",
        "cli.commands.features:list_features",
        "cli.commands.features:print_stored_features",
    ),
    "features clear": Command(
        "Delete stored features.",
        "cli.commands.features:clear_features",
        "cli.commands.features:print_deleted_features",
    ),
    "import": Command(
        "Convert published weights of another program to a model folder.",
        "importing.import_weights:import_weights",
        "cli.commands.import_weights:print_imported_folder",
        usage="SOURCE --out DIR [settings]",
    ),
    "list": Command("List detectors, synthesizers, named sets or presets.", "cli.lists:show_list"),
    "demo": Command(
        "Compare detectors on the built-in sample, in two minutes.",
        "cli.commands.demo:demo",
        "cli.commands.demo:print_summary",
    ),
}


def find_command(words: Sequence[str]) -> str | None:
    """The name of the command that the words start with."""
    return next((name for name in COMMANDS if list(words[: len(name.split())]) == name.split()), None)


def import_object(target: str) -> Any:
    """Imports "module:name", with the module relative to farout."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"farout.{module}"), name)
