"""Processes for tests of what happens on several ranks, forked from one that has imported the library already.

Starting Python, torch and Lightning anew takes seconds per process; all tests of a run share one parent here, which
does nothing but import and so holds no threads that a fork would lose.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANKS = 2


def started(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that runs ``work(*arguments)``, both picklable."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["proto_core.losses", "proto_core.metrics", "proto_core.training", "pytest"])
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def finished(*processes: BaseProcess, timeout: float = 300) -> None:
    """Wait for them; AssertionError where one failed, and none is left running."""
    for process in processes:
        process.join(timeout)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * len(processes)


def on_two_processes(work: Callable[[int], object], folder: Path) -> list[Any]:
    """What ``work(rank)`` gives on each of two ranks of a gloo group; ``folder`` is empty or absent."""
    folder.mkdir(exist_ok=True)
    finished(*(started(_rank, rank, work, folder) for rank in range(RANKS)))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def _rank(rank: int, work: Callable[[int], object], folder: Path) -> None:
    torch.set_num_threads(1)
    # for trainers: the ranks stand already, and talk over the loopback
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
