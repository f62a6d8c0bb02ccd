"""Our transformer against transformers': golden files always, live where torch is installed. Float32, 2e-4 relative."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models, rewards
from tests.models import families, make_golden

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="live comparison needs torch")


def ours(folder, padding: str, rows: list[list[int]] = families.ROWS) -> np.ndarray:
    lm, params = models.load(folder)
    tokens, mask = (jnp.asarray(x) for x in families.inputs(padding, rows))
    mask = mask.astype(bool)
    return np.asarray(jnp.where(mask[..., None], apply(lm, params, tokens, mask).logits, 0))


def our_scores(folder, pad: str) -> dict[str, np.ndarray]:
    """Padding -> the scores [B,W] of every label of a classifier whose config.json has that pad id."""
    values = json.loads((folder / "config.json").read_text()) | {"pad_token_id": families.PADS[pad]}
    lm, params = models.LanguageModel(models.config_from_hf(values)), models.load(folder)[1]
    found: dict[str, list[np.ndarray]] = {}
    for padding, (tokens, mask) in families.reward_batches(pad).items():
        found.setdefault(padding.split()[0], []).append(label_scores(lm, params, tokens, mask))
    return {padding: np.concatenate(parts) for padding, parts in found.items()}


def label_scores(lm, params, tokens, mask, filler: int = 0) -> np.ndarray:
    """rewards.from_model of every label, [B,W]; what stands in the padding is another id than transformers'."""
    mask = jnp.asarray(mask, bool)
    tokens = jnp.where(mask, jnp.asarray(tokens), filler)
    length = jnp.ones(len(tokens), jnp.int32)
    each = [score(rewards.from_model(lm, label=i), params, tokens, mask, length) for i in range(lm.head_width)]
    return np.stack(each, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def score(reward, params, tokens, mask, length):
    return reward(params, tokens, mask, length, jnp.arange(len(tokens)))


@functools.partial(jax.jit, static_argnums=0)
def apply(lm, params, tokens, mask):
    return lm.apply(params, tokens, mask=mask)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("padding", families.PADDINGS)
@pytest.mark.parametrize("name", [name for name in families.CHECKPOINTS if name not in families.classifiers()])
def test_parity_with_transformers(name, padding):
    folder = make_golden.GOLDEN / name
    expected = np.load(folder / "outputs.npz")[padding]  # of further families the first columns
    assert_close(ours(folder, padding)[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("pad", families.PADS)
@pytest.mark.parametrize("name", families.classifiers())
def test_a_reward_model_is_read_at_the_token_that_transformers_reads(name, pad):
    """Every label, under either padding, whatever the pad id: none, an EOS, one of its own."""
    golden = np.load(make_golden.GOLDEN / name / "outputs.npz")
    found = our_scores(make_golden.GOLDEN / name, pad)
    assert set(found) == ({"none"} if families.PADS[pad] is None else set(families.PADDINGS))
    for padding, scores in found.items():
        assert_close(scores, golden[f"{pad}, {padding}"])


def test_the_rows_of_the_golden_rewards_tell_the_rules_apart():
    """A pad id moves the score of the rows that end in it; all tokens of a row of pads alone have one hidden state."""
    golden = np.load(make_golden.GOLDEN / "llama_reward" / "outputs.npz")
    plain = golden["no pad, none"][:, 0]
    for pad, moved in {"pad is EOS": [0, 3], "own pad": [4]}.items():
        difference = np.abs(golden[f"{pad}, none"][:, 0] - plain)
        assert np.flatnonzero(difference > 1e-2).tolist() == moved
        assert difference[[b for b in range(len(plain)) if b not in moved]].max() < 1e-5


@needs_torch
@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_parity_live(name, tmp_path):
    model = make_golden.build(name)
    model.save_pretrained(tmp_path / "model")
    assert_same_outputs(tmp_path / "model", make_golden.everything(model))


def assert_same_outputs(folder, expected: dict[str, np.ndarray]) -> None:
    """Ours of a folder, against what `make_golden.everything` gives."""
    if "none" in expected:
        found = {padding: ours(folder, padding) for padding in families.PADDINGS}
    else:
        found = {f"{pad}, {padding}": x for pad in families.PADS for padding, x in our_scores(folder, pad).items()}
    assert found.keys() == expected.keys()
    for name, values in found.items():
        assert_close(values, expected[name])


@needs_torch
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Mistral", "Qwen3"])
def test_parity_live_of_classifiers(family, count, tmp_path, monkeypatch):
    fields = {"num_labels": count, "num_hidden_layers": 1, "head_dim": 8}
    monkeypatch.setitem(families.LIVE, "classifier", (family, "ForSequenceClassification", fields))
    model = make_golden.build("classifier")
    model.save_pretrained(tmp_path / "model")
    assert_same_outputs(tmp_path / "model", make_golden.everything(model))


@needs_torch
@pytest.mark.parametrize("name", families.LIVE)
def test_parity_live_of_larger_models(name, tmp_path):
    model = make_golden.build(name)
    model.save_pretrained(tmp_path / "model")
    if hasattr(model, "score"):
        assert_same_outputs(tmp_path / "model", make_golden.everything(model))
        return
    for padding in families.PADDINGS:
        expected = make_golden.outputs(model, padding, families.LONG_ROWS)
        assert_close(ours(tmp_path / "model", padding, families.LONG_ROWS), expected)


@needs_torch
@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_transformers_reads_what_we_save(name, tmp_path):
    """Our folder, read by transformers' torch classes, gives the same outputs."""
    import transformers

    lm, params = models.load(make_golden.GOLDEN / name)
    models.save(tmp_path / "model", lm, params)
    family, kind, _ = families.CHECKPOINTS[name]
    model = getattr(transformers, families.class_names(family, kind)[1]).from_pretrained(tmp_path / "model").eval()
    expected = np.load(make_golden.GOLDEN / name / "outputs.npz")
    found = make_golden.everything(model)
    assert found.keys() == set(expected)
    for key, values in found.items():
        assert_close(values[..., : expected[key].shape[-1]], expected[key])


def test_windows_and_scalings_change_the_outputs():
    """The parity above would not see a window that nothing reaches, or a scaling that does nothing."""
    tokens, mask = (jnp.asarray(x) for x in families.inputs("none"))
    for name, changes in {
        "mistral": {"sliding_window": None},
        "qwen2_windows": {"use_sliding_window": False},
        "llama3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "llama_linear": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    }.items():
        lm, params = models.load(make_golden.GOLDEN / name)
        values = json.loads((make_golden.GOLDEN / name / "config.json").read_text()) | changes
        values.pop("layer_types", None)
        other = models.LanguageModel(models.config_from_hf(values))
        difference = apply(lm, params, tokens, mask).logits - apply(other, params, tokens, mask).logits
        assert float(jnp.abs(difference).max()) > 1e-3, name


@pytest.mark.parametrize("name", ["llama3", "llama_linear", "llama"])
def test_old_layout_of_rope_settings(name, tmp_path):
    """rope_theta and rope_scaling at top level, with `type` or `rope_type`, give the same Config."""
    folder = tmp_path / "old"
    shutil.copytree(make_golden.GOLDEN / name, folder)
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else rope | {"type" if kind == "linear" else "rope_type": kind}
    expected = models.config_from_hf(json.loads((make_golden.GOLDEN / name / "config.json").read_text()))
    assert models.config_from_hf(values) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "bloom"),
        ("hidden_act", "quick_gelu"),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("rope_type", "proportional"),
        ("attn_logit_softcapping", 50.0),
        ("architectures", ["LlamaForTokenClassification"]),
        ("num_hidden_layers", None),
    ],
)
def test_unsupported_fields_are_named(field, value):
    values = json.loads((make_golden.GOLDEN / "llama" / "config.json").read_text())
    if field == "rope_type":
        values["rope_parameters"]["rope_type"] = value
    else:
        values[field] = value
    with pytest.raises(ValueError, match=field):
        models.config_from_hf(values)


def test_one_eos_id_or_several():
    values = json.loads((make_golden.GOLDEN / "llama" / "config.json").read_text())
    assert models.config_from_hf(values).eos_ids == (2, 5)
    assert models.config_from_hf(values | {"eos_token_id": 7}).eos_ids == (7,)
    assert models.config_from_hf(values | {"eos_token_id": None}).eos_ids == ()
