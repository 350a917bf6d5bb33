"""Files that were altered, by accident or on purpose: each ends in one sentence, or what was altered
does not matter and the result is right."""
import collections
import contextlib
import gzip
import hashlib
import io
import json
import math
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from conftest import ROOT
from saenb.cli import main
from saenb.base.errors import SaenbError, warn_once
from saenb.base.files import read_json, read_tensors, write_json, write_tensors
from saenb.data.harvest import harvest
from saenb.data.store import COLUMNS, Store
from saenb.report.logbook import write_logs
from saenb.lab import runner
from saenb.lab.records import Record
from saenb.sae.sae import SAE, SAEConfig
from saenb.train.config import TrainConfig
from saenb.train.checkpoint import CHECKPOINT, LOG
from saenb.train.trainer import Trainer
from saenb.data.world import World

TRIED = collections.Counter()
RECORD = "tiny/orthogonality/run_0/seed_0"


def tries(count):
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def called(*arguments):
    """The command line in this process: its code, what it printed, and what it complained of."""
    out, err = io.StringIO(), io.StringIO()
    warn_once.cache_clear()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def refused(code, err, *words):
    """One sentence, on one line, without anything that a terminal would obey."""
    assert code == 2, (code, err)
    said = [line for line in err.splitlines() if line.startswith("saenb: ")]
    assert (len(said) == 1 == len(err.splitlines()) and said[0].endswith((".", "?"))
            and said[0].isprintable()), err
    for word in words: assert str(word) in said[0], (word, said[0])
    return said[0]


@pytest.fixture(scope="module")
def reading():
    """Let `saenb run` do nothing but read something."""
    @contextlib.contextmanager
    def instead(read):
        real = runner.run
        def run(*_, **__):
            return read() or Record(ROOT/"runs"/"tiny-full"/"orthogonality"/"run_0"/"seed_0")
        runner.run = run
        try: yield lambda: called("run", "orthogonality/0")
        finally: runner.run = real
    return instead


# ---------------------------------------------------------------------------------------------------- how
# files are altered

VALUES = [None, True, "", "x", "../../etc/passwd", "/etc/passwd", "a/b", "..", "a\x00b", "\x1b[2J",
          "$\\frac", "<script>alert(1)</script>", -1, 0, 3, 2**31, 2**63, 10**30, -0.5, 1e-300, 1e300,
          float("nan"), float("inf"), [], [[]], {}, [1, 2, 3], {"a": 1}, "0" * 5000]


def places(value, at=()):
    """Where in a JSON value there is something."""
    yield at
    for key, inner in (value.items() if isinstance(value, dict)
                       else list(enumerate(value))[:3] if isinstance(value, list) else ()):
        yield from places(inner, (*at, key))


@st.composite
def altered(draw, value):
    """JSON text with something wrong, and what was put in the place of what (None and None if the text
    itself is broken)."""
    text = json.dumps(value)
    how = draw(st.sampled_from(["remove", "replace", "replace", "replace", "cut", "flip", "whole"]))
    if how == "cut":
        return text[:draw(st.integers(0, len(text) - 2))].encode(), None, None
    if how == "whole":
        return draw(st.sampled_from([b"", b"[]", b"null", b"\xff\xfe\x00", "\ufeff{}".encode(), b"[" * 10**5,
                                     b'{"a":' * 200 + b"1" + b"}" * 200, b"1" * 5000, b"\x00" * 64,
                                     text.encode("utf-16")])), None, None
    if how == "flip":
        data, place = bytearray(text.encode()), draw(st.integers(0, len(text) - 1))
        data[place] ^= draw(st.integers(1, 255))
        try: assume(json.loads(data) != value)
        except (ValueError, RecursionError): return bytes(data), None, None
        return bytes(data), "flipped", "flipped"
    value = json.loads(text)
    place = draw(st.sampled_from([p for p in places(value) if p]))
    inner = value
    for key in place[:-1]: inner = inner[key]
    old = inner[place[-1]]
    if how == "remove":
        del inner[place[-1]]
        return json.dumps(value).encode(), old, None
    inner[place[-1]] = new = draw(st.sampled_from(VALUES))
    assume(new != old)
    return json.dumps(value).encode(), old, new


def alike(old, new):
    """Might one value stand where the other did, as far as its kind tells?"""
    if "flipped" in (old, new): return True
    number = lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)
    return number(old) and number(new) or type(old) is type(new) or old is None or new is None


# ---------------------------------------------------------------------------------------------------- stores

