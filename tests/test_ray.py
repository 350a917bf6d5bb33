"""The same records on two machines, here two nodes of a Ray cluster on one, of which one dies."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import ROOT
from saenb import lab
from saenb.base.errors import SaenbError
from saenb.lab import ray_engine
from saenb.lab.engines import run_parallel, cores
from saenb.lab.ray_engine import need_ray, on_ray

needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="ray is not installed: `pip install "
                                   "'saenb[ray]'` brings it, too much of it for every check of a commit")


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one processor each, told where saenb and this file lie."""
    home = Path(tempfile.mkdtemp(prefix="r", dir="/tmp")) # sockets lie in it, whose paths must be short
    (home/"token").write_text(uuid.uuid4().hex)
    ours = dict(RAY_TMPDIR=str(home), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(home/"token"),
                RAY_USAGE_STATS_ENABLED="0", PYTHONPATH=f"{ROOT}:{ROOT/'tests'}", OMP_NUM_THREADS="1")
    before = {k: os.environ.get(k) for k in ours}
    os.environ.update(ours) # which ray reads when it is imported
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.second = cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()
    for k, v in before.items():
        os.environ.pop(k) if v is None else os.environ.update({k: v})
    shutil.rmtree(home, ignore_errors=True)


def noted(notes, seed, small, out):
    """Make a record, and note on which node."""
    if notes:
        import ray
        Path(notes, f"{seed} {time.time()} {ray.get_runtime_context().get_node_id()}").touch()
    lab.run("orthogonality/0", small, seed, out, steps=600, progress=False)


def lines(out, seed):
    """How many lines a record's log has."""
    try:
        return (out/"tiny"/"orthogonality"/"run_0"/f"seed_{seed}"/"train_log.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError: return 0


@needs_ray
def test_a_node_dies_and_the_records_are_those_of_one_machine(cluster, work, small, tmp_path):
    out, alone, folders = (work("ray"), work("processes"),
                           [Path("tiny")/"orthogonality"/"run_0"/f"seed_{seed}" for seed in (0, 1)])
    seen = []

    def kill():
        while not all((out/f/"checkpoint.safetensors").exists() for f in folders):
            time.sleep(0.02)
        cluster.remove_node(cluster.second, allow_graceful=False)
        while not all((out/f/"final_info.json").exists() for f in folders):
            seen.append([lines(out, seed) for seed in (0, 1)])
            time.sleep(0.01)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    ended = list(on_ray(noted, [(str(tmp_path), seed, small, str(out)) for seed in (0, 1)], 1, out,
                        cluster.address))
    assert sorted(ended) == [(0, None), (1, None)]
    killer.join(timeout=60)
    attempts = [sorted(p.name.split(" ") for p in tmp_path.glob(f"{seed} *")) for seed in (0, 1)]
    assert sorted(map(len, attempts)) == [1, 2] # one was begun again
    again = max(attempts, key=len)
    # on the other node
    assert again[0][2] == cluster.second.node_id and again[1][2] == cluster.head_node.node_id
    # and not from the beginning
    assert all(count >= 500 // 20 for both in seen for count in both) and len(seen) > 10
    assert not list((out/"tiny").rglob(".lock")) and not list(out.glob(".ray-*"))

    # one thread, as on each node
    list(run_parallel(noted, [(None, int(again[0][0]), small, str(alone))], cores()))
    folder = folders[int(again[0][0])]
    for name in ("sae/sae_weights.safetensors", "sae/cfg.json", "train_log.jsonl", "config.json", "notes.md"):
        assert (out/folder/name).read_bytes() == (alone/folder/name).read_bytes(), name
    ours, theirs = (json.loads((place/folder/"final_info.json").read_text()) for place in (out, alone))
    for made in (ours, theirs):
        del made["training_seconds"], made["seconds_a_step"]
    assert ours == theirs


@needs_ray
def test_ctrl_c_ends_the_tasks(cluster, work, small, tmp_path):
    out = work()
    process = subprocess.Popen([sys.executable, "-m", "saenb", "reproduce", "contrastive",
                                "--preset", small, "--seeds", "1", "--steps", "100000",
                                "--out", out, "--engine", "ray", "--address", cluster.address],
                               cwd=tmp_path, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    begins = time.time()
    while not (logs := [p for p in out.rglob("train_log.jsonl") if p.stat().st_size]):
        assert process.poll() is None and time.time() < begins + 120, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in said
    assert (said.splitlines()[-1]
            == "saenb: Stopped; what was finished is kept, and the same command goes on from there.")
    time.sleep(1)
    sizes = [p.stat().st_size for p in logs]
    time.sleep(2)
    assert [p.stat().st_size for p in logs] == sizes and not list((out/"tiny").glob(".ray-*"))


@needs_ray
@pytest.mark.parametrize("make, job, error, words",
                         [(time.sleep, (-1,), ValueError, "non-negative"),
                          (os._exit, (9,), SaenbError, "not even in 1 more attempt")])
def test_what_fails_ends_all(cluster, tmp_path, monkeypatch, make, job, error, words):
    monkeypatch.setattr(ray_engine, "RETRIES", 1)
    with pytest.raises(error, match=words):
        list(on_ray(make, [job, (600,)], 1, tmp_path, cluster.address))


@needs_ray
def test_a_machine_that_does_not_see_the_folder_is_named(cluster, tmp_path):
    need_ray(tmp_path, cluster.address)
    with pytest.raises(SaenbError, match=rf"{socket.gethostname()} does not see {tmp_path/'store'} .*--out "
                           r"on a network file system"):
        list(on_ray(time.sleep, [(0,)], 1, tmp_path, cluster.address, [tmp_path/"store"/"store.json"]))
    assert not list(tmp_path.glob(".ray-*"))


@needs_ray
def test_another_version_is_named(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "__version__", "9.9")
    with pytest.raises(SaenbError, match="has saenb .* and this one 9.9; install the same"):
        need_ray(tmp_path, cluster.address)


def test_shares_of_the_smallest_machine():
    machines = [dict(Resources=dict(CPU=64.0, GPU=8.0)), dict(Resources=dict(CPU=10.0, GPU=2.0))]
    assert ray_engine._shares(machines, 1) == (dict(num_cpus=10, num_gpus=1), 10)
    assert ray_engine._shares(machines, 8) == (dict(num_cpus=1.25, num_gpus=0.25), 1)
    assert ray_engine._shares(machines, 3) == (dict(num_cpus=3.3333, num_gpus=0.6666), 3)
    assert (ray_engine._shares([*machines, dict(Resources=dict(CPU=4.0))], 8)
            == (dict(num_cpus=1, num_gpus=0), 1))


def test_what_cannot_be_had_is_told_before_any_work(saenb, one_sentence, small, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: None)
    with pytest.raises(SaenbError, match=r"pip install 'saenb\[ray\]'"):
        lab.reproduce(["contrastive"], small, tmp_path, engine="ray")
    with pytest.raises(SaenbError, match="did you mean ray"):
        lab.reproduce(["contrastive"], small, tmp_path, engine="rai")
    assert not list(tmp_path.iterdir())
    one_sentence(saenb("reproduce", "--preset", small, "--engine", "rays"), "--engine")
    one_sentence(saenb("reproduce", "--preset", small, "--address", "here:6379"), "--engine ray")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:99999", "nonsense"])
@needs_ray
def test_an_address_where_no_ray_is(address, tmp_path):
    with pytest.raises(SaenbError, match=f"Ray at {address} cannot be used"):
        need_ray(tmp_path, address)
