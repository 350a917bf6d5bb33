"""How fast is saenb beside SAELens, dictionary_learning, sparsify and SAEBench, at equal work and with equal results?

    .venv/bin/python benchmarks/bench.py

measures in turn, on this machine, what benchmarks/README.md describes, keeps every figure in benchmarks/results/*.json, goes on where it was stopped, and makes
benchmarks/report.md and its pictures from those files alone (`--report` does only that). Let the machine do nothing else meanwhile."""
import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from saenb.lab.analyses import step_cost
from saenb.base.errors import SaenbError, lookup, check_range
from saenb.base.files import file_digest, need_room, read_json, write_json, write_tensors
from saenb.data.harvest import token_rows
from saenb.data.store import FORMAT, Batch
from saenb.ideas.run import Run
from saenb.ideas.run import all_runs
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import TrainConfig
from saenb.train.mechanism import Mechanism
from saenb.data.world import World

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE)) # however this file is run
from report import PARTS, write_report

PACKAGES = ("torch", "sae-lens", "dictionary-learning", "eai-sparsify", "sae-bench", "transformer-lens", "transformers", "numpy")

# everybody's settings; a contestant's own options come on top
PLAN = dict(
    training=dict(batch=2048, distinct=48, held=2048, uncounted=3, shapes=[dict(d_in=2304, d_sae=2304, rounds=10, chunk=10, own_starts=True),
                                                                           dict(d_in=2304, d_sae=16384, rounds=6, chunk=5, own_starts=False)]),
    growth=dict(distinct=4, held=512, uncounted=2, shapes=[dict(d_in=2304, d_sae=d_sae, batch=batch, rounds=3, chunk=4) for d_sae, batch in
                                                           ((2304, 2048), (4608, 2048), (9216, 2048), (16384, 2048), (2304, 512), (2304, 1024), (2304, 4096))]),
    architectures=dict(batch=2048, distinct=8, held=1024, uncounted=2, shape=dict(d_in=2304, d_sae=16384, rounds=4, chunk=2)),
    harvest=dict(seq_len=128, rows=32, repeats=5, models=dict(world=dict(tokens=2**18, times=16), random=dict(hidden=768, layers=8, layer=4, tokens=2**14, times=2))),
    store=dict(d_in=2304, tokens=2**19, shard=2**13, pool_bytes=2**28, batch=2048, epochs=2),
    evals=dict(source="parity"),
    steps=dict(d_in=2304, d_sae=2304, batch=2048, steps=20, repeats=2, runs=list(all_runs())))

QUICK = dict(
    training=dict(batch=128, distinct=4, held=128, uncounted=1, shapes=[dict(d_in=64, d_sae=128, rounds=2, chunk=4, own_starts=False)]),
    growth=dict(distinct=2, held=128, uncounted=1, shapes=[dict(d_in=64, d_sae=d_sae, batch=batch, rounds=1, chunk=3) for d_sae, batch in ((64, 128), (128, 128), (64, 256))]),
    architectures=dict(batch=128, distinct=4, held=128, uncounted=1, shape=dict(d_in=64, d_sae=128, rounds=2, chunk=4)),
    harvest=dict(seq_len=128, rows=8, repeats=1, models=dict(world=dict(tokens=2**11, times=1))),
    store=dict(d_in=64, tokens=2**13, shard=2**11, pool_bytes=2**18, batch=128, epochs=2),
    evals=dict(source="tests"),
    steps=dict(d_in=32, d_sae=64, batch=128, steps=2, repeats=1, runs=["orthogonality/1", "positional/1"]))

OURS = dict(saenb=dict(package="saenb", precision="auto"), **{"saenb, float32": dict(package="saenb", precision="float32")})
THEIRS = {
    "SAELens": dict(package="saelens"),
    "SAELens, autocast": dict(package="saelens", autocast=True),
    "SAELens, autocast, compiled": dict(package="saelens", autocast=True, compile=True),
    "dictionary_learning": dict(package="dictionary_learning"),
    "dictionary_learning, autocast": dict(package="dictionary_learning", autocast=True), # its autocast does nothing on a CPU, so it is left out there
    "sparsify": dict(package="sparsify", own_start=True)}