@pytest.fixture(scope="module")
def tiny_store(world, model, tmp_path_factory):
    store = harvest(model, world.texts("train", 60), world.layer, tmp_path_factory.mktemp("tiny"),
                    shard_bytes=2**20)
    return store, store.rows()


@pytest.fixture(scope="module")
def spoiled(tiny_store, tmp_path_factory):
    """A copy of the store, to be spoiled and restored."""
    folder = tmp_path_factory.mktemp("spoiled")/"store"
    shutil.copytree(tiny_store[0].path, folder)
    return folder


def read_all(folder, whole):
    """Read a store by every way there is, and check that it is the right one."""
    def read():
        store = Store.open(folder)
        rows = store.rows()
        for name in COLUMNS:
            assert torch.equal(getattr(rows, name), getattr(whole, name)), name
        next(store.batches(64, balanced=True))
        assert sum(store.side_counts()) == len(whole) and store.d_in == whole.x.shape[1]
    return read


@tries(70)
@given(st.data())
def test_a_journal_that_was_altered(tiny_store, spoiled, reading, data):
    text, _, _ = data.draw(altered(tiny_store[0].about))
    (spoiled/"store.json").write_bytes(text)
    TRIED["store.json"] += 1
    with reading(read_all(spoiled, tiny_store[1])) as read:
        code, _, err = read()
    if code: refused(code, err, spoiled)


