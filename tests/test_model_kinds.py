"""A folder of another kind than the place asks for is refused by role and folder: a classifier, a value or a Q model
where a language model is expected, with tied embeddings too, and a language model where a reward model is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from eval import decode
from jaxalign import critics, models, policies, rewards, text, tokens
from jaxalign.rewards import folders as reward_folders
from jaxalign.training import job, rl, rollouts, states
from jaxalign.training.options import ModelOptions
from jaxalign.training.rl_options import RLOptions
from tests.conftest import tiny_lm
from tests.test_eval_decode import tokenizer

KINDS = ("reward", "value", "q")
FOUND = {"reward": "a sequence classifier", "value": "a model with a value head", "q": "a model with a q head"}


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def root(request, tmp_path_factory):
    """One folder for each kind, "base" of none."""
    found = tmp_path_factory.mktemp("kinds")
    for seed, head in enumerate((None, *KINDS)):
        made = tiny_lm(seed, head, num_layers=1, tie_embeddings=request.param)
        models.save(found / (head or "base"), *made, tokenizer=tokenizer())
    (found / "prompts.txt").write_text("the cat\na dog\n")
    return found


def start(folder, head):
    return job.start(ModelOptions(model=str(folder)), head, seed=0, dtype="float32", max_length=32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_to_train_as_a_language_model_is_one(root, kind):
    match = rf"model: expected a language model, found {FOUND[kind]} .*{kind}"
    with pytest.raises(ValueError, match=match):
        start(root / kind, lambda _: None)
    for algorithm in ("rloo", "grpo", "ppo"):
        with pytest.raises(ValueError, match=match):
            start(root / kind, rl.head_of(RLOptions(algorithm=algorithm), str(root / kind)))


def test_a_model_of_another_kind_may_begin_from_a_language_model(root):
    for head in (models.Head("reward"), models.Head("value", hidden_size=8), models.Head("q", hidden_size=8)):
        assert start(root / "base", lambda _, head=head: head).lm.config.head == head
    ppo = RLOptions(algorithm="ppo")
    assert start(root / "base", rl.head_of(ppo, "base")).lm.config.head == models.Head("value", hidden_size=64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_makes_roll_outs_is_a_language_model(root, kind):
    with pytest.raises(ValueError, match=rf"base: expected a language model, found {FOUND[kind]} .*{kind}"):
        rollouts.load_base(str(root / kind), tokenizer(), dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_refuses_another_kind_as_base_and_as_policy(root, kind, tmp_path):
    common = ["--prompts", str(root / "prompts.txt"), "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    with pytest.raises(ValueError, match=rf"model: expected a language model, found {FOUND[kind]} .*{kind}"):
        decode.main(["--model", str(root / kind), *common])
    for method in ("policy", "genarm"):
        strength = "" if method == "policy" else "@1"
        with pytest.raises(ValueError, match=rf"{method}.*: expected a language model, found {FOUND[kind]} .*{kind}"):
            decode.main(["--model", str(root / "base"), *common, "--method", f"{method}:{root / kind}{strength}"])
    assert not (tmp_path / "out").exists()


def test_a_classifier_has_no_logits_whatever_its_embeddings(root):
    lm, params = models.load(root / "reward")
    assert not lm.has_lm_head
    assert lm.apply(params, jnp.ones((1, 3), jnp.int32)).logits is None
    hidden = jnp.zeros((1, lm.config.hidden_size))
    match = "expected a language model, found a sequence classifier"
    for call in (
        lambda: policies.language_model(lm),
        lambda: critics.genarm(lm),
        lambda: rewards.log_likelihood(lm),
        lambda: text.generate(lm, params, tokenizer(), ["the cat"], max_new_tokens=2),
        lambda: lm.logits(params, hidden),
        lambda: states.replace_head(lm, params, None, jax.random.key(0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("kind", ["base", "q"])
def test_a_reward_model_has_a_scalar_head(root, kind):
    lm, _ = models.load(root / kind)
    match = "expected a model with a scalar head"
    with pytest.raises(ValueError, match=match):
        rewards.from_model(lm)
    with pytest.raises(ValueError, match=match):
        critics.args(lm)
    reader = rewards.Reader(tokens.text_format(tokenizer(), eos_ids=lm.eos_ids), lm, ["the cat"])
    opened = functools.partial(rewards.open_reward, reader, str(root / kind), dtype="float32", name="gold")
    with pytest.raises(ValueError, match=rf"gold: {match}, found .* in .*{kind}"):
        opened()
    if kind == "base":
        with pytest.raises(ValueError, match=rf"gold: {match}, found None in .*base"):
            reward_folders.own_texts(reader, str(root / kind), name="gold")


def test_a_head_of_log_weights_is_no_reward():
    follower = models.Follower("exceedance", beta=1.0, bound=2.0)
    lm = models.with_head(tiny_lm(0)[0], models.Head("value", follower=follower))
    with pytest.raises(ValueError, match="expected a head of rewards, found one of log weights"):
        rewards.from_model(lm)


def test_a_classifier_with_tied_embeddings_may_have_several_labels(tmp_path):
    lm = models.with_head(tiny_lm(0, tie_embeddings=True)[0], models.Head("reward", num_labels=2))
    models.save(tmp_path / "two", lm, lm.init(jax.random.key(0)), tokenizer=tokenizer())
    base = tiny_lm(1)[0]
    reader = rewards.Reader(tokens.text_format(tokenizer(), eos_ids=base.eos_ids), base, ["the cat"])
    with pytest.raises(ValueError, match="label: expected one of 'LABEL_0', 'LABEL_1'"):
        rewards.open_reward(reader, str(tmp_path / "two"), dtype="float32")
    rewards.open_reward(reader, str(tmp_path / "two"), label="LABEL_1", dtype="float32")
