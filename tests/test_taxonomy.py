"""Features named by a taxonomy: a known answer is found, chance finds nothing, counts are plain counts, bad input is one sentence."""
import json
import os
from pathlib import Path

import pytest
import torch
from sklearn.metrics import matthews_corrcoef, precision_score, recall_score, roc_auc_score

from saenb.base.errors import SaenbError
from saenb.base.files import write_json
from saenb.base.schemas import schema_error
from saenb.data.facts import write_rows
from saenb.data.wordnet import WordNet
from saenb.evals.evaluation import Readings
from saenb.evals.taxonomy import (
    MEASURES, TREE, TaxonomySetup, Tree, agreement, choose, labelled, midranks, name_features, names_of, names_shape,
    shipped, shipped_rows, strongest, subtrees, taxonomy)
from saenb.sae.sae import SAE, SAEConfig

DATABASE = os.environ.get("SAENB_WORDNET", "/usr/share/wordnet")


@pytest.fixture(scope="module")
def tree():
    """Twelve breeds below dogs or cats, eight kinds of trees, ten of tools; a wolf-dog lies below two."""
    rows = [dict(id="thing", word="thing", above=[])] + [dict(id=i, word=i, above=[a]) for i, a in (
        ("animal", "thing"), ("plant", "thing"), ("tool", "thing"), ("dog", "animal"), ("cat", "animal"), ("tree", "plant"))]
    for kind, count in (("dog", 6), ("cat", 6), ("tree", 8), ("tool", 10)):
        rows += [dict(id=f"{kind}{i}", word=f"{kind} {i}", above=[kind]) for i in range(count)]
    return Tree([*rows, dict(id="mix", word="mix", above=["dog0", "cat0", "nowhere"])])


@pytest.fixture(scope="module")
def labels():
    """Six hundred texts, twenty of each kind."""
    kinds = [f"{kind}{i}" for kind, count in (("dog", 6), ("cat", 6), ("tree", 8), ("tool", 10)) for i in range(count)]
    return kinds * 20


def made(tree, labels, features=60):
    """Features 0 to 3: dogs, animals with noise, trees but for half of them, all texts; the rest random."""
    x = torch.rand(len(labels), features, generator=torch.Generator().manual_seed(1)) * (torch.rand(len(labels), features, generator=torch.Generator().manual_seed(2)) < 0.1)
    inside = lambda id: torch.tensor([id in tree.ancestors(label) for label in labels])
    luck = torch.rand(len(labels), generator=torch.Generator().manual_seed(3))
    x[:, 0] = inside("dog") * (1 + luck)
    x[:, 1] = (inside("animal") | (luck < 0.05)).float()
    x[:, 2] = (inside("tree") & (luck < 0.5)).float()
    x[:, 3] = 1
    return x


def test_a_known_answer_is_found(tree, labels):
    found = name_features(made(tree, labels), labels, tree)
    named = dict(zip(found["feature"], found["synset"]))
    # the lowest of concepts with the same texts: a tree is all that there is of plants
    assert named == {0: "dog", 1: "animal", 2: "tree"} and found["names"]["dog"] == "dog (animal)"
    assert found["correlation"] == sorted(found["correlation"], reverse=True)
    fit = {f: {m: found[m][i] for m in MEASURES} for i, f in enumerate(found["feature"])}
    assert all(v == 1 for v in fit[0].values()) and fit[1]["recall"] == 1 > fit[1]["precision"] > 0.8
    assert fit[2]["precision"] == 1 and 0.3 < fit[2]["recall"] < 0.7 and found["named_if_shuffled"] == 0
    assert found["auroc_of"]["real labels"][-1] > found["auroc_of"]["shuffled labels"][-1] + 0.2


def test_chance_names_nothing(tree, labels):
    x = torch.rand(len(labels), 400, generator=torch.Generator().manual_seed(0)) * (torch.rand(len(labels), 400, generator=torch.Generator().manual_seed(5)) < 0.2)
    found = name_features(x, labels, tree)
    assert found["alive"] == 400 and len(found["feature"]) <= 2 and found["beyond_chance"] <= 12
    halves = [found["auroc_of"][k][2] for k in ("real labels", "shuffled labels")]
    assert all(abs(median - 0.5) < 0.02 for median in halves)