@st.composite
def altered_shard(draw, data):
    """A safetensors file with something wrong in its header or its length."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + size], data[8 + size:]
    how = draw(st.sampled_from(["header", "header", "header", "length", "cut", "swap", "flip"]))
    if how == "cut": return data[:draw(st.integers(0, len(data) - 1))]
    if how == "length":
        return struct.pack("<Q", draw(st.sampled_from([0, 1, size - 1, size + 1, size + 8, len(data), 2**31,
                                                       2**63, 2**64 - 1]))) + header + body
    if how == "flip":
        header = bytearray(header)
        header[draw(st.integers(0, len(header.rstrip()) - 1))] ^= draw(st.integers(1, 255))
        return data[:8] + bytes(header) + body
    entries = json.loads(header)
    if how == "swap":
        a, b = draw(st.permutations(sorted(entries.keys() - {"__metadata__"})))[:2]
        entries[a], entries[b] = entries[b], entries[a]
        header = json.dumps(entries).encode()
    else: header = draw(altered(entries))[0]
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


@tries(70)
@given(st.data())
def test_a_shard_that_was_altered(tiny_store, spoiled, reading, data):
    """Its checksum was altered with it."""
    store, whole = tiny_store
    shard = spoiled/store.shards[0]["file"]
    shard.write_bytes(bad := data.draw(altered_shard((store.path/shard.name).read_bytes())))
    about = json.loads(json.dumps(store.about))
    about["shards"][0]["sha256"] = hashlib.sha256(bad).hexdigest()
    (spoiled/"store.json").write_text(json.dumps(about))
    TRIED["shard"] += 1
    with reading(read_all(spoiled, whole)) as read: code, _, err = read()
    if code: refused(code, err, shard)
    shutil.copy(store.path/shard.name, shard)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".hidden", "a\\b", ""])
def test_no_shard_lies_outside_its_store(tiny_store, tmp_path, name, reading):
    store, whole = tiny_store
    shutil.copytree(store.path, tmp_path/"store")
    # the checksum would be right
    shutil.copy(store.path/store.shards[0]["file"], tmp_path/"secret.safetensors")
    about = json.loads(json.dumps(store.about))
    about["shards"][0]["file"] = name
    (tmp_path/"store"/"store.json").write_text(json.dumps(about))
    with reading(read_all(tmp_path/"store", whole)) as read:
        code, _, err = read()
    refused(code, err, "store.json is damaged", "harvest again")


# ----------------------------------------------------------------------------------------------------
# checkpoints

SHORT = TrainConfig(steps=6, warmup=2, checkpoint_every=4, log_every=2, batch=256)


def trainer(store, folder):
    sae = SAE(SAEConfig(d_in=store.d_in, d_sae=16)).initialise(store.rows(0, 1024).x, 0)
    return Trainer(sae, store, cfg=SHORT, out=folder)


@pytest.fixture(scope="module")
def checkpoint(tiny_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    made = trainer(tiny_store[0], folder)
    made.fit(progress=False)
    return folder, made, *read_tensors(folder/CHECKPOINT)


@st.composite
def altered_tensors(draw, tensors, about):
    """A checkpoint with something wrong and a checksum that is right."""
    tensors, about = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(about))
    name = draw(st.sampled_from(sorted(tensors)))
    how = draw(st.sampled_from(["remove", "more", "shape", "type", "about", "about", "about"]))
    if how == "remove": del tensors[name]
    if how == "more":
        tensors[draw(st.sampled_from(["x", "sae.gates.0.mask", "mechanisms.0.mask", "adam.9.step",
                                      "../x"]))] = torch.zeros(2)
    if how == "shape":
        tensors[name] = draw(st.sampled_from([torch.zeros(0), torch.zeros(3, 5), tensors[name].flatten()[:1],
                                              tensors[name][None].clone()])).to(tensors[name].dtype)
    if how == "type":
        tensors[name] = tensors[name].to(draw(st.sampled_from([t for t in (
            torch.float64, torch.bfloat16, torch.int64, torch.bool) if t is not tensors[name].dtype])))
    if how == "about":
        text = draw(altered(about))[0]
        try: about = json.loads(text)
        except (ValueError, RecursionError): assume(False)
        assume(isinstance(about, dict))
    return tensors, about


@tries(60)
@given(st.data())
def test_a_checkpoint_that_was_altered(tiny_store, checkpoint, reading, tmp_path_factory, data):
    folder, made, tensors, about = checkpoint
    out = tmp_path_factory.getbasetemp()/"altered"
    out.mkdir(exist_ok=True)
    if data.draw(st.booleans()):
        (out/CHECKPOINT).write_bytes(data.draw(altered_shard((folder/CHECKPOINT).read_bytes())))
    else:
        write_tensors(out/CHECKPOINT, *data.draw(altered_tensors(tensors, about)))
    shutil.copy(folder/LOG, out)
    TRIED["checkpoint"] += 1
    kept = (out/CHECKPOINT).read_bytes()
    def resume():
        again = trainer(tiny_store[0], out)
        assert again.resume() and again.sae.fingerprint() == made.sae.fingerprint()
        assert (again.index == read_tensors(out/CHECKPOINT)[1]["step"]
                and again.index in range(SHORT.steps + 1))
    with reading(resume) as read: code, _, err = read()
    if code: refused(code, err, out/CHECKPOINT)
    assert (out/CHECKPOINT).read_bytes() == kept # whatever it is, it is not thrown away


def test_a_checkpoint_with_one_byte_changed_is_refused(tiny_store, checkpoint, tmp_path):
    data = bytearray((checkpoint[0]/CHECKPOINT).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path/CHECKPOINT).write_bytes(data)
    with pytest.raises(SaenbError,
                       match="its checksum differs.; restore it, or delete it and training starts over."):
        trainer(tiny_store[0], tmp_path).resume()


# ---------------------------------------------------------------------------------------------------- worlds

@tries(40)
@given(st.data())
def test_a_world_that_was_altered(world, reading, tmp_path_factory, data):
    text, old, new = data.draw(altered(world.about))
    folder = tmp_path_factory.getbasetemp()/"world"
    folder.mkdir(exist_ok=True)
    (folder/"world.json").write_bytes(text)
    TRIED["world.json"] += 1
    with reading(lambda: str(World(folder)) and None) as read:
        code, _, err = read()
    if code: refused(code, err, folder/"world.json")
    else: assert World(folder).cfg == world.cfg or alike(old, new)


# ---------------------------------------------------------------------------------------------------- records

@pytest.fixture(scope="module")
def kept_records(tmp_path_factory):
    """A copy of committed records: a baseline and a run with a mechanism, a seed each, with controls and
    analyses."""
    root = tmp_path_factory.mktemp("records")/"tiny-full"
    for run in ("run_0", "run_1"):
        folder = root/"orthogonality"/run/"seed_0"
        shutil.copytree(ROOT/"runs"/"tiny-full"/"orthogonality"/run/"seed_0", folder)
        (folder/LOG).write_bytes(gzip.decompress((folder/f"{LOG}.gz").read_bytes()))
    for kept in (ROOT/"runs"/"tiny-full"/"orthogonality").glob("*.json"):
        shutil.copy(kept, root/"orthogonality")
    (root/"controls").mkdir()
    shutil.copy(ROOT/"runs"/"tiny-full"/"controls"/"seed_0.json", root/"controls")
    return root


@contextlib.contextmanager
def spoil(path, text):
    before = path.read_bytes()
    path.write_bytes(text)
    try: yield
    finally: path.write_bytes(before)


FILES = ["config.json", "final_info.json", *(f"evals/{name}.json" for name in (
    "unlearning", "core", "entanglement", "separation", "absorption", "positional", "sparse_probing"))]

@pytest.fixture(scope="module")
def compared(kept_records):
    """What is printed where nothing was altered."""
    return json.loads(called("compare", kept_records, "--json")[1])


@tries(120)
@given(st.data())
def test_a_record_that_was_altered_is_compared_or_named(kept_records, compared, data):
    run, name = data.draw(st.sampled_from(["run_0", "run_1"])), data.draw(st.sampled_from(FILES))
    path = kept_records/"orthogonality"/run/"seed_0"/name
    text, old, new = data.draw(altered(json.loads(path.read_text())))
    TRIED["records"] += 1
    with spoil(path, text):
        code, out, err = called("compare", kept_records, "--json")
    if code:
        assert any(word in refused(code, err) for word in (
            str(path), "no baseline", "There is no", "cannot be compared with its baseline"))
    else: assert json.loads(out) == compared or alike(old, new)


@tries(16)
@given(st.data())
def test_a_record_that_was_altered_is_drawn_or_named(kept_records, reading, tmp_path_factory, data):
    """Figures, which are drawn from everything, and the run logs."""
    folder = kept_records/"orthogonality"
    path = data.draw(
        st.sampled_from([*(folder/"run_1"/"seed_0"/name for name in FILES), folder/"step_cost.json",
                         folder/"pairs_between_seeds.json", kept_records/"controls"/"seed_0.json"]))
    text, _, _ = data.draw(altered(json.loads(path.read_text())))
    TRIED["figures"] += 1
    out = tmp_path_factory.mktemp("drawn")
    with spoil(path, text):
        code, printed, err = called("figures", "--preset", "tiny-full", "--out", kept_records.parent,
                                    "--figures", out/"figures", "--json")
        with reading(lambda: write_logs(kept_records) and None) as told:
            log_code, _, log_err = told()
    if log_code: refused(log_code, log_err)
    if code: refused(code, err)
    else:
        assert all(Path(p).is_relative_to(out/"figures") for p in json.loads(printed))


@tries(30)
@given(st.data())
def test_a_training_log_that_was_altered(kept_records, reading, data):
    path = kept_records/"orthogonality"/"run_1"/"seed_0"/LOG
    lines = path.read_text().splitlines()[:20]
    number = data.draw(st.integers(0, 19))
    text, old, new = data.draw(altered(json.loads(lines[number])))
    assume(b"\n" not in text and text.strip())
    TRIED["training log"] += 1
    whole = "\n".join([*lines[:number], "%", *lines[number + 1:]]).encode().replace(b"%", text)
    with spoil(path, whole), reading(lambda: Record(path.parent).log and None) as read:
        code, _, err = read()
    if code: refused(code, err, path, "line ")
    else: assert alike(old, new)


@pytest.mark.parametrize("id",
                         ["../../etc", "orthogonality/../../x", "/etc/passwd", "orthogonality/0/../..", ""])
def test_no_run_leads_out_of_the_folder(tmp_path, id):
    refused(*called("run", id, "--out", tmp_path/"runs")[::2], "no run called")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [dict(precision="../../../x"), dict(precision="a\\b"),
                                    dict(precision="a\nb"), dict(precision="x" * 500)])
def test_no_variant_leads_out_of_the_folder(tmp_path, change):
    with pytest.raises(SaenbError, match="cannot be named after"):
        runner.run("orthogonality/0", out=tmp_path/"runs", change=change)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("id", ["../../etc", "orthogonality/../../x", "a/b/c", "/x"])
def test_a_records_run_leads_nowhere(kept_records, tmp_path, id):
    """A comparison looks for the baseline beside the run that a record names."""
    path = kept_records/"orthogonality"/"run_1"/"seed_0"/"config.json"
    config = json.loads(path.read_text())
    config["run"]["id"] = id
    with spoil(path, json.dumps(config).encode()):
        for command in (("compare", kept_records, "--to", tmp_path/"to"),
                        ("figures", "--preset", "tiny-full", "--out", kept_records.parent, "--figures",
                         tmp_path/"figures")):
            refused(*called(*command)[::2], path, "run.id is")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- what is
# shown is escaped

NASTY = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "a | b | c",
         "[x](javascript:alert(1))", "`code`", '"quoted" & \'single\'', "<!-- x -->"]
MARKUP = ("<script", "<img", "</script", "<!--", "](javascript")


def test_what_differs_is_named_in_a_few_words(kept_records):
    path = kept_records/"orthogonality"/"run_1"/"seed_0"/"config.json"
    config = json.loads(path.read_text())
    with spoil(path, json.dumps(config | dict(model="a long name" * 500)).encode()):
        said = refused(*called("compare", kept_records)[::2], path.parent, "differ in model (a long name")
    assert len(said) < 1000


@pytest.mark.parametrize("title", NASTY)
def test_tables_and_pages_show_titles_as_they_are(kept_records, title, tmp_path):
    from saenb.report.compare import as_html, as_markdown, compare, differences, records_under, verdicts
    from saenb.report.figures import Material, last_of_log, titled
    from saenb.report.logbook import run_log
    path = kept_records/"orthogonality"/"run_1"/"seed_0"/"config.json"
    config = json.loads(path.read_text())
    config["run"]["title"] = title
    config["run"]["mechanisms"].append(dict(name=title, settings={title: title}))
    config["variant"] = ""
    with spoil(path, json.dumps(config).encode()):
        rows = compare(records_under([kept_records]))
        material = Material(kept_records, "orthogonality")
        shown = dict(html=as_html(rows, ["score"]), markdown=as_markdown(rows, ["score"]), verdicts=verdicts(
            [r | dict(differs=True, difference_low=0.1, difference_high=0.2, difference=0.1) for r in rows]),
                     differences=differences([r | dict(differs=True, difference_low=0.1, difference_high=0.2,
                                                       difference=0.1) for r in rows], ["score"]),
                     log=last_of_log(titled(material), dict(loss="loss")), runs=run_log(material))
        assert called("figures", "--preset", "tiny-full", "--out", kept_records.parent, "--figures",
                      tmp_path)[0] == 0
    for name, text in shown.items():
        assert not any(mark in text for mark in MARKUP if name != "html" or mark[0] == "<"), name
    for name in ("markdown", "verdicts", "log"):
        bars = {line.replace("\\|", "").count("|") for line in shown[name].splitlines()}
        assert len(bars) == 1, (name, bars)


@pytest.mark.parametrize("title", NASTY)
def test_a_page_of_features_holds_nothing_but_data(title, tmp_path):
    """Tokens, the dictionary's name and the title."""
    from html.parser import HTMLParser
    from saenb.report.explorer import write_page
    text = write_page(dict(about=title, tokens=NASTY, features=0), tmp_path/"page.html", title).read_text()
    class Reader(HTMLParser):
        tags, scripts, heads, inside = collections.Counter(), [], [], None
        def handle_starttag(self, tag, attrs):
            self.tags[tag] += 1
            self.inside = tag
        def handle_endtag(self, tag): self.inside = None
        def handle_data(self, data):
            if self.inside == "script": self.scripts.append(data)
            if self.inside in ("title", "h1"): self.heads.append(data)
    reader = Reader()
    reader.feed(text)
    assert reader.tags["script"] == 2 and reader.tags["img"] == 0 and reader.heads == [title, title]
    assert json.loads(reader.scripts[0]) == dict(about=title, tokens=NASTY, features=0, back="")


