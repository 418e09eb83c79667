"""Several processes on one machine, as `torchrun` starts them, without importing everything in each of them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.shared import ROOT

TIMEOUT = 120.0


def launch(body: Callable[..., Any], count: int, folder: Path, *args: Any, nodes: int = 1) -> list[Any]:
    """What `body(*args)` returns in each of `count` processes of one gloo group; it must lie in an importable module.

    A process is forked from a server that has imported the module already. Of several nodes each has as many of them.
    """
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    context.set_forkserver_preload([body.__module__])
    folder.mkdir(parents=True, exist_ok=True)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    store = folder / "store"
    started = [
        context.Process(target=_run, args=(sender, body, rank, count, nodes, str(store), args), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process, (_, sender) in zip(started, pipes, strict=True):
        process.start()
        sender.close()
    try:
        return _results([receiver for receiver, _ in pipes])
    finally:
        for process in started:
            process.join(10)
            process.kill()


def _results(receivers: list[Connection]) -> list[Any]:
    results: dict[Connection, Any] = {}
    while len(results) < len(receivers):
        ready = wait([receiver for receiver in receivers if receiver not in results], TIMEOUT)
        assert ready, f"{len(receivers) - len(results)} of {len(receivers)} processes hang"
        for receiver in ready:
            assert isinstance(receiver, Connection)
            error, result = receiver.recv()
            assert not error, error
            results[receiver] = pickle.loads(result)
    return [results[receiver] for receiver in receivers]


def _run(
    sender: Connection, body: Callable[..., Any], rank: int, count: int, nodes: int, store: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the server has imported: see tests/conftest.py
    of_node = count // nodes
    names = {"RANK": rank, "LOCAL_RANK": rank % of_node, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": of_node}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        result = body(*args)
        dist.barrier()
        dist.destroy_process_group()
        sender.send(("", pickle.dumps(result)))
    except BaseException:
        sender.send((traceback.format_exc(), b""))
        raise
