"""The denoiser of features and the backbone of DLSR."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farout.core import store
from farout.core.compiler_import import defer_compiler_import
from farout.core.errors import FaroutError, StoreError
from farout.core.network_size import limit_parameters
from farout.core.runtime import Runtime
from farout.data.preprocessing import Preprocessing
from farout.data.sources import open_source
from farout.features.densities import Mahalanobis
from farout.features.encoding import FeatureEncoding
from farout.features.extraction import CachedFeatures
from farout.features.extractor import FeatureExtractor
from farout.features.feature_denoiser import FeatureDenoiser
from farout.features.feature_diffusion import FeatureDiffusion, paper_schedule
from farout.importing.checkpoint import Checkpoint, check_finite, check_shapes, read_checkpoint
from farout.importing.imported import Imported, ImportSettings, describe_origin
from farout.importing.layouts import recognize_layout

with defer_compiler_import():
    import timm

__all__ = ["BackboneWeights", "convert_efficientnet", "convert_lfdn"]

_BACKBONES = {720: "b4", 1792: "resnet50"}
"""Backbones of the published models, by the number of their features."""
_EFFICIENTNETS = tuple(f"tf_efficientnet_b{number}" for number in range(8))


def convert_lfdn(checkpoint: Checkpoint, settings: ImportSettings, ema: bool) -> Imported:
    """DLSR's denoiser; with `first`, also the one after the first epoch."""
    network = _build_denoiser(checkpoint)
    first, origin = None, {}
    if settings.first is not None:
        _, early = recognize_layout(read_checkpoint(settings.first, ema=ema), "lfdn")
        check_finite(early.tensors, early.path)
        first = _build_denoiser(early)
        if dict(first.config) != dict(network.config):
            raise FaroutError(f"{early.path} has another network than {checkpoint.path}; give epochs of one training")
        origin = {"first_from": early.path.name, "first_sha256": early.sha256}
    width = int(network.config["width"])
    backbone = settings.backbone or _BACKBONES.get(width)
    if backbone is None:
        raise FaroutError(f"{checkpoint.path} denoises {width} features; give --backbone, whose features they are")
    extractor = FeatureExtractor.create(backbone, settings.backbone_weights)
    if extractor.width != width:
        raise FaroutError(f"{checkpoint.path} denoises {width} features, and {backbone} has {extractor.width}")
    assumed = {
        "backbone": f"{extractor.name}, {extractor.origin}",
        "noise schedule": "scaled_linear, 100 levels, betas 0.0015 to 0.0195",
        "features": "means over all positions, standardized per image and layer, as in the paper; the released code "
        "resizes every layer to 14 x 14 first",
    }
    model = FeatureDiffusion(
        network,
        FeatureEncoding(extractor.channels),
        paper_schedule(),
        extractor.content_hash,
        first=first,
        provenance={**describe_origin(checkpoint, "lfdn", assumed), **origin},
    )
    blocks, hidden = network.config["blocks"], network.config["hidden"]
    weights = f" --weights {settings.backbone_weights}" if settings.backbone_weights else ""
    regret = "--regret" if first is not None else "--no-regret"
    command = (
        f"farout fit semantic NORMAL_IMAGES --preset released {regret} --backbone {backbone}{weights} "
        "--diffusion {out} --out detector/"
    )
    if settings.images is not None:
        _describe_features(model, extractor, settings.images)
    else:
        assumed["mean and covariance of the features"] = "missing; a detector requires them: import with --images"
        command = f"farout import {checkpoint.path} --images TRAINING_IMAGES --backbone {backbone} --out {{out}}"
    return Imported(model, f"LFDN of {width} features, {blocks} blocks of {hidden}", assumed, command)


def _describe_features(model: FeatureDiffusion, extractor: FeatureExtractor, images: str) -> None:
    """Stores mean and covariance of the encoded features of the training images, and the images' hashes."""
    source = open_source(images)
    if len(source) < 2:
        raise FaroutError(f"{source.name} has {len(source)} images; a covariance requires at least 2")
    runtime = Runtime().resolve_auto()
    # as released: straight to the size of the backbone
    preprocessing = Preprocessing.for_source(source, size=extractor.size, channels=3, protocol="direct")
    reader = CachedFeatures(extractor.to(runtime.device), preprocessing, runtime.batch_size, "fp32")
    batches = reader.batches(source, runtime.images_per_batch((1,)), runtime.workers)
    features = torch.cat([batch.features.cpu() for batch in batches if batch.features is not None])
    extractor.to("cpu")
    model.gaussian = Mahalanobis.fit(model.encode(features).double().numpy())
    model.trained_on = frozenset(source.content_hash(index) for index in range(len(source)))
    model.provenance["unknown"] = "whether the network was trained on all of these images, and only on them"
    model.provenance["images"] = source.name


