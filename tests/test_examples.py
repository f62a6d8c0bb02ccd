"""The programs of examples/: each runs alone, is short, says in its first line what it shows, and its results are
right."""

from __future__ import annotations

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import decoding, policies, prompt_batch, rewards, testing
from tests.conftest import alone

ROOT = pathlib.Path(__file__).parent.parent
HERE = pathlib.Path(__file__).read_text()
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


@pytest.mark.parametrize("path", [path for path in FILES if f'run("{path.stem}")' not in HERE], ids=lambda p: p.stem)
def test_an_example_without_a_test_of_its_own_runs(path):
    run(path.stem)


def test_gradient_through_shaping():
    """The threshold is the utility that it delivers; its derivative by the utilities is the follower's policy."""
    names = run("gradient_through_shaping")
    np.testing.assert_allclose(names["value"], names["threshold"], rtol=1e-5)
    gradient = jax.grad(lambda u: names["delivered"](names["logits"], u)[1])(names["utility"])
    weight = jax.nn.softmax(names["logits"]) * jnp.where(names["utility"] > names["threshold"], jnp.exp(3.0), 1.0)
    np.testing.assert_allclose(gradient, weight / weight.sum(), rtol=1e-4)


def test_compose_policies():
    """The reward of the kept response is the largest, and is the reward model's."""
    names = run("compose_policies")
    best, reward = names["best"], names["reward"]
    whole = decoding.join(names["prompts"], best.completions)
    again = rewards.from_model(reward)(names["reward_params"], *whole, jnp.arange(2))
    np.testing.assert_allclose(again, best.info.reward.max(axis=1), rtol=1e-4, atol=1e-5)
    assert best.info.samples.tokens.shape == (2, 4, 12)


def test_own_critic():
    """A large beta is the base; a small one ends sooner; the critic keeps the laws."""
    names = run("own_critic")
    prompts = prompt_batch([[1, 2], [3], [2, 3, 1]])
    testing.check_critic(names["critic"], None, prompts, vocab_size=4)
    assert names["length"][1] < names["length"][0] - 0.5


def test_own_text_reward():
    names = run("own_text_reward")
    best, tokenizer = names["best"], names["tokenizer"]
    tokens, mask = np.asarray(best.info.samples.tokens), np.asarray(best.info.samples.mask)
    for b in range(2):
        texts = [tokenizer.decode(tokens[b, j][mask[b, j]], skip_special_tokens=True) for j in range(8)]
        assert best.info.reward[b].tolist() == names["variety"]([], texts)


def test_own_decoder():
    """Both halves are drawn, the better second half is kept, and two halves are one draw of the policy."""
    names = run("own_decoder")
    assert names["found"].shape == (5, 6)
    assert ((names["found"] >= 0) & (names["found"] < 4)).all()
    _, output = names["policy"].init(names["table"], None, names["prompts"], 6)
    many = jax.vmap(lambda key: names["better_of_two"](names["table"], key))(jax.random.split(jax.random.key(2), 1000))
    twos = (many.reshape(-1, 6) == 2).mean(axis=0)
    first = jnp.exp(output.log_prob[0, 2])
    assert abs(twos[0] - first) < 4 * jnp.sqrt(first * (1 - first) / 5000)  # 6e-5
    assert twos[3:].mean() > 0


def test_own_model():
    """Each token has the probability of the product of both tables."""
    names = run("own_model")
    drawn, base, guide = names["drawn"], names["base"], names["guide"]
    for b, last in enumerate((4, 5)):
        for t in range(int(drawn.mask[b].sum())):
            law = jax.nn.log_softmax(jax.nn.log_softmax(base[last]) + jax.nn.log_softmax(guide[last]) / 2)
            last = int(drawn.tokens[b, t])
            np.testing.assert_allclose(drawn.log_prob[b, t], law[last], rtol=1e-4, atol=1e-5)


def test_train_by_hand():
    """The loss starts at log 2, where the model is its reference, and falls."""
    names = run("train_by_hand")
    start = names["loss"](names["reference"])
    np.testing.assert_allclose(start, np.log(2), rtol=1e-6)
    assert names["loss"](names["params"]) < names["value"] < start