def test_numbers_are_scikit_learns(tree, labels):
    x, (ids, member) = made(tree, labels), subtrees(tree, labels, 10)
    active = x > 0.5
    found = agreement(x, active, member)
    for f, id in ((1, "dog"), (7, "tree"), (20, "tool")):
        k, inside = ids.index(id), [id in tree.ancestors(label) for label in labels]
        assert member[:, k].bool().tolist() == inside
        on = active[:, f].tolist()
        for m, expected in (("auroc", roc_auc_score(inside, x[:, f])), ("correlation", matthews_corrcoef(inside, on)),
                            ("precision", precision_score(inside, on)), ("recall", recall_score(inside, on))):
            assert found[m][f, k].item() == pytest.approx(expected, abs=1e-5), m
    assert midranks(torch.tensor([[3.0], [1.0], [3.0], [0.0]]))[:, 0].tolist() == [3.5, 2, 3.5, 1]


def test_names_are_judged_by_texts_that_did_not_choose_them(tree, labels):
    x, setup = made(tree, labels), TaxonomySetup()
    _, member = subtrees(tree, labels, 10)
    one, other = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).tensor_split(2)
    before = choose(x, member, setup)
    changed = x.clone()
    changed[other] = changed[other].flip(0) # the judging half is exchanged: the choice is as it was
    after = choose(changed, member, setup)
    assert torch.equal(before["concept"], after["concept"]) and before["auroc"][0] == 1 > after["auroc"][0]
    assert (after["level"] == before["level"]).all()


def test_silent_features_get_no_name(tree, labels):
    x = made(tree, labels, 5)
    x[:, 4] = 0
    x[:3, 4] = 1 # too seldom
    found = name_features(x, labels, tree)
    assert 4 not in found["feature"] and 3 not in found["feature"] and found["alive"] == 4
    silent = name_features(torch.zeros(len(labels), 3), labels, tree)
    assert silent["alive"] == 0 and silent["feature"] == [] and schema_error(silent | dict(dictionary="a", l0=0, examples=[]), names_shape) is None


def test_trees(tree):
    assert tree.ancestors("mix") == {"mix", "dog0", "cat0", "dog", "cat", "animal", "thing"} and "concepts" in repr(tree)
    assert tree.name("thing") == "thing" and tree.name("dog") == "dog (animal)"
    loop = Tree([dict(id="a", word="a", above=["b"]), dict(id="b", word="b", above=["a"])])
    assert loop.ancestors("a") == {"a", "b"}
    with pytest.raises(SaenbError, match="has no concept 'unicorn'"): tree.ancestors("unicorn")
    with pytest.raises(SaenbError, match="needs id, word and above"): Tree([dict(id="a", word="a")])


def test_what_ships():
    tree, texts = shipped()
    assert len(texts) == 7180 and len({t for t, _ in texts}) > 7100 and TREE.stat().st_size < 200_000
    assert sum(tree.word[id].lower() in text.lower() for text, id in texts) > 7170
    entity, = (id for id, word in tree.word.items() if word == "entity")
    assert all(entity in tree.ancestors(id) for _, id in texts)
    words = {tree.word[a] for a in tree.ancestors(next(id for _, id in texts if tree.word[id] == "corgi"))}
    assert {"dog", "canine", "carnivore", "mammal", "animal"} <= words


@pytest.mark.skipif(not Path(DATABASE, "data.noun").exists(), reason="SAENB_WORDNET names no folder of the database")
def test_what_ships_comes_from_the_database(tmp_path):
    net = WordNet.read(DATABASE)
    if len(net.synsets) != 117_791: pytest.skip("another version of WordNet")
    write_rows(tmp_path/"tree.jsonl.gz", shipped_rows(net))
    assert (tmp_path/"tree.jsonl.gz").read_bytes() == TREE.read_bytes()


@pytest.fixture(scope="module")
def sae(model):
    sae = SAE(SAEConfig(d_in=model.cfg.d_model, d_sae=24, hook_layer=0))
    return sae.initialise(torch.randn(256, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)), 0)


