"""The other packages' side of benchmarks/interchange.py, which starts it in the environment that has sae-lens, sae-bench and dictionary-learning.
It writes dictionaries with random weights by each package's own code, and reads what saenb exported; one question a line, one answer a line, as JSON."""
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

answers, sys.stdout = sys.stdout, sys.stderr # what the packages print is not an answer
os.environ["JAXTYPING_DISABLE"] = "1"

import numpy as np
import torch
from dictionary_learning import dictionary as learned
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer, StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE, saes
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata, TrainStepInput
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

K = 4 # of TopK, at any width
PLACE = dict(model_name="gemma-2-2b", hook_name="blocks.19.hook_resid_post")
LENS = dict( # case: class, fields of its configuration, how it is saved
    standard=("StandardSAE", {}, "save_model"), standard_plain=("StandardSAE", dict(apply_b_dec_to_input=False), "save_model"),
    standard_bfloat16=("StandardSAE", dict(dtype="bfloat16"), "save_model"),
    topk=("TopKSAE", dict(k=K), "save_model"), topk_plain=("TopKSAE", dict(k=K, apply_b_dec_to_input=False), "save_model"),
    topk_rescaled=("TopKSAE", dict(k=K, rescale_acts_by_decoder_norm=True), "save_model"),
    jumprelu=("JumpReLUSAE", {}, "save_model"), jumprelu_plain=("JumpReLUSAE", dict(apply_b_dec_to_input=False), "save_model"),
    gated=("GatedSAE", {}, "save_model"), gated_plain=("GatedSAE", dict(apply_b_dec_to_input=False), "save_model"),
    topk_trained=("TopKTrainingSAE", dict(k=K), "save_inference_model"),
    batchtopk_trained=("BatchTopKTrainingSAE", dict(k=K), "save_inference_model"),
    matryoshka_trained=("MatryoshkaBatchTopKTrainingSAE", dict(k=K), "save_inference_model"),
    standard_checkpoint=("StandardTrainingSAE", {}, "save_model"), jumprelu_checkpoint=("JumpReLUTrainingSAE", {}, "save_model"),
    gated_checkpoint=("GatedTrainingSAE", {}, "save_model"), topk_checkpoint=("TopKTrainingSAE", dict(k=K), "save_model"),
    batchtopk_checkpoint=("BatchTopKTrainingSAE", dict(k=K), "save_model"), matryoshka_checkpoint=("MatryoshkaBatchTopKTrainingSAE", dict(k=K), "save_model"),
    standard_scaled=("StandardTrainingSAE", dict(normalize_activations="expected_average_only_in"), "save_model"),
    jumprelu_plain_scaled=("JumpReLUTrainingSAE", dict(normalize_activations="expected_average_only_in", apply_b_dec_to_input=False), "save_model"),
    topk_whitened=("TopKTrainingSAE", dict(k=K, normalize_activations="covariance_whitening"), "save_model"),
    gated_plain_whitened=("GatedTrainingSAE", dict(normalize_activations="covariance_whitening", apply_b_dec_to_input=False), "save_model"))
BEFORE_6 = dict(standard_before_6=dict(activation_fn_str="relu"), topk_before_6=dict(activation_fn_str="topk", activation_fn_kwargs=dict(k=K)))
LEARNED = dict( # class: its trainer and what that takes; AutoEncoderNew has none
    AutoEncoder=(StandardTrainerAprilUpdate, {}), AutoEncoderNew=(None, {}), AutoEncoderTopK=(TopKTrainer, dict(k=K)), BatchTopKSAE=(BatchTopKTrainer, dict(k=K)),
    MatryoshkaBatchTopKSAE=(MatryoshkaBatchTopKTrainer, dict(k=K, group_fractions=[0.25, 0.75])), JumpReluAutoEncoder=(JumpReluTrainer, {}), GatedAutoEncoder=(GatedSAETrainer, {}))


