"""Does saenb do on a GPU what it does on the processor, and how fast?

    .venv/bin/python benchmarks/gpu.py

takes at most eight minutes on one GPU and writes gpu.md beside this file: equal results with the processor, harvest beside
the bare forward pass of a random Gemma-2-2b, training at 2,304 x 16,384 beside SAELens and dictionary_learning where they
are installed (here, or in the environment that --env names), the share of the measured rate of bfloat16 products, sixteen
settings of an exam, the memory of each, and gemma-2-2b's hours by stage from the rates just measured. `--device cpu --tiny` runs the same with sizes that tell nothing."""
import argparse
import datetime
import importlib.util
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1") # all models are made here; shapes are known without asking

import torch
from torch.utils.flop_counter import FlopCounterMode

from saenb.base.devices import device_name, find_device, use_device, wait_for
from saenb.base.errors import SaenbError
from saenb.base.files import as_size, write_tensors, write_text
from saenb.data.harvest import harvest, stream_at
from saenb.data.sources import boot
from saenb.data.store import Batch
from saenb.data.world import World
from saenb.evals.exam import Exam, Grid, UnlearningSetup, feature_stats
from saenb.evals.unlearning import search
from saenb.lab.estimates import Rates, duration, model_cost, planned_stages, training_held
from saenb.lab.preset_files import find_preset
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE)) # however this file is run
from bench import contest, made_up
from contest import judge

FULL = dict(product=8192, model={}, layer=19, seq_len=128, rows=128, tokens=2**19, d_in=2304, d_sae=16384, k=32, batches=(2048, 8192),
            steps=100, uncounted=10, distinct=48, curve=60, questions=480, texts=128)
TINY = dict(product=256, model=dict(hidden_size=48, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=24,
                                    intermediate_size=96, vocab_size=2048), layer=1, seq_len=32, rows=8, tokens=2**10,
            d_in=48, d_sae=96, k=8, batches=(128,), steps=12, uncounted=2, distinct=4, curve=12, questions=12, texts=8)
GRID = Grid(thresholds=(0.1, 0.5)) # the reference's counts and multipliers; features of no training are dense
WANTED = dict(curve=1e-3, harvest=0.9, peers=2.0, rate=0.5, exam=120) # what a GPU is to reach


