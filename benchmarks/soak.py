"""Minutes of training on two processes in which everything goes wrong that may: python benchmarks/soak.py --minutes 10

Mixed records under DeepSpeed ZeRO-2; images vanish, are cut short and come back while it runs; it is killed, one rank
is killed, it is asked to end, and its disk (a tmpfs, which takes root) is full for a while. The same command goes on
each time. In the end all steps are there, every record that could not be read is listed, no other is, and memory is
flat; exit status 0 if so, else 1. Writes soak.json and soak.md to --output.
"""

import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READS = "HACL_SOAK_READS"
GROWTH = 1.5  # MiB a minute that a rank may grow, once it has warmed up
WARM = 120.0  # seconds
DISK = 64  # MiB of the small disk
VICTIMS = 60  # images that vanish and come back


# --- a rank -----------------------------------------------------------------------------------------------------------


def usable(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
        return True
    except (OSError, SyntaxError):
        return False


def rank():
    """LLaVA's training, which notes of each image that is read whether it was whole before and after."""
    import hacl_llava.compat  # noqa: F401, I001
    from hacl_llava import data
    from hacl_llava.train import main

    item = data.HaclDataset.__getitem__

    def watched(self, i):
        record = self.list_data_dict[i]
        path = os.path.join(self.data_args.image_folder, record["image"]) if "image" in record else None
        before = path is None or usable(path)
        try:
            return item(self, i)
        finally:
            line = json.dumps([time.time(), self.numbers[i], before, path is None or usable(path)]) + "\n"
            file = os.open(os.environ[READS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, line.encode())
            os.close(file)

    data.HaclDataset.__getitem__ = watched
    return main()


# --- the world --------------------------------------------------------------------------------------------------------


def world(folder):
    """402 records: each fourth text alone, each third without hallucinated captions; of the last two one is of no form
    and one has a text file for an image. Returns them and the paths of images that may be broken."""
    from hacl_llava.miniature import models, world

    data = world.make_dataset(folder, 400, per_caption=2)
    models.make_llm(folder / "llm", layers=2)
    models.make_vision_tower(folder / "clip")
    rows = json.loads(data.read_text())
    for i, row in enumerate(rows):
        if i % 3 == 0:
            del row["hallucinated_captions"]
        if i % 4 == 0:
            del row["image"]
            row["conversations"][0]["value"] = "Hello."
    rows.append({"id": "formless", "image": "nowhere.png"})
    rows.append({**rows[1], "id": "text", "image": "text.png"})
    (folder / "images/text.png").write_text("This is no image.")
    data.write_text(json.dumps(rows))
    with_image = [i for i, row in enumerate(rows[:-2]) if "image" in row]
    random.Random(1).shuffle(with_image)
    return data, rows, {i: folder / "images" / rows[i]["image"] for i in with_image[:VICTIMS]}


def command(folder, output, steps, stage):
    sys.path.insert(0, str(ROOT / "tests"))
    import types

    from conftest import arguments

    from hacl_llava.demo import free_port

    mini = types.SimpleNamespace(
        data=folder / "train.json", images=folder / "images", llm=folder / "llm", clip=folder / "clip"
    )
    launcher = Path(sys.executable).parent / "deepspeed"
    # In float32: in bf16, on a CPU, oneDNN keeps kernels for each new shape of a matrix, which hides what else grows.
    argv = arguments(mini, output, "--deepspeed", "zero_configs/zero2.json", "--max_steps", steps)
    for flag, value in (("--save_strategy", "steps"), ("--logging_steps", "5"), ("--per_device_train_batch_size", "4")):
        argv[argv.index(flag) + 1] = value
    argv += ["--save_steps", "10", "--save_total_limit", "2", "--dataloader_num_workers", "1", "--seed", "1"]
    argv += ["--hacl_bad_records", "skip", "--hacl_max_failed", "1000", "--hacl_queue_size", "100"]
    argv += ["--hacl_negatives", "global", "--group_by_modality_length", "True"]
    if stage == 2:
        argv[argv.index("--tune_mm_mlp_adapter") + 1] = "False"
        argv[argv.index("--version") + 1] = "v1"
        argv += ["--use_hacl", "True"]
    start = [sys.executable, launcher, "--num_gpus", "2", "--master_port", free_port(), Path(__file__).resolve()]
    return [str(x) for x in (*start, *argv)]


# --- what goes wrong --------------------------------------------------------------------------------------------------


class Images:
    """Breaks images and mends them."""

    def __init__(self, victims, seed):
        self.victims, self.chance = victims, random.Random(seed)
        self.whole = {i: path.read_bytes() for i, path in victims.items()}
        self.broken, self.ever, self.counts = {}, set(), {"vanished": 0, "cut short": 0, "mended": 0}

    def act(self):
        """One more is broken; those broken for long enough are mended."""
        for i, until in list(self.broken.items()):
            if time.time() > until:
                self._mend(i)
        i = self.chance.choice([i for i in self.victims if i not in self.broken])
        kind, path = self.chance.choice(("vanished", "cut short")), self.victims[i]
        if kind == "vanished":
            path.unlink()
        else:
            self._write(path, self.whole[i][: len(self.whole[i]) // 2])
        self.broken[i] = time.time() + self.chance.uniform(2, 15)
        self.ever.add(i)
        self.counts[kind] += 1

    def _mend(self, i):
        self._write(self.victims[i], self.whole[i])
        del self.broken[i]
        self.counts["mended"] += 1

    def _write(self, path, content):
        part = path.with_suffix(".part")
        part.write_bytes(content)
        os.replace(part, path)


@contextlib.contextmanager
def small_disk(folder):
    """A folder of `DISK` MiB that can be filled: a tmpfs, or None where it cannot be mounted."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(folder)]
    mounted = subprocess.run(["mount", *options], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Take all the room there is."""
    with open(folder / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass


def processes():
    """``{pid: (parent, rank)}`` of this run's ranks and their data workers."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            line = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            local = [x.split("=")[1] for x in line if x.startswith("--local_rank=")]
            if local and str(Path(__file__).resolve()) in line:
                parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                found[int(folder.name)] = parent, int(local[0])
    return found


def resident(pid):
    """MiB."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class Run:
    """One start of the command: its processes, its log, and how its memory went."""

    def __init__(self, command, log, env):
        self.log, self.started, self.memory, self.sampled = log, time.time(), {0: [], 1: []}, 0.0
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env, start_new_session=True
            )

    def ranks(self):
        alive = processes()
        return {rank: pid for pid, (parent, rank) in alive.items() if parent not in alive}

    def sample(self):
        if time.time() - self.sampled > 2:
            self.sampled = time.time()
            for rank, pid in self.ranks().items():
                if size := resident(pid):
                    self.memory[rank].append((time.time() - self.started, size))

    def training(self):
        return b"'loss'" in self.log.read_bytes()

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def slope(points):
    """MiB a minute, by least squares; None without enough points."""
    points = [(t / 60, size) for t, size in points if t > WARM]
    if len(points) < 10:
        return None
    mean_t, mean_s = (sum(p[k] for p in points) / len(points) for k in (0, 1))
    of = sum((t - mean_t) ** 2 for t, _ in points)
    return sum((t - mean_t) * (s - mean_s) for t, s in points) / of


# --- the soak ---------------------------------------------------------------------------------------------------------

FAULTS = ("kill all", "ask to end", "full disk", "kill one rank", None)  # one a start; the last runs to its end
LIMIT = 60  # seconds within which a fault has to end the run


def steps_of(output):
    """The last step that was saved."""
    saved = [int(m[1]) for p in output.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    return max(saved, default=0)


def fault_now(kind, run, output):
    if kind == "kill all":
        run.kill()
    elif kind == "kill one rank":
        os.kill(run.ranks()[1], signal.SIGKILL)
    elif kind == "ask to end":
        for pid in run.ranks().values():
            os.kill(pid, signal.SIGUSR1)
    else:
        fill(output)


def soak(minutes, stage, folder):
    data, rows, victims = world(folder)
    reads = folder / "reads.jsonl"
    env = {**os.environ, READS: str(reads), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    images, chance, runs, windows = Images(victims, seed=2), random.Random(3), [], []
    with small_disk(folder / "disk") as mounted:
        faults = [f for f in FAULTS if mounted or f != "full disk"]
        output = folder / "disk/out"
        # How long a start and a step take here, so that it ends by itself when the minutes are over.
        trial = Run(command(folder, folder / "trial", 100, stage), folder / "trial.log", env)
        assert trial.process.wait() == 0, trial.log.read_text()[-3000:]
        took = json.loads((folder / "trial/trainer_state.json").read_text())["log_history"][-1]["train_runtime"]
        start, a_step = time.time() - trial.started - took, took / 100
        reads.unlink()
        seconds = 60 * minutes - start * len(faults)
        steps = max(100, int(seconds / a_step) // 10 * 10)
        argv = command(folder, output, steps, stage)
        # Each fault at a step of its own, all in the first third.
        at = [steps * 0.35 * (i + chance.uniform(0.6, 1)) / (len(faults) - 1) for i in range(len(faults) - 1)]
        began = time.time()
        for number, kind in enumerate(faults):
            note = {"fault": kind or "none", "from_step": steps_of(output)}
            run = Run(argv, folder / f"run{number}.log", env)
            struck = None
            while run.process.poll() is None:
                if not struck and time.time() - run.started > 60 * minutes + 300:
                    run.kill()
                run.sample()
                if "start_seconds" not in note and run.training():
                    note["start_seconds"] = round(time.time() - run.started, 1)
                # it has saved since it began: what goes on is what is looked at
                if kind and not struck and (saved := steps_of(output)) > note["from_step"] and saved >= at[number]:
                    time.sleep(chance.random())
                    struck = time.time()
                    fault_now(kind, run, folder / "disk")
                if struck and time.time() - struck > LIMIT + 30:
                    run.kill()
                # what the first start finds broken is left out, which is not looked at here
                if chance.random() < 0.07 and (number or "start_seconds" in note):
                    images.act()
                time.sleep(0.1)
            if struck:
                note["seconds_to_end"] = round(time.time() - struck, 1)
            note |= {"exit_status": run.process.returncode, "saved_step": steps_of(output)}
            note["seconds"] = round(time.time() - run.started, 1)
            text = run.log.read_text(errors="replace")
            note["error"] = next((x[7:] for x in text.splitlines() if x.startswith("error: ")), None)
            if kind == "full disk":
                windows.append((struck, time.time()))
                (folder / "disk/filler").unlink(missing_ok=True)
            until = time.time() + 15
            while processes() and time.time() < until:
                time.sleep(0.1)
            note["left_behind"] = len(processes())
            for pid in processes():
                os.kill(pid, signal.SIGKILL)
            print(json.dumps(note), flush=True)
            runs.append((note, run))
        took = time.time() - began
        return judge(output, rows, reads, images, runs, windows, steps, took, mounted, stage)


def judge(output, rows, reads, images, runs, windows, steps, took, mounted, stage):
    """The figures, and under ``checks`` what has to hold."""
    state = json.loads((output / "trainer_state.json").read_text()) if (output / "trainer_state.json").exists() else {}
    logged = [x["step"] for x in state.get("log_history", []) if "loss" in x]
    listed = []
    with contextlib.suppress(OSError):
        listed = [json.loads(line) for line in (output / "bad_records.jsonl").read_text().splitlines()]
    at_start = sorted(e["id"] for e in listed if e["when"] == "start")
    failed = [e["index"] for e in listed if e["when"] == "training"]
    seen = [json.loads(line) for line in reads.read_text().splitlines()]
    known = images.ever | {i for i, row in enumerate(rows) if row["id"] == "text"}
    # On a full disk nothing can be listed; a record is in doubt where its image changed while it was read.
    full = [i for t, i, before, after in seen if not (before or after) and any(a <= t <= b for a, b in windows)]
    surely = {i for t, i, before, after in seen if not (before or after)} - set(full)
    last = runs[-1][1]
    slopes = {str(rank): slope(points) for rank, points in last.memory.items()}
    ends = {note["fault"]: note for note, _ in runs}
    checks = {
        "it ended by itself, with exit status 0": ends["none"]["exit_status"] == 0,
        "every step is in the log once": logged == list(range(5, steps + 1, 5)),
        "the projector is there": any((output / name).exists() for name in ("mm_projector.bin", "model.safetensors")),
        "two checkpoints are kept, and nothing half-written": sorted(p.name for p in output.glob("checkpoint-*"))
        == sorted(f"checkpoint-{n}" for n in (steps - 10, steps))
        and not (output / "unfinished").exists(),
        "the record without form is left out and listed": at_start == ["formless"],
        "every record that could not be read is listed": surely <= set(failed),
        "no other record is listed": set(failed) <= known,
        "no record is listed twice": len(failed) == len(set(failed)),
        f"each fault ended its run within {LIMIT} s": all(
            n.get("seconds_to_end", 1e9) <= LIMIT for n, _ in runs if n["fault"] != "none"
        ),
        "it went on from what was saved": all(
            later["from_step"] == before["saved_step"] > 0 for (before, _), (later, _) in zip(runs, runs[1:])
        ),
        "no process was left behind": not any(n["left_behind"] for n, _ in runs),
        f"memory of each rank grows by at most {GROWTH} MiB a minute": all(
            s is not None and s <= GROWTH for s in slopes.values()
        ),
    }
    if "ask to end" in ends:
        checks["asked to end, it saved"] = ends["ask to end"]["exit_status"] not in (0, -9) and (
            ends["ask to end"]["saved_step"] > ends["ask to end"]["from_step"]
        )
    if mounted:
        checks["a full disk ended it with one line"] = "cannot be written" in (ends["full disk"]["error"] or "")
    return {
        "stage": stage,
        "minutes": round(took / 60, 1),
        "processes": 2,
        "steps": steps,
        "full_disk": f"a tmpfs of {DISK} MiB" if mounted else "not tried: no tmpfs could be mounted",
        "records": len(rows),
        "images": {**images.counts, "different": len(images.ever)},
        "reads": {
            "all": len(seen),
            "of broken images": sum(not (b or a) for _, _, b, a in seen),
            "while the image changed": sum(b != a for _, _, b, a in seen),
            "of broken images on the full disk": len(full),
        },
        "records that could not be read": len(surely),
        "records listed": {"at start": len(at_start), "training": len(failed)},
        "memory_mib_a_minute": {r: None if s is None else round(s, 2) for r, s in slopes.items()},
        "memory_mib": {str(r): [round(points[0][1]), round(points[-1][1])] if points else [] for r, points in
                       last.memory.items()},
        "memory_curve": {str(r): [[round(t), round(m)] for t, m in p[::5]] for r, p in last.memory.items()},
        "starts": [note for note, _ in runs],
        "checks": checks,
    }  # fmt: skip


def markdown(found):
    from hacl_llava.common.report import table

    head = ("start", "fault", "from step", "saved step", "seconds", "until it ended", "exit status", "its own words")
    keys = ("fault", "from_step", "saved_step", "seconds", "seconds_to_end", "exit_status", "error")
    starts = [(i, *("" if note.get(k) is None else note[k] for k in keys)) for i, note in enumerate(found["starts"], 1)]
    lines = [
        "# A soak on two processes",
        "",
        f"`benchmarks/soak.py`, {found['minutes']} minutes, {found['steps']} steps of stage {found['stage']} with HACL "
        f"under DeepSpeed ZeRO-2 on two CPU processes, {found['records']} records (text alone, without hallucinated "
        f"captions, broken ones), the disk: {found['full_disk']}. Figures: soak.json.",
        "",
        table(("what has to hold", ""), [(name, "yes" if held else "NO") for name, held in found["checks"].items()]),
        "",
        table(head, starts),
        "",
        f"Images: {found['images']['vanished']} times one vanished, {found['images']['cut short']} times one was cut "
        f"short ({found['images']['different']} different ones), {found['images']['mended']} times one came back. Of "
        f"{found['reads']['all']} reads {found['reads']['of broken images']} were of a broken image, of "
        f"{found['records that could not be read']} records; {found['records listed']['training']} are listed. "
        f"{found['reads']['while the image changed']} times the image changed while it was read.",
        "",
        f"Memory of the ranks in the last start, MiB from its beginning to its end: {found['memory_mib']}; growth "
        f"after {WARM:.0f} s, MiB a minute: {found['memory_mib_a_minute']}.",
        "",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, metavar="N", help="how long (default: %(default)s)")
    parser.add_argument("--stage", type=int, default=1, choices=(1, 2), help="of LLaVA's training (default: 1)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/reliability", metavar="DIR")
    parser.add_argument("--keep", action="store_true", help="keep the working folder, and say where it is")
    args = parser.parse_args()
    from hacl_llava.common.report import provenance

    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    try:
        found = soak(args.minutes, args.stage, folder)
    finally:
        if args.keep:
            print(folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    words = json.dumps(found, indent=1).replace(str(folder), "FOLDER")
    found = {**json.loads(words), "provenance": provenance(seed=1)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "soak.md").write_text(markdown(found))
    print(markdown(found))
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(rank() if READS in os.environ else main())
