"""The dictionaries in tests/interchange were written by the packages themselves, with what these make of
some inputs; benchmarks/interchange.py made them."""
import http.server
import io
import json
import random
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file

from conftest import ROOT
from saenb.base.errors import SaenbError
from saenb.lab.records import Record
from saenb.sae.formats import saelens, weights
from saenb.sae.formats.saelens import export
from saenb.sae.gates import JumpReLU, TopK
from saenb.sae.sae import SAE, SAEConfig, load_sae

THERE = Path(__file__).parent/"interchange"
FOLDERS = {p.parent.relative_to(THERE).as_posix(): p.parent
           for p in sorted(THERE.rglob("expected.safetensors"))}
GEMMA = next(name for name in FOLDERS if "gemma" in name)
every = pytest.mark.parametrize("name", FOLDERS)


def expected(name): return load_file(FOLDERS[name]/"expected.safetensors")


def gives(sae, there):
    """Check that a dictionary makes of the inputs what its own package did."""
    with torch.no_grad(): f, made = sae.encode(there["x"]), sae(there["x"])
    torch.testing.assert_close(f, there["f"], rtol=0, atol=1e-5 * there["f"].max().item())
    torch.testing.assert_close(made, there["reconstruction"], rtol=0,
                               atol=1e-5 * there["reconstruction"].abs().max().item())
    assert 0 < (f > 0).float().mean() < 1 and ((f > 0) == (there["f"] > 0)).all()


@pytest.fixture
def copy(tmp_path):
    """A folder of other people's, to be changed."""
    def make(name, change=None, file=None):
        shutil.copytree(FOLDERS[name], tmp_path/name, dirs_exist_ok=True)
        file = tmp_path/name/(file or ("cfg.json" if (tmp_path/name/"cfg.json").exists() else "config.json"))
        if change:
            entry = json.loads(file.read_text())
            change(entry)
            file.write_text(json.dumps(entry))
        return tmp_path/name
    return make


@pytest.fixture
def nothing_is_made(monkeypatch):
    """What is refused is refused before a dictionary is made."""
    def never(*_): raise AssertionError("a dictionary was made")
    for module in (weights, saelens): monkeypatch.setattr(module, "SAE", never)


def test_all_formats_are_there():
    assert len(FOLDERS) == 34 and "layers.19" in FOLDERS and {"jumprelu", "gated_plain", "batchtopk_trained", "MatryoshkaBatchTopKSAE",
                                   "AutoEncoderNew"} <= FOLDERS.keys()


@every
def test_a_foreign_dictionary_gives_what_its_package_gives(name):
    sae = load_sae(FOLDERS[name])
    gives(sae, expected(name))
    assert ((sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.hook_layer) == (8, 16, 19)
            and sae.cfg.model_name.endswith("gemma-2-2b" if name != "layers.19" else "")) # sparsify keeps no model's name
    assert (sae.cfg.training_steps is None
            and sae.cfg.hook_name == ("" if name == "AutoEncoderNew" else "blocks.19.hook_resid_post"))


@every
def test_it_is_saved_and_exported_without_loss(name, tmp_path):
    sae, there = load_sae(FOLDERS[name]), expected(name)
    for folder in (sae.save(tmp_path/"saved"), tmp_path/"exported"):
        if folder.name == "exported": export(sae, folder)
        again = load_sae(folder)
        assert (torch.equal(again.encode(there["x"]), sae.encode(there["x"])) and again.cfg == sae.cfg
                and again.fingerprint() == sae.fingerprint())
    entry = json.loads((tmp_path/"exported"/"cfg.json").read_text())
    assert entry["architecture"] == {(): "standard", ("JumpReLU",): "jumprelu",
                                     ("TopK",): "topk"}[tuple(g["name"] for g in sae.cfg.gates)]
    assert (entry["metadata"]["sae_lens_version"].startswith("6.")
            and entry["metadata"]["hook_name"] == sae.cfg.hook_name)


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "MatryoshkaBatchTopKSAE",
                                  "JumpReluAutoEncoder", "GatedAutoEncoder"])
