"""timm and torchvision are imported without torch's compiler, which is imported when it is used."""

import subprocess
import sys

import pytest

BEGIN = """
import sys, torch
from farout.core.compiler_import import defer_compiler_import
loaded = lambda: [name for name in sys.modules if name.startswith("torch._dynamo")]
"""


def run(script: str) -> None:
    """Run a script in a process that has not imported the compiler."""
    subprocess.run([sys.executable, "-c", BEGIN + script], check=True)


def test_networks_work_without_the_compiler_and_the_compiler_afterwards() -> None:
    run("""
with defer_compiler_import():
    import timm, torchvision
    @torch.compiler.disable
    def add(x):
        assert not torch.compiler.is_compiling()
        return x + 1
network = timm.create_model("test_efficientnet", features_only=True).eval()
assert [level.shape[0] for level in network(torch.zeros(1, 3, 32, 32))] == [1] * 5
assert add(1) == 2 and add.__name__ == "add"
assert not loaded(), loaded()
assert torchvision.ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 4, 4]]), 2).shape == (1, 1, 2, 2)
assert torch.compile(lambda x: 2 * x, backend="eager", fullgraph=True)(torch.ones(1)).item() == 2
assert torch.compile(lambda x: add(x) * 2, backend="eager")(torch.ones(1)).item() == 4
assert sys.modules["torch._dynamo"] is torch._dynamo
""")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    ["from torch._dynamo import config", "import torch._dynamo.config as config", "config = torch._dynamo.config"],
)
def test_other_uses_import_the_compiler_once(words: str) -> None:
    run(f"""
with defer_compiler_import():
    {words}
    import torch._dynamo.utils
import torch._dynamo
assert torch._dynamo.config is config is sys.modules["torch._dynamo.config"]
assert config.__spec__.loader.get_source
assert sys.modules["torch._dynamo.utils"] is torch._dynamo.utils
with defer_compiler_import():
    assert sys.modules["torch._dynamo"] is torch._dynamo
""")