def test_a_dictionary_is_named_from_texts_of_ones_own(model, world, sae, tree, labels, tmp_path):
    readings = Readings(model, world.layer)
    texts = [(f"Which {label} is the question ?", label) for label in labels]
    found = taxonomy(readings, sae, tree, texts, TaxonomySetup(texts=60, least=2))
    assert found["texts"] == 60 and found["features"] == 24 and schema_error(json.loads(json.dumps(found)), names_shape) is None
    assert found == taxonomy(readings, sae, tree, texts, TaxonomySetup(texts=60, least=2))
    strength, l0 = strongest(readings, sae, ["The question", "", "The question is long and longer"])
    alone, _ = strongest(readings, sae, ["The question"])
    torch.testing.assert_close(strength[0], alone[0])
    assert not strength[1].any() and l0 > 0
    write_rows(tmp_path/"texts.jsonl", [dict(text=t, synset=s) for t, s in texts])
    write_rows(tmp_path/"tree.jsonl", [dict(id=i, word=tree.word[i], above=list(tree.above[i])) for i in tree.word])
    own, read = labelled(tmp_path/"texts.jsonl", tmp_path/"tree.jsonl")
    assert read == texts and own.word == tree.word
    with pytest.raises(SaenbError, match="has no column 'synset'"):
        write_rows(tmp_path/"odd.jsonl", [dict(text="a", label="dog")])
        labelled(tmp_path/"odd.jsonl", tmp_path/"tree.jsonl")
    with pytest.raises(SaenbError, match="cannot be read"): labelled(tmp_path/"none.jsonl", tmp_path/"tree.jsonl")
    with pytest.raises(SaenbError, match="has no concept"): taxonomy(readings, sae, Tree([]), texts, TaxonomySetup(texts=60))


def test_names_belong_to_one_dictionary(sae, model, world, tree, labels, tmp_path):
    texts = [(f"Which {label} ?", label) for label in labels[:120]]
    found = taxonomy(Readings(model, world.layer), sae, tree, texts, TaxonomySetup(texts=120, least=2))
    path = tmp_path/"names.json"
    write_json(path, found)
    assert names_of(path, sae)["dictionary"] == sae.fingerprint()
    with pytest.raises(SaenbError, match="another dictionary"): names_of(path, SAE(SAEConfig(d_in=8, d_sae=8)).initialise(torch.randn(32, 8), 0))
    for odd in (dict(feature=[1]), dict(names="x"), dict(auroc=[3]), dict(dictionary=5), dict(synset=["gone"], feature=[0], **{m: [0.5] for m in MEASURES}, active=[1], names={})):
        write_json(path, found | odd)
        with pytest.raises(SaenbError, match="is not a file of names as it was written"): names_of(path, sae)
    path.write_text("{")
    with pytest.raises(SaenbError, match="is not a readable file of names"): names_of(path, sae)


def test_bad_input_is_one_sentence(tree, labels, model, world):
    x = made(tree, labels, 5)
    with pytest.raises(SaenbError, match="600 rows of activations and 599 labels"): name_features(x, labels[1:], tree)
    with pytest.raises(SaenbError, match="No concept has 10 texts"): name_features(x[:6], labels[:6], tree)
    for odd in (dict(texts=3), dict(least=0), dict(active=1.5), dict(chance=-0.1), dict(precision=2.0), dict(shown=-1), dict(random_seed=-1)):
        with pytest.raises(SaenbError, match=f"{next(iter(odd))} is"): TaxonomySetup(**odd)
    with pytest.raises(SaenbError, match="width 8 and the model's is 192"):
        taxonomy(Readings(model, world.layer), SAE(SAEConfig(d_in=8, d_sae=8)), tree, [("a", "dog")] * 9)


def test_the_command(called, one_sentence, tmp_path):
    one_sentence(called("name", tmp_path/"none"), "none")
    one_sentence(called("name", tmp_path/"none", "--tree", "tree.jsonl"), "--texts")
    one_sentence(called("name", tmp_path/"none", "--count", "0"), "whole number of 1 or more")
