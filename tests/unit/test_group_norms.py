"""Group norms in another layout compute the same values."""

from __future__ import annotations

import torch
from torch import nn

from farout.diffusion.group_norms import speed_up_group_norms


def test_outputs_and_gradients_are_the_same_in_both_precisions():
    torch.manual_seed(0)
    x = torch.randn(2, 32, 6, 6).to(memory_format=torch.channels_last)
    for precision, tolerance in ((torch.float32, 0.0), (torch.bfloat16, 0.05)):
        found = []
        for is_fast in (False, True):
            torch.manual_seed(1)
            network = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU())
            if is_fast:
                speed_up_group_norms(network)
                speed_up_group_norms(network)  # a second call changes nothing
                assert len(network[0]._forward_pre_hooks) == 1
            given = x.to(precision).detach().requires_grad_()
            output = network.to(precision)(given)
            output.float().square().sum().backward()
            found.append((output, given.grad))
        for before, after in zip(*found, strict=True):
            assert torch.allclose(before.float(), after.float(), atol=tolerance, rtol=tolerance)
