"""How much longer does a harvest take than its model alone, on two cores?

    .venv/bin/python benchmarks/overlap.py

The model computes with one thread; while it reads, a harvest tokenizes the next texts and writes the last shard on the other
core. Both are measured in turn on the same rows: the layers up to the one that is kept, on tokens that lie ready, and the
whole harvest, from texts to a finished store. It takes some ten minutes; let the machine do nothing else meanwhile. `--tiny` shows in seconds that it
runs, with figures that tell nothing."""
import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

from saenb.data.harvest import harvest, stream_at, token_rows
from saenb.data.sources import boot
from saenb.data.world import World
from saenb.evals.evaluation import as_text

sys.path.insert(0, str(Path(__file__).resolve().parent)) # however this file is run
from bench import busy, random_gemma

SEQ_LEN, ROWS, SHARDS = 128, 32, 16 # tokens a row, rows read together; the first shard's tokens and the last one's writing overlap with nothing
MODELS = {"the embedded world's": dict(tokens=2**18), "a random Gemma-2, 768 wide": dict(tokens=2**15, hidden=768, layers=8, layer=4)}
TINY = {"the embedded world's": dict(tokens=2**11)}
WANTED = 1.1 # times the model's own


@contextmanager
def two_cores():
    "Two cores for this process, where the system can say so, and one thread for the model."
    cores, threads = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None, torch.get_num_threads()
    torch.set_num_threads(1)
    if cores: os.sched_setaffinity(0, sorted(cores)[:2])
    try: yield
    finally:
        torch.set_num_threads(threads)
        if cores: os.sched_setaffinity(0, cores)


def timed(work) -> tuple[float, float]:
    "Seconds by the clock and of the processor."
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def measured(name: str, setting: dict, rounds: int, folder: Path) -> dict:
    "The two in turn, the first time uncounted."
    world = World.default()
    if "hidden" in setting: model, layer = boot(random_gemma(folder/"model", setting["hidden"], setting["layers"])), setting["layer"]
    else: model, layer = world.model(), world.layer
    texts = [text for text, _ in world.texts("train")]
    count = setting["tokens"] // SEQ_LEN
    rows = [row for row, _ in islice(token_rows(texts, model.tokenizer, SEQ_LEN), count)]
    def alone():
        for first in range(0, len(rows), ROWS): stream_at(model, torch.tensor(rows[first:first + ROWS]), layer)
    def whole():
        store = harvest(model, texts, layer, folder/"store", seq_len=SEQ_LEN, batch=ROWS, max_tokens=len(rows) * (SEQ_LEN - 1),
                        shard_bytes=len(rows) * SEQ_LEN * model.cfg.d_model * 4 // SHARDS)
        assert sum(shard["rows"] for shard in store.shards) == len(rows)
        shutil.rmtree(folder/"store")
    found = [(timed(alone), timed(whole)) for _ in range(rounds + 1)][1:]
    clock, processor = ([both[1][i] / both[0][i] for both in found] for i in range(2))
    return dict(model=name, tokens=f"{len(rows) * SEQ_LEN:,}", alone=f"{statistics.median(a[0] for a, _ in found):.2f} s",
                harvest=f"{statistics.median(h[0] for _, h in found):.2f} s", ratio=f"{statistics.median(clock):.3f}", lowest=f"{min(clock):.3f}",
                highest=f"{max(clock):.3f}", processor=f"{statistics.median(processor):.3f}", wanted=WANTED,
                reached="yes" if statistics.median(clock) <= WANTED else "no")


def main(given: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Measure a harvest beside its model alone, on two cores.")
    parser.add_argument("--rounds", type=int, default=5, help="how often (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="sizes that tell nothing, to see in seconds that it runs")
    args = parser.parse_args(given)
    others = busy()
    with two_cores(), tempfile.TemporaryDirectory(prefix="saenb-overlap-") as folder:
        rows = [measured(name, setting, args.rounds, Path(folder)) for name, setting in (TINY if args.tiny else MODELS).items()]
    print(as_text(rows))
    if args.tiny: print("The sizes are tiny and the figures tell nothing; this shows that it runs.")
    elif others is not None: print(f"Other programs used {others:.0%} of the processor before.")


if __name__ == "__main__": main()
