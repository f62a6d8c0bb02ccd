"""A sampler whose log-probabilities are another program's: what that does to ratios, and what mends it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models, policies, rewards
from jaxalign.prompts import prompt_batch
from jaxalign.training import policy_gradient
from tests.conftest import tiny_lm

LENGTH, ROWS, BATCHES = 48, 32, 4


@functools.cache
def drawn_rows(dtype: str):
    """(model, params, rows): responses of a model whose logits spread as those of a trained one do, with advantages."""
    lm, params = tiny_lm(0, num_layers=2, max_length=64, eos_ids=())
    lm = models.LanguageModel(lm.config, dtype)
    params = jax.tree.map(lambda x: x * (8.0 if x.ndim > 1 else 1.0), params)
    prompts = prompt_batch([[1 + i % 7, 2, 3] for i in range(ROWS // 2)])
    reward = rewards.from_numpy(lambda tokens, mask, length, index: tokens.sum(axis=1).astype(np.float32))
    drawn = policy_gradient.collect(
        policies.language_model(lm),
        reward,
        {"policy": params, "reward": None},
        jax.random.key(1),
        prompts,
        samples=2,
        max_new_tokens=LENGTH,
        eos_ids=(),
    )
    read = policy_gradient.of_model(lm)
    method = policy_gradient.Method("rloo")
    look_up = lambda frozen, rows: read(frozen, rows)[0]  # noqa: E731
    rows, _ = jax.jit(policy_gradient.prepare, static_argnums=(0, 1, 2))(
        method, read, look_up, params, params, prompts, drawn, jnp.asarray(0.1)
    )
    # What rounding in bfloat16 on other kernels makes of a token's log-probability; this CPU's two programs agree.
    noise = 0.06 * jax.random.normal(jax.random.key(2), rows["mask"].shape) if dtype == "bfloat16" else 0.0
    sampled = jnp.where(rows["mask"], rows["drawn"] + noise, 0)
    return lm, params, rows | {"drawn": sampled, "old": sampled}


def clipped_at_the_first_update(dtype: str, *, own: bool) -> float:
    """The share of responses that are clipped at 1 ± 0.2 before any parameter has moved."""
    lm, params, rows = drawn_rows(dtype)
    read = policy_gradient.of_model(lm)
    if own:
        once = jax.jit(policy_gradient.own_log_prob, static_argnums=0, static_argnames="batches")
        rows = rows | {"old": once(Reading(read, params), rows, batches=BATCHES)}
    loss = jax.jit(jax.value_and_grad(policy_gradient.loss(policy_gradient.Method("rloo"), read), has_aux=True))
    parts = jax.tree.map(lambda x: x.reshape(BATCHES, -1, *x.shape[1:]), rows)
    found = [loss(params, jax.tree.map(lambda x: x[i], parts), None)[0][1] for i in range(BATCHES)]  # noqa: B023
    if own:
        assert max(float(aux.largest["mismatch_max"]) for aux in found) > 0 or dtype == "float32"
    return float(np.mean([aux.metrics["clipped"] for aux in found]))


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The policy's log-probabilities at fixed parameters."""

    read: policy_gradient.Read
    params: object

    def __call__(self, rows):
        return self.read(self.params, rows)[0]


def test_the_samplers_numbers_clip_responses_of_a_policy_that_has_not_moved_and_its_own_do_not():
    assert clipped_at_the_first_update("bfloat16", own=False) > 0.1
    assert clipped_at_the_first_update("bfloat16", own=True) == 0
    assert clipped_at_the_first_update("float32", own=False) == 0


@pytest.mark.parametrize(("dtype", "algorithm"), [("float32", "rloo"), ("bfloat16", "grpo")])
def test_each_ratio_of_the_only_update_is_1_bit_for_bit_and_its_gradient_the_plain_one(dtype, algorithm):
    """A clip at 1 ± 1e-30 leaves no ratio but exactly 1, whatever the sampler's numbers are."""
    lm, params, rows = drawn_rows(dtype)
    read = policy_gradient.of_model(lm)
    if algorithm == "grpo":
        rows = rows | {"advantage": jnp.broadcast_to(rows["advantage"][:, None], rows["mask"].shape)}
    narrow, usual = (
        policy_gradient.loss(policy_gradient.Method(algorithm, clip=c), read, once=True) for c in (1e-30, 0.2)
    )
    aux = jax.jit(narrow)(params, rows, None)[1]
    assert float(aux.metrics["clipped"]) == 0
    if dtype == "bfloat16":
        assert float(aux.largest["mismatch_max"]) > 0.1
        return
    grads = jax.jit(jax.grad(usual, has_aux=True))(params, rows, None)[0]

    def plain(p):
        total = jnp.where(rows["mask"], read(p, rows)[0], 0)
        advantage = rows["advantage"] if algorithm == "grpo" else rows["advantage"][:, None]
        return -(advantage * total).sum(axis=1).mean()

    expected = jax.jit(jax.grad(plain))(params)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * size), grads, expected)
