"""The benchmarks' programs, in as far as they need nobody else's packages: what is measured, what is made of figures, and what is refused."""
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from saenb.base.errors import SaenbError
from saenb.sae.sae import SAE, SAEConfig
from saenb.sae.architectures import LOGS_WIDTH, sparsity_loss
from saenb.sae.jumprelu import UNIT
from saenb.train.config import reconstruction_loss

ROOT = Path(__file__).parent.parent
FOLDER = ROOT/"benchmarks"


def program(name): return SimpleNamespace(**runpy.run_path(str(FOLDER/f"{name}.py")))


@pytest.fixture(scope="module")
def bench(): return program("bench")


@pytest.fixture(scope="module")
def contest(): return program("contest")


REPORT = program("report")


@pytest.fixture
def call(bench):
    """What bench.py does with these arguments, in this process; what it measures runs in others."""
    threads = torch.get_num_threads()
    yield lambda *arguments: bench.main(bench.arguments(list(map(str, arguments))))
    torch.set_num_threads(threads)


MACHINE = dict(cpu="some processor", cores=2, memory_gb=24, system="Linux", device="cpu", threads=2, bfloat16=True, ours=dict(saenb="0.1.0"), theirs={"sae-lens": "6.54.12"})


def contestant(package, seconds, loss=0.5):
    return dict(package=package, uncounted=[9.0], seconds=seconds, peak=1234.0, curve=[dict(step=s, loss=loss + 1 / s, reconstruction=loss, l1=0.1, l0=40.0, explained=0.6) for s in (4, 8)])


def group(others=0.0, d_sae=2304, **contestants):
    common = dict(l1=0.04, lr=3e-4, batch=2048, steps=9, warmup=1, decay=2, k=32, d_in=2304, d_sae=d_sae)
    return dict(date="2026-01-02", others=others, minutes=1.0, shape=dict(d_in=2304, d_sae=d_sae, batch=2048), common=common, contestants=contestants)


def results(out, part, items, **settings):
    (out/"results").mkdir(parents=True, exist_ok=True)
    (out/"results"/f"{part}.json").write_text(json.dumps(dict(settings=settings, machine=MACHINE, items=items)))
    return out


@pytest.fixture
def measured(tmp_path):
    """Results of one contest in two groups, the second while the machine was half as fast, and of a few runs' steps."""
    first = group(saenb=contestant("saenb", [0.1, 0.1, 0.1, 0.3]), SAELens=contestant("saelens", [0.25] * 4), **{"five products, bfloat16": contestant("products", [0.05] * 4)})
    second = group(saenb=contestant("saenb", [0.2] * 4), dictionary_learning=contestant("dictionary_learning", [0.8] * 4))
    results(tmp_path, "training", {"a, group 1": first, "a, group 2": second}, held=2048, distinct=48)
    step = lambda *ratios: dict(date="2026-01-02", others=0.0, minutes=0.1, title="Some run", experiment="positional", ratios=ratios)
    return results(tmp_path, "steps", {"positional/1": step(1.5, 1.75, 2.5)}, d_in=2304, d_sae=2304, batch=2048, steps=10, repeats=3)


def rows(report, first):
    """A table's row in a report, as its cells."""
    return next([cell.strip() for cell in line.strip("|").split("|")] for line in report.splitlines() if line.startswith(f"| {first} |"))


def test_a_report_is_made_from_results_alone(measured, call, capsys):
    call("--report", "--out", measured)
    report = (measured/"report.md").read_text()
    assert str(measured/"report.md") in capsys.readouterr().out
    assert {p.name for p in measured.glob("*.png")} == {"loss.png", "training.png", "steps.png"} and all(f"({name})" in report for name in ("loss.png", "training.png", "steps.png"))
    assert rows(report, "positional/1")[2:] == ["1.75", "1.5", "2.5"]
    assert "sae-lens 6.54.12" in report and "2026-01-02" in report and "some processor" in report
    assert report.count("Not measured yet") == 5 and "do not rely" not in report # of seven parts, on an idle machine


def test_ratios_are_of_the_run_that_both_took_part_in(measured):
    report = REPORT.write_report(measured).read_text()
    assert rows(report, "SAELens")[5:7] == ["2.5", ""] # the products in float32 were not measured
    assert rows(report, "dictionary_learning")[5] == "4" # and not 8, of the faster run
    assert rows(report, "saenb")[1] == "0.2" and rows(report, "five products, bfloat16")[5:7] == ["0.5", "2,174 GFLOP/s"]
    assert rows(report, "saenb")[6] == "25%" # 0.05 of 0.2 seconds


