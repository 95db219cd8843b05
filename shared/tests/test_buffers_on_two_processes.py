"""Prototypes that move by running averages are the same on every process, and those of the joint batch on one."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.prototypes import MixturePrototypes, VectorQuantizerEMAReset
from shared.tests.processes import on_two_processes


def rows(step: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(step)
    return F.normalize(torch.randn(24, 6, generator=g), dim=1), torch.randint(0, 3, (24,), generator=g)


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"quantizer": VectorQuantizerEMAReset(5, 6, decay=0.5), "mixture": MixturePrototypes(3, 6, 2)}


def moved(part: slice) -> dict[str, dict[str, Tensor]]:
    """State after four steps; the first rank has a third of the batch."""
    found = layers()
    for step in range(4):
        x, y = rows(step)
        found["quantizer"](x[part])
        after, _ = found["mixture"].update(*MixturePrototypes.joint(x[part], y[part]))
        found["mixture"].set_(after)
    return {name: dict(layer.state_dict()) for name, layer in found.items()}


def rank(number: int) -> dict[str, dict[str, Tensor]]:
    return moved(slice(0, 8) if number == 0 else slice(8, 24))


@pytest.mark.unchecked
def test_buffers_stay_equal(tmp_path):
    one, two = on_two_processes(rank, tmp_path)
    alone = moved(slice(None))
    for name, state in one.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, two[name][key]), f"{name}.{key} differs between processes"
                torch.testing.assert_close(value, alone[name][key], rtol=1e-4, atol=1e-5, msg=f"{name}.{key}")