class Known(Exam):
    "An exam in which the first questions count as known: a random model knows none."
    count = 0

    def find_known(self, sources):
        each = -(-self.count // len(sources))
        return {s.subject: list(range(min(each, len(s.load())))) for s in sources}


class Ready:
    "Batches that lie on the device, as a trainer asks a store for them."
    path, about = Path("memory"), dict(shards=[])

    def __init__(self, x, batch):
        n = len(x) // batch
        ids = torch.arange(batch, device=x.device)
        self.d_in, others = x.shape[1], (ids % 128, ids % 3, torch.zeros_like(ids), ids // 128)
        self.all = [Batch(part, *others) for part in x[:n * batch].split(batch)]

    def check_batch(self, *_): pass


class Bench:
    "The device, the sizes, the rows of the report and the time that is left."
    def __init__(self, device, sizes, minutes, work, theirs):
        self.device, self.sizes, self.work, self.theirs = device, sizes, Path(work), theirs
        self.ends, self.rows, self.rate = time.perf_counter() + 60 * minutes, [], None
        self.reading = self.step = None # the bare model's share of the rate of products, and seconds of a training step

    def note(self, part, what, found, wanted="", reached=None):
        "A row of the report."
        self.rows.append(dict(part=part, what=what, found=found, wanted=wanted, reached={None: "", True: "yes", False: "no"}[reached]))
        print(f"{part}: {what}: {found}", flush=True)

    def timed(self, work):
        "Seconds that some work takes, and what it gives."
        wait_for(self.device)
        began = time.perf_counter()
        out = work()
        wait_for(self.device)
        return time.perf_counter() - began, out

    def part(self, name, make):
        "A part of the report, if there is time for it; its most memory on a GPU."
        if time.perf_counter() > self.ends: return self.note(name, "left out", "there was no time left")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        try: make(self)
        except (SaenbError, RuntimeError) as e: self.note(name, "failed", str(e).strip().splitlines()[0][:200], reached=False)
        if self.device.type == "cuda": self.note(name, "most memory held", as_size(torch.cuda.max_memory_allocated()))
        self.note(name, "took", f"{time.perf_counter() - began:.0f} s")


# --- what the device can do ---------------------------------------------------------------------------------------------

def product_rate(bench):
    "The rate of large products in bfloat16, which nothing that multiplies can exceed."
    n = bench.sizes["product"]
    a, b = (torch.randn(n, n, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3): torch.mm(a, b, out=out)
    seconds, _ = bench.timed(lambda: [torch.mm(a, b, out=out) for _ in range(10)])
    bench.rate = 10 * 2 * n**3 / seconds
    bench.note("device", f"products of {n:,} x {n:,} in bfloat16", f"{bench.rate / 1e12:,.1f} TFLOP/s")


# --- equal results ------------------------------------------------------------------------------------------------------

def curve(device, kind, steps):
    "The losses of a short training in float32."
    x = made_up(64, 2048, 0, 0)["x"]
    sae = SAE(SAEConfig(64, 256, architecture=kind)).initialise(x, 0).to(device)
    store = Ready(x.to(device), 256)
    trainer = Trainer(sae, store, cfg=TrainConfig(steps=steps, batch=256, lr=1e-3, warmup=10, precision="float32", log_every=1))
    for i in range(steps): trainer.take(store.all[i % len(store.all)])
    return torch.tensor([line["loss"] for line in trainer.history])


def known_exam(model, world, sizes, layer):
    "An exam on the world's questions, of whose settings none is abandoned."
    corpora = {side: world.text_sources(side)[0] for side in ("forget", "retain")}
    setup = UnlearningSetup(**corpora, dataset_size=sizes["texts"], seq_len=sizes["seq_len"], questions=world.question_sources(),
                            grid=GRID, reference=None, lowest_retain=0.0)
    Known.count = sizes["questions"]
    return Known(model, setup, layer)


def dictionary(d_in, d_sae, x):
    return SAE(SAEConfig(d_in, d_sae, "blocks.0.hook_out", 0, "any")).initialise(x.float().cpu(), 0)


def equal_results(bench):
    "The same training, stream and answers on the processor and on the device."
    for kind in ("relu", f"topk,k={TINY['k']}"):
        steps = bench.sizes["curve"]
        one, other = (curve(device, kind, steps) for device in (torch.device("cpu"), bench.device))
        worst = ((one - other).abs() / one.abs()).max().item()
        bench.note("equal results", f"loss of {steps} training steps, {kind}", f"differs by {worst:.1e} at most", f"{WANTED['curve']:.0e}",
                   worst <= WANTED["curve"])
    world, answers, streams = World.default(), [], []
    texts = [text for text, _ in world.texts("train", 40)]
    for device in ("cpu", str(bench.device)):
        model = boot(world.path/"model", device)
        ids = model.tokenizer(texts, return_tensors="pt", padding=True)["input_ids"][:, :48]
        streams.append(stream_at(model, ids.to(device), world.layer).float().cpu())
        exam = known_exam(model, world, TINY | dict(questions=20), world.layer)
        sae = dictionary(model.cfg.d_model, 384, streams[0].flatten(0, 1)).to(device)
        rows, _ = search(exam, sae, exam.setup, feature_stats(exam, sae))
        answers.append(torch.stack([r["right"] for r in rows["score"]]))
    far = ((streams[0] - streams[1]).norm() / streams[0].norm()).item()
    bench.note("equal results", "a layer's stream, float32", f"differs by {far:.1e} of its length", "1e-04", far <= 1e-4)
    same = (answers[0] == answers[1]).float().mean().item()
    bench.note("equal results", f"right or wrong, {answers[0].numel():,} answers of 16 settings", f"{same:.2%} the same", "99%", same >= 0.99)


# --- harvest ------------------------------------------------------------------------------------------------------------

def random_gemma(bench):
    "A model of Gemma-2-2b's shape that knows nothing, made on the device, with the world's tokenizer."
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    world, config = World.default().path/"model", AutoConfig.for_model("gemma2")
    for name, value in bench.sizes["model"].items(): setattr(config, name, value)
    config.layer_types = config.layer_types[:config.num_hidden_layers]
    config.architectures = ["Gemma2ForCausalLM"]
    torch.manual_seed(0)
    with bench.device:
        bare = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    model = TransformerBridge.boot_transformers(str(world), device=str(bench.device), dtype=torch.bfloat16, hf_model=bare,
                                                tokenizer=AutoTokenizer.from_pretrained(world))
    for p in model.parameters(): p.requires_grad_(False)
    return model.eval(), bare


def harvests(bench):
    "Tokens a second into a store on disk, beside the same blocks' forward pass alone."
    s, (model, bare) = bench.sizes, bench.gemma
    world, layer = World.default(), s["layer"]
    texts, ids = [text for text, _ in world.texts("train")], torch.randint(1, 1000, (s["rows"], s["seq_len"]), device=bench.device)
    texts *= -(-s["tokens"] // (15 * len(texts))) # enough of them
    blocks, norm = bare.model.layers, bare.model.norm
    def forward():
        with torch.no_grad(): return bare.model(ids, use_cache=False).last_hidden_state
    try:
        bare.model.layers, bare.model.norm = blocks[:layer + 1], torch.nn.Identity()
        bare.config.num_hidden_layers = layer + 1
        with FlopCounterMode(display=False) as operations: forward()
        times = max(2, s["tokens"] // ids.numel() // 4)
        alone, _ = bench.timed(lambda: [forward() for _ in range(times)])
    finally:
        bare.model.layers, bare.model.norm = blocks, norm
        bare.config.num_hidden_layers = len(blocks)
    bench.reading = times * operations.get_total_flops() / alone / bench.rate
    alone = times * ids.numel() / alone
    def kept(name, tokens):
        return harvest(model, texts, layer, bench.work/name, seq_len=s["seq_len"], max_tokens=tokens, batch=s["rows"], dtype="bfloat16")
    kept("warm", 4 * ids.numel())
    seconds, store = bench.timed(lambda: kept("store", s["tokens"]))
    count = sum(shard["rows"] for shard in store.shards) * s["seq_len"]
    share = count / seconds / alone
    bench.note("harvest", f"layers 0 to {layer} alone", f"{alone:,.0f} tokens/s")
    bench.note("harvest", f"{count:,} tokens into a store", f"{count / seconds:,.0f} tokens/s, {share:.0%} of these", f"{WANTED['harvest']:.0%}",
               share >= WANTED["harvest"])


# --- training -----------------------------------------------------------------------------------------------------------

def started(bench, x):
    "The weights that all begin with, and the stream's scale."
    sae = SAE(SAEConfig(bench.sizes["d_in"], bench.sizes["d_sae"])).initialise(x[:2**11], 0)
    return {name: p.detach().contiguous() for name, p in sae.named_parameters()}, sae.cfg.scale


def ours(bench, kind, batch, data, start, scale):
    "The median second of a step, and how good the dictionary has become."
    s = bench.sizes
    sae = SAE(SAEConfig(s["d_in"], s["d_sae"], architecture=f"topk,k={s['k']},aux=0" if kind == "topk" else "relu", scale=scale))
    with torch.no_grad():
        for name, p in sae.named_parameters(): p.copy_(start[name])
    sae.to(bench.device)
    store, steps = Ready(data["x"].to(bench.device), batch), s["steps"]
    order = torch.randint(len(store.all), (steps,), generator=torch.Generator().manual_seed(0)).tolist()
    trainer = Trainer(sae, store, cfg=TrainConfig(steps=steps + 1, batch=batch, warmup=min(20, steps // 5)))
    seconds = [bench.timed(lambda i=i: trainer.take(store.all[i]))[0] for i in order]
    loss = judge(dict(sae.named_parameters()), data["held"].to(bench.device), trainer.cfg.sparsity_penalty, s["k"] if kind == "topk" else None,
                 kind)["loss"]
    return statistics.median(seconds[s["uncounted"]:]), loss


def trainings(bench):
    "relu and topk at one size, beside other packages and the rate of products."
    s = bench.sizes
    data = made_up(s["d_in"], s["distinct"] * s["batches"][0], s["batches"][0], 0)
    start, scale = started(bench, data["x"])
    files = dict(data=bench.work/"data.safetensors", start=bench.work/"start.safetensors")
    if bench.theirs:
        write_tensors(files["data"], data)
        write_tensors(files["start"], start)
    held = training_held(s["d_in"], s["d_sae"], s["batches"][0])
    bench.note("training", f"estimated memory, {s['batches'][0]:,} tokens a step", as_size(held.all))
    for kind in ("relu", "topk"):
        for batch in s["batches"]:
            seconds, loss = ours(bench, kind, batch, data, start, scale)
            share = 10 * batch * s["d_in"] * s["d_sae"] / seconds / bench.rate
            if kind == "relu" and batch == s["batches"][0]: bench.step = seconds
            bench.note("training", f"{kind}, {s['d_in']:,} x {s['d_sae']:,}, {batch:,} tokens a step",
                       f"{1e3 * seconds:.2f} ms, {share:.0%} of the rate of products, loss {loss:.4f}",
                       f"{WANTED['rate']:.0%}" if kind == "relu" else "", share >= WANTED["rate"] if kind == "relu" else None)
            if bench.theirs and batch == s["batches"][0]: beside(bench, kind, batch, seconds, loss, files)
    if not bench.theirs:
        bench.note("training", "beside others", "neither SAELens nor dictionary_learning is installed here; --env names an environment")


def beside(bench, kind, batch, seconds, loss, files):
    "The same steps by the other packages, each in a process of its own."
    s = bench.sizes
    shape = dict(d_in=s["d_in"], d_sae=s["d_sae"], batch=batch, rounds=1, chunk=s["steps"])
    around = SimpleNamespace(device=bench.device.type, work=bench.work, threads=os.cpu_count(), theirs=bench.theirs, results=bench.work)
    asked = {name: dict(package=package, autocast=True, kind=kind)
             for name, package in {"SAELens, autocast": "saelens", "dictionary_learning, autocast": "dictionary_learning"}.items()}
    found, best = contest(around, shape, asked, files, s["uncounted"])["contestants"], []
    for name, f in found.items():
        if "failed" in f or not f["seconds"]:
            bench.note("training", f"{kind}, {batch:,} tokens a step, {name}", f.get("failed", "gave nothing")[:160])
            continue
        best.append(statistics.median(f["seconds"]))
        bench.note("training", f"{kind}, {batch:,} tokens a step, {name}", f"{1e3 * best[-1]:.2f} ms, loss {f['curve'][-1]['loss']:.4f}")
    if best:
        bench.note("training", f"{kind}, {batch:,} tokens a step, against the best of them", f"{min(best) / seconds:.2f} times as fast",
                   f"{WANTED['peers']:g}", min(best) / seconds >= WANTED["peers"])


# --- the exam -----------------------------------------------------------------------------------------------------------

def settings_of_the_exam(bench):
    "Sixteen settings on a model of Gemma-2-2b's shape; that it knows nothing costs no less."
    s, world = bench.sizes, World.default()
    model = bench.gemma[0]
    took, exam = bench.timed(lambda: known_exam(model, world, s, s["layer"]))
    x = torch.cat([stream.flatten(0, 1)[:2**10] for stream, _ in exam.corpus("retain")])[:2**11]
    sae = dictionary(model.cfg.d_model, s["d_sae"], x).to(bench.device)
    counted, stats = bench.timed(lambda: feature_stats(exam, sae))
    seconds, (rows, passes) = bench.timed(lambda: search(exam, sae, exam.setup, stats))
    bench.note("exam", f"{len(exam.answer)} questions read, once a model", f"{took:.1f} s")
    bench.note("exam", f"density of {s['d_sae']:,} features on both corpora", f"{counted:.1f} s")
    bench.note("exam", f"{len(rows['score'])} settings, {passes:,} tokens times blocks", f"{seconds:.1f} s", f"{WANTED['exam']} s", seconds <= WANTED["exam"])


# --- the plan -----------------------------------------------------------------------------------------------------------

def write_rate(bench) -> float:
    "Bytes a second that reach the disk where this machine keeps what is temporary."
    block, times = bytes(2**24), 2 if bench.sizes is TINY else 64
    began = time.perf_counter()
    with open(bench.work/"written", "wb", buffering=0) as f:
        for _ in range(times): f.write(block)
        os.fsync(f.fileno())
    return times * len(block) / (time.perf_counter() - began)


def plan(bench):
    "The stages of the preset gemma-2-2b, from the rates that the parts above have measured."
    if None in (bench.rate, bench.reading, bench.step): raise SaenbError("products, harvest and training were not all measured.")
    preset = find_preset("gemma-2-2b")
    costs = {name: model_cost(preset, name) for name in (preset.model, preset.answer_model)}
    disk = write_rate(bench)
    rates = Rates(device_name(bench.device), products=bench.rate, share=bench.reading, step=bench.step, disk=disk)
    bench.note("plan of gemma-2-2b", "rests on", f"{bench.reading:.2%} of the rate of products while reading, {1e3 * bench.step:.2f} ms a step at least, "
               f"{as_size(disk)} a second of disk")
    for stage in planned_stages(preset, costs, rates): bench.note("plan of gemma-2-2b", stage.name, f"{duration(stage.seconds)} ({stage.why})")


# --- the report ---------------------------------------------------------------------------------------------------------

def report(bench, seconds) -> str:
    "All rows as a page."
    tiny = "\nThe sizes are tiny and the figures tell nothing; this shows that everything runs.\n" * (bench.sizes is TINY)
    head = ["part", "what", "found", "wanted", "reached"]
    lines = [f"| {' | '.join(str(row[k]).replace('|', '/') for k in head)} |" for row in bench.rows]
    about = (f"{datetime.date.today()}, {device_name(bench.device)}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
             f"Python {platform.python_version()}, {os.cpu_count()} cores; {seconds:.0f} s in all.")
    return "\n".join(["# saenb on a GPU", "", about, tiny, f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines, "",
                      "`wanted` is what a GPU is to reach; `.venv/bin/python benchmarks/gpu.py` measures again.", ""])


PARTS = {"device": product_rate, "equal results": equal_results, "harvest": harvests, "training": trainings, "exam": settings_of_the_exam,
         "plan of gemma-2-2b": plan}


def peers(env) -> Path | None:
    "A Python that has the other packages: this one, or that of an environment."
    if importlib.util.find_spec("sae_lens") and importlib.util.find_spec("dictionary_learning"): return Path(sys.executable)
    there = Path(env)/"bin"/"python"
    return there if there.exists() else None


def main(given: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description="Measure saenb on a GPU, compare its results with the processor's, and report.")
    parser.add_argument("--device", help="auto, cuda, cuda:1, mps or cpu (default: the best there is)")
    parser.add_argument("--tiny", action="store_true", help="sizes that tell nothing, to see in seconds that everything runs")
    parser.add_argument("--minutes", type=float, default=8, help="begin no part after so many (default: 8)")
    parser.add_argument("--env", default=HERE/".reference", help="folder of an environment with the other packages")
    parser.add_argument("--out", default=HERE/"gpu.md", help="the report (default: gpu.md beside this file)")
    args = parser.parse_args(given)
    device = find_device(args.device)
    if device.type == "cpu" and not args.tiny:
        raise SaenbError("There is no GPU here; add --device cpu --tiny to see that everything runs.")
    began = time.perf_counter()
    with use_device(str(device)), tempfile.TemporaryDirectory(prefix="saenb-gpu-") as work:
        bench = Bench(device, TINY if args.tiny else FULL, args.minutes, work, None if args.tiny else peers(args.env))
        for name, make in PARTS.items():
            if name == "harvest": bench.gemma = random_gemma(bench)
            bench.part(name, make)
    write_text(args.out, report(bench, time.perf_counter() - began))
    return Path(args.out)


if __name__ == "__main__":
    try: print(f"The report is in {main()}.")
    except SaenbError as e: sys.exit(f"gpu: {e}")
