"""Checkpoints of another model are refused by the name of the first array that differs."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from jaxalign import training
from jaxalign.training import checkpoints

OPTIMIZER, _ = training.adamw(learning_rate=1e-3, steps=10)


def state_of(**shapes: tuple[int, ...]) -> training.TrainState:
    return training.create({"transformer": {name: jnp.ones(shape) for name, shape in shapes.items()}}, OPTIMIZER)


@pytest.fixture
def folder(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, state_of(w=(4, 3)), {"seed": 1})
        manager.wait_until_finished()
    return tmp_path


@pytest.mark.parametrize(
    ("shapes", "error"),
    [
        ({"w": (5, 3)}, r"params/transformer/w: expected \(5, 3\) of this model, found \(4, 3\) in "),
        ({"v": (4, 3)}, r"params/transformer/v: expected \(4, 3\) of this model, found none in "),
        ({"w": (4, 3), "z": (2,)}, r"params/transformer/z: expected \(2,\) of this model, found none in "),
        ({}, r"params/transformer/w: expected no such array of this model, found \(4, 3\) in "),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_name_of_an_array(folder, shapes, error):
    with checkpoints.open_checkpoints(folder) as manager:
        with pytest.raises(ValueError, match=rf"^checkpoint: {error}.*; name another --out") as found:
            checkpoints.restore(manager, state_of(**shapes), {"seed": 1})
        assert "\n" not in str(found.value)


def test_a_checkpoint_of_this_model_is_read(folder):
    with checkpoints.open_checkpoints(folder) as manager:
        found, step = checkpoints.restore(manager, state_of(w=(4, 3)), {"seed": 1})
        assert step == 0
        assert (found.params["transformer"]["w"] == 1).all()
        with pytest.raises(ValueError, match=r"^data: expected .* found \{'seed': 2\}; name another --out"):
            checkpoints.restore(manager, state_of(w=(4, 3)), {"seed": 2})
