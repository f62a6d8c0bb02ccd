"""One optimizer step: accumulation, sharding, masks, bfloat16; and the objectives against plain numpy."""

from __future__ import annotations

import functools
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from jaxalign import models, training
from jaxalign.training import objectives
from tests.conftest import VOCAB, alone, on_devices, tiny_config, tiny_lm


def rows(count: int, length: int = 7, seed: int = 0) -> dict[str, np.ndarray]:
    """Right-padded rows of unequal length; pads hold a real token id on purpose."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (count, length)).astype(np.int32)
    size = rng.integers(4, length + 1, count)
    mask = np.arange(length) < size[:, None]
    return {"tokens": tokens, "mask": mask, "loss_mask": mask & (np.arange(length) >= 2)}


def pairs(count: int) -> dict:
    return {"chosen": rows(count, seed=1), "rejected": rows(count, seed=2)}


def grouped(batch, parts: int):
    """[B,...] -> [A,b,...]."""
    return jax.tree.map(lambda x: x.reshape((parts, -1, *x.shape[1:])), batch)


def objective(name: str, dtype: str = "float32"):
    """(loss, float32 parameters, frozen, batch of 8)."""
    head = {
        "sft": None,
        "arm": None,
        "dpo": None,
        "ipo": None,
        "reward_model": "reward",
        "leader": "reward",
        "fudge": "value",
        "td": "value",
    }.get(name, "q")
    lm, params = tiny_lm(0, head, num_layers=1)
    lm = models.LanguageModel(lm.config, dtype)
    reward = np.linspace(-1, 1, 8).astype(np.float32)
    if name == "sft":
        return objectives.language_model(lm), params, None, rows(8)
    if name == "reward_model":
        return objectives.bradley_terry(lm), params, None, pairs(8)
    if name == "arm":
        return objectives.autoregressive_reward(lm, beta_r=0.3), params, None, pairs(8)
    if name in objectives.DPO_OBJECTIVES:
        smoothing = 0.1 if name == "dpo" else 0.0
        loss = objectives.dpo(lm, beta=0.3, objective=name, label_smoothing=smoothing)
        return loss, params, tiny_lm(5, num_layers=1)[1], pairs(8)
    if name == "leader":
        lm = models.with_head(lm, models.Head("reward", bound=2.0))
        grouped_rows = {k: v.reshape(8, 3, *v.shape[1:]) for k, v in rows(24).items() if k != "loss_mask"}
        utility = np.random.default_rng(3).normal(size=(8, 3)).astype(np.float32)
        return objectives.stackelberg(lm, beta=0.7), params, None, grouped_rows | {"utility": utility}
    base, frozen = tiny_lm(5, num_layers=1)
    base = models.LanguageModel(base.config, dtype)
    kind = {"fudge_q": "fudge"}.get(name, name)
    loss = objectives.value(lm, kind, base=base if kind == "cd_q" else None)
    return loss, params, frozen if kind == "cd_q" else None, rows(8) | {"reward": reward}


NAMES = ["sft", "reward_model", "arm", "dpo", "ipo", "fudge", "fudge_q", "td", "cd_q", "leader"]


@functools.cache  # by several tests
def one_step(name: str, parts: int, dtype: str = "float32"):
    loss, params, frozen, batch = objective(name, dtype)
    optimizer = optax.sgd(0.1)
    step = training.train_step(loss, optimizer)
    start = training.create(jax.tree.map(jnp.array, params), optimizer)
    return params, step(start, grouped(batch, parts), frozen)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_gradients_are_those_of_the_large_batch(name):
    """Also where the micro-batches hold different numbers of tokens (sft): the sums are divided once."""
    _, (whole, expected) = one_step(name, 1)
    for parts in (2, 4):
        _, (state, found) = one_step(name, parts)
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(whole.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        assert int(state.step) == 1


@pytest.mark.parametrize("name", NAMES)
def test_one_bfloat16_step_keeps_float32_masters(name):
    before, (state, metrics) = one_step(name, 2, "bfloat16")
    _, (_, exact) = one_step(name, 2)
    old_leaves, new_leaves = jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(state.params)
    for (path, old), new in zip(old_leaves, new_leaves, strict=True):
        assert new.dtype == jnp.float32
        assert np.isfinite(new).all()
        # A value objective does not read the language model's own head.
        read = name in ("sft", "arm", "dpo", "ipo") or "lm_head" not in jax.tree_util.keystr(path)
        assert not read or old.ndim < 2 or (np.asarray(old) != np.asarray(new)).any(), path
    assert all(value.dtype == jnp.float32 for value in metrics.values())
    np.testing.assert_allclose(metrics["loss"], exact["loss"], rtol=0.1, atol=0.05)


def test_what_is_masked_out_changes_nothing():
    """Other tokens behind the mask, and rows of padding alone, give the same step."""
    loss, params, _, batch = objective("sft")
    optimizer = optax.sgd(0.1)
    step = training.train_step(loss, optimizer)
    expected, metrics = step(training.create(jax.tree.map(jnp.array, params), optimizer), grouped(batch, 1))
    other = batch | {"tokens": np.where(batch["mask"], batch["tokens"], 9)}
    empty = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), other)
    found, again = step(training.create(jax.tree.map(jnp.array, params), optimizer), grouped(empty, 2))
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(again["loss"], metrics["loss"], rtol=1e-5)


def test_objectives_equal_their_equations():
    """Each against the losses on the model's own outputs, one row at a time, without padding."""
    for name in ("sft", "reward_model", "arm", "dpo", "ipo", "fudge", "fudge_q", "cd_q"):
        loss, params, frozen, batch = objective(name)
        found = float(jax.jit(loss)(params, batch, frozen)[0])
        np.testing.assert_allclose(found, by_hand(name, params, frozen, batch), rtol=2e-5, err_msg=name)


