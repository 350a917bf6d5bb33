"""The house: layers, names, sizes, nothing that knows one experiment by name, records that open, former
paths."""
import ast
import importlib
import json
import re
import subprocess
import sys
from functools import cache

import pytest

from conftest import ROOT

PACKAGE, NBS, RUNS = ROOT/"saenb", ROOT/"nbs", ROOT/"runs"
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): p
         for p in sorted(PACKAGE.rglob("*.py")) if p.name != "_modidx.py"} # "__init__" is the package itself
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb")
                   if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


@cache
def tree(module): return ast.parse(FILES[module].read_text(encoding="utf-8"))


def short(path): return path.relative_to(ROOT).as_posix()


def nothing(found):
    """Fail with all that was found, a line each."""
    found = [f"{k}: {v}" for k, v in found.items()] if isinstance(found, dict) else list(map(str, found))
    assert not found, "\n" + "\n".join(found)


# ------------------------------------------------------------------------------------------------ layers

SEES = dict(
    load=(), base=(), data=("base",), sae=("base", "data"), train=("base", "data", "sae"),
    ideas=("base", "data", "sae", "train"), evals=("base", "data", "sae"),
    report=("base", "data", "sae", "train", "ideas", "evals", "lab.records"),
    lab=("base", "data", "sae", "train", "ideas", "evals", "report"),
    cli=("base", "data", "sae", "train", "ideas", "evals", "report", "lab"), __main__=("cli",), __init__=())
EVERYWHERE = ("load", "__init__") # how public names are imported on demand, and the version
LOOKS_INTO = { # where declarations are looked for that the layers below know of by name only
    ("sae.gates",
     "ideas"): "a gate is a mechanism that is kept with its dictionary, which finds it by its name",
}


@cache
def offered(package):
    """The names that a package's __init__ imports when they are asked for, and from where."""
    tables = [n.args[1] for n in ast.walk(tree(package))
              if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "lazily"]
    return {name: module.removeprefix("saenb.") for t in tables
            for module, names in ast.literal_eval(t).items() for name in names}