@torch.no_grad()
def randomise(module, draw):
    "Random weights of every kind, so that nothing holds by accident: rows of all lengths, biases and thresholds that matter."
    for name, p in (*module.named_parameters(), *module.named_buffers()):
        if name in ("k", "group_sizes"): continue
        value = torch.randn(p.shape, generator=draw)
        if p.ndim == 2: value *= (0.5 + torch.rand(p.shape[1] if "encoder.weight" != name else 1, generator=draw)) / min(p.shape) ** 0.5
        elif "threshold" in name: value = 0.1 + value.abs() / 2
        else: value *= 0.3
        p.data.copy_(value)


@torch.no_grad()
def _placed(module, names, values):
    "Lay values by saenb's names into a module's parameters; a name that ends in .T is kept transposed there."
    own = dict(module.named_parameters())
    for ours, there in names.items(): own[there.removesuffix(".T")].copy_(values[ours].T if there.endswith(".T") else values[ours])


def inputs(d_in, rows, draw): return torch.randn(rows, d_in, generator=draw) * (0.5 + torch.rand(d_in, generator=draw)) + torch.randn(d_in, generator=draw)


class Formats:
    "All formats by name."

    def versions(self) -> dict:
        "What they are made with."
        return {p: version(p) for p in ("sae-lens", "sae-bench", "dictionary-learning", "eai-sparsify", "transformer-lens", "torch", "numpy")}

    def cases(self) -> list[list[str]]:
        "Packages and cases."
        return [["SAELens", c] for c in (*LENS, *BEFORE_6)] + [["dictionary_learning", c] for c in LEARNED] + [["Gemma Scope", "params.npz"], ["sparsify", "sparsify"]]

    def write(self, package: str, case: str, folder: str, d_in: int, d_sae: int, rows: int, seed: int) -> dict:
        "A dictionary's files, and in expected.safetensors inputs with what the package makes of them."
        folder, draw = Path(folder), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed) # what packages draw themselves
        folder.mkdir(parents=True)
        x = inputs(d_in, rows, draw)
        with torch.no_grad():
            encode, decode = {"SAELens": self._lens, "dictionary_learning": self._learned, "Gemma Scope": self._gemma, "sparsify": self._sparsify}[package](case, folder, d_in, d_sae, draw, x)
            f = encode(x)
            save_file(dict(x=x, f=f.float().contiguous(), reconstruction=decode(f).float().contiguous()), folder/"expected.safetensors")
        return dict(active=(f > 0).sum(1).float().mean().item())

    def _lens(self, case, folder, d_in, d_sae, draw, x):
        if case in BEFORE_6:
            saes.StandardSAE(saes.StandardSAEConfig(d_in=d_in, d_sae=d_sae)).save_model(folder)
            old = dict(architecture="standard", hook_point=PLACE["hook_name"], hook_point_layer=19, model_name=PLACE["model_name"], d_in=d_in, d_sae=d_sae, dtype="float32", device="cpu",
                       normalize_activations=False, apply_b_dec_to_input=True, **BEFORE_6[case])
            (folder/"cfg.json").write_text(json.dumps(old))
            state = load_file(folder/"sae_weights.safetensors")
            for name, t in state.items(): state[name] = torch.randn(t.shape, generator=draw) * (0.3 if t.ndim == 1 else d_in**-0.5)
            save_file(state, folder/"sae_weights.safetensors")
            sae = SAE.load_from_disk(folder)
            return sae.encode, sae.decode
        kind, settings, save = LENS[case]
        if "Matryoshka" in kind: settings = settings | dict(matryoshka_widths=[d_sae // 4, d_sae])
        sae = getattr(saes, kind)(getattr(saes, f"{kind}Config")(d_in=d_in, d_sae=d_sae, metadata=SAEMetadata(**PLACE), **settings))
        randomise(sae, draw)
        scaler = ActivationScaler()
        if case.endswith("_scaled"): scaler.estimate_scaling_factor(d_in, iter([x]), 1)
        if case.endswith("_whitened"): scaler.estimate_whitening(d_in, iter([inputs(d_in, 4 * d_in, draw)]), 1)
        if "checkpoint" in case or settings.get("normalize_activations"): scaler.save(str(folder/"activation_scaler.json"))
        getattr(sae, save)(folder)
        if "batchtopk" in case or "matryoshka" in case: # in training their answer depends on the batch, so what counts is what they are saved as
            with tempfile.TemporaryDirectory() as inference:
                sae.save_inference_model(inference)
                sae = SAE.load_from_disk(inference)
        elif save == "save_inference_model" or "bfloat16" in case: sae = SAE.load_from_disk(folder, dtype="float32")
        return (lambda x: sae.encode(scaler.scale(x))), (lambda f: scaler.unscale(sae.decode(f)))

    def _learned(self, case, folder, d_in, d_sae, draw, x):
        kind, settings = LEARNED[case]
        if kind:
            trainer = kind(steps=10, activation_dim=d_in, dict_size=d_sae, layer=19, lm_name="google/gemma-2-2b", device="cpu",
                           **dict(submodule_name="resid_post_layer_19") | settings, **dict(warmup_steps=1, sparsity_warmup_steps=1) if case in ("AutoEncoder", "JumpReluAutoEncoder", "GatedAutoEncoder") else dict(warmup_steps=1))
            made, config = trainer.ae, trainer.config
        else: made, config = learned.AutoEncoderNew(d_in, d_sae), dict(dict_class=case, activation_dim=d_in, dict_size=d_sae, layer=19, lm_name="google/gemma-2-2b")
        randomise(made, draw)
        torch.save({k: v.cpu() for k, v in made.state_dict().items()}, folder/"ae.pt") # as training.trainSAE does
        (folder/"config.json").write_text(json.dumps(dict(trainer=config), indent=4))
        loaded, _ = load_dictionary(str(folder), "cpu")
        return loaded.encode, loaded.decode

    def _gemma(self, case, folder, d_in, d_sae, draw, x):
        made = saes.JumpReLUSAE(saes.JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae))
        randomise(made, draw)
        np.savez(folder/case, **{k: v.detach().numpy() for k, v in made.state_dict().items()})
        found, loaders.hf_hub_download = loaders.hf_hub_download, lambda *args, **kwargs: str(folder/case)
        try: cfg, state, _ = loaders.gemma_2_sae_huggingface_loader("google/gemma-scope-2b-pt-res", "layer_19/width_4k/average_l0_1", "cpu", cfg_overrides=dict(d_in=d_in, d_sae=d_sae))
        finally: loaders.hf_hub_download = found
        sae = saes.JumpReLUSAE(saes.JumpReLUSAEConfig(d_in=d_in, d_sae=d_sae, apply_b_dec_to_input=cfg["apply_b_dec_to_input"]))
        sae.load_state_dict(state)
        return sae.encode, sae.decode

    def _sparsify(self, case, folder, d_in, d_sae, draw, x):
        coder = SparseCoder(d_in, SparseCoderConfig(num_latents=d_sae, k=K))
        randomise(coder, draw)
        coder.save_to_disk(folder)
        loaded = SparseCoder.load_from_disk(folder)
        def encode(x):
            top, which, _ = loaded.encode(x)
            return torch.zeros(len(x), d_sae).scatter(1, which, top)
        return encode, lambda f: f @ loaded.W_dec + loaded.b_dec

    def read(self, folder: str, out: str) -> dict:
        "What SAELens makes of an exported folder, on the inputs in `out`."
        try: sae = SAE.load_from_disk(folder)
        except KeyError as e: return dict(refused=str(e))
        x = load_file(out)["x"]
        with torch.no_grad():
            f = sae.encode(x)
            save_file(dict(x=x, f=f.contiguous(), reconstruction=sae.decode(f).contiguous()), out)
        return dict(architecture=sae.cfg.architecture(), place={k: sae.cfg.metadata[k] for k in ("model_name", "hook_name", "hook_layer")})

    def load(self, to: str, folder: str, file: str) -> dict:
        "What a package's own class makes of an exported dictionary, on the inputs in `file`."
        x = load_file(file)["x"]
        with torch.no_grad():
            if to == "sparsify":
                made = SparseCoder.load_from_disk(folder)
                top, which, _ = made.encode(x)
                f, out = torch.zeros(len(x), made.num_latents).scatter(1, which, top), made.decode(top, which)
            else:
                made = SAE.load_from_disk(folder) if to == "saelens" else load_dictionary(folder, "cpu")[0]
                f = made.encode(x)
                out = made.decode(f)
        save_file(dict(x=x, f=f.contiguous(), reconstruction=out.contiguous()), file)
        return dict(loaded=type(made).__name__)

    def step(self, package: str, kind: str, file: str, k: int, aux: float, l1: float, l0: float, band: float, tanh: float, ends: list) -> dict:
        """One training step's loss from the weights and the batch in `file`, by a package's own training class; the gradients come into the file, by saenb's names.
        Weights of auxiliary losses are given so that they count the same everywhere."""
        t = load_file(file)
        x, dead, w = t["x"], t["dead"].bool(), {name.removeprefix("start."): v for name, v in t.items() if name.startswith("start.")}
        d_in, d_sae = w["W_enc"].shape
        few = min(int(dead.sum()) / (d_in // 2), 1.0) # SAELens and sparsify charge less where few features are dead
        run = {"SAELens": self._lens_step, "dictionary_learning": self._learned_step, "sparsify": self._sparsify_step}[package]
        made, names, loss, losses = run(kind, x, dead, w, SimpleNamespace(k=k, aux=aux, l1=l1, l0=l0, band=band, tanh=tanh, ends=ends, few=few, d_in=d_in, d_sae=d_sae))
        loss.backward()
        found = dict(made.named_parameters())
        gradients = {ours: found[there.removesuffix(".T")].grad.T if there.endswith(".T") else found[there].grad for ours, there in names.items()}
        save_file(t | {f"gradient.{name}": g.contiguous() for name, g in gradients.items()}, file)
        return dict(loss=loss.item(), losses=losses, by=type(made).__name__)

    def _lens_step(self, kind, x, dead, w, s):
        own = {"relu": dict(l1_coefficient=s.l1), "gated": dict(l1_coefficient=s.l1), "topk": dict(k=s.k, aux_loss_coefficient=s.aux / s.few),
               "jumprelu": dict(l0_coefficient=s.l0, jumprelu_bandwidth=s.band), "jumprelu, tanh": dict(l0_coefficient=s.l0, jumprelu_bandwidth=s.band, jumprelu_sparsity_loss_mode="tanh", jumprelu_tanh_scale=s.tanh)}
        own |= dict(batchtopk=own["topk"], matryoshka=own["topk"] | dict(matryoshka_widths=s.ends))
        name = dict(relu="Standard", gated="Gated", topk="TopK", jumprelu="JumpReLU", batchtopk="BatchTopK", matryoshka="MatryoshkaBatchTopK")[kind.split(",")[0]]
        sae = getattr(saes, f"{name}TrainingSAE")(getattr(saes, f"{name}TrainingSAEConfig")(d_in=s.d_in, d_sae=s.d_sae, **own[kind])).train()
        names = {n: "b_gate" if (n, kind) == ("b_enc", "gated") else n for n in w}
        _placed(sae, names, w)
        out = sae.training_forward_pass(TrainStepInput(sae_in=x, coefficients=dict(l0=s.l0, l1=s.l1), dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False))
        return sae, names, out.loss, {n: v.item() for n, v in out.losses.items()}

    def _learned_step(self, kind, x, dead, w, s):
        common = dict(steps=10, activation_dim=s.d_in, dict_size=s.d_sae, layer=0, lm_name="none", device="cpu", warmup_steps=1)
        groups = [b - a for a, b in zip([0, *s.ends], s.ends)]
        Kind, own = {"relu": (StandardTrainer, dict(l1_penalty=s.l1)), "gated": (GatedSAETrainer, dict(l1_penalty=s.l1)), "topk": (TopKTrainer, dict(k=s.k)), "batchtopk": (BatchTopKTrainer, dict(k=s.k)),
                     "matryoshka": (MatryoshkaBatchTopKTrainer, dict(k=s.k, group_fractions=[g / s.d_sae for g in groups], group_weights=[float(len(groups))] * len(groups))),
                     "jumprelu": (JumpReluTrainer, dict(bandwidth=s.band, sparsity_penalty=0.0))}[kind]
        if kind in ("relu", "gated", "jumprelu"): own["sparsity_warmup_steps"] = None
        trainer = Kind(**common, **own)
        ae = trainer.ae
        linear = "encoder.weight" in ae.state_dict()
        names = dict(W_enc="encoder.weight.T", W_dec="decoder.weight.T") if linear else {n: n for n in w}
        if linear: names |= {"relu": dict(b_enc="encoder.bias", b_dec="bias"), "gated": dict(b_enc="gate_bias", b_mag="mag_bias", r_mag="r_mag", b_dec="decoder_bias")}.get(
            kind, dict(b_enc="encoder.bias", b_dec="b_dec"))
        if kind == "jumprelu": w = w | dict(b_enc=w["b_enc"] - w["b_dec"] @ w["W_enc"]) # it does not centre its input
        _placed(ae, names, w)
        if hasattr(trainer, "auxk_alpha"): # it divides by the residual's variance
            trainer.num_tokens_since_fired[dead] = trainer.dead_feature_threshold
            with torch.no_grad(): left = x - ae.decode(ae.encode(x) if kind == "topk" else ae.encode(x, use_threshold=False))
            trainer.auxk_alpha = s.aux * (left - left.mean(0)).pow(2).sum(1).mean().item()
        loss = trainer.loss(x, step=0)
        return ae, names, loss, trainer.loss(x, step=0, logging=True).losses

    def _sparsify_step(self, kind, x, dead, w, s):
        coder, names = SparseCoder(s.d_in, SparseCoderConfig(num_latents=s.d_sae, k=s.k)), dict(W_enc="encoder.weight.T", b_enc="encoder.bias", W_dec="W_dec", b_dec="b_dec")
        _placed(coder, names, w)
        out, variance = coder(x, dead_mask=dead), (x - x.mean(0)).pow(2).sum() / len(x) # by which it divides
        return coder, names, (out.fvu + s.aux / s.few * out.auxk_loss) * variance, dict(fvu=out.fvu.item() * variance.item(), auxk=s.aux / s.few * out.auxk_loss.item() * variance.item())

    def register(self, saenb: str) -> dict:
        "Let SAELens load dictionaries with gates; saenb is a folder here, without its dependencies."
        sys.path.append(saenb)
        import saenb.saelens
        return {}

    def density(self, folder: str, model: str, tokens: list) -> dict:
        "SAEBench's count of how often features are active on rows of tokens, which its unlearning evaluation chooses features by."
        from reference import NAME, dictionary, gemma
        from sae_bench.sae_bench_utils.activation_collection import get_feature_activation_sparsity
        if not hasattr(self, "model"): self.model = gemma(model)
        sae = dictionary(NAME, folder)
        return dict(density=get_feature_activation_sparsity(torch.tensor(tokens), self.model, sae, 8, sae.cfg.hook_layer, sae.cfg.hook_name, mask_bos_pad_eos_tokens=True).tolist())


if __name__ == "__main__":
    formats = Formats()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(formats, request.pop("do"))(**request)), file=answers, flush=True)
