"""The page that shows a dictionary's features: its numbers against plain counts, and that nothing in it escapes."""
import base64
import gc
import gzip
import json
import re
import signal
import threading
from dataclasses import replace
from http.client import HTTPConnection
from http.server import HTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.base.signals import Stopped, stop_at_once
from saenb.evals.evaluation import encoded
from saenb.evals.exam import feature_stats
from saenb.evals.interventions.intervention import plain_answers
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.unlearning import evaluate
from saenb.lab.feature_commands import _serve
from saenb.report.explorer import (
    AFTER, BEFORE, BINS, POOL, QUANTILES, explore, lost_alone, page, peaks, spread, unpacked, write_page)
from saenb.report.explorer_server import BODY, LONGEST, server, try_text
from saenb.report.feature_words import label, logit_effects, spelt, word_at
from saenb.report.neuronpedia import Source, export_neuronpedia
from saenb.sae.sae import SAE, SAEConfig


@pytest.fixture(scope="module")
def result(exam, trained): return evaluate(exam.model, trained, exam.setup, exam)


@pytest.fixture(scope="module")
def found(exam, trained, setting, result): return explore(exam, trained, result, contexts=3, effects=4)


@pytest.fixture(scope="module")
def arrays(found):
    assert found["strongest"] == 3 and found["contexts"] == 3 + len(QUANTILES)
    all_of = found["contexts"]
    shapes = dict(histogram=(-1, 2, BINS), peaks=(-1, all_of), context_side=(-1, all_of), peak_tokens=(-1, 3),
                  context_tokens=(-1, all_of, BEFORE + 1 + AFTER), context_activations=(-1, all_of, BEFORE + 1 + AFTER),
                  nearest=(-1, found["nearest"]), cosines=(-1, found["nearest"]),
                  **dict.fromkeys(("promoted", "promoted_by", "suppressed", "suppressed_by"), (-1, 8)))
    return {name: unpacked(a).reshape(shapes.get(name, -1)) for name, a in found["arrays"].items()}


@pytest.fixture(scope="module")
def read(exam, trained):
    """All text of both corpora: side, tokens, which of them are text, activations; row by row."""
    rows = []
    for number, side in enumerate(("forget", "retain")):
        for tokens, stream, keep in exam.readings.corpus(exam.setup, side):
            f = encoded(trained, stream).detach() * keep[..., None]
            rows += [(number, t, k, a) for t, k, a in zip(tokens, keep, f)]
    return rows


def test_densities_and_strengths_are_counted(found, arrays, read, exam, trained):
    use = feature_stats(exam, trained)
    np.testing.assert_allclose(arrays["forget"], use.forget, atol=1e-6)
    np.testing.assert_allclose(arrays["retain"], use.retain, atol=1e-6)
    assert found["sizes"] == [sum(int(k.sum()) for s, _, k, _ in read if s == side) for side in (0, 1)]
    for feature in (0, 17, 300):
        values = [torch.cat([a[:, feature] for s, _, _, a in read if s == side]) for side in (0, 1)]
        largest = max(v.max() for v in values)
        assert arrays["largest"][feature] == pytest.approx(largest.item())
        for side, v in enumerate(values):
            expected = np.histogram(v[v > 0], BINS, (0, largest.item()))[0]
            assert np.abs(arrays["histogram"][feature, side] - expected).sum() <= 2 # values at the edge of a bin
            assert arrays["histogram"][feature, side].sum() == (v > 0).sum()


