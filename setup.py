"""Packaging, from settings.ini: the file that nbdev reads too."""
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
settings = ConfigParser()
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
readme = root / "README.md"
# nbdev looks symbols up in this index when it links `names` in the prose; only whoever edits the notebooks needs it
EDITABLE, INDEX = {"develop", "editable_wheel"} & set(sys.argv), "_modidx"


class Modules(build_py):
    "Leaves the index out of a wheel."
    def find_package_modules(self, package, package_dir):
        return [m for m in super().find_package_modules(package, package_dir) if EDITABLE or m[1] != INDEX]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
    ],
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["saenb", "saenb.*"]),
    package_data={"saenb": ["assets/**", "py.typed"]},
    cmdclass=dict(build_py=Modules),
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "tensorboard", "wandb", "ray", "real")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        **({"nbdev": [f"saenb=saenb.{INDEX}:d"]} if EDITABLE else {}),
    },
    zip_safe=False,
)