def test_a_file_alone_is_enough_where_its_tensors_tell(name, tmp_path):
    sae = load_sae(shutil.copy(FOLDERS[name]/"ae.pt", tmp_path/"some.pt"))
    gives(sae, expected(name))
    assert sae.cfg.hook_layer is None and not sae.cfg.hook_name and not sae.cfg.model_name
    with pytest.raises(SaenbError, match="Nobody knows which layer"):
        from saenb.evals.evaluation import Readings
        Readings(None, sae.cfg.hook_layer)


def test_a_file_may_be_named_in_place_of_its_folder(copy, tmp_path):
    gives(load_sae(FOLDERS["AutoEncoderTopK"]/"ae.pt"), expected("AutoEncoderTopK"))
    gives(load_sae(FOLDERS[GEMMA]/"params.npz"), expected(GEMMA))
    (copy("BatchTopKSAE")/"checkpoints").mkdir()
    gives(load_sae((tmp_path/"BatchTopKSAE"/"ae.pt").rename(tmp_path/"BatchTopKSAE"/"checkpoints"/"ae_5.pt")),
          expected("BatchTopKSAE"))


def test_only_a_scaling_factor_of_one_is_passed_over(copy):
    folder = copy("standard_before_6")
    for factor in (1.0, 2.0):
        save_file(load_file(FOLDERS["standard_before_6"]/"sae_weights.safetensors")
                      | dict(scaling_factor=torch.full((16,), factor)), folder/"sae_weights.safetensors")
        if factor == 1: gives(load_sae(folder), expected("standard_before_6"))
    with pytest.raises(SaenbError, match="scaling_factor"): load_sae(folder)


def test_gates_are_their_definitions():
    draw = torch.Generator().manual_seed(0)
    f = torch.relu(torch.randn(5, 7, 16, generator=draw))
    jump, top = JumpReLU(8, 16), TopK(8, 16, k=3)
    jump.threshold.copy_(torch.rand(16, generator=draw))
    assert torch.equal(jump.gate(None, f, None), f * (f > jump.threshold))
    for row, kept in zip(f.flatten(0, 1), top.gate(None, f, None).flatten(0, 1)):
        assert torch.equal(kept, torch.where(row >= row.sort().values[-3], row, 0))
    twins = [SAE(SAEConfig(d_in=8, d_sae=16, gates=[dict(name="TopK", settings=dict(k=k))])) for k in (3, 4)]
    assert twins[0].fingerprint() != twins[1].fingerprint() # or one would be given the other's results
    for k in (0, 17, 2.0, "3", True, None):
        with pytest.raises(SaenbError, match="whole number from 1 to 16"):
            TopK(8, 16, k=k)


def nested(depth): return json.loads("[" * depth + "]" * depth)