def imported_by(module):
    """Modules that a module imports, wherever in it the import stands."""
    path = FILES[module]
    here = list(path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "saenb": yield "__init__"
                if alias.name.startswith("saenb."):
                    yield alias.name.removeprefix("saenb.")
        if not isinstance(node, ast.ImportFrom): continue
        origin = node.module or ""
        if node.level:
            origin = ".".join([*here[:len(here) - node.level + 1], *filter(None, [origin])])
        elif origin == "saenb" or origin.startswith("saenb."):
            origin = origin.partition(".")[2]
        else: continue
        origin = origin or "__init__"
        inside = "" if origin == "__init__" else f"{origin}."
        is_package = FILES.get(origin, PACKAGE).name == "__init__.py"
        for alias in node.names:
            if is_package and f"{inside}{alias.name}" in FILES:
                yield f"{inside}{alias.name}"
            elif is_package and alias.name in offered(origin):
                yield offered(origin)[alias.name]
            else: yield origin


EDGES = {module: sorted(set(imported_by(module)) - {module}) for module in FILES}


def test_imports_point_one_way():
    wrong = []
    for module, targets in EDGES.items():
        layer = module.partition(".")[0]
        for target in targets:
            own = target.partition(".")[0] == layer
            allowed = any(target == seen or target.startswith(f"{seen}.") for seen in SEES[layer])
            if not own and not allowed and target not in EVERYWHERE:
                wrong.append(f"{module} -> {target}")
    nothing(wrong)


def test_every_import_leads_somewhere():
    assert {"base.errors", "lab.runner", "ideas.run"} <= set(EDGES["cli"]) # at its top and inside functions
    nothing(f"{module} -> {target}" for module, targets in EDGES.items()
            for target in targets if target not in FILES)


def test_there_is_no_cycle():
    """Modules are taken away as long as one imports none of those that are left, or none of these it."""
    left = {module: set(targets) for module, targets in EDGES.items()}
    while ready := [module for module, targets in left.items()
                    if not targets & left.keys() or module not in set().union(*left.values())]:
        for module in ready: del left[module]
    nothing({module: sorted(targets & left.keys()) for module, targets in left.items()})


def test_packages_offer_what_is_their_own():
    """On demand as well: a package's __init__ names modules of that package, and saenb's own any."""
    offers = [(package, name, module) for package, path in FILES.items() if path.name == "__init__.py"
              for name, module in offered(package).items()]
    nothing(offer for offer in offers if offer[2] not in FILES)
    nothing(offer for offer in offers if offer[0] != "__init__" and not offer[2].startswith(f"{offer[0]}."))


def test_declarations_are_looked_for_from_above():
    found = {(module, node.value.removeprefix("saenb.")) for module, path in FILES.items()
             if path.name != "__init__.py" and module != "load"
             for node in ast.walk(tree(module)) if isinstance(node, ast.Constant)
             and isinstance(node.value, str) and re.fullmatch(r"saenb(\.\w+)+", node.value)}
    upwards = {(module, package) for module, package in found if package.partition(".")[0]
               not in (module.partition(".")[0], *SEES[module.partition(".")[0]])}
    assert upwards == LOOKS_INTO.keys()


# ------------------------------------------------------------------------------------------------ names and
# sizes

def functions(module):
    return [n for n in ast.walk(tree(module)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


def one_liners(source):
    """Lines on which a statement follows a colon."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        for block in ("body", "orelse", "finalbody"):
            statements = getattr(node, block, None)
            if not isinstance(statements, list) or not statements or not isinstance(statements[0], ast.stmt):
                continue
            first = statements[0]
            before = lines[first.lineno - 1].encode()[:first.col_offset].decode().rstrip()
            if before.endswith(":"):
                yield first.lineno, lines[first.lineno - 1]


@cache
def cells(path):
    """A notebook's code cells; commands to IPython, which are no Python, are left out."""
    found = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    def plain(line): return re.sub(r"^(\s*)[%!].*", r"\1pass", line)
    return ["\n".join(map(plain, "".join(c["source"]).splitlines())) for c in found]


def written(text):
    """A module's text without its list of names, which nbdev writes at a width of its own."""
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            lines[node.lineno - 1:node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def sources():
    """All code by where it stands: modules, and cells counted from 0 among a notebook's code cells."""
    for path in FILES.values():
        yield short(path), written(path.read_text(encoding="utf-8"))
    for path in NOTEBOOKS:
        for i, source in enumerate(cells(path)):
            yield f"{short(path)} cell {i}", source


def test_no_module_name_occurs_twice():
    names = [p.stem for p in FILES.values() if p.stem not in ("__init__", "__main__")]
    nothing({name for name in names if names.count(name) > 1})


def test_modules_have_400_lines_at_most():
    sizes = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    nothing({module: size for module, size in sizes.items() if size > 400})


def test_functions_have_40_lines_at_most():
    sizes = {f"{module}:{f.lineno} {f.name}": f.end_lineno - f.lineno + 1 for module in FILES
             for f in functions(module)}
    nothing({name: size for name, size in sizes.items() if size > 40})


def test_lines_have_120_columns_at_most():
    nothing(f"{name}:{i} has {len(line)}" for name, source in sources()
            for i, line in enumerate(source.splitlines(), 1) if len(line) > 120)


def test_a_statement_after_a_colon_is_short():
    nothing(f"{name}:{i} {line.strip()}" for name, source in sources()
            for i, line in one_liners(source) if len(line) >= 80)


def test_a_long_one_liner_is_found():
    long = "x" * 80
    found = [i for i, line in one_liners(
        f"if a: {long}\nelse: b\nfor i in a:\n    {long}\ndef f(): return {long}\n") if len(line) >= 80]
    assert found == [1, 5]


def test_cells_have_40_lines_at_most():
    sizes = {f"{short(path)} cell {i}": len(source.splitlines()) for path in NOTEBOOKS
             for i, source in enumerate(cells(path))}
    nothing({name: size for name, size in sizes.items() if size > 40})


def test_notebooks_are_numbered_through():
    """Parts one after the other, each notebook with the next number; the index alone has none."""
    unnumbered = [p for p in NOTEBOOKS if not re.match(r"\d\d+_", p.name)]
    assert unnumbered == [NBS/"index.ipynb"]
    assert all(re.fullmatch(r"\d_\w+|appendix", p.parent.name) for p in NOTEBOOKS if p not in unnumbered)
    # parts in their order: 0_start to 6_extend, appendix
    numbers = sorted((p.parent.name, int(re.match(r"\d+", p.name)[0])) for p in NOTEBOOKS if p not in unnumbered)
    assert [number for _, number in numbers] == list(range(1, len(numbers) + 1))


# ------------------------------------------------------------------------------------------------ nobody is
# known by name

GENERAL = ("lab", "report", "cli") # parts that ask declarations; reports of single experiments are their own
EXCEPTIONS = { # why, and what stands in which module
    "Record.unlearning, what a record's main evaluation found, is a public name of before": [
        (module, "unlearning") for module in ("lab.records", "lab.reproduction", "report.figures",
                                              "report.logbook", "report.plots")],
    "the axis or the file of a figure, of which the committed ones are redrawn byte for byte": [
        (module, text) for module in ("report.figures", "report.plots")
        for text in ("unlearning_scores",)],
    "a function of torch's": [("report.explorer", "clamp"), ("report.explorer", "clamp_min")],
    "a page shows AUROCs, which are measured as that evaluation measures them": [
        ("report.explorer", "SeparationSetup"), ("report.explorer", "evals.separation")],
    "a measure, one of the few that run logs mention": [("report.logbook", "absorption fraction")],
    "a processor's core": [("cli", "one a core on")],
    "the interval that results have kept from the start is measured beside the new ones": [
        ("report.coverage", "evals.unlearning")],
}
ALLOWED = {place for places in EXCEPTIONS.values() for place in places}


def declared(kind, package):
    "Names under which a package declares things of a kind: the first argument, or `name`."
    calls = [n for module in FILES if module.partition(".")[0] == package for n in ast.walk(tree(module))
             if isinstance(n, ast.Call) and getattr(n.func, "id", "") == kind]
    given = [n.args[0] if n.args else next(k.value for k in n.keywords if k.arg == "name") for n in calls]
    return {g.value for g in given if isinstance(g, ast.Constant)}


def interventions():
    bodies = [n.body for module in FILES if module.startswith("evals.interventions.")
              for n in ast.walk(tree(module)) if isinstance(n, ast.ClassDef)]
    found = {s.value.value for body in bodies
             for s in body if isinstance(s, ast.Assign) and s.targets[0].id == "name"}
    return found - {""}


def words(text):
    "A name or a text as its words in small letters, with a blank on either side of each."
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return f" {' '.join(re.findall(r'[a-z0-9]+', apart.lower()))} "


def spoken(module):
    "Identifiers and strings of a module, docstrings left out."
    documentation = {id(n.body[0].value) for n in ast.walk(tree(module))
                     if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body
                     and isinstance(n.body[0], ast.Expr)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(getattr(node, field, None), str):
                yield getattr(node, field)


def known_by_name():
    "(module, what stands there) wherever one experiment, evaluation or intervention is named."
    names = declared("Experiment", "ideas") | declared("Evaluation", "evals") | interventions()
    general = [m for m in FILES if m.partition(".")[0] in GENERAL and not m.startswith("report.experiments")]
    return {(m, text) for m in general for text in spoken(m) if any(words(n) in words(text) for n in names)}


def excused(module, text):
    "The exception that covers what stands in a module: all of a name, or part of a long text."
    return next((e for e in ALLOWED
                 if e[0] == module and (e[1] == text or len(e[1].split()) > 3 and e[1] in text)), None)


def test_declarations_have_names():
    assert {"orthogonality", "positional", "contrastive", "dual_objective"} <= declared("Experiment", "ideas")
    assert ({"unlearning", "core", "sparse_probing", "absorption", "positional", "separation", "entanglement"}
            <= declared("Evaluation", "evals"))
    assert "clamp" in interventions()
    assert words("dual_objective") in words("draw_dual_objective") and words("core") not in words("score_of")


def test_nothing_general_knows_one_of_them_by_name():
    found = {place: excused(*place) for place in known_by_name()}
    nothing(sorted(f"{module}: {text}" for (module, text), excuse in found.items() if not excuse))
    nothing(f"no longer needed: {place}" for place in ALLOWED - set(found.values()))


# ------------------------------------------------------------------------------------------------ records

PRESETS = sorted(p for p in RUNS.glob("*-full") if p.is_dir())


def test_there_are_records():
    assert ({"tiny-full", "seed-0-full", "seed-2-full", "overlap-0-full", "overlap-50-full"}
            <= {p.name for p in PRESETS})


@pytest.mark.parametrize("root", PRESETS, ids=lambda p: p.name)
def test_every_committed_record_opens(root):
    from saenb.lab.records import find_records
    from saenb.train.config import TrainConfig
    records = find_records(root, variant=None)
    assert len(records) == len(list(root.glob("*/run_*/seed_*/config.json")))
    for record in records:
        config, info = record.config, record.info
        assert record.path.parts[-3:] == (
            record.run.split("/")[0],
            f"run_{record.run.split('/')[1]}{'@' * bool(record.variant)}{record.variant}",
            f"seed_{record.seed}")
        assert TrainConfig(**config["training"]).count() == info["training_steps"] == record.log[-1]["step"]
        if record.scored:
            assert record.unlearning["score"] == info["eval_result_metrics"]["unlearning"]["unlearning_score"]
        assert record.scored == (record.main == "unlearning") != (root.name == "architectures-words-full")
        assert (set(info["headlines"]) == set(record.evaluations)
                == {p.stem for p in (record.path/"evals").glob("*.json")})
        for name in record.evaluations:
            found = record.headline(name)
            judged = record.result(name)["eval_result_metrics"].get("mean", {"all": 1}).values()
            assert found or set(judged) == {None} # absorption says nothing where no probe finds the words
            assert {k: list(v) for k, v in found.items()} == info["headlines"][name], (record.path,
                                                                                                 name)
        assert ((record.path/"notes.md").read_text(encoding="utf-8")
                .startswith(f"# {record.run}: {config['run']['title']} (seed {record.seed}"))


@pytest.mark.parametrize("root", PRESETS, ids=lambda p: p.name)
def test_mechanisms_of_records_are_those_of_declared_runs(root):
    from saenb.ideas.run import all_runs
    from saenb.lab.records import find_records
    for record in find_records(root):
        kept, run = record.config["run"], all_runs()[record.run].as_dict()
        assert {k: kept[k] for k in run} == json.loads(json.dumps(run)), record.path


@pytest.mark.parametrize("root", PRESETS, ids=lambda p: p.name)
def test_controls_and_analyses_open(root):
    from saenb.report.figures import Material
    controls = sorted((root/"controls").glob("seed_*.json"))
    runs = [p for p in root.glob("*/run_*") if "@" not in p.name] # figures are of runs, not of variants alone
    for folder in sorted({p.parent for p in runs}):
        material = Material(root, folder.name)
        assert material.records and len(material.controls) == len(controls)
        for path in folder.glob("*.json"):
            assert material.analysis(path.stem).keys() <= {r.run for r in material.records}


# ------------------------------------------------------------------------------------------------ former
# paths

def python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


FORMER = """
from saenb.world import World
from saenb.harvest import harvest, stream_at
from saenb.lab import reproduce, run
from saenb.train import Mechanism, TrainConfig, Trainer
from saenb.evals.unlearning import evaluate
from saenb.sae import SAE
from saenb import load_sae
import saenb, saenb.harvest, saenb.presets
import saenb.data.harvest, saenb.data.world, saenb.lab.runner, saenb.lab.presets, saenb.sae.sae, saenb.train.trainer
assert World is saenb.data.world.World and load_sae is saenb.sae.sae.load_sae and SAE is saenb.sae.sae.SAE
assert run is saenb.lab.runner.run and Trainer is saenb.train.trainer.Trainer
assert callable(saenb.harvest) and saenb.harvest.harvest is harvest is saenb.data.harvest.harvest
assert saenb.presets.Preset is saenb.Preset is saenb.lab.presets.Preset and callable(evaluate)
try: from saenb.harvest import nothing
except ImportError: pass
else: raise AssertionError("a module under its former path holds anything")
"""
PUBLIC = {"run", "reproduce", "load_sae", "Run", "Experiment", "Mechanism", "Architecture", "Evaluation",
          "Intervention", "Trainer", "TrainConfig", "Store", "harvest", "World", "Preset"}


def test_former_paths_work(): python(FORMER)


def test_every_module_that_moved_is_found_under_its_former_path():
    from saenb.load import MOVED
    assert len(MOVED) > 15 and all(now in FILES for now in MOVED.values())
    for old, now in MOVED.items():
        before, after = (importlib.import_module(f"saenb.{name}") for name in (old, now))
        assert all(getattr(before, name) is getattr(after, name) for name in after.__all__), old


def test_a_function_and_the_module_of_its_name_do_not_get_in_each_others_way():
    """`saenb.harvest` can be called, whether or not something asked for the module of that path before."""
    python("import saenb\nfirst = saenb.harvest\nfrom saenb.harvest import harvest\nassert first is harvest\n"
           "assert callable(saenb.harvest) and saenb.harvest.harvest is harvest\n"
           "try: saenb.harvest()\nexcept TypeError as e: assert 'harvest()' in str(e), "
           "e\nelse: raise SystemExit(1)")


def test_public_names_are_imported_on_demand():
    import saenb
    assert PUBLIC <= offered("__init__").keys() and PUBLIC <= set(dir(saenb))
    for name in PUBLIC - {"harvest"}: # which is the module's as well
        assert getattr(saenb, name) is getattr(importlib.import_module(f"saenb.{offered('__init__')[name]}"),
                                               name)
    with pytest.raises(AttributeError, match="nothing"): saenb.nothing


@pytest.mark.parametrize("module",
                         ["saenb", "saenb.cli", "saenb.lab", "saenb.train", "saenb.sae", "saenb.base.files"])
def test_nothing_heavy_is_imported_before_it_is_asked_for(module):
    loaded = python(f"import sys, {module}\nprint(*sys.modules)").split()
    assert not {"torch", "matplotlib", "transformers", "scipy", "sklearn"} & set(loaded)


def test_a_run_does_not_wait_for_libraries_of_figures_and_probes():
    """They take longer to import than all of saenb; what uses them imports them, when it is used."""
    loaded = python("import sys\nimport saenb.lab.runner\nfrom saenb.evals.evaluation import evaluations\n"
                    "from saenb.ideas.run import all_runs\n"
                    "assert len(evaluations()) > 7 and len(all_runs()) > 20\nprint(*sys.modules)").split()
    assert "torch" in loaded and not {"matplotlib", "sklearn", "scipy", "transformers"} & set(loaded)


def test_committed_records_hold_their_logs_and_weigh_little():
    """Every committed record has its training's log, compressed; all together are at most 60 MB."""
    asked = subprocess.run(["git", "ls-files", "-z", "runs"], cwd=ROOT, capture_output=True, text=True)
    if asked.returncode: pytest.skip("this is no repository")
    paths = [ROOT/name for name in asked.stdout.split("\0") if name]
    records = {p.parent for p in paths if p.name == "final_info.json"}
    logs = {p.parent for p in paths if p.name == "train_log.jsonl.gz"}
    assert records and not records - logs and not [p for p in paths if p.name == "train_log.jsonl"]
    assert sum(p.stat().st_size for p in paths) <= 60e6


def test_what_tests_and_the_package_read_is_in_the_repository():
    asked = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "tests", "saenb"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    if found.returncode: pytest.skip("this is no repository")
    nothing([path for path in found.stdout.splitlines() if not re.search(r"__pycache__|\.lock$|\.part$", path)])
