"""What travels between ranks in one training step of stage 1: collectives and bytes, counted on the miniature.

    python benchmarks/communication.py                          all cases, five minutes on two CPU cores
    python benchmarks/communication.py --ranks 2 --cases own    some of them

Each case is a run of scripts/pretrain_hacl.py under DeepSpeed over gloo, as many processes as ranks, all on this
machine, with torch.distributed's functions wrapped; torch's profiler must have seen as many collectives. What a step
sends is compared with formulas; docs/reliability.md puts a 7B model's numbers into them. Writes
benchmarks/results/communication.json and .md. Nothing here measures a time.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NOTES = "HACL_COUNT_COLLECTIVES"  # where a rank writes what it counted
B, P, D, STEPS = 4, 16, 64, 4  # the miniature's batch on a rank, width of the heads, hidden size; steps run
PROJECTOR, HEADS = 2 * (D * D + D), 2 * (D * P + P)  # weights; the temperature is one more
COUNTED = STEPS - 1  # the one looked at: ZeRO-3 learns in the first two what it will need when

# name -> (DeepSpeed configuration, hallucinated captions, flags); the others are `config.EOS`
CASES = {
    "stock": ("zero2", 2, "--use_hacl False"),
    "own": ("zero2", 2, "--hacl_negatives own"),
    "own, gather False": ("zero2", 2, "--hacl_negatives own --hacl_gather False"),
    "own, queue 64": ("zero2", 2, "--hacl_negatives own --hacl_queue_size 64"),
    "own, no heads": ("zero2", 2, "--hacl_negatives own --hacl_head_dim 0"),
    "batch": ("zero2", 2, "--hacl_negatives batch"),
    "global, K = 1": ("zero2", 1, "--hacl_negatives global --hacl_num_hallucinated 1"),
    "global, K = 2": ("zero2", 2, "--hacl_negatives global"),
    "stock, ZeRO-3": ("zero3", 2, "--use_hacl False"),
    "own, ZeRO-3": ("zero3", 2, "--hacl_negatives own"),
}
KEPT = ("max_live_parameters", "max_reuse_distance", "param_persistence_threshold", "prefetch_bucket_size")
# Who asked for a collective: the nearest of these files up the stack.
PARTS = {
    "hacl_llava/loss.py": "features",
    "hacl_llava/fused.py": "self-check",
    "hacl_llava/model.py": "figures for the log",
    "hacl_llava/nonfinite.py": "guard",
    "hacl_llava/resume.py": "signals",
    "hacl_llava/trainer.py": "trainer",
    "deepspeed/": "DeepSpeed",
    "transformers/": "Trainer",
    "accelerate/": "Trainer",
}


# --- in a rank --------------------------------------------------------------------------------------------------------


def expected_features(negatives, gather, width, captions, world):
    """Bytes that the contrast of one step is to send: ``(all_gather's input, all_reduce's input)`` on each rank."""
    if not gather or world == 1:
        return 0, 0
    columns = 2 * width + 1  # image, caption, and whether the row counts
    if negatives == "global":
        columns += captions * (width + 1)
    sent = B * columns * 4  # float32
    return sent, world * sent  # the backward sums the gathered gradients over the ranks


class Count:
    """Wraps the functions of torch.distributed; `calls` holds ``(step, part, function, bytes)`` of this rank."""

    # function -> which of its arguments is what this rank puts in
    FUNCTIONS = {
        "all_reduce": 0, "broadcast": 0, "reduce": 0, "all_gather": 1, "all_gather_into_tensor": 1,
        "_all_gather_base": 1, "reduce_scatter": 1, "reduce_scatter_tensor": 1, "_reduce_scatter_base": 1,
        "all_to_all_single": 1, "gather": 0, "scatter": 0, "barrier": None,
    }  # fmt: skip

    def __init__(self):
        self.calls, self.step, self.inside = [], 0, False
        self.seen = self.llm = None

    def wrap(self):
        import torch.distributed as dist
        from torch.distributed import distributed_c10d

        for name, position in self.FUNCTIONS.items():
            original = getattr(distributed_c10d, name, None)
            if original is not None:
                wrapped = self._wrapped(name, original, position)
                setattr(distributed_c10d, name, wrapped)
                if hasattr(dist, name):
                    setattr(dist, name, wrapped)

    def _wrapped(self, name, original, position):
        names = ("tensor", "input_tensor", "input", "input_list")

        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            if not self.inside and self.step:
                put_in = None
                if position is not None:
                    put_in = args[position] if len(args) > position else next(kwargs[n] for n in names if n in kwargs)
                self.calls.append((self.step, _part(), name.strip("_"), _bytes(put_in)))
            outer, self.inside = self.inside, True
            try:
                return original(*args, **kwargs)
            finally:
                self.inside = outer

        return wrapped


def _bytes(tensors):
    if tensors is None:
        return 0
    tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
    return sum(t.numel() * t.element_size() for t in tensors)


def _part():
    frame = sys._getframe(2)
    while frame:
        for path, part in PARTS.items():
            if path in frame.f_code.co_filename:
                return part
        frame = frame.f_back
    return "other"


def run_rank():
    """A rank of a counted run: everything is wrapped before anything else is imported."""
    count = Count()
    count.wrap()
    import torch
    import transformers

    from hacl_llava.train import main

    step = transformers.Trainer.training_step
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    @functools.wraps(step)
    def training_step(self, *args, **kwargs):
        count.step += 1
        if count.step == COUNTED:
            layers = [p for n, p in self.model.named_parameters() if ".layers." in n and "vision" not in n]
            count.llm = sum(getattr(p, "ds_numel", p.numel()) for p in layers)
            profiler.start()
        if count.step == COUNTED + 1:
            profiler.stop()
            count.seen = sum(e.count for e in profiler.key_averages() if e.key.startswith("c10d::"))
        return step(self, *args, **kwargs)

    transformers.Trainer.training_step = training_step
    status = main()
    note = {"calls": count.calls, "profiler": count.seen, "llm": count.llm}
    Path(os.environ[NOTES], f"{os.environ['RANK']}.json").write_text(json.dumps(note))
    return status


# --- the runs ---------------------------------------------------------------------------------------------------------


def make_world(folder):
    from hacl_llava.miniature import models, world

    world.make_dataset(folder, 4 * B * STEPS, per_caption=2)
    models.make_llm(folder / "llm", layers=2)
    models.make_vision_tower(folder / "clip")


def count_case(folder, name, ranks):
    """Run one case; returns the calls of the counted step as ``{part: {function: {calls, bytes}}}``, bytes per rank."""
    from hacl_llava.config import EOS
    from hacl_llava.demo import free_port

    config, _, flags = CASES[name]
    config = json.loads((ROOT / f"zero_configs/{config}.json").read_text())
    # Of 7B, ZeRO-3 cannot keep what the miniature is small enough for.
    config["zero_optimization"] |= {f"stage3_{k}": 0 for k in KEPT} if config["zero_optimization"]["stage"] == 3 else {}
    output = folder / f"run-{ranks}-{len(list(folder.glob('run-*')))}"
    output.mkdir()
    settings = {
        "model_name_or_path": folder / "llm", "version": "plain", "data_path": folder / "train.json",
        "image_folder": folder / "images", "vision_tower": folder / "clip", "mm_projector_type": "mlp2x_gelu",
        "tune_mm_mlp_adapter": True, "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "output_dir": output / "out", "per_device_train_batch_size": B,
        "max_steps": STEPS, "evaluation_strategy": "no", "save_strategy": "no", "learning_rate": 1e-3, "bf16": True,
        "logging_steps": 1000, "model_max_length": 512, "gradient_checkpointing": True, "report_to": "none",
        "lazy_preprocess": True, "disable_tqdm": True, "deepspeed": output / "deepspeed.json",
        **{f"hacl_{name}": value for name, value in EOS.items()},
    }  # fmt: skip
    (output / "deepspeed.json").write_text(json.dumps(config))
    command = [sys.executable, __file__, *(str(x) for k, v in settings.items() for x in (f"--{k}", v)), *flags.split()]
    env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    env |= {NOTES: str(output), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes = []
    for rank in range(ranks):
        log = open(output / f"{rank}.log", "w")
        with log:
            rank_env = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=rank_env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        for rank, process in enumerate(processes):
            if process.wait(300):
                raise SystemExit(f"{name}, rank {rank}:\n{(output / f'{rank}.log').read_text()[-3000:]}")
    finally:
        for process in processes:
            process.kill()
    found = []
    for rank in range(ranks):
        noted, sums = json.loads((output / f"{rank}.json").read_text()), {}
        calls = [call[1:] for call in noted["calls"] if call[0] == COUNTED]
        if len(calls) != noted["profiler"]:
            raise SystemExit(f"{name}, rank {rank}: {len(calls)} collectives, the profiler saw {noted['profiler']}")
        for part, function, size in calls:
            row = sums.setdefault(part, {}).setdefault(function, {"calls": 0, "bytes": 0})
            row["calls"], row["bytes"] = row["calls"] + 1, row["bytes"] + size
        found.append(sums)
    if any(x != found[0] for x in found):
        raise SystemExit(f"{name}: the ranks do not send the same: {found}")
    return found[0], noted["llm"]


def expected(name, ranks):
    """What the formulas say of a case: features in the form of `count_case`, and bytes of gradients under ZeRO-2."""
    config, captions, flags = CASES[name]
    given = dict(zip(flags.split()[::2], flags.split()[1::2]))
    hacl, heads = given.get("--use_hacl") != "False", given.get("--hacl_head_dim") != "0"
    # bf16, and 9 bytes for the norm and whether all is finite
    gradients = 2 * (PROJECTOR + (HEADS * heads + 1) * hacl) + 9 if config == "zero2" else None
    gather = hacl and given.get("--hacl_gather") != "False"
    forward, backward = expected_features(given.get("--hacl_negatives"), gather, P if heads else D, captions, ranks)
    calls = {"all_gather": {"calls": 1, "bytes": forward}, "all_reduce": {"calls": 1, "bytes": backward}}
    return calls if forward else {}, gradients


def rows_of(results, parts):
    for r in results:
        sent = [sorted(r["parts"].get(part, {}).items()) for part in parts]
        cells = ("; ".join(f"{v['calls']} x {k}, {v['bytes']:,} B" for k, v in calls) or "-" for calls in sent)
        yield r["case"], r["ranks"], *cells


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--output", default=HERE / "results", type=Path, help="folder of communication.json and .md")
    args = parser.parse_args()
    from hacl_llava.common.files import write_json, write_text
    from hacl_llava.common.report import provenance, table

    made, results, wrong = provenance(), [], []
    with tempfile.TemporaryDirectory(prefix="hacl-") as folder:  # not "tmpt...": LLaVA looks for mpt in a path
        make_world(Path(folder))
        for ranks in args.ranks:
            # More ranks tell nothing new of those whose features do not travel, or travel as others' do.
            some = list(CASES) if ranks == min(args.ranks) else ["stock", "own", "global, K = 2"]
            for name in args.cases or some:
                parts, llm = count_case(Path(folder), name, ranks)
                features, gradients = expected(name, ranks)
                right = parts.get("features", {}) == features
                right &= gradients in (None, parts["DeepSpeed"]["all_reduce"]["bytes"])
                results.append({"case": name, "ranks": ranks, "parts": parts, "as_expected": right, "llm_layers": llm})
                wrong += [] if right else [f"{name}, {ranks} ranks: {parts}, not {features}, {gradients}"]
                print(f"{name}, {ranks} ranks: {parts}", flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    sizes = {"batch_per_rank": B, "head_dim": P, "hidden_size": D}
    write_json(args.output / "communication.json", {**made, "sizes": sizes, "results": results})
    v, parts = made["versions"], sorted({part for r in results for part in r["parts"]})
    write_text(
        args.output / "communication.md",
        f"""# What travels between ranks in a training step

`{made["command"]}`, hacl_llava {v["hacl_llava"]} ({(made["commit"] or "?")[:7]}), torch {v["torch"]},
transformers {v["transformers"]}, llava {v["llava"]}.
Counted on the miniature ({B} images a rank, head width {P}, hidden size {D}, two-layer LLM, bf16), processes over gloo
on one machine, step {COUNTED} of {STEPS}, without logging. Bytes are what each rank puts into a call; all ranks put in
the same. The LLM's layers hold {results[0]["llm_layers"]:,} weights; under ZeRO-3 nothing is kept between its uses.
Features and gradients agree with the formulas of docs/reliability.md: {"yes, in all cases" if not wrong else "NO"}.

{table(("case", "ranks", *parts), rows_of(results, parts))}
""",
    )
    if wrong:
        sys.exit("not as expected:\n" + "\n".join(wrong))


if __name__ == "__main__":
    sys.exit(run_rank() if NOTES in os.environ else main())
