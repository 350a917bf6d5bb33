"""The page that shows a dictionary's features: its numbers against plain counts, and that nothing in it escapes."""
import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from saenb.base.errors import SaenbError
from saenb.evals.evaluation import encoded
from saenb.evals.exam import feature_stats
from saenb.evals.interventions.intervention import plain_answers
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.unlearning import evaluate
from saenb.report.explorer import AFTER, BEFORE, BINS, explore, lost_alone, page, peaks, write_page
from saenb.sae.sae import SAE, SAEConfig


@pytest.fixture(scope="module")
def result(exam, trained): return evaluate(exam.model, trained, exam.setup, exam)


@pytest.fixture(scope="module")
def found(exam, trained, setting, result): return explore(exam, trained, result, contexts=3, effects=4)


@pytest.fixture(scope="module")
def arrays(found):
    shapes = dict(histogram=(-1, 2, BINS), peaks=(-1, 3), context_side=(-1, 3), context_tokens=(-1, 3, BEFORE + 1 + AFTER), peak_tokens=(-1, 3), context_activations=(-1, 3, BEFORE + 1 + AFTER),
                  nearest=(-1, found["nearest"]), cosines=(-1, found["nearest"]))
    return {name: np.frombuffer(base64.b64decode(a["bytes"]), a["kind"]).reshape(shapes.get(name, -1)) for name, a in found["arrays"].items()}


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
        assert arrays["peaks"][feature] == pytest.approx([v for v, _ in best])
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
    tokens = np.frombuffer(base64.b64decode(shown["arrays"]["context_tokens"]["bytes"]), shown["arrays"]["context_tokens"]["kind"]).reshape(-1, 2, BEFORE + 1 + AFTER)
    assert (tokens[5] == len(shown["tokens"])).all() and shown["clamped"] == []
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
    assert data["about"] == nasty and set(data["tokens"]) == {nasty} and data["arrays"] == found["arrays"]
    assert "{{data}}{{title}}</title>" in text and "&lt;/script&gt;" in text
    assert write_page(found, tmp_path/"deep"/"page.html", "A page").read_text(encoding="utf-8") == page(found, "A page")


def test_the_page_asks_no_other_host(found):
    text = page(found, "A page")
    assert not re.search(r"""(src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest""", text)


def test_pages_that_make_no_sense(exam, setting, trained):
    for options in (dict(contexts=0), dict(effects=-1)):
        with pytest.raises(SaenbError, match="cannot be made"): explore(exam, trained, **options)
    with pytest.raises(SaenbError, match="width 64 and the model's is 192"): explore(exam, SAE(SAEConfig(d_in=64, d_sae=8)))
