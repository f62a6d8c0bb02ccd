"""The files of examples/gallery as eval.decode builds them, and the page that is written from them."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest

from jaxalign import evaluation, models, policies, prompt_batch, rewards
from jaxalign.types import Completions, Decoded
from tests import write_methods
from tests.cases import tiny_lm
from tests.gallery_files import FILES, module
from tests.test_eval_decode import arguments, folders, methods, rows_of, tokenizer

__all__ = ["folders"]  # a fixture

COUNTS = ("soft_best_of_n", "power_by_quest", "power_by_smc", "weak_to_strong_search", "ensemble_lower_bound")
COUNTS += ("inference_time_pessimism", "guided_draft", "speculative_rejection", "beam_search", "diverse_tree_search")


@pytest.fixture(scope="module")
def given():
    """What a method receives: a tiny base, and models of every name that the gallery asks for."""
    lm, params = tiny_lm(0)
    reward_lm, reward_params = tiny_lm(1, "reward")
    roles = {name: tiny_lm(4) for name in ("expert", "amateur", "aligned", "one", "two", "arm", "draft", "other")}
    roles |= {name: tiny_lm(3, "q") for name in ("value", "value_one", "value_two")}
    roles |= dict.fromkeys(("reward", "reward_one", "reward_two"), (reward_lm, reward_params))
    lm, _ = tiny_lm(2, "value")
    lm = models.with_head(lm, models.Head("value", distribution=models.Distribution((0.0, 1.0, 2.0))))
    roles["laws"] = lm, lm.init(jax.random.key(3))
    limits = {"max_new_tokens": 4, "eos_ids": (0,), "temperature": 1.0}
    proxy = rewards.from_model(reward_lm)
    return evaluation.MethodInputs(
        policies.language_model(lm), params, proxy, reward_params, tokenizer(), limits, 0.5, roles
    )


@pytest.mark.parametrize("name", FILES)
def test_every_method_is_traced_as_eval_decode_builds_it(given, name):
    """Shapes and kinds of what it gives; nothing is compiled."""
    own = given._replace(strength=2.0 if name in COUNTS else 0.5)
    draw = module(name).build(own)
    prompts = prompt_batch([[1, 2, 3], [4, 5]])._replace(index=jnp.arange(2, dtype=jnp.int32))
    found = jax.eval_shape(lambda: draw(jax.random.key(0), prompts))
    completions = found.completions if isinstance(found, Decoded) else found
    assert isinstance(completions, Completions)
    assert completions.tokens.shape == (2, 4)


def test_a_method_of_the_gallery_in_eval_decode(folders, tmp_path, monkeypatch):
    """GenARM of one objective at weight 1 is the built-in GenARM at beta 1, token by token; models come by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FILES["genarm_objectives"].parent))
    named = ["--with-model", f"one={folders['arm']}", "--with-model", f"two={folders['base']}"]
    specs = methods("genarm_objectives:build@1,0.5", f"genarm:{folders['arm']}@1")
    from eval import decode

    decode.main(arguments(folders, tmp_path / "out", *specs, *named))
    rows = {(row["method"].split(":")[0], row["beta"]): row for row in rows_of(tmp_path / "out")}
    assert rows["genarm_objectives", 1.0]["kl"] == rows["genarm", 1.0]["kl"]
    assert rows["genarm_objectives", 0.5]["kl"] != rows["genarm", 1.0]["kl"]
    for wrong, match in (("one", "expected NAME=DIR"), ("two=x", "each name once")):
        with pytest.raises(ValueError, match=f"with_model: {match}|with_model: .*{match}"):
            decode.main(arguments(folders, tmp_path / "wrong", *specs, *named, "--with-model", wrong))
    with pytest.raises(ValueError, match=r"with_model: expected one=DIR, which the method reads, found \[\]"):
        decode.main(arguments(folders, tmp_path / "none", *methods("genarm_objectives:build@1")))


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_of_methods_is_that_of_the_files():
    assert write_methods.PAGE.read_text() == write_methods.written()


@pytest.mark.parametrize("name", FILES)
def test_a_method_says_its_source_equation_use_and_cost_in_ten_lines(name):
    entry = write_methods.entry(pathlib.Path(FILES[name]))
    assert all(entry.fields[field] for field in write_methods.FIELDS)
    assert entry.body.count("\n") <= 11