OWN_STARTS = {"SAELens, its own start": dict(package="saelens", own_start=True), "dictionary_learning, its own start": dict(package="dictionary_learning", own_start=True)}
PRODUCTS = {f"five products, {precision}": dict(package="products", precision=precision) for precision in ("float32", "bfloat16")}
# no package calls a feature dead within so few steps but saenb, which counts by the training's length: AuxK is off, and measured where both have saenb's rule
OTHERS = {name: THEIRS[name] for name in ("SAELens, autocast", "dictionary_learning")} | {"sparsify": dict(package="sparsify")} | {
    "saenb, AuxK": OURS["saenb"] | dict(aux=1 / 32), "sparsify, AuxK": dict(package="sparsify", aux=1 / 32)}
BESIDE = ( # who takes turns with saenb, by kind of dictionary; as few at a time as memory holds
    ("topk", "SAELens, autocast", "dictionary_learning"), ("topk", "sparsify", "saenb, AuxK"), ("batchtopk", "SAELens, autocast"), ("jumprelu", "SAELens, autocast"),
    ("topk", "sparsify, AuxK"), ("batchtopk", "dictionary_learning"), ("jumprelu", "dictionary_learning"))
ON_A_GPU = ("training", "growth", "architectures")
GROWING = ("saenb", "SAELens", "SAELens, autocast", "dictionary_learning")


