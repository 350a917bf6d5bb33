"""Decoder rows that are free in training: as a plain training of free rows, and a dictionary with rows of length one at any time."""
import json

import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.base.signals import Stopped
from saenb.cli import main
from saenb.lab.one_pass import train_each
from saenb.lab.training import train
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import FIRST_LENGTH, FreeRows, TrainConfig
from saenb.train.trainer import Trainer

CFG = TrainConfig(steps=40, batch=256, lr=0.02, warmup=5, decay=0.3, log_every=5, checkpoint_every=10, rows="free")


def fresh(store, kind="topk,k=8,aux=0"):
    return SAE(SAEConfig(store.d_in, 96, store.hook_name, store.layer, architecture=kind)).initialise(store.rows(0, 4096).x, 0)


def fit(store, kind, cfg=CFG, **more): return Trainer(fresh(store, kind), store, cfg=cfg, **more).fit(progress=False)


def plainly(store, k, cfg):
    """Rows of any length, autograd and Adam, nothing else: the encoder's columns are longer by the rows' lengths, and rows are divided by them."""
    sae = fresh(store)
    W_enc, W_dec, b_enc = ((FIRST_LENGTH * p.detach()).requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc))
    b_dec, scale = sae.b_dec.detach().clone().requires_grad_(), sae.cfg.scale
    optimizer = torch.optim.Adam([dict(params=[W_enc, W_dec], rate=1), dict(params=[b_enc, b_dec], rate=scale)])
    for step, batch in zip(range(cfg.steps), store.batches(cfg.batch, cfg.seed)):
        share = min(1, (step + 1) / cfg.warmup) * min(1, (cfg.steps - step) / round(cfg.steps * cfg.decay))
        for group in optimizer.param_groups: group["lr"] = cfg.lr * share * group["rate"]
        length, x = W_dec.norm(dim=1), batch.x.float()
        f = torch.relu((x - b_dec) @ W_enc + b_enc) * length
        top = f.topk(k, dim=1)
        error = torch.zeros_like(f).scatter(1, top.indices, top.values) / length @ W_dec + b_dec - x
        optimizer.zero_grad()
        (error.pow(2).sum() / len(x) / scale**2).backward()
        optimizer.step()
    with torch.no_grad():
        length = W_dec.norm(dim=1)
        return dict(W_enc=W_enc * length, W_dec=W_dec / length[:, None], b_enc=b_enc * length, b_dec=b_dec)


def test_rows_move_as_if_they_were_free(store):
    ours, theirs = fit(store, "topk,k=8,aux=0"), plainly(store, 8, CFG)
    x = store.rows(5000, 7000).x.float()
    for name, p in theirs.items():
        assert torch.allclose(getattr(ours, name), p, rtol=1e-2, atol=2e-3 * p.abs().max().item()), name
    f = torch.relu((x - theirs["b_dec"]) @ theirs["W_enc"] + theirs["b_enc"])
    top = f.topk(8, dim=1)
    there = torch.zeros_like(f).scatter(1, top.indices, top.values) @ theirs["W_dec"] + theirs["b_dec"]
    assert ((ours(x) - there).norm() / (x - x.mean(0)).norm()).item() < 0.01


@pytest.mark.parametrize("kind", ["topk,k=8", "batchtopk,k=8", "matryoshka,k=8"])
def test_what_is_trained_has_rows_of_length_one_and_explains_the_stream(kind, store):
    unit, sae = (fit(store, kind, TrainConfig(**vars(CFG) | dict(rows=rows))) for rows in ("unit", "free"))
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-5) and sae.fingerprint() != unit.fingerprint()
    x = store.rows(5000, 7000).x.float()
    assert ((sae(x) - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item() < 0.5


@pytest.mark.parametrize("run", ["contrastive/3", "positional/10", "dual_objective/5"])
def test_ideas_take_part(run, store, tmp_path):
    sae = train(store.path, tmp_path, run=run, architecture="topk,k=8", rows="free", steps=20, batch=256, d_sae=96, progress=False).sae
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(96), atol=1e-5) and sae.W_enc.isfinite().all()


def test_a_training_that_is_stopped_ends_with_the_same_bytes(store, tmp_path):
    whole = fit(store, "topk,k=8", out=tmp_path/"whole")

    def stop(line):
        if line["step"] == 25: raise Stopped(2)
    with pytest.raises(Stopped): fit(store, "topk,k=8", out=tmp_path/"stopped", watch=stop)
    again = fit(store, "topk,k=8", out=tmp_path/"stopped")
    assert again.fingerprint() == whole.fingerprint()
    with pytest.raises(SaenbError, match="other settings"): fit(store, "topk,k=8", TrainConfig(**vars(CFG) | dict(rows="unit")), out=tmp_path/"stopped")


def test_features_that_are_reset_or_change_places_take_their_lengths_along(store):
    plain, moved = (Trainer(fresh(store, "topk,k=8"), store, cfg=CFG) for _ in range(2))
    order, batches = torch.randperm(96, generator=torch.Generator().manual_seed(0)), list(zip(range(11), plain.reading(0)))
    for i, batch in batches:
        if i == 10: moved.reorder(order)
        for trainer in (plain, moved): trainer.take(batch)
    lengths = plain.free.lengths[order]
    assert (lengths > 2 * FIRST_LENGTH).all() and torch.equal(moved.free.lengths, lengths)
    x = store.rows(0, 2048).x.float()
    moved.reset_features(torch.tensor([3, 5]), x[:2] - x.mean(0), x)
    assert (moved.free.lengths[[3, 5]] == FIRST_LENGTH).all() and torch.equal(moved.free.lengths[:3], lengths[:3])
    assert torch.allclose(moved.sae.W_enc[:, 3], FIRST_LENGTH**2 * moved.sae.W_dec[3])


def test_a_trained_dictionary_is_not_shortened(store):
    sae = fit(store, "topk,k=8")
    before = sae.fingerprint()
    assert (FreeRows(sae).lengths == 1).all() and sae.fingerprint() == before


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "gated"])
def test_rows_are_free_only_where_features_are_chosen_by_rank(kind, store):
    with pytest.raises(SaenbError, match=f"(?s){kind}.*topk"): fit(store, kind)


def test_a_kind_of_rows_that_does_not_exist_is_refused():
    with pytest.raises(SaenbError, match="kind of decoder rows"): TrainConfig(steps=1, rows="long")
    assert "rows" not in TrainConfig(steps=1).as_dict() and CFG.as_dict()["rows"] == "free"


def test_the_command_trains_with_free_rows_alone_and_several_in_one_pass(store, tmp_path, capsys):
    length = dict(steps=20, batch=256, d_sae=96, progress=False, rows="free")
    asked = f"train {store.path} {tmp_path/'one'} --architecture topk,k=8 --rows free --steps 20 --batch 256 --d-sae 96 --json"
    assert main(asked.split()) == 0
    assert json.loads(capsys.readouterr().out)["training_steps"] == 20
    alone = train(store.path, tmp_path/"alone", architecture="topk,k=8", **length).sae.fingerprint()
    assert SAE.load(tmp_path/"one"/"sae").fingerprint() == alone
    both = train_each(store.path, tmp_path/"both", "k=4,8", (), "topk", **length)
    assert alone in {t.sae.fingerprint() for t in both.values()}
    assert main(f"train {store.path} {tmp_path/'no'} --rows free --steps 20 --batch 256 --d-sae 96".split()) == 2
    assert "chosen by rank" in capsys.readouterr().err
