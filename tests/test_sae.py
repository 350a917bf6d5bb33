import json
import shutil

import pytest
import torch

import saenb
from saenb.base.errors import SaenbError
from saenb.sae.gates import MECHANISMS, make_mechanism
from saenb.sae.sae import SAE, SAEConfig, high_quantile
from saenb.train.mechanism import Mechanism


class Halve(Mechanism):
    """Halves what is active at odd positions; has a learned part."""
    def __init__(self, d_in, d_sae, share=0.5):
        super().__init__(d_in, d_sae, share=share)
        self.weight = torch.nn.Parameter(torch.full((d_sae,), share))

    def gate(self, x, f, positions):
        return f if positions is None else torch.where((positions % 2 == 1)[..., None], f * self.weight, f)


def test_encode_is_the_definition(fresh, store):
    sae, x = fresh(), store.rows(0, 500).x
    with torch.no_grad():
        sae.b_enc.normal_()
        f = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
        torch.testing.assert_close(sae.encode(x), f, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(sae(x), f @ sae.W_dec + sae.b_dec, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(sae.encode(x.view(5, 100, -1)), sae.encode(x).view(5, 100, -1), atol=1e-3,
                                   rtol=1e-4)


def test_initialisation_comes_from_data_and_seed(fresh, store):
    sae, x = fresh(), store.rows(0, 8192).x
    torch.testing.assert_close(sae.b_dec.data, x.mean(0))
    assert abs(sae.cfg.scale - (x - x.mean(0)).norm(dim=1).pow(2).mean().sqrt().item()) < 1e-3
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae))
    assert abs((sae.encode(x) > 0).float().mean().item() - 0.05) < 0.02
    assert sae.fingerprint() == fresh().fingerprint() != fresh(seed=1).fingerprint()


@pytest.mark.parametrize("q", [0.95, 1 - 3e-4, 0.5, 0.0, 1.0])
def test_a_quantile_is_to_the_bit_what_sorting_gives(q):
    for shape in ((8192, 3), (1000, 7), (20, 2), (2, 3), (1, 4)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).round(decimals=1) # some are equal
        for values in (x, x.double()): assert torch.equal(high_quantile(values, q), torch.quantile(values, q, dim=0))


def test_saved_and_loaded_by_every_door(trained, store, tmp_path):
    trained.save(tmp_path/"sae")
    trained.save_pretrained(tmp_path/"hub")
    x = store.rows(0, 50).x
    for sae in (saenb.load_sae(tmp_path/"sae"), SAE.from_pretrained(str(tmp_path/"sae")),
                SAE.from_pretrained(str(tmp_path/"hub"))):
        assert torch.equal(sae.encode(x), trained.encode(x)) and sae.cfg == trained.cfg
    assert {"cfg.json", "sae_weights.safetensors"} == {p.name for p in (tmp_path/"sae").iterdir()}


def test_the_file_has_saelens_fields(trained, store, tmp_path):
    entry = json.loads((trained.save(tmp_path)/"cfg.json").read_text())
    assert (entry["architecture"] == "standard" and entry["apply_b_dec_to_input"]
            and entry["normalize_activations"] == "none")
    assert entry["metadata"]["hook_name"] == f"blocks.{store.layer}.hook_resid_post"
    from safetensors.torch import load_file
    assert {k: tuple(v.shape) for k, v in load_file(tmp_path/"sae_weights.safetensors").items()} == dict(
        W_enc=(192, 512), W_dec=(512, 192), b_enc=(512,), b_dec=(192,))


def test_a_plain_saelens_file_is_read(trained, store, tmp_path):
    trained.save(tmp_path)
    entry = json.loads((tmp_path/"cfg.json").read_text())
    del entry["metadata"]["saenb"], entry["metadata"]["hook_layer"]
    (tmp_path/"cfg.json").write_text(json.dumps(entry))
    sae = SAE.load(tmp_path)
    assert sae.cfg.training_steps is None and sae.cfg.hook_layer == store.layer


