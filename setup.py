"""Packages of the wheel: the library, and the launch scripts of train/ and eval/ as jaxalign.launch.*.

An editable install has the library alone: in a clone `jaxalign.launch` finds the scripts by itself. One folder on the
path is then enough, which editors and type checkers read too, in place of setuptools' import hook, which they do not.
"""

import sys

from setuptools import find_packages, setup

SCRIPTS = ("train", "eval")
EDITABLE = "editable_wheel" in sys.argv

scripts = (
    [] if EDITABLE else [f"jaxalign.launch.{name}" for s in SCRIPTS for name in find_packages(include=[s, f"{s}.*"])]
)
setup(
    packages=[
        *find_packages(include=["jaxalign", "jaxalign.*"]),
        *scripts,
        *(["jaxalign.launch.train.presets"] if scripts else []),  # option files, no code
    ],
    package_dir={"": "."} if EDITABLE else {f"jaxalign.launch.{name}": name for name in SCRIPTS},
)
