"""benchmarks/report.md and its pictures, made from benchmarks/results/*.json and from nothing else."""
from pathlib import Path
from statistics import median, quantiles

from matplotlib.figure import Figure

from saenb.lab.analyses import YOUNG
from saenb.base.errors import SaenbError
from saenb.base.files import read_json, write_text
from saenb.report.plots import keep

PARTS = ("training", "architectures", "harvest", "store", "evals", "steps", "growth")
OUR_HARVEST, THEIR_HARVESTS = "saenb's harvest", ("SAELens' CacheActivationsRunner", "SAELens' ActivationsStore")
QUIET = 0.1 # share of the processor that others may use before the report warns
COLOURS = dict(saenb="tab:blue", saelens="tab:orange", dictionary_learning="tab:green", sparsify="tab:red", products="0.6")

INTRO = """# {title}

{made}`make bench` measures; this page and its pictures are made from the figures in `{results}` alone, by `benchmarks/bench.py --report`.
Every contestant is a process of its own with the same number of threads; they take turns within one run (saenb's steps, theirs, saenb's again), the first steps are not
counted, and what is given are medians with the middle half of all measurements. A ratio above 1 means that saenb is faster.
"""

TRAINING = """All train on the same made-up activations, which lie in memory: sparse sums of twice as many directions as the stream is wide, centred on a mean, with a little noise, scaled so
that a centred activation is one long. At that scale the packages' objectives are one and the same, squared error plus {l1} times the activations' L1 norm, and it is measured for
everybody by one function of ours, in float32, on {held} activations that nobody trained on. All begin with the same weights (those that saenb begins with), see the same batches of {batch:,} in the
same order, take {steps} steps with Adam as their package makes it, at a learning rate of {lr} that rises over {warmup} steps and falls to zero over the last {decay}. These are saenb's defaults, chosen for no
package in particular; the others' own may suit them better, and "its own start" is what their own beginning makes of these. Each runs in its package's own loop, unchanged (saenb's `Trainer.fit`, SAELens' `SAETrainer.fit`, dictionary_learning's `trainSAE`, sparsify's `Trainer.fit`); only the batches come from us.

"Share of the limit" is the time of a step's five dense matrix products alone, in the precision that the contestant computes in, over the time of its step: 100% would be a step that
does nothing else, and more is possible only where zeros are left out of the products. saenb chooses its precision by itself (here {auto}). Where a package's cost depends on
how many features are active, it changes while they learn: "first, last" are the medians of the first and the last quarter of all steps, and the number of active features is that at the end.
"""

DIFFERENCES = """What a step does that others' steps do not:

- **saenb** needs five products, not six, since of the gradient at the encoder's input only the sum over the batch is used; on a CPU it leaves out of four of them what multiplies zeros as soon as
  few enough features are active for that to pay, so its speed depends on the data and on how far training has come, which the columns "first, last" and "active features" show. It removes from the decoder's gradient what points along the rows,
  gives the rows length one, counts on how many tokens each feature is active and how long ago that was, and notes every term of the loss. Adam is torch's fused one. Freed memory stays in the process.
- **SAELens** computes six products, clips the gradient's norm, and counts active tokens and dead features like saenb. Its decoder rows may have any length; their lengths weigh the L1 term.
  `autocast` and `compile_sae` are options of its runner, off unless asked for; what compiling takes is not counted.
- **dictionary_learning** computes six products, removes the parallel gradient and gives rows length one. It counts no dead features unless it is to resample them. Its autocast works on GPUs only.
- **sparsify** trains another kind of dictionary: of each token's features the {k} largest are kept (TopK), so its products are mostly sparse and its loss has no L1 term. **Compare its cost, not its loss**;
  of what it reaches only the error of reconstruction is shown. It begins as it always does. Its loop sits around a model; here that is a stand-in whose one layer hands out the batch, of which sparsify makes a copy.
"""


