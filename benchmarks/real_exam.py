"""Are the answers of the fast exam on a real language model those of the plain way, question by question?

    .venv/bin/python benchmarks/real_exam.py runs/gemma-3-270m/*/run_*/seed_0

takes the best setting of each record whose dictionary is there, asks some of the known questions again with transformers alone, one prompt and one choice at a
time, the clamp written out in a hook, and prints how many answers are alike and how many tokens either way reads."""
import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saenb.evals.exam import feature_stats
from saenb.evals.interventions.clamp import Clamp
from saenb.evals.unlearning import run_settings
from saenb.lab.preset_files import find_preset
from saenb.lab.records import Record
from saenb.lab.runner import exam_of


class Plain:
    "Answers by definition: the likeliest choice, each read to its end behind the prompt."
    def __init__(self, folder, layer):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.block, self.read = self.model.model.layers[layer], 0

    @torch.no_grad()
    def answer(self, prompt: str, choices: list[str]) -> int:
        "The number of the likeliest choice."
        begin = len(self.tokenizer(prompt)["input_ids"])
        return max(range(len(choices)), key=lambda k: self._likelihood(f"{prompt} {choices[k].strip()}", begin))

    def _likelihood(self, text, begin):
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        self.read += ids.numel()
        logs = self.model(ids).logits[0, begin - 1:-1].double().log_softmax(-1)
        return logs.gather(1, ids[0, begin:, None]).sum().item()

    def clamped(self, sae, features, values):
        "A hook that sets chosen features to minus their values where they are active, but at the first token."
        def change(block, args, out):
            x = out[0] if isinstance(out, tuple) else out
            f = sae.encode(x)
            error, g = x - sae.decode(f), f.clone()
            for j, value in zip(features, values):
                g[..., j] = torch.where(f[..., j] > 0, -value, f[..., j])
            g[:, 0] = f[:, 0]
            changed = error + sae.decode(g)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed
        return self.block.register_forward_hook(change)


def compare(exam, plain, record, questions: int) -> dict:
    "Answers of both ways under a record's best setting."
    sae, best = record.sae.eval(), record.unlearning["best"]
    stats = feature_stats(exam, sae)
    setting = {k: best[k] for k in ("retain_threshold", "n_features", "multiplier", "typical", "features")}
    [row], batch = run_settings(exam, sae, [setting], stats, Clamp())
    every = torch.linspace(0, len(exam.asked) - 1, min(questions, len(exam.asked))).long().tolist() # of all subjects
    values = best["multiplier"] * (torch.tensor(stats.typical)[best["features"]] if best["typical"] else torch.ones(len(best["features"])))
    rows = {s: source.load() for s, source in enumerate(exam.setup.questions)}
    hook, before = plain.clamped(sae, best["features"], values.float().tolist()), plain.read
    right = []
    for q in every:
        source, asked = exam.setup.questions[exam.subject[q]], rows[exam.subject[q]][exam.number[q]]
        right.append(plain.answer(source.wordings[exam.setup.wording].replace("{}", asked["question"]), asked["choices"]) == asked["answer"])
    hook.remove()
    same = [bool(row["right"][q]) == r for q, r in zip(every, right)]
    return dict(record=str(record.path), asked=len(every), alike=sum(same), right=sum(right), plain_tokens=plain.read - before,
                saved=record.unlearning["work"]["saved"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--preset", default="gemma-3-270m")
    parser.add_argument("--out", default="runs", help="folder of stores and records")
    parser.add_argument("--questions", type=int, default=200)
    args = parser.parse_args()
    preset = find_preset(args.preset)
    exam, plain = exam_of(preset, args.out), Plain(preset.answer_model, preset.layer)
    for path in args.records:
        if (path/"sae").exists(): print(json.dumps(compare(exam, plain, Record(path), args.questions)), flush=True)


if __name__ == "__main__": main()
