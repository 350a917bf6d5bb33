"""A stand-in for the hub: a small Gemma-2 with random weights, whose chat model has learned a few questions by heart, and tiny data sets in the files and columns of the real ones.

    python tests/standin.py FOLDER      makes FOLDER/hub and FOLDER/standin.toml, a preset that is gemma-2-2b in small"""
import json
import random
import sys
from pathlib import Path

WORDS = """able acid adult agent air animal answer area arm art atom author baby ball bank base battle beach bean bird blood board boat body bone book bottle brain branch bread bridge
cell centre chain change child church city class clock cloud coast colour corner cotton county cow crop culture dance danger daughter day death desert doctor dog door dream dust ear earth east egg
energy engine enzyme event evening eye face factor family farm father field finger fire fish flower food foot force forest form friend fruit game garden gas gene glass gold grain grass green ground
group growth hair hand harbour head heart heat history home horse host hour house ice idea image iron island item joint journey judge key king kitchen knee knife lake land language law leaf leg letter
level light line lip list liver loss lung machine map market mass matter meal meat metal milk mind minute mirror model moon morning mother motor mountain mouth muscle music name nation nature neck nerve
night noise north nose note number ocean oil orange order organ oxygen page pain paper parent part patient people period person phone picture piece plan plant plate poem point poison pool power price
product protein pupil queen question race rain rate reader record region result rice ring river road rock roof room root rose rule salt sand scale school science sea season seed sense series shape sheep
ship shoe shop side sign silk silver sister size skin sleep snow soil song sound south space speech spore spring star state station steel stem step stone storm story stream street sugar summer sun
surface table tail task taste teacher tear test theory thing thread throat time tissue title toe tongue tool tooth top touch tower town toxin track trade train tree trial truth uncle union unit use valley
value vein vessel view village virus voice wall war water wave way week west wheel wind window wing winter wire woman wood word work world year youth zone""".split()
SIDES = dict(biology=WORDS[::3], other=WORDS[1::3])
QUESTIONS = ("high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")


def prose(draw: random.Random, words=WORDS, sentences: int = 6) -> str:
    def sentence(): return " ".join(draw.choices(words, k=draw.randint(6, 11))).capitalize() + "."
    return " ".join(sentence() for _ in range(sentences))


def write_set(folder: Path, files: dict, configs: dict | None = None, features: dict | None = None):
    "Parquet files of rows, and the card that says which are whose."
    from datasets import Dataset, Features
    for name, rows in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(list(rows), features=Features(features) if features else None).to_parquet(str(folder/name))
    if configs:
        entries = "".join(f"- config_name: {c}\n  data_files:\n" + "".join(f"  - split: {s}\n    path: {p}\n" for s, p in splits.items()) for c, splits in configs.items())
        (folder/"README.md").write_text(f"---\nconfigs:\n{entries}---\n")


def write_corpora(hub: Path, draw: random.Random):
    import zstandard
    write_set(hub/"cais"/"wmdp-bio-forget-corpus", {"data/train-00000-of-00001.parquet": (
        dict(title="A title", abstract="An abstract.", text=prose(draw, SIDES["biology"], 12), doi="10.0/0") for _ in range(150))})
    write_set(hub/"cais"/"wmdp-corpora", {f"bio-retain-corpus/train-0000{i}-of-00002.parquet": (dict(text=prose(draw, SIDES["other"], 12)) for _ in range(80)) for i in range(2)},
              {"bio-retain-corpus": dict(train="bio-retain-corpus/train-*")})
    lines = lambda count: "".join(json.dumps(dict(text=prose(draw), meta=dict(pile_set_name="Made up"))) + "\n" for _ in range(count)).encode()
    for name, count in (("train/00", 120), ("train/01", 120), ("val", 4), ("test", 4)):
        path = hub/"monology"/"pile-uncopyrighted"/f"{name}.jsonl.zst"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(zstandard.compress(lines(count)))
    wiki = lambda count: [dict(text=t) for _ in range(count) for t in ("", " = A heading = \n", f" {prose(draw, SIDES['other'])} \n")]
    write_set(hub/"Salesforce"/"wikitext", {f"wikitext-2-raw-v1/{s}-00000-of-00001.parquet": wiki(n) for s, n in dict(train=9, validation=9, test=300).items()},
              {"wikitext-2-raw-v1": {s: f"wikitext-2-raw-v1/{s}-*" for s in ("train", "validation", "test")}})