def test_a_gate_travels_with_its_dictionary(store, tmp_path):
    cfg = SAEConfig(d_in=store.d_in, d_sae=64, gates=[dict(name="Halve", settings=dict(share=0.25))])
    x, positions = store.rows(0, 40).x, torch.arange(40)
    sae = SAE(cfg).initialise(x)
    with torch.no_grad(): sae.gates[0].weight.uniform_()
    again = SAE.load(sae.save(tmp_path))
    assert torch.equal(again.encode(x, positions), sae.encode(x, positions))
    assert not torch.equal(sae.encode(x, positions), sae.encode(x))
    assert json.loads((tmp_path/"cfg.json").read_text())["architecture"] == "saenb_gated"


class Rest(Mechanism):
    def __init__(self, d_in, d_sae, n_active):
        super().__init__(d_in, d_sae, n_active=n_active)
        self.n_active = n_active

    def gate(self, x, f, positions): return f


def test_what_rests_is_silent_and_costs_no_gradient(store):
    """Slices of the matrices give what whole ones and a mask would, gradients included."""
    x, mask = store.rows(0, 300).x.float(), (torch.arange(64) < 48).float()
    rested = (SAE(SAEConfig(d_in=store.d_in, d_sae=64, gates=[dict(name="Rest", settings=dict(n_active=48))]))
              .initialise(x))
    whole = SAE(SAEConfig(d_in=store.d_in, d_sae=64)).initialise(x)
    f = rested.encode(x)
    assert rested.n_active == 48 and (f[:, 48:] == 0).all() and (whole.encode(x)[:, 48:] > 0).any()
    torch.testing.assert_close(f, whole.encode(x) * mask)
    for sae, made in ((rested, rested.decode(f)), (whole, whole.decode(whole.encode(x) * mask))):
        (made - x).pow(2).sum().backward()
    for name, p in whole.named_parameters():
        torch.testing.assert_close(dict(rested.named_parameters())[name].grad, p.grad, rtol=1e-4, atol=1e-2)
    woken = f.detach().clone()
    woken[:, 60] = 1.0 # an intervention may speak with a feature that rests
    torch.testing.assert_close(rested.eval().decode(woken) - rested.decode(f),
                               rested.W_dec[60].expand(300, -1), rtol=1e-4, atol=1e-5)


def changed(folder, tmp_path, name, change):
    shutil.copytree(folder, tmp_path/name)
    entry = json.loads((tmp_path/name/"cfg.json").read_text())
    change(entry)
    (tmp_path/name/"cfg.json").write_text(json.dumps(entry))
    return tmp_path/name


@pytest.mark.parametrize(
    "change, said",
    [
         (lambda e: e.update(d_sae=100), "does not fit its configuration"),
     (lambda e: e.update(d_sae=-1), "positive whole number"),
     (lambda e: e.update(d_sae="512"), "positive whole number"),
     (lambda e: e.update(architecture="transcoder"), "architecture='transcoder'"),
     (lambda e: e.update(architecture="jumprelu"), r"threshold differ"),
     (lambda e: e.update(normalize_activations="layer_norm"), "normalize_activations"),
     (lambda e: e["metadata"]["saenb"].update(gates=[dict(name="os.system", settings={})]),
      "no mechanism called 'os.system'"),
     (lambda e: e["metadata"]["saenb"].update(gates=[dict(name="Halve", settings=dict(odd=1))]),
      "cannot be made"),
    ])
def test_a_configuration_that_cannot_be_trusted(trained, tmp_path, change, said):
    trained.save(tmp_path/"sae")
    with pytest.raises(SaenbError, match=said):
        SAE.load(changed(tmp_path/"sae", tmp_path, "bad", change))


def test_a_folder_that_is_no_dictionary(tmp_path):
    with pytest.raises(SaenbError, match="holds no dictionary"):
        saenb.load_sae(tmp_path)
    with pytest.raises(SaenbError, match="hub"):
        saenb.load_sae("nobody/nothing")


def test_mechanisms_are_known_by_name_only(trained):
    assert MECHANISMS["Halve"] is Halve
    assert make_mechanism("Halve", dict(share=0.1), trained.cfg).settings == dict(share=0.1)
    with pytest.raises(SaenbError, match="did you mean Halve"):
        make_mechanism("Halv", {}, trained.cfg)
