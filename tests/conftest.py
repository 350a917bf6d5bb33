"""What several tests need: the shipped world, a small store of its stream, a short-trained dictionary, one exam."""
import contextlib
import gzip
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ: # several at work share the processor
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="there is no browser: on Debian, `apt-get install chromium` brings one")


# The slowest notebooks: workers run them first, so that none is left with one when the others have ended.
SLOW = ("contextual_reference", "world", "extend_preset", "crisp", "unlearning", "training", "controls", "sparse_probing", "extend_mechanism", "runner", "routing",
        "position", "extend_intervention", "absorption", "reconstruction", "frontier", "dual_objective", "interventions", "cue_model", "entanglement", "instrument",
        "cli", "trainer", "word_lists", "contrastive", "extend_architecture", "guardrail", "separation", "conditional", "positional_results", "training_loop",
        "orthogonality", "tour", "extend_evaluation", "world_model", "positional", "random_choice", "orthogonality_results", "explorer", "architectures")


def slowness(item):
    name = re.sub(r".*/[^_]*_|]", "", item.name) # without folder and number
    return SLOW.index(name) if name in SLOW else len(SLOW)


@pytest.hookimpl(tryfirst=True) # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Workers take whole files, which share what is costly to make; notebooks are run one by one, the slowest first."""
    for item in items: item.add_marker(pytest.mark.xdist_group(item.name if "runs_from_top" in item.name else item.path.stem))
    places = [i for i, item in enumerate(items) if "runs_from_top" in item.name]
    for i, item in zip(places, sorted((items[i] for i in places), key=slowness)): items[i] = item


@pytest.fixture(scope="session")
def world():
    from saenb.data.world import World
    return World.default()


@pytest.fixture(scope="session")
def model(world):
    return world.model()


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Have one of the workers make a folder, and the others wait for it and use it too."""
    from filelock import FileLock
    base = tmp_path_factory.getbasetemp()

    def make(name, fill):
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)/name
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                fill(draft := folder.with_name(f"{name}-draft"))
                draft.rename(folder)
        return folder
    return make


@pytest.fixture(scope="session")
def store(world, model, once):
    from saenb.data.harvest import harvest
    from saenb.data.store import Store
    return Store.open(once("store", lambda folder: harvest(model, world.texts("train", 900), world.layer, folder, shard_bytes=2**22)))


@pytest.fixture(scope="session")
def baseline_made(once):
    """A folder with the embedded world's store, its list of known questions, and the record of a baseline, which many notebooks show."""
    from saenb.lab.runner import run
    return once("baseline", lambda draft: run("orthogonality/0", out=draft, progress=False))


def part_of_world(folder, parts):
    """The embedded world with a part of its questions and texts, in a folder whose name serves as a preset's; whatever is made with it goes where the whole world's would go. `parts` says of which files one line in how many is kept."""
    from saenb.data.world import World

    def copy(source, target):
        part = next((n for ending, n in parts.items() if Path(source).name.endswith(ending)), None)
        if part is None: return shutil.copyfile(source, target)
        read = gzip.open if Path(source).suffix == ".gz" else open
        with read(source, "rt") as f, read(target, "wt") as g: g.writelines(f.readlines()[::part])
    return Path(shutil.copytree(World.default().path, folder/"tiny", copy_function=copy))


TRAINED_ON = {"train_forget.jsonl.gz": 3, "train_retain.jsonl.gz": 3} # enough for a store of two shards


def small_world(folder):
    """Enough to make records and to judge them quickly, and too little for what they score to mean much."""
    return part_of_world(folder, {**TRAINED_ON, "forget.jsonl.gz": 6, "retain.jsonl.gz": 6, ".jsonl": 12})


@pytest.fixture(scope="session")
def small(once):
    """The small world's folder."""
    return str(once("small", small_world)/"tiny")


@pytest.fixture(scope="session")
def setting(small):
    """The small world's preset."""
    from saenb.lab.preset_files import find_preset
    return find_preset(small)


@pytest.fixture(scope="session")
def harvested(once, setting):
    """A folder of records that has none yet, but the small world's store and the list of known questions; to be copied or linked to, and left as it is."""
    from saenb.lab.runner import exam_of, store_of

    def fill(folder):
        store_of(setting, folder)
        exam_of(setting, folder)
    return once("harvested", fill)


@pytest.fixture(scope="session")
def work(harvested, tmp_path_factory):
    """Make folders for records, in which the stream is harvested and the questions are asked."""
    def make(name="runs"):
        out = tmp_path_factory.mktemp(name)
        (out/"tiny").mkdir()
        for part in ("store", "cache"): (out/"tiny"/part).symlink_to(harvested/"tiny"/part)
        return out
    return make