BAD = [ # a folder, a change of its configuration, what is said
    ("standard", lambda e: e.update(d_sae=2**23), "W_dec, W_enc, b_enc differ"),
    ("standard", lambda e: e.update(d_sae=2**60),
     "d_sae=1152921504606846976; it has to be a positive whole number"),
    ("standard", lambda e: e.update(d_in="8"), "d_in='8'"),
    ("standard", lambda e: e.update(d_in=float("nan")), "NaN is no number"),
    ("standard", lambda e: e.update(d_in=True), "d_in=True"),
    ("standard", lambda e: e.pop("d_in"), "d_in=nothing"),
    ("standard", lambda e: e.update(architecture=["standard"]), "architecture=a list"),
    ("standard", lambda e: e.update(architecture="temporal"),
     "architecture='temporal', which saenb does not read: it reads standard, topk"),
    ("standard", lambda e: e.update(activation_fn="tanh-relu"), "activation_fn='tanh-relu'"),
    ("standard", lambda e: e.update(reshape_activations="hook_z"), "reshape_activations='hook_z'"),
    ("standard", lambda e: e.update(normalize_activations="layer_norm"), "no weights can express"),
    ("standard", lambda e: e.update(normalize_activations="constant_norm_rescale"), "no weights can express"),
    ("standard", lambda e: e.update(normalize_activations="expected_average_only_in"),
     "factors are not in the folder"),
    ("standard", lambda e: e.update(normalize_activations=["none"]), "normalize_activations=a list"),
    ("standard", lambda e: e.update(apply_b_dec_to_input="false"), "apply_b_dec_to_input='false'"),
    ("standard", lambda e: e["metadata"].update(hook_name=["blocks", 19]), "hook_name=a list"),
    ("standard", lambda e: e["metadata"].update(hook_layer=-1), "hook_layer=-1"),
    ("standard", lambda e: e["metadata"].update(model_name="x" * 10**5), "model_name='xx"),
    ("standard", lambda e: e.update(metadata=[]), "metadata=a list"),
    ("standard", lambda e: e["metadata"].update(deep=nested(500)), "nested deeper than"),
    ("standard", lambda e: e["metadata"].update(long="x" * 2**21), "2,097,... bytes long"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(scale=float("inf"))), "Infinity is no number"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(scale="1")), "scale='1'"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(training_steps=1.5)), "training_steps=1.5"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(gates=["HardMask"])),
     "gates=a list; it has to be a list of gates"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(gates=[dict(name=["HardMask"], settings={})])),
     "list of gates"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(gates=[dict(name="HardMsk", settings={})])),
     "did you mean HardMask"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(
        gates=[dict(name="PositionContrast", settings=dict(weight=1.0))])), "acts in training alone"),
    ("standard",
     lambda e: e["metadata"].update(saenb=dict(gates=[dict(name="HardMask", settings=dict(length=10**12))])),
     "far larger than the file"),
    ("standard",
     lambda e: e["metadata"].update(saenb=dict(gates=[dict(name="HardMask", settings=dict(length=10**30))])),
     "HardMask"),
    ("standard",
     lambda e: e["metadata"].update(saenb=dict(gates=[dict(name="HybridMask", settings=dict(rank=10**12))])),
     "far larger than the file"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(
        gates=[dict(name="EvolvingMask", settings=dict(length=10**6))])), "far larger than the file"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(gates=[
        dict(name="FeatureRouter", settings=dict(groups=4, heads=10**11))])), "far larger than the file"),
    ("standard",
     lambda e: e["metadata"].update(saenb=dict(gates=[dict(name="HardMask", settings=dict(length=64))])),
     "gates.0.mask differ"),
    ("standard",
     lambda e: e["metadata"].update(saenb=dict(gates=[dict(name="HardMask", settings=dict(length="64"))])),
     "cannot be made"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(
        gates=[dict(name="SoftMask", settings=dict(temperature=float("nan")))])), "NaN is no number"),
    ("standard", lambda e: e["metadata"].update(saenb=dict(gates=[dict(name="TopK", settings=dict(k=17))])),
     "whole number from 1 to 16"),
    ("topk", lambda e: e.update(k=0), "k=0"),
    ("topk", lambda e: e.update(k="4"), "k='4'"),
    ("topk", lambda e: e.update(rescale_acts_by_decoder_norm=1), "rescale_acts_by_decoder_norm=1"),
    ("topk_before_6", lambda e: e.update(activation_fn_kwargs=[4]), "activation_fn_kwargs=a list"),
    ("jumprelu", lambda e: e.update(activation_fn="topk", activation_fn_kwargs=dict(k=4)),
     "activation_fn='topk'"),
    ("jumprelu", lambda e: e.update(architecture="standard"), "threshold differ"),
    ("GatedAutoEncoder", lambda e: e.update(trainer=[]), "trainer=a list"),
    ("GatedAutoEncoder", lambda e: e["trainer"].update(dict_class="IdentityDict"),
     "dict_class='IdentityDict'"),
    ("GatedAutoEncoder", lambda e: e["trainer"].update(dict_class="AutoEncoder"), "differ"),
    ("GatedAutoEncoder", lambda e: e["trainer"].update(dict_size=2**23),
     "dict_size is 8,388,608 there and 16 here"),
    ("GatedAutoEncoder", lambda e: e["trainer"].update(layer="19"), "layer='19'"),
    ("GatedAutoEncoder", lambda e: e["trainer"].update(lm_name=["gemma"]), "lm_name=a list"),
    ("AutoEncoderTopK", lambda e: e["trainer"].update(k=5), "k is 5 there and 4 here"),
]


@pytest.mark.parametrize("name, change, said", BAD)
def test_a_configuration_that_cannot_be_had_is_refused_by_name(copy, nothing_is_made, name, change, said):
    with pytest.raises(SaenbError, match=said) as told:
        load_sae(copy(name, change))
    assert len(str(told.value)) < 700 and "\n" not in str(told.value) and str(told.value).endswith((".", "?"))


