"""Several machines: two "nodes" on this one, under DeepSpeed's launcher without ssh and under Slurm's commands.

Nothing here has more than one machine: each node's launcher runs on its own, and they meet over the loopback.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm
import torch
from test_e2e import launcher_that_prints

from hacl_llava.demo import free_port

ROOT = Path(__file__).parents[2]
TIMEOUT = 180


def script_environment(mini, output):
    """What scripts/pretrain_7b.sh and finetune_7b.sh take from the environment, with this Python in front."""
    return {
        **os.environ, "DATA": str(mini.folder), "JSON": str(mini.data), "LLM": str(mini.llm), "TOWER": str(mini.clip),
        "OUTPUT": str(output), "BATCH": "16", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip


# The miniature's way where the script's is a GPU's.
FLAGS = (
    *("--bf16", "False", "--tf32", "False", "--dataloader_num_workers", "2", "--model_max_length", "512"),
    *("--num_train_epochs", "5", "--save_steps", "1", "--save_total_limit", "20", "--hacl_queue_size", "10"),
)


def start(command, log, env):
    with open(log, "w") as file:
        command = [str(x) for x in command]
        pipes = {"stdout": file, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes)


def kill(group):
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def finish(process, log, status=0):
    try:
        assert process.wait(TIMEOUT) == status, log.read_text()[-4000:]
    finally:
        kill(process.pid)
        tasks = log.parent / "tasks"  # of the step that runs, under Slurm
        for task in json.loads(tasks.read_text()) if tasks.exists() else ():
            kill(task)
    return log.read_text()


def losses(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    # grad_norm and all losses; not the times
    return [{k: v for k, v in x.items() if not k.startswith("train_")} for x in history if "loss" in x]


def equal(a, b):
    a, b = (torch.load(f / "mm_projector.bin", weights_only=True) for f in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def one_node(mini, tmp_path_factory):
    """The run that all others must equal: scripts/pretrain_7b.sh, one launcher, two processes."""
    folder = tmp_path_factory.mktemp("one")
    env = script_environment(mini, folder / "out")
    env["LAUNCHER_ARGS"] = f"--num_gpus 2 --master_port {free_port()}"
    command = ("bash", "scripts/pretrain_7b.sh", "--per_device_train_batch_size", "8", *FLAGS)
    log = folder / "log"
    finish(start(command, log, env), log)
    found = losses(folder / "out")
    assert len(found) == 10 and found[0]["loss_i2t"] > 0  # 32 images, 16 a step
    return folder / "out"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_launchers_without_ssh_equal_one(mini, tmp_path, one_node):
    (tmp_path / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")  # names nobody resolves: they are not called
    port, runs = free_port(), []
    for node in (1, 0):
        env = script_environment(mini, tmp_path / "out")
        env |= {"NODE_RANK": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        log = tmp_path / f"node{node}.log"
        command = ("bash", "scripts/pretrain_7b_multinode.sh", tmp_path / "hostfile", *FLAGS)
        runs.append((node, start(command, log, env), log))
    text = {node: finish(process, log) for node, process, log in runs}
    # Each launcher had one process, and they trained as one.
    for node in (0, 1):
        assert f"nnodes=2, num_local_procs=1, node_rank={node}" in text[node]
    assert "engine DeepSpeedEngine ZeRO-2, 2 ranks on cpu" in text[0] and "HACL run:" not in text[1]
    assert equal(tmp_path / "out", one_node) and losses(tmp_path / "out") == losses(one_node)
    # What differs is seen: one step earlier the projector was another.
    assert not equal(tmp_path / "out", one_node / "checkpoint-9")


# --- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_slurm_run_is_signalled_goes_back_into_the_queue_and_equals_the_launchers(mini, tmp_path, one_node):
    env = {**script_environment(mini, tmp_path / "out"), "MASTER_PORT": free_port()}
    stand_ins = slurm.install(tmp_path)
    env |= {"STANDIN": stand_ins["STANDIN"], "PATH": f"{tmp_path / 'bin'}{os.pathsep}{env['PATH']}"}
    sbatch = ("sbatch", "--nodes", "2", "scripts/pretrain_7b_slurm.sh", *FLAGS)
    log = tmp_path / "job"
    job = start(sbatch, log, env)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "out/checkpoint-2").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    asked = re.search(r"^#SBATCH --signal=(\w+)@120$", Path(ROOT / "scripts/pretrain_7b_slurm.sh").read_text(), re.M)
    for task in json.loads((tmp_path / "tasks").read_text()):
        os.killpg(task, signal.Signals[f"SIG{asked[1]}"])  # data workers too, as Slurm does
    text = finish(job, log, status=75)
    assert "saved after a signal; back into the queue" in text
    assert (tmp_path / "requeued").read_text() == '"4711"\n'
    done = max(int(f.name.split("-")[1]) for f in (tmp_path / "out").glob("checkpoint-*"))
    assert 2 <= done < 10 and not (tmp_path / "out/mm_projector.bin").exists()
    log = tmp_path / "job again"
    text = finish(start(sbatch, log, env), log)
    assert "engine DeepSpeedEngine ZeRO-2, 2 ranks on cpu" in text
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1  # ended, so not again
    assert equal(tmp_path / "out", one_node) and losses(tmp_path / "out") == losses(one_node)


def slurm_job(folder, python, *flags, nodes=2, text=None, **env):
    """The Slurm script with a program in place of the training; its lines of output, and its status."""
    environment = slurm.install(folder)
    (folder / "bin/python").write_text(f"#!/bin/sh\n{python}\n")
    (folder / "bin/python").chmod(0o755)
    script = ROOT / "scripts/pretrain_7b_slurm.sh"
    if text:
        script = folder / "changed.sh"
        script.write_text(text)
    env = {**os.environ, **environment, "STANDIN_SECONDS": "0.05", **env}
    command = ("sbatch", "--nodes", str(nodes), script, *flags)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines() + done.stderr.splitlines(), done.returncode


SAY = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$@"'


@pytest.mark.parametrize("script, batch", [("pretrain_7b.sh", 85), ("finetune_7b.sh", 42)])
def test_slurm_numbers_become_torchs(tmp_path, script, batch):
    lines, status = slurm_job(tmp_path, SAY, "--output_dir", "a $(b) 'c'", nodes=3, SCRIPT=script)
    stage = {"pretrain_7b.sh": "pretrain_hacl.py", "finetune_7b.sh": "finetune_hacl.py"}[script]
    ranks = sorted(x for x in lines if stage in x)
    assert status == 0 and len(ranks) == 3
    for rank, line in enumerate(ranks):
        assert line.startswith(f"{rank} 0 3 127.0.0.1 24711 scripts/{stage} --deepspeed zero_configs/zero")
        # The global batch is LLaVA-1.5's; what the caller gives comes last and arrives as it is.
        assert line.endswith(f"--per_device_train_batch_size {batch} --output_dir a $(b) 'c' --local_rank 0")
    assert any("is not a multiple of 3 GPUs" in x for x in lines)
    (step,) = (json.loads(x) for x in (tmp_path / "steps").read_text().splitlines())
    assert "--cpus-per-task=8" in step["flags"]  # srun no longer takes it from sbatch


ONE_AFTER_THE_OTHER = 'sleep "$RANK"; exit 75'


@pytest.mark.parametrize(
    "python, expected, requeued",
    [
        ("exit 75", 75, True),
        (ONE_AFTER_THE_OTHER, 75, True),
        ("exit 2", 2, False),
        ('[ "$RANK" = 1 ] && exit 3; exec sleep 30', 143, False),  # the other is ended soon after
        ("exit 0", 0, False),
    ],
)
def test_slurm_status(tmp_path, python, expected, requeued):
    lines, status = slurm_job(tmp_path, python)
    assert status == expected and (tmp_path / "requeued").exists() == requeued


def test_control_ending_all_with_the_first_rank_would_lose_the_status(tmp_path):
    text = (ROOT / "scripts/pretrain_7b_slurm.sh").read_text().replace("--kill-on-bad-exit=0", "--kill-on-bad-exit=1")
    _, status = slurm_job(tmp_path, ONE_AFTER_THE_OTHER, text=text)
    assert status == 143 and not (tmp_path / "requeued").exists()


def test_slurm_mistakes(tmp_path):
    for i, (env, message) in enumerate(
        (({"SCRIPT": "other.sh"}, "allowed are pretrain_7b.sh, finetune_7b.sh"), ({"BATCH": "1"}, "no image for some"))
    ):
        (tmp_path / str(i)).mkdir()
        lines, status = slurm_job(tmp_path / str(i), SAY, **env)
        assert status == 2 and message in lines[-1] and not (tmp_path / str(i) / "steps").exists()
    done = subprocess.run(["bash", "scripts/pretrain_7b_slurm.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "is started by sbatch" in done.stderr


def test_launcher_arguments_of_several_nodes(tmp_path):
    (tmp_path / "hosts").write_text("a slots=8\nb slots=8\n")
    base = {**os.environ, **launcher_that_prints(tmp_path), "NODE_RANK": "1"}

    def run(hostfile="hosts", **env):
        command = ("bash", ROOT / "scripts/pretrain_7b_multinode.sh", hostfile)
        return subprocess.run(command, cwd=tmp_path, env={**base, **env}, capture_output=True, text=True)

    done = run(MASTER_ADDR="a", SCRIPT="finetune_7b.sh", MODE="lora")
    want = f"--hostfile {tmp_path}/hosts --master_port 29500 --no_ssh --node_rank 1 --master_addr a scripts/finetune"
    out = " ".join(done.stdout.splitlines())
    assert out.startswith(want) and out.endswith("--per_device_train_batch_size 8")
    assert "give MASTER_ADDR" in run().stderr
    assert "no image for some of 16 GPUs" in run(MASTER_ADDR="a", BATCH="8").stderr
    (tmp_path / "host file").write_text("a slots=8\n")
    assert "without spaces" in run("host file").stderr


@pytest.mark.parametrize("script, records, batch", [("pretrain_7b.sh", 558_128, 256), ("finetune_7b.sh", 665_298, 128)])
def test_a_kill_costs_a_part_of_the_run(script, records, batch):
    """LLaVA's own stage 1 saves every 24,000 steps, of 2,180."""
    every = int(re.search(r"--save_steps (\d+)", (ROOT / "scripts" / script).read_text())[1])
    assert every <= records // batch // 4


