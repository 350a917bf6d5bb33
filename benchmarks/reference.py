"""SAEBench's side of the comparison. benchmarks/parity.py starts it in the environment that has sae-bench and sae-lens, asks one
question a line on standard input, as JSON, and reads one JSON line as the answer."""
import json
import os
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

answers, sys.stdout = sys.stdout, sys.stderr # what SAEBench prints is not an answer
os.environ["JAXTYPING_DISABLE"] = "1" # SAEBench's probe training breaks its own shape annotations, which newer versions of beartype notice

import datasets
import numpy as np
import pydantic
import sae_lens
import torch
import transformer_lens.loading_from_pretrained as loading
from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput
from sae_bench.evals.core.eval_output import CoreEvalOutput
from sae_bench.evals.sparse_probing import main as probing, probe_training
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
from sae_bench.evals.unlearning import main as unlearning
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.eval_output import UnlearningEvalOutput
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from sae_bench.sae_bench_utils import dataset_utils, general_utils
from sae_bench.sae_bench_utils.activation_collection import LLM_NAME_TO_BATCH_SIZE
from transformer_lens import HookedTransformer
from transformers import AutoTokenizer, Gemma2ForCausalLM

NAME = "gemma-2-2b-it" # the model's name; SAEBench knows no others
OUTPUTS = dict(unlearning=UnlearningEvalOutput, sparse_probing=SparseProbingEvalOutput, core=CoreEvalOutput, absorption_first_letter=AbsorptionEvalOutput)
CORPUS = Path("sae_bench/evals/unlearning/data/bio-forget-corpus.jsonl") # SAEBench opens this path below the working directory


def gemma(folder: str) -> HookedTransformer:
    "A Gemma-2 of any width from its own folder, as transformer-lens makes gemma-2-2b-it."
    hf = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    c, convert = hf.config, loading.convert_hf_model_config
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    own = dict(d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size,
               n_layers=c.num_hidden_layers, n_ctx=c.max_position_embeddings, d_vocab=c.vocab_size, eps=c.rms_norm_eps, window_size=c.sliding_window,
               attn_types=[kinds[k] for k in c.layer_types], attn_scores_soft_cap=c.attn_logit_softcapping, output_logits_soft_cap=c.final_logit_softcapping,
               attn_scale=c.query_pre_attn_scalar ** 0.5)
    loading.convert_hf_model_config = lambda *args, **kwargs: convert(*args, **kwargs) | own
    try: model = HookedTransformer.from_pretrained_no_processing(NAME, hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(folder), device="cpu", dtype="float32")
    finally: loading.convert_hf_model_config = convert
    tokens = torch.randint(3, c.vocab_size, (8, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): apart = (model(tokens) - hf(tokens).logits).abs().max().item()
    if apart > 1e-4: raise SystemExit(f"The converted model's logits are up to {apart:.1e} away from the original's, so nothing can be compared.")
    return model


def open_local(world: Path):
    "A `load_dataset` that finds the world's folders under the real names."
    places = {"cais/wmdp": world/"wmdp", "cais/mmlu": world/"mmlu"}
    def load(name, config=None, split=None, streaming=False, **_):
        if name == "wikitext": return datasets.load_dataset("json", data_files=str(world/"texts"/"retain.jsonl.gz"), split="train")
        return datasets.load_dataset(str(places.get(name, world/"probing"/name)), config, split=split, streaming=streaming)
    return load


class Watch:
    "Seconds on the wall and of the processor that a block took."
    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_): self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


def dictionary(name: str, folder: str):
    "A dictionary in SAELens' layout, ready for SAEBench."
    sae = sae_lens.SAE.load_from_disk(folder)
    place = json.loads((Path(folder)/"cfg.json").read_text())["metadata"]
    # SAELens leaves these out where the file does not name its version
    for key in ("hook_name", "hook_layer", "model_name"): setattr(sae.cfg.metadata, key, place[key])
    general_utils.load_and_format_sae(name, sae, "cpu") # writes them where the evaluations look
    return sae


