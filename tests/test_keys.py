"""Random keys: every public function that takes one refuses a seed by name, and raw key data serves as a typed key."""

from __future__ import annotations

import importlib
import inspect
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxalign
from jaxalign import bilevel, decoding, infalign, models, policies, prompts, rollout, testing, text, tree
from jaxalign._checks import check_rng
from jaxalign.data import tokenizers
from jaxalign.decoding import resampling
from jaxalign.evaluation import engine
from jaxalign.training import policy_gradient, states
from tests import cases
from tests.conftest import EOS, tiny_lm

TABLE, BATCH = cases.table(0), prompts.prompt_batch([[1, 2], [3], [4, 5, 6]])
BASE, REWARD = tree.policy(cases.TREE), tree.reward(cases.TREE)
BOTH = {"policy": TABLE, "reward": jnp.linspace(0, 1, cases.TREE.num_responses)}
SHARED = {"max_new_tokens": 3, "eos_ids": EOS}
LM, PARAMS = tiny_lm(0, "reward", num_layers=1)
LAW = jnp.log(jnp.array([0.25, 0.75]))


def constant_reward(params, tokens, mask, prompt_length, index):
    return jnp.zeros(prompt_length.shape)


def token_scores(params, tokens, mask, prompt_length, position, candidates):
    return candidates.astype(jnp.float32)


def decode(function, *parts, params=(), **keywords):
    """rng -> what a decoder of the toy gives."""
    return lambda rng: function(BASE, *parts, BOTH | dict(params), rng, BATCH, **keywords, **SHARED)


def score(rng):
    tokens = jnp.ones((3, 2), jnp.int32)
    return decoding.log_prob(BASE, TABLE, rng, BATCH, tokens, jnp.ones_like(tokens, bool))


def margins(rng):
    tokens = jnp.ones((3, 2), jnp.int32)
    return decoding.draw_margins(BASE, TABLE, rng, BATCH, tokens, jnp.ones_like(tokens, bool))


def blocks(function, **keywords):
    params, critic = {"policy": TABLE, "critic": cases.table(5)}, tree.critic(cases.TREE, "level")
    return lambda rng: function(BASE, critic, params, rng, BATCH, num_samples=2, block_size=1, **keywords, **SHARED)


def roll(rng):
    start = BASE.init(TABLE, jax.random.key(0), BATCH, 3)
    return rollout.rollout(BASE, TABLE, rng, *start, steps=2, eos_ids=EOS).completions


def texts(function, *responses, **keywords):
    words = tokenizers.word_level(["a", "b"])
    lm, params = tiny_lm(0, num_layers=1, vocab_size=len(words), eos_ids=(words.eos_token_id,))
    model = lm if function is text.generate else policies.language_model(lm)
    return lambda rng: function(model, params, words, ["a b"], *responses, rng=rng, **keywords)


def win_rate(rng):
    rule, rank = infalign.keep_best(jnp.arange(2.0)), jnp.arange(2)
    return infalign.sampled_win_rate(rng, log_prob=LAW, log_base=LAW, rank=rank, rule=rule, n=2, pairs=5)


def deal(rng):
    rows = {"mask": jnp.ones((4, 2), bool), "row": jnp.arange(4)}
    return policy_gradient.split(rows, rng, minibatches=2, accumulate=1)


THRESHOLDS = {"beta": 1.0, "reward_threshold": 0.0, "entropy_threshold": 0.5}
CALLS = {
    "bilevel.leader_gradient": lambda rng: bilevel.leader_gradient(
        BASE, constant_reward, {"follower": TABLE}, rng, BATCH, wrt="", estimator="score", samples=2, **SHARED
    ),
    "decoding.sample": lambda rng: decoding.sample(BASE, TABLE, rng, BATCH, **SHARED),
    "decoding.log_prob": score,
    "decoding.draw_margins": margins,
    "decoding.best_of_n": decode(decoding.best_of_n, REWARD, num_samples=2),
    "decoding.beam": blocks(decoding.beam, width=1),
    "decoding.blockwise": blocks(decoding.blockwise),
    "decoding.cards": decode(decoding.cards, constant_reward, params=THRESHOLDS, max_tries=2),
    "decoding.first_above": decode(decoding.first_above, REWARD, params={"reward_threshold": 0.5}, max_tries=2),
    "decoding.ggro": decode(
        decoding.ggro, constant_reward, token_scores, params={"entropy_threshold": 0.5}, num_samples=2, top_k=2
    ),
    "decoding.power": lambda rng: decoding.power(BASE, TABLE, rng, BATCH, alpha=2.0, num_steps=1, **SHARED),
    "decoding.quest": decode(decoding.quest, REWARD, params={"beta": 1.0}, num_steps=1),
    "decoding.rejection": decode(decoding.rejection, REWARD, params={"beta": 1.0, "bound": 1.0}, max_tries=2),
    "decoding.smc": decode(decoding.smc, REWARD, params={"beta": 1.0}, num_particles=2),
    "decoding.speculative": lambda rng: decoding.speculative(
        BASE, BASE, {"target": TABLE, "draft": TABLE}, rng, BATCH, draft_tokens=2, **SHARED
    ),
    "evaluation.engine.decode_batch": lambda rng: engine.decode_batch(
        engine.Method("base", None, lambda *_: None, lambda _: None, ""), rng, BATCH
    ),
    "infalign.sampled_win_rate": win_rate,
    "models.LanguageModel.init": lambda rng: LM.init(rng),
    "models.LanguageModel.init_head": lambda rng: LM.init_head(rng),
    "models.lora.init": lambda rng: models.lora.init(rng, LM, models.Lora(2, alpha=4.0)),
    "rollout.draw_rows": lambda rng: rollout.draw_rows(LAW[None], rng, jnp.zeros((1, 1), int)),
    "rollout.rollout": roll,
    "rollout.uniform_rows": lambda rng: rollout.uniform_rows(rng, jnp.zeros((1, 1), int), jnp.float32),
    "rollout.step_key": lambda rng: jax.random.uniform(rollout.step_key(rng, 3)),
    "testing.check_critic": lambda rng: testing.check_critic(
        tree.critic(cases.TREE, "level"), TABLE, BATCH, vocab_size=cases.TREE.vocab_size, rng=rng
    ),
    "testing.check_policy": lambda rng: testing.check_policy(BASE, TABLE, BATCH, rng=rng),
    "testing.check_reward": lambda rng: testing.check_reward(constant_reward, None, BATCH, vocab_size=5, rng=rng),
    "text.generate": texts(text.generate, max_new_tokens=2),
    "text.log_prob": texts(text.log_prob, ["b"]),
    "training.states.initial": lambda rng: states.initial(LM, rng, None),
    "training.states.replace_head": lambda rng: states.replace_head(
        LM, PARAMS, models.Head("reward", num_hidden=2), rng
    )[1]["head"],
    "training.policy_gradient.collect": lambda rng: policy_gradient.collect(
        BASE, REWARD, BOTH, rng, BATCH, samples=2, **SHARED
    ),
    "training.policy_gradient.split": deal,
    "tree.random": lambda rng: tree.random(rng, tree.Tree(3, 2, eos_id=0)),
}
PER_ROW = {
    f"decoding.resampling.{scheme.__name__}": lambda rng, scheme=scheme: scheme(rng, jnp.zeros((3, 4)))
    for scheme in (resampling.systematic, resampling.stratified, resampling.multinomial, resampling.residual)
}
ELSEWHERE = {
    "decoding.requests.check_request": "what every decoder begins with",
    "decoding.requests.open_request": "calls check_request",
    "models.projections.initial_kernel": "flax calls it",
    "training.rl_iteration.draw": "hands its key to policy_gradient.collect",
    "training.roll_in.draw": "folds a round into its key, for decoding.sample and best_of_n",
}