def test_settings_of_the_stream_beside_gates_are_refused(copy, tmp_path):
    (SAE(SAEConfig(d_in=8, d_sae=16, gates=[dict(name="HardMask", settings=dict(parts=4))]))
     .save(tmp_path/"masked"))
    assert load_sae(tmp_path/"masked").gates
    entry = json.loads((tmp_path/"masked"/"cfg.json").read_text())
    (tmp_path/"masked"/"cfg.json").write_text(json.dumps(entry | dict(apply_b_dec_to_input=False)))
    with pytest.raises(SaenbError, match="beside gates"):
        load_sae(tmp_path/"masked")


@pytest.mark.parametrize("scaler, said",
                         [("{}", "scaling_factor=nothing"), ('{"scaling_factor": 0}', "scaling_factor=0"),
                          ('{"scaling_factor": NaN}', "NaN is no number"), ("[", "activation_scaler.json")])
def test_a_factor_that_is_none(copy, nothing_is_made, scaler, said):
    folder = copy("standard_scaled")
    (folder/"activation_scaler.json").write_text(scaler)
    with pytest.raises(SaenbError, match=said): load_sae(folder)


class Asks:
    """Pickled, asks for a function to be called."""
    def __init__(self, function, *arguments): self.asked = function, arguments
    def __reduce__(self): return self.asked


def state(name="AutoEncoder"):
    return torch.load(FOLDERS[name]/"ae.pt", weights_only=True)


def packed_twice(path):
    """A .pt file with two descriptions of its tensors."""
    torch.save(state(), path)
    with zipfile.ZipFile(path, "a") as z: z.writestr("other/data.pkl", b"")


PT = {
    "holds more than tensors (__builtin__ print)": lambda p:
        torch.save(state() | dict(more=Asks(print, "run")), p),
    "holds more than tensors (__builtin__ bytearray)": lambda p:
        torch.save(state() | dict(more=Asks(bytearray, 10**13)), p),
    "holds more than tensors (torch Tensor)": lambda p:
        torch.save(state() | dict(more=Asks(torch.Tensor, 10**13)), p),
    "no tensor that fits in it": lambda p:
        torch.save(state() | {"encoder.weight": torch.zeros(1).expand(2**20, 2**20)}, p),
    "more is no tensor": lambda p: torch.save(state() | dict(more=[1, 2]), p),
    "its tensors have no names": lambda p: torch.save(torch.zeros(3), p),
    "bytes in 1 places describe its tensors": lambda p:
        torch.save({str(i): torch.zeros(1) for i in range(20_000)}, p),
    "torch.save writes since 1.6": lambda p: torch.save(state(), p, _use_new_zipfile_serialization=False),
    "should be a matrix": lambda p: torch.save(state() | {"encoder.weight": torch.zeros(8)}, p),
    "could be AutoEncoderTopK or BatchTopKSAE": lambda p: shutil.copy(FOLDERS["BatchTopKSAE"]/"ae.pt", p),
    "holds none of the dictionaries": lambda p: torch.save(dict(weight=torch.zeros(2, 2)), p),
    "decoder.weight differ": lambda p: torch.save(state() | {"decoder.weight": torch.zeros(8, 15)}, p),
    "bytes in 2 places describe its tensors": packed_twice,
    "is not a readable dictionary": lambda p:
        p.write_bytes((FOLDERS["AutoEncoder"]/"ae.pt").read_bytes()[:2000]),
}


@pytest.mark.parametrize("said", PT)
def test_a_pt_file_that_is_more_or_less_than_tensors(tmp_path, nothing_is_made, capsys, said):
    PT[said](tmp_path/"ae.pt")
    with pytest.raises(SaenbError) as told: load_sae(tmp_path)
    assert said in str(told.value) and "\n" not in str(told.value) and not capsys.readouterr().out


def arrays(): return dict(np.load(FOLDERS[GEMMA]/"params.npz"))


def lying(path):
    """An archive whose header speaks of a large matrix."""
    np.savez(path, **arrays())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f4", fortran_order=False, shape=(2**20, 2**20)))
    with zipfile.ZipFile(path, "a") as z:
        z.writestr("more.npy", header.getvalue() + b"\0" * 64)