def test_a_label_is_not_taken_for_mathematics(kept_records, tmp_path):
    path = kept_records/"orthogonality"/"run_1"/"seed_0"/"config.json"
    config = json.loads(path.read_text())
    config["run"]["title"] = "$\\frac$"
    with spoil(path, json.dumps(config).encode()):
        refused(*called("figures", "--preset", "tiny-full", "--out", kept_records.parent, "--figures",
                        tmp_path)[::2], path, "run.title")


def test_no_sign_from_a_file_reaches_the_terminal(tmp_path):
    (tmp_path/"runs"/"tiny"/"orthogonality"/"run_0"/"seed_0").mkdir(parents=True)
    folder = tmp_path/"runs"/RECORD
    write_json(folder/"final_info.json", {})
    write_json(folder/"config.json", {"run": {"id": "\x1b]0;owned\x07\x1b[2J"}})
    refused(*called("compare", tmp_path/"runs")[::2], folder/"config.json")


def test_nothing_is_read_that_is_too_large(tmp_path):
    with open(tmp_path/"large.json", "wb") as f: f.truncate(2**28 + 1)
    with pytest.raises(SaenbError, match="larger than 256 MB"):
        read_json(tmp_path/"large.json", "record")


def test_enough_was_tried(capsys):
    with capsys.disabled():
        print(f"\n{sum(TRIED.values())} altered files: "
              + ", ".join(f"{count} of {name}" for name, count in TRIED.items()))
    assert sum(TRIED.values()) >= 150
