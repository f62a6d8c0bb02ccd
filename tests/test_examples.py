"""The programs of examples/: each runs alone, is short, says in its first line what it shows, and its results are
right."""

from __future__ import annotations

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str) -> dict:
    """The names that a program leaves."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_are_short_and_say_what_they_show(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 25
    assert lines[0].startswith('"""')
    assert lines[0].endswith('."""')
    assert "tests" not in path.read_text()


def test_every_example_is_run_here():
    here = pathlib.Path(__file__).read_text()
    assert [path.stem for path in FILES if f'run("{path.stem}")' not in here] == []


def test_gradient_through_shaping():
    """The threshold is the utility that it delivers; its derivative by the utilities is the follower's policy."""
    names = run("gradient_through_shaping")
    np.testing.assert_allclose(names["value"], names["threshold"], rtol=1e-5)
    gradient = jax.grad(lambda u: names["delivered"](names["logits"], u)[1])(names["utility"])
    weight = jax.nn.softmax(names["logits"]) * jnp.where(names["utility"] > names["threshold"], jnp.exp(3.0), 1.0)
    np.testing.assert_allclose(gradient, weight / weight.sum(), rtol=1e-4)