NPZ = {
    "says it holds (1048576, 1048576)": lying,
    "unpacks to far more": lambda p: np.savez_compressed(p, **arrays() | dict(more=np.zeros(10**7, "f4"))),
    "of object": lambda p: np.savez(p, **arrays() | dict(more=np.array([Asks(print, "run")], dtype=object))),
    "of <U5": lambda p: np.savez(p, **arrays() | dict(b_enc=np.array(["three"] * 16))),
    "threshold differ": lambda p: np.savez(p, **{k: v for k, v in arrays().items() if k != "threshold"}),
    "W_dec differ": lambda p: np.savez(p, **arrays() | dict(W_dec=np.zeros((16, 9), "f4"))),
    "should be a matrix": lambda p: np.savez(p, **arrays() | dict(W_enc=np.zeros((0, 16), "f4"))),
    "is not a readable dictionary": lambda p:
        p.write_bytes((FOLDERS[GEMMA]/"params.npz").read_bytes()[:1000]),
}


@pytest.mark.parametrize("said", NPZ)
def test_an_npz_file_that_is_more_or_less_than_tensors(tmp_path, nothing_is_made, capsys, said):
    NPZ[said](tmp_path/"params.npz")
    with pytest.raises(SaenbError) as told: load_sae(tmp_path)
    assert said in str(told.value) and not capsys.readouterr().out


@pytest.mark.parametrize("path, said",
                         [("gemma-scope-2b-pt-transcoders/layer_19/width_4k", "transcoders weights"),
                          ("gemma-scope-2b-pt-res/embedding/width_4k", "embedding weights|res weights")])
def test_what_gemma_scope_has_besides_dictionaries(tmp_path, nothing_is_made, path, said):
    (tmp_path/path).mkdir(parents=True)
    shutil.copy(FOLDERS[GEMMA]/"params.npz", tmp_path/path)
    with pytest.raises(SaenbError, match=said): load_sae(tmp_path/path)


def test_a_gemma_scope_file_from_anywhere(tmp_path):
    sae = load_sae(shutil.copy(FOLDERS[GEMMA]/"params.npz", tmp_path/"any.npz"))
    gives(sae, expected(GEMMA))
    assert sae.cfg.hook_layer is None and not sae.cfg.hook_name


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
                        | st.sampled_from(["none", "topk", "layer_norm", "HardMask", "gated"]),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
                        st.sampled_from(["name", "settings", "gates", "saenb", "k", "length", "hook_name"]),
                        inner, max_size=3), max_leaves=6)
fuzz = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fuzz
@given(name=st.sampled_from(["standard", "topk", "topk_before_6", "standard_scaled", "gated_plain_whitened",
                             "AutoEncoderTopK", "JumpReluAutoEncoder"]), data=st.data())
def test_no_configuration_is_a_traceback(copy, name, data):
    """Whatever a field holds, there is a dictionary or a sentence."""
    def change(entry):
        inside = data.draw(st.sampled_from([e for e in (entry, entry.get("metadata"), entry.get("trainer"))
                                            if e is not None]))
        inside[data.draw(st.sampled_from(
            sorted({*inside, "k", "metadata", "saenb", "architecture", "hook_layer"})))] = data.draw(JSON)
    try: load_sae(copy(name, change))
    except SaenbError: pass


@fuzz
@given(name=st.sampled_from(["jumprelu", "GatedAutoEncoder", GEMMA]), seed=st.integers(0, 10**6))
def test_no_broken_file_is_a_traceback(copy, name, seed):
    """Bytes that are changed or missing give a dictionary or a sentence."""
    folder, draw = copy(name), random.Random(seed)
    file = next(p for p in folder.iterdir() if p.name in ("sae_weights.safetensors", "ae.pt", "params.npz"))
    content = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    file.write_bytes(content[:draw.choice([len(content), draw.randrange(len(content))])])
    try: load_sae(folder)
    except SaenbError: pass


def test_the_command_line_exports(called, one_sentence, tmp_path):
    done = called("export", FOLDERS["gated"], "--to", "saelens", "out")
    assert done.returncode == 0 and done.stdout == "SAELens loads out as jumprelu.\n", done.stderr
    gives(load_sae(tmp_path/"out"), expected("gated"))
    one_sentence(called("export", FOLDERS["gated"], "--to", "saelens", "out"), "already holds a dictionary")
    one_sentence(called("export", FOLDERS["gated"], "--to", "pickle", "elsewhere"), "saelens")


