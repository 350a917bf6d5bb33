"""Sequences that begin alike: laid over each other rightly, and read as the model reads each of them whole."""
import shutil

import pytest
import torch
from hypothesis import given, strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from saenb.data.shared_prefixes import SHARING, Trie, prefix_ids, final_logits, replaced, supports_prefix_sharing
from saenb.data.sources import boot

token_rows = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=30)
DEPTH = 3


@given(token_rows)
def test_names_are_equal_where_beginnings_are(rows):
    named = {}
    for row, names in zip(rows, prefix_ids([torch.tensor(r) for r in rows])):
        assert len(names) == len(row)
        for place, name in enumerate(names.tolist()): named.setdefault(name, set()).add(tuple(row[:place + 1]))
    assert all(len(prefixes) == 1 for prefixes in named.values())
    assert len(named) == len({tuple(row[:n + 1]) for row in rows for n in range(len(row))})


def test_there_may_be_no_rows(): assert prefix_ids([]) == [] # of a model that knows no question


@given(token_rows)
def test_a_trie_holds_every_sequence_and_asks_for_every_node_once(rows):
    trie = Trie(prefix_ids([torch.tensor(r) for r in rows]))
    spelled = [rows[s][p] for s, p in zip(trie.sequence.tolist(), trie.place.tolist())]
    for i, row in enumerate(rows):
        path = trie.path[i, :len(row)]
        assert [spelled[n] for n in path] == row and trie.place[path].tolist() == list(range(len(row)))
        assert trie.leaves[trie.leaf[i]] == path[-1]
    asked = torch.cat([path.gather(1, at)[wanted] for path, at, wanted in trie.queries()])
    assert sorted(asked.tolist()) == list(range(len(trie)))
    ends = torch.cat([path.gather(1, at)[wanted] for path, at, wanted in trie.last_queries()])
    assert ends.tolist() == trie.leaves.tolist()


@given(token_rows, st.integers(1, 3))
def test_several_last_places_may_answer(rows, most):
    ends = [min(len(row), most) for row in rows]
    trie = Trie(prefix_ids([torch.tensor(r) for r in rows]), ends)
    wanted = [trie.path[i, place].item() for i, row in enumerate(rows) for place in range(len(row) - ends[i], len(row))]
    assert trie.leaves[trie.leaf].tolist() == wanted
    assert torch.cat([path.gather(1, at)[here] for path, at, here in trie.last_queries()]).tolist() == trie.leaves.tolist()


@pytest.fixture(scope="module", params=[*SHARING, "gpt2"])
def pair(request, world, tmp_path_factory):
    """A small random model of one architecture, as we read it and as transformers does; windows are short where there are any."""
    torch.manual_seed(0)
    sizes = dict(n_embd=32, n_head=4, n_layer=DEPTH, n_positions=64) if request.param == "gpt2" else dict(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=DEPTH, intermediate_size=48, max_position_embeddings=64, sliding_window=5)
    if request.param == "gemma3_text": sizes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = AutoConfig.for_model(request.param, vocab_size=344, initializer_range=0.3, bos_token_id=2, eos_token_id=1, pad_token_id=0, **sizes)
    folder = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in (world.path/"model").glob("*token*"): shutil.copy(file, folder)
    return boot(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def rows():
    """Sequences of several lengths, many of which begin alike, two of them equal."""
    draw = torch.Generator().manual_seed(0)
    stems = torch.randint(3, 344, (4, 9), generator=draw)
    found = [torch.cat([stems[i % 4, :3 + i % 7], torch.randint(3, 6, (1 + i % 9,), generator=draw)]) for i in range(60)]
    return found + found[:1]


def test_every_architecture_reads_a_trie_as_it_reads_whole_sequences(pair, rows):
    model, plain = pair
    assert supports_prefix_sharing(model) == (plain.config.model_type != "gpt2")
    trie = Trie(prefix_ids(rows))
    tokens = torch.stack([rows[s][p] for s, p in zip(trie.sequence, trie.place)])
    with torch.no_grad(): outs = [plain(row[None], output_hidden_states=True) for row in rows]
    wanted = torch.stack([o.logits[0, -1] for o in outs])
    assert wanted.std() > 0.1
    torch.testing.assert_close(final_logits(model, trie, tokens), wanted, rtol=1e-4, atol=1e-4)
    for entered in range(1, DEPTH): # hidden_states[i] is what enters block i
        stream = torch.stack([outs[s].hidden_states[entered][0, p] for s, p in zip(trie.sequence, trie.place)])
        torch.testing.assert_close(final_logits(model, trie, stream, entered), wanted, rtol=1e-4, atol=1e-4)


def test_a_model_is_itself_again_afterwards(pair, rows):
    """Also when something went wrong on the way."""
    model, plain = pair
    before = model.original_model.config._attn_implementation
    trie = Trie(prefix_ids(rows))
    with pytest.raises(Exception): final_logits(model, trie, torch.zeros(len(trie), 31), 1)
    assert model.original_model.config._attn_implementation == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad(): torch.testing.assert_close(model(rows[0][None], return_type="logits"), plain(rows[0][None]).logits, rtol=1e-4, atol=1e-4)


def test_each_beginning_is_read_once(model, exam):
    """The first block above sees as many tokens as there are beginnings, the last MLP one token a sequence that is not another's."""
    trie = Trie(exam.prefixes)
    seen = {}
    def watched(block):
        whole = model.blocks[block].mlp.forward
        return lambda x, *args, **kwargs: (seen.update({block: tuple(x.shape)}), whole(x, *args, **kwargs))[1]
    with replaced({model.blocks[b].mlp: watched(b) for b in (1, 3)}):
        final_logits(model, trie, exam.stream[exam.starts[trie.sequence] + trie.place], 1)
    different = {tuple(t[:n + 1].tolist()) for t in exam.tokens for n in range(len(t))}
    assert seen == {1: (1, len(different), model.cfg.d_model), 3: (1, len(exam.tokens), model.cfg.d_model)}
    assert len(different) < 0.7 * len(exam.stream)


def test_weights_in_half_precision(world, rows):
    """To within what bfloat16 keeps."""
    model = boot(world.path/"model", dtype="bfloat16")
    trie = Trie(prefix_ids(rows))
    found = final_logits(model, trie, torch.stack([rows[s][p] for s, p in zip(trie.sequence, trie.place)]))
    with torch.no_grad():
        wanted = torch.stack([model.original_model(row[None]).logits[0, -1] for row in rows])
        entered = torch.cat([model.original_model(row[None], output_hidden_states=True).hidden_states[2][0] for row in rows])
    starts = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    stream = entered.float()[starts[trie.sequence] + trie.place] # as dictionaries hand it on
    assert found.dtype == torch.bfloat16 and (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()
    assert (final_logits(model, trie, stream, 2) - wanted).abs().mean() < 0.02 * wanted.abs().mean()
