import json

import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.data.store import Store
from saenb.sae.architectures import sparsity_loss
from saenb.train.config import TrainConfig, reconstruction_loss, remove_parallel_gradient
from saenb.train.mechanism import Mechanism
from saenb.train.checkpoint import CHECKPOINT, LOG, read_log
from saenb.train.trainer import Trainer

SHORT = TrainConfig(steps=60, warmup=10, checkpoint_every=20, log_every=10, batch=512)


class Kill(Exception): pass


class Noisy(Mechanism):
    """Has a parameter, a buffer and draws, so that all of them have to be resumed; pulls the plug when
    told."""
    kill_at = None

    def __init__(self, d_in, d_sae):
        super().__init__(d_in, d_sae)
        self.mask = torch.nn.Parameter(torch.zeros(d_sae))
        self.register_buffer("count", torch.zeros(d_sae))

    def gate(self, x, f, positions): return f * torch.sigmoid(self.mask)
    def penalty(self, step):
        return dict(spread=0.01 * (self.mask - torch.randn(self.d_sae, generator=step.trainer.generator))
                    .pow(2).mean())
    def after_step(self, step):
        self.count += (step.f > 0).sum(0)
        if step.index == Noisy.kill_at: raise Kill


def test_the_loop_equals_a_plain_one(store, fresh):
    """An independent reference: torch's autograd and Adam on the textbook formulas, in units of the scale."""
    cfg = TrainConfig(steps=30, warmup=5, batch=512, precision="float32", decay=0.0001)
    sae, reference = fresh(), fresh()
    scale = sae.cfg.scale
    trainer = Trainer(sae, store, cfg=cfg)
    W_enc, W_dec, b_enc, b_dec = (p.detach().clone().requires_grad_() for p in (
        reference.W_enc, reference.W_dec, reference.b_enc / scale, reference.b_dec / scale))
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=cfg.lr, eps=1e-8)
    for i, batch in zip(range(30), store.batches(512, cfg.seed)):
        trainer.one_step(batch)
        x, rise = batch.x / scale, min(1, (i + 1) / 5)
        f = torch.relu((x - b_dec) @ W_enc + b_enc)
        loss = ((f @ W_dec + b_dec - x).pow(2).sum(1).mean()
                + cfg.sparsity_penalty * rise * (2304 / store.d_in) ** 0.5 * f.abs().sum(1).mean())
        optimizer.zero_grad()
        loss.backward()
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec.detach()
        for g in optimizer.param_groups: g["lr"] = cfg.lr * rise
        optimizer.step()
        with torch.no_grad(): W_dec /= W_dec.norm(dim=1, keepdim=True)
        trainer.flush()
        assert abs(trainer.history[-1]["loss"] / loss.item() - 1) < 1e-3
    torch.testing.assert_close(sae.W_dec.data, W_dec.data, atol=2e-3, rtol=0)
    torch.testing.assert_close(sae.b_enc.data / scale, b_enc.data, atol=2e-3, rtol=0)


def test_a_baseline_learns(trained, store):
    x = store.rows(0, 4000).x
    with torch.no_grad():
        f = trained.encode(x)
        assert reconstruction_loss(x, trained.decode(f), trained.cfg.scale) < 0.35
        assert (f > 0).float().sum(1).mean() < 20
    assert trained.cfg.training_steps == 800 and trained.fingerprint() != trained.cfg.initial
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(512))


def test_the_penalty_decides_sparsity(store, fresh):
    l0 = []
    for penalty in (0.01, 0.04, 0.16):
        t = Trainer(fresh(), store, cfg=TrainConfig(steps=200, warmup=50, sparsity_penalty=penalty))
        t.fit(progress=False)
        l0.append(t.history[-1]["l0"])
    assert l0[0] > l0[1] > l0[2]


def test_losses_are_in_units_of_the_data(store, fresh):
    sae, x = fresh(), store.rows(0, 8192).x
    torch.testing.assert_close(reconstruction_loss(x, sae.b_dec.expand_as(x), sae.cfg.scale),
                               torch.tensor(1.0))
    assert (reconstruction_loss(10 * x, 10 * sae(x), 10 * sae.cfg.scale).item()
            == pytest.approx(reconstruction_loss(x, sae(x), sae.cfg.scale).item(), rel=1e-4))
    assert (sparsity_loss(torch.ones(5, 3), 2.0, 2304) == 1.5
            and sparsity_loss(torch.ones(5, 3), 2.0, 576) == 3.0)


def test_the_gradient_turns_rows_and_does_not_stretch_them(fresh):
    sae = fresh()
    sae.W_dec.grad = torch.randn_like(sae.W_dec)
    remove_parallel_gradient(sae)
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-5


def test_the_same_seed_gives_the_same_bytes(store, fresh, tmp_path):
    def trained(folder, seed=0):
        torch.manual_seed(seed)
        return Trainer(fresh(), store, [Noisy(store.d_in, 256)], SHORT, tmp_path/folder).fit(progress=False)
    a, b = trained("a"), trained("b")
    assert a.fingerprint() == b.fingerprint()
    assert (tmp_path/"a"/LOG).read_bytes() == (tmp_path/"b"/LOG).read_bytes()


