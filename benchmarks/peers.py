"""The other packages' side of benchmarks/bench.py, which starts it in the environment that has them: each trains in its own, unchanged loop on batches that are
handed to it, and SAELens reads texts with its ActivationsStore."""
import json
import os
import shutil
import sys
import time
from pathlib import Path

from contest import BAND, START, UNIT, Feed, channel, listen, peak_memory

real = channel()
os.environ["JAXTYPING_DISABLE"], os.environ["WANDB_MODE"] = "1", "disabled"

import torch


def saelens(job: dict, feed: Feed):
    "SAELens' SAE of a kind and its SAETrainer.fit; `autocast` and `compile` are its runner's options, `dead` a setting of its trainer."
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    kind, own = {"relu": ("Standard", dict(l1_coefficient=job["l1"], l1_warm_up_steps=job["warmup"])),
                 "topk": ("TopK", dict(k=job["k"], aux_loss_coefficient=job["aux"])),
                 "batchtopk": ("BatchTopK", dict(k=job["k"], aux_loss_coefficient=job["aux"])),
                 "jumprelu": ("JumpReLU", dict(l0_coefficient=job["l1"] * UNIT, l0_warm_up_steps=job["warmup"], jumprelu_init_threshold=START, jumprelu_bandwidth=BAND))}[feed.kind]
    sae = getattr(saes, f"{kind}TrainingSAE")(getattr(saes, f"{kind}TrainingSAEConfig")(d_in=job["d_in"], d_sae=job["d_sae"], device=job["device"], **own))
    feed.place(W_enc=sae.W_enc, b_enc=sae.b_enc, W_dec=sae.W_dec, b_dec=sae.b_dec)
    feed.weights = lambda: dict(sae.named_parameters())
    if job.get("compile"): sae.training_forward_pass = torch.compile(sae.training_forward_pass, backend="inductor") # as its runner does for compile_sae
    dead = dict(dead_feature_window=job["dead"] - 1) if job.get("dead") else {}
    SAETrainer(SAETrainerConfig(total_training_samples=job["steps"] * job["batch"], train_batch_size_samples=job["batch"], lr=job["lr"], lr_end=job["lr"],
                                lr_warm_up_steps=job["warmup"], lr_decay_steps=job["decay"], device=job["device"], autocast=job.get("autocast", False), **dead), sae, iter(feed)).fit()


def dictionary_learning(job: dict, feed: Feed):
    "dictionary_learning's trainer of a kind in its trainSAE; its autocast is for GPUs alone."
    from dictionary_learning.trainers import batch_top_k, jumprelu, standard, top_k
    from dictionary_learning.training import trainSAE
    rising = dict(sparsity_warmup_steps=job["warmup"])
    Base, own = {"relu": (standard.StandardTrainer, dict(l1_penalty=job["l1"], **rising)),
                 "topk": (top_k.TopKTrainer, dict(k=job["k"], auxk_alpha=job["aux"])), "batchtopk": (batch_top_k.BatchTopKTrainer, dict(k=job["k"], auxk_alpha=job["aux"])),
                 "jumprelu": (jumprelu.JumpReluTrainer, dict(bandwidth=BAND, target_l0=job["target"], **rising))}[feed.kind]

    class Placed(Base):
        "With the common start, and within sight of whoever judges."
        def __init__(self, **settings):
            super().__init__(**settings)
            ae = self.ae
            if job.get("dead"): self.dead_feature_threshold = job["dead"] * job["batch"]
            if feed.kind == "jumprelu": # which does not centre its input
                feed.place(W_enc=ae.W_enc, b_enc=ae.b_enc, W_dec=ae.W_dec, b_dec=ae.b_dec)
                ae.b_enc.data -= ae.b_dec.data @ ae.W_enc.data
                ae.threshold.data.fill_(START)
                feed.weights = lambda: dict(ae.named_parameters()) | dict(b_enc=ae.b_enc + ae.b_dec @ ae.W_enc)
                return
            bias = ae.bias if feed.kind == "relu" else ae.b_dec
            feed.place(W_enc_T=ae.encoder.weight, b_enc=ae.encoder.bias, W_dec_T=ae.decoder.weight, b_dec=bias)
            feed.weights = lambda: dict(W_enc=ae.encoder.weight.T, b_enc=ae.encoder.bias, W_dec=ae.decoder.weight.T, b_dec=bias)

    trainSAE(feed, [dict(trainer=Placed, steps=job["steps"], activation_dim=job["d_in"], dict_size=job["d_sae"], layer=0, lm_name="none", lr=job["lr"],
                         warmup_steps=job["warmup"], decay_start=job["steps"] - job["decay"], seed=job["seed"], device=job["device"], **own)],
             steps=job["steps"], device=job["device"], autocast_dtype=torch.bfloat16 if job.get("autocast") else torch.float32)


