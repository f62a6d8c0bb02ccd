"""Chats end where their template ends a turn, also where the model's own EOS is another token."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import decode
from jaxalign import models, text, tokens
from jaxalign.training import rollouts
from tests import token_cases as cases
from train import calibrate, rl, value

CHAT = [{"role": "user", "content": "hello there"}]
REWARD = "tests.test_endings:count"


def count(prompts: list[str], responses: list[str]) -> list[float]:
    """A reward: the length of the response."""
    return [float(len(response)) for response in responses]


def ended_by(token: str, **names: str):
    """(tokenizer, model, params): a model that always gives one token and whose EOS is <|endoftext|>."""
    tokenizer = cases.byte_level(cases.CHATML, **({"eos_token": "<|endoftext|>"} | names))
    eos, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", token])
    lm = models.LanguageModel(models.Config(len(tokenizer), 32, 1, 2, 2, 16, 32, 64, eos_ids=(eos,)))
    # Every token is embedded as ones and no layer adds to it, so that the logits are 32 for one token and 0 for others.
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: (jnp.ones_like if "norm" in str(path) or "embedding" in str(path) else jnp.zeros_like)(x),
        lm.init(jax.random.key(0)),
    )
    params["transformer"]["lm_head"] = params["transformer"]["lm_head"].at[:, end].set(1.0)
    return tokenizer, lm, params, eos, end


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("endings")
    tokenizer, lm, params, eos, end = ended_by("<|im_end|>")
    models.save(root / "base", lm, params, tokenizer=tokenizer)
    (root / "chats.jsonl").write_text("".join(json.dumps({"prompt": CHAT}) + "\n" for _ in range(4)))
    (root / "texts.jsonl").write_text("".join(json.dumps({"prompt": "hello there"}) + "\n" for _ in range(4)))
    return root, eos, end


def test_a_chat_ends_at_the_templates_end_and_a_text_at_the_models_own():
    tokenizer, lm, params, eos, end = ended_by("<|im_end|>")
    with pytest.warns(UserWarning, match=r"ends a turn in '<\|im_end\|>'"):
        made = text.generate(lm, params, tokenizer, [CHAT, CHAT], max_new_tokens=6)
    assert made.completions.finished.all()
    assert made.texts == ["", ""]
    np.testing.assert_array_equal(made.completions.mask.sum(-1), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts, ends in (([CHAT], (eos,)), (["hello there"], None)):  # the user's word, and plain text
            made = text.generate(lm, params, tokenizer, prompts, max_new_tokens=6, eos_ids=ends)
            assert not made.completions.finished.any()
        known = models.with_eos(lm, (eos, end))
        assert text.generate(known, params, tokenizer, [CHAT], max_new_tokens=6).completions.finished.all()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: cases.byte_level(cases.CHATML, eos_token="<|endoftext|>"), "<|im_end|>"),
        (lambda: cases.dummy_space(cases.LLAMA2), "</s>"),
        (lambda: cases.byte_level(cases.ZEPHYR), "</s>"),
        (lambda: cases.byte_level(cases.NO_SYSTEM), "</s>"),
        (lambda: cases.byte_level(cases.BARE), None),  # ends in a newline, which is no special token
        (cases.byte_level, None),  # no template
    ],
)
def test_the_end_of_a_turn_is_a_special_token_or_none(make, expected):
    tokenizer = make()
    found = tokens.chat_end(tokens.text_format(tokenizer))
    assert found == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (
            cases.CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else raise_exception('no') }}"),
            "no",
        ),
        (cases.CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"), "one that drops it"),
        (cases.CHATML.replace("<|im_end|>", "{{ m.content | length }}"), "another text"),
    ],
)
def test_a_template_whose_end_cannot_be_read_is_told(template, found):
    form = tokens.text_format(cases.byte_level(template, eos_token="<|endoftext|>"))
    with pytest.warns(UserWarning, match=f"the end of an assistant's turn cannot be read .*{found}"):
        assert tokens.chat_end(form) is None
    with pytest.warns(UserWarning, match="end at the EOS ids alone"):
        assert tokens.ends_of_reply(form, [CHAT], (1,)) == (1,)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens.ends_of_reply(form, ["hello there"], (1,)) == (1,)


@pytest.mark.parametrize(
    ("prompts", "extra", "length"),
    [("chats", (), 1), ("texts", (), 4), ("texts", ("--eos-token", "<|im_end|>"), 1)],
)
def test_decoding_and_calibration_end_alike(prompts, extra, length, folder, tmp_path, capsys):
    root, _, end = folder
    given = ["--prompts", str(root / f"{prompts}.jsonl"), "--max-new-tokens", "4", *extra]
    decode.main(["--model", str(root / "base"), "--out", str(tmp_path / "decoded"), *given])
    responses = [json.loads(x) for x in (tmp_path / "decoded/base/responses.jsonl").read_text().splitlines()]
    assert [len(row["tokens"]) for row in responses] == [length] * 4
    assert (f"'<|im_end|>' ({end})" in capsys.readouterr().out) is (length == 1)
    sampled = ["--base", str(root / "base"), "--reward", REWARD, "--samples", "2", "--decode-batch", "4"]
    calibrate.main([*sampled, *given, "--max-length", "64", "--out", str(tmp_path / "table")])
    with np.load(tmp_path / "table/rollouts/00000.npz") as shard:
        assert set(shard["length"].tolist()) == {length}


def test_differences_of_the_three_files_are_told_once(folder, tmp_path):
    root, eos, end = folder
    tokenizer, lm, params, *_ = ended_by("<|im_end|>", eos_token="<|im_end|>", pad_token="<unk>")
    lm = models.LanguageModel(dataclasses.replace(lm.config, pad_id=eos, bos_id=1))
    models.save(tmp_path / "differs", lm, params, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="the tokenizer has") as told:
        models.tokenizer(tmp_path / "differs")
    expected = rf"EOS '<\|im_end\|>' \({end}\), where the model's files have {eos}; pad '<unk>' \(0\), .* have {eos}$"
    assert [bool(re.search(expected, str(one.message))) for one in told] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.tokenizer(root / "base")


@pytest.mark.filterwarnings(
    "ignore:.*the tokenizer has", "ignore:.*that no text holds are lacking", "ignore:.*rows cut to"
)
def test_a_base_of_rollouts_keeps_its_end(folder, tmp_path):
    root, *_ = folder
    tokenizer, lm, *_ = ended_by("<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    last = len(tokenizer) - 1
    wide = models.LanguageModel(dataclasses.replace(lm.config, vocab_size=last + 1, eos_ids=(last,)))
    models.save(tmp_path / "wide", wide, wide.init(jax.random.key(0)), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=rf"base: expected EOS ids within the common vocabulary .* found \[{last}\]"):
        rollouts.load_base(
            str(tmp_path / "wide"), models.tokenizer(root / "base"), dtype="float32", model=str(root / "base")
        )


def test_values_and_policies_learn_from_ended_responses(folder, tmp_path):
    root, eos, end = folder
    given = ["--prompts", str(root / "chats.jsonl"), "--reward", REWARD, "--max-new-tokens", "4"]
    given += ["--steps", "1", "--batch-size", "2", "--max-length", "64"]
    value.main(
        [*given, "--base", str(root / "base"), "--samples", "2", "--validation", "0", "--out", str(tmp_path / "value")]
    )
    with np.load(tmp_path / "value/rollouts/00000.npz") as shard:
        assert set(shard["length"].tolist()) == {1}
    rl.main([*given, "--model", str(root / "base"), "--validation", "0", "--out", str(tmp_path / "rl")])
    metrics = [json.loads(x) for x in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["length"] == 1
    saved = json.loads((tmp_path / "rl/model/generation_config.json").read_text())
    assert set(saved["eos_token_id"]) == {eos, end}
