import errno
import json
import os
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from saenb.base.errors import SaenbError, lookup
from saenb.base.files import atomic_write, fingerprint, need_room, read_json, read_tensors, write_json, write_tensors


def test_pick_offers_the_nearest_names():
    with pytest.raises(SaenbError, match="did you mean orthogonality/1"): lookup("orthogonalty/1", ["orthogonality/1", "positional/2"], "run")
    with pytest.raises(SaenbError, match="there are: a, b"): lookup("zzzz", ["a", "b"], "letter")


def test_a_file_is_whole_or_as_it_was(tmp_path):
    write_json(tmp_path/"x.json", dict(a=1))
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path/"x.json") as draft:
        draft.write_text("{half")
        1 / 0
    assert read_json(tmp_path/"x.json", "test") == dict(a=1)
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_json_refuses_numbers_that_are_none(tmp_path):
    with pytest.raises(ValueError): write_json(tmp_path/"x.json", dict(a=float("nan")))
    assert not (tmp_path/"x.json").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00\xff"])
def test_unreadable_json_is_named(tmp_path, content):
    (tmp_path/"x.json").write_text(content, encoding="latin-1")
    with pytest.raises(SaenbError, match="x.json"): read_json(tmp_path/"x.json", "record")


def test_tensors_and_facts_come_back(tmp_path):
    write_tensors(tmp_path/"t", dict(a=torch.arange(6).view(2, 3).T), dict(step=3))
    tensors, about = read_tensors(tmp_path/"t")
    assert torch.equal(tensors["a"], torch.arange(6).view(2, 3).T) and about == dict(step=3)


def test_a_pickle_is_never_loaded(tmp_path):
    torch.save(dict(a=torch.ones(2)), tmp_path/"t")
    with pytest.raises(SaenbError, match="not a readable"): read_tensors(tmp_path/"t")


def test_too_little_room_is_said_before_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SaenbError, match="This harvest needs 2.0 GB"): need_room(tmp_path/"not"/"yet", 2 * 10**9, "This harvest")


def test_a_full_disk_is_one_sentence(tmp_path):
    with pytest.raises(SaenbError, match="is full"), atomic_write(tmp_path/"x"): raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_really_is_full(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], capture_output=True).returncode: pytest.skip("mounting is not allowed here")
    try:
        write_json(tmp_path/"kept.json", dict(a=1))
        with pytest.raises(SaenbError, match="is full"): write_tensors(tmp_path/"t", dict(a=torch.zeros(2**20)))
        assert read_json(tmp_path/"kept.json", "test") == dict(a=1)
        assert not (tmp_path/"t").exists()
    finally: subprocess.run(["umount", tmp_path], check=True)


def test_fingerprints_do_not_depend_on_order():
    assert fingerprint(dict(a=1, b=[2, 3])) == fingerprint(json.loads('{"b": [2, 3], "a": 1}'))
