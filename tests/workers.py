"""Real processes that start in a moment: each is forked from one server, which has imported everything and holds no
thread and no process group. `run_ranks` runs a function over gloo; `Run` runs the training's own entry points."""

import atexit
import contextlib
import gc
import importlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import uuid
import warnings
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parent.parent
CONTEXT = mp.get_context("forkserver")
# The last: what a run's first step imports, two seconds in each process.
IMPORTED = ["hacl_llava.compat", "llava.train.train", "hacl_llava.trainer", "deepspeed", "torch._inductor.compile_fx"]
CONTEXT.set_forkserver_preload(IMPORTED)


def fork_server():
    """The server as a fork of this process, in place of an interpreter that imports all of this again."""

    def fork(path, command, files):
        if pid := os.fork():
            return pid
        for file in map(int, os.listdir("/proc/self/fd")):
            if file > 2 and file not in files:
                with contextlib.suppress(OSError):
                    os.close(file)
        importlib.reload(warnings)  # which pytest keeps to itself
        gc.freeze()  # for all that the server will fork
        try:
            exec(command[-1], {})
        finally:
            os._exit(0)

    for name in IMPORTED:
        importlib.import_module(name)
    resource_tracker.ensure_running()
    start, util.spawnv_passfds = util.spawnv_passfds, fork
    try:
        forkserver.ensure_running()
    finally:
        util.spawnv_passfds = start


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
    results = CONTEXT.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        init = os.path.join(folder, "rendezvous")
        shared = (world, init, function, args, results)
        processes = [CONTEXT.Process(target=_entry, args=(rank, *shared)) for rank in range(world)]
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


def _alone(results, function, args):
    try:
        results.put((function(*args), None))
    except BaseException:
        results.put((None, traceback.format_exc()))


def alone(function, *args):
    """``function(*args)`` in a process of its own; its error is raised here."""
    results = CONTEXT.SimpleQueue()
    process = CONTEXT.Process(target=_alone, args=(results, function, args))
    process.start()
    while results.empty() and process.is_alive():
        process.join(0.02)
    value, error = results.get() if not results.empty() else (None, f"ended with {process.exitcode}")
    process.join()
    if error:
        raise RuntimeError(error)
    return value


def stock_training(argv, file=None):
    """LLaVA's own train(), or that of another train.py, for a process of its own; returns what it prints."""
    import hacl_llava.compat  # noqa: F401, I001
    import llava.train.train as module

    sys.argv = ["train.py", *argv]
    if file:
        exec(compile(Path(file).read_text(), str(file), "exec"), vars(module))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.train()
    return said.getvalue()


def _door(argv, stage, log, env, prepare):
    os.setsid()
    mp.set_start_method("fork", force=True)  # of data workers, as in a process that no server has forked
    os.chdir(ROOT)
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = ["pretrain_hacl.py" if stage == 1 else "finetune_hacl.py", *argv]
    if prepare:
        prepare[0](*prepare[1:])
    from hacl_llava.train import main

    try:
        sys.exit(main(stage))
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


class Run:
    """Training begun in forked processes, each by `hacl_llava.train.main`.

    Args:
        argv: as on the command line. log: file to which all that is printed is added. stage: 1 or 2.
        ranks: how many; from two on, or with DeepSpeed, each finds in its environment what a launcher puts there.
        prepare: a function and its arguments, called in each process before training.
    """

    def __init__(self, argv, log, stage=1, ranks=1, prepare=None):
        from hacl_llava.demo import free_port

        self.log, argv, env = Path(log), [str(a) for a in argv], {}
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            if ranks > 1 or "--deepspeed" in argv:
                env = {**together, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = CONTEXT.Process(target=_door, args=(argv, stage, str(log), env, prepare))
            process.start()
            self.processes.append(process)

    def kill(self, number=signal.SIGKILL):
        """The signal to every rank; after SIGKILL, none lives when this returns."""
        for process in self.processes:
            os.kill(process.pid, number)
        if number == signal.SIGKILL:
            for process in self.processes:
                process.join()

    def running(self):
        return any(p.is_alive() for p in self.processes)

    def ends(self, timeout=240):
        """Exit statuses of the ranks, minus the signal where one ended it: one number where all have the same."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, until - time.monotonic()))
        codes = {p.exitcode for p in self.processes}
        if None in codes:
            self.kill()
            raise TimeoutError(f"not over after {timeout} s: {self.said()[-3000:]}")
        return codes.pop() if len(codes) == 1 else [p.exitcode for p in self.processes]

    def said(self):
        return self.log.read_text() if self.log.exists() else ""


def trained(*args, **kwargs):
    """What a `Run` printed that must end well."""
    run = Run(*args, **kwargs)
    code = run.ends()
    assert code == 0, (code, run.said()[-3000:])
    return run.said()


def _command(argv, out, err, prepare):
    os.setsid()
    mp.set_start_method("fork", force=True)
    for stream, name in ((1, out), (2, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if prepare:
        prepare[0](*prepare[1:])
    sys.argv = ["hacl-llava", *argv]
    from hacl_llava.cli import main

    sys.exit(main(argv))


class Command:
    """``hacl-llava ...`` begun in a forked process; what it prints goes to files in a folder."""

    def __init__(self, folder, *argv, prepare=None):
        self.out, self.err = (Path(folder) / f"{uuid.uuid4().hex}.{name}" for name in ("out", "err"))
        args = ([str(a) for a in argv], str(self.out), str(self.err), prepare)
        self.process = CONTEXT.Process(target=_command, args=args)
        self.process.start()

    def ends(self, timeout=300):
        """(exit status, stdout, stderr)"""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"not over after {timeout} s")
        return self.process.exitcode, self.out.read_text(), self.err.read_text()


def small_disk(largest):
    """A disk on which no file may have more than so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def slow_disk(seconds):
    """A disk that takes so long to have a file written: on one that takes no time, no kill ever meets a save."""
    written = os.fsync
    os.fsync = lambda file: (time.sleep(seconds), written(file))
