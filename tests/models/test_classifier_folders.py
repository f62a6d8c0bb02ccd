"""Reward models that are trained here, as folders: the pad id that is written, the token that is read, transformers'
scores of the texts as the jobs make them."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import commands, models, rewards
from jaxalign.data import tokenizers
from jaxalign.training import job, objectives, pairs, reading
from tests.conftest import tiny_config
from tests.models.test_parity import label_scores, needs_torch
from train import reward_model

WORDS = ["the", "cat", "sat", "on", "a", "mat", "good", "bad", "dog"]
PADS = ("eos", "own", "none")


def make_tokenizer(pad: str):
    tokenizer = tokenizers.word_level(WORDS)
    if pad != "own":
        tokenizer.pad_token = tokenizer.eos_token if pad == "eos" else None
    return tokenizer


@pytest.fixture(scope="module", params=PADS)
def trained(request, tmp_path_factory):
    """(which pad id, the run's folder, a batch of its pairs) of two steps of train.reward_model."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(request.param)
    tokenizer.save_pretrained(folder / "tokenizer")
    values = models.config_to_hf(tiny_config(bos_id=None))
    (folder / "config.json").write_text(json.dumps(values))
    rows = [
        {
            "prompt": f"the {word} sat",
            "chosen": "good cat" + " on" * (i % 4),
            "rejected": "bad" + " mat" * (i % 3),
        }
        for i, word in enumerate(WORDS)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "out": str(folder / "run"),
        "data": str(folder / "pairs.jsonl"),
        "architecture": str(folder / "config.json"),
        "tokenizer": str(folder / "tokenizer"),
        "max_length": 32,
        "steps": 2,
        "batch_size": 4,
        "learning_rate": 0.05,
        "validation": 0.0,
    }
    config = commands.from_fields(reward_model.Config, options)
    reward_model.run(config)
    begin = job.StartedModel(*models.load(folder / "run/model"), models.tokenizer(folder / "run/model"))
    shared = {"rows": config.rows, "text": config.text, "compare": config.compare}
    found = reading.read_pairs(config.data, job.form_of(config.text, begin), tail=True, **shared)
    return request.param, folder / "run/model", pairs.padding(config.rows.max_length)(found.rows)


def test_the_pad_id_of_the_tokenizer_is_written(trained):
    pad, folder, _ = trained
    tokenizer = make_tokenizer(pad)
    values = json.loads((folder / "config.json").read_text())
    assert values["pad_token_id"] == {"eos": tokenizer.eos_token_id, "own": tokenizer.pad_token_id, "none": None}[pad]
    assert models.load(folder)[0].reward_pad_id == values["pad_token_id"]


def test_a_trained_model_is_read_at_the_token_it_was_trained_at(trained):
    """Beside the EOS of each row, or at it: the tokens that are read are those of the stated rule."""
    pad, folder, batch = trained
    lm, params = models.load(folder)
    for side in ("chosen", "rejected"):
        tokens, mask = batch[side]["tokens"], batch[side]["mask"]
        in_training = objectives.rewards_of(lm, params, {"tokens": tokens, "mask": mask})
        # A score is a sum of terms of that size, and may itself be near zero.
        scale = float(np.abs(in_training).max())
        np.testing.assert_allclose(label_scores(lm, params, tokens, mask)[:, 0], in_training, rtol=0, atol=1e-6 * scale)
        last = mask.sum(axis=1) - 1
        assert (np.take_along_axis(tokens, last[:, None], axis=1) == make_tokenizer(pad).eos_token_id).all()
        read = np.asarray(models.read_index(jnp.asarray(tokens), jnp.asarray(mask), lm.reward_pad_id))
        np.testing.assert_array_equal(read, last - 1 if pad == "eos" else last)
        head = np.asarray(lm.apply(params, tokens, mask=mask).head)[..., 0]
        at, *beside = (np.take_along_axis(head, read[:, None] + shift, axis=1)[:, 0] for shift in (0, -1, 1))
        np.testing.assert_allclose(in_training, at, rtol=0, atol=1e-5 * scale)
        for other in beside:  # read a token further, the scores would be others by far more than these bounds
            assert np.abs(other - at).max() > 0.01 * scale


@needs_torch
@pytest.mark.parametrize("side", ["left", "right"])
def test_transformers_scores_a_trained_model_as_we_do(trained, side):
    import torch
    import transformers

    pad, folder, batch = trained
    lm, params = models.load(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [row[real].tolist() for b in batch.values() for row, real in zip(b["tokens"], b["mask"], strict=True)]
    if pad == "none":
        with torch.no_grad(), pytest.raises(ValueError, match="no padding token"):
            model(input_ids=torch.tensor([rows[0], rows[0]]))
        batches = [torch.tensor([row]) for row in rows]
        with torch.no_grad():
            expected = np.concatenate([model(input_ids=ids).logits.numpy() for ids in batches])
    else:
        filled = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            expected = model(**filled).logits.numpy()
    found = [label_scores(lm, params, *(batch[name][key] for key in ("tokens", "mask"))) for name in batch]
    assert np.ptp(expected) > 1e-3
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-4, atol=1e-5)


def test_what_is_written_is_told(capsys):
    config = tiny_config(models.Head("reward"), pad_id=5, eos_ids=(1,))
    eos, own, none = (make_tokenizer(pad) for pad in PADS)
    assert job.with_tokenizer_pad(config, eos).pad_id == 1
    assert "the pad id 1 is an EOS" in capsys.readouterr().out
    assert job.with_tokenizer_pad(config, own).pad_id == 0
    assert "pad id 0 takes the place of the config's 5" in capsys.readouterr().out
    assert job.with_tokenizer_pad(config, none).pad_id == 5
    assert capsys.readouterr().out == ""
    bare = tiny_config(models.Head("reward"))
    assert job.with_tokenizer_pad(bare, none).pad_id is None
    assert "one text at a time" in capsys.readouterr().out
    assert job.with_tokenizer_pad(tiny_config(), eos) == tiny_config()


def test_names_and_bounds_of_labels_stay(tmp_path):
    head = models.Head("reward", num_labels=3, labels=("a", "b", "c"), bound=2.0)
    lm = models.LanguageModel(tiny_config(head, family="llama", pad_id=0))
    models.save(tmp_path / "model", lm, lm.init(jax.random.key(0)))
    loaded, params = models.load(tmp_path / "model")
    assert loaded == lm
    assert loaded.label_names == ("a", "b", "c")
    values = json.loads((tmp_path / "model/config.json").read_text())
    assert values["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert values["label2id"] == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(ValueError, match="label: expected one of 'a', 'b', 'c'"):
        rewards.from_model(loaded)
    found = label_scores(loaded, params, jnp.array([[4, 5]]), jnp.ones((1, 2)))
    assert found.shape == (1, 3)
    assert (found > 0).all()
    assert (found < 2).all()