def test_texts_are_those_where_it_is_strongest(found, arrays, read, exam):
    words = found["tokens"]
    for feature in (0, 17, 300):
        best = sorted(((a[:, feature].max().item(), i) for i, (_, _, _, a) in enumerate(read)), reverse=True)[:3]
        assert arrays["peaks"][feature, :3] == pytest.approx([v for v, _ in best])
        for c, (value, i) in enumerate(best):
            if value == 0: continue
            side, tokens, keep, a = read[i]
            at = int(a[:, feature].argmax())
            assert arrays["context_side"][feature, c] == side
            for n, place in enumerate(range(at - BEFORE, at + AFTER + 1)):
                told = arrays["context_tokens"][feature, c, n]
                if 0 <= place < len(tokens) and keep[place]:
                    assert words[told] == exam.model.tokenizer.decode([int(tokens[place])])
                    assert arrays["context_activations"][feature, c, n] == pytest.approx(255 * a[place, feature].item() / arrays["largest"][feature], abs=0.51)
                else: assert told == len(words) and arrays["context_activations"][feature, c, n] == 0
            assert arrays["peak_tokens"][feature, c] == arrays["context_tokens"][feature, c, BEFORE]


def test_a_silent_feature_has_no_text(exam, setting, trained):
    sae = SAE(trained.cfg)
    sae.load_state_dict(trained.state_dict())
    with torch.no_grad(): sae.b_enc[5] = -1e6
    found = peaks(exam.readings, exam.setup, sae, 2)
    assert not found["value"][:, 5].any() and (found["row"][:, 5] == -1).all()
    shown = explore(exam, sae, contexts=2, effects=0)
    tokens = np.frombuffer(base64.b64decode(shown["arrays"]["context_tokens"]["bytes"]), shown["arrays"]["context_tokens"]["kind"]).reshape(-1, 2 + len(QUANTILES), BEFORE + 1 + AFTER)
    assert (tokens[5] == len(shown["tokens"])).all() and shown["clamped"] == [] and shown["labels"][5] == ""
    assert np.isnan(np.frombuffer(base64.b64decode(shown["arrays"]["lost_forget"]["bytes"]), "float32")).all()


def test_the_clamped_are_those_of_the_evaluation(found, result, exam, trained):
    best, use = result["eval_result_unstructured"]["best"], feature_stats(exam, trained)
    assert found["clamped"] == best["features"] and found["clamped"]
    chosen = next(s["features"] for s in Clamp().settings(exam.setup.grid, use) if (s["retain_threshold"], s["n_features"], s["multiplier"]) == (best["retain_threshold"], best["n_features"], best["multiplier"]))
    assert list(chosen) == found["clamped"]


def test_what_is_lost_alone_is_what_a_plain_evaluation_loses(found, arrays, exam, trained, result):
    use, best = feature_stats(exam, trained), result["eval_result_unstructured"]["best"]
    told = np.flatnonzero(~np.isnan(arrays["lost_forget"]))
    assert 1 <= len(told) <= 4
    for feature in told[:2]:
        value = Clamp().values(dict(features=[feature], multiplier=best["multiplier"], typical=exam.setup.grid.typical), use)
        right = plain_answers(exam, trained, [int(feature)], value, Clamp())
        assert arrays["lost_forget"][feature] == pytest.approx(1 - right[exam.forgets].float().mean().item(), abs=1e-6)
        assert arrays["lost_retain"][feature] == pytest.approx(1 - right[~exam.forgets].float().mean().item(), abs=1e-6)
    assert lost_alone(exam, trained, [], torch.zeros(0)).shape == (0, 2)


def test_the_nearest_write_nearly_the_same(arrays, trained):
    rows = trained.W_dec.detach()
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    np.testing.assert_allclose(arrays["cosines"], cosines.topk(8, dim=1).values, atol=1e-5)
    assert (arrays["nearest"] != np.arange(len(rows))[:, None]).all()
    np.testing.assert_allclose(np.take_along_axis(cosines.numpy(), arrays["nearest"].astype(int), 1), arrays["cosines"], atol=1e-5)


def test_aurocs_are_scikit_learns(arrays, exam, trained, setting):
    from sklearn.metrics import roc_auc_score
    from saenb.evals.separation import drawn
    sample = drawn(exam.readings, replace(setting.evals["separation"], forget=exam.setup.forget, retain=exam.setup.retain))
    f = trained.encode(sample.stream.float(), sample.position).detach()
    for feature in (0, 17, 300): assert arrays["auroc"][feature] == pytest.approx(roc_auc_score(sample.forget[sample.row], f[:, feature]), abs=1e-5)


