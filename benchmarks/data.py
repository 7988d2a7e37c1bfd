"""What the records of a run cost each rank and its data workers, in seconds and memory: ours beside LLaVA's list.

    python benchmarks/data.py                  558,128 records, as many as LLaVA's stage-1 set has; 4 workers
    python benchmarks/data.py --records 20000

The records are synthetic, in the layout of LLaVA's blip_laion_cc_sbu_558k.json, each with a hallucinated caption.
Memory is Linux's proportional set size: a page that processes share counts for each by its part. A worker looks at each
record that it would read in an epoch; images are not opened, but for the last table: what a core decodes and prepares
for CLIP at 336 pixels, from COCO's common size. Writes benchmarks/results/data.json and .md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

KINDS = ("stock", "ours")
IMAGES = 200


def write_input(path, count):
    from hallucinate import captions

    texts = list(captions(2 * count, 1))
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            record = {
                "id": f"{i:09d}",
                "image": f"{i // 1000:05d}/{i:09d}.jpg",
                "conversations": [
                    {"from": "human", "value": "Write a terse but informative summary of the picture.\n<image>"},
                    {"from": "gpt", "value": texts[i]},
                ],
                "hallucinated_captions": [texts[count + i]],
                "hallucinated_kinds": ["existence"],
            }
            file.write(("[" if not i else ",\n") + json.dumps(record))
        file.write("]\n")


def memory(pid):
    """Proportional set size of a process, MiB."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"no Pss for {pid}")


def child(kind, path, workers):
    """In a process of its own: start, then an epoch by workers."""
    import types

    import torch

    from hacl_llava.data import HaclDataset, stock

    tokenizer = types.SimpleNamespace(bos_token_id=1, eos_token_id=2)
    base = stock.LazySupervisedDataset if kind == "stock" else HaclDataset

    class Records(torch.utils.data.Dataset):
        def __init__(self):
            self.of = base(path, tokenizer, types.SimpleNamespace(is_multimodal=True))

        def __len__(self):
            return len(self.of.list_data_dict)

        def __getitem__(self, i):
            record = self.of.list_data_dict[i]
            return len(record["conversations"][1]["value"]) + len(record["image"])

    before, began = memory(os.getpid()), time.perf_counter()
    data = Records()
    found = {"start_seconds": time.perf_counter() - began, "start_mib": memory(os.getpid()) - before}
    loader = torch.utils.data.DataLoader(data, 32, shuffle=True, num_workers=workers)
    began, batches, peak = time.perf_counter(), iter(loader), []
    pids = [os.getpid(), *(w.pid for w in batches._workers)]
    for n, _ in enumerate(batches, 1):
        if n == max(1, len(loader) - 2 * workers):  # while all workers are there
            peak = [memory(pid) for pid in pids]
    found |= {"epoch_seconds": time.perf_counter() - began, "all_mib": sum(peak) - before}
    print(json.dumps(found))


def images(folder):
    """Images a second that one core decodes and prepares, of 640 x 480 pixels; draft: JPEG's own smaller decoding."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    noise.save(folder / "a.jpg", quality=92)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}, do_convert_rgb=True
    )
    found = {}
    for name in ("decoding alone", "decoding and CLIP's processor"):
        began = time.perf_counter()
        for _ in range(IMAGES):
            with Image.open(folder / "a.jpg") as image:
                image = image.convert("RGB")
            if name != "decoding alone":
                processor.preprocess(image, return_tensors="pt")
        found[name] = IMAGES / (time.perf_counter() - began)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=558128, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results", metavar="DIR")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1"}
    if args.child:
        child(*args.child, args.workers)
        return
    from hacl_llava.common.files import write_json, write_text
    from hacl_llava.common.report import provenance, table

    report = {"records": args.records, "workers": args.workers, "found": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.json"
        write_input(path, args.records)
        report["file_mib"] = path.stat().st_size / 2**20
        for kind in random.Random(0).sample(KINDS, len(KINDS)):
            command = [sys.executable, __file__, "--workers", str(args.workers), "--child", kind, str(path)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            report["found"][kind] = json.loads(done.stdout.splitlines()[-1])
        report["images_a_second"] = images(Path(folder))
    report["provenance"] = provenance(0)
    rows = [
        (name, *(f"{report['found'][kind][key]:,.{digits}f}" for kind in KINDS))
        for name, key, digits in (
            ("start, seconds", "start_seconds", 1),
            ("memory of the rank after it, MiB", "start_mib", 0),
            (f"an epoch by {args.workers} workers, records alone, seconds", "epoch_seconds", 1),
            ("memory of rank and workers at its end, MiB", "all_mib", 0),
        )
    ]
    lines = [
        "# Records",
        "",
        f"`{report['provenance']['command']}`: {args.records:,} records, {report['file_mib']:.0f} MiB of json.",
    ]
    lines += ["", table(["", "LLaVA's list", "ours"], rows), "", "## Images", ""]
    lines += ["A second and core, 640 x 480 pixels to 336:", ""]
    lines += [table(["", "images"], [(k, f"{v:.0f}") for k, v in report["images_a_second"].items()]), ""]
    write_json(args.output / "data.json", report)
    write_text(args.output / "data.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
