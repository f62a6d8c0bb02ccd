"""A program of the user's that fails says so in one ValueError, wherever the library runs it."""

from __future__ import annotations

import functools
import os
import signal
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import Policy, commands, decoding, rewards, testing, text, tree
from jaxalign.data.tokenizers import word_level
from jaxalign.training import policy_gradient

PROCESS = tree.Tree(vocab_size=4, horizon=3)
BASE, PROMPTS = tree.policy(PROCESS), tree.prompts(2)
LIMITS = {"max_new_tokens": 2, "eos_ids": (0,)}


def dividing(prompts, responses):
    return [1 / (len(text) - len(text)) for text in responses]  # the line that fails


def short(prompts, responses):
    return [1.0] * (len(responses) - 1)


def words(prompts, responses):
    return ["good"] * len(responses)


def nothing(prompts, responses):
    return None


class Judge:
    def __call__(self, prompts, responses):
        raise KeyError("tone")


def arrays(tokens, mask, prompt_length, index):
    raise KeyError("tone")


def line_of(function):
    return function.__code__.co_firstlineno


HERE = __file__
FAULTS = {
    "raises": (
        dividing,
        f"dividing: expected one real number.*ZeroDivisionError: .*{HERE}, line {line_of(dividing) + 1}",
    ),
    "length": (short, rf"short: expected one real number.*found shape .*{HERE}, line {line_of(short)}"),
    "strings": (words, rf"words: expected one real number.*found shape .*{HERE}, line {line_of(words)}"),
    "none": (nothing, rf"nothing: expected one real number.*found NoneType .*{HERE}, line {line_of(nothing)}"),
    "object": (Judge(), rf"Judge: expected one real number.*found KeyError: 'tone' .*{HERE}, line"),
    "partial": (functools.partial(dividing), rf"dividing: .*{HERE}, line {line_of(dividing) + 1}"),
}


def decode(ids):
    return " ".join(map(str, ids))


def failure(call) -> ValueError:
    """The one error of a call: no error of JAX's is shown with it."""
    with pytest.raises(ValueError, match=": expected") as found:
        jax.block_until_ready(call())
    error = found.value
    assert "Jax" not in "".join(traceback.format_exception(error)), "JAX's own error is shown"
    assert len(str(error).splitlines()) == 1
    return error


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_that_fails_is_named_by_a_decoder(fault, caplog):
    f, match = FAULTS[fault]
    params = {"policy": tree.random(jax.random.key(0), PROCESS)[0]}
    error = failure(
        lambda: decoding.best_of_n(
            BASE, f, params, jax.random.key(1), PROMPTS, num_samples=2, tokenizer=decode, **LIMITS
        )
    )
    with pytest.raises(ValueError, match=match):
        raise error
    assert not caplog.records  # nor logged by JAX


CALLS = {
    "call": lambda reward, table: reward(None, *TEXTS),
    "compiled": lambda reward, table: decoding.rejection(
        BASE, reward, {"policy": table, "reward": None, "beta": 1.0, "bound": 1.0}, jax.random.key(1), PROMPTS,
        max_tries=2, **LIMITS,
    ),
    "smc": lambda reward, table: decoding.smc(
        BASE, reward, {"policy": table, "reward": None, "beta": 1.0}, jax.random.key(1), PROMPTS, num_particles=2,
        **LIMITS,
    ),
    "sum": lambda reward, table: decoding.quest(
        BASE, rewards.weighted_sum([reward]), {"policy": table, "reward": {"rewards": [None], "weights": [1.0]},
        "beta": 1.0}, jax.random.key(1), PROMPTS, num_steps=2, **LIMITS,
    ),
    "collect": lambda reward, table: policy_gradient.collect(
        BASE, reward, {"policy": table, "reward": None}, jax.random.key(1), PROMPTS, samples=2, **LIMITS
    ),
    "laws": lambda reward, table: testing.check_reward(reward, None, PROMPTS, vocab_size=4),
}  # fmt: skip
TEXTS = (jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool), jnp.ones(2, jnp.int32), jnp.arange(2))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("f", [rewards.from_text(decode, dividing), rewards.from_numpy(arrays)], ids=["text", "numpy"])
def test_every_function_that_runs_a_program_names_it(call, f):
    table = tree.random(jax.random.key(0), PROCESS)[0]
    error = failure(lambda: CALLS[call](f, table))
    assert "expected one real number per text" in str(error)
    assert HERE in str(error)