def test_nothing_ends_the_data_or_begins_an_element(found, tmp_path):
    nasty = "</script><img src=x onerror=alert(1)>{{data}}{{title}}"
    text = page(found | dict(tokens=[nasty] * len(found["tokens"]), about=nasty), nasty)
    assert "<img" not in text and text.count("</script>") == 2
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["back"] == "" and data["about"] == nasty and set(data["tokens"]) == {nasty} and data["arrays"] == found["arrays"]
    assert "{{data}}{{title}}</title>" in text and "&lt;/script&gt;" in text
    assert write_page(found, tmp_path/"deep"/"page.html", "A page").read_text(encoding="utf-8") == page(found, "A page")


def test_the_page_asks_no_other_host(found):
    text = page(found, "A page")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest""", text)


def test_pages_that_make_no_sense(exam, setting, trained):
    for options in (dict(contexts=0), dict(effects=-1)):
        with pytest.raises(SaenbError, match="cannot be made"): explore(exam, trained, **options)
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"): explore(exam, SAE(SAEConfig(d_in=64, d_sae=8)))


def test_other_texts_lie_at_quantiles_of_the_activations(exam, trained, read):
    found = spread(exam.readings, exam.setup, trained)
    first = next(i for i, r in enumerate(read) if r[0] == 1) # rows of either side are counted from 0
    for feature in (17, 300):
        every = torch.cat([a[:, feature] for *_, a in read])
        every = every[every > 0].sort().values
        values = found["value"][:, feature]
        assert (values.diff() <= 0).all()
        for q, value, side, row, at in zip(QUANTILES, *(found[k][:, feature] for k in ("value", "side", "row", "position"))):
            if not value: continue
            assert read[int(row) + first * int(side)][3][at, feature].item() == pytest.approx(value.item())
            if len(every) > 8 * POOL: # a draw of 32 misses a quantile by 0.09 in a typical case
                assert abs((every < value).float().mean().item() - q) < 0.35
    assert (found["value"] > 0).any(0).sum() == sum((torch.stack([a.amax(0) for *_, a in read]) > 0).any(0))


def test_words_of_a_feature(found, arrays, exam, trained):
    model, words = exam.model, found["tokens"]
    for feature in (0, 17, 300):
        row = trained.W_dec.detach()[feature]
        row = row / row.norm() * trained.cfg.d_in**0.5
        effect = model.unembed(model.ln_final(row[None, None]))[0, 0] - model.unembed(model.ln_final(0 * row[None, None]))[0, 0]
        marks = list({*model.tokenizer.all_special_ids, *model.tokenizer.get_added_vocab().values()})
        keep = torch.ones(len(effect), dtype=torch.bool)
        keep[marks] = False
        effect = effect - effect[keep].mean()
        for kind, order in (("promoted", effect.masked_fill(~keep, -1e9).argsort(descending=True)), ("suppressed", effect.masked_fill(~keep, 1e9).argsort())):
            np.testing.assert_allclose(arrays[f"{kind}_by"][feature], effect[order[:8]], atol=1e-4)
            assert {words[t] for t in arrays[kind][feature]} == set(spelt(model.tokenizer, order[:8].tolist()))
        if found["labels"][feature]:
            peak = words[arrays["peak_tokens"][feature, 0]].strip().lower()
            assert found["labels"][feature].lower().startswith(peak) or peak in found["labels"][feature].lower()
    assert word_at([" un", "kind", "ly", ",", " he"], 1) == "unkindly" and word_at([None, "s", None], 1) == "s"
    assert label(["A", "a", "", "b", "c", "d"]) == "A, b, c" and label([]) == ""


def test_words_need_the_models_width(exam):
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"): logit_effects(exam.model, SAE(SAEConfig(d_in=64, d_sae=8)))


def test_names_are_shown(exam, trained):
    names = dict(feature=[3, 17], synset=["a", "b"], names=dict(a="dog (canine)", b="tree (plant)"), correlation=[0.5, 0.4], auroc=[0.9, 0.8], precision=[0.7, 0.6], recall=[0.3, 0.2])
    shown = explore(exam, trained, effects=0, contexts=1, names=names)
    assert shown["names"] == {3: ["dog (canine)", 0.5, 0.9, 0.7, 0.3], 17: ["tree (plant)", 0.4, 0.8, 0.6, 0.2]}


@pytest.mark.parametrize("back", ["javascript:alert(1)", " JavaScript:x", "data:text/html,x", "file:///etc/passwd"])
def test_a_page_leads_back_to_pages_only(found, back):
    with pytest.raises(SaenbError, match="cannot lead back"): page(found, "A page", back)
    for good in ("../index.html", "https://example.org/a?b=c#d"):
        assert f'"back": "{good}"' in page(found, "A page", good)


def test_serving_ends_at_once_and_says_so(found, exam, trained, monkeypatch, capsys):
    monkeypatch.setattr(HTTPServer, "serve_forever", lambda self: stop_at_once(signal.SIGTERM))
    monkeypatch.setattr(gc, "freeze", lambda: None)  # this process goes on
    with pytest.raises(Stopped, match="shows the page again") as stopped:
        _serve(found, "A page", exam.readings, trained, SimpleNamespace(port=0, report=""))
    assert stopped.value.number == signal.SIGTERM and "http://127.0.0.1:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def running(found, exam, trained):
    made = server(found, "A page", exam.readings, trained)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def asked(running, body=None, path="/try", method=None, **headers):
    """Status, headers and body of an answer."""
    connection = HTTPConnection("127.0.0.1", running.server_port, timeout=20)
    headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    connection.request(method or ("GET" if body is None else "POST"), path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_the_server_shows_the_page_with_a_box(running, found):
    status, headers, text = asked(running, path="/")
    assert status == 200 and "default-src 'none'" in headers["Content-Security-Policy"] and running.server_address[0] == "127.0.0.1"
    assert 'fetch("try"' in text and "your own text" in text and "A page" in text
    assert "fetch(" not in page(found, "A page")


def test_the_server_says_what_a_text_activates(running, exam, trained, arrays):
    text = "The following are multiple choice questions"
    status, _, body = asked(running, json.dumps(dict(text=text, feature=5)))
    told = json.loads(body)
    assert status == 200 and told == json.loads(json.dumps(try_text(exam.readings, trained, text, torch.tensor(arrays["largest"]), 5)))
    assert "5" in told["values"] and all(len(v) == len(told["tokens"]) for v in told["values"].values())
    shares = [s["share"] for s in told["strongest"]]
    assert shares == sorted(shares, reverse=True) and shares and "".join(told["tokens"]).startswith("The following are")
    for one in told["strongest"][:3]:
        f = one["feature"]
        assert one["share"] == pytest.approx(max(told["values"][str(f)]) / arrays["largest"][f], abs=1e-3)
    assert asked(running, json.dumps(dict(text="\ud800 odd")))[0] == 200


@pytest.mark.parametrize("body, code, words", [
    ("{", 400, "as JSON"), ("[" * 9000, 400, "as JSON"), ("[]", 400, "a text of 1 to"), ("{}", 400, "a text of 1 to"), ('{"text": 5}', 400, "a text of 1 to"), ('{"text": "  "}', 400, "a text of 1 to"),
    (json.dumps(dict(text="x" * (LONGEST + 1))), 400, "a text of 1 to"), (json.dumps(dict(text="x" * BODY)), 400, "at most"),
    ('{"text": "a", "feature": -1}', 400, "numbers 0 to 511"), ('{"text": "a", "feature": 512}', 400, "numbers 0 to"), ('{"text": "a", "feature": true}', 400, "numbers 0 to"), ('{"text": "a", "feature": "1"}', 400, "numbers 0 to")])
def test_the_server_refuses_bad_questions(running, body, code, words):
    status, _, told = asked(running, body)
    assert status == code and words in json.loads(told)["error"]


def test_the_server_reads_no_file_and_answers_nobody_else(running):
    for path in ("/../../etc/passwd", "/etc/passwd", "/%2e%2e/setup.py", "/page.html?x", "/try"):
        assert asked(running, path=path)[0] == 404, path
    assert asked(running, "{}", path="/other")[0] == 404
    good = json.dumps(dict(text="a"))
    assert asked(running, good, Host="example.org")[0] == 403 and asked(running, path="/", Host="example.org")[0] == 403
    assert asked(running, good, Origin="http://example.org")[0] == 403 and asked(running, good, Origin="null")[0] == 403
    assert asked(running, good, Content_Type="text/plain")[0] == 400
    assert asked(running, method="PUT")[0] == 501 and asked(running, method="DELETE")[0] == 501


def test_a_port_that_cannot_be_used(found, exam, trained, running):
    for port in (running.server_port, 70_000):
        with pytest.raises(SaenbError, match=f"Port {port} cannot be used"): server(found, "A page", exam.readings, trained, port)


def rows_in(path): return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_neuronpedia_gets_what_is_shown(found, arrays, trained, tmp_path):
    named = found | dict(names={17: ["dog (canine)", 0.5, 0.9, 0.7, 0.3]})
    folder = export_neuronpedia(named, trained, tmp_path, Source(trained, "tiny-world", "res-saenb"))
    assert folder == tmp_path/"tiny-world"/"0-res-saenb"
    assert {p.name for p in folder.iterdir()} == {"model.jsonl", "release.jsonl", "sourceset.jsonl", "source.jsonl", "features", "activations", "explanations"}
    source = json.loads((folder/"source.jsonl").read_text())
    assert source["id"] == "0-res-saenb" and source["modelId"] == json.loads((folder/"model.jsonl").read_text())["id"] == "tiny-world"
    features, texts, labels = (rows_in(folder/kind/"batch-0.jsonl.gz") for kind in ("features", "activations", "explanations"))
    assert [f["index"] for f in features] == [str(i) for i in range(512)] and {tuple(f) for f in features} == {tuple(features[0])}
    own = features[17]
    np.testing.assert_allclose(own["vector"], trained.W_dec.detach()[17], atol=1e-5)
    assert own["layer"] == "0-res-saenb" and own["maxActApprox"] == pytest.approx(arrays["largest"][17], abs=1e-4)
    assert own["frac_nonzero"] == pytest.approx(arrays["histogram"][17].sum() / sum(found["sizes"]))
    assert len(own["freq_hist_data_bar_values"]) == len(own["freq_hist_data_bar_heights"]) == BINS
    assert own["pos_values"] == sorted(own["pos_values"], reverse=True) and own["neg_values"] == sorted(own["neg_values"])
    assert len({t["id"] for t in texts}) == len(texts) and {tuple(t) for t in texts} == {tuple(texts[0])}
    for t in texts:
        assert len(t["tokens"]) == len(t["values"]) and t["values"][t["maxValueTokenIndex"]] == t["maxValue"] == max(t["values"])
        assert (t["binMin"] == t["binContains"] == -1) or t["binMin"] < t["binMax"] and 0 < t["binContains"] <= 1
    assert next(e for e in labels if e["index"] == "17")["description"] == "dog (canine)"
    with pytest.raises(SaenbError, match="holds an export already"): export_neuronpedia(found, trained, tmp_path, Source(trained, "tiny-world", "res-saenb"))


@pytest.mark.parametrize("place, name, creator", [("../up", "a", "b"), ("a/b", "a", "b"), ("m", "", "b"), ("m", "my set", "b"), ("m", "a", "..")])
def test_names_that_neuronpedia_cannot_take(trained, place, name, creator):
    with pytest.raises(SaenbError, match="cannot be the name of a"): Source(trained, place, name, creator)


def test_a_dictionary_without_a_layer_has_no_place_there():
    with pytest.raises(SaenbError, match="which layer"): Source(SAE(SAEConfig(d_in=8, d_sae=8, hook_layer=None)), "m", "a")
