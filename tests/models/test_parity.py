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

from jaxalign import mdp, models
from tests.models import families, make_golden

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="live comparison needs torch")


def ours(folder, padding: str, rows: list[list[int]] = families.ROWS) -> np.ndarray:
    lm, params = models.load(folder)
    tokens, mask = (jnp.asarray(x) for x in families.inputs(padding, rows))
    mask = mask.astype(bool)
    out = apply(lm, params, tokens, mask)
    if lm.config.head is None:
        return np.asarray(jnp.where(mask[..., None], out.logits, 0))
    return np.asarray(jnp.take_along_axis(out.head[..., 0], mdp.last_index(mask)[:, None], axis=1)[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def apply(lm, params, tokens, mask):
    return lm.apply(params, tokens, mask=mask)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("padding", families.PADDINGS)
@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_parity_with_transformers(name, padding):
    folder = make_golden.GOLDEN / name
    assert_close(ours(folder, padding), np.load(folder / "outputs.npz")[padding])


@needs_torch
@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_parity_live(name, tmp_path):
    model = make_golden.build(name)
    model.save_pretrained(tmp_path / "model")
    for padding in families.PADDINGS:
        assert_close(ours(tmp_path / "model", padding), make_golden.outputs(model, padding))


@needs_torch
@pytest.mark.parametrize("name", families.LIVE)
def test_parity_live_of_larger_models(name, tmp_path):
    model = make_golden.build(name)
    model.save_pretrained(tmp_path / "model")
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
    model = getattr(transformers, f"{family}{kind}").from_pretrained(tmp_path / "model").eval()
    expected = np.load(make_golden.GOLDEN / name / "outputs.npz")
    for padding in families.PADDINGS:
        assert_close(make_golden.outputs(model, padding), expected[padding])


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
        ("model_type", "gpt2"),
        ("hidden_act", "gelu"),
        ("quantization_config", {"bits": 4}),
        ("partial_rotary_factor", 0.5),
        ("rope_type", "yarn"),
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
