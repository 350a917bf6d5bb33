"""What each evaluation and intervention gives on a small exam, whatever device the model is on: the same is asked of two."""
import gzip
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from saenb.data.sources import TextSource
from saenb.evals import absorption, autopsy, contextual_reference, entanglement, position, reconstruction, separation, sparse_probing, word_lists
from saenb.evals.class_words import AbsorptionSetup
from saenb.evals.exam import Exam, Grid, UnlearningSetup, feature_stats
from saenb.evals.interventions import crisp, rmu
from saenb.evals.interventions.intervention import INTERVENTIONS, plain_answers
from saenb.evals.order_probing import LabelledOrder
from saenb.evals.probing_texts import SparseProbingSetup
from saenb.evals.taxonomy import TaxonomySetup, shipped, taxonomy
from saenb.evals.unlearning import run_settings
from saenb.report.explorer import explore
from saenb.sae.sae import SAE, SAEConfig

GRID = Grid(thresholds=(0.05, 0.3), n_features=(3, 12), multipliers=(4, 2000), typical=True)
EVALUATIONS = ("core", "sparse_probing", "absorption", "separation", "entanglement", "position", "taxonomy", "words_alone", "contextual", "autopsy",
               "explorer")
INTERVENED = ("clamp", "zero_ablation", "mean_ablation", "conditional_clamp", "raw_direction", "guardrail", "guardrail_window", "guardrail_gate",
              "orthogonal_edit", "orthogonal_weights", "rmu", "rmu_apart", "crisp")
BY_DEFINITION = ("conditional_clamp", "guardrail", "orthogonal_edit", "orthogonal_weights") # also the long way
MADE_NOW = ("seconds", "datetime_epoch_millis", "dictionary", "eval_id")


shipped_once = cache(shipped)


class FewQuestions(Exam):
    """An exam in which the first questions of three subjects count as known, so that nothing has to be asked in 24 orders."""
    def find_known(self, sources):
        return {s.subject: list(range(min(count, len(s.load())))) for s, count in zip(sources, (8, 6, 6))}


def few_lines(source, target, count):
    """The first lines of a file."""
    with gzip.open(source, "rt") as f: target.write_text("".join(line for line, _ in zip(f, range(count))))
    return str(target)


def short_trainings(patch):
    """Interventions' trainings of a few steps, by `patch(module, name, value)`."""
    for module in (rmu, crisp): patch(module, "STOPS", (1, 2))
    for name, value in dict(LENGTHS=(4,), ALPHAS=(10,), RATES=(0.1,)).items(): patch(rmu, name, value)
    for name, value in dict(COUNTS=(12,), RATE=0.1, RATIO=1).items(): patch(crisp, name, value)
    patch(contextual_reference, "STRENGTHS", (64,))


def plain(value):
    """A result as JSON holds it, without what differs from one moment to the next."""
    if isinstance(value, dict): return {str(k): plain(v) for k, v in value.items() if k not in MADE_NOW}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    if torch.is_tensor(value) or isinstance(value, (np.ndarray, np.generic)): return value.tolist()
    return value