def test_what_saelens_lacks_is_said(tmp_path):
    sae = SAE(SAEConfig(d_in=8, d_sae=16, gates=[dict(name="HardMask", settings=dict(parts=4))])).eval()
    said = export(sae, tmp_path/"masked")
    assert "HardMask" in said and "import saenb.saelens" in said
    assert json.loads((tmp_path/"masked"/"cfg.json").read_text())["architecture"] == "saenb_gated"
    assert torch.equal(load_sae(tmp_path/"masked").gates[0].mask, sae.gates[0].mask)


def test_saelens_environment_needs_no_new_transformer_lens():
    """Where SAELens is, transformer-lens is older, and saenb is there without what it depends on."""
    without = "import sys; sys.modules.update(transformer_lens=None, transformers=None, datasets=None)\n"
    program = (without + "import saenb, saenb.sae, saenb.saelens, saenb.interchange, saenb.ideas.run; "
               "print(saenb.saelens.find_spec('sae_lens'))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def hub(tmp_path):
    """A hub on this machine with one repository, many dictionaries in it, and a list of the files that
    were asked for."""
    repository, commit, asked = tmp_path/"repository", "0" * 39 + "1", []
    for inside, name in (("layer_19/width_4k/average_l0_1", GEMMA), ("trainer_0", "BatchTopKSAE"),
                         ("", "jumprelu")):
        shutil.copytree(FOLDERS[name], repository/inside, dirs_exist_ok=True)
    (repository/"trainer_0"/"large.bin").write_bytes(b"0")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path, files = self.path.split("?")[0], [p for p in repository.rglob("*") if p.is_file()]
            names = [p.relative_to(repository).as_posix() for p in files]
            if path.startswith("/api/models/google/gemma-scope-2b-pt-res"):
                tree = [dict(type="file", path=n, size=p.stat().st_size, oid=f"{i:040}")
                        for i, (n, p) in enumerate(zip(names, files))]
                about = dict(_id="1", id="google/gemma-scope-2b-pt-res",
                             modelId="google/gemma-scope-2b-pt-res", sha=commit,
                             siblings=[dict(rfilename=n) for n in names], tags=[], private=False, downloads=0)
                return self.answer(json.dumps(tree if "/tree/" in path else about).encode(),
                                   "application/json")
            name = path.partition(f"/resolve/{commit}/")[2]
            if name not in names: return self.send_error(404)
            if self.command == "GET": asked.append(name)
            self.answer((repository/name).read_bytes())
        do_HEAD = do_GET

        def answer(self, content, kind="application/octet-stream"):
            self.send_response(200)
            for key, value in (("Content-Type", kind), ("Content-Length", len(content)),
                               ("ETag", f'"{hash(content) & 0xffffffff:08x}"'), ("X-Repo-Commit", commit)):
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "GET": self.wfile.write(content)

        def log_message(self, *args): pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield dict(HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HUB_OFFLINE="0",
               HF_HOME=str(tmp_path/"hf")), asked
    server.shutdown()


def test_a_folder_in_a_repository(saenb, one_sentence, hub, tmp_path):
    env, asked = hub
    name = "google/gemma-scope-2b-pt-res"
    for inside, source, files in (("/layer_19/width_4k/average_l0_1", GEMMA, {"params.npz"}),
                                  ("/trainer_0", "BatchTopKSAE", {"ae.pt", "config.json"}),
                                  ("", "jumprelu", {"cfg.json", "sae_weights.safetensors"})):
        asked.clear()
        done = saenb("export", name + inside, "--to", "saelens", source.split("/")[0], env=env)
        assert done.returncode == 0, done.stderr
        assert set(asked) == {f"{inside}/{file}".lstrip("/") for file in files}
        sae = load_sae(tmp_path/source.split("/")[0])
        gives(sae, expected(source))
        assert sae.cfg.hook_layer == 19
    one_sentence(saenb("export", f"{name}/layer_20", "--to", "saelens", "none", env=env),
                 "no dictionary in layer_20", "owner/name/folder/inside")
    one_sentence(saenb("export", f"{name}/../secret", "--to", "saelens", "none", env=env), "check the path")


@pytest.mark.parametrize(
    "name", ["owner/name/../../etc", "owner/name/*", "owner/name/a//b", "owner/.hidden", "owner/name/[ab]"])
def test_a_name_that_leaves_its_repository(name):
    with pytest.raises(SaenbError, match="check the path"): load_sae(name)


def test_results_lie_beside_the_dictionary(tmp_path, copy):
    folder = copy("AutoEncoderTopK")
    (tmp_path/"config.json").write_text("{}") # of whatever lies around it
    assert (Record.place(folder) == (folder, folder/"evals")
            and Record.place(folder/"ae.pt") == (folder/"ae.pt", folder/"evals"))
    shutil.copy(folder/"ae.pt", folder/"ae_500.pt")
    assert Record.place(folder/"ae_500.pt") == (folder/"ae_500.pt", folder/"evals"/"ae_500")
    record = tmp_path/"seed_0"
    SAE(SAEConfig(d_in=8, d_sae=16)).save(record/"sae")
    (record/"config.json").write_text("{}")
    assert Record.place(record) == Record.place(record/"sae") == (record/"sae", record/"evals")
    assert Record.place("owner/name/inside") == ("owner/name/inside", None)


def test_a_foreign_dictionary_is_evaluated(fresh, small, harvested, tmp_path, capsys):
    """As Gemma Scope writes it, with a threshold, of the embedded model's width."""
    from saenb.cli import main
    sae = fresh(d_sae=256)
    with torch.no_grad():
        inside, threshold = sae.b_enc + -sae.b_dec @ sae.W_enc, torch.full((256,), 1.0)
    folder = tmp_path/"layer_0"
    folder.mkdir()
    np.savez(folder/"params.npz", **{k: v.detach().numpy() for k, v in dict(
        W_enc=sae.W_enc, W_dec=sae.W_dec, b_dec=sae.b_dec, b_enc=inside, threshold=threshold).items()})
    evaluate = lambda path: main(["eval", str(path), "--evals", "core", "--preset", small, "--out",
                                  str(harvested)])
    assert evaluate(folder) == 0
    result, shown = json.loads((folder/"evals"/"core.json").read_text()), capsys.readouterr().out
    assert ({p.name for p in (folder/"evals").iterdir()} == {"core.json", "core.png", "core.txt"}
            and str(folder/"evals") in shown)
    assert (result["sae_cfg_dict"]["gates"] == [dict(name="JumpReLU", settings={})]
            and result["sae_cfg_dict"]["hook_layer"] == 0)
    assert (0 < result["eval_result_metrics"]["sparsity"]["l0"] < 0.05 * 256
            and result["eval_result_metrics"]["reconstruction_quality"]["explained_variance"] < 1)
    made = (folder/"evals"/"core.json").stat().st_mtime_ns
    assert evaluate(folder/"params.npz") == 0 and (folder/"evals"/"core.json").stat().st_mtime_ns == made


def test_a_dictionary_is_judged_in_units_of_its_rows():
    from saenb.sae.sae import with_unit_rows
    draw = torch.Generator().manual_seed(0)
    x, lengths = torch.randn(200, 6, generator=draw), torch.linspace(0.2, 5, 10)
    def uneven(*gates):
        sae = (SAE(SAEConfig(d_in=6, d_sae=10, gates=[dict(name=n, settings=s) for n, s in gates]))
               .initialise(x))
        with torch.no_grad(): sae.W_dec *= lengths[:, None]
        return sae
    for gates in ((), (("JumpReLU", {}),), (("HardMask", {}),)):
        sae = uneven(*gates)
        if gates and gates[0][0] == "JumpReLU":
            sae.gates[0].threshold.fill_(0.2)
        even, at = with_unit_rows(sae), torch.arange(200) % 128
        torch.testing.assert_close(even(x, at), sae(x, at))
        torch.testing.assert_close(even.encode(x, at), sae.encode(x, at) * lengths)
        torch.testing.assert_close(even.W_dec.norm(dim=1), torch.ones(10))
    topk = uneven(("TopK", dict(k=2)))
    assert with_unit_rows(topk) is topk
    ours = SAE(SAEConfig(d_in=6, d_sae=10)).initialise(x)
    assert with_unit_rows(ours) is ours