def test_architectures_are_compared_by_processor_time_within_their_own_group(tmp_path):
    def one(package, seconds, processor, **more): return contestant(package, seconds) | dict(processor=processor) | more
    first = group(saenb=one("saenb", [5.0] * 4, [0.5] * 4), SAELens=one("saelens", [3.0] * 4, [1.5] * 4)) | dict(kind="topk")
    second = group(saenb=one("saenb", [1.0] * 4, [1.0] * 4), sparsify=one("sparsify", [4.0] * 4, [2.5] * 4), **{"sparsify, AuxK": one("sparsify", [1.1] * 4, [1.1] * 4)}) | dict(kind="topk")
    broken = group(saenb=one("saenb", [1.0] * 4, [1.0] * 4), dictionary_learning=dict(package="dictionary_learning", seconds=[], processor=[], curve=[], failed="it stopped.")) | dict(kind="jumprelu")
    for item in (first, second, broken): item["common"] |= dict(target=64)
    report = REPORT.write_report(results(tmp_path, "architectures", {"a": first, "b": second, "c": broken}, held=1024)).read_text()
    assert rows(report, "SAELens")[1:5] == ["3", "1.5", "1.5 to 1.5", "3"] and rows(report, "sparsify")[4] == "2.5" and rows(report, "saenb")[2] == "0.5"
    assert "The fastest of the others is sparsify, whose step takes 2.5 times" in report and "Not measured to the end: it stopped." in report # and not the one with AuxK


def test_a_machine_that_was_busy_is_told_of(measured):
    kept = json.loads((measured/"results"/"steps.json").read_text())
    kept["items"]["positional/1"]["others"] = 0.4
    (measured/"results"/"steps.json").write_text(json.dumps(kept))
    assert "some of steps was measured: do not rely on these figures" in REPORT.write_report(measured).read_text()


def test_without_results_a_report_says_what_to_do(tmp_path):
    report = REPORT.write_report(tmp_path).read_text()
    assert all(f"make bench ARGS=\"--parts {part}\"" in report for part in REPORT.PARTS) and not list(tmp_path.glob("*.png"))


def test_the_shipped_report_is_that_of_the_shipped_results(tmp_path):
    for file in FOLDER.glob("results/*.json"):
        (tmp_path/"results").mkdir(exist_ok=True)
        (tmp_path/"results"/file.name).write_bytes(file.read_bytes())
    assert REPORT.write_report(tmp_path).read_text() == (FOLDER/"report.md").read_text()


times = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=9)

@given(times, times, st.floats(0.1, 10))
def test_ratios_and_spreads(theirs, ours, factor):
    ratio = REPORT.ratio(theirs, ours)
    assert ratio * REPORT.ratio(ours, theirs) == pytest.approx(1) and REPORT.ratio([factor * t for t in theirs], ours) == pytest.approx(factor * ratio)
    low, mid, high = REPORT.spread(theirs)
    assert min(theirs) <= low <= mid <= high <= max(theirs) and mid == REPORT.spread(theirs[::-1])[1]


def test_everybody_is_judged_by_what_saenb_minimises(contest):
    torch.manual_seed(0)
    x, sae = torch.randn(700, 48) + 1, SAE(SAEConfig(d_in=48, d_sae=96))
    sae.initialise(x)
    with torch.no_grad():
        f, reconstruction = sae.encode(x), sae(x)
        wanted = reconstruction_loss(x, reconstruction, 1.0), sparsity_loss(f, 1.0, LOGS_WIDTH)
    weights = dict(sae.named_parameters())
    found = contest.judge(weights, x, 0.04)
    assert (found["reconstruction"], found["l1"] / 0.04, found["l0"]) == pytest.approx((*(w.item() for w in wanted), (f > 0).sum(1).float().mean().item()), rel=1e-5)
    assert found["loss"] == pytest.approx(found["reconstruction"] + found["l1"])
    longer = weights | dict(W_dec=4 * sae.W_dec, W_enc=sae.W_enc / 4, b_enc=sae.b_enc / 4) # the same dictionary, its rows of another length
    assert contest.judge(longer, x, 0.04) == pytest.approx(found, rel=1e-4)
    assert contest.judge(weights, x, 0.04, k=3)["l0"] <= 3
    for kind, more in {"topk,k=3": {}, "batchtopk,k=3": {}, "jumprelu": dict(threshold=torch.rand(96) * 0.5)}.items():
        sae = SAE(SAEConfig(d_in=48, d_sae=96, architecture=kind)).train()
        with torch.no_grad():
            for name, value in (weights | more).items(): getattr(sae, name).copy_(value)
            f = sae.encode(x[:512]) # as many as are judged at a time
            error, active = reconstruction_loss(x[:512], sae.decode(f), 1.0).item(), (f > 0).sum(1).float().mean().item()
        found = contest.judge(weights | more, x[:512], 0.04, None if more else 3, kind.partition(",")[0])
        assert (found["reconstruction"], found["l0"]) == pytest.approx((error, active), rel=1e-5)
        assert found["loss"] == pytest.approx(error + (0.04 * UNIT * active if more else 0)) and 0 < active < 48
    assert (contest.UNIT, contest.START, contest.BAND) == (UNIT, *(SAE(SAEConfig(4, 8, architecture="jumprelu")).architecture.defaults[n] for n in ("start", "bandwidth")))