def _build_denoiser(checkpoint: Checkpoint) -> FeatureDenoiser:
    """The network with the tensors of the layout `lfdn`; other entries, as of an unused class branch, are left out."""
    patterns = (
        (r"^input_proj\.1\.", "enter."),
        (r"^time_embed\.", "time."),
        (r"^res_blocks\.(\d+)\.in_layers\.", r"stack.\1.narrow."),
        (r"^res_blocks\.(\d+)\.emb_layers\.1\.", r"stack.\1.time."),
        (r"^res_blocks\.(\d+)\.out_layers\.0\.", r"stack.\1.norm."),
        (r"^res_blocks\.(\d+)\.out_layers\.3\.", r"stack.\1.widen.2."),
        (r"^out\.", "leave."),
    )
    tensors: dict[str, Tensor] = {}
    for name, value in checkpoint.tensors.items():
        new = next((re.sub(old, own, name) for old, own in patterns if re.match(old, name)), None)
        if new is not None:
            tensors[new] = value
    enter, path = tensors["enter.weight"], checkpoint.path
    blocks = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"stack\.(\d+)\.", name)))
    if blocks > len(tensors) or enter.ndim != 2 or len(enter) % 2:
        raise StoreError(f"{path}: an input layer of shape {tuple(enter.shape)} and {blocks} blocks are no LFDN")
    with limit_parameters(4 * sum(value.numel() for value in tensors.values()), "the LFDN of this layout", path):
        network = FeatureDenoiser(
            enter.shape[1],
            hidden=len(enter),
            bottleneck=len(tensors["stack.0.narrow.2.weight"]),
            embedding=len(tensors["time.0.weight"]),
            blocks=blocks,
        )
    check_shapes(tensors, network.state_dict(), path, "the LFDN", "farout")
    network.load_state_dict({name: value.float() for name, value in tensors.items()})
    return network


@dataclass(frozen=True)
class BackboneWeights:
    """Weights of a network of timm, by timm's names.

    Attributes:
        name: of the network.
        tensors: its state dict; the last layer may be missing.
        provenance: where they come from.
    """

    name: str
    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Number of weights, without the statistics of batch normalizations."""
        counted = [v for name, v in self.tensors.items() if name.endswith((".weight", ".bias"))]
        return sum(value.numel() for value in counted)

    def save(self, folder: str | Path) -> None:
        """Writes `model.safetensors`, which `--weights` takes, `config.json` and a card."""
        with store.atomic_folder(folder, "backbone weights") as temporary:
            store.save_tensors(temporary / "model.safetensors", self.tensors)
            store.write_config(temporary, "backbone weights", {"name": self.name, "provenance": dict(self.provenance)})
            lines = [
                "# Weights of a backbone",
                "",
                f"- network: timm's {self.name}, {self.parameters:,} parameters",
                *[f"- {name}: {value}" for name, value in self.provenance.items()],
                "",
                "Give the folder as `--weights` to detectors on features.",
            ]
            (temporary / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def convert_efficientnet(checkpoint: Checkpoint, settings: ImportSettings, ema: bool) -> Imported:
    """EfficientNet-b0 to b7 of efficientnet_pytorch, which are timm's `tf_efficientnet_b0` to `b7`."""
    count = 1 + max(int(m[1]) for name in checkpoint.tensors if (m := re.match(r"_blocks\.(\d+)\.", name)))
    for network in _EFFICIENTNETS:
        with torch.device("meta"):
            expected = timm.create_model(network, num_classes=1000).state_dict()
        blocks = [name.removesuffix("conv_dw.weight") for name in expected if name.endswith(".conv_dw.weight")]
        # b1 and b2 have equal numbers of blocks and equal stems
        ends = ("conv_stem.weight", "conv_head.weight")
        shapes = [getattr(checkpoint.tensors.get(f"_{name}"), "shape", None) for name in ends]
        if len(blocks) == count and [expected[name].shape for name in ends] == shapes:
            break
    else:
        raise StoreError(f"{checkpoint.path} has {count} blocks, as no EfficientNet from b0 to b7")
    names = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    squeeze = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand", "_depthwise_conv": "conv_dw"}
    for number, block in enumerate(blocks):
        # a block without expansion has two norms, which efficientnet_pytorch calls the second and the third
        has_expansion = f"{block}conv_pwl.weight" in expected
        norms = {"_bn0": "bn1", "_bn1": "bn2", "_bn2": "bn3"} if has_expansion else {"_bn1": "bn1", "_bn2": "bn2"}
        convolutions = (
            {"_expand_conv": "conv_pw", "_project_conv": "conv_pwl"} if has_expansion else {"_project_conv": "conv_pw"}
        )
        for old, new in {**squeeze, **norms, **convolutions}.items():
            names[f"_blocks.{number}.{old}"] = f"{block}{new}"
    tensors: dict[str, Tensor] = {}
    for name, value in checkpoint.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if layer in names:
            tensors[f"{names[layer]}.{leaf}"] = value.float() if value.is_floating_point() else value
    for name in expected:  # files of old versions of torch lack these counters, which are not used
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros((), dtype=torch.int64))
    if "classifier.weight" not in tensors or len(tensors["classifier.weight"]) != 1000:
        expected = {name: value for name, value in expected.items() if not name.startswith("classifier.")}
        tensors = {name: value for name, value in tensors.items() if not name.startswith("classifier.")}
    check_shapes(tensors, expected, checkpoint.path, network, "timm")
    assumed = {"padding": "by the size of the input; efficientnet_pytorch computes it for the native size (b4: 380)"}
    weights = BackboneWeights(network, tensors, describe_origin(checkpoint, "efficientnet", assumed))
    command = f"farout fit semantic NORMAL_IMAGES --backbone {network.removeprefix('tf_efficientnet_')} "
    if network != "tf_efficientnet_b4":
        command = f"farout fit knn NORMAL_IMAGES --backbone {network} "
    return Imported(weights, f"timm's {network}", assumed, command + "--weights {out} --out detector/")
