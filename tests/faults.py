"""What can break, stage by stage, and what is left then. `.venv/bin/python tests/faults.py` prints the fault table; test_faults.py asserts every line of it."""
import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD, STEPS = "tiny/orthogonality/run_0/seed_0", 20
STAGES = ("harvest", "train", "evaluate", "report")


@dataclass
class Said:
    """What a command answered."""
    code: int
    out: str
    err: str

    def well(self):
        assert self.code == 0, self.err or self.out
        return self

    def sentence(self, *words):
        """It said one sentence with these words, without a traceback, and ended with code 2."""
        assert self.code == 2 and "Traceback" not in self.err, self.err
        self.last = self.err.strip().splitlines()[-1]
        assert self.last.startswith("saenb: ") and self.last.endswith(".") and self.last.count(". ") == 0, self.last
        for word in words: assert str(word) in self.last, (word, self.last)
        return self


class Lab:
    """A small world, a finished record of it, and ways to call the command line."""
    def __init__(self, world, made, folder, processes):
        self.world, self.made, self.folder, self.processes, self.count = str(world), Path(made), Path(folder), processes, 0

    def new(self) -> Path:
        self.count += 1
        path = self.folder/f"lab_{self.count}"
        path.mkdir()
        return path

    def out(self, *parts, at=None) -> Path:
        """A folder of records with some of: store, cache (both links), record, controls."""
        out = at or self.new()
        (out/"tiny").mkdir()
        for part in parts:
            if part == "record": shutil.copytree(self.made/RECORD, out/RECORD)
            elif part == "controls": (out/"tiny"/part).mkdir(), shutil.copy(ROOT/"runs"/"tiny-full"/"controls"/"seed_0.json", out/"tiny"/part)
            else: (out/"tiny"/part).symlink_to((self.made/"tiny"/part).resolve())
        return out

    def run(self, out, steps=STEPS): return "run", "orthogonality/0", "--preset", self.world, "--steps", str(steps), "--out", str(out)

    def call(self, *arguments) -> Said:
        """The command line, in a process of its own or, which is quicker, in this one."""
        if self.processes: return self.end(self.start(*arguments))
        from saenb.cli import main
        from saenb.base.errors import warn_once
        warn_once.cache_clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = main([*map(str, arguments)])
            except SystemExit as e: code = e.code
        return Said(code, out.getvalue(), err.getvalue())

    def start(self, *arguments, code=None):
        """The command line, or some code, as a process that can be killed; what it says goes to a file, which never keeps it waiting."""
        said = open(self.new()/"said.txt", "w+")
        process = subprocess.Popen([sys.executable, *(("-c", code) if code else ("-m", "saenb")), *map(str, arguments)], cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=said,
                                   env={**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"})
        process.said = Path(said.name)
        return process

    def end(self, process) -> Said:
        out = process.communicate(timeout=300)[0]
        return Said(process.returncode, out, process.said.read_text())

    def until(self, process, moment):
        """Wait for a moment in a process' life."""
        ends = time.time() + 200
        while not moment():
            assert process.poll() is None, f"it ended before that: {process.said.read_text()}"
            assert time.time() < ends, "that moment never came"
            time.sleep(0.002)

    def kill(self, process, moment):
        self.until(process, moment)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL


@contextlib.contextmanager
def disk(lab, options):
    """A small file system of its own."""
    folder = lab.new()
    if os.geteuid() != 0: raise unittest.SkipTest("only root can mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True).returncode: raise unittest.SkipTest("mounting is not allowed here")
    try: yield folder
    finally: subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def readonly(lab, folder):
    """The same folder in a place where nothing can be written, not even by root."""
    place = lab.new()
    if os.geteuid() != 0: raise unittest.SkipTest("only root can mount a folder read-only")
    if subprocess.run(["mount", "--bind", folder, place], capture_output=True).returncode: raise unittest.SkipTest("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        yield place
    finally: subprocess.run(["umount", place], check=True)


def fill(folder):
    """Somebody else takes all the room that is left."""
    with open(folder/"other", "wb", buffering=0) as f:
        for size in (2**16, 2**12, 1):
            try:
                while True: f.write(b"0" * size)
            except OSError as e: assert e.errno == errno.ENOSPC


def litter(out): return [p for p in Path(out).rglob(".*") if p.suffix in (".part", ".lock") or p.name == ".lock"]
def same(a, b, *names): return all((a/name).read_bytes() == (b/name).read_bytes() for name in names)
def stamps(*paths): return [p.stat().st_mtime_ns for p in paths]
def lines(path): return path.read_text().count("\n") if path.exists() else 0
def journal(out): return json.loads(p.read_text()) if (p := out/"tiny"/"store"/"store.json").exists() else dict(shards=[], finished=False)


FAULTS = []


def fault(name, stage, cause):
    """Enter a fault in the table: the function does it, checks what must be left, and tells what was left and said."""
    def enter(f):
        f.fault, f.stage, f.cause = name, stage, cause
        FAULTS.append(f)
        return f
    return enter


# ---------------------------------------------------------------------------------------------------- killed

@fault("kill -9, and a second process", "harvest", "the first is killed after a shard, while the second waits for it")
def killed_in_harvest(lab):
    out = lab.out("cache")
    first = lab.start(*lab.run(out))
    lab.until(first, (out/"tiny"/"store"/".lock").exists)
    second = lab.start(*lab.run(out))
    lab.until(second, lambda: "Another process is at work" in second.said.read_text())
    lab.kill(first, lambda: journal(out)["shards"])
    said = lab.end(second).well()
    assert journal(out) == journal(lab.made) and same(out/RECORD, lab.made/RECORD, "sae/sae_weights.safetensors", "train_log.jsonl") and not litter(out)
    waits = [line for line in said.err.splitlines() if "Another process" in line]
    assert len(waits) == 1, waits
    return "the second goes on with the first one's shards and ends with the same bytes", waits[0]


BY_STEP = "import sys; from saenb.lab import run; run('orthogonality/0', sys.argv[1], out=sys.argv[2], steps=60, change=dict(checkpoint_every=20, log_every=5), progress=False)"

def by_step(lab, out):
    """The same, to the end."""
    if lab.processes: assert lab.end(lab.start(lab.world, out, code=BY_STEP)).code == 0
    else:
        from saenb.lab.runner import run
        run("orthogonality/0", lab.world, out=out, steps=60, change=dict(checkpoint_every=20, log_every=5), progress=False)


@fault("kill -9", "train", "ten steps after a checkpoint")
def killed_in_training(lab):
    outs = [lab.out("store", "cache") for _ in range(2)]
    place = "tiny/orthogonality/run_0@checkpoint_every=20,log_every=5/seed_0"
    begun, log = lab.start(lab.world, outs[0], code=BY_STEP), outs[0]/place/"train_log.jsonl"
    lab.kill(begun, lambda: lines(log) >= 6)
    assert (outs[0]/place/"checkpoint.safetensors").exists() and not (outs[0]/place/"sae").exists()
    log.write_bytes(log.read_bytes()[:-200]) # more is lost of the log than a kill loses
    for out in outs: by_step(lab, out)
    assert same(outs[0]/place, outs[1]/place, "sae/sae_weights.safetensors", "train_log.jsonl") and not litter(outs[0])
    return "it goes on from the checkpoint and ends with the bytes of an unbroken training, log included", ""


@fault("kill -9", "evaluate", "after the first of three evaluations")
def killed_in_evaluation(lab):
    out = lab.out("store", "cache", "record")
    record = out/RECORD
    for name in ("evals", "final_info.json", "notes.md"): (shutil.rmtree if name == "evals" else os.remove)(record/name)
    lab.kill(lab.start(*lab.run(out)), (record/"evals"/"unlearning.json").exists)
    assert not (record/"final_info.json").exists()
    (record/"evals"/".unlearning.lock").touch() # what a kill between a result and its lock's end leaves
    kept = record/"sae"/"sae_weights.safetensors", record/"evals"/"unlearning.json"
    before, first = stamps(*kept), kept[1].read_text()
    said = lab.call(*lab.run(out)).well()
    assert stamps(*kept) == before, f"{said.err}\n{first[:600]}\n{kept[1].read_text()[:600]}"
    assert (record/"final_info.json").exists() and not litter(out)
    return "the dictionary and the first result are kept, the others are made", ""


@fault("kill -9", "report", "after the first figure")
def killed_in_report(lab):
    out, figures = lab.out("record", "controls"), lab.new()/"figures"
    lab.kill(lab.start("figures", "--out", out, "--figures", figures), lambda: list(figures.rglob("*.png")))
    assert all(p.read_bytes().endswith(b"IEND\xaeB`\x82") for p in figures.rglob("*.png"))
    drawn = [Path(p) for p in json.loads(lab.call("figures", "--out", out, "--figures", figures, "--json").well().out)]
    assert sorted(drawn) == sorted(p for p in figures.rglob("*") if p.is_file())
    return "every figure is whole; the same command draws them all", ""


# ---------------------------------------------------------------------------------------------------- a full disk

@fault("full disk", "harvest", "a disk of 3 MB")
def full_in_harvest(lab):
    with disk(lab, "size=3m") as out:
        lab.out("cache", at=out)
        said = lab.call(*lab.run(out)).sentence(out, "The next shard", " MB and the disk")
        assert not list(out.rglob("*.safetensors")) and not litter(out)
    return "nothing is begun", said.last


@fault("full disk", "train", "somebody else takes the room that is left while steps are made")
def full_in_training(lab):
    with disk(lab, "size=11m") as out:
        lab.out("store", "cache", at=out)
        begun = lab.start(*lab.run(out, 100))
        lab.until(begun, lambda: lines(out/RECORD/"train_log.jsonl"))
        fill(out)
        said = lab.end(begun).sentence(out, "is full")
        assert all(line.endswith("}") for line in (out/RECORD/"train_log.jsonl").read_text().splitlines()) and not list(out.rglob("*.part"))
        (out/"other").unlink()
        lab.call(*lab.run(out, 100)).well()
        assert lines(out/RECORD/"train_log.jsonl") == 5
    return "what was logged is whole; with room, the same command makes the record", said.last


@fault("full disk", "evaluate", "no room for results beside a dictionary")
def full_in_evaluation(lab):
    with disk(lab, "size=4m") as out:
        lab.out("store", "cache", "record", at=out)
        for name in ("evals", "final_info.json"): (shutil.rmtree if name == "evals" else os.remove)(out/RECORD/name)
        (out/RECORD/"evals").mkdir()
        fill(out)
        kept, before = out/RECORD/"sae"/"sae_weights.safetensors", (out/RECORD/"sae"/"sae_weights.safetensors").read_bytes()
        said = lab.call(*lab.run(out)).sentence(out, "is full")
        assert kept.read_bytes() == before and not list(out.rglob("*.part")) and not (out/RECORD/"final_info.json").exists()
        (out/"other").unlink()
        lab.call(*lab.run(out)).well()
        assert kept.read_bytes() == before
    return "the dictionary is kept, no result is half there; with room, the same command ends the record", said.last


@fault("full disk", "report", "no room for figures, where one of them stands already")
def full_in_report(lab):
    out = lab.out("record", "controls")
    with disk(lab, "size=64k") as figures:
        (figures/"orthogonality").mkdir()
        (figures/"orthogonality"/"unlearning_scores.png").write_bytes(b"older")
        fill(figures)
        said = lab.call("figures", "--out", out, "--figures", figures).sentence(figures, "is full")
        assert (figures/"orthogonality"/"unlearning_scores.png").read_bytes() == b"older" and not litter(figures)
    return "the older figure stands", said.last


# ---------------------------------------------------------------------------------------------------- read-only

@fault("read-only folder", "harvest", "the folder of records cannot be written to")
def readonly_in_harvest(lab):
    with disk(lab, "ro,size=1m") as out: return "nothing is begun", lab.call(*lab.run(out)).sentence(out, "cannot be written").last


@fault("read-only folder", "train", "a record that is to be trained; then one that is finished")
def readonly_in_training(lab):
    out = lab.out("store", "cache", "record")
    with readonly(lab, out) as place:
        found = lab.call(*lab.run(place)).well() # what is finished needs no lock
        (out/RECORD/"final_info.json").unlink()
        said = lab.call(*lab.run(place)).sentence(place, "cannot be written")
    assert "score" in found.out and not litter(out)
    return "a finished record is read, without a lock; another is not begun", said.last


@fault("read-only folder", "evaluate", "a dictionary that is to be judged; then one that has been")
def readonly_in_evaluation(lab):
    out = lab.out("store", "cache", "record")
    with readonly(lab, out) as place:
        command = ("eval", place/RECORD, "--preset", lab.world, "--out", place, "--json", "--evals")
        found = lab.call(*command, "unlearning").well()
        said = lab.call(*command, "separation").sentence(place, "cannot be written")
    assert json.loads(found.out)["unlearning"] == json.loads((out/RECORD/"evals"/"unlearning.json").read_text())
    return "results that are there are read; another is not begun", said.last


@fault("read-only folder", "report", "the folder of figures cannot be written to")
def readonly_in_report(lab):
    out, figures = lab.out("record", "controls"), lab.new()
    (figures/"orthogonality").mkdir()
    with readonly(lab, figures) as place: return "nothing is written", lab.call("figures", "--out", out, "--figures", place).sentence(place, "cannot be written").last


# ---------------------------------------------------------------------------------------------------- two processes

@fault("two processes", "train", "the same record, begun by both")
def two_in_training(lab):
    out = lab.out("store", "cache")
    both = [lab.start(*lab.run(out, 60)) for _ in range(2)]
    ends = [lab.end(p).well() for p in both]
    waits = [line for e in ends for line in e.err.splitlines() if "Another process" in line]
    assert len(waits) == 1 and ends[0].out == ends[1].out and lines(out/RECORD/"train_log.jsonl") == 3 and not litter(out)
    return "one makes it, the other waits and finds it", waits[0]


@fault("two processes", "report", "the same figures, drawn by both")
def two_in_report(lab):
    out, figures = lab.out("record", "controls"), [lab.new() for _ in range(2)]
    lab.call("figures", "--out", out, "--figures", figures[0]).well()
    both = [lab.start("figures", "--out", out, "--figures", figures[1]) for _ in range(2)]
    for p in both: lab.end(p).well()
    drawn = [{p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} for folder in figures]
    assert drawn[0] == drawn[1] and len(drawn[0]) >= 3
    return "each figure is whole, and as one alone draws it", ""


# ---------------------------------------------------------------------------------------------------- files cut off or altered

def own(lab, out, part):
    """A copy of a linked folder, of which a file can be spoiled; its large files stay links."""
    path = out/"tiny"/part
    source = path.resolve()
    path.unlink()
    return Path(shutil.copytree(source, path, copy_function=lambda a, b: (os.symlink if Path(a).suffix == ".safetensors" else shutil.copyfile)(a, b)))


def cut(path):
    """Leave half of a file."""
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:len(data) // 2])
    return path


def flip(path, at=-3):
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.unlink()
    path.write_bytes(data)
    return path


def begun(lab, out, spoil):
    """A training stopped between its last checkpoint and its end, of which a file is spoiled."""
    from saenb.lab.runner import plan_record, _train
    plan = plan_record("orthogonality/0", lab.world, 0, out, STEPS)
    from saenb.base.files import write_json
    write_json(plan.record.path/"config.json", plan.config)
    _train(plan, out, False)
    shutil.rmtree(plan.record.path/"sae")
    return spoil(plan.record.path)


@fault("cut off", "harvest", "store.json")
def cut_journal(lab):
    out = lab.out("store", "cache")
    path = cut(own(lab, out, "store")/"store.json")
    return "nothing is harvested over it", lab.call(*lab.run(out)).sentence(path, "restore it, or delete the folder and harvest again").last


@fault("altered", "harvest", "one byte of a shard")
def altered_shard(lab):
    out = lab.out("store", "cache")
    path = flip(own(lab, out, "store")/"shard_00001.safetensors")
    said = lab.call(*lab.run(out)).sentence(path, "checksum differs", "harvest again")
    assert not (out/RECORD/"sae").exists()
    return "no dictionary is trained on it", said.last


@fault("cut off", "harvest", "a shard")
def cut_shard(lab):
    out = lab.out("store", "cache")
    path = cut(own(lab, out, "store")/"shard_00000.safetensors")
    return "no dictionary is trained on it", lab.call(*lab.run(out)).sentence(path, "checksum differs", "harvest again").last


@fault("cut off", "harvest", "texts of the world, its model")
def cut_world(lab):
    for name in ("texts/train_retain.jsonl.gz", "model/model.safetensors", "model/tokenizer.json", "world.json"):
        world, out = shutil.copytree(lab.world, lab.new()/"tiny"), lab.out("cache")
        cut(world/name)
        said = lab.call("run", "orthogonality/0", "--preset", world, "--steps", STEPS, "--out", out).sentence(world)
        assert not (out/"tiny"/"store"/"store.json").exists() or not journal(out)["finished"]
    return "no store is finished", said.last


@fault("altered", "train", "one byte of a checkpoint")
def altered_checkpoint(lab):
    out = lab.out("store", "cache")
    path = begun(lab, out, lambda record: flip(record/"checkpoint.safetensors"))
    said = lab.call(*lab.run(out)).sentence(path, "checksum differs", "restore it, or delete it and training starts over")
    assert path.exists() and lines(out/RECORD/"train_log.jsonl") == 1
    return "training does not silently start over", said.last


@fault("cut off", "train", "the training's log, where there is a checkpoint")
def cut_log(lab):
    out = lab.out("store", "cache")
    begun(lab, out, lambda record: cut(record/"train_log.jsonl"))
    lab.call(*lab.run(out)).well()
    assert same(out/RECORD, lab.made/RECORD, "train_log.jsonl", "sae/sae_weights.safetensors")
    return "it is restored from the checkpoint", ""


@fault("cut off", "train", "config.json, the weights, cfg.json of a record that is under way")
def cut_record(lab):
    for name in ("config.json", "sae/sae_weights.safetensors", "sae/cfg.json", "timing.json"):
        out = lab.out("store", "cache", "record")
        (out/RECORD/"final_info.json").unlink()
        path = cut(out/RECORD/name)
        said = lab.call(*lab.run(out)).sentence(path, "restore it")
    return "nothing is trained over it", said.last


@fault("altered", "train", "one byte of the weights")
def altered_weights(lab):
    out = lab.out("store", "cache", "record")
    path = flip(out/RECORD/"sae"/"sae_weights.safetensors")
    return "it is not judged", lab.call("eval", out/RECORD, "--preset", lab.world, "--out", out).sentence(path, "checksum differs").last


@fault("cut off", "evaluate", "a result")
def cut_result(lab):
    out = lab.out("store", "cache", "record")
    path = cut(out/RECORD/"evals"/"unlearning.json")
    said = lab.call("eval", out/RECORD, "--preset", lab.world, "--out", out, "--evals", "unlearning").well()
    assert f"{path} is not a readable unlearning result" in said.err and "made again" in said.err
    def found(record): return {k: v for k, v in json.loads((record/"evals"/"unlearning.json").read_text())["eval_result_unstructured"].items() if k != "work"}
    assert found(out/RECORD) == found(lab.made/RECORD)
    return "it is made again, and is the same", said.err.strip().splitlines()[-1]


@fault("cut off", "evaluate", "the list of known questions")
def cut_known(lab):
    out = lab.out("store", "cache", "record")
    paths = [cut(path) for path in own(lab, out, "cache").glob("known_*.json")] # other worlds' lists may lie there too
    said = lab.call("eval", out/RECORD, "--preset", lab.world, "--out", out, "--evals", "unlearning", "--force").well()
    told = [path for path in paths if f"{path} is not a readable list of known questions" in said.err]
    assert len(told) == 1 and told[0].read_bytes() == (lab.made/"tiny"/"cache"/told[0].name).read_bytes()
    return "they are asked again", next(line for line in said.err.splitlines() if "is not a readable list" in line)


@fault("cut off", "report", "each file that figures, run logs and comparisons read")
def cut_records(lab):
    for name in ("config.json", "final_info.json", "train_log.jsonl", "evals/unlearning.json", "evals/core.json", "evals/entanglement.json"):
        out = lab.out("record")
        path = cut(out/RECORD/name)
        command = ("compare", out) if name in ("final_info.json", "evals/core.json") else ("figures", "--out", out, "--figures", lab.new())
        said = lab.call(*command).sentence(path, "restore it")
    return "nothing is drawn from it", said.last


@fault("cut off", "report", "controls and analyses")
def cut_analyses(lab):
    for name in ("controls/seed_0.json", "orthogonality/step_cost.json", "orthogonality/pairs_between_seeds.json"):
        out = lab.out("record", "controls")
        for kept in (ROOT/"runs"/"tiny-full"/"orthogonality").glob("*.json"): shutil.copy(kept, out/"tiny"/"orthogonality")
        path = cut(out/"tiny"/name)
        said = lab.call("figures", "--out", out, "--figures", lab.new()).sentence(path, "restore it or make it again")
    return "nothing is drawn from it", said.last


# ---------------------------------------------------------------------------------------------------- the table

def prepared(folder):
    """A small world and a finished record, where there is no pytest to make them."""
    sys.path.insert(0, str(Path(__file__).parent))
    from conftest import small_world
    from saenb.lab.runner import run
    world = small_world(folder/"small")
    run("orthogonality/0", str(world), out=folder/"made", steps=STEPS, progress=False)
    return world, folder/"made"


def table(chosen):
    """Do every fault and print what came of it."""
    folder = Path(tempfile.mkdtemp(prefix="saenb-faults-"))
    lost = 0
    try:
        lab = Lab(*prepared(folder), folder, processes=True)
        for stage in STAGES:
            print(f"\n## {stage}\n\n| fault | cause | survived | what was left | what was said | seconds |\n|---|---|---|---|---|---|", flush=True)
            for f in (f for f in FAULTS if f.stage == stage and (not chosen or f.__name__ in chosen)):
                began = time.perf_counter()
                try: survived, (left, said) = "yes", f(lab)
                except unittest.SkipTest as e: survived, left, said = "not tried", str(e), ""
                except Exception as e: survived, left, said, lost = "**no**", repr(e)[:300].replace("|", "/"), "", lost + 1
                print(f"| {f.fault} | {f.cause} | {survived} | {left} | {said.replace(str(folder), '…')} | {time.perf_counter() - began:.0f} |", flush=True)
    finally: shutil.rmtree(folder)
    return lost


if __name__ == "__main__": sys.exit(bool(table(sys.argv[1:])))