def test_the_made_up_stream_is_the_same_every_time_and_one_long(bench):
    one, other = bench.made_up(32, 2000, 500, 3), bench.made_up(32, 2000, 500, 3)
    assert torch.equal(one["x"], other["x"]) and torch.equal(one["held"], other["held"]) and one["held"].shape == (500, 32)
    both = torch.cat(list(one.values()))
    assert (both - both.mean(0)).pow(2).sum(1).mean().item() == pytest.approx(1, rel=1e-4) and not torch.equal(one["x"], bench.made_up(32, 2000, 500, 4)["x"])


def test_groups_fit_into_memory_and_all_have_the_anchor(bench):
    names, wide = list("abcdefg"), dict(d_in=2304, d_sae=16384, batch=2048)
    found = bench.groups(["a", *names[1:]], wide, "a", "cpu", 16)
    assert len(found) > 1 and all(g[0] == "a" and len(g) > 1 for g in found) and sorted(n for g in found for n in g[1:]) == names[1:]
    assert bench.groups(names, wide, "a", "cpu", 512) == [names] and bench.groups(["a"], wide, "a", "cpu", 1) == [["a"]]


def test_saenb_alone_is_measured_and_goes_on_where_it_stopped(call, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    quick = ("--quick", "--alone", "--parts", "training,store", "--out", tmp_path, "--threads")
    call(*quick, 1)
    assert "training: 64 x 128" in capsys.readouterr().out
    kept = json.loads((tmp_path/"results"/"training.json").read_text())
    (item,) = kept["items"].values()
    plan = item["shape"]
    for name in ("saenb", "saenb, float32"):
        c = item["contestants"][name]
        assert len(c["seconds"]) + len(c["uncounted"]) == plan["rounds"] * plan["chunk"] and min(c["seconds"]) > 0 and c["peak"] > 50
        assert [p["step"] for p in c["curve"]] == [plan["chunk"], 2 * plan["chunk"]] and c["curve"][1]["loss"] < c["curve"][0]["loss"] < 1.1
    assert not item["contestants"]["five products, float32"]["curve"] and "failed" not in str(item)
    read = json.loads((tmp_path/"results"/"store.json").read_text())
    assert len(read["items"]["read"]["seconds"]) == read["settings"]["epochs"] * read["settings"]["tokens"] // read["settings"]["batch"]
    call(*quick, 1)
    assert "training: 64 x 128" not in capsys.readouterr().out and json.loads((tmp_path/"results"/"training.json").read_text()) == kept
    with pytest.raises(SaenbError, match=r"training.json was measured with other software or on another machine; delete it"): call(*quick, 2)


@pytest.mark.parametrize("arguments, words", [(("--parts", "trainin"), "no part called 'trainin'; did you mean training"), (("--threads", 0), "threads is 0; it has to be a whole number"),
                                              (("--env", ROOT/"docs"), "is no environment")])
def test_what_cannot_be_measured_is_told_in_a_sentence(call, tmp_path, arguments, words):
    with pytest.raises(SaenbError, match=words): call("--out", tmp_path, *arguments)


@pytest.mark.parametrize("text, words", [("{", "is not a readable file of results"), ('{"items": {"a": {"shape": 3}}}', "does not hold what a report needs .*delete it")])
def test_broken_results_are_told_in_a_sentence(call, tmp_path, text, words):
    (tmp_path/"results").mkdir()
    (tmp_path/"results"/"training.json").write_text(text)
    with pytest.raises(SaenbError, match=words): call("--report", "--out", tmp_path)


def test_the_program_ends_with_that_sentence(tmp_path):
    done = subprocess.run([sys.executable, FOLDER/"bench.py", "--parts", "speed", "--out", tmp_path], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode and done.stderr.strip().splitlines()[-1].startswith("bench: There is no part called 'speed'") and "Traceback" not in done.stderr


def test_a_harvest_beside_its_model_alone(capsys):
    """The dry run; cores and threads are as before afterwards."""
    def limits(): return torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0)
    before = limits()
    program("overlap").main(["--tiny", "--rounds", "1"])
    names, found = (line.split() for line in capsys.readouterr().out.splitlines()[:2])
    numbers = dict(zip(reversed(names), reversed(found))) # the model's name has spaces, and so have seconds
    assert limits() == before and "2,048" in found and numbers["wanted"] == "1.1" and numbers["reached"] in ("yes", "no")
    assert float(numbers["lowest"]) == float(numbers["ratio"]) == float(numbers["highest"]) > 0.5 and float(numbers["processor"]) > 1
