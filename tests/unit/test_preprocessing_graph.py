"""Exported graphs resize images exactly as the detector does: another resizing would give other scores."""

import pytest
import torch

from farout.core.errors import FaroutError
from farout.data.preprocessing import Preprocessing
from farout.data.preprocessing_graph import PreprocessingGraph

SIZES = [(28, 20), (8, 9), (100, 37), (37, 100), (61, 60), (1, 5), (333, 200)]
SETTINGS = {
    "larger": Preprocessing(size=(32, 48), native=(28, 20), channels=3),
    "gray": Preprocessing(size=(32, 32), native=(28, 28), channels=1),
    "bilinear": Preprocessing(size=(16, 16), native=(28, 28), channels=3, kernel="bilinear"),
    "direct": Preprocessing(size=(40, 40), native=(28, 28), channels=3, protocol="direct"),
    "cropped": Preprocessing(size=(16, 16), native=(31, 17), channels=3, scaling="minmax", crop=45),
    "nearest": Preprocessing(size=(15, 17), native=(28, 20), channels=3, kernel="nearest"),
    "jpeg": Preprocessing(size=(32, 32), native=(28, 20), channels=3, protocol="common"),
}


def noise(size: tuple[int, int], channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size[0])
    return torch.randint(0, 256, (channels, *size), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["larger", "gray", "bilinear", "direct", "cropped"])
def test_images_of_any_size_are_resized_as_by_pillow(name: str, size: tuple[int, int]) -> None:
    graph = PreprocessingGraph(SETTINGS[name], any_size=True)
    for image in (noise(size), noise(size, 1)):
        torch.testing.assert_close(
            graph(image.expand(1, 3, -1, -1))[0], SETTINGS[name](image), rtol=0, atol=1e-6, msg=f"{name} {size}"
        )


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_left_of_the_steps_is_done_before(name: str) -> None:
    graph = PreprocessingGraph(SETTINGS[name])
    image = noise((50, 70))
    resized = SETTINGS[name].resize_first(image)
    assert tuple(resized.shape[1:]) == graph.input_size
    torch.testing.assert_close(graph(resized[None])[0], SETTINGS[name](image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["nearest", "jpeg"])
def test_steps_that_no_graph_has_are_refused(name: str) -> None:
    with pytest.raises(FaroutError, match="cannot be part of a graph"):
        PreprocessingGraph(SETTINGS[name], any_size=True)