def by_hand(name, params, frozen, batch) -> float:
    heads = {"reward_model": "reward", "fudge": "value", "fudge_q": "q", "cd_q": "q"}
    lm = tiny_lm(0, heads.get(name), num_layers=1)[0]

    def row(part, b):
        size = int(part["mask"][b].sum())
        return part["tokens"][b, :size].tolist(), size

    def log_likelihood(part, b, weights=params):
        tokens, size = row(part, b)
        table = log_softmax(alone(lm, weights, tokens).logits, axis=-1)
        return sum(float(table[t - 1, tokens[t]]) for t in range(2, size))

    def score(part, b):
        return float(alone(lm, params, row(part, b)[0]).head[-1, 0])

    if name == "sft":
        return -sum(log_likelihood(batch, b) for b in range(8)) / batch["loss_mask"].sum()
    if name in ("reward_model", "arm"):
        f, scale = (score, 1.0) if name == "reward_model" else (log_likelihood, 0.3)
        margin = np.array([f(batch["chosen"], b) - f(batch["rejected"], b) for b in range(8)])
        return float(np.log1p(np.exp(-scale * margin)).mean())
    if name in ("dpo", "ipo"):

        def ratio(part, b):
            return log_likelihood(part, b) - log_likelihood(part, b, frozen)

        margin = np.array([ratio(batch["chosen"], b) - ratio(batch["rejected"], b) for b in range(8)])
        if name == "ipo":
            return float(((margin - 1 / 0.6) ** 2).mean())
        return float((0.9 * np.log1p(np.exp(-0.3 * margin)) + 0.1 * np.log1p(np.exp(0.3 * margin))).mean())
    total = 0.0
    for b in range(8):
        tokens, size = row(batch, b)
        head = alone(lm, params, tokens).head
        for t in range(2, size):  # y_t at position t
            value = head[t, 0] if name == "fudge" else head[t - 1, tokens[t]]
            target = batch["reward"][b]
            if name == "cd_q" and t < size - 1:
                base = softmax(alone(tiny_lm(5, num_layers=1)[0], frozen, tokens).logits[t])
                target = float(base @ head[t])
            total += 0.5 * (value - target) ** 2
    return float(total) / 8