def write_questions(hub: Path, draw: random.Random):
    from datasets import ClassLabel, Sequence, Value
    def rows(words, count, **more):
        return [dict(question=prose(draw, words, 1), choices=draw.sample(words, 4), answer=draw.randrange(4), **more) for _ in range(count)]
    write_set(hub/"cais"/"wmdp", {"wmdp-bio/test-00000-of-00001.parquet": rows(SIDES["biology"], 6)}, {"wmdp-bio": dict(test="wmdp-bio/test-*")},
              dict(answer=Value("int64"), question=Value("string"), choices=Sequence(Value("string"))))
    write_set(hub/"cais"/"mmlu", {f"{s}/{split}-00000-of-00001.parquet": rows(SIDES["other"], 2, subject=s) for s in QUESTIONS for split in ("test", "dev")},
              {s: {split: f"{s}/{split}-*" for split in ("test", "dev")} for s in QUESTIONS},
              dict(question=Value("string"), subject=Value("string"), choices=Sequence(Value("string")), answer=ClassLabel(names=list("ABCD"))))


def write_probing_sets(hub: Path, draw: random.Random):
    from datasets import Features, Translation, Value
    from saenb.evals.probing_texts import SETS
    from saenb.data.world_tasks import CATEGORIES, LANGUAGES, PAIRS, PROFESSIONS
    def texts(number, count):
        "Texts of a class, which has words of its own."
        return (prose(draw, WORDS[number::29], 3) for _ in range(count))
    def write(name, rows): write_set(hub/name, {f"data/{split}-00000-of-00001.parquet": rows(count) for split, count in dict(train=24, test=12).items()})
    write("LabHC/bias_in_bios", lambda n: (dict(hard_text=t, profession=p, gender=g) for p in PROFESSIONS for g in (0, 1) for t in texts(p + g, n)))
    write("canrager/amazon_reviews_mcauley_1and5", lambda n: (dict(text=t, category=c, rating=r, asin="B0") for c in CATEGORIES for r in (1.0, 5.0) for t in texts(c + int(r), n)))
    write("fancyzhx/ag_news", lambda n: (dict(text=t, label=label) for label in range(4) for t in texts(label, n)))
    write_set(hub/SETS["codeparrot/github-code"].path, {"data/train-00000-of-00001.parquet": (
        dict(code="# Licence. " * 20 + " ".join(texts(i, 6)), repo_name="a/b", path="c", language=l, license="mit", size=1) for i, l in enumerate(LANGUAGES) for _ in range(48))})
    for i, (language, config) in enumerate(PAIRS.items()):
        pair = config.split("-")
        write_set(hub/"Helsinki-NLP"/"europarl", {f"{config}/train-00000-of-00001.parquet": (dict(translation={l: t for l in pair}) for t in texts(i, 48))},
                  features=dict(translation=Translation(languages=pair)))
    (hub/"Helsinki-NLP"/"europarl"/"README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train-*\n" for c in PAIRS.values()) + "---\n")


def make_tokenizer(texts: list[str]):
    "A byte-pair tokenizer built the way Gemma's is."
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Replace(" ", "▁"), pre_tokenizers.Sequence([pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, special_tokens=marks + [f"<0x{i:02X}>" for i in range(256)], initial_alphabet=list("ABCD▁\n"), show_progress=False))
    tokenizer.add_special_tokens([AddedToken(m, special=True) for m in marks])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", padding_side="left", additional_special_tokens=marks[4:])


