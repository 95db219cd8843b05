"""The curriculum on two gloo processes equals one process with the joined batch: weights, losses, cases, resuming."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

SCRIPT = Path(__file__).resolve()


def _run(folder: Path, devices: int, *, resume: bool = False, stop_after: int = -1) -> None:
    command = [sys.executable, str(SCRIPT), str(folder), str(devices), str(int(resume)), str(stop_after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 or stop_after >= 0, done.stderr[-3000:]


def _final(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "final.ckpt", weights_only=True)


def _same(a: dict, b: dict) -> None:
    for name, value in a["state_dict"].items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(b["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert b["state_dict"][name] == value
    first, second = (
        next(v for k, v in c["callbacks"].items() if k.startswith("Curriculum"))["history"] for c in (a, b)
    )
    assert [(e["stage"], e["epoch"]) for e in first] == [(e["stage"], e["epoch"]) for e in second]
    for one, two in zip(first, second):
        assert abs(one["val/loss"] - two["val/loss"]) < 1e-4


def test_two_processes_equal_one_and_resume(tmp_path):
    _run(tmp_path / "one", 1)
    _run(tmp_path / "two", 2)
    one = _final(tmp_path / "one")
    assert one["state_dict"]["layer.case_index"].min() >= 0
    _same(one, _final(tmp_path / "two"))
    _run(tmp_path / "cut", 2, stop_after=3)
    assert not (tmp_path / "cut" / "checkpoints" / "final.ckpt").exists()
    _run(tmp_path / "cut", 2, resume=True)
    _same(one, _final(tmp_path / "cut"))


def _main(folder: str, devices: str, resume: str, stop_after: str) -> None:
    import lightning.pytorch as pl
    from test_training import Data, Net, Stop, trainer

    from proto_core.training import Curriculum

    world = int(devices)
    options = {"strategy": "ddp", "devices": world} if world > 1 else {}
    pl.seed_everything(1, verbose=False)
    callbacks = [Curriculum()] + ([Stop(int(stop_after))] if int(stop_after) >= 0 else [])
    last = Path(folder) / "checkpoints" / "last.ckpt" if int(resume) else None
    trainer(Path(folder), *callbacks, **options).fit(Net(), datamodule=Data(8 // world), ckpt_path=last)


if __name__ == "__main__":
    _main(*sys.argv[1:])
