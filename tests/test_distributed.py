"""One training in several processes, which torchrun starts, ends as it does in one."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from saenb.cli import main
from saenb.base.errors import SaenbError
from saenb.base.files import read_tensors
from saenb.lab.training import train
from saenb.train.distributed import FeatureSAE, Ranks, TokenTrainer
from saenb.sae.sae import SAE, SAEConfig, load_sae
from saenb.train.config import TrainConfig
from saenb.train.checkpoint import CHECKPOINT, LOG, read_log
from saenb.train.trainer import Trainer

RUNS = ("orthogonality/4", "positional/10", "contrastive/3", "dual_objective/5", "dual_objective/0")
LENGTH = dict(steps=60, batch=256, d_sae=128, warmup=10, log_every=5)
SCRIPT = """
import sys, torch
from saenb.lab.training import trainer
from saenb.train.distributed import ranks
store, out, runs, length = sys.argv[1], sys.argv[2], sys.argv[3].split(","), eval(sys.argv[4])
with ranks() as here:
    for run in runs:
        mine = trainer(here, store, f"{out}/{run}", run, **length | (dict(steps=140) if run == "dual_objective/5" else {})) # which sorts its features at step 100
        for m in mine.mechanisms: m.gradient_support = "all" # products beside gates are autograd's, as they are in several processes: dual_objective/5 makes a difference of 0.004 of one of 1e-7, and here nothing but their number is to differ
        mine.fit(False)
        if here.leads: mine.sae.save(f"{out}/{run}/sae")
    class Stop(Exception): pass
    def step(batch):
        if broken.index == 33: raise Stop
        type(broken).one_step(broken, batch)
    broken, again = (trainer(here, store, f"{out}/broken", "contrastive/3", **length, checkpoint_every=20) for _ in range(2))
    broken.one_step = step
    try: broken.fit(False)
    except Stop: pass
    again.fit(False).save(f"{out}/broken/sae{'' if here.leads else here.rank}")
    torch.set_default_dtype(torch.float64) # in which rounding cannot hide that something is counted twice, or not at all
    for run in runs:
        if run == "positional/10": continue # computes some of its parts in single precision
        mine = trainer(here, store, f"{out}/none", run, **length | dict(precision="float32"))
        mine.sae.double(), mine.mechanisms.double()
        gradients = {}
        mine.optimizer.register_step_pre_hook(lambda *_: gradients.update({f"{mine.index} {name}": p.grad.clone() for name, p in mine.sae.named_parameters() if p.grad is not None}))
        for batch, _ in zip(mine.store.batches(length["batch"], 0, 0, mine.cfg.balanced), range(2)):
            batch.x = batch.x.double()
            mine.one_step(batch)
        if here.leads: torch.save(gradients, f"{out}/{run}/gradients.pt")
