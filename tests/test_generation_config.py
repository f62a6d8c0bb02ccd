"""generation_config.json by name: the distribution of transformers' warpers, refused fields, every method."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import decode
from jaxalign import critics, models, policies, text, tree
from jaxalign.policies import Sampling
from jaxalign.prompts import prompt_batch
from jaxalign.testing import check_policy
from tests.conftest import PROMPTS, tiny_lm
from tests.test_eval_decode import tokenizer

# Probabilities of transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper, one after the other,
# on these logits (transformers 5.14, torch 2.13).
LOGITS = jnp.array([2.0, 1.7, 1.2, 0.9, 0.3, -0.4, -1.0, -2.2])
WARPED = [
    ({"temperature": 0.6, "top_p": 0.9}, [0.49261, 0.29878, 0.12985, 0.07876, 0, 0, 0, 0]),
    ({"temperature": 0.6, "top_k": 3, "top_p": 0.9}, [0.53472, 0.32433, 0.14095, 0, 0, 0, 0, 0]),
    ({"temperature": 1.5, "top_k": 4, "top_p": 0.8}, [0.41574, 0.34038, 0.24389, 0, 0, 0, 0, 0]),
    ({"top_k": 5}, [0.36959, 0.2738, 0.16607, 0.12303, 0.06752, 0, 0, 0]),
    ({"temperature": 0.7, "top_k": 20, "top_p": 0.8}, [0.50753, 0.33062, 0.16185, 0, 0, 0, 0, 0]),
    ({"do_sample": False, "temperature": 0.7}, [1, 0, 0, 0, 0, 0, 0, 0]),
]


@pytest.mark.parametrize(("fields", "expected"), WARPED)
def test_the_next_token_is_that_of_transformers(fields, expected):
    policy = policies.with_sampling(
        tree.policy(tree.Tree(8, 1, eos_id=None)), policies.read_generation_config(json.dumps(fields))
    )
    output = policy.init(jax.nn.log_softmax(LOGITS)[None], jax.random.key(0), tree.prompts(1), 1)[1]
    np.testing.assert_allclose(jnp.exp(output.log_prob[0]), expected, atol=2e-5)


def test_it_is_a_policy_and_nothing_where_nothing_is_said():
    lm, params = tiny_lm(0, num_layers=1)
    base = policies.language_model(lm)
    assert policies.with_sampling(base, Sampling()) is base
    assert policies.read_generation_config("") == policies.read_generation_config({}) == Sampling()
    sampling = Sampling(0.7, 5, 0.9)
    assert policies.with_sampling(base, sampling) is policies.with_sampling(base, Sampling(0.7, 5, 0.9))
    check_policy(policies.with_sampling(base, sampling), params, prompt_batch(PROMPTS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": 1.1}, "expected repetition_penalty = 1, as no decoder here follows it, found 1.1"),
        ({"num_beams": 4}, "expected num_beams = 1"),
        ({"min_p": 0.05}, "expected min_p = 0"),
        ({"suppress_tokens": [1]}, r"expected fields that are supported, found 'suppress_tokens' = \[1\]"),
        ({"temperature": -1}, "expected a number >= 0 as temperature, found -1"),
        ({"temperature": "hot"}, "expected a number as temperature, found 'hot'"),
        ({"temperature": True}, "expected a number as temperature, found True"),
        ({"top_k": 2.5}, "expected an integer >= 0 as top_k, found 2.5"),
        ({"top_p": 0}, r"expected a number in \(0, 1\] as top_p, found 0"),
        ({"top_p": float("nan")}, "expected a number as top_p, found nan"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"generation_config: {message}"):
        policies.read_generation_config(fields)


def test_fields_without_effect_are_passed_over():
    fields = {"repetition_penalty": 1.0, "num_beams": 1, "max_length": 20, "use_cache": True, "top_p": None, "top_k": 0}
    assert policies.read_generation_config(fields) == Sampling()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("generation")
    for seed, (name, head) in enumerate({"base": None, "reward": "reward", "arm": None}.items()):
        models.save(root / name, *tiny_lm(seed, head, num_layers=1), tokenizer=tokenizer())
    write(root, temperature=0.5, top_k=3, top_p=0.9, do_sample=True)
    (root / "prompts.txt").write_text("the cat\na dog ran on the mat\nsat\n")
    return root


def write(root, **fields):
    path = root / "base/generation_config.json"
    kept = {"eos_token_id": json.loads(path.read_text())["eos_token_id"]}
    path.write_text(json.dumps(kept | fields))


@pytest.mark.filterwarnings("ignore:.*generation_config.json has")
def test_texts_are_drawn_as_the_folder_says(folder):
    lm, params = models.load(folder / "base")
    words, prompts = models.tokenizer(folder / "base"), ["the cat", "sat"]
    found = text.generate(lm, params, words, prompts, seed=3, max_new_tokens=6, generation_config=True)
    fields = {"temperature": 0.5, "top_k": 3, "top_p": 0.9}
    given = text.generate(lm, params, words, prompts, seed=3, max_new_tokens=6, generation_config=fields)
    assert found.texts == given.texts
    by_hand = policies.top_p(policies.top_k(policies.temperature(policies.language_model(lm)), 3))
    nested = {"policy": {"policy": params, "temperature": 0.5}, "top_p": 0.9}
    expected = text.generate(by_hand, nested, words, prompts, seed=3, max_new_tokens=6)
    np.testing.assert_array_equal(found.completions.tokens, expected.completions.tokens)
    np.testing.assert_allclose(found.completions.log_prob, expected.completions.log_prob, atol=1e-5)
    with pytest.raises(ValueError, match=r"temperature: expected 1 beside generation_config, found 0\.5"):
        text.generate(lm, params, words, prompts, max_new_tokens=6, temperature=0.5, generation_config=True)
    plain, plain_params = tiny_lm(0, num_layers=1)
    with pytest.raises(ValueError, match="generation_config: expected a model with fields"):
        text.generate(plain, plain_params, words, prompts, max_new_tokens=6, generation_config=True)


def command(folder, out, *extra):
    return [
        *("--model", str(folder / "base"), "--prompts", str(folder / "prompts.txt"), "--out", str(out)),
        *("--reward", str(folder / "reward"), "--max-new-tokens", "4", "--generation-config", *extra),
    ]


@pytest.mark.filterwarnings("ignore:.*generation_config.json has")
def test_every_method_keeps_to_the_tokens_that_are_left(folder, tmp_path):
    write(folder, top_k=1)  # one token is left: every method that samples gives the base's most probable text
    kinds = ["best_of_n@3", f"blockwise:args:{folder / 'reward'}@3", f"policy:{folder / 'base'}", "quest@1.0"]
    methods = [part for kind in kinds for part in ("--method", kind)]
    decode.main(command(folder, tmp_path / "out", *methods))
    files = sorted((tmp_path / "out").glob("*/responses.jsonl"))
    found = [[json.loads(line)["tokens"] for line in file.read_text().splitlines()] for file in files]
    assert len(found) == 5
    lm, params = models.load(folder / "base")
    words = models.tokenizer(folder / "base")
    greedy = text.generate(
        lm, params, words, ["the cat", "a dog ran on the mat", "sat"], max_new_tokens=4, temperature=0
    )
    tokens, mask = np.asarray(greedy.completions.tokens), np.asarray(greedy.completions.mask)
    for each in found:
        assert each == [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
    # A tilt leaves the base's most probable token where the critic says so, and reads one token alone.
    decode.main(command(folder, tmp_path / "tilt", "--method", f"genarm:{folder / 'arm'}@1.0"))
    arm, arm_params = models.load(folder / "arm")
    tilted = policies.tilt(policies.language_model(lm), critics.genarm(arm))
    both = {"policy": params, "critic": arm_params, "beta": 1.0}
    expected = text.generate(tilted, both, words, ["the cat"], max_new_tokens=4, temperature=0)
    records = (tmp_path / "tilt").glob("genarm*/responses.jsonl")
    first = json.loads(next(iter(records)).read_text().splitlines()[0])
    drawn = expected.completions
    assert first["tokens"] == np.asarray(drawn.tokens)[0][np.asarray(drawn.mask)[0]].tolist()


@pytest.mark.filterwarnings("ignore:.*generation_config.json has")
@pytest.mark.parametrize(
    ("fields", "extra", "message"),
    [
        ({"top_k": 3}, ("--temperature", "0.5"), "temperature: expected none beside --generation-config"),
        ({"top_k": 3}, ("--method", "smc@1.0"), "generation_config: expected none for smc@1.0"),
        (
            {"do_sample": False},
            ("--method", "best_of_n@2"),
            "generation_config: expected one that draws for best_of_n@2",
        ),
        ({"repetition_penalty": 1.2}, (), "generation_config: expected repetition_penalty = 1"),
        ({}, (), "generation_config: expected fields in"),
    ],
)
def test_what_methods_cannot_follow_is_refused_before_anything_is_written(fields, extra, message, folder, tmp_path):
    write(folder, **fields)
    with pytest.raises(ValueError, match=message):
        decode.main(command(folder, tmp_path / "out", *extra))
    assert not list(tmp_path.rglob("responses.jsonl"))
