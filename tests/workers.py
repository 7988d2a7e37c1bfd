"""Run a function in several real processes over gloo; used by the distributed tests."""

import os
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _entry(rank, world, init, function, args, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{init}", rank=rank, world_size=world)
        results.put((rank, function(rank, world, *args), None))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        results.put((rank, None, traceback.format_exc()))


def run_ranks(function, *args, world=2, timeout=240):
    """``[function(rank, world, *args) for each rank]``, each in its own process; a rank's error is raised here."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        init = os.path.join(folder, "rendezvous")
        shared = (world, init, function, args, results)
        processes = [context.Process(target=_entry, args=(rank, *shared)) for rank in range(world)]
        for p in processes:
            p.start()
        found = {}
        try:
            for _ in range(world):
                deadline = timeout
                while results.empty() and deadline > 0:
                    processes[0].join(0.05)
                    deadline -= 0.05
                if results.empty():
                    raise TimeoutError(f"after {timeout} s only ranks {sorted(found)} answered")
                rank, value, error = results.get()
                if error:
                    raise RuntimeError(f"rank {rank}:\n{error}")
                found[rank] = value
        finally:
            for p in processes:
                p.join(5)
                p.kill()
    return [found[r] for r in range(world)]
