"""Packaging, from settings.ini: the file that nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
settings = ConfigParser()
settings.read(root / "settings.ini", encoding="utf-8")
cfg = settings["DEFAULT"]
readme = root / "README.md"

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
    package_data={"saenb": ["assets/**"]},
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in ("dev", "tensorboard", "wandb", "ray")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        # nbdev looks symbols up here when it links `names` in the prose to their documentation.
        "nbdev": ["saenb=saenb._modidx:d"],
    },
    zip_safe=False,
)