def test_a_decode_function_that_fails_is_named():
    def broken(ids):
        return ids.missing

    error = failure(lambda: rewards.from_text(broken, words)(None, *TEXTS))
    assert "broken: expected a text of token ids, found AttributeError" in str(error)


def test_a_score_of_texts_and_a_program_under_ones_own_jit():
    tokenizer = word_level(["a", "b"])
    error = failure(lambda: text.score(dividing, None, tokenizer, ["a"], ["b"]))
    assert "dividing" in str(error)
    assert HERE in str(error)
    with pytest.raises(jax.errors.JaxRuntimeError, match="dividing: expected one real number per text"):
        jax.block_until_ready(jax.jit(rewards.from_text(decode, dividing))(None, *TEXTS))


def test_a_failure_that_is_no_programs_stays_as_it_is():
    """An error of JAX's own is not taken for that of a program that failed before."""
    failure(lambda: rewards.from_text(decode, dividing)(None, *TEXTS))

    def broken(params, rng, prompts, max_new_tokens):
        state, output = BASE.init(params, rng, prompts, max_new_tokens)
        jax.debug.callback(lambda: 1 / 0)
        return state, output

    policy = Policy(broken, BASE.step, vocab_size=4)
    table = tree.random(jax.random.key(0), PROCESS)[0]
    with pytest.raises(jax.errors.JaxRuntimeError, match="division by zero"):  # noqa: PT012  # where it is depends
        jax.block_until_ready(decoding.sample(policy, table, jax.random.key(1), PROMPTS, **LIMITS))
        jax.effects_barrier()


def stopped_by(number):
    def program(prompts, responses):
        os.kill(os.getpid(), number)
        time.sleep(5)
        return [0.0] * len(responses)

    return program


READ = {
    "decoder": lambda reward, table: CALLS["smc"](reward, table),
    "own jit": lambda reward, table: jax.block_until_ready(jax.jit(reward)(None, *TEXTS)),
    "numpy": lambda reward, table: np.asarray(jax.jit(reward)(None, *TEXTS)),
}


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize("read", READ)
def test_a_signal_while_a_program_runs_inside_a_compiled_one_ends_a_job_as_ever(read, number, capsys, caplog):
    """There JAX makes an error of its own of what the signal raises, and logs a traceback."""
    table = tree.random(jax.random.key(0), PROCESS)[0]
    reward = rewards.from_text(decode, stopped_by(number))
    with pytest.raises(SystemExit) as found:
        commands.execute(lambda _: READ[read](reward, table), [])
    assert found.value.code == 128 + number
    name = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert capsys.readouterr().err == f"{name}; the same command goes on from what is saved\n"
    assert not caplog.records


@pytest.mark.usefixtures("default_signals")
def test_ctrl_c_while_a_program_runs_inside_a_decoder_is_a_keyboard_interrupt(caplog):
    table = tree.random(jax.random.key(0), PROCESS)[0]
    with pytest.raises(KeyboardInterrupt):
        CALLS["smc"](rewards.from_text(decode, stopped_by(signal.SIGINT)), table)
    assert not caplog.records


@pytest.mark.parametrize("read", ["own jit", "numpy"])
def test_a_job_tells_a_programs_failure_however_its_result_is_read(read, capsys):
    """numpy's read gives a ValueError with JAX's words, the wait for a result an error of JAX's."""
    reward = rewards.from_text(decode, dividing)
    with pytest.raises(SystemExit) as found:
        commands.execute(lambda _: READ[read](reward, None), [])
    assert found.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {__name__}.dividing: expected one real number per text")
    assert len(told.splitlines()) == 1
