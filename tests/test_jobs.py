import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from saenb.base.errors import SaenbError
from saenb.lab.engines import cores, run_parallel, waiting_asleep


def test_each_job_is_told_with_its_place_when_it_ends():
    assert list(run_parallel(time.sleep, [(1.5,), (0,)], 2)) == [(1, None), (0, None)]
    assert sorted(run_parallel(pow, [(2, n) for n in range(7)], 3)) == [(n, 2**n) for n in range(7)]


def test_each_process_has_its_share_of_the_processor():
    shares = {n: {share for _, share in run_parallel(os.getenv, [("OMP_NUM_THREADS",)] * 2, n)}
              for n in (1, 2, 2 * cores())}
    assert shares == {1: {str(cores())}, 2: {str(max(1, cores() // 2))}, 2 * cores(): {"1"}}


def test_threads_sleep_while_they_wait_unless_somebody_says_otherwise(monkeypatch):
    """Those of a command, before torch is imported, and those of the processes that it starts."""
    for given, policy in ((dict(), "passive"), (dict(OMP_WAIT_POLICY="active"), "active"), (dict(GOMP_SPINCOUNT="9"), None)):
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"): monkeypatch.delenv(name, raising=False)
        for name, value in given.items(): monkeypatch.setenv(name, value)
        waiting_asleep()
        assert os.getenv("OMP_WAIT_POLICY") == policy
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert {p for _, p in run_parallel(os.getenv, [("OMP_WAIT_POLICY",)], 1)} == {"passive"}
    code = ("import atexit, os, sys; from saenb.cli import main; "
            "atexit.register(lambda: print('torch' in sys.modules, os.getenv('OMP_WAIT_POLICY'))); main(['--help'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines()[-1] == "False passive", done.stderr


@pytest.mark.parametrize("make, job, error, words",
                         [(time.sleep, (-1,), ValueError, "non-negative"),
                          (os._exit, (9,), SaenbError, "ended from outside.*fewer --jobs")])
def test_what_fails_ends_all(make, job, error, words, tmp_path):
    begun, began = tmp_path/"begun", time.perf_counter()
    with pytest.raises(error, match=words):
        list(run_parallel(_either, [(make, job), (time.sleep, (600,)), (Path.touch, (begun,))], 2))
    assert time.perf_counter() - began < 60 and not begun.exists()


def _either(make, job):
    if make is Path.touch:
        time.sleep(1) # were it begun, then after the failure
    return make(*job)


def alive(pid):
    """Is there such a process, and is it more than a name that nobody has asked for?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_asked(tmp_path, how):
    script = tmp_path/"script.py"
    script.write_text("import os, multiprocessing, time\nfrom saenb.lab.engines import run_parallel\n"
                      "if __name__ == '__main__':\n"
                      "    for _ in run_parallel(time.sleep, [(0,), (600,), (600,)], 2): "
                      "print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    children = [int(pid) for pid in process.stdout.readline().split()]
    assert len(children) == 2 and all(alive(pid) for pid in children)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else -signal.SIGINT)
    assert how == signal.SIGKILL or said.splitlines()[-1] == "KeyboardInterrupt"
    ends = time.time() + 20
    while any(alive(pid) for pid in children):
        assert time.time() < ends, "a process was left behind"
        time.sleep(0.05)
