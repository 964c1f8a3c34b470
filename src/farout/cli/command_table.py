"""What is typed on the command line, and the function behind it."""

from collections.abc import Sequence

__all__ = ["COMMANDS", "named_command"]

COMMANDS = {
    "train diffusion": "diffusion.train:train_diffusion",
    "train classifier": "classifiers.train:train_classifier",
    "fit": "cli.commands:fit",
    "score": "cli.commands:score",
    "calibrate": "cli.commands:calibrate",
    "evaluate": "cli.commands:evaluate",
    "bench": "cli.bench:bench",
    "sample": "cli.generation:sample",
    "synthesize": "cli.generation:synthesize",
    "reconstruct": "cli.generation:reconstruct",
    "fid": "evaluation.fid:set_distance",
    "interpolate": "report.interpolation:write_interpolations",
    "chain": "cli.chain:chain",
    "features extract": "features.extraction:extract",
    "features list": "cli.commands:list_features",
    "features clear": "cli.commands:clear_features",
    "list": "cli.lists:show_list",
    "demo": "cli.commands:demo",
}
"""Command -> "module:function" within farout; the module is imported when the command is used."""


def named_command(words: Sequence[str]) -> str | None:
    """The command that the words begin with."""
    return next((known for known in COMMANDS if list(words[: len(known.split())]) == known.split()), None)