@pytest.fixture(scope="session")
def exam(world, model, once):
    """A third of the embedded world's questions, and all of its two corpora."""
    from saenb.evals.exam import Exam
    from saenb.lab.preset_files import find_preset
    third = once("third", lambda folder: part_of_world(folder, {**TRAINED_ON, ".jsonl": 3}))
    return Exam(model, find_preset(str(third/"tiny")).exam, world.layer, cache=third/"cache")


@pytest.fixture(scope="session")
def fresh(store):
    """Make dictionaries that are ready to train."""
    from saenb.sae.sae import SAE, SAEConfig

    def make(seed=0, d_sae=256):
        cfg = SAEConfig(d_in=store.d_in, d_sae=d_sae, hook_name=store.hook_name, hook_layer=store.layer, model_name="tiny world")
        return SAE(cfg).initialise(store.rows(0, 8192).x, seed)
    return make


@pytest.fixture(scope="session")
def trained(store, fresh, once):
    from saenb.sae.sae import load_sae
    from saenb.train.config import TrainConfig
    from saenb.train.trainer import Trainer
    return load_sae(once("trained", lambda folder: Trainer(fresh(d_sae=512), store, cfg=TrainConfig(steps=800, lr=1e-3)).fit(progress=False).save(folder)))


@pytest.fixture(scope="module")
def train(request, store, fresh):
    """A short training with some mechanisms, from the same start and of the module's LENGTH; made once for the same settings."""
    from saenb.sae.gates import make_mechanism
    from saenb.train.trainer import Trainer
    made = {}

    def run(mechanisms=(), length=request.module.LENGTH):
        name = str((mechanisms, length))
        if name not in made:
            sae = fresh(d_sae=256)
            made[name] = Trainer(sae, store, [make_mechanism(n, s, sae.cfg) for n, s in mechanisms], length)
            made[name].fit(progress=False)
        return made[name]
    return run


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pages are opened by playwright, which `pip install playwright` brings")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def violations(page):
    """What axe-core finds wrong with an opened page for those who read it in other ways, a line each; in the dark, what is seen alone."""
    from importlib.resources import files
    script = pytest.importorskip("axe_playwright_python", reason="pages are judged by axe-core, which `pip install axe-playwright-python` brings")
    page.evaluate((files(script)/"axe.min.js").read_text(encoding="utf-8"))
    page.add_style_tag(content="* { transition: none !important; animation: none !important; }") # colours halfway are nobody's
    found = []
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"matchMedia('(prefers-color-scheme: {scheme})').matches")
        for v in page.evaluate("rules => axe.run({preload: false, ...rules})", rules)["violations"]: # style sheets are not fetched again
            found += [f"{scheme}: {v['id']} ({v['impact']}): {n['html'][:150]}: {n['failureSummary']}" for n in v["nodes"]]
    return found


@pytest.fixture
def ends_the_same(store, tmp_path):
    """Check that a dictionary and its mechanisms, stopped between two checkpoints and resumed, end with the bytes of an unbroken training."""
    from saenb.train.config import TrainConfig
    from saenb.train.trainer import Trainer

    class Stop(Exception): pass

    def check(parts):
        def trainer(name):
            sae, mechanisms = parts()
            return Trainer(sae, store, mechanisms, TrainConfig(steps=24, warmup=5, checkpoint_every=5, log_every=4, batch=512), tmp_path/name)
        whole, broken = trainer("whole").fit(progress=False), trainer("broken")
        step = broken.one_step
        def one_step(batch):
            if broken.index == 13: raise Stop
            step(batch)
        broken.one_step = one_step
        with pytest.raises(Stop): broken.fit(progress=False)
        assert trainer("broken").fit(progress=False).fingerprint() == whole.fingerprint()
        assert (tmp_path/"broken"/"train_log.jsonl").read_bytes() == (tmp_path/"whole"/"train_log.jsonl").read_bytes()
    return check


@pytest.fixture
def saenb(tmp_path):
    """Call the command line in a process of its own; returns what it printed and its exit code."""
    def call(*arguments, cwd=tmp_path, env=None):
        return subprocess.run([sys.executable, "-m", "saenb", *map(str, arguments)], capture_output=True, text=True, cwd=cwd,
                              env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})})
    return call


@pytest.fixture
def called(tmp_path, monkeypatch):
    """The same without a process of its own, which takes most of the time: what was imported, read or asked before is there."""
    from saenb.base.errors import warn_once
    from saenb.cli import main

    def call(*arguments):
        warn_once.cache_clear()
        monkeypatch.chdir(tmp_path)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: code = main([*map(str, arguments)])
            except SystemExit as e: code = e.code
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
    return call


@pytest.fixture
def one_sentence():
    """Check that a failed command said one sentence, showed no traceback, and ended with code 2."""
    def check(done, *words):
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("saenb: ") and last.endswith((".", "?"))
        for word in words: assert word in last, (word, last)
    return check
