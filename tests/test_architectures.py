"""Architectures besides ReLU: their losses are those of the papers, their steps autograd's, and every idea takes steps on them."""
import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.data.store import Batch
from saenb.ideas.run import all_runs
from saenb.lab.one_pass import OnePass, variants
from saenb.sae import listed_step, sparse_step
from saenb.sae.architectures import ARCHITECTURES, make_architecture
from saenb.sae.gates import make_mechanism
from saenb.sae.jumprelu import UNIT
from saenb.sae.sae import SAE, SAEConfig, load_sae
from saenb.train.config import TrainConfig
from saenb.train.trainer import Trainer

WIDTH, FEATURES, LENGTH = 16, 64, 32
OTHERS = ("topk,k=8", "batchtopk,k=8", "jumprelu", "jumprelu,penalty=tanh", "gated", "matryoshka,k=8,prefixes=2")
SPARSE = {"sparse": 2.0, "dense": -1.0}


class Stream:
    """A stream of sums of a few directions, without a store."""
    d_in, path, about = WIDTH, "a stream made at random", dict(shards=[], model="none", texts={})
    hook_name, layer = "blocks.0.hook_resid_post", 0

    def __init__(self, times=1.0):
        self.times = times
        self.directions = torch.nn.functional.normalize(torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(5)), dim=1)

    def check_batch(self, *_): pass
    def rows(self, start, stop): return next(self.batches(2048, 99))

    def batches(self, size, seed=0, start=0, balanced=False):
        while True:
            draw = torch.Generator().manual_seed(1000 * seed + start)
            amount = torch.rand(size, 40, generator=draw) * (torch.rand(size, 40, generator=draw) < 0.1)
            row = torch.arange(size)
            yield Batch((3 * amount @ self.directions + 0.1 * torch.randn(size, WIDTH, generator=draw) + 1) * self.times,
                        (row % LENGTH).short(), (row % 2 + 1 if balanced else row % 3).to(torch.int8), row.int(), (row // LENGTH).int())
            start += 1


STREAM = Stream()


def fresh(architecture, stream=STREAM, gates=()):
    sae = SAE(SAEConfig(WIDTH, FEATURES, architecture=architecture))
    return sae.initialise(next(stream.batches(2048, 99)).x, 0)


def training(architecture, mechanisms=(), stream=STREAM, sae=None, out=None, **cfg):
    sae = sae or fresh(architecture, stream)
    made = [make_mechanism(name, settings, sae.cfg) for name, settings in mechanisms]
    return Trainer(sae, stream, made, TrainConfig(**dict(steps=10, batch=128, warmup=2, lr=2e-3, log_every=5) | cfg), out)


def smaller(name, settings):
    """Settings that suit so few features."""
    fits = dict(groups=16, clusters=8, heads=4, block=8, count=20, parts=4, length=LENGTH, history=2)
    return name, {k: min(v, fits[k]) if k in fits and isinstance(v, int) else v for k, v in settings.items()}


@pytest.mark.parametrize("architecture", [a for a in OTHERS if "tanh" not in a])
def test_every_run_takes_ten_steps_on_every_architecture(architecture):
    assert len(all_runs()) > 28
    for run in all_runs().values():
        trainer = training(architecture, [smaller(*part) for part in run.mechanisms], **dict(run.training))
        for m in trainer.mechanisms:
            if hasattr(m, "every"): m.every = 3 # groupings, resets and orders within ten steps
        sae = trainer.fit(progress=False)
        batch = next(STREAM.batches(64, 7))
        with torch.no_grad(): f = sae.encode(batch.x, batch.position)
        assert trainer.index == 10 and f.isfinite().all() and sae(batch.x, batch.position).isfinite().all(), run.id
        assert all(p.isfinite().all() for p in sae.parameters()) and len(trainer.history) == 2, run.id
        if architecture.startswith("topk"): assert (f > 0).sum(1).max() <= 8, run.id


def test_all_six_are_known_by_name():
    ARCHITECTURES.load()
    assert {"relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka"} <= ARCHITECTURES.keys()


GATES = {"none": (), "masked": (("HardMask", dict(parts=4, length=LENGTH)),), "soft": (("SoftMask", dict(temperature=0.3, length=LENGTH)),)}


@pytest.mark.parametrize("limit", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("architecture", OTHERS)
def test_a_fast_step_has_autograds_gradients(monkeypatch, architecture, gates, limit):
    monkeypatch.setattr(sparse_step, "SPARSE_BELOW", {torch.float32: limit})
    def gradients(fast):
        trainer = training(architecture, GATES[gates], lr=1e-9)
        if not fast: trainer.sae.architecture.fast_step = lambda *_: None
        trainer.since_fired[::3] = 1000 # AuxK has somebody to ask
        found = {}
        trainer.optimizer.register_step_pre_hook(lambda *_: found.update(
            {name: p.grad.clone() for name, p in trainer.sae.named_parameters() if p.grad is not None}))
        trainer.one_step(next(STREAM.batches(512)))
        return found | dict(terms=trainer._pending[0])
    ours, plain = gradients(True), gradients(False)
    assert ours.keys() == plain.keys() and ("threshold" in ours) == architecture.startswith("jumprelu")
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-5 * float(plain[name].abs().max()), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("architecture", ("topk,k=3", "batchtopk,k=3", "jumprelu"))
def test_no_table_of_activations_is_made(monkeypatch, architecture):
    """Unless somebody asks: an architecture of one's own may."""
    monkeypatch.setattr(sparse_step, "SPARSE_BELOW", {torch.float32: 0.5})
    monkeypatch.setattr(listed_step, "PART", 96 * FEATURES) # in several parts
    batch, found = next(STREAM.batches(512)), []
    trainer, plain = training(architecture, lr=1e-9), training(architecture, lr=1e-9)
    plain.sae.architecture.fast_step = lambda *_: None
    for t in (trainer, plain): t.sae.architecture.after_step = found.append
    with monkeypatch.context() as patched:
        patched.setattr(listed_step.Listed, "table", lambda self: pytest.fail("a table"))
        trainer.one_step(batch)
    plain.one_step(batch)
    listed, table = found
    assert isinstance(listed.activations, listed_step.Listed) and torch.is_tensor(table.activations)
    torch.testing.assert_close(listed.f, table.f, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(listed.sums, table.sums, rtol=1e-4, atol=1e-4)
    assert torch.equal(listed.active, (table.f > 0).sum(0)) and 0 < listed.active.sum() < 512 * FEATURES / 2


def test_candidates_of_a_batch_are_enough_or_a_table_is_made(monkeypatch):
    """A threshold from elsewhere may be far above what a batch has."""
    monkeypatch.setattr(sparse_step, "SPARSE_BELOW", {torch.float32: 2.0})
    trainer = training("batchtopk,k=2", lr=1e-9)
    kept, found = trainer.sae.architecture.after_step, []
    trainer.sae.architecture.after_step = lambda step: (kept(step), found.append(step))
    batch = next(STREAM.batches(512))
    trainer.one_step(batch)
    trainer.sae.threshold *= 3
    trainer.one_step(batch)
    assert [torch.is_tensor(step.activations) for step in found] == [False, True]
    torch.testing.assert_close(found[0].f, found[1].f, rtol=1e-4, atol=1e-4)


# The peers' formulas, as the papers have them; `pre` is before the ReLU.

def pre(w, x): return (x - w.b_dec) @ w.W_enc + w.b_enc


def squared(a, b): return (a - b).pow(2).sum(1).mean()


def strongest(values, k):
    top = values.topk(k, dim=-1)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)


def auxk(w, x, out, pre, dead):
    left = (x - out).detach()
    return squared(left, strongest(torch.relu(pre)[:, dead], min(WIDTH // 2, len(dead))) @ w.W_dec[dead]) / 32


def topk(w, x, dead, k=8):
    f = strongest(torch.relu(pre(w, x)), k)
    out = f @ w.W_dec + w.b_dec
    return f, dict(reconstruction=squared(x, out), auxk=auxk(w, x, out, pre(w, x), dead))


def batchtopk(w, x, dead, k=8):
    f = torch.relu(pre(w, x))
    f = strongest(f.flatten(), k * len(x)).view_as(f)
    out = f @ w.W_dec + w.b_dec
    return f, dict(reconstruction=squared(x, out), auxk=auxk(w, x, out, pre(w, x), dead))


def matryoshka(w, x, dead):
    f, losses = batchtopk(w, x, dead)
    parts = [squared(x, f[:, :m] @ w.W_dec[:m] + w.b_dec) for m in (FEATURES // 4, FEATURES // 2)]
    return f, losses | dict(prefixes=sum(parts))


class Rectangle(torch.autograd.Function):
    """Appendix J of 2407.14435: a step, or what it lets pass, with a kernel for the threshold's gradient."""
    @staticmethod
    def forward(ctx, z, theta, eps, jump):
        ctx.save_for_backward(z, theta)
        ctx.eps, ctx.jump = eps, jump
        return (z if jump else torch.ones_like(z)) * (z > theta)
    @staticmethod
    def backward(ctx, g):
        z, theta = ctx.saved_tensors
        kernel = (((z - theta) / ctx.eps).abs() < 0.5).to(z.dtype)
        along = -(theta if ctx.jump else 1.0) / ctx.eps * kernel * g
        return (z > theta) * g if ctx.jump else None, along.sum(0), None, None


def jumprelu(w, x, dead):
    z, eps = pre(w, x), 0.02 * w.scale
    f = Rectangle.apply(z, w.threshold, eps, True)
    count = Rectangle.apply(z, w.threshold, eps, False).sum(1).mean()
    return f, dict(reconstruction=squared(x, f @ w.W_dec + w.b_dec), sparsity=0.04 * (2304 / WIDTH)**0.5 * UNIT * count * w.scale**2)


def gated(w, x, dead):
    """2404.16014: shared directions, the decoder frozen where gates rebuild by themselves."""
    pi = pre(w, x)
    magnitude = torch.relu((x - w.b_dec) @ (w.W_enc * w.r_mag.exp()) + w.b_mag)
    f = (pi > 0) * magnitude
    opened = torch.relu(pi)
    return f, dict(reconstruction=squared(x, f @ w.W_dec + w.b_dec),
                   sparsity=0.04 * (2304 / WIDTH)**0.5 * opened.sum(1).mean() * w.scale,
                   gate=squared(x, opened @ w.W_dec.detach() + w.b_dec.detach()))


PEERS = {"topk,k=8": topk, "batchtopk,k=8": batchtopk, "jumprelu": jumprelu, "gated": gated, "matryoshka,k=8,prefixes=2": matryoshka}


@pytest.mark.parametrize("architecture", PEERS)
def test_losses_and_gradients_are_those_of_the_paper(architecture):
    trainer = training(architecture, warmup=0, lr=1e-9, precision="float32")
    sae, draw = trainer.sae, torch.Generator().manual_seed(3)
    with torch.no_grad(): # not at the start, where much is zero or the same
        for p in sae.parameters(): p += 0.05 * p.abs().mean() * torch.randn(p.shape, generator=draw)
        for name in ("r_mag", "b_mag"):
            if hasattr(sae, name): getattr(sae, name).add_(0.2 * torch.randn(FEATURES, generator=draw))
    trainer.since_fired[::4] = 1000
    w = SimpleNamespace(scale=sae.cfg.scale, **{n: p.detach().clone().double().requires_grad_() for n, p in sae.named_parameters()})
    batch, seen, found = next(STREAM.batches(256)), {}, {}
    trainer.optimizer.register_step_pre_hook(lambda *_: found.update({n: p.grad.clone() for n, p in sae.named_parameters() if p.grad is not None}))
    after, sae.architecture.after_step = sae.architecture.after_step, lambda step: (seen.update(f=step.f, losses=step.losses), after(step))
    trainer.one_step(batch)
    f, losses = PEERS[architecture](w, batch.x.double(), torch.arange(0, FEATURES, 4))
    sum(losses.values()).backward()
    close = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["f"].double(), f, **close)
    assert seen["losses"].keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(seen["losses"][name].double(), value / sae.cfg.scale**2, **close, msg=lambda m: f"{name}: {m}")
    w.W_dec.grad -= (w.W_dec.grad * w.W_dec).sum(1, keepdim=True) * w.W_dec # as is left of it
    for name, gradient in found.items():
        theirs = getattr(w, name).grad / sae.cfg.scale**2
        torch.testing.assert_close(gradient.double(), theirs, rtol=1e-4, atol=2e-5 * theirs.abs().max().item(), msg=lambda m: f"{name}: {m}")


def test_the_threshold_keeps_the_number_of_active_features():
    for architecture in ("batchtopk,k=6", "matryoshka,k=6"):
        sae = training(architecture, steps=150, batch=256, warmup=10).fit(progress=False)
        with torch.no_grad(): active = (sae.encode(next(STREAM.batches(4096, 123)).x) > 0).sum(1).float()
        assert abs(active.mean() / 6 - 1) < 0.05 and active.std() > 0.5, architecture


@pytest.mark.parametrize("architecture", ("relu", *OTHERS))
def test_the_unit_of_the_stream_is_of_no_account(architecture):
    """Losses and rates are in units of the stream's scale, so nothing has to be normalised or folded back."""
    one, eight = (training(architecture, stream=Stream(times), steps=25).fit(progress=False) for times in (1, 8))
    units = {"b_enc", "b_dec", "threshold", *one.architecture.in_units}
    for name, t in one.state_dict().items():
        torch.testing.assert_close(eight.state_dict()[name] / (8 if name in units else 1), t, rtol=1e-3, atol=1e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("architecture", OTHERS)
def test_a_dictionary_is_saved_and_its_training_resumed(architecture, tmp_path):
    def trainer(name): return training(architecture, steps=20, checkpoint_every=5, out=tmp_path/name)
    whole, broken = trainer("whole"), trainer("broken")
    whole.fit(progress=False)
    step = broken.one_step
    def one_step(batch):
        if broken.index == 13: raise InterruptedError
        step(batch)
    broken.one_step = one_step
    with pytest.raises(InterruptedError): broken.fit(progress=False)
    again = trainer("broken")
    assert again.fit(progress=False).fingerprint() == whole.sae.fingerprint()
    sae, x = load_sae(again.sae.save(tmp_path/"sae")), next(STREAM.batches(64, 3)).x
    assert sae.cfg == again.sae.cfg and sae.fingerprint() == again.sae.fingerprint() and torch.equal(sae.encode(x), again.sae.encode(x))
    with pytest.raises(SaenbError, match="belongs to a training with other settings"):
        training("relu", steps=20, checkpoint_every=5, out=tmp_path/"broken").fit(progress=False)


SCRIPT = """
import sys, torch
torch.set_default_dtype(torch.float64) # in which rounding cannot hide that something is counted twice, or not at all
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from test_architectures import OTHERS, STREAM
from saenb.lab import training
from saenb.train.distributed import ranks
training.Store, found = SimpleNamespace(open=lambda path: STREAM), {}
with ranks() as here:
    for i, kind in enumerate(OTHERS):
        for run in (("orthogonality/0",), ("positional/2",), ("orthogonality/0", "positional/2"))[i % 3]:
            mine = training.trainer(here, "none", sys.argv[2], run, architecture=kind, steps=40, batch=128, d_sae=64, warmup=0, precision="float32")
            mine.sae.double(), mine.mechanisms.double()
            mine.since_fired[::4] = 1000
            mine.optimizer.register_step_pre_hook(lambda *_: found.update({f"{kind} {run} {mine.index} {name}": p.grad.clone() for name, p in mine.sae.named_parameters() if p.grad is not None}))
            for batch, _ in zip(STREAM.batches(128), range(2)):
                batch.x = batch.x.double()
                mine.one_step(batch)
            found |= {f"{kind} {run} end {name}": t.clone() for name, t in mine.sae.state_dict().items()}
    if here.leads: torch.save(found, sys.argv[3])
"""


def test_two_processes_make_the_gradients_of_one(tmp_path):
    """With a mechanism and without."""
    (tmp_path/"script.py").write_text(SCRIPT)
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | dict(PYTHONPATH=str(here.parent), OMP_NUM_THREADS="1")
    for name, start in dict(one=[], two=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]).items():
        done = subprocess.run([sys.executable, *start, tmp_path/"script.py", here, tmp_path, tmp_path/f"{name}.pt"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (torch.load(tmp_path/f"{name}.pt", weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) > 8 * 10
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-8, atol=1e-11 * max(1.0, float(value.abs().max())), msg=lambda m: f"{name}: {m}")


def test_names_tell_dictionaries_of_the_same_bytes_apart():
    one, two = (fresh(name) for name in ("topk,k=8", "topk,k=9"))
    assert one.fingerprint() != two.fingerprint() != fresh("relu").fingerprint()
    one.encode(next(STREAM.batches(64)).x) # in training, which losses remember
    assert copy.deepcopy(one).fingerprint() == one.fingerprint()


@pytest.mark.parametrize("architecture, said", [
    ("topk,k=65", "k of topk is 65; it has to be a whole number from 1 to 64"), ("batchtopk,k=0", "k of batchtopk is 0"),
    ("topk,k=many", "'many' is no k for topk"), ("topk,k", "'' is no k for topk"), ("topk,kk=3", "no setting of topk called 'kk'; did you mean k"),
    ("jumprelu,penalty=l1", "no penalty of jumprelu called 'l1'"), ("jumprelu,bandwidth=0", "bandwidth of jumprelu is 0.0"),
    ("jumprelu,bandwidth=nan", "bandwidth of jumprelu is nan"), ("matryoshka,prefixes=7", "prefixes of matryoshka is 7"),
    ("topq", "no architecture called 'topq'; did you mean topk"), ("relu,k=3", "no setting of relu called 'k'")])
def test_settings_that_cannot_be_are_refused(architecture, said):
    with pytest.raises(SaenbError, match=said) as told: make_architecture(SAEConfig(WIDTH, FEATURES, architecture=architecture))
    assert "\n" not in str(told.value)


def test_what_a_file_may_not_say(tmp_path):
    sae = fresh("jumprelu")
    with torch.no_grad(): sae.threshold[3] = torch.nan
    with pytest.raises(SaenbError, match="threshold .*not finite"): load_sae(sae.save(tmp_path/"nan"))
    folder = fresh("topk,k=8").save(tmp_path/"topk")
    entry = json.loads((folder/"cfg.json").read_text())
    for spec, said in (("topk,k=65", "k of topk is 65"), ("jumprelu", "threshold differ"), ("gated", "b_mag, r_mag differ"), ("relu,k=1", "no setting of relu")):
        entry["metadata"]["saenb"]["architecture"] = spec
        (folder/"cfg.json").write_text(json.dumps(entry))
        with pytest.raises(SaenbError, match=said): load_sae(folder)


def test_features_that_are_reset_or_moved_take_along_what_is_theirs():
    trainer = training("jumprelu", steps=20)
    trainer.fit(progress=False)
    sae = trainer.sae
    assert sae.threshold.unique().numel() > 10
    order = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(0))
    before, moment = sae.threshold.detach().clone(), trainer.optimizer.state[sae.threshold]["exp_avg"].clone()
    trainer.reorder(order)
    with torch.no_grad(): trainer._change_places()
    assert torch.equal(sae.threshold, before[order]) and torch.equal(trainer.optimizer.state[sae.threshold]["exp_avg"], moment[order])
    trainer.reset_features(torch.tensor([2, 5]), torch.randn(2, WIDTH), next(STREAM.batches(256)).x)
    assert torch.allclose(sae.threshold[[2, 5]], torch.tensor(0.02 * sae.cfg.scale)) and not trainer.optimizer.state[sae.threshold]["exp_avg"][[2, 5]].any()


@pytest.mark.parametrize("architecture", ("relu", *OTHERS))
def test_others_read_what_is_written_for_them(architecture, tmp_path):
    from saenb.sae.formats.dictionary_learning import to_dictionary_learning
    from saenb.sae.formats.saelens import export
    from saenb.sae.formats.sparsify import to_sparsify
    sae, x = training(architecture).fit(progress=False), next(STREAM.batches(256, 3)).x
    export(sae, tmp_path/"saelens")
    to_dictionary_learning(sae, tmp_path/"learning")
    kind = json.loads((tmp_path/"saelens"/"cfg.json").read_text())["architecture"]
    assert kind == dict(relu="standard", topk="topk", gated="gated").get(architecture.split(",")[0], "jumprelu")
    with torch.no_grad():
        for folder in ("saelens", "learning"):
            again = load_sae(tmp_path/folder)
            assert again.cfg.architecture == "relu"
            torch.testing.assert_close(again.encode(x), sae.encode(x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(again(x), sae(x), rtol=1e-4, atol=1e-4)
    masked = SAE(SAEConfig(WIDTH, FEATURES, architecture="topk,k=8", gates=[dict(name="HardMask", settings=dict(parts=4))]))
    for write in (export, to_dictionary_learning, to_sparsify):
        with pytest.raises(SaenbError, match="has no class for a topk dictionary with gates; write it with `save`"): write(masked, tmp_path/"masked")
        if architecture.startswith("topk"):
            write(sae, tmp_path/write.__name__)
            with pytest.raises(SaenbError, match="already holds a dictionary; choose another folder"): write(sae, tmp_path/write.__name__)
            with torch.no_grad(): torch.testing.assert_close(load_sae(tmp_path/write.__name__)(x), sae(x), rtol=1e-4, atol=1e-4)
        elif write is to_sparsify:
            with pytest.raises(SaenbError, match="sparsify has no class for a"): write(sae, tmp_path/"none")
    assert load_sae(masked.save(tmp_path/"saved")).gates


def test_the_command_writes_for_every_tool(tmp_path, capsys):
    from saenb.cli import main
    topk, jump = (fresh(kind).eval() for kind in ("topk,k=8", "jumprelu"))
    x = next(STREAM.batches(64)).x
    for tool, said in dict(saelens="as topk.", dictionary_learning="as AutoEncoderTopK.", sparsify="as a SparseCoder.").items():
        line = ["export", str(topk.save(tmp_path/"topk")), str(tmp_path/tool), "--to", tool]
        assert main(line) == 0 and capsys.readouterr().out.strip().endswith(said)
        with torch.no_grad(): torch.testing.assert_close(load_sae(tmp_path/tool)(x), topk(x), rtol=1e-4, atol=1e-4)
        assert main(line) == 2 and "already holds a dictionary; choose another folder" in capsys.readouterr().err
    assert main(["export", str(jump.save(tmp_path/"jump")), str(tmp_path/"none"), "--to", "sparsify"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "sparsify has no class for a jumprelu dictionary; write it with `save`" in err and not (tmp_path/"none").exists()


def test_sparsify_and_gemma_scope_2_are_read_or_refused(tmp_path):
    from safetensors.torch import save_file
    w = {name: torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) for name, shape in dict(
        w_enc=(16, 64), w_dec=(64, 16), b_enc=(64,), b_dec=(16,), threshold=(64,)).items()}
    w["threshold"] = w["threshold"].abs()
    gemma, pile = tmp_path/"gemma", tmp_path/"layers.5"
    for folder in (gemma, pile): folder.mkdir()
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    def written(folder, name, tensors, entry, file):
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder/file)
        (folder/name).write_text(json.dumps(entry))
        return load_sae(folder)
    about = dict(hf_hook_point_in="model.layers.9.output", hf_hook_point_out="model.layers.9.output", architecture="jump_relu",
                 model_name="google/gemma-3-1b-pt", type="sae", affine_connection=False)
    sae = written(gemma, "config.json", w, about, "params.safetensors")
    z = x @ w["w_enc"] + w["b_enc"]
    torch.testing.assert_close(sae.encode(x), z * (z > w["threshold"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), (z * (z > w["threshold"])) @ w["w_dec"] + w["b_dec"], rtol=1e-4, atol=1e-4)
    assert (sae.cfg.hook_name, sae.cfg.hook_layer, sae.cfg.model_name) == ("blocks.9.hook_resid_post", 9, "google/gemma-3-1b-pt")
    for change, said in ((dict(type="transcoder"), "reads autoencoders"), (dict(hf_hook_point_out="model.layers.9.mlp.output"), "reads autoencoders"),
                         (dict(affine_connection=True), "affine connection"), (dict(architecture="topk"), "architecture='topk'")):
        with pytest.raises(SaenbError, match=said): written(gemma, "config.json", w, about | change, "params.safetensors")
    with pytest.raises(SaenbError, match="threshold that is not finite"):
        written(gemma, "config.json", w | dict(threshold=torch.full((64,), torch.inf)), about, "params.safetensors")
    theirs = {"encoder.weight": w["w_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["w_dec"], "b_dec": w["b_dec"]}
    about = dict(activation="topk", expansion_factor=4, num_latents=0, k=5, d_in=16, transcode=False, skip_connection=False)
    sae = written(pile, "cfg.json", theirs, about, "sae.safetensors")
    torch.testing.assert_close(sae.encode(x), strongest(torch.relu((x - w["b_dec"]) @ w["w_enc"] + w["b_enc"]), 5), rtol=1e-4, atol=1e-4)
    assert sae.cfg.hook_name == "blocks.5.hook_resid_post"
    for change, said in ((dict(transcode=True), "transcode"), (dict(activation="groupmax"), "groupmax"), (dict(k=65), "whole number from 1 to 64"),
                         (dict(num_latents=32), "differ"), (dict(d_in="16"), "d_in='16'")):
        with pytest.raises(SaenbError, match=said): written(pile, "cfg.json", theirs, about | change, "sae.safetensors")


def test_a_frontier_is_made_seed_by_seed_and_drawn_as_far_as_it_is_known(monkeypatch):
    from saenb.lab import frontier
    asked = []
    monkeypatch.setattr(frontier, "run", lambda run, preset, seed, out, steps, change, progress: asked.append((seed, change["architecture"], steps, preset)))
    frontier.make_frontier("tiny", "nowhere", 2, dict(topk=[dict(architecture=f"topk,k={k}") for k in (5, 10)], relu=[dict(architecture="relu")]), 7, ("core", "absorption"))
    assert [a[:3] for a in asked] == [(seed, kind, 7) for seed in (0, 1) for kind in ("topk,k=5", "topk,k=10", "relu")]
    assert {a[3].recorded for a in asked} == {("core", "absorption")} and {a[3].name for a in asked} == {"tiny"}
    measures = (*frontier.MEASURES, "absorption fraction", "probing k=5")
    rows = [{"architecture": "topk", "setting": str(k), "seed": seed, "L0": k + seed} | {m: seed / k for m in measures} for k in (5, 10) for seed in (0, 1)]
    shown = lambda rows: [ax.get_ylabel() for ax in frontier.draw_frontier(rows, measures).axes if ax.axison]
    assert shown(rows) == list(measures)
    del rows[2]["held-out score"]
    assert shown(rows) == list(measures)
    assert frontier.curves(rows, "held-out score")["topk"][1][:2] == (10 + 1, 1 / 10)
    assert shown([{k: v for k, v in r.items() if k != "held-out score"} for r in rows]) == [m for m in measures if m != "held-out score"]


def test_another_packages_points_keep_their_better_rate_and_are_compared_at_their_count(tmp_path):
    from saenb.lab.frontier import at_same_count, beside, best_rates
    key = "unexplained variance"
    assert beside(tmp_path/"none.json") == []
    points = [dict(kind="TopK", k=k, lr=lr, L0=k) | {key: left} for k, lr, left in ((10, 3e-4, 0.4), (10, 1e-3, 0.3), (40, 3e-4, 0.2))]
    (tmp_path/"points.json").write_text(json.dumps(dict(points=points)))
    others = best_rates(beside(tmp_path/"points.json"))
    assert [(r["architecture"], r["L0"], r[key], r["lr"]) for r in others] == [("SAELens topk", 10, 0.3, 1e-3), ("SAELens topk", 40, 0.2, 3e-4)]
    found = [dict(architecture="jumprelu", setting=str(l0), seed=0, L0=l0) | {key: left} for l0, left in ((5, 0.3), (20, 0.5), (30, 0.2))]
    assert [r["L0"] for r in best_rates(found)] == [5, 30] # a sparser one leaves less than that of 20
    rows = [dict(architecture="topk", setting=str(k), L0=k) | {key: left} for k, left in ((5, 0.5), (20, 0.1))]
    [found] = at_same_count(rows, others, key) # 40 lies beyond our curve
    assert found["SAELens"] == 0.3 and found["saenb"] == pytest.approx(0.3) # 10 is halfway between 5 and 20 on this axis
    [end] = at_same_count(rows, [dict(architecture="SAELens topk", setting="k=20", L0=20.4) | {key: 0.2}], key)
    assert end["saenb"] == 0.1 # a count may differ a little from the k that is asked for


def test_a_curve_is_of_one_way_to_train_unless_all_are_asked_for():
    from saenb.lab.frontier import frontier_records, points
    root = Path(__file__).parent.parent/"runs"/"architectures-full"
    one, every = (points(frontier_records(root, rates=rates)) for rates in (False, True))
    assert {r["rows"] for r in one} == {"unit"} and {r["rows"] for r in every} == {"unit", "free"}
    assert len({r["lr"] for r in one}) == 1 < len({r["lr"] for r in every})
    assert {r["setting"] for r in every} == {r["setting"] for r in one}


def test_a_record_names_its_architecture(tmp_path):
    from saenb.lab.runner import _notes, plan_record
    info = dict(layer=0, dict_size=64, training_steps=5, final_loss=None, l0=None, unexplained_variance=None)
    mine, plain = (plan_record("orthogonality/1", "tiny", 0, tmp_path, change=change) for change in (dict(architecture="topk,k=16"), None))
    assert mine.config["run"]["architecture"] == "topk,k=16" and mine.record.path.parent.name == "run_1@architecture=topk,k=16"
    assert "architecture" not in plain.config["run"] and mine.recipe != plain.recipe
    for plan, count in ((mine, 1), (plain, 0)): assert _notes(plan.config, info, []).count("\n- architecture: topk,k=16\n") == count


def test_a_variant_is_compared_with_the_baseline_of_its_architecture(tmp_path):
    from saenb.lab.records import Record
    from saenb.report.compare import baseline_of
    def record(number, kind=None):
        variant = f"architecture={kind}" if kind else ""
        kept = Path(__file__).parent.parent/"runs"/"tiny-full"/"orthogonality"/f"run_{number}"/"seed_0"
        folder = tmp_path/"tiny-full"/"orthogonality"/f"run_{number}{'@' * bool(kind)}{variant}"/"seed_0"
        folder.mkdir(parents=True)
        config = json.loads((kept/"config.json").read_text())
        if kind: config["run"]["architecture"] = kind
        (folder/"config.json").write_text(json.dumps(config | dict(variant=variant)))
        (folder/"final_info.json").write_text((kept/"final_info.json").read_text())
        return Record(folder)
    plain, mine, without = record("0"), record("1", "topk,k=16"), record("1", "gated")
    theirs = record("0", "topk,k=16")
    assert baseline_of(mine).path == theirs.path == baseline_of(theirs).path and baseline_of(record("2")).path == plain.path
    with pytest.raises(SaenbError, match="no baseline .*saenb run orthogonality/0 .*--architecture gated"): baseline_of(without)


def test_of_several_baselines_the_one_with_the_most_similar_l0_is_taken(tmp_path):
    from saenb.lab.records import Record
    from saenb.report.compare import baseline_of, compare
    def record(number, seed, l0, variant="architecture=jumprelu", score=0.2, **training):
        folder = tmp_path/"made"/"orthogonality"/f"run_{number}@{variant}"/f"seed_{seed}"
        folder.mkdir(parents=True)
        run = dict(id=f"orthogonality/{number}", title="Some run", architecture="jumprelu")
        (folder/"config.json").write_text(json.dumps(dict(run=run, preset="made", seed=seed, variant=variant, training=training)))
        (folder/"final_info.json").write_text(json.dumps(dict(l0=l0)))
        (folder/"evals").mkdir()
        (folder/"evals"/"unlearning.json").write_text(json.dumps(dict(eval_result_unstructured=dict(
            score=score, interval=[0, 1], selectivity=0.1, selectivity_interval=[0, 1]))))
        return Record(folder)
    sparser, denser = (f"architecture=jumprelu,sparsity_penalty={p}" for p in (0.08, 0.02))
    for seed in (0, 1):
        for variant, l0 in (("architecture=jumprelu", 40.0), (sparser, 20.0), (denser, 80.0 + seed)): record(0, seed, l0, variant, score=l0 / 100)
    mine = [record(1, 0, 55.0, score=0.5), record(1, 1, 75.0, score=0.7)] # 65 on average: both seeds have the same baseline
    assert [baseline_of(r).variant for r in mine] == [denser, denser]
    assert baseline_of(record(2, 0, 22.0)).variant == sparser and baseline_of(record(3, 0, 39.0, denser)).variant == "architecture=jumprelu"
    other = record(4, 0, 80.0, lr=0.5) # nothing says how the baselines were trained, so all of them fit
    assert baseline_of(other).variant == denser
    assert baseline_of(Record(tmp_path/"made"/"orthogonality"/f"run_0@{denser}"/"seed_0")).variant == "architecture=jumprelu"
    (row,) = [r for r in compare(mine) if r["measure"] == "score"]
    assert row["difference"] == pytest.approx(0.6 - 0.805) and row["seeds"] == 2
    (tmp_path/"made"/"orthogonality"/f"run_0@{denser}"/"seed_1"/"final_info.json").unlink()
    assert baseline_of(mine[0]).variant == denser and baseline_of(mine[1]).variant == "architecture=jumprelu" # what is not finished is none


def test_dictionaries_of_one_pass_are_what_they_would_be_alone(tmp_path):
    """Also where the pass was stopped, and where they had come to different steps."""
    kinds, read, options = ("topk,k=4", "batchtopk,k=8", "relu"), [], dict(steps=12, checkpoint_every=4)
    class Counted(Stream):
        def batches(self, *arguments):
            for batch in super().batches(*arguments):
                if len(batch) == 128: read.append(len(batch)) # and not what weights begin with
                yield batch
    def together(): return OnePass([training(kind, stream=stream, out=tmp_path/kind, **options) for kind in kinds])
    alone = [training(kind, **options).fit(progress=False).fingerprint() for kind in kinds]
    stream = Counted()
    ahead, step = together(), Trainer.one_step
    def stopped(self, batch):
        if self.index == 9 and self.sae.cfg.architecture == "relu": raise InterruptedError
        if self.index == 8 and self.sae.cfg.architecture == "relu": self.save = lambda: None
        step(self, batch)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Trainer, "one_step", stopped)
        with pytest.raises(InterruptedError): ahead.fit(progress=False)
    ahead.trainers[0].save() # of step 10, the others' are of step 8
    assert len(read) == 10
    again = together()
    again.fit(progress=False)
    assert len(read) == 14 and [t.sae.fingerprint() for t in again.trainers] == alone
    with pytest.raises(SaenbError, match="one batch, one seed and one number of steps"): OnePass([training("relu"), training("relu", seed=1)])


def test_what_a_pass_varies():
    assert list(variants("topk", "k=4,8", (0, 2))) == ["k=4,seed=0", "k=4,seed=2", "k=8,seed=0", "k=8,seed=2"]
    assert variants("relu", "lr=0.001")["lr=0.001"] == dict(architecture="relu", start=None, lr=0.001)
    for each, said in (("kk=4", "setting to vary called 'kk'; did you mean k"), ("k=", "no values"), ("lr=fast", "'fast' is no lr")):
        with pytest.raises(SaenbError, match=said): variants("topk", each)