ARCHITECTURES = """The same data, start, order and schedule as above, {steps} steps at {d_in:,} x {d_sae:,} with batches of {batch:,}; {k} features a token for TopK and BatchTopK. Ratios are those of processor time, which
says the same as the clock where nothing else runs, and more where something does. "Loss" is measured for everybody by one function on {held} activations that nobody trained on: the error, and for JumpReLU {charge} for each
active feature; of BatchTopK's it keeps the strongest of 512 tokens at a time, since within so few steps no package's running threshold has settled. So early the loss still falls with every step, so one that is a little higher costs
a step or two more. AuxK is off where nothing else is said, since no other package calls a feature dead within so few steps; where it is on, dead is what saenb calls so for all.

dictionary_learning's JumpReLU aims at a number of active features ({target} here) by a squared penalty, so of it **compare the cost, not the loss**; its decoder's bias begins at a median of the first batch for TopK and
BatchTopK. sparsify centres on the first batch, and its learning rate falls from the first step on. SAELens' `use_sparse_activations` does not train on a CPU.
"""


def spread(values: list[float]) -> tuple[float, float, float]:
    "Lower quartile, median and upper quartile."
    if len(values) < 2: return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, median(values), high


def ratio(theirs: list[float], ours: list[float]) -> float:
    "How many times as long they take."
    return median(theirs) / median(ours)


def show(value) -> str:
    "A figure as a person reads it: three digits."
    if value is None: return ""
    if isinstance(value, str): return value
    if isinstance(value, int) or abs(value) >= 1000: return f"{value:,.0f}"
    return f"{value:.3g}"


def table(rows: list[dict]) -> str:
    "Rows as a Markdown table."
    heads = list(rows[0])
    return "\n".join([f"| {' | '.join(heads)} |", f"|{'|'.join('---' if i == 0 else '---:' for i in range(len(heads)))}|",
                      *(f"| {' | '.join(show(row.get(h)) for h in heads)} |" for row in rows)]) + "\n"


def shapes_of(kept: dict) -> list[dict]:
    "A contest a shape, what was measured in several groups put together, each contestant with its ratio to saenb in its own group."
    shapes = {}
    for item in kept["items"].values():
        shape = item["shape"]
        whole = shapes.setdefault((shape["d_in"], shape["d_sae"], shape["batch"]), dict(shape=shape, common=item["common"], contestants={}))
        anchor = item["contestants"]["saenb"].get("seconds")
        for name, c in item["contestants"].items():
            mine = whole["contestants"].setdefault(name, dict(c, seconds=[]))
            mine["seconds"] = mine["seconds"] + c.get("seconds", [])
            if c.get("seconds") and anchor: mine["ratio"] = ratio(c["seconds"], anchor)
    return list(shapes.values())


def limit_of(name: str, contest: dict, bfloat16: bool) -> float | None:
    "Seconds of the five products in the precision that a contestant computes in."
    fast = "autocast" in name or (name == "saenb" and bfloat16 and contest["shape"]["d_in"] * contest["shape"]["d_sae"] >= 2**20)
    found = contest["contestants"].get(f"five products, {'bfloat16' if fast else 'float32'}", {}).get("seconds")
    return median(found) if found else None