def test_beta_per_prompt():
    """The KL falls as beta rises, and a prompt's response does not depend on the other prompts' betas."""
    names = run("beta_per_prompt")
    kl = names["drawn"].kl.sum(axis=1)
    np.testing.assert_allclose(kl[3], 0, atol=1e-5)
    assert kl[0] > 0.01
    params = names["params"]._replace(beta=jnp.array([0.1, 3.0, 3.0, 1.0]))
    again = decoding.sample(names["policy"], params, jax.random.key(2), names["prompts"], max_new_tokens=12)
    np.testing.assert_array_equal(again.tokens[0], names["drawn"].tokens[0])
    assert (again.log_prob[1:3] != names["drawn"].log_prob[1:3]).any()


def test_reward_of_texts():
    names = run("reward_of_texts")
    alone = names["total"](names["params"]._replace(weights=jnp.array([0.0, 0.5])), *names["whole"], jnp.arange(3))
    np.testing.assert_allclose(alone, [0, 0.5, 0.5], atol=1e-6)
    assert np.isfinite(np.asarray(names["found"])).all()


def test_generate_text(capsys):
    """The pieces that were streamed add up to the texts, which have the probability that the policy gives them."""
    names = run("generate_text")
    printed = [line.partition(" ")[::2] for line in capsys.readouterr().out.splitlines()[:-1]]
    for row, text in enumerate(names["out"].texts):
        assert "".join(piece for number, piece in printed if number == str(row)) == text
    assert (names["out"].completions.kl.sum(axis=1) > 0).all()


def test_evaluate_own_method(tmp_path, monkeypatch):
    """A row per method and strength; best-of-4 is ahead of the base; two tokens cost more KL than eight."""
    monkeypatch.chdir(tmp_path)
    rows = {(row["method"], row["beta"]): row for row in run("evaluate_own_method")["rows"]}
    assert len(rows) == 4
    by_name = {f"{method}@{beta}": row for (method, beta), row in rows.items()}
    wide, narrow = (next(row for name, row in by_name.items() if name.startswith("__main__:top@" + k)) for k in "82")
    assert narrow["kl"] > wide["kl"] > 0
    assert (tmp_path / "runs/own/run/results.json").exists()


def test_blockwise_on_dpo():
    """The log-probabilities are those of the two models; the KL is that of the draws and the bound of the choices."""
    names = run("blockwise_on_dpo")
    drawn, prompts, policy = names["drawn"], names["prompts"], policies.language_model(names["lm"])
    for params, expected in ((names["dpo"], drawn.log_prob), (names["reference"], drawn.log_prob_ref)):
        own = decoding.log_prob(policy, params, jax.random.key(0), prompts, drawn.tokens, drawn.mask)
        np.testing.assert_allclose(expected, own.log_prob, rtol=1e-4, atol=1e-4)
    blocks = np.ceil(np.asarray(drawn.mask).sum(1) / 2)
    ratio = np.asarray((drawn.log_prob - drawn.log_prob_ref).sum(1))
    np.testing.assert_allclose(names["kl"], ratio + blocks * (np.log(3) - 2 / 3), rtol=1e-5)


def test_gradient_into_reward_model():
    """The step raises the likelihood by its rate times the squared gradient."""
    names = run("gradient_into_reward_model")
    squared = sum(float((g**2).sum()) for g in jax.tree.leaves(names["gradient"]))
    assert names["after"] > names["before"]
    np.testing.assert_allclose(names["after"] - names["before"], names["rate"] * squared, rtol=0.2)


def test_own_policy():
    """Each step is the table's row plus half the guide's log-probabilities, normalised."""
    names = run("own_policy")
    drawn, arm, params = names["drawn"], names["arm"], names["params"]
    for b, prompt in enumerate(names["texts"]):
        text = list(prompt)
        for t in range(int(drawn.mask[b].sum())):
            logits = alone(arm, params.critic, text).logits[-1]
            row = jax.nn.log_softmax(names["table"][text[-1]])
            expected = jax.nn.log_softmax(row + jax.nn.log_softmax(logits) / 2)
            text.append(int(drawn.tokens[b, t]))
            np.testing.assert_allclose(drawn.log_prob[b, t], expected[text[-1]], rtol=1e-4, atol=1e-4)


def test_there_are_fifteen():
    assert len(FILES) == 15
