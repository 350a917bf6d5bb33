"""saenb's side of benchmarks/bench.py, a process of its own like the others': it trains with its own loop on batches that are handed to it, harvests, and reads stores."""
import json
import shutil
import sys
import time
from pathlib import Path

from contest import Feed, channel, listen, peak_memory, products

real = channel()

import torch

from saenb.data.harvest import harvest, stream_at
from saenb.data.store import Batch, Store
from saenb.sae.sae import SAE, SAEConfig
from saenb.data.sources import boot
from saenb.sae.architectures import LOGS_WIDTH
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer


class Ready:
    "Batches that lie in memory, with as much of a store as training looks at."
    path = "memory"

    def __init__(self, feed: Feed, d_in: int, batch: int):
        self.feed, self.d_in, ids = feed, d_in, torch.arange(batch, device=feed.held.device)
        self.others = ids % 128, ids % 3, torch.zeros_like(ids), ids // 128

    def check_batch(self, size, balanced): pass
    def batches(self, *_): return (Batch(x, *self.others) for x in self.feed)


def saenb(job: dict, feed: Feed):
    "saenb's SAE and its Trainer.fit; the penalty is given as it counts at this width."
    kind = feed.kind + (f",k={job['k']},aux={job['aux']}" if feed.k else "")
    sae = SAE(SAEConfig(d_in=job["d_in"], d_sae=job["d_sae"], architecture=kind)).to(job["device"])
    feed.place(**dict(sae.named_parameters()))
    with torch.no_grad(): sae.architecture.initialise(sae, feed.batches[0])
    feed.weights = lambda: dict(sae.named_parameters())
    trainer = Trainer(sae, Ready(feed, job["d_in"], job["batch"]), (), TrainConfig(
        steps=job["steps"], batch=job["batch"], lr=job["lr"], sparsity_penalty=job["l1"] / (LOGS_WIDTH / job["d_in"])**0.5, warmup=job["warmup"], decay=job["decay"] / job["steps"], seed=job["seed"],
        precision=job["precision"]))
    trainer.reading = lambda _: map(trainer.ready, trainer.store.batches()) # none is fetched ahead, since the clock runs until the next is asked for
    trainer.fit(progress=False)


class Reader:
    "Harvests and stores."
    def prepare(self, model: str, texts: str, layer: int, seq_len: int, rows: int):
        from transformers import Gemma2Model
        self.model, self.layer, self.rows, self.seq_len = boot(model), layer, rows, seq_len
        self.texts = json.loads(Path(texts).read_text())
        self.bare = Gemma2Model.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
        self.bare.layers, self.bare.norm = self.bare.layers[:layer + 1], torch.nn.Identity()
        return {}

    def harvest(self, tokens: int, out: str):
        "The whole way to a finished store on disk."
        shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        store = harvest(self.model, self.texts, self.layer, out, seq_len=self.seq_len, batch=self.rows, max_tokens=tokens)
        took = time.perf_counter() - began
        shutil.rmtree(out)
        return dict(seconds=took, tokens=sum(s["rows"] for s in store.shards) * self.seq_len, peak=peak_memory())

    def forward(self, rows: list, times: int, bare: bool = False):
        "A forward pass over token rows up to the layer: through the model that harvests, or through transformers' own layers alone."
        tokens = torch.tensor(rows)
        once = (lambda: self.bare(tokens, use_cache=False).last_hidden_state) if bare else lambda: stream_at(self.model, tokens, self.layer)
        with torch.no_grad():
            began = time.perf_counter()
            for _ in range(times): x = once()
            return dict(seconds=time.perf_counter() - began, tokens=times * tokens.numel(), norm=x.double().norm().item(), peak=peak_memory())

    def read(self, store: str, batch: int, pool_bytes: int, batches: int):
        "Shuffled batches of a store on disk, touched so that they are really there."
        stream, seconds, total = Store.open(store).batches(batch, 0, pool_bytes=pool_bytes), [], 0.0
        for _ in range(batches):
            began = time.perf_counter()
            total += next(stream).x.sum().item()
            seconds.append(time.perf_counter() - began)
        return dict(seconds=seconds, peak=peak_memory(), own=own_memory())


def own_memory() -> float | None:
    "Memory in MB that belongs to this process alone, the mapped files left out, where the system tells."
    try: return next(int(line.split()[1]) / 1e3 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    except (OSError, StopIteration): return None


if __name__ == "__main__":
    job = json.loads(sys.stdin.readline())
    torch.manual_seed(job.get("seed", 0))
    if job["package"] == "harvest":
        reader = Reader()
        listen(real, {name: getattr(reader, name) for name in ("prepare", "harvest", "forward", "read")})
    else: dict(saenb=saenb, products=products)[job["package"]](job, Feed(job, real))
