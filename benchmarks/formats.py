"""The other packages' side of benchmarks/interchange.py, which starts it in the environment that has sae-lens, sae-bench and dictionary-learning.
It writes dictionaries with random weights by each package's own code, and reads what saenb exported; one question a line, one answer a line, as JSON."""
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

answers, sys.stdout = sys.stdout, sys.stderr # what the packages print is not an answer
os.environ["JAXTYPING_DISABLE"] = "1"

import numpy as np
import torch
from dictionary_learning import dictionary as learned
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.gdm import GatedSAETrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.utils import load_dictionary
from sae_lens import SAE, saes
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file

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


def inputs(d_in, rows, draw): return torch.randn(rows, d_in, generator=draw) * (0.5 + torch.rand(d_in, generator=draw)) + torch.randn(d_in, generator=draw)


class Formats:
    "All formats by name."

    def versions(self) -> dict:
        "What they are made with."
        return {p: version(p) for p in ("sae-lens", "sae-bench", "dictionary-learning", "transformer-lens", "torch", "numpy")}

    def cases(self) -> list[list[str]]:
        "Packages and cases."
        return [["SAELens", c] for c in (*LENS, *BEFORE_6)] + [["dictionary_learning", c] for c in LEARNED] + [["Gemma Scope", "params.npz"]]

    def write(self, package: str, case: str, folder: str, d_in: int, d_sae: int, rows: int, seed: int) -> dict:
        "A dictionary's files, and in expected.safetensors inputs with what the package makes of them."
        folder, draw = Path(folder), torch.Generator().manual_seed(seed)
        torch.manual_seed(seed) # what packages draw themselves
        folder.mkdir(parents=True)
        x = inputs(d_in, rows, draw)
        with torch.no_grad():
            encode, decode = {"SAELens": self._lens, "dictionary_learning": self._learned, "Gemma Scope": self._gemma}[package](case, folder, d_in, d_sae, draw, x)
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

    def read(self, folder: str, out: str) -> dict:
        "What SAELens makes of an exported folder, on the inputs in `out`."
        try: sae = SAE.load_from_disk(folder)
        except KeyError as e: return dict(refused=str(e))
        x = load_file(out)["x"]
        with torch.no_grad():
            f = sae.encode(x)
            save_file(dict(x=x, f=f.contiguous(), reconstruction=sae.decode(f).contiguous()), out)
        return dict(architecture=sae.cfg.architecture(), place={k: sae.cfg.metadata[k] for k in ("model_name", "hook_name", "hook_layer")})

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
