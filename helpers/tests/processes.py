"""Work in two processes that talk to each other by gloo, for the tests marked ``distributed``."""

import datetime
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # a process that is started here has not read conftest.py
    sys.path.insert(0, str(ROOT))

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo"
)

TIMEOUT = 300  # seconds until a process that hangs is given up: no machine is as slow


def start(rank, folder, work):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=TIMEOUT)
    method = (Path(folder) / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timeout)
    work(rank, Path(folder))
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()
    os._exit(0)  # now and then gloo aborts while the interpreter shuts down, after all work is done


def two_processes(folder, work):
    """Run ``work`` in two processes, and kill what has not ended in time; returns their exit codes."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=start, args=(rank, str(folder), work)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
