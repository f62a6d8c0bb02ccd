"""Reward models on a command line: over the base's tokens, with a tail, or through a tokenizer of their own."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import decode
from jaxalign import models, rewards, text, tokens
from jaxalign.evaluation.options import DecodeOptions
from jaxalign.training import rollouts
from tests import token_cases as cases
from tests import write_rewards
from tests.conftest import tiny_lm

CHATS = [
    [{"role": "user", "content": "How are you?"}],
    [{"role": "user", "content": "What is the capital of France?"}],
]
MODEL = {"num_layers": 1, "max_length": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base with ChatML; reward models with its tokenizer, with another template, with another vocabulary and with two
    labels; chats and texts as prompts."""
    top = tmp_path_factory.mktemp("folders")
    same, template = cases.byte_level(cases.CHATML, eos_token="<|im_end|>"), cases.byte_level(cases.ZEPHYR)
    other = cases.dummy_space(cases.ZEPHYR)
    kinds = {
        "base": (same, None, 4),
        "same": (same, "reward", 4),
        "template": (template, "reward", 2),
        "other": (other, "reward", 2),
    }
    for seed, (name, (tokenizer, head, eos)) in enumerate(kinds.items()):
        lm, params = tiny_lm(seed, head, vocab_size=len(tokenizer), eos_ids=(eos,), **MODEL)
        models.save(top / name, lm, params, tokenizer=tokenizer)
    lm, params = tiny_lm(9, "reward", vocab_size=len(same), eos_ids=(4,), **MODEL)
    two = models.with_head(lm, models.Head("reward", num_labels=2))
    head = jax.tree.map(lambda x: jnp.concatenate([x, -x], axis=-1), params["head"])
    models.save(top / "two", two, {**params, "head": head}, tokenizer=same)
    (top / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    (top / "texts.txt").write_text("hello there\nOne two\n")
    return top


def reader(folders, sources):
    tokenizer = models.tokenizer(folders / "base")
    lm, _ = models.load(folders / "base")
    return rewards.Reader(tokens.text_format(tokenizer, eos_ids=(4,)), lm, sources)


def row_of(reader, source, response, *, ended=True):
    row = tokens.encode_pair(reader.form, source, response)
    ids = [*row.prompt, *row.response, *(row.closing if ended else [])]
    args = jnp.asarray([ids]), jnp.ones((1, len(ids)), bool), jnp.asarray([len(row.prompt)]), jnp.asarray([0])
    return args, row


def test_which_reward_models_read_texts_through_their_own_tokenizer(folders):
    chats, texts = reader(folders, CHATS), reader(folders, ["hello"])
    expected = {"same": ("", ""), "template": ("another chat template", ""), "other": ("another vocabulary",) * 2}
    for name, (of_chats, of_texts) in expected.items():
        assert rewards.own_reading(chats, str(folders / name)) == of_chats
        assert rewards.own_reading(texts, str(folders / name)) == of_texts


def test_the_template_s_tail_is_read_after_an_end(folders):
    chats = reader(folders, CHATS)
    reward, params = rewards.open_reward(chats, str(folders / "same"))
    lm, loaded = models.load(folders / "same")
    for ended in (True, False):
        args, row = row_of(chats, CHATS[0], "I am fine.", ended=ended)
        whole = jnp.asarray([[*np.asarray(args[0])[0], *(row.tail if ended else [])]])
        expected = lm.head(loaded, lm.hidden(loaded, whole))[0, -1, 0]
        np.testing.assert_allclose(reward(params, *args)[0], expected, rtol=1e-4, atol=1e-5)
    plain, params = rewards.open_reward(reader(folders, ["hello"]), str(folders / "same"))
    args, row = row_of(chats, "hello", " Yes")
    expected = lm.head(loaded, lm.hidden(loaded, args[0]))[0, -1, 0]  # a text has no tail
    np.testing.assert_allclose(plain(params, *args)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="prompts that are all chats or all texts, found both"):
        rewards.open_reward(reader(folders, [CHATS[0], "hello"]), str(folders / "same"))


@pytest.mark.parametrize("name", ["template", "other"])
def test_another_tokenizer_or_template_scores_its_own_text(folders, name, capsys):
    chats = reader(folders, CHATS)
    reward, params = rewards.open_reward(chats, str(folders / name))
    assert params is None
    assert "scores whole responses through its own tokenizer" in capsys.readouterr().out
    args, _ = row_of(chats, CHATS[0], "I am fine.")
    lm, loaded = models.load(folders / name)
    own = models.tokenizer(folders / name)
    expected = text.score(rewards.from_model(lm), loaded, own, CHATS[:1], ["I am fine."])
    np.testing.assert_allclose(reward(None, *args), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected the base's tokenizer, found another in"):
        rewards.own_texts(reader(folders, None), str(folders / "other"))


def test_a_label_is_named_after_the_folder(folders):
    chats = reader(folders, CHATS)
    spec = f"{folders / 'two'}#LABEL_1"
    assert rewards.reward_roles(spec) == {"reward": str(folders / "two")}
    assert rewards.reward_inputs(f"2 * {spec}") == (str(folders / "two"),)
    args, _ = row_of(chats, CHATS[0], "Yes")

    def build(spec):
        def open_model(role, folder, label):
            return rewards.open_reward(chats, folder, label=label, name=role)

        reward, params = rewards.build_reward(spec, open_model=open_model, reader=chats)
        return float(reward(params, *args)[0])

    one, two = build(spec), build(spec.replace("LABEL_1", "LABEL_0"))
    assert one == pytest.approx(-two, rel=1e-4)
    with pytest.raises(ValueError, match="label: expected one of 'LABEL_0', 'LABEL_1'"):
        build(str(folders / "two"))


def test_decoding_with_another_tokenizers_reward_model(folders, tmp_path, capsys):
    """As proxy of best-of-n and as gold, with program terms; the scores are those of its own texts."""
    options = DecodeOptions(
        model=str(folders / "base"),
        prompts=str(folders / "chats.jsonl"),
        reward=f"{folders / 'other'} - 0.5 * {folders / 'template'}",
        gold=str(folders / "same"),
        method=("best_of_n@3",),
        max_new_tokens=5,
        out=str(tmp_path / "run"),
        batch_size=2,
    )
    decode.run(options)
    told = capsys.readouterr().out
    assert told.count("scores whole responses through its own tokenizer") == 2
    for line in next((tmp_path / "run").glob("best*/responses.jsonl")).read_text().splitlines():
        record = json.loads(line)
        parts = []
        for name in ("other", "template"):
            lm, params = models.load(folders / name)
            own = models.tokenizer(folders / name)
            chat = CHATS[record["index"]]
            parts.append(text.score(rewards.from_model(lm), params, own, [chat], [record["response"]])[0])
        assert record["reward"] == pytest.approx(parts[0] - 0.5 * parts[1], abs=1e-4)


def test_methods_that_cannot_use_it_say_so(folders, tmp_path):
    options = {
        "model": str(folders / "base"),
        "prompts": str(folders / "chats.jsonl"),
        "reward": str(folders / "other"),
        "max_new_tokens": 4,
        "batch_size": 2,
    }
    for method in ("smc@1", "ggro@2", f"transfer:{folders / 'base'}@1"):
        with pytest.raises(ValueError, match=r"reward.*(own tokenizer|reward model, whose gradient)"):
            decode.run(DecodeOptions(**options, method=(method,), out=str(tmp_path / method[:3])))


def test_roll_outs_are_scored_by_it(folders):
    """train.value, train.calibrate and train.shaping draw and score through the one function."""
    lm, _ = models.load(folders / "base")
    tokenizer = models.tokenizer(folders / "base")
    reward, params = rollouts.open_reward(str(folders / "other"), lm, tokenizer, dtype="float32", sources=CHATS)
    assert params is None
    args, _ = row_of(reader(folders, CHATS), CHATS[0], "Yes")
    other, loaded = models.load(folders / "other")
    own = models.tokenizer(folders / "other")
    expected = text.score(rewards.from_model(other), loaded, own, CHATS[:1], ["Yes"])
    np.testing.assert_allclose(reward(None, *args), expected, rtol=1e-4, atol=1e-5)


def test_transcripts_are_read_as_their_turns(folders):
    """A prompt of hh-rlhf before a reward model with a chat template of its own."""
    transcript = "\n\nHuman: How are you?\n\nAssistant:"
    lm, _ = models.load(folders / "base")
    tokenizer = models.tokenizer(folders / "base")
    reward, _ = rollouts.open_reward(str(folders / "other"), lm, tokenizer, dtype="float32", sources=[transcript])
    other, loaded = models.load(folders / "other")
    own = models.tokenizer(folders / "other")
    chat = [{"role": "user", "content": "How are you?"}]
    expected = text.score(rewards.from_model(other), loaded, own, [chat], [" Yes"])
    args, _ = row_of(reader(folders, [transcript]), transcript, " Yes")
    np.testing.assert_allclose(reward(None, *args), expected, rtol=1e-4, atol=1e-5)


def test_the_table_of_the_page_is_as_reward_models_are_read():
    page = write_rewards.PAGE.read_text()
    assert write_rewards.written(page) == page, "python -m tests.write_rewards writes the table anew"