class Reference:
    "One model, and SAEBench's evaluations of dictionaries on it."

    def prepare(self, model: str, world: str, threads: int) -> dict:
        "Make the model, and put the world where SAEBench looks for the real data."
        torch.set_num_threads(threads)
        self.model = gemma(model)
        for module in (unlearning, probing): module.HookedTransformer = _Ready(self.model)
        for module in (feature_activation, metrics, dataset_utils): module.load_dataset = open_local(Path(world))
        texts = datasets.load_dataset("json", data_files=str(Path(world)/"texts"/"forget.jsonl.gz"), split="train")["text"]
        CORPUS.parent.mkdir(parents=True, exist_ok=True)
        CORPUS.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
        return {package: version(package) for package in ("sae-bench", "sae-lens", "transformer-lens", "transformers", "datasets", "torch", "numpy", "scikit-learn")}

    def known(self, **settings) -> dict:
        "The questions that count, found once a model."
        self.config = UnlearningEvalConfig(model_name=NAME, llm_dtype="float32", llm_batch_size=LLM_NAME_TO_BATCH_SIZE[NAME] // 8, **settings)
        folder, batch = f"artifacts/unlearning/{NAME}", 2 * self.config.llm_batch_size
        with Watch() as watch:
            for name in self.config.dataset_names:
                metrics.save_target_question_ids(self.model, batch, folder, name)
                metrics.get_baseline_metrics(self.model, batch, folder, name, dict(target_metric=self.config.target_metric, verbose=False))
        file = lambda name: f"{folder}/data/question_ids/all/{name if name == 'wmdp-bio' else 'mmlu-' + name.replace('_', '-')}_correct.csv"
        return dict(vars(watch), known={name: np.genfromtxt(file(name), ndmin=1, dtype=int).tolist() for name in self.config.dataset_names})

    def unlearning(self, name: str, folder: str) -> dict:
        "The score, and for every intervention the questions that are still answered right."
        sae, rows, modify = dictionary(name, folder), [], metrics.modify_and_calculate_metrics
        def watched(*args, **kwargs):
            found = modify(*args, **kwargs)
            rows.append(dict(features=[int(f) for f in kwargs["features_to_ablate"]], multiplier=kwargs["multiplier"],
                             right={k: found[k]["is_correct"].astype(int).tolist() for k in self.config.dataset_names}))
            return found
        metrics.modify_and_calculate_metrics = watched
        try:
            with Watch() as watch: result = unlearning.run_eval(self.config, [(name, sae)], "cpu", "results", artifacts_path="artifacts")
        finally: metrics.modify_and_calculate_metrics = modify
        (only,) = result.values()
        return dict(vars(watch), score=only["eval_result_metrics"]["unlearning"]["unlearning_score"], settings=rows)

    def sparse_probing(self, name: str, folder: str, dataset: str, **settings) -> dict:
        "Every accuracy of one data set, class by class, and the features that each probe looked at; the model reads the texts again."
        sae, chosen, mask = dictionary(name, folder), [], probe_training.get_top_k_mean_diff_mask
        def watched(*args, **kwargs):
            out = mask(*args, **kwargs)
            chosen.append((~out).nonzero().flatten().tolist())
            return out
        config = SparseProbingEvalConfig(model_name=NAME, llm_dtype="float32", llm_batch_size=LLM_NAME_TO_BATCH_SIZE[NAME], dataset_names=[dataset], **settings)
        probe_training.get_top_k_mean_diff_mask = watched
        try:
            with Watch() as watch: _, classes = probing.run_eval_single_sae(config, sae, self.model, "cpu", "artifacts/sparse_probing", save_activations=False)
        finally: probe_training.get_top_k_mean_diff_mask = mask
        accuracies = classes[f"{dataset}_results"]
        # the dictionary's probes come after those of the stream's channels: every k, every class
        asked = [(str(k), c) for k in config.k_values for c in accuracies["sae_test_accuracy"]]
        features = {k: {} for k, _ in asked}
        for (k, c), columns in zip(asked, chosen[-len(asked):]): features[k][c] = columns
        return dict(vars(watch), accuracies=accuracies, features=features)

    def validate(self, result: dict) -> dict:
        "Does SAEBench's own output class take this result, and does it keep every number in it?"
        try: taken = asdict(pydantic.TypeAdapter(OUTPUTS[result["eval_type_id"]]).validate_python(result))
        except pydantic.ValidationError as e: return dict(accepted=False, why=str(e))
        lost = [".".join(path) for path in _paths(result) if not _has(taken, path)]
        return dict(accepted=not lost, why=f"fields that SAEBench does not know: {', '.join(lost)}" if lost else "")


class _Ready:
    "Stands in for HookedTransformer where SAEBench loads a model by name."
    def __init__(self, model): self.from_pretrained_no_processing = lambda *args, **kwargs: model


def _paths(value, path=()):
    "Where a result's leaves are, the free part aside."
    if isinstance(value, dict) and path not in (("eval_result_unstructured",), ("sae_cfg_dict",)):
        for key, inner in value.items(): yield from _paths(inner, (*path, key))
    else: yield path


def _has(value, path) -> bool:
    for key in path:
        if not isinstance(value, dict) or key not in value: return False
        value = value[key]
    return True


if __name__ == "__main__":
    reference = Reference()
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(reference, request.pop("do"))(**request)), file=answers, flush=True)
