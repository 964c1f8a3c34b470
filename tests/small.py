"""Small things that many tests use: an untrained network, a folder of pictures."""

import json
import string
from pathlib import Path

import diffusers
import torch
from PIL import Image
from torch import Tensor

from farout.classifiers.model import Classifier
from farout.classifiers.networks import NetworkSpec
from farout.core.runtime import Runtime
from farout.data.preprocessing import Preprocessing
from farout.diffusion.conditioning.class_embeddings import ClassVectors
from farout.diffusion.conditioning.class_tokens import ClassTokens
from farout.diffusion.model import DiffusionModel
from farout.diffusion.schedule import NoiseSchedule
from farout.synthesis.base import OutlierFolder
from farout.synthesis.reconstruct import ReconstructedFolder

CPU = Runtime(device="cpu", precision="fp32", workers=0)


def tiny_unet(channels: int = 1, size: int = 8, classes: int | None = None) -> diffusers.UNet2DModel:
    """With `classes`: a table of them and a null row."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=None if classes is None else classes + 1,
    )
    for parameter in unet.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return unet


def model(size: tuple[int, int] = (8, 8), channels: int = 1, **settings: object) -> DiffusionModel:
    preprocessing = Preprocessing(size=size, channels=channels, native=size)
    return DiffusionModel(tiny_unet(channels), NoiseSchedule(), preprocessing, **settings)


def classifier(size: tuple[int, int] = (8, 8), channels: int = 1, classes: int = 3) -> Classifier:
    torch.manual_seed(0)
    spec = NetworkSpec("wrn16_1", classes, channels, size)
    preprocessing = Preprocessing(size=size, channels=channels, native=size)
    module = spec.build()
    with torch.no_grad():  # a fresh last layer hardly tells images apart
        module.fc.weight.mul_(5)
        module.fc.bias.normal_()
    return Classifier(module, [0.5] * channels, [0.25] * channels, preprocessing, network=spec)


def conditional(
    size: tuple[int, int] = (8, 8), channels: int = 1, classes: int = 3, **settings: object
) -> DiffusionModel:
    """An untrained class-conditional model with a null row; its classes are named a, b, c, …"""
    preprocessing = Preprocessing(size=size, channels=channels, native=size)
    unet = tiny_unet(channels, classes=classes)
    conditioning = ClassVectors(unet, string.ascii_lowercase[:classes], has_null=True)
    return DiffusionModel(unet, NoiseSchedule(), preprocessing, conditioning=conditioning, **settings)


def without_null() -> DiffusionModel:
    """As `conditional`, of a network that was never trained without a class."""
    unet, plain = tiny_unet(classes=3), model()
    conditioning = ClassVectors(unet, ("a", "b", "c"), has_null=False)
    return DiffusionModel(unet, plain.schedule, plain.preprocessing, conditioning=conditioning)


def autoencoder(latent: int = 3, halvings: int = 1) -> diffusers.AutoencoderKL:
    """Of gray pictures, untrained: `latent` channels of sides that are halved so often."""
    torch.manual_seed(0)
    stages = halvings + 1
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * stages, "up_block_types": ("UpDecoderBlock2D",) * stages}
    sizes = {"in_channels": 1, "out_channels": 1, "latent_channels": latent, "block_out_channels": (8,) * stages}
    return diffusers.AutoencoderKL(**sizes, **blocks, norm_num_groups=4)


def latent(size: tuple[int, int] = (16, 16), halvings: int = 1, **settings: object) -> DiffusionModel:
    """As `model`, of gray pictures' latents."""
    preprocessing = Preprocessing(size=size, channels=1, native=size)
    inner = autoencoder(halvings=halvings)
    return DiffusionModel(tiny_unet(3), NoiseSchedule(), preprocessing, autoencoder=inner, **settings)


def attending(channels: int = 1, width: int = 6) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=width,
    )


def by_tokens(classes: int = 3, **settings: object) -> DiffusionModel:
    """As `conditional`, for images of 8 x 8 gray pixels, conditioned on classes by cross-attention to two tokens."""
    network = attending()
    conditioning = ClassTokens.create_random(string.ascii_lowercase[:classes], 2, 6, has_null=True)
    preprocessing = Preprocessing(size=(8, 8), channels=1, native=(8, 8))
    return DiffusionModel(network, NoiseSchedule(), preprocessing, conditioning=conditioning, **settings)


def stable_diffusion(folder: Path, prediction: str = "epsilon", length: int = 32) -> Path:
    """A folder in Stable Diffusion's layout for pictures of 16 x 16: random weights, a vocabulary of letters and four
    words of one token, prompts of `length` tokens. Needs transformers.
    """
    import transformers

    words = folder.parent / f"{folder.name}-words"
    words.mkdir(parents=True)
    signs = [*string.ascii_lowercase, "-", *(f"{letter}</w>" for letter in f"{string.ascii_lowercase}-")]
    merges = ["#version: 0.2"]
    for word in ("cat", "dog", "kite", "bird"):
        for end in range(1, len(word)):
            piece = word[end] + ("</w>" if end == len(word) - 1 else "")
            merges.append(f"{word[:end]} {piece}")
            signs.append(word[:end] + piece)
    signs += ["<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({sign: number for number, sign in enumerate(signs)}))
    (words / "merges.txt").write_text("\n".join(merges) + "\n")
    files = (str(words / "vocab.json"), str(words / "merges.txt"))
    transformers.CLIPTokenizer(*files, model_max_length=length).save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    settings = {"hidden_size": 6, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": len(signs) - 2, "eos_token_id": len(signs) - 1}
    text = transformers.CLIPTextConfig(vocab_size=len(signs), max_position_embeddings=length, **settings, **ends)
    transformers.CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    attending(4).save_pretrained(folder / "unet")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, **blocks).save_pretrained(folder / "vae")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    diffusers.PNDMScheduler(**betas, prediction_type=prediction).save_pretrained(folder / "scheduler")
    return folder


def in_order(folder: OutlierFolder | ReconstructedFolder) -> Tensor:
    """Images (B, C, H, W) that were made into a folder, uint8, in the order of their numbers."""
    source = folder.source()
    places = {key: place for place, key in enumerate(source.keys)}
    return torch.stack([source[places[key]] for key in folder.manifest()["key"]])


def pictures(folder: Path, count: int = 40, *, low: int = 100, spread: int = 80, seed: int = 0) -> Path:
    """Gray pictures of 8 x 8 random pixels between `low` and `low + spread`."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    for index in range(count):
        pixels = (torch.rand(8, 8, generator=generator) * spread + low).byte().numpy()
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return folder


def two_classes(root: Path) -> Path:
    """Five images of a and three of b."""
    for name, count in (("a", 5), ("b", 3)):
        pictures(root / name, count, low=20 + 10 * count, seed=count)
    return root
