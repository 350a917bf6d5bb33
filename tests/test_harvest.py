import itertools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open

from saenb.base.errors import SaenbError
from saenb.data.harvest import harvest, harvest_layers, stream_at, token_rows
from saenb.data.store import Store


def test_the_stream_is_the_models_hidden_state(model):
    tokens = torch.randint(6, 200, (3, 20))
    hidden = model.original_model(tokens, output_hidden_states=True).hidden_states
    for layer in range(model.cfg.n_layers - 1):
        assert torch.equal(stream_at(model, tokens, layer), hidden[layer + 1])


def test_the_last_layer_can_be_read_too(model):
    tokens, last = torch.randint(6, 200, (2, 9)), model.cfg.n_layers - 1
    out = {}
    handle = model.original_model.model.layers[last].register_forward_hook(lambda *a: out.update(x=a[2]))
    model.original_model(tokens)
    handle.remove()
    x = out["x"][0] if isinstance(out["x"], tuple) else out["x"]
    assert torch.equal(stream_at(model, tokens, last), x)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["forget", "retain"])), max_size=12),
       st.integers(3, 9))
def test_rows_lose_only_the_tails_of_sides(world, texts, seq_len):
    class Words:
        bos_token_id, eos_token_id = -1, -2
        def __call__(self, batch, add_special_tokens):
            return dict(input_ids=[[int(w) for w in t.split()] for t in batch])
    numbers = itertools.count()
    given_texts = [(" ".join(str(next(numbers)) for _ in range(n)), side) for n, side in texts]
    rows = list(token_rows(given_texts, Words(), seq_len))
    for side, number in (("forget", 1), ("retain", 2)):
        written = [t for text, s in given_texts if s == side for t in [*map(int, text.split()), -2]]
        read = [t for row, s in rows if s == number for t in row[1:]]
        assert read == written[:len(read)] and len(written) - len(read) < seq_len - 1
    assert all(len(row) == seq_len and row[0] == -1 for row, _ in rows)


def test_no_mark_is_kept_and_everything_has_its_place(store, model):
    batch = store.rows()
    tokenizer = model.tokenizer
    assert not torch.isin(batch.token.long(), torch.tensor([tokenizer.bos_token_id, tokenizer.eos_token_id,
                                                            tokenizer.pad_token_id])).any()
    assert batch.position.min() >= 1 and batch.position.max() < store.about["seq_len"]
    assert set(batch.side.tolist()) == {1, 2}
    row = batch.sequence == batch.sequence[0]
    tokens = torch.tensor([[tokenizer.bos_token_id] * store.about["seq_len"]])
    tokens[0, 1:] = tokenizer.eos_token_id
    tokens[0, batch.position[row].long()] = batch.token[row].long()
    torch.testing.assert_close(batch.x[row],
                               stream_at(model, tokens, store.layer)[0, batch.position[row].long()],
                               atol=1e-4, rtol=1e-4)


def test_shards_open_with_anything(store):
    with safe_open(store.path/store.shards[0]["file"], "pt") as f:
        assert set(f.keys()) == {"x", "position", "side", "token", "sequence"}
        assert torch.equal(f.get_tensor("x")[:5], store.rows(0, 5).x)


@pytest.mark.parametrize("after", [1, 450, 899])
def test_an_interrupted_harvest_goes_on_to_the_same_bytes(world, model, store, tmp_path, after):
    class Stop(Exception): pass
    def until(texts):
        for i, t in enumerate(texts):
            if i == after: raise Stop
            yield t
    texts = world.texts("train", 900)
    with pytest.raises(Stop):
        harvest(model, until(texts), world.layer, tmp_path, shard_bytes=2**22)
    if (tmp_path/"store.json").exists():
        with pytest.raises(SaenbError, match="interrupted"):
            Store.open(tmp_path)
    again = harvest(model, texts, world.layer, tmp_path, shard_bytes=2**22)
    assert [s["sha256"] for s in again.shards] == [s["sha256"] for s in store.shards]


def test_bfloat16_stores_read_back(world, model, tmp_path):
    store = harvest(model, world.texts("train", 60), world.layer, tmp_path, dtype="bfloat16")
    assert store.rows(0, 5).x.dtype == torch.bfloat16
    full = harvest(model, world.texts("train", 60), world.layer, tmp_path/"full")
    assert torch.equal(full.rows().x.bfloat16(), store.rows().x)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 5), start=st.integers(0, 40), size=st.sampled_from([128, 1000]),
       balanced=st.booleans(), pool=st.sampled_from([2**20, 2**29]))