def test_dpo_starts_at_the_reference_and_its_margin_is_the_implicit_rewards():
    """At the reference the loss is log 2 and the margin 0, to the last bit; one step down raises the margin."""
    lm, params = tiny_lm(0)
    batch = pairs(8)
    loss = objectives.dpo(lm, beta=0.3)
    first, aux = loss(params, batch, params)
    np.testing.assert_allclose(first, np.log(2), rtol=1e-6)
    assert float(aux.metrics["margin"]) == 0
    assert float(aux.metrics["accuracy"]) == 0.5
    optimizer = optax.sgd(0.01)
    start = training.create(jax.tree.map(jnp.array, params), optimizer)
    state, _ = training.train_step(loss, optimizer)(start, grouped(batch, 1), params)
    after, moved = loss(state.params, batch, params)
    assert float(after) < float(first)
    sides = [objectives.implicit_rewards(lm, state.params, params, batch[s], beta=0.3) for s in ("chosen", "rejected")]
    margin = np.asarray(sides[0] - sides[1])
    np.testing.assert_allclose(moved.metrics["margin"], margin.mean(), rtol=1e-4)
    np.testing.assert_allclose(moved.metrics["accuracy"], (margin > 0).mean())
    assert float(moved.metrics["margin"]) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "slic"}, "objective: expected one of"),
        ({"label_smoothing": 0.5}, "label_smoothing: "),
        ({"objective": "ipo", "label_smoothing": 0.1}, "label_smoothing: .* 0 for ipo"),
    ],
)
def test_dpo_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        objectives.dpo(tiny_lm(0)[0], beta=0.1, **options)


def test_the_schedule_rises_and_falls():
    _, schedule = training.adamw(learning_rate=1.0, steps=100, warmup=0.1)
    values = [float(schedule(i)) for i in range(100)]
    assert 0 < values[0] <= 0.2
    assert max(values) == pytest.approx(1.0)
    assert np.argmax(values) == pytest.approx(9, abs=1)
    assert values[-1] == pytest.approx(0.1, abs=0.01)
    assert np.isfinite([float(training.adamw(learning_rate=1.0, steps=1)[1](0))]).all()


def test_weight_decay_leaves_vectors_alone():
    optimizer, _ = training.adamw(learning_rate=0.1, steps=2, weight_decay=0.5)
    params = {"matrix": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert (updates["scale"] == 0).all()
    assert (updates["matrix"] < 0).all()


@pytest.mark.parametrize(
    ("head", "kind", "message"),
    [("value", "cd_q", "cd_q: expected a Q head"), ("q", "mse", "objective: expected one of"), (None, "td", "a head")],
)
def test_value_objectives_that_cannot_be_are_refused(head, kind, message):
    with pytest.raises(ValueError, match=message):
        objectives.value(tiny_lm(0, head)[0], kind)


def test_the_bellman_target_holds_no_table_of_all_positions():
    """cd_q reads two tables of V numbers per position, in chunks: temporaries far below [b,L,V]."""
    config = tiny_config(models.Head("q"), vocab_size=16_384, max_length=512, num_layers=1, num_heads=1, num_kv_heads=1)
    lm = models.LanguageModel(config)
    base = models.with_head(lm, None)
    loss = objectives.value(lm, "cd_q", base=base)
    batch = {
        k: jax.ShapeDtypeStruct((4, 512), v) for k, v in (("tokens", jnp.int32), ("mask", bool), ("loss_mask", bool))
    }
    batch["reward"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    params, frozen = jax.eval_shape(lm.init, jax.random.key(0)), jax.eval_shape(base.init, jax.random.key(0))
    run = jax.jit(jax.grad(lambda p, b, f: loss(p, b, f)[0])).lower(params, batch, frozen).compile()
    assert run.memory_analysis().temp_size_in_bytes < 4 * 512 * 16_384 * 4


def test_training_by_hand_with_optax_and_with_train_step_are_the_same():
    """`jax.value_and_grad` works on every objective, and neither way takes the caller's parameters."""
    for name in NAMES:
        loss, params, frozen, batch = objective(name)
        optimizer = optax.sgd(0.1)
        (value, aux), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, frozen)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        stepped = optax.apply_updates(params, updates)
        state, metrics = training.train_step(loss, optimizer)(
            training.create(params, optimizer), grouped(batch, 1), frozen
        )
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
        assert set(metrics) == {"loss", "grad_norm", *aux.metrics}
        for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(stepped), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, frozen)))


