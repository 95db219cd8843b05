"""Prototypes that move by running averages are the same on every process, and those of the joint batch on one."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from proto_core.prototypes import MixturePrototypes, VectorQuantizerEMAReset

ROOT = Path(__file__).resolve().parents[2]


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


def rank(number: int, port: int, file: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    torch.save(moved(slice(0, 8) if number == 0 else slice(8, 24)), file)
    dist.destroy_process_group()


@pytest.mark.unchecked
def test_buffers_stay_equal(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = "import sys; from shared.tests.test_buffers_on_two_processes import rank; "
    code += "rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    files = [tmp_path / f"{number}.pt" for number in range(2)]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(number), str(port), str(file)], cwd=ROOT)
        for number, file in enumerate(files)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    one, two = (torch.load(file, weights_only=True) for file in files)
    alone = moved(slice(None))
    for name, state in one.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, two[name][key]), f"{name}.{key} differs between processes"
                torch.testing.assert_close(value, alone[name][key], rtol=1e-4, atol=1e-5, msg=f"{name}.{key}")
