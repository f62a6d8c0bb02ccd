"""eval.bench compile: its figures, and a loop over layers that gives the numbers of unrolled ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from eval.bench import compile as bench
from jaxalign.training import objectives
from tests.conftest import needs_jit

SMALL = bench.Config(layers=(1, 3), width=64, vocab=16, length=8, new=2)


@needs_jit
def test_a_row_for_each_program_and_depth(tmp_path, capsys):
    rows = bench.run(bench.Config(**{**vars(SMALL), "out": str(tmp_path / "out")}))
    names = ["decoding", "training step", "training step, layers in a loop"]
    assert [(row["program"], row["layers"]) for row in rows] == [(name, n) for n in (1, 3) for name in names]
    assert all(row["all"] == row["trace"] + row["lower"] + row["compile"] > 0 for row in rows)
    more = {name: rows[i + 3]["instructions"] / rows[i]["instructions"] for i, name in enumerate(names)}
    most = 1.5 if jax.__version_info__ < (0, 11) else 1.6  # newer compilers write a longer program for the loop: 1.54
    assert more["training step"] > 1.5
    assert most > more["training step, layers in a loop"] > 1
    assert (tmp_path / "out/compile.json").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)


def test_layers_in_a_loop_give_the_loss_and_the_gradient_of_unrolled_ones():
    lm = bench.model_of(SMALL, 2)
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, lm.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 1, 16)
    real = jnp.ones((2, 8), bool).at[0, 5:].set(False)
    batch = {"tokens": tokens, "mask": real, "loss_mask": real}
    found = []
    for form in (type(lm), bench.Scanned):
        loss = objectives.language_model(form(lm.config, lm.dtype, remat="full"))
        found.append(jax.jit(jax.value_and_grad(lambda params, loss=loss: loss(params, batch, None)[0]))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), *found)
