"""GenARM with adapters of the base: stacked, they are the separate models, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, models, policies
from tests import cases
from tests.conftest import EOS, PROMPTS, needs_jit, padded, tiny_lm

RNG = jax.random.key(0)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


WEIGHTS = np.array([[0.6, 0.9], [0.0, 1.0], [2.0, -0.5], [0.1, 0.1], [1.0, 0.0]])
RESPONSES = jnp.array([[1, 2, 5], [3, 3, 9], [10, 4, 6], [2, 8, 1], [7, 1, 2]])
LENGTHS = jnp.arange(3) < jnp.array([3, 1, 2, 3, 3])[:, None]


@pytest.fixture(scope="module")
def separate():
    """(fused policy, its params, the tilt that it replaces, its params)."""
    with jax.enable_x64(True):
        lm, base = cases.tiny_lm(0, dtype="float64")
        fused = cases.stacked_adapters("float64")
        parts = [cases.adapter(lm, 1), cases.adapter(lm, 2, rank=1)]
        merge = jax.jit(models.lora.merge, static_argnums=2)
        merged = tuple(merge(base, part, spec) for spec, part in parts)
        tilt = policies.tilt(policies.language_model(lm), critics.weighted_sum([critics.genarm(lm)] * 2))
        params = {
            "policy": base,
            "critic": {"critics": merged, "weights": jnp.asarray(WEIGHTS)},
            "beta": jnp.asarray(1.0),
        }
        return fused.policy, fused.params | {"weights": jnp.asarray(WEIGHTS)}, tilt, params


def assert_same(left, right) -> None:
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-9, atol=1e-9, err_msg=name)


def test_genarm_A15_stacked_adapters_are_the_separate_models(separate):
    """Draws, log_prob, log_prob_ref, log_norm and KL, with weights per prompt; stepped and in parallel."""
    fused, params, tilt, tilt_params = separate
    prompts = padded(PROMPTS)
    drawn = [
        decoding.sample(policy, values, RNG, prompts, max_new_tokens=3, eos_ids=EOS)
        for policy, values in ((fused, params), (tilt, tilt_params))
    ]
    np.testing.assert_array_equal(drawn[0].tokens, drawn[1].tokens)
    assert_same(*drawn)
    expected = decoding.log_prob(tilt, tilt_params, RNG, prompts, RESPONSES, LENGTHS)
    for policy in (fused, fused._replace(log_prob=None)):
        assert_same(decoding.log_prob(policy, params, RNG, prompts, RESPONSES, LENGTHS), expected)
    assert float(jnp.abs(expected.log_prob - expected.log_prob_ref).max()) > 0.1


def test_genarm_A15_weights_are_one_set_for_all_or_one_for_each_prompt(separate):
    fused, params, _, _ = separate
    prompts = padded(PROMPTS)

    def scored(weights):
        values = params | {"weights": weights}
        return decoding.log_prob(fused, values, RNG, prompts, RESPONSES, LENGTHS).log_prob

    together = scored(WEIGHTS)
    for b in range(len(PROMPTS)):
        np.testing.assert_allclose(scored(WEIGHTS[b])[b], together[b], rtol=1e-9, atol=1e-9)


@needs_jit
def test_genarm_A15_weights_change_without_a_new_trace(separate):
    fused, params, _, _ = separate
    traces = 0

    def init(*arguments):
        nonlocal traces
        traces += 1
        return fused.init(*arguments)

    policy = fused._replace(init=init)
    drawn = [
        decoding.sample(policy, params | {"weights": w}, RNG, padded(PROMPTS), max_new_tokens=2, eos_ids=EOS)
        for w in (jnp.asarray(WEIGHTS), jnp.zeros((len(PROMPTS), 2)), -jnp.asarray(WEIGHTS))
    ]
    assert traces == 1
    np.testing.assert_allclose(drawn[1].log_prob, drawn[1].log_prob_ref, rtol=1e-12, atol=1e-12)  # no weight: the base
    np.testing.assert_allclose(drawn[1].kl, 0, atol=1e-12)
    assert float(drawn[2].kl.sum()) > 0.1


def test_genarm_A15_gradients_reach_weights_adapters_and_base(separate):
    """The stacked form has the gradient of the separate models in the weights, and one in every leaf."""
    fused, params, tilt, tilt_params = separate
    prompts = padded(PROMPTS)

    def total(policy, values):
        return decoding.log_prob(policy, values, RNG, prompts, RESPONSES, LENGTHS).log_prob.sum()

    found = jax.grad(lambda values: total(fused, values))(params)

    def by_weights(weights):
        return total(tilt, tilt_params | {"critic": tilt_params["critic"] | {"weights": weights}})

    np.testing.assert_allclose(
        found["weights"], jax.grad(by_weights)(tilt_params["critic"]["weights"]), rtol=1e-7, atol=1e-9
    )
    for leaf in jax.tree.leaves(found):
        assert bool(jnp.isfinite(leaf).all())
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found["adapters"]))


def test_genarm_A15_each_adapter_reads_its_own_template(separate):
    fused, params, tilt, tilt_params = separate
    prompts = padded(PROMPTS)
    one, other = padded([[6, *row] for row in PROMPTS], side="right"), padded([[9, 9, *row, 2] for row in PROMPTS])
    scored = decoding.log_prob(fused, params, RNG, {"policy": prompts, "adapters": [one, other]}, RESPONSES, LENGTHS)
    mirrored = {"policy": prompts, "critic": {"critics": [one, other]}}
    assert_same(scored, decoding.log_prob(tilt, tilt_params, RNG, mirrored, RESPONSES, LENGTHS))


def test_genarm_A15_a_step_reads_each_weight_once(separate):
    """Products with a weight matrix in the step's program: one each where the separate models need three."""
    fused, params, tilt, tilt_params = separate
    leaves = [leaf for leaf in jax.tree.leaves(params["policy"]) if leaf.ndim > 1]
    kernels = {(leaf.shape[0], leaf.size // leaf.shape[0]) for leaf in leaves}  # as the products take them
    token = jnp.zeros(len(PROMPTS), jnp.int32)

    def products(policy, values) -> int:
        state, _ = jax.eval_shape(lambda v: policy.init(v, RNG, padded(PROMPTS), 3), values)
        program = jax.make_jaxpr(policy.step)(values, RNG, state, token)
        return count_products(program.jaxpr, kernels)

    assert products(fused, params) == 5  # qkv, out, gate_up, down of one layer, and lm_head
    assert products(tilt, tilt_params) == 15


def count_products(program, shapes) -> int:
    total = 0
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            total += equation.invars[1].aval.shape in shapes
        for inner in (getattr(value, "jaxpr", value) for value in equation.params.values()):
            total += count_products(inner, shapes) if hasattr(inner, "eqns") else 0
    return total


def test_genarm_A15_what_does_not_fit_is_named(separate):
    fused, params, _, _ = separate
    lm = cases.tiny_lm(0, dtype="float64")[0]
    with pytest.raises(ValueError, match="m: expected at least 1 adapter, found 0"):
        policies.adapters(lm, 0)
    with pytest.raises(ValueError, match="expected a language model"):
        policies.adapters(tiny_lm(0, "reward")[0], 1)

    def run(changes, policy=fused, prompts=None):
        given = padded(PROMPTS) if prompts is None else prompts
        return decoding.sample(policy, params | changes, RNG, given, max_new_tokens=1, eos_ids=EOS)

    for changes, match in (
        ({"weights": jnp.ones(3)}, r"weights: expected shape \(2,\) or \(5, 2\), .* found \(3,\)"),
        ({"weights": jnp.array([1.0, jnp.nan])}, "weights: expected finite numbers"),
        (
            {"adapters": jax.tree.map(lambda x: x[:1], params["adapters"])},
            r"layer_0/attention/out/a: expected shape \(2, ",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            run(changes)
    with pytest.raises(ValueError, match="'adapters'"):
        run({}, prompts={"policy": padded(PROMPTS)})
    with pytest.raises(ValueError, match=r"prompts\['adapters'\]\[1\]: expected token ids"):
        run({}, prompts={"policy": padded(PROMPTS), "adapters": [padded(PROMPTS), padded([[99]] * 5)]})
