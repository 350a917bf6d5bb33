"""Public names, imported when they are asked for, and the paths that modules had before they moved into packages."""
import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType

MOVED = {
    "world": "data.world", "tasks": "data.world_tasks", "sources": "data.sources", "harvest": "data.harvest",
    "interchange": "sae.formats.reading", "saelens": "sae.formats.saelens_gates", "sparse": "sae.sparse_step",
    "trackers": "train.trackers", "distributed": "train.distributed",
    "pairs": "ideas.pairs", "groups": "ideas.clusters", "sides": "ideas.sides", "usage": "ideas.resets",
    "presets": "lab.presets", "preset_files": "lab.preset_files",
    "records": "lab.records", "check": "lab.check",
    "compare": "report.compare", "plots": "report.plots",
    "figures": "report.figures", "logbook": "report.logbook",
    "explorer": "report.explorer",
}


def lazily(package: str, names: dict[str, tuple[str, ...]]):
    "`__getattr__` and `__dir__` of a package whose names are imported from its modules on first use (PEP 562)."
    home = {name: module for module, members in names.items() for name in members}

    def get(name):
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    return get, lambda: sorted([*vars(sys.modules[package]), *home])


class _Moved(ModuleType):
    "A module under its former path; where it shares its name with a function, it can be called like it."
    def __getattr__(self, name):
        return getattr(importlib.import_module(self.__dict__["_now"]), name)

    def __call__(self, *args, **kwargs):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    "Finds modules under their former paths; nothing is imported until something is asked of them."
    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package == "saenb" and name in MOVED:
            return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec):
        module = _Moved(spec.name)
        module._now = f"saenb.{MOVED[spec.name.partition('.')[2]]}"
        return module

    def exec_module(self, module):
        if module.__name__ == "saenb.saelens":
            importlib.import_module(module._now)  # it registers what SAELens loads


if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.append(_Finder())
