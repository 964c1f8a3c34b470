"""The page of a folder of outliers: classes of any name, methods that tell no distance, and nothing that runs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from farout import ClassNoise, OutlierFolder, open_source
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.model import DiffusionModel
from farout.report.outlier_page import write_outlier_page
from farout.synthesis.base import SynthesisContext, Synthesizer, SyntheticImages
from small import CPU, model, pictures, tiny_unet
from test_page import Tags

NAMES = ("T-shirt/top", "..", "Größe 3.5 μ 犬", '<b onload="x">&', "007")
"""Names that no folder can have, that HTML would read, and that a table would take for a number."""


class Plain(Synthesizer):
    """Gray images, of which there is nothing to tell."""

    def generate(self, context: SynthesisContext, indices: Sequence[int], labels: Sequence[int]) -> SyntheticImages:
        return SyntheticImages(torch.full((len(indices), 1, 8, 8), 0.5), [""] * len(indices))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Six images of each class."""
    lines = ["path,label"]
    for number, name in enumerate(NAMES):
        pictures(tmp_path / "good" / str(number), 6, seed=number)
        quoted = '"' + name.replace('"', '""') + '"'
        lines += [f"{number}/{index:03d}.png,{quoted}" for index in range(6)]
    (tmp_path / "good" / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "good" / "table.csv"


def generator() -> DiffusionModel:
    unet, plain = tiny_unet(classes=len(NAMES)), model()
    table = ClassVectors(unet, NAMES, has_null=True)
    return DiffusionModel(unet, plain.schedule, plain.preprocessing, conditioning=table)


def page(done: OutlierFolder, source: Path) -> Tags:
    path = write_outlier_page(done, open_source(source))
    assert path == done.folder / "page.html"
    text = path.read_text(encoding="utf-8")
    assert "http" not in text
    return Tags(text)


def shown(tags: Tags) -> list[tuple[str, int, int]]:
    """Of each class: the name in its heading, images and outliers."""
    alts = [attributes["alt"] or "" for tag, attributes in tags.found if tag == "img"]
    return [
        (name, sum(a.startswith("image") and a.endswith(f" of {name}") for a in alts),
         sum(a.startswith("outlier") and a.endswith(f" of {name}") for a in alts))
        for name in NAMES if name in tags.words
    ]  # fmt: skip


@pytest.mark.parametrize("method", [ClassNoise(steps=2), Plain()])
def test_classes_of_any_name(method: Synthesizer, table: Path, tmp_path: Path) -> None:
    given = {"diffusion": generator()} if isinstance(method, ClassNoise) else {}
    done = method.synthesize(table, tmp_path / "o", count=12, runtime=CPU, **given)
    assert ("distance" in done.manifest().columns) == isinstance(method, ClassNoise)
    tags = page(done, table)
    counts = {name: 3 if name in done.manifest()["class_name"].tolist()[:2] else 2 for name in NAMES}
    assert shown(tags) == [(name, 4, counts[name]) for name in NAMES]
    assert not {"b", "script"} & {tag for tag, _ in tags.found}
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert not tags.open
    assert not any("Distances" in word for word in tags.words), "the method samples no vectors"


def test_outliers_come_back_with_their_classes(table: Path, tmp_path: Path) -> None:
    done = Plain().synthesize(table, tmp_path / "o", count=10, runtime=CPU)
    source, manifest = done.source(), done.manifest()
    told = dict(zip(manifest["key"], manifest["class_name"], strict=True))
    assert {key: (source.class_names or ())[source.label(i)] for i, key in enumerate(source.keys)} == told
    assert set(told.values()) == set(NAMES)
    again = Plain().synthesize(table, tmp_path / "o", count=12, runtime=CPU, resume=True)
    assert (again.images, again.generated) == (12, 2)


def test_a_page_without_outliers(table: Path, tmp_path: Path) -> None:
    done = Plain().synthesize(table, tmp_path / "o", count=1, runtime=CPU)
    (done.folder / "images" / done.manifest()["key"][0]).unlink()
    tags = page(OutlierFolder(done.folder, 0, 1, 0), table)
    assert not [tag for tag, _ in tags.found if tag == "img"]


def test_images_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    """The page of a run that skips them shows the others."""
    folder = tmp_path / "images"
    for name in "ab":
        pictures(folder / name, 6, seed=ord(name))
        (folder / name / "000.png").write_text("no picture")
    source = open_source(folder, policy="skip")
    done = Plain().synthesize(source, tmp_path / "o", count=4, runtime=CPU)
    text = write_outlier_page(done, source).read_text(encoding="utf-8")
    assert text.count("<img") == 2 * 4 + 4, "four readable images and two outliers of each class"