def say(text: str): print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Worker:
    "One contestant in a process of its own, asked one thing at a time."
    def __init__(self, name: str, job: dict, bench: "Bench"):
        ours = job["package"] in ("saenb", "products") or job.get("ours")
        env = os.environ | dict(OMP_NUM_THREADS=str(bench.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONWARNINGS="ignore", TQDM_DISABLE="1")
        if bench.device == "cpu": env["SPARSIFY_DISABLE_TRITON"] = "1" # which works on GPUs only, and is there wherever torch was built for them
        if not ours:
            for key in ("PYTHONPATH", "PYTHONHOME"): env.pop(key, None)
        self.name, self.log = name, bench.results/"logs"/f"{''.join(c if c.isalnum() else '_' for c in name)}.txt"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen([sys.executable if ours else bench.theirs, HERE/("ours.py" if ours else "peers.py")], cwd=bench.work, env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"))
        self._send(job)

    def _send(self, what: dict):
        try: print(json.dumps(what), file=self.process.stdin, flush=True)
        except BrokenPipeError: pass

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if line: return json.loads(line)
        last = (self.log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise SaenbError(f"{self.name} stopped with '{last[:200]}'; all that it printed is in {self.log}.")

    def ask(self, do: str, **what) -> dict:
        self._send(dict(do=do, **what))
        return self.answer()

    def close(self):
        self.process.stdin.close()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill()
        self.process.stdout.close()


class Bench:
    "What all parts need: where results go, the two environments, and how much of the machine each side may use."
    def __init__(self, args, work: Path):
        self.out, self.work, self.threads, self.device, self.plan = Path(args.out), work, args.threads, args.device, QUICK if args.quick else PLAN
        self.results = self.out/"results"/("cuda" if args.device == "cuda" else "")
        self.theirs = None if args.alone else peers(args.env)
        self.machine = machine(self.device, self.threads, self.theirs)

    def part(self, name: str) -> "Results": return Results(self.results/f"{name}.json", self.plan[name], self.machine)


class Results:
    "One part's figures on disk, kept as soon as they are there."
    def __init__(self, path: Path, settings: dict, machine: dict):
        self.path, self.kept = path, json.loads(json.dumps(dict(settings=settings, machine=machine, items={})))
        if not path.exists(): return
        found = read_json(path, "file of results")
        for what in ("settings", "machine"):
            if found.get(what) != self.kept[what]:
                raise SaenbError(f"{path} was measured with other {'settings' if what == 'settings' else 'software or on another machine'}; delete it, or name another "
                                 "folder with --out.")
        self.kept = found

    def measure(self, key: str, make):
        "What is kept under this name, or what `make` finds."
        if key in self.kept["items"]: return
        say(f"{self.path.stem}: {key}")
        others, began = busy(), time.perf_counter()
        found = make()
        self.kept["items"][key] = dict(date=time.strftime("%Y-%m-%d"), others=others, minutes=round((time.perf_counter() - began) / 60, 2), **found)
        write_json(self.path, self.kept, indent=1)


def busy(seconds: float = 0.5) -> float | None:
    "The share of the processor that other programs use, looked at while this one waits."
    def look():
        fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
        return sum(fields), fields[3] + fields[4]
    try: total, idle = look()
    except OSError: return None
    time.sleep(seconds)
    after, rest = look()
    return round(1 - (rest - idle) / max(1, after - total), 3)


def machine(device: str, threads: int, theirs: Path | None) -> dict:
    "Everything about this machine and its software that figures depend on."
    try: cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    ask = f"import json, platform, importlib.metadata as m; v = lambda p: m.version(p) if p in found else None; found = {{d.name for d in m.distributions()}}; " \
          f"print(json.dumps({{p: v(p) for p in {PACKAGES!r} if v(p)}} | dict(python=platform.python_version())))"
    versions = json.loads(subprocess.run([theirs, "-c", ask], capture_output=True, text=True, check=True).stdout) if theirs else {}
    ours = {p: importlib.metadata.version(p) for p in ("saenb", "torch", "transformer-lens", "transformers", "numpy")} | dict(python=platform.python_version())
    return dict(cpu=cpu, cores=os.cpu_count(), memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9), system=platform.system(),
                device=torch.cuda.get_device_name() if device == "cuda" else "cpu", threads=threads, bfloat16=native_bfloat16(device), ours=ours, theirs=versions)


def native_bfloat16(device: str) -> bool:
    "Whether this machine multiplies bfloat16 by itself."
    if device == "cuda": return torch.cuda.is_bf16_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peers(env: str) -> Path:
    "The Python of the other packages' environment; benchmarks/parity.py makes it if it is not there."
    from parity import environment
    return environment(Path(env).absolute())


# --- training -------------------------------------------------------------------------------------------------------------------------------------------------

def made_up(d_in: int, tokens: int, held: int, seed: int) -> dict:
    "A stream in which there is something to find: sparse sums of twice as many directions as it is wide, some frequent and most rare, on a mean, with noise; centred it is one long."
    draw = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(2 * d_in, d_in, generator=draw), dim=1)
    often, active, parts = torch.arange(1, 2 * d_in + 1).float()**-0.7, 48, []
    for n in torch.arange(tokens + held).split(2**13):
        which = torch.multinomial(often, len(n) * active, replacement=True, generator=draw).view(-1, active)
        much = 0.5 + torch.empty(which.shape).exponential_(generator=draw)
        parts.append(torch.nn.functional.embedding_bag(which, directions, per_sample_weights=much, mode="sum") + 0.02 * torch.randn(len(n), d_in, generator=draw))
    x = torch.cat(parts)
    x /= (x - x.mean(0)).pow(2).sum(1).mean().sqrt()
    return dict(x=x[:tokens], held=x[tokens:])


def beginning(x: torch.Tensor, d_sae: int, seed: int) -> dict:
    "The weights that all begin with: saenb's own way of beginning."
    sae = SAE(SAEConfig(d_in=x.shape[1], d_sae=d_sae)).initialise(x[:2**13], seed)
    return {name: p.detach().contiguous() for name, p in sae.named_parameters()}


def groups(names: list[str], shape: dict, anchor: str, device: str, memory_gb: float) -> list[list[str]]:
    "Contestants that fit into memory side by side; the anchor is in every group, so that ratios are always of one and the same run."
    if device == "cuda": return [[anchor, name] for name in names if name != anchor]
    each = 6e8 + 40 * (shape["d_in"] + shape["batch"]) * shape["d_sae"] # weights, gradients and Adam's two, and what a step makes, with room to spare
    count, rest = max(2, int(0.75e9 * memory_gb / each)), [name for name in names if name != anchor]
    return [[anchor, *rest[i:i + count - 1]] for i in range(0, len(rest), count - 1)] or [[anchor]]


def contest(bench: Bench, shape: dict, contestants: dict, files: dict, uncounted: int, judged: bool = True) -> dict:
    "All take steps in turn; what each took and how good its dictionary was after each round."
    total = shape["rounds"] * shape["chunk"]
    cfg = TrainConfig(steps=total + 1) # one more than is taken, so that the last step's end is seen
    common = dict(d_in=shape["d_in"], d_sae=shape["d_sae"], batch=shape["batch"], steps=cfg.steps, lr=cfg.lr, l1=cfg.sparsity_penalty, seed=0, warmup=max(1, min(20, total // 5)),
                  decay=max(1, round(total * cfg.decay)), k=max(1, min(32, shape["d_sae"] // 4)), device=bench.device, data=str(files["data"]), aux=0.0, target=64)
    workers, found = {}, {}
    try:
        for name, own in contestants.items():
            found[name] = dict(package=own["package"], uncounted=[], seconds=[], processor=[], curve=[])
            dead = dict(dead=max(1, min(500, cfg.steps // 4))) if own.get("aux") else {}
            workers[name] = Worker(name, common | own | dead | dict(start="" if own.get("own_start") else str(files["start"])), bench)
        def each(do, **what):
            for name in list(workers):
                try: yield name, workers[name].ask(do, **what) if do else workers[name].answer()
                except SaenbError as e:
                    found[name]["failed"] = str(e)
                    workers.pop(name).close()
                    say(str(e))
        for name, _ in each(None): pass
        for number in range(shape["rounds"]):
            for name, answer in each("steps", n=shape["chunk"]):
                skip = uncounted if number == 0 else 0
                found[name]["uncounted"] += answer["seconds"][:skip]
                found[name]["seconds"] += answer["seconds"][skip:]
                found[name]["processor"] += answer["processor"][skip:]
            if not judged and number < shape["rounds"] - 1: continue
            for name, answer in each("judge"):
                found[name]["peak"] = answer.pop("peak")
                if found[name]["package"] != "products": found[name]["curve"].append(dict(step=(number + 1) * shape["chunk"], **answer))
    finally:
        for worker in workers.values(): worker.close()
    return dict(shape=shape, common={k: v for k, v in common.items() if k not in ("data", "start")}, contestants=found)


def trainings(bench: Bench, part: str, choose, judged: bool):
    "A contest for every shape of a part."
    results, plan = bench.part(part), bench.plan[part]
    for shape in plan["shapes"]:
        shape = dict(batch=plan.get("batch")) | shape
        names = choose(shape)
        label = f"{shape['d_in']} x {shape['d_sae']}, batch {shape['batch']}"
        together = groups(list(names), shape, "saenb", bench.device, bench.machine["memory_gb"])
        files = dict(data=bench.work/"data.safetensors", start=bench.work/"start.safetensors")
        if all(f"{label}, group {i + 1}" in results.kept["items"] for i in range(len(together))): continue
        torch.manual_seed(0)
        tokens = plan["distinct"] * shape["batch"]
        need_room(bench.work, 4 * shape["d_in"] * (tokens + plan["held"] + 2 * shape["d_sae"]), "The batches that all train on")
        data = made_up(shape["d_in"], tokens, plan["held"], 0)
        write_tensors(files["data"], data)
        write_tensors(files["start"], beginning(data["x"], shape["d_sae"], 0))
        del data
        for i, group in enumerate(together):
            results.measure(f"{label}, group {i + 1}", lambda: contest(bench, shape, {name: names[name] for name in group}, files, plan["uncounted"], judged))


def architectures(bench: Bench):
    "The same for dictionaries of other kinds, some contestants at a time, saenb among them."
    results, plan = bench.part("architectures"), bench.plan["architectures"]
    shape, files = dict(batch=plan["batch"]) | plan["shape"], dict(data=bench.work/"data.safetensors", start=bench.work/"start.safetensors")
    for kind, *names in BESIDE:
        names = ["saenb", *(name for name in names if bench.theirs or OTHERS[name]["package"] == "saenb")]
        key = f"{kind}: {'; '.join(names)}"
        if key in results.kept["items"]: continue
        if not files["data"].exists():
            data = made_up(shape["d_in"], plan["distinct"] * shape["batch"], plan["held"], 0)
            write_tensors(files["data"], data)
            write_tensors(files["start"], beginning(data["x"], shape["d_sae"], 0))
            del data
        chosen = {name: (OURS | OTHERS)[name] | dict(kind=kind) for name in names}
        results.measure(key, lambda: dict(kind=kind, **contest(bench, shape, chosen, files, plan["uncounted"], judged=False)))


def theirs_on(bench: Bench) -> dict:
    "The other packages' contestants that this device has."
    if not bench.theirs: return {}
    return {name: own for name, own in THEIRS.items() if bench.device == "cuda" or own["package"] == "saelens" or not own.get("autocast")}


def training(bench: Bench):
    "Seconds a step, the loss that they buy, and the most memory held."
    trainings(bench, "training", lambda shape: OURS | theirs_on(bench) | PRODUCTS | (OWN_STARTS if shape["own_starts"] and bench.theirs else {}), judged=True)


def growth(bench: Bench):
    "How the cost of a step grows with features and batch."
    trainings(bench, "growth", lambda shape: {name: own for name, own in (OURS | theirs_on(bench)).items() if name in GROWING}, judged=False)


# --- harvest ----------------------------------------------------------------------------------------------------------------------------------------------------

def random_gemma(folder: Path, hidden: int, layers: int) -> Path:
    "A Gemma-2 of moderate width that knows nothing, with the world's tokenizer."
    from transformers import AutoConfig, Gemma2ForCausalLM
    world = World.default().path/"model"
    cfg = AutoConfig.from_pretrained(world)
    for name, value in dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 96, num_key_value_heads=hidden // 192, head_dim=96, query_pre_attn_scalar=96,
                            intermediate_size=4 * hidden, initializer_range=0.02, layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(layers)]).items():
        setattr(cfg, name, value)
    torch.manual_seed(0)
    Gemma2ForCausalLM(cfg).save_pretrained(folder)
    for file in world.glob("*"):
        if "token" in file.name or "chat" in file.name: shutil.copy(file, folder)
    return folder


def harvests(bench: Bench):
    "Tokens a second into a store, through SAELens' ActivationsStore, and through the bare layers."
    results, plan, world = bench.part("harvest"), bench.plan["harvest"], World.default()
    def one(name, setting):
        own = name == "world"
        model, layer = (world.path/"model", world.layer) if own else (random_gemma(bench.work/"random", setting["hidden"], setting["layers"]), setting["layer"])
        texts = [text for text, _ in world.texts("train")]
        (bench.work/"texts.json").write_text(json.dumps(texts))
        tokenizer = world.model().tokenizer
        rows = [row for row, _ in zip((row for row, _ in token_rows(texts, tokenizer, plan["seq_len"])), range(plan["rows"]))]
        sides = {"saenb": dict(package="harvest", ours=True)} | ({"SAELens": dict(package="harvest")} if bench.theirs else {})
        workers = {side: Worker(f"harvest by {side}", job, bench) for side, job in sides.items()}
        found = {}
        def note(key, answer): found.setdefault(key, []).append(answer)
        try:
            for worker in workers.values():
                worker.answer()
                worker.ask("prepare", model=str(model), texts=str(bench.work/"texts.json"), layer=layer, seq_len=plan["seq_len"], rows=plan["rows"])
            for number in range(plan["repeats"] + 1): # the first time is not counted
                count = note if number else lambda *_: None
                forward = dict(rows=rows, times=setting["times"])
                count("transformers' own layers", workers["saenb"].ask("forward", bare=True, **forward))
                count("saenb's harvest", workers["saenb"].ask("harvest", tokens=setting["tokens"], out=str(bench.work/"harvested")))
                count("saenb's model, forward alone", workers["saenb"].ask("forward", **forward))
                if "SAELens" in workers:
                    count("SAELens' CacheActivationsRunner", workers["SAELens"].ask("cache", tokens=setting["tokens"], out=str(bench.work/"cached")))
                    count("SAELens' ActivationsStore", workers["SAELens"].ask("harvest", tokens=setting["tokens"]))
                    count("SAELens' model, forward alone", workers["SAELens"].ask("forward", **forward))
        finally:
            for worker in workers.values(): worker.close()
        return dict(model=dict(layer=layer, **{k: v for k, v in setting.items() if k in ("hidden", "layers")}), timed=found)
    for name, setting in plan["models"].items(): results.measure(name, lambda: one(name, setting))


# --- store --------------------------------------------------------------------------------------------------------------------------------------------------------

def made_up_store(folder: Path, d_in: int, tokens: int, shard: int) -> Path:
    "A store on disk, as a harvest leaves it, of a stream that means nothing."
    need_room(folder.parent, tokens * d_in * 4, "The store to read from")
    draw, shards = torch.Generator().manual_seed(0), []
    for i, at in enumerate(range(0, tokens, shard)):
        name, place = f"shard_{i:05}.safetensors", torch.arange(at, at + shard)
        write_tensors(folder/name, dict(x=torch.randn(shard, d_in, generator=draw), position=(place % 128).short(), side=(place % 3).to(torch.int8), token=place.int(), sequence=(place // 128).int()))
        shards.append(dict(file=name, rows=shard // 128, tokens=shard, sides=torch.bincount(place % 3, minlength=3).tolist(), sha256=file_digest(folder/name)))
    write_json(folder/"store.json", dict(format=FORMAT, model="none", layer=0, d_in=d_in, seq_len=128, dtype="float32", max_tokens=tokens, texts={}, shards=shards, finished=True))
    return folder


def forget_files(folder: Path) -> bool:
    "Ask the system to drop what it remembers of these files, so that they come from the disk; true where that can be asked."
    if not hasattr(os, "posix_fadvise"): return False
    os.sync()
    for file in folder.iterdir():
        with open(file, "rb") as f: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def store(bench: Bench):
    "Shuffled batches from a store that is many times as large as what is held of it in memory."
    results, plan = bench.part("store"), bench.plan["store"]
    def one():
        folder = made_up_store(bench.work/"store", plan["d_in"], plan["tokens"], plan["shard"])
        cold, worker = forget_files(folder), Worker("reading a store", dict(package="harvest", ours=True), bench)
        try:
            worker.answer()
            answer = worker.ask("read", store=str(folder), batch=plan["batch"], pool_bytes=plan["pool_bytes"], batches=plan["epochs"] * (plan["tokens"] // plan["batch"]))
        finally:
            worker.close()
            shutil.rmtree(folder)
        return dict(bytes=plan["tokens"] * plan["d_in"] * 4, cold=cold, **answer)
    results.measure("read", one)


# --- evaluations and step costs -------------------------------------------------------------------------------------------------------------------------------------

def evals(bench: Bench):
    "Unlearning and sparse probing beside SAEBench: benchmarks/parity.py measures, and its file is kept here."
    results = bench.part("evals")
    def one():
        if bench.plan["evals"]["source"] == "tests" or not bench.theirs: return dict(source="tests/parity.json", found=read_json(HERE.parent/"tests"/"parity.json", "file of agreed figures"))
        out = bench.work/"parity.json"
        done = subprocess.run([sys.executable, HERE/"parity.py", "--env", bench.theirs.parent.parent, "--threads", str(bench.threads), "--out", out])
        if not out.exists(): raise SaenbError("benchmarks/parity.py did not finish; run it by itself to see why.")
        return dict(source="measured here", equal=done.returncode == 0, found=read_json(out, "file of agreed figures"))
    results.measure("parity", one)


class Stream:
    "Batches of a made-up stream; as much of a store as training needs."
    path = "made up"

    def __init__(self, d_in: int, batch: int, batches: int = 16):
        self.d_in, place = d_in, torch.arange(batch)
        self.kept = [Batch(x, place % 128, place % 2 + 1, torch.zeros_like(place), place // 128) for x in made_up(d_in, batches * batch, 0, 0)["x"].split(batch)]

    def check_batch(self, size, balanced): pass
    def batches(self, size, seed): return iter(self.kept)


class AsWritten(Mechanism):
    "A gate that changes nothing; but since it does not say so, all products are dense and gradients autograd's."
    def gate(self, x, f, positions): return f


def steps(bench: Bench):
    "What every run's step costs as a multiple of the baseline's."
    runs = {id: all_runs()[id] for id in bench.plan["steps"]["runs"] if not id.endswith("/0")}
    runs |= {"baseline": Run("orthogonality/dense", "Baseline, all products dense", "", ((AsWritten.__name__, {}),))}
    torch.set_num_threads(bench.threads)
    results, plan, stream = bench.part("steps"), bench.plan["steps"], None
    for id, run in runs.items():
        if id in results.kept["items"]: continue
        stream = stream or Stream(plan["d_in"], plan["batch"])
        results.measure(id, lambda: dict(title=run.title, ratios=step_cost([run], stream, plan["d_sae"], plan["batch"], plan["steps"], plan["repeats"])[run.id]))


def main(args):
    makers = dict(training=training, harvest=harvests, store=store, evals=evals, steps=steps, growth=growth,
                  architectures=architectures)
    chosen = {name: lookup(name, makers, "part") for name in args.parts.split(",")}
    check_range("threads", args.threads, 1)
    if args.device == "cuda":
        if not torch.cuda.is_available(): raise SaenbError("torch sees no GPU here; leave --device out, or install a torch that was built for it.")
        chosen = {name: chosen[name] for name in chosen if name in ON_A_GPU} # the other parts do not use it
        if not chosen: raise SaenbError("Only the parts training, growth and architectures use a GPU; leave --device out for the others.")
    if not args.report:
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory(prefix="saenb-bench-", dir=args.work) as work:
            bench = Bench(args, Path(work))
            for make in chosen.values(): make(bench)
    print(f"The report is in {write_report(Path(args.out), args.device)}.")


def arguments(given: list[str] | None = None):
    "What was asked for."
    parser = argparse.ArgumentParser(description="Measure saenb beside SAELens, dictionary_learning, sparsify and SAEBench, and report.")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure, by comma")
    parser.add_argument("--quick", action="store_true", help="sizes that tell nothing, to see in seconds that everything runs")
    parser.add_argument("--report", action="store_true", help="measure nothing, make the report from the results that are there")
    parser.add_argument("--alone", action="store_true", help="measure saenb alone, without the other packages' environment")
    parser.add_argument("--env", default=HERE/".reference", help="folder of an environment with the other packages; made if it is not there")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads that everybody computes with")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where training is measured")
    parser.add_argument("--out", help="folder for results, report and pictures; this one, and for --quick one of its own")
    parser.add_argument("--work", help="folder for what is needed meanwhile, some 6 GB; the system's own for temporary files")
    args = parser.parse_args(given)
    args.out = args.out or (HERE/".quick" if args.quick else HERE)
    return args


if __name__ == "__main__":
    try: main(arguments())
    except SaenbError as e: sys.exit(f"bench: {e}")
