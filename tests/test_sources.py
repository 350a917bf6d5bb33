import http.server
import json
import threading

import pytest
import torch

from saenb.base.errors import SaenbError, warn_once
from saenb.data import sources
from saenb.data.sources import QuestionSource, TextSource, boot, sided_texts


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_every_file_type_reads_alike(tmp_path):
    import gzip
    import pandas as pd
    rows = [dict(text="one"), dict(text="two words")]
    lines(tmp_path/"a.jsonl", rows)
    (tmp_path/"a.jsonl.gz").write_bytes(gzip.compress((tmp_path/"a.jsonl").read_bytes()))
    (tmp_path/"a.txt").write_text("one\ntwo words\n")
    pd.DataFrame(rows).to_parquet(tmp_path/"a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet"):
        assert list(TextSource(str(tmp_path/name))) == ["one", "two words"]


def test_short_and_missing_texts_are_left_out(tmp_path):
    lines(tmp_path/"a.jsonl", [dict(text="x"), dict(text=None), dict(text="long enough")])
    assert list(TextSource(str(tmp_path/"a.jsonl"), min_chars=5)) == ["long enough"]


def test_sources_take_turns(tmp_path):
    a, b = (lines(tmp_path/"a.jsonl", [dict(text=t) for t in "abc"]),
            lines(tmp_path/"b.jsonl", [dict(text="z")]))
    pairs = list(sided_texts([TextSource(str(a), side="forget"), TextSource(str(b), side="retain")]))
    assert pairs == [("a", 1), ("z", 2), ("b", 1), ("c", 1)]
    assert list(sided_texts(["x", ("y", "retain")])) == [("x", 0), ("y", 2)]


@pytest.mark.parametrize("source, said", [
    (dict(path="nowhere/at all"), "cannot be read"),
    (dict(path="a.jsonl", column="body"), "no column 'body'"),
    (dict(path="a.doc"), "file type"),
    (dict(path="a.jsonl", side="fogret"), "did you mean forget"),
])
def test_texts_that_cannot_be_read(tmp_path, source, said):
    lines(tmp_path/"a.jsonl", [dict(text="x")])
    (tmp_path/"a.doc").write_text("x")
    with pytest.raises(SaenbError, match=said):
        list(TextSource(**source | dict(path=str(tmp_path/source["path"]))))


def test_data_that_brings_code_is_not_run(tmp_path):
    (tmp_path/"set").mkdir()
    (tmp_path/"set"/"set.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')")
    with pytest.raises(SaenbError): list(TextSource(str(tmp_path/"set")))
    assert not (tmp_path/"ran").exists()


def test_questions_keep_their_columns(tmp_path):
    (tmp_path/"README.md").write_text(
        "---\nconfigs:\n- config_name: wmdp-bio\n  data_files:\n  - split: test\n    path: q.jsonl\n---\n")
    row = dict(question="?", choices=list("wxyz"), answer=3)
    lines(tmp_path/"q.jsonl", [row])
    source = QuestionSource("wmdp-bio", str(tmp_path))
    assert source.load() == [row] and source.spoken == "biology"
    lines(tmp_path/"q.jsonl", [row | dict(fact="rank of x", note=1), row, row | dict(fact="3")])
    assert [r.get("fact") for r in source.load()] == ["rank of x", None, "3"]
    lines(tmp_path/"q.jsonl", [row | dict(answer=4)])
    with pytest.raises(SaenbError, match="Question 0"): source.load()


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(SaenbError, match="holds no model"): boot(tmp_path)


@pytest.fixture
def gated_hub():
    """A hub on this machine at which everything is gated."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access to this repository is restricted.")
            self.send_header("Content-Length", "0")
            self.end_headers()
        do_HEAD = do_GET
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("native, dtype, warned", [(False, "bfloat16", True), (True, "bfloat16", False), (False, "float32", False)])
def test_a_type_that_is_only_emulated_is_said(native, dtype, warned, world, monkeypatch, capsys):
    warn_once.cache_clear()
    monkeypatch.setattr(sources, "multiplies_bfloat16", lambda: native)
    assert boot(world.path/"model", "cpu", dtype).W_E.dtype == getattr(torch, dtype)
    assert ("only emulates bfloat16" in capsys.readouterr().err) == warned


def test_a_gated_model_without_access(saenb, one_sentence, gated_hub, tmp_path):
    done = saenb("run", "orthogonality/0", "--preset", "gemma-2-2b",
                 env=dict(HF_ENDPOINT=gated_hub, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path/"hf")))
    one_sentence(done, "google/gemma-2-2b", "gated", "hf auth login")


def test_a_file_that_breaks_off_is_one_sentence(tmp_path):
    (tmp_path/"a.jsonl").write_text('{"text": "fine"}\n{"text": "fine too"}\n{"text": "cut o')
    with pytest.raises(SaenbError, match=r"a\.jsonl \(train\) cannot be read"):
        list(TextSource(str(tmp_path/"a.jsonl")))
