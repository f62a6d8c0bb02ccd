"""A toy for GGRO: a Markov policy with a reward that is linear in one-hot tokens, and the plain algorithm."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import decoding, mdp
from jaxalign.types import Policy, StepOutput
from tests.conftest import EOS, padded

V, T, WIDTH = 6, 14, 5
RNG = jax.random.key(0)
INF = float("inf")
GREEDY = jnp.asarray(0.0)


def _markov() -> Policy:
    """Logits [V,V,V] given the last two tokens, the prompt's included."""

    def output(table, state):
        log_prob = jax.nn.log_softmax(table[state["two"][:, 0], state["two"][:, 1]])
        return StepOutput(log_prob, log_prob, jnp.zeros(log_prob.shape[:1], log_prob.dtype))

    def init(params, rng, prompts, max_new_tokens):
        tokens, mask = mdp.compact(prompts.tokens, prompts.mask)
        last = mdp.last_index(mask)
        two = jnp.take_along_axis(tokens, jnp.stack([last - 1, last], axis=1), axis=1)
        return {"two": two}, output(params, {"two": two})

    def step(params, rng, state, token):
        moved = jnp.stack([state["two"][:, 1], token], axis=1)
        state = {"two": jnp.where((token < 0)[:, None], state["two"], moved)}
        return state, output(params, state)

    return Policy(init, step, None, None, V)


def _one_hot_reward(params, one_hot, response):
    """v·tanh(Σ_i W e_i/√T) + Σ_i e_i·G·e_{i+1}/T + c·length over the response's one-hot rows [N,L,V]."""
    e = jnp.where(response[..., None], one_hot @ params["embedding"], 0)
    smooth = jnp.tanh(jnp.einsum("nld,de->ne", e, params["W"]) / math.sqrt(T)) @ params["v"]
    pairs = jnp.einsum("nld,de,nle->n", e[:, :-1], params["G"], e[:, 1:]) / T
    return smooth + pairs + params["c"] * jnp.where(response[..., None], one_hot, 0).sum(axis=(1, 2))


def _reward(params, tokens, mask, prompt_length, index):
    return _one_hot_reward(params, jax.nn.one_hot(tokens, V), mdp.response_part(mask, prompt_length))


def _gradient(params, tokens, mask, prompt_length, position, candidates):
    """The one-hot gradient at the position: the definition, with its [N,L,V]."""
    response = mdp.response_part(mask, prompt_length)
    one_hot = jax.nn.one_hot(tokens, V)
    gradient = jax.grad(lambda x: _one_hot_reward(params, x, response).sum())(one_hot)
    return jnp.take_along_axis(gradient[jnp.arange(len(tokens)), position], candidates, axis=1)


MARKOV = _markov()


def toy(seed: int = 0):
    """Params of the toy; a third of the contexts is uncertain."""
    keys = iter(jax.random.split(jax.random.key(seed), 7))
    scale = jnp.where(jax.random.uniform(next(keys), (V, V, 1)) < 0.5, 0.6, 3.5)
    reward = {
        "embedding": jax.random.normal(next(keys), (V, WIDTH)),
        "W": jax.random.normal(next(keys), (WIDTH, WIDTH)),
        "G": jax.random.normal(next(keys), (WIDTH, WIDTH)),
        "v": jax.random.normal(next(keys), (WIDTH,)),
        "c": jnp.asarray(0.0),
    }
    return {"policy": scale * jax.random.normal(next(keys), (V, V, V)), "reward": reward}


PROMPTS = padded([[a, b] if a != b else [3, a, b] for a in range(1, 4) for b in range(1, 5)])
B = PROMPTS.tokens.shape[0]


def guided(params, *, prompts=PROMPTS, candidates=4, threshold=1.0, eos_ids=EOS, **options):
    options = {"top_k": 5, "max_new_tokens": T} | options
    return decoding.ggro(
        MARKOV,
        _reward,
        _gradient,
        params | {"entropy_threshold": threshold},
        RNG,
        prompts,
        num_samples=candidates,
        eos_ids=eos_ids,
        **options,
    )


def greedy(params, prompts=PROMPTS):
    return decoding.sample(MARKOV, params["policy"], RNG, prompts, max_new_tokens=T, eos_ids=EOS, temperature=GREEDY)


def assert_completions_equal(left, right):
    for name in ("tokens", "mask", "finished", "truncated"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), rtol=1e-5, atol=1e-5, err_msg=name)


def prompt_tokens(b: int) -> list[int]:
    return np.asarray(PROMPTS.tokens[b])[np.asarray(PROMPTS.mask[b])].tolist()


class Plain:
    """The algorithm for one prompt in plain Python: candidates are generated whole, the
    uncertain token is dropped, and a repeat is found by comparing candidates."""

    def __init__(self, params, prompt, *, candidates, threshold, rule="difference", k=5, eos=EOS):
        table = np.asarray(params["policy"], np.float64)
        self.log_prob = table - np.log(np.exp(table).sum(-1, keepdims=True))
        self.params, self.prompt, self.eos, self.k, self.rule = params["reward"], prompt, eos, k, rule
        self.candidates, self.threshold = candidates, threshold
        self.scored, self.forced, self.segments = 0, 0, []

    def padded(self, tokens):
        row = np.zeros((1, len(self.prompt) + T), np.int32)
        row[0, : len(tokens)] = tokens
        return jnp.asarray(row), jnp.arange(row.shape[1])[None] < len(tokens), jnp.array([len(self.prompt)])

    def reward(self, tokens):
        return float(_JIT_REWARD(self.params, *self.padded(tokens)))

    def gain(self, tokens, position, choices):
        found = _JIT_GAIN(self.params, *self.padded(tokens), jnp.array([position]), jnp.asarray([choices]))
        return np.asarray(found[0])

    def next(self, tokens):
        return self.log_prob[tokens[-2], tokens[-1]]

    def segment(self, prefix, forced):
        tokens = list(prefix)
        while True:
            row = self.next(tokens)
            uncertain = -(np.exp(row) * row).sum() >= self.threshold
            token = forced if forced is not None and len(tokens) == len(prefix) else int(row.argmax())
            tokens.append(token)
            if token in self.eos or len(tokens) == len(self.prompt) + T:
                return tokens, True
            if len(tokens) - len(prefix) >= 4 and uncertain:
                return tokens[:-1], False

    def run(self):
        prefix, done = list(self.prompt), False
        while not done:
            choices = np.argsort(-self.next(prefix), kind="stable")[: self.k]
            forced, seen, best = None, [], (-INF, None, None, None)
            for i in range(self.candidates):
                found, ended = self.segment(prefix, forced)
                if found in seen:
                    break
                seen.append(found)
                value = self.reward(found)
                self.scored += 1
                if value > best[0]:
                    best = value, found, ended, i
                g = self.gain(found, len(prefix), choices)
                current = choices.tolist().index(found[len(prefix)])
                score = g - g[current] if self.rule == "difference" else np.where(np.arange(len(g)) == current, 0, g)
                forced = int(choices[score.argmax()])
            self.forced += best[3] > 0
            self.segments.append((list(prefix), seen, best))
            prefix, done = best[1], best[2]
        return prefix[len(self.prompt) :]


_JIT_REWARD = jax.jit(lambda params, *row: _reward(params, *row, None)[0])
_JIT_GAIN = jax.jit(_gradient)
