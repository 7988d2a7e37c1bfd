"""Stand-ins for Slurm's sbatch, srun and scontrol on one machine: what they promise, as far as our scripts use it.

`install` puts commands of these names into a folder for PATH. Each "node" has one task. The folder STANDIN takes notes:
``steps`` (what each srun was given), ``requeued`` (the jobs), ``tasks`` (process ids of the step that runs). Seconds
of srun's ``--wait`` are STANDIN_SECONDS long.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def install(folder):
    """Make the commands in ``folder/bin``; returns what the environment needs for them."""
    (folder / "bin").mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        command.chmod(0o755)
    return {"STANDIN": str(folder), "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def notes(name):
    return Path(os.environ["STANDIN"]) / name


def note(name, what):
    with open(notes(name), "a") as file:
        file.write(json.dumps(what) + "\n")


def sbatch(arguments):
    """``sbatch --nodes N SCRIPT [flags]``: a copy of the script runs, in the folder of the call, until it ends."""
    nodes, script = int(arguments[1]), Path(arguments[2])
    spool = notes("slurm_script")
    spool.write_text(script.read_text())
    asked = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    cpus = next(x.split("=")[1] for x in asked if x.startswith("--cpus-per-task="))
    job = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": nodes, "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_NTASKS": nodes, "SLURM_CPUS_PER_TASK": cpus, "SLURM_SUBMIT_DIR": os.getcwd(),
    }  # fmt: skip
    env = {**os.environ, **{k: str(v) for k, v in job.items()}}
    return subprocess.run(["bash", spool, *arguments[3:]], env=env, cwd="/").returncode


def srun(arguments):
    """All tasks at once, each in a process group of its own; its status is the highest of theirs."""
    command = [x for x in arguments if not x.startswith("--")][0]
    flags, command = arguments[: arguments.index(command)], arguments[arguments.index(command) :]
    note("steps", {"flags": flags, "command": command})
    given = dict(x.split("=") for x in flags)
    wait = float(given["--wait"]) * float(os.environ.get("STANDIN_SECONDS", 1))
    tasks = []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        task = {"SLURM_PROCID": rank, "SLURM_LOCALID": 0, "SLURM_NODEID": rank}
        env = {**os.environ, **{k: str(v) for k, v in task.items()}, "PWD": os.environ["SLURM_SUBMIT_DIR"]}
        tasks.append(subprocess.Popen(command, env=env, start_new_session=True))
    notes("tasks").write_text(json.dumps([t.pid for t in tasks]))
    first = None
    while any(t.poll() is None for t in tasks):
        ended = [t for t in tasks if t.poll() is not None]
        if ended and first is None:
            first = time.monotonic()
        if given["--kill-on-bad-exit"] == "1" and any(t.returncode for t in ended):
            wait = 0
        if first is not None and time.monotonic() - first > wait:
            for t in tasks:
                if t.poll() is None:
                    os.killpg(t.pid, signal.SIGTERM)
            wait = wait + 30
        time.sleep(0.05)
    notes("tasks").unlink()
    return max(t.returncode if t.returncode >= 0 else 128 - t.returncode for t in tasks)


def scontrol(arguments):
    if arguments[:2] == ["show", "hostnames"]:
        assert arguments[2] == os.environ["SLURM_JOB_NODELIST"], arguments
        print("127.0.0.1\n127.0.0.1")
    elif arguments[:1] == ["requeue"]:
        note("requeued", arguments[1])
    else:
        sys.exit(f"scontrol {arguments}: not known here")
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
