"""What both sides of benchmarks/bench.py have in common: the same batches, one function that judges everybody's weights, and loops that do as they are told on
standard input. It runs in either environment, so it needs torch and safetensors and nothing else."""
import json
import os
import resource
import sys
import time

import torch
from safetensors.torch import load_file

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec") # [d_in, d_sae], [d_sae], [d_sae, d_in], [d_in]
UNIT, START, BAND = 0.1, 0.02, 0.02 # of saenb's JumpReLU: what an active feature counts as, its first threshold, and the band around it


def channel():
    "Where answers go; whatever else is printed goes to the log."
    real, sys.stdout = sys.stdout, sys.stderr
    return real


def tell(real, **what): print(json.dumps(what), file=real, flush=True)


def peak_memory(device: str = "cpu") -> float:
    "The most memory that this process has held so far, in MB; on a GPU the most that torch has had there."
    if device == "cuda": return torch.cuda.max_memory_allocated() / 1e6
    try: return next(int(line.split()[1]) * 1.024e-3 for line in open("/proc/self/status") if line.startswith("VmHWM")) # getrusage would count what the parent had when it started us
    except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


@torch.no_grad()
def judge(weights: dict, x: torch.Tensor, l1: float, k: int | None = None, kind: str = "relu", rows: int = 512) -> dict:
    """The objective that all minimise, on tokens that none has seen, in float32; decoder rows of any length count as their features' scale. `k` leaves the k largest
    features of a token, or for batchtopk of as many tokens as are judged at a time; thresholds leave what is above them."""
    W_enc, b_enc, W_dec, b_dec = (weights[name].detach().float().to(x.device) for name in WEIGHTS)
    length, sums = W_dec.norm(dim=1), torch.zeros(3, dtype=torch.float64)
    for part in x.split(rows):
        f = torch.relu((part - b_dec) @ W_enc + b_enc)
        if "threshold" in weights: f = torch.where(f > weights["threshold"].detach().to(x.device), f, 0)
        if k:
            f = f.view(1, -1) if kind == "batchtopk" else f
            top = (f.view(len(part), -1) * length).view(f.shape).topk(k * len(part) // len(f), dim=1).indices
            f = torch.zeros_like(f).scatter_(1, top, f.gather(1, top)).view(len(part), -1)
        sums += torch.stack([(f @ W_dec + b_dec - part).pow(2).sum(), (f @ length).sum(), (f > 0).sum()]).double().cpu()
    error, size, active = (sums / len(x)).tolist()
    charge = l1 * (dict(jumprelu=UNIT * active).get(kind, 0.0 if k else size))
    return dict(loss=error + charge, reconstruction=error, l1=charge, l0=active, explained=1 - error / (x - x.mean(0)).pow(2).sum(1).mean().item())


class Feed:
    "Batches for a training loop that is not ours to stop: each is handed out when bench.py asks for a step, and the clock runs until the loop asks for the next."
    def __init__(self, job: dict, real):
        self.job, self.real, data = job, real, load_file(job["data"])
        device = job["device"]
        self.batches, self.held = data["x"].to(device).split(job["batch"]), data["held"].to(device)
        self.order = torch.randint(len(self.batches), (10**5,), generator=torch.Generator().manual_seed(job["seed"])).tolist()
        self.at, self.weights, self.kind = 0, None, job.get("kind", "relu")
        self.k = job["k"] if "topk" in self.kind else None
        self.start = load_file(job["start"]) if job["start"] else None

    def place(self, **parameters):
        "Lay the common start into a package's own parameters; a name that ends in _T is kept transposed there."
        if not self.start: return
        with torch.no_grad():
            for name, p in parameters.items():
                if (value := self.start.get(name.removesuffix("_T"))) is None: continue # a threshold, which begins as the package makes it
                p.copy_(value.T if name.endswith("_T") else value)

    def clock(self):
        if self.job["device"] == "cuda": torch.cuda.synchronize()
        return time.perf_counter()

    def __iter__(self):
        tell(self.real, ready=True)
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "judge":
                tell(self.real, peak=peak_memory(self.job["device"]), **judge(self.weights(), self.held, self.job["l1"], self.k, self.kind))
                continue
            took, processor = [], []
            for _ in range(request["n"]):
                batch = self.batches[self.order[self.at]]
                self.at, began, used = self.at + 1, self.clock(), time.process_time()
                yield batch
                took.append(self.clock() - began)
                processor.append(time.process_time() - used)
            tell(self.real, seconds=took, processor=processor)
        os._exit(0) # nobody asks for more, and the loop is not to think that it is done


def products(job: dict, feed: Feed):
    "A step's five matrix products and nothing else, in one precision, on operands that lie ready."
    dtype = getattr(torch, job["precision"])
    d_in, d_sae, n = job["d_in"], job["d_sae"], job["batch"]
    make = lambda *shape: torch.randn(shape, device=job["device"], dtype=torch.float32).to(dtype)
    W_enc, W_dec, f, g, h = make(d_in, d_sae), make(d_sae, d_in), make(n, d_sae), make(n, d_in), make(n, d_sae)
    outs = [torch.empty_like(t) for t in (f, g, f, W_dec, W_enc)]
    feed.weights = lambda: dict(W_enc=W_enc, b_enc=torch.zeros(d_sae), W_dec=W_dec, b_dec=torch.zeros(d_in))
    for _ in feed:
        for (a, b), out in zip(((g, W_enc), (f, W_dec), (g, W_dec.T), (f.T, g), (g.T, h)), outs): torch.mm(a, b, out=out)


def listen(real, parts: dict):
    "Answer requests, one a line, with what `parts[do]` returns for them."
    tell(real, ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        tell(real, **parts[request.pop("do")](**request))