"""


def environment(): return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TQDM_DISABLE="1")


def torchrun(*arguments, start=subprocess.run, **options):
    """Two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, arguments)]
    return start(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def params(**options): return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def alike(one, two, tolerance=1e-4, slack=1):
    """Check that two folders hold the same training, but for rounding."""
    a, b = (read_log(folder/LOG) for folder in (one, two))
    assert [(line.keys(), line["step"]) for line in a] == [(line.keys(), line["step"]) for line in b] and len(a) > 5
    losses = [abs(y["loss"] / x["loss"] - 1) for x, y in zip(a, b)]
    assert max(losses) < tolerance and max(losses[:len(a) // 2]) < 1e-4
    assert max(abs(y["l0"] - x["l0"]) for x, y in zip(a, b)) < 0.02 * a[0]["l0"] and a[-1]["dead"] == pytest.approx(b[-1]["dead"], abs=0.02)
    one, two = (load_sae(folder/"sae") for folder in (one, two))
    nearest = (two.W_dec @ one.W_dec.T).argmax(1) # features may have changed places in another order, where it is a matter of rounding
    assert len(nearest.unique()) > 0.98 * len(nearest)
    for weights in (one.W_enc.T[nearest] - two.W_enc.T, one.W_dec[nearest] - two.W_dec): assert weights.norm(dim=1).quantile(0.98) < 0.02 * slack
    torch.testing.assert_close(one.b_dec, two.b_dec, rtol=0, atol=1e-3 * slack * one.cfg.scale)


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    """Trainings by one process and by two."""
    root = tmp_path_factory.mktemp("made")
    (root/"script.py").write_text(SCRIPT)
    tail = [str(root/"script.py"), str(store.path)], [",".join(RUNS), repr(LENGTH)]
    alone = subprocess.run([sys.executable, *tail[0], root/"one", *tail[1]], env=environment(), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    two = torchrun(*tail[0], root/"two", *tail[1])
    assert two.returncode == 0, two.stderr
    return root


@pytest.mark.parametrize("run", RUNS)
def test_two_processes_end_as_one_does(made, run):
    # positional/10 multiplies what rounding leaves, step by step
    alike(made/"one"/run, made/"two"/run, *(1e-2, 5) if run == "positional/10" else ())


@pytest.mark.parametrize("run", [r for r in RUNS if r != "positional/10"])
def test_gradients_are_counted_once(made, run):
    one, two = (torch.load(made/name/run/"gradients.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys() and any(k.startswith("1 ") for k in one)
    for name, gradient in one.items(): torch.testing.assert_close(two[name], gradient, rtol=1e-9, atol=1e-12 * max(g.norm() for g in one.values()).item())


def test_two_processes_train_free_rows_as_one_does(store, tmp_path):
    given = dict(architecture="topk,k=8", rows="free", steps=60, batch=256, d_sae=96, lr=0.01)
    one = train(store.path, tmp_path/"one", progress=False, **given).sae
    done = torchrun("-m", "saenb", "train", store.path, tmp_path/"two", *params(**given))
    assert done.returncode == 0, done.stderr
    two = load_sae(tmp_path/"two"/"sae")
    for name, p in one.named_parameters(): torch.testing.assert_close(getattr(two, name), p, rtol=0, atol=1e-4 * p.abs().max().item())


@pytest.fixture(scope="module")
def baseline(store, tmp_path_factory):
    """What one process makes of the settings below."""
    out = tmp_path_factory.mktemp("baseline")
    train(store.path, out, progress=False, **COMMAND)
    return out

COMMAND = dict(steps=400, batch=256, d_sae=128, checkpoint_every=50, seed=3)


def test_a_process_is_killed_and_the_same_command_goes_on(store, baseline, tmp_path):
    command = ["-m", "saenb", "train", store.path, tmp_path, *params(**COMMAND), "--shard"]
    first = torchrun(*command, start=subprocess.Popen)
    try:
        deadline = time.time() + 120
        while not (tmp_path/CHECKPOINT).exists():
            assert time.time() < deadline and first.poll() is None
            time.sleep(0.01)
        children = [int(pid) for pid in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
        victim = next(pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        os.kill(victim, signal.SIGKILL)
        said = first.communicate(timeout=120)[1]
    finally: first.kill()
    assert first.returncode == 1 and not (tmp_path/"sae").exists()
    assert "saenb: One of the processes that train together was ended" in said or "saenb:" not in said
    assert 0 < read_tensors(tmp_path/CHECKPOINT)[1]["step"] < 400
    done = torchrun(*command)
    assert done.returncode == 0 and done.stdout.count("The dictionary is in") == 1, done.stderr
    alike(baseline, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {CHECKPOINT, LOG, "sae"}
    ours, theirs = (read_tensors(folder/CHECKPOINT)[0] for folder in (tmp_path, baseline))
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in theirs.items()}


def test_a_process_that_comes_late_to_the_next_training_is_waited_for(tmp_path):
    (tmp_path/"two.py").write_text("""
import time, torch
import torch.distributed as dist
from saenb.train.distributed import ranks
for training in range(3):
    with ranks() as here:
        number = torch.tensor(here.rank + 1.0)
        dist.all_reduce(number)
        if here.leads: print(training, number.item(), flush=True)
    if here.leads: time.sleep(1)
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path/"two.py"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[:3] == ["0 3.0", "1 3.0", "2 3.0"]


def test_resumed_it_ends_with_the_same_bytes(made):
    unbroken, first, second = (load_sae(made/"two"/name).fingerprint() for name in ("contrastive/3/sae", "broken/sae", "broken/sae1"))
    assert first == second == unbroken
    assert read_log(made/"two"/"broken"/LOG) == read_log(made/"two"/"contrastive/3"/LOG)


def test_one_process_goes_on_where_two_were(store, made, tmp_path):
    shutil.copytree(made/"two"/"contrastive/3", tmp_path/"on")
    trainer = train(store.path, tmp_path/"on", progress=False, run="contrastive/3", **LENGTH)
    assert trainer.index == 60 and read_log(tmp_path/"on"/LOG) == read_log(made/"two"/"contrastive/3"/LOG)
    assert load_sae(tmp_path/"on"/"sae").fingerprint() == load_sae(made/"two"/"contrastive/3"/"sae").fingerprint()


def test_the_command_makes_what_a_trainer_makes(store, baseline, capsys, tmp_path):
    assert main(["train", str(store.path), str(tmp_path), *params(**COMMAND), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["training_steps"] == 400 and answer["processes"] == 1 and answer["dictionary"] == str(tmp_path/"sae")
    sae = SAE(SAEConfig(d_in=store.d_in, d_sae=128)).initialise(store.rows(0, 2**15).x, 3)
    plain = Trainer(sae, store, cfg=TrainConfig(steps=400, batch=256, seed=3)).fit(progress=False)
    assert load_sae(tmp_path/"sae").fingerprint() == load_sae(baseline/"sae").fingerprint() == plain.fingerprint()


@pytest.mark.parametrize("arguments, said", [
    (("nowhere", "out"), "no store here"),
    (("STORE", "out", "--shard", "--steps=2"), "one process only"),
    (("STORE", "out", "--run=contrastve/3"), "did you mean contrastive/3"),
    (("STORE", "out", "--tokens=100"), "less than one batch"),
    (("STORE", "out", "--d-sae=0"), "not a whole number of 1 or more"),
    (("STORE", "out", "--lr=-1"), "lr is -1.0"),
    (("STORE", "out", "--lr=nan"), "lr is nan"),
    (("STORE", "STORE/store.json", "--steps=1", "--batch=8"), "cannot be read or written"),
])
def test_bad_input(store, capsys, monkeypatch, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    try: code = main(["train", *(a.replace("STORE", str(store.path)) for a in arguments)])
    except SystemExit as e: code = e.code
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("saenb: ") and err.count("\n") == 1 and said in err


def test_what_cannot_be_shared_equally(store):
    two = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(SaenbError, match="255 tokens cannot be shared equally by 2 processes"): TokenTrainer(two, SAE(SAEConfig(store.d_in, 8)), store, [], TrainConfig(steps=1, batch=255))
    with pytest.raises(SaenbError, match="127 features cannot be divided equally among 2 processes"): FeatureSAE(SAEConfig(store.d_in, 127), two)


def launch(*arguments, world=2):
    """Processes that know of each other as torchrun's do, and whose exit codes can be seen."""
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = [subprocess.Popen([sys.executable, "-m", "saenb", *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=environment() | dict(RANK=str(r), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))) for r in range(world)]
    return [(*p.communicate(timeout=120), p.returncode) for p in started]


def test_bad_input_is_said_once_and_ends_all(store, tmp_path):
    (out, err, code), (other_out, other_err, other_code) = launch("train", store.path, tmp_path, "--shard", "--mechanisms=contrastive/3", "--steps=2")
    assert code == other_code == 2 and not out + other_out and "Traceback" not in err + other_err
    assert err.count("saenb: ") == 1 and "leave --shard out" in err and "saenb: " not in other_err