# --- what travels -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.distributed
def test_what_travels_in_a_step_is_what_the_formulas_say(tmp_path):
    """benchmarks/communication.py on two ranks; it fails by itself where formulas or torch's profiler disagree."""
    script = ROOT / "benchmarks/communication.py"
    case = "global, K = 2"
    command = [sys.executable, script, "--ranks", "2", "--cases", case, "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (result,) = json.loads((tmp_path / "communication.json").read_text())["results"]
    # 4 rows of image, caption, whether it counts, and two hallucinated captions with theirs; back, both ranks' sum
    sent = 4 * (2 * 16 + 1 + 2 * (16 + 1)) * 4
    want = {"all_gather": {"calls": 1, "bytes": sent}, "all_reduce": {"calls": 1, "bytes": 2 * sent}}
    assert result["parts"]["features"] == want and result["as_expected"]
    assert f"| {case} | 2 |" in (tmp_path / "communication.md").read_text()


def test_control_another_formula_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import communication

    parts = {"features": {"all_gather": {"calls": 1, "bytes": 528}, "all_reduce": {"calls": 1, "bytes": 1057}}}
    parts["DeepSpeed"] = {"all_reduce": {"calls": 4, "bytes": 20811}}
    monkeypatch.setattr(communication, "make_world", lambda folder: None)
    monkeypatch.setattr(communication, "count_case", lambda *_: (parts, 1))
    argv = ["communication.py", "--ranks", "2", "--cases", "own", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="not as expected"):
        communication.main()
    parts["features"]["all_reduce"]["bytes"] = 1056
    communication.main()