def sparsify(job: dict, feed: Feed):
    "sparsify's Trainer.fit, around a stand-in for a model whose one layer hands out the batch."
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    batches, rows = iter(feed), 16

    class Ready(torch.nn.Module):
        "As much of a model as sparsify looks at."
        def __init__(self):
            super().__init__()
            self.layers, self.first = torch.nn.ModuleList([torch.nn.Identity()]), True
            self.config, self.device = type("", (), dict(num_hidden_layers=1)), torch.device(job["device"])
            self.dummy_inputs = dict(tokens=torch.zeros(1, 1))

        @property
        def base_model(self): return self

        def forward(self, tokens):
            if tokens.shape[0] == 1: return self.layers[0](torch.zeros(1, 1, job["d_in"], device=self.device)) # it asks once how wide the stream is
            return self.layers[0](next(batches).unflatten(0, (rows, -1)))

    class Rows(torch.utils.data.Dataset):
        "Token rows without content; only their shape is looked at."
        row = torch.ones(job["batch"] // rows, dtype=torch.long)
        def __len__(self): return job["steps"] * rows
        def __getitem__(self, i): return dict(input_ids=self.row)

    dead = dict(dead_feature_threshold=job["dead"] * job["batch"] - 1) if job.get("dead") else {}
    trainer = Trainer(TrainConfig(SparseCoderConfig(num_latents=job["d_sae"], k=job["k"]), batch_size=rows, optimizer="adam", lr=job["lr"], lr_warmup_steps=job["warmup"],
                                  init_seeds=[job["seed"]], save_every=10**9, log_to_wandb=False, auxk_alpha=job["aux"], **dead), Rows(), Ready())
    coder, feed.k = next(iter(trainer.saes.values())), job["k"]
    feed.place(W_enc_T=coder.encoder.weight, b_enc=coder.encoder.bias, W_dec=coder.W_dec) # it centres on the first batch itself
    feed.weights = lambda: dict(W_enc=coder.encoder.weight.T, b_enc=coder.encoder.bias, W_dec=coder.W_dec, b_dec=coder.b_dec)
    trainer.fit()


class Reader:
    "SAELens reads texts; the model is made as benchmarks/reference.py makes it for SAEBench."
    def prepare(self, model: str, texts: str, layer: int, seq_len: int, rows: int):
        from datasets import Dataset
        from reference import gemma
        from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, StandardTrainingSAEConfig
        self.model, self.layer, self.rows, self.seq_len = gemma(model), layer, rows, seq_len
        d_in = self.model.cfg.d_model
        self.cfg = LanguageModelSAERunnerConfig(sae=StandardTrainingSAEConfig(d_in=d_in, d_sae=d_in), hook_name=f"blocks.{layer}.hook_resid_post", dataset_path="texts",
                                                is_dataset_tokenized=False, context_size=seq_len, store_batch_size_prompts=rows, train_batch_size_tokens=rows * seq_len,
                                                exclude_special_tokens=True, logger=LoggingConfig(log_to_wandb=False), checkpoint_path=None, output_path=None, verbose=False)
        self.texts = Dataset.from_dict(dict(text=json.loads(Path(texts).read_text())))
        return {}

    def harvest(self, tokens: int):
        "Let the store make as many batches of the model's stream as hold these tokens, before any mixing."
        from sae_lens.training.activations_store import ActivationsStore
        store, count = ActivationsStore.from_config(self.model, self.cfg, override_dataset=self.texts), -(-tokens // (self.rows * self.seq_len))
        began = time.perf_counter()
        for _ in range(count): store.get_filtered_llm_batch()
        return dict(seconds=time.perf_counter() - began, tokens=count * self.rows * self.seq_len, peak=peak_memory())

    def cache(self, tokens: int, out: str):
        "Its CacheActivationsRunner: the same on disk, as a data set to read in trainings to come, in shards as large as saenb's."
        from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, cache_activations_runner
        cache_activations_runner.load_model = lambda **_: self.model # the one that is there, instead of one by name
        d_in = self.model.cfg.d_model
        cfg = CacheActivationsRunnerConfig(dataset_path="texts", model_name="ready", model_batch_size=self.rows, hook_name=self.cfg.hook_name, d_in=d_in, training_tokens=tokens,
                                           context_size=self.seq_len, new_cached_activations_path=out, shuffle=False, device="cpu", streaming=False,
                                           buffer_size_gb=(min(2**26, tokens * d_in * 4) + 4) / 1e9)
        shutil.rmtree(out, ignore_errors=True)
        runner = CacheActivationsRunner(cfg, override_dataset=self.texts)
        began = time.perf_counter()
        runner.run()
        took = time.perf_counter() - began
        shutil.rmtree(out)
        return dict(seconds=took, tokens=cfg.n_buffers * cfg.n_tokens_in_buffer, peak=peak_memory())

    def forward(self, rows: list, times: int):
        "The same model's bare forward pass over token rows, up to the layer."
        tokens = torch.tensor(rows)
        with torch.no_grad():
            began = time.perf_counter()
            for _ in range(times): x = self.model(tokens, return_type=None, stop_at_layer=self.layer + 1)
            return dict(seconds=time.perf_counter() - began, tokens=times * tokens.numel(), norm=x.double().norm().item(), peak=peak_memory())


if __name__ == "__main__":
    job = json.loads(sys.stdin.readline())
    torch.manual_seed(job.get("seed", 0))
    if job["package"] == "harvest":
        reader = Reader()
        listen(real, {name: getattr(reader, name) for name in ("prepare", "harvest", "cache", "forward")})
    else: dict(saelens=saelens, dictionary_learning=dictionary_learning, sparsify=sparsify)[job["package"]](job, Feed(job, real))