def test_a_step_that_donates_takes_the_state():
    loss, params, _, batch = objective("sft")
    optimizer = optax.sgd(0.1)
    start = training.create(jax.tree.map(jnp.array, params), optimizer)
    training.train_step(loss, optimizer, donate=True)(start, grouped(batch, 1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(start.params))


def test_of_several_micro_batches_the_largest_value_is_told_and_the_mean_of_means():
    def loss(params, batch, frozen):
        error = (batch["x"] * params["w"]) ** 2
        return error.mean(), training.LossAux(jnp.asarray(2.0), {"mean": error.mean()}, {"worst": error.max()})

    optimizer = optax.sgd(0.1)
    step = training.train_step(loss, optimizer)
    for parts in ([[1.0, 4.0, 2.0, 3.0]], [[1.0, 4.0], [2.0, 3.0]]):
        _, metrics = step(training.create({"w": jnp.ones(())}, optimizer), {"x": jnp.asarray(parts)})
        assert (float(metrics["mean"]), float(metrics["worst"])) == (7.5, 16.0)


@pytest.mark.parametrize("name", NAMES)
def test_objectives_are_cached_by_value(name):
    assert objective(name)[0] is objective(name)[0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: x.mean(), r"loss wrong: expected \(loss \[\], LossAux.* found .*Tracer"),
        (lambda x: (x.mean(), {"weight": 1}), r"loss wrong: expected \(loss \[\], LossAux\(.*'dict'"),
        (lambda x: (x, training.LossAux(jnp.ones(()), {})), r"loss wrong: expected loss of shape \(\), found \(4,\)"),
        (lambda x: (x.mean(), training.LossAux(jnp.ones(4), {})), r"expected weight of shape \(\), found \(4,\)"),
        (lambda x: (x.mean(), training.LossAux(jnp.ones(()), {"a": x})), r"expected a of shape \(\), found \(4,\)"),
        (lambda x: (x.mean(), training.LossAux(jnp.ones(()), {"loss": x.mean()})), r"step's own .*found \['loss'\]"),
        (lambda x: (x.mean(), training.LossAux(jnp.ones(()), 3)), r"expected metrics by name, found int"),
        (lambda x: (x.mean(), training.LossAux(jnp.ones(()), {}, {"a": x})), r"expected a of shape \(\), found \(4,\)"),
        (lambda x: (x.mean(), training.LossAux(jnp.ones(()), *2 * [{"a": x.mean()}])), r"each name once.*\['a'\]"),
    ],
)
def test_a_loss_of_another_form_is_named(result, message):
    def wrong(params, batch, frozen):
        return result(batch["x"] * params["w"])

    optimizer = optax.sgd(0.1)
    state = training.create({"w": jnp.ones(())}, optimizer)
    with pytest.raises(ValueError, match=message):
        training.train_step(wrong, optimizer)(state, {"x": jnp.ones((1, 4))})


def test_a_batch_whose_leaves_do_not_share_micro_batches_is_named():
    def loss(params, batch, frozen):
        return (batch["x"].mean() + batch["y"].mean()) * params["w"], training.LossAux(jnp.ones(()), {})

    optimizer = optax.sgd(0.1)
    step, state = training.train_step(loss, optimizer), training.create({"w": jnp.ones(())}, optimizer)
    for batch in ({"x": jnp.ones((1, 4)), "y": jnp.ones((2, 4))}, {"x": jnp.ones((1, 4)), "y": jnp.ones(4)}, {}):
        with pytest.raises(ValueError, match=r"batch: expected arrays \[A,b,...\] of the same A"):
            step(state, batch)


FOUR = """
    import jax, numpy as np, optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from jaxalign import training
    from jaxalign.models import sharding
    from tests.training.test_step import grouped, objective

    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    assert mesh.size == 4
    for name in ("sft", "reward_model", "dpo"):
        losses = []
        for spread in (False, True):
            loss, params, frozen, batch = objective(name)
            optimizer = optax.adam(0.01)
            step = training.train_step(loss, optimizer)
            state = training.create(jax.tree.map(lambda x: x.copy(), params), optimizer)
            batch = grouped(batch, 2)
            if spread:
                state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
                state = state._replace(params=sharding.shard(state.params, mesh))
                batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec(None, "data")))
                assert batch_leaf(batch).addressable_shards[0].data.shape[1] == 1
            found = []
            for _ in range(3):
                state, metrics = step(state, batch, frozen)
                found.append(float(metrics["loss"]))
            if spread:
                assert all(len(leaf.devices()) == 4 for leaf in jax.tree.leaves(state.params))
            losses.append(found)
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, err_msg=name)
"""


def test_four_devices_give_the_losses_of_one():
    program = textwrap.dedent(FOUR).replace("batch_leaf(batch)", "jax.tree.leaves(batch)[0]")
    on_devices(program)