class Cases:
    """Setups that are quickly asked, for one model."""
    def __init__(self, world, model, folder):
        self.world, self.model, self.layer, self.folder = world, model, world.layer, Path(folder)
        texts = {}
        for side in ("forget", "retain"):
            path = self.folder/f"{side}.jsonl"
            path.write_text("".join(json.dumps(dict(text=t)) + "\n" for t, _ in world.texts(side, 60)))
            texts[side] = TextSource(str(path), side=side)
        self.corpora = dict(texts, dataset_size=16, seq_len=48)
        self.setup = UnlearningSetup(**self.corpora, questions=world.question_sources()[:3], lowest_retain=0.0, retain_floor=0.5, grid=GRID,
                                     reference=None)
        self.exam = FewQuestions(model, self.setup, self.layer)
        self.readings, self.stats, self.found = self.exam.readings, None, {}

    def dictionary(self, d_sae=96):
        """One of random features, made on the processor, as one that comes from a file."""
        cfg = SAEConfig(d_in=self.model.cfg.d_model, d_sae=d_sae, hook_name=f"blocks.{self.layer}.hook_out", hook_layer=self.layer,
                        model_name="tiny world")
        return SAE(cfg).initialise(torch.randn(2000, cfg.d_in, generator=torch.Generator().manual_seed(1)) * 2, 0)

    def placed(self):
        """The same where the model is, and how its features behave."""
        if self.stats is None:
            sae = self.dictionary().to(self.model.cfg.device)
            self.stats = sae, feature_stats(self.exam, sae)
        return self.stats

    def intervention(self, name):
        """Two settings of an intervention, and of some the first one by its definition."""
        (sae, stats), intervention = self.placed(), INTERVENTIONS.named(name)()
        worked, known = intervention.prepare(self.exam, sae, stats)
        settings = intervention.settings(GRID, known)
        settings = [settings[1], settings[len(settings) // 2]]
        rows, batch = run_settings(self.exam, worked, settings, known, intervention)
        found = dict(rows=rows, read=batch.read, made=self.made(intervention, batch, worked, settings[0], known))
        if name in BY_DEFINITION:
            features, values, rule = intervention.asked(settings[0], known)
            found["plain"] = plain_answers(self.exam, worked, features, values, intervention, **rule)
            assert torch.equal(found["plain"], rows[0]["right"])
        return found

    def made(self, intervention, batch, sae, setting, known):
        """What a setting makes of the first question's stream, or of the model's weights."""
        features, values, rule = intervention.asked(setting, known)
        if weights := intervention.weights(self.exam, sae, features, values, **rule):
            return {name: w.flatten()[:50].tolist() for name, w in weights.items()}
        places = torch.arange(len(self.exam.tokens[0]))
        return batch.stream(torch.zeros_like(places), torch.zeros_like(places), places)

    def core(self):
        setup = reconstruction.CoreSetup(**self.corpora, reconstruction_rows=6)
        return reconstruction.evaluate(self.model, self.dictionary(), setup, self.readings)

    def sparse_probing(self):
        setup = SparseProbingSetup(root=str(self.world.path/"probing"), probe_train_set_size=40, probe_test_set_size=20, k_values=(1, 5),
                                   dataset_names=("canrager/amazon_reviews_mcauley_1and5_sentiment",))
        return sparse_probing.evaluate(self.model, self.dictionary(), setup, self.readings)

    def absorption(self):
        words = few_lines(self.world.path/"absorption"/"words.jsonl.gz", self.folder/"words.jsonl", 600)
        setup = AbsorptionSetup(words=words, train_share=0.6, min_feats_for_eval=1, min_GT_probe_f1=0.1, probe_num_epochs=4,
                                k_sparse_probe_batch_size=64, k_sparse_probe_num_epochs=2)
        return absorption.evaluate(self.model, self.dictionary(), setup, self.readings)

    def separation(self):
        return separation.evaluate(self.model, self.dictionary(), separation.SeparationSetup(**self.corpora), self.readings)

    def entanglement(self):
        return entanglement.evaluate(self.model, self.dictionary(), entanglement.EntanglementSetup(**self.corpora), self.readings)

    def position(self):
        """Order probing, too, of one task."""
        name = sorted(p.name.removesuffix("-train.jsonl.gz") for p in (self.world.path/"order").glob("*-train.jsonl.gz"))[0]
        files = [few_lines(self.world.path/"order"/f"{name}-{split}.jsonl.gz", self.folder/f"{name}-{split}.jsonl", count)
                 for split, count in (("train", 120), ("test", 60))]
        setup = position.PositionalSetup(**self.corpora, order=(LabelledOrder(name, *files),), position_bins=4)
        return position.evaluate(self.model, self.dictionary(), setup, self.readings)

    def taxonomy(self):
        tree, texts = shipped_once()
        return taxonomy(self.readings, self.dictionary(), tree, texts, TaxonomySetup(texts=40, least=1))

    def words_alone(self):
        bag = word_lists.Bag(self.exam, limit=500)
        return word_lists.judged_bag(self.exam, bag, word_lists.held_out_scores(self.exam, bag))

    def contextual(self):
        return contextual_reference.contextual_reference(self.exam)

    def autopsy(self):
        return autopsy.unexplained(self.exam, self.placed()[0])

    def explorer(self):
        return explore(self.exam, self.dictionary(), effects=4)

    def __call__(self, name):
        """The result of one case, found once."""
        if name not in self.found: self.found[name] = plain(self.intervention(name) if name in INTERVENED else getattr(self, name)())
        return self.found[name]