def test_reading_can_begin_anywhere(store, seed, start, size, balanced, pool):
    options = dict(size=size, seed=seed, balanced=balanced, pool_bytes=pool)
    whole = [b.token for b in itertools.islice(store.batches(**options), start + 2)]
    part = [b.token for b in itertools.islice(store.batches(**options, start=start), 2)]
    assert all(map(torch.equal, whole[start:], part))


def test_an_epoch_reads_nothing_twice(store):
    batches = itertools.islice(store.batches(64, pool_bytes=2**20), len(store) // 64 - 80)
    places = torch.cat([b.sequence.long() * 1000 + b.position for b in batches])
    assert len(places.unique()) == len(places)


def test_balanced_batches_are_half_and_half(store):
    for batch in itertools.islice(store.batches(256, balanced=True), 20):
        assert batch.side.bincount().tolist() == [0, 128, 128]


def test_bad_stores_say_what_is_wrong(world, model, store, tmp_path):
    copy = harvest(model, world.texts("train", 300), world.layer, tmp_path/"copy", shard_bytes=2**22)
    shard = tmp_path/"copy"/copy.shards[0]["file"]
    data = bytearray(shard.read_bytes())
    data[-3] ^= 255
    shard.write_bytes(data)
    with pytest.raises(SaenbError, match=f"{shard.name} is damaged"):
        Store.open(copy.path).rows()
    shard.write_bytes((store.path/store.shards[-1]["file"]).read_bytes())
    with pytest.raises(SaenbError, match="from another store"):
        Store.open(copy.path).rows()
    shard.unlink()
    with pytest.raises(SaenbError, match=f"{shard.name} is missing"):
        Store.open(copy.path).rows()
    with pytest.raises(SaenbError, match="another layer"):
        harvest(model, [], world.layer + 1, tmp_path/"copy")
    with pytest.raises(SaenbError, match="layers 0 to 3"):
        harvest(model, [], 9, tmp_path/"nine")
    with pytest.raises(SaenbError, match="do not fill one row"):
        harvest(model, ["The host of x"], 1, tmp_path/"short")
    with pytest.raises(SaenbError, match="one batch needs"):
        next(store.batches(10**8))
    (tmp_path/"store.json").write_text(json.dumps(dict(format="something else")))
    with pytest.raises(SaenbError, match="not a saenb store"):
        Store.open(tmp_path)


def test_a_stream_that_is_not_finite_names_the_row(world, model, tmp_path):
    hook = lambda stream, hook: torch.full_like(stream, float("nan"))
    with (model.hooks(fwd_hooks=[("blocks.0.hook_out", hook)]),
          pytest.raises(SaenbError, match="not finite in row 0")):
        harvest(model, world.texts("train", 60), world.layer, tmp_path)


def test_layers_from_one_pass_are_those_of_passes_of_their_own(model, world, tmp_path):
    """Also where one of them is ahead of the other."""
    texts, small = list(world.texts("train", limit=300)), dict(shard_bytes=2**19)
    layers = 1, model.cfg.n_layers - 1
    alone = {layer: harvest(model, texts, layer, tmp_path/f"alone_{layer}", **small) for layer in layers}
    again = {layer: tmp_path/f"again_{layer}" for layer in layers}
    for layer, out in again.items(): # what an interrupted harvest leaves
        done, about = 2 - (layer > 1), alone[layer].about
        assert len(alone[layer].shards) > 2
        out.mkdir()
        for shard in about["shards"][:done]: shutil.copy(alone[layer].path/shard["file"], out)
        (out/"store.json").write_text(json.dumps(about | dict(shards=about["shards"][:done], finished=False)))
    for outs in ({layer: tmp_path/f"new_{layer}" for layer in layers}, again):
        made = harvest_layers(model, texts, outs, **small)
        assert all(made[layer].about == alone[layer].about for layer in layers)
    with pytest.raises(SaenbError, match="no stream at layer 99"):
        harvest_layers(model, texts, {0: tmp_path/"none", 99: tmp_path/"more"})
    assert not (tmp_path/"none").exists()