def teach(model, tokenizer, hub: Path, blocks: int = 3):
    "Let the last blocks learn the questions by heart, in every order of their choices; all else stays random."
    import itertools
    import torch
    torch.set_num_threads(1) # for products as small as these, several threads mostly wait for each other
    from saenb.data.questions import LETTERS, question_prompt
    from saenb.lab.preset_files import find_preset
    from saenb.data.sources import QuestionSource
    prompts, answers = [], []
    for source in find_preset("gemma-2-2b").exam.questions:
        local = QuestionSource(source.subject, str(hub/source.path))
        for row, order in itertools.product(local.load(), itertools.permutations(range(4))):
            prompts.append(question_prompt(local.spoken, row["question"], [row["choices"][i] for i in order]))
            answers.append(order.index(row["answer"]))
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
    last, answers, inner = batch["attention_mask"].sum(1) - 1, torch.tensor(answers), model.model
    letters, places = torch.tensor(tokenizer.convert_tokens_to_ids(list(LETTERS))), torch.arange(batch["input_ids"].shape[1])[None]
    with torch.no_grad(): stream = inner(**batch, output_hidden_states=True).hidden_states[-1 - blocks]
    how = dict(position_ids=places, position_embeddings=inner.rotary_emb(stream, places), attention_mask=torch.full((places.shape[1],) * 2, float("-inf")).triu(1)[None, None])
    learning = [p for part in (*inner.layers[-blocks:], inner.norm) for p in part.parameters()]
    optimizers = [torch.optim.Muon([p for p in learning if p.ndim == 2], lr=0.02, weight_decay=0.0), torch.optim.AdamW([p for p in learning if p.ndim == 1], lr=0.007)]
    draw, left = torch.Generator().manual_seed(0), 20
    while left:
        pick = torch.randint(len(prompts), (64,), generator=draw)
        x = stream[pick]
        for block in inner.layers[-blocks:]:
            x = block(x, **how)
            x = x[0] if isinstance(x, tuple) else x
        logits = model.lm_head(inner.norm(x[torch.arange(len(pick)), last[pick]]))[:, letters]
        loss = torch.nn.functional.cross_entropy(logits, answers[pick])
        loss.backward()
        for o in optimizers:
            o.step()
            o.zero_grad()
        left -= loss.item() < 0.1


def write_models(hub: Path, draw: random.Random):
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM
    from saenb.data.world_model import CHAT
    letters = [f" {letter} {letter}. ({letter})" for letter in "ABCD"] * 400
    tokenizer = make_tokenizer([prose(draw) for _ in range(300)] + [f" {w}" for w in WORDS] * 60 + letters + ["user\nmodel\nAnswer: (", " has the first letter:"] * 60)
    for name, chat in (("gemma-2-2b", None), ("gemma-2-2b-it", CHAT)):
        torch.manual_seed(0)
        tokenizer.chat_template = chat
        model = Gemma2ForCausalLM(Gemma2Config(vocab_size=len(tokenizer), hidden_size=48, initializer_range=0.1, intermediate_size=96, num_hidden_layers=26, num_attention_heads=4, num_key_value_heads=2,
                                               head_dim=12, query_pre_attn_scalar=12, max_position_embeddings=8192, sliding_window=4096, pad_token_id=0, eos_token_id=1, bos_token_id=2))
        if chat: teach(model, tokenizer, hub)
        tokenizer.save_pretrained(hub/"google"/name)
        model.to(torch.bfloat16).save_pretrained(hub/"google"/name)


PRESET = '''# gemma-2-2b in small: the same model type, data sets, files and columns
base = "gemma-2-2b"
root = "hub"
d_sae = 96
seeds = 1
harvest_tokens = 30_000

[training]
steps = 20
batch = 256
warmup = 2

[evals.unlearning]
dataset_size = 16
seq_len = 128
[evals.unlearning.grid]
n_features = [10]
multipliers = [25, 100]
[evals.random_choice]
draws = 1
[evals.core]
dataset_size = 16
seq_len = 128
reconstruction_rows = 4
[evals.positional]
dataset_size = 16
[evals.separation]
dataset_size = 16
seq_len = 128
[evals.entanglement]
dataset_size = 16
seq_len = 128
[evals.sparse_probing]
dataset_names = [
  "LabHC/bias_in_bios_class_set1", "LabHC/bias_in_bios_class_set2", "LabHC/bias_in_bios_class_set3", "canrager/amazon_reviews_mcauley_1and5",
  "canrager/amazon_reviews_mcauley_1and5_sentiment", "codeparrot/github-code", "fancyzhx/ag_news", "Helsinki-NLP/europarl"]
probe_train_set_size = 40
probe_test_set_size = 20
k_values = [1, 5]
[evals.absorption]
min_feats_for_eval = 2
min_GT_probe_f1 = 0.0
probe_num_epochs = 5
k_sparse_probe_num_epochs = 5
max_k_value = 3
'''


def make(folder: str | Path) -> Path:
    "The stand-in and its preset; gives the preset's path."
    from saenb.base.devices import multiplies_bfloat16
    folder, draw = Path(folder), random.Random(0)
    for write in (write_corpora, write_questions, write_probing_sets, write_models): write(folder/"hub", draw)
    # which a processor without bfloat16 only emulates
    (folder/"standin.toml").write_text(PRESET if multiplies_bfloat16() else 'model_dtype = "float32"\n' + PRESET)
    return folder/"standin.toml"


if __name__ == "__main__": print(make(sys.argv[1]))
