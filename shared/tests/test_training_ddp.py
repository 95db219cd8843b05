"""The curriculum on two gloo processes equals one process with the joined batch: weights, losses, cases, resuming."""

import os
from pathlib import Path

import torch
from torch import Tensor

from shared.tests.processes import finished, started


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
    finished(started(_main, tmp_path))  # it forks the ranks of each run
    one = _final(tmp_path / "one")
    assert one["state_dict"]["layer.case_index"].min() >= 0
    _same(one, _final(tmp_path / "two"))
    _same(one, _final(tmp_path / "cut"))


def _run(folder: Path, devices: int, *, resume: bool = False, stop_after: int = -1) -> None:
    import lightning.pytorch as pl

    from proto_core.training import Curriculum
    from shared.tests.test_training import Data, Net, Stop, trainer

    options = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
    pl.seed_everything(1, verbose=False)
    callbacks = [Curriculum()] + ([Stop(stop_after)] if stop_after >= 0 else [])
    last = folder / "checkpoints" / "last.ckpt" if resume else None
    trainer(folder, *callbacks, **options).fit(Net(), datamodule=Data(8 // devices), ckpt_path=last)


def _main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    _run(folder / "two", 2)
    stopped = ""
    try:
        _run(folder / "cut", 2, stop_after=3)
    except BaseException as error:  # a rank that stops ends the run in one of several ways
        stopped = type(error).__name__
    assert stopped, "the run that should have stopped did not"
    assert not (folder / "cut" / "checkpoints" / "final.ckpt").exists()
    _run(folder / "cut", 2, resume=True)
    _run(folder / "one", 1)