def functions_with_a_key() -> Iterator[str]:
    """The public functions and methods of jaxalign's public modules that have a parameter `rng`, by the shortest name
    that they are reached by."""
    root = pathlib.Path(jaxalign.__path__[0])
    files = [path.relative_to(root).with_suffix("").parts for path in root.rglob("*.py")]
    names = {".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in files} - {"", "__main__"}
    seen: set[int] = set()
    for name in sorted(names, key=lambda name: (name.count("."), name)):
        module = importlib.import_module(f"jaxalign.{name}")
        private = any(part.startswith("_") for part in name.split("."))
        for label, found in vars(module).items():
            inside = getattr(found, "__module__", None) or ""
            if label.startswith("_") or private or id(found) in seen or not inside.startswith("jaxalign"):
                continue
            if inside != module.__name__ and label not in getattr(module, "__all__", ()):
                continue
            seen.add(id(found))
            if inspect.isfunction(found) and "rng" in inspect.signature(found).parameters:
                yield f"{name}.{label}"
            if inspect.isclass(found) and not getattr(found, "_is_protocol", False):
                for method, body in vars(found).items():
                    if inspect.isfunction(body) and "rng" in inspect.signature(body).parameters:
                        yield f"{name}.{label}.{method}"


def test_every_function_that_takes_a_key_is_called_here():
    found = {name for name in functions_with_a_key() if not name.endswith("respond")}  # numpy's generators
    assert found == {*CALLS, *PER_ROW, *ELSEWHERE}


@pytest.mark.parametrize("name", CALLS)
def test_a_seed_in_the_place_of_a_key_is_named(name):
    with pytest.raises(ValueError, match=r"rng: expected a jax key as of jax\.random\.key\(0\), found 0"):
        CALLS[name](0)


@pytest.mark.parametrize("name", PER_ROW)
def test_a_resampling_scheme_names_what_it_takes(name):
    for wrong, found in ((0, "0"), (jax.random.key(0), r"an array of keys of shape \(\)")):
        with pytest.raises(ValueError, match=rf"rng: expected a jax key per row, \[B\], .* found {found}"):
            PER_ROW[name](wrong)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (None, "None"),
        (np.int64(3), r"an array of shape \(\) and dtype int64"),
        (jnp.asarray(3), r"an array of shape \(\) and dtype int"),
        (jnp.zeros(2, jnp.int32), r"an array of shape \(2,\) and dtype int32"),
        (jax.random.split(jax.random.key(0)), r"an array of keys of shape \(2,\)"),
        (BATCH, "a TokenBatch"),
        (np.random.default_rng(0), "a Generator"),
    ],
    ids=["none", "numpy", "scalar", "signed", "keys", "prompts", "generator"],
)
def test_what_is_no_key_is_described(wrong, found):
    with pytest.raises(ValueError, match=rf"rng: expected a jax key .* found {found}"):
        check_rng(wrong)


RANDOM = [name for name in CALLS if not name.startswith(("testing", "evaluation", "text"))]


@pytest.mark.parametrize("name", [*RANDOM, *PER_ROW])
def test_raw_key_data_draws_what_the_typed_key_draws(name):
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    if name in PER_ROW:
        typed, raw = jax.random.split(typed, 3), jax.random.split(raw, 3)
    left, right = ({**CALLS, **PER_ROW}[name](rng) for rng in (typed, raw))
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_traced_key_is_a_key():
    drawn = jax.jit(lambda rng: decoding.sample(BASE, TABLE, rng, BATCH, **SHARED).tokens)(jax.random.key(0))
    assert drawn.shape == (3, 3)
