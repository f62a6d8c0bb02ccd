"""Packages of the wheel: the library, and the launch scripts of train/ and eval/ as jaxalign.launch.*."""

from setuptools import find_packages, setup

SCRIPTS = ("train", "eval")

setup(
    packages=[
        *find_packages(include=["jaxalign", "jaxalign.*"]),
        *(f"jaxalign.launch.{name}" for s in SCRIPTS for name in find_packages(include=[s, f"{s}.*"])),
    ],
    package_dir={f"jaxalign.launch.{name}": name for name in SCRIPTS},
)