@pytest.mark.parametrize("at", [5, 20, 39, 40, 59])
def test_killed_and_resumed_ends_with_the_same_bytes(store, fresh, tmp_path, at):
    whole = Trainer(fresh(), store, [Noisy(store.d_in, 256)], SHORT, tmp_path/"whole")
    whole.fit(progress=False)
    Noisy.kill_at = at
    try:
        with pytest.raises(Kill):
            Trainer(fresh(), store, [Noisy(store.d_in, 256)], SHORT, tmp_path/"killed").fit(progress=False)
    finally: Noisy.kill_at = None
    with open(tmp_path/"killed"/LOG, "a") as f:
        f.write('{"step": 99') # a line cut short by the kill
    if not (tmp_path/"killed"/CHECKPOINT).exists(): assert at < 20
    resumed = Trainer(fresh(), store, [Noisy(store.d_in, 256)], SHORT, tmp_path/"killed")
    resumed.fit(progress=False)
    assert resumed.sae.fingerprint() == whole.sae.fingerprint()
    assert torch.equal(resumed.mechanisms[0].count, whole.mechanisms[0].count)
    assert (tmp_path/"killed"/LOG).read_bytes() == (tmp_path/"whole"/LOG).read_bytes()


def test_a_checkpoint_of_something_else_is_refused(store, fresh, tmp_path):
    Trainer(fresh(), store, cfg=SHORT, out=tmp_path).fit(progress=False)
    with pytest.raises(SaenbError, match="other settings"):
        Trainer(fresh(), store, cfg=TrainConfig(steps=61), out=tmp_path).fit(progress=False)
    (tmp_path/CHECKPOINT).write_bytes(b"junk")
    with pytest.raises(SaenbError, match="not a readable checkpoint"):
        Trainer(fresh(), store, cfg=SHORT, out=tmp_path).fit(progress=False)


class Overflows(Mechanism):
    """A term that overflows at step 33."""
    def penalty(self, step):
        return dict(boom=step.f.mean() * (float("inf") if step.index == 33 else 1.0))


def test_a_loss_that_is_no_number_names_step_term_and_mechanism(store, fresh, tmp_path):
    with pytest.raises(SaenbError, match=r"step 33: the term 'Overflows.boom' of Overflows is not "
                           r"finite.*checkpoint of step 20 is kept"):
        Trainer(fresh(), store, [Overflows(store.d_in, 256)], SHORT, tmp_path).fit(progress=False)
    from saenb.base.files import read_tensors
    tensors, about = read_tensors(tmp_path/CHECKPOINT)
    assert about["step"] == 20 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_data_that_is_no_number_is_named(store, fresh, tmp_path):
    import hashlib, shutil
    from safetensors.torch import load_file, save_file
    shutil.copytree(store.path, tmp_path/"store")
    shard = tmp_path/"store"/store.shards[0]["file"]
    columns = load_file(shard)
    columns["x"][100, 3] = float("nan")
    save_file(columns, shard)
    about = json.loads((tmp_path/"store"/"store.json").read_text())
    about["shards"][0]["sha256"] = hashlib.sha256(shard.read_bytes()).hexdigest()
    (tmp_path/"store"/"store.json").write_text(json.dumps(about))
    row, position = columns["sequence"][100].item(), columns["position"][100].item()
    with pytest.raises(SaenbError, match=f"because the data is not .row {row}, position {position} of"):
        Trainer(fresh(), Store.open(tmp_path/"store"),
                cfg=TrainConfig(steps=2000, batch=2048)).fit(progress=False)


@pytest.mark.parametrize("cfg, said", [
    (TrainConfig(tokens=1000), "1,000 tokens are less than one batch of 2,048"),
    (TrainConfig(), "set steps or tokens"),
    (TrainConfig(steps=3, batch=10**7), "one batch needs 10,000,000"),
])
def test_a_length_that_makes_no_sense(store, fresh, cfg, said):
    with pytest.raises(SaenbError, match=said):
        Trainer(fresh(), store, cfg=cfg)


def test_zero_steps_may_be_asked_for_by_name(store, fresh):
    sae = Trainer(fresh(), store, cfg=TrainConfig(steps=0)).fit(progress=False)
    assert sae.cfg.training_steps == 0 and sae.fingerprint() == sae.cfg.initial


def test_a_store_of_another_width(store):
    from saenb.sae.sae import SAE, SAEConfig
    with pytest.raises(SaenbError, match="192 wide and the dictionary reads 64"):
        Trainer(SAE(SAEConfig(d_in=64, d_sae=8)), store)


def test_the_log_has_the_digits_of_float32(store, fresh, tmp_path):
    """What is written is what is remembered, in seven digits."""
    t = Trainer(fresh(), store, cfg=TrainConfig(steps=40, warmup=10, batch=128, log_every=10), out=tmp_path)
    t.fit(progress=False)
    assert read_log(tmp_path/LOG) == t.history and len(t.history) == 4
    for line in t.history:
        numbers = [v for v in line.values() if isinstance(v, float)]
        assert numbers and all(v == float(f"{v:.7g}") for v in numbers)


def test_dead_features_are_counted(store, fresh):
    sae = fresh()
    with torch.no_grad(): sae.b_enc[:64] = -1e6
    t = Trainer(sae, store, cfg=TrainConfig(steps=80, warmup=10, batch=512))
    t.fit(progress=False)
    assert 64 / 256 <= t.history[-1]["dead"] < 0.5


def test_bfloat16_follows_float32(store, fresh):
    last = []
    for precision in ("float32", "bfloat16"):
        t = Trainer(fresh(), store, cfg=TrainConfig(steps=150, warmup=20, precision=precision))
        t.fit(progress=False)
        last.append(t.history[-1]["loss"])
    assert last[1] == pytest.approx(last[0], rel=0.02)