def training(kept: dict, out: Path, tag: str) -> str:
    contests, auto = shapes_of(kept), kept["machine"]["bfloat16"]
    common = contests[0]["common"]
    text = [TRAINING.format(**common | dict(held=f"{kept['settings']['held']:,}", steps=" or ".join(str(c["common"]["steps"] - 1) for c in contests),
                                            warmup=" or ".join(str(c["common"]["warmup"]) for c in contests), decay=" or ".join(str(c["common"]["decay"]) for c in contests)),
                            auto="bfloat16 products with float32 sums where they are large enough to pay for it" if auto else "float32")]
    for contest in contests:
        shape, rows = contest["shape"], []
        flops = 10 * shape["batch"] * shape["d_in"] * shape["d_sae"]
        for name, c in contest["contestants"].items():
            if not c["seconds"]: continue
            low, mid, high = spread(c["seconds"])
            quarter = max(1, len(c["seconds"]) // 4)
            ends = median(c["seconds"][:quarter]), median(c["seconds"][-quarter:])
            limit, last = limit_of(name, contest, auto), (c["curve"] or [{}])[-1]
            own = c["package"] == "products"
            rows.append({f"{shape['d_in']:,} x {shape['d_sae']:,}": name, "seconds a step": mid, "middle half": f"{show(low)} to {show(high)}", "first, last": f"{show(ends[0])}, {show(ends[1])}", "activations a second": round(shape["batch"] / mid),
                         "times saenb's": c["ratio"], "share of the limit": f"{flops / mid / 1e9:,.0f} GFLOP/s" if own else f"{limit / mid:.0%}" if limit else None,
                         "loss": None if c["package"] == "sparsify" else last.get("loss"), "reconstruction": last.get("reconstruction"), "active features": last.get("l0"),
                         "peak memory, MB": round(c["peak"]) if c.get("peak") and not own else None})
        text.append(table(rows))
        failed = [c["failed"] for c in contest["contestants"].values() if c.get("failed")]
        if failed: text.append("Not measured to the end: " + " ".join(failed) + "\n")
    held = 4e-6 * kept["settings"]["distinct"] * common["batch"] * common["d_in"]
    text.append(f"Peak memory is {'what torch held on the GPU' if tag else f'that of the whole process, the {held:,.0f} MB of batches in it (in as far as they were read)'}.\n")
    text.append(f"![Held-out loss]({tag}loss.png)\n\n![Seconds a step]({tag}training.png)\n")
    keep(loss_curves(contests), out/f"{tag}loss.png")
    keep(step_bars(contests), out/f"{tag}training.png")
    return "\n".join([*text, DIFFERENCES.format(k=common["k"])])


def architectures(kept: dict, out: Path, tag: str) -> str:
    kinds, plan = {}, kept["settings"]
    for item in kept["items"].values(): kinds.setdefault(item["kind"], []).append(item)
    common = next(iter(kept["items"].values()))["common"]
    text = [ARCHITECTURES.format(**common | dict(steps=common["steps"] - 1, held=f"{plan['held']:,}", charge=f"{0.1 * common['l1']:.3g}"))]
    for kind, items in kinds.items():
        rows, beside = [], {}
        clock = "seconds" if tag else "processor" # which on a GPU says nothing
        for item in items:
            anchor = item["contestants"]["saenb"]
            for name, c in item["contestants"].items():
                if not c["seconds"] or (name == "saenb" and rows): continue
                low, mid, high = spread(c[clock])
                last = (c["curve"] or [{}])[-1]
                times = ratio(c[clock], anchor[clock])
                if c["package"] != "saenb" and "AuxK" not in name: beside[name] = times
                rows.append({kind: name, "seconds a step": median(c["seconds"]), "of processor time": mid, "middle half": f"{show(low)} to {show(high)}", "times saenb's": times, "loss": last.get("loss"),
                             "reconstruction": last.get("reconstruction"), "active features": last.get("l0"), "peak memory, MB": round(c["peak"]) if c.get("peak") else None})
        text.append(table(rows))
        if beside:
            best = min(beside, key=beside.get)
            text.append(f"The fastest of the others is {best}, whose step takes {beside[best]:.2g} times as long as saenb's in the same run.\n")
        failed = [c["failed"] for item in items for c in item["contestants"].values() if c.get("failed")]
        if failed: text.append("Not measured to the end: " + " ".join(failed) + "\n")
    return "\n".join(text)


def loss_curves(contests: list[dict]) -> Figure:
    "The held-out loss over steps and over seconds of training."
    fig = Figure(figsize=(10, 3.4 * len(contests)), layout="constrained")
    for (by_step, by_time), contest in zip(fig.subplots(len(contests), 2, squeeze=False), contests):
        for name, c in contest["contestants"].items():
            if not c["curve"] or not c["seconds"] or c["package"] == "sparsify": continue
            style = dict(label=name, color=COLOURS[c["package"]], ls={0: "-", 1: "--", 2: ":"}[min(2, name.count(","))], marker="." if "start" in name else None)
            loss, steps = [p["loss"] for p in c["curve"]], [p["step"] for p in c["curve"]]
            by_step.plot(steps, loss, **style)
            by_time.plot([s * median(c["seconds"]) for s in steps], loss, **style)
        shape = contest["shape"]
        by_step.set(xlabel="steps", ylabel="loss on held-out activations", yscale="log", title=f"{shape['d_in']:,} x {shape['d_sae']:,}")
        by_time.set(xlabel="seconds of training", yscale="log")
        by_step.legend(fontsize=7)
    return fig


def step_bars(contests: list[dict]) -> Figure:
    "Seconds a step, with the middle half as a line."
    fig = Figure(figsize=(10, 0.9 + 0.32 * max(len(c["contestants"]) for c in contests)), layout="constrained")
    for ax, contest in zip(fig.subplots(1, len(contests), squeeze=False)[0], contests):
        bars = [(name, c) for name, c in contest["contestants"].items() if c["seconds"] and "start" not in name][::-1]
        for i, (name, c) in enumerate(bars):
            low, mid, high = spread(c["seconds"])
            ax.barh(i, mid, color=COLOURS[c["package"]])
            ax.plot([low, high], [i, i], color="black", lw=1)
        ax.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        ax.set(xlabel="seconds a step", title=f"{contest['shape']['d_in']:,} x {contest['shape']['d_sae']:,}")
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def harvest(kept: dict, out: Path, tag: str) -> str:
    plan = kept["settings"]
    text = [f"The same texts go through the same layers of the same model, in rows of {plan['seq_len']} tokens, {plan['rows']} rows at a time; {plan['repeats']} times in turn. The limit is transformers' own "
            "layers on tokens that lie ready. saenb's `harvest` tokenizes, runs the model, checks that all numbers are finite, writes shards with their checksums to disk, and opens the finished store. "
            "SAELens' `CacheActivationsRunner` is the counterpart: it tokenizes, runs the model, and writes a data set of activations and tokens in shards of the same size, not shuffled and without checksums. Its "
            "`ActivationsStore` keeps activations in memory only, so it does less, and runs the model again in the next training; mixing is left out. Making the data set or opening the model is not timed on either side.\n"]
    for name, item in kept["items"].items():
        limit, rows = [t["seconds"] / t["tokens"] for t in item["timed"]["transformers' own layers"]], []
        for way, times in item["timed"].items():
            each = [t["seconds"] / t["tokens"] for t in times]
            low, mid, high = spread(each)
            rows.append({f"{name} model": way, "tokens a second": round(1 / mid), "middle half": f"{1 / high:,.0f} to {1 / low:,.0f}", "share of the limit": f"{median(limit) / mid:.0%}"})
        about = item["model"]
        text += [(f"A random Gemma-2 of width {about['hidden']} with {about['layers']} layers, read at layer {about['layer']}:" if "hidden" in about else
                  f"The embedded world's model, read at layer {about['layer']}:") + "\n", table(rows)]
        norms = {side: times[0]["norm"] for side, times in item["timed"].items() if "norm" in times[0]}
        if len(norms) > 2: text.append(f"All three ways to compute the stream give the same one: its norm differs by {max(norms.values()) / min(norms.values()) - 1:.0e} at most.\n")
        per = lambda way: [t["seconds"] / t["tokens"] for t in item["timed"][way]]
        beside = [f"{way} {show(ratio(per(way), per(OUR_HARVEST)))} times" for way in THEIR_HARVESTS if way in item["timed"]]
        if beside: text.append(f"Time for a token as a multiple of saenb's harvest: {', '.join(beside)}.\n")
    return "\n".join(text)


def store(kept: dict, out: Path, tag: str) -> str:
    plan, item = kept["settings"], kept["items"]["read"]
    per_epoch, rows = len(item["seconds"]) // plan["epochs"], []
    for epoch in range(plan["epochs"]):
        took = item["seconds"][epoch * per_epoch:(epoch + 1) * per_epoch]
        rows.append({"epoch": str(epoch + 1), "activations a second": round(len(took) * plan["batch"] / sum(took)), "MB a second": round(len(took) * plan["batch"] * plan["d_in"] * 4e-6 / sum(took)),
                     "longest wait for a batch, seconds": max(took)})
    text = [f"A store of {item['bytes'] / 1e9:.2f} GB ({plan['tokens']:,} activations of {plan['d_in']:,} in float32) is read in shuffled batches of {plan['batch']:,}, of which no more than {plan['pool_bytes'] / 1e6:,.0f} MB "
            f"are held at a time. {'The system was asked to forget the files first, so' if item['cold'] else 'The files may still have been in memory, though'} the first epoch comes from the disk, and checks every shard's checksum.\n",
            table(rows), f"The process had {item['own']:,.0f} MB of its own at the end, Python and torch included.\n" if item.get("own") else ""]
    path = out/"results"/"training.json"
    if path.exists():
        for contest in shapes_of(read_json(path, "file of results")):
            if contest["shape"]["d_in"] == plan["d_in"]:
                eats = contest["shape"]["batch"] / median(contest["contestants"]["saenb"]["seconds"])
                text.append(f"Training {contest['shape']['d_sae']:,} features takes {eats:,.0f} activations a second: reading is {rows[0]['activations a second'] / eats:.1f} times as fast in the first epoch, "
                            f"{rows[-1]['activations a second'] / eats:.1f} times in the last.\n")
    return "\n".join(text)


def evals(kept: dict, out: Path, tag: str) -> str:
    item = kept["items"]["parity"]
    found, rows = item["found"], []
    for title, part in (("unlearning", "unlearning"), ("sparse probing", "sparse_probing")):
        for name, d in found.get(part, {}).get("dictionaries", {}).items():
            s = d["seconds"]
            same = ("all" if d["equal"] else "NOT ALL") if part == "unlearning" else f"{d['equal']:,} of {d['compared']:,}"
            rows.append({"judged": f"{title}: {name}", "SAEBench, seconds": s["theirs wall"], "saenb, seconds": s["ours wall"], "times saenb's": s["theirs wall"] / s["ours wall"],
                         "of processor time": s["theirs cpu"] / s["ours cpu"], "equal answers": same, "largest difference": d.get("largest_difference", 0)})
    once = found.get("unlearning", {}).get("seconds_known")
    text = [f"`benchmarks/parity.py` lets SAEBench {found['versions']['theirs']['sae-bench']} and saenb judge the same dictionaries on the embedded world, in turn, with {found['threads']} thread(s) each"
            + (", and its figures are kept with the others." if item["source"] == "measured here" else f". **These times were not measured in this run**: they come from `{item['source']}`.")
            + " For unlearning an answer is each known question under each of SAEBench's 16 settings; for sparse probing it is each accuracy of each class.\n", table(rows)]
    if once: text.append(f"Finding the questions that the model knows is done once a model: SAEBench took {once['theirs wall']:,.1f} s, saenb {once['ours wall']:,.1f} s ({once['theirs wall'] / once['ours wall']:.1f} times), its "
                         "reading of both corpora included.\n")
    return "\n".join(text)


def steps(kept: dict, out: Path, tag: str) -> str:
    plan, items = kept["settings"], kept["items"]
    rows = [{"run": id, "title": item["title"], "times the baseline's": median(item["ratios"]), "least": min(item["ratios"]), "most": max(item["ratios"])} for id, item in items.items()]
    fig = Figure(figsize=(8, 0.8 + 0.24 * len(rows)), layout="constrained")
    ax = fig.subplots()
    for i, row in enumerate(rows[::-1]):
        ax.barh(i, row["times the baseline's"], color="tab:blue")
        ax.plot([row["least"], row["most"]], [i, i], color="black", lw=1)
    ax.set_yticks(range(len(rows)), [f"{row['run']} {row['title']}" for row in rows[::-1]], fontsize=7)
    ax.axvline(1, color="0.5", lw=1)
    ax.set(xlabel="step cost, as a multiple of the baseline's")
    ax.spines[["top", "right"]].set_visible(False)
    keep(fig, out/"steps.png")
    return (f"What a training step of every run costs as a multiple of its baseline's, in turn in one process: {plan['d_sae']:,} features on a stream of {plan['d_in']:,}, batches of {plan['batch']:,}. "
            f"Both are trained for {YOUNG} steps and then measured, over as many steps as the run's rarest part takes to come round, {plan['repeats']} times; the baseline's steps are those of the first table, which leave out "
            f"what is silent. Nothing outside saenb is compared here.\n\n" + table(rows) + "\n![Step costs](steps.png)\n")


def growth(kept: dict, out: Path, tag: str) -> str:
    contests = shapes_of(kept)
    first = contests[0]["shape"]
    rows = [{"features": c["shape"]["d_sae"], "batch": c["shape"]["batch"], **{name: median(own["seconds"]) for name, own in c["contestants"].items() if own["seconds"]}} for c in contests]
    names = list(dict.fromkeys(name for c in contests for name in c["contestants"]))
    fig = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, key, other in zip(fig.subplots(1, 2), ("d_sae", "batch"), ("batch", "d_sae")):
        for name in names:
            points = sorted((c["shape"][key], median(c["contestants"][name]["seconds"])) for c in contests
                            if c["shape"][other] == first[other] and c["contestants"].get(name, {}).get("seconds"))
            package = next(c["contestants"][name]["package"] for c in contests if name in c["contestants"])
            if points: ax.plot(*zip(*points), marker="o", ms=3, label=name, color=COLOURS[package], ls="--" if "," in name else "-")
        ticks = sorted({c["shape"][key] for c in contests if c["shape"][other] == first[other]})
        ax.set(xscale="log", yscale="log", xlabel=dict(d_sae="features", batch="batch")[key], ylabel="seconds a step", title=f"{dict(d_sae='features', batch='batches')[other]} of {first[other]:,}" if other == "batch" else f"{first[other]:,} features")
        ax.set_xticks(ticks, [f"{t:,}" for t in ticks], fontsize=8)
        ax.set_xticks([], minor=True)
    fig.axes[0].legend(fontsize=8)
    keep(fig, out/f"{tag}growth.png")
    return f"Seconds a step (medians) on a stream of {first['d_in']:,}, measured as above but over fewer steps.\n\n" + table([{h: row.get(h) for h in ("features", "batch", *names)} for row in rows]) + f"\n![Growth]({tag}growth.png)\n"


TITLES = dict(training="Training", architectures="Training other architectures", harvest="Harvesting", store="Reading a store larger than memory", evals="Evaluations", steps="What every run's step costs", growth="How cost grows")
SECTIONS = dict(training=training, architectures=architectures, harvest=harvest, store=store, evals=evals, steps=steps, growth=growth)


def about(found: dict[str, dict]) -> str:
    "The machine and the versions, once for all parts that share them, and a warning where it was not idle."
    text = []
    for machine in {str(k["machine"]): k["machine"] for k in found.values()}.values():
        parts = [name for name, k in found.items() if k["machine"] == machine]
        dates = sorted({item["date"] for name in parts for item in found[name]["items"].values()})
        versions = lambda side: ", ".join(f"{package} {version}" for package, version in side.items())
        text.append(f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} on {machine['device'] if machine['device'] != 'cpu' else machine['cpu']} ({machine['cores']} cores, {machine['memory_gb']} GB, "
                    f"{machine['threads']} thread(s) each; {', '.join(parts)}). saenb's side: {versions(machine['ours'])}. " + (f"The others': {versions(machine['theirs'])}." if machine["theirs"] else "**saenb alone was measured.**"))
    loud = [name for name, k in found.items() if max((item["others"] or 0 for item in k["items"].values()), default=0) > QUIET]
    if loud: text.append(f"**Other programs were using more than {QUIET:.0%} of the processor when some of {', '.join(loud)} was measured: do not rely on these figures.**")
    return "\n\n".join(text)


def write_report(out: Path, device: str = "cpu") -> Path:
    "The report of what has been measured, and of what has not."
    tag, title = ("gpu_", "Benchmarks on a GPU") if device == "cuda" else ("", "Benchmarks")
    results, found, body = out/"results"/("cuda" if device == "cuda" else ""), {}, []
    for part in ("training", "architectures", "growth") if device == "cuda" else PARTS:
        path = results/f"{part}.json"
        kept = read_json(path, "file of results") if path.exists() else None
        if not kept or not kept.get("items"):
            body.append(f"## {TITLES[part]}\n\nNot measured yet. On a machine that does nothing else: `make bench ARGS=\"--parts {part}{' --device cuda' * (device == 'cuda')}\"`\n")
            continue
        try: body.append(f"## {TITLES[part]}\n\n{SECTIONS[part](kept, out, tag)}")
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, ZeroDivisionError, StopIteration) as e:
            raise SaenbError(f"{path} does not hold what a report needs ({type(e).__name__}: {e}); delete it and measure that part again.") from None
        found[part] = kept
    made = about(found) + "\n\n" if found else ""
    report = out/("report_gpu.md" if device == "cuda" else "report.md")
    write_text(report, "\n".join([INTRO.format(title=title, made=made, results="results/cuda/" if device == "cuda" else "results/"), *body]))
    return report
