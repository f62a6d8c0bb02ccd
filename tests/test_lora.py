"""Low-rank adapters: nothing at first, merged = applied inside, gradients in the adapter alone, peft's folders."""

from __future__ import annotations

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from jaxalign import critics, decoding, models, policies
from jaxalign.models import lora, sharding
from tests.conftest import EOS, PROMPTS, padded, tiny_lm

SPEC = models.Lora(3, alpha=6.0)
RNG = jax.random.key(0)
TOKENS = jnp.array([[4, 5, 6, 1, 9], [7, 2, 2, 0, 3]])
logits = jax.jit(lambda lm, params: lm.apply(params, TOKENS).logits, static_argnums=0)


merge = jax.jit(lora.merge, static_argnums=2)


def random_adapter(lm, seed: int, spec=SPEC):
    """An adapter whose b is not zero."""
    shapes = jax.eval_shape(functools.partial(lora.init, lm=lm, spec=spec), RNG)
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.4 * draw.normal(size=x.shape), x.dtype), shapes)


def test_a_new_adapter_changes_nothing_and_is_small():
    lm, params = tiny_lm(0)
    adapter = lora.init(RNG, lm, SPEC)
    np.testing.assert_array_equal(logits(lm, lora.attach(params, adapter, SPEC)), logits(lm, params))
    chex.assert_trees_all_equal(merge(params, adapter, SPEC), params)
    found = lora.pairs(adapter)
    assert sorted(found) == [
        f"layer_{i}/{p}" for i in (0, 1) for p in ("attention/out", "attention/qkv", "down", "gate_up")
    ]
    a, b = found["layer_0/attention/qkv"]
    assert (a.shape, b.shape) == ((16, 3), (3, 2, 4, 4))
    assert float(jnp.abs(a).max()) <= 0.25  # 1/sqrt(16)
    assert float(a.std()) > 0.1


@pytest.mark.parametrize(("dtype", "targets"), [("float32", tuple(lora.TARGETS)), ("float64", ("out", "gate_up"))])
def test_merged_equals_applied_inside_in_every_pass(dtype, targets):
    """Whole rows, prefill and steps, and candidates over a cache."""
    with jax.enable_x64(dtype == "float64"):
        lm, params = tiny_lm(0, dtype=dtype)
        spec = models.Lora(3, alpha=6.0, targets=targets)
        adapter = random_adapter(lm, 1, spec)
        prompts = padded(PROMPTS)

        @jax.jit
        def passes(params):
            hidden, cache = lm.prefill(params, prompts.tokens, prompts.mask, 8)
            stepped, cache = lm.step(params, cache, jnp.array([1, 2, 3, -1, 5]))
            listed, _ = lm.candidates(params, cache, jnp.array([[1, 2]] * 5))
            return lm.apply(params, TOKENS).logits, hidden, jnp.delete(stepped, 3, axis=0), listed

        inside, merged = passes(lora.attach(params, adapter, spec)), passes(merge(params, adapter, spec))
        tolerance = 1e-5 if dtype == "float32" else 1e-12
        for one, other in zip(inside, merged, strict=True):
            np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
        assert float(jnp.abs(inside[0] - logits(lm, params)).max()) > 0.1


def test_attaching_shares_the_weights_and_leaves_the_base_as_it_was():
    lm, params = tiny_lm(0)
    attached = lora.attach(params, random_adapter(lm, 1), SPEC)
    assert attached["transformer"] is params["transformer"]
    assert "lora" not in params
    with pytest.raises(ValueError, match="surplus"):
        models.save("unused", lm, attached)


def test_gradients_are_the_adapters_alone_and_those_of_the_merged_weights():
    """With W + scale·a·b: dL/db = scale·aᵀ·dL/dW, dL/da = scale·dL/dW·bᵀ."""
    with jax.enable_x64(True):
        lm, params = tiny_lm(0, dtype="float64")
        adapter = random_adapter(lm, 1)

        def loss(params):
            return (lm.apply(params, TOKENS).logits ** 2).mean()

        found = jax.jit(jax.grad(lambda x: loss(lora.attach(params, x, SPEC))))(adapter)
        whole = jax.jit(jax.grad(loss))(merge(params, adapter, SPEC))["transformer"]
        chex.assert_trees_all_equal_shapes(found, adapter)
        for place, kernel in (
            ("layer_0/attention/qkv", whole["layer_0"]["attention"]["qkv"]["kernel"]),
            ("layer_1/down", whole["layer_1"]["down"]["kernel"]),
        ):
            (a, b), (da, db) = lora.pairs(adapter)[place], lora.pairs(found)[place]
            kernel, b, db = (x.reshape(x.shape[0], -1) for x in (kernel, b, db))  # the columns have axes of their own
            np.testing.assert_allclose(db, SPEC.scale * a.T @ kernel, rtol=1e-9, atol=1e-14)
            np.testing.assert_allclose(da, SPEC.scale * kernel @ b.T, rtol=1e-9, atol=1e-14)
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(found))


def test_an_attached_adapter_goes_into_critics_and_decoders_as_a_model_does():
    lm, params = tiny_lm(0)
    adapter = random_adapter(lm, 1)
    policy = policies.tilt(policies.language_model(lm), critics.genarm(lm))
    tokens, mask = jnp.array([[1, 2], [3, 0], [4, 4], [9, 1], [2, 2]]), jnp.ones((5, 2), bool)

    def scored(arm):
        arguments = {"policy": params, "critic": arm, "beta": 0.7}
        return decoding.log_prob(policy, arguments, RNG, padded(PROMPTS), tokens, mask).log_prob

    inside = scored(lora.attach(params, adapter, SPEC))
    np.testing.assert_allclose(inside, scored(merge(params, adapter, SPEC)), rtol=1e-5, atol=1e-5)
    drawn = decoding.sample(
        policies.language_model(lm),
        lora.attach(params, adapter, SPEC),
        RNG,
        padded(PROMPTS),
        max_new_tokens=2,
        eos_ids=EOS,
    )
    assert bool(jnp.isfinite(drawn.log_prob).all())


def test_bfloat16_weights_are_adapted_in_bfloat16_and_merged_by_way_of_float32():
    lm, params = tiny_lm(0, dtype="bfloat16")
    adapter = random_adapter(lm, 1)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(adapter))
    merged = merge(params, adapter, SPEC)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, adapter))
    expected = merge(*wide, SPEC)["transformer"]["layer_0"]["down"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(merged["transformer"]["layer_0"]["down"]["kernel"], expected)
    hidden = lm.apply(lora.attach(params, adapter, SPEC), TOKENS).hidden
    assert hidden.dtype == jnp.bfloat16


def test_stacked_ranks_and_targets_may_differ():
    lm, _ = tiny_lm(0)
    specs = [SPEC, models.Lora(1, alpha=5.0, targets=("down",))]
    parts = [random_adapter(lm, i, spec) for i, spec in enumerate(specs)]
    stacked = lora.stack(parts, specs)
    for place, (a, b) in lora.pairs(stacked).items():
        assert a.shape[0] == b.shape[0] == 2
        for i, spec in enumerate(specs):
            own = lora.pairs(parts[i]).get(place)
            expected = 0 if own is None else spec.scale * np.tensordot(own[0], own[1], axes=1)
            np.testing.assert_allclose(np.tensordot(a[i], b[i], axes=1), expected, rtol=1e-5, atol=1e-6)


def misshapen(adapter, place, shape):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros(shape) if sharding.path_name(path) == place else x, adapter
    )


def test_what_does_not_fit_is_named(tmp_path):
    lm, params = tiny_lm(0)
    adapter = random_adapter(lm, 1)
    wrong = misshapen(adapter, "layer_1/down/b", (3, 17))
    for use in (
        lambda: lora.attach(params, wrong, SPEC),
        lambda: lora.merge(params, wrong, SPEC),
        lambda: models.save_adapter(tmp_path / "x", lm, SPEC, wrong),
    ):
        with pytest.raises(ValueError, match=r"layer_1/down/b: expected shape \(3, 16\), found \(3, 17\)"):
            use()
    with pytest.raises(ValueError, match=r"layer_0/attention/qkv/a: expected shape \(16, 2\), found \(15, 2\)"):
        lora.attach(params, misshapen(adapter, "layer_0/attention/qkv/a", (15, 2)), SPEC)
    with pytest.raises(ValueError, match="'layer_1/attention/out'"):
        lora.attach(tiny_lm(0, num_layers=1)[1], adapter, SPEC)
    half = {"layer_0": {"down": {"a": jnp.zeros((24, 3))}}}
    with pytest.raises(ValueError, match="layer_0/down/b"):
        lora.merge(params, half, SPEC)
    with pytest.raises(ValueError, match=r"layer_1/down of adapter 1: .* found 24 and 17"):
        lora.stack([adapter, wrong], [SPEC, SPEC])
    with pytest.raises(ValueError, match="found 2 and 1"):
        lora.stack([adapter, adapter], [SPEC])
    for values, match in (
        ({"rank": 0}, "rank"),
        ({"rank": 1, "alpha": 0.0}, "alpha"),
        ({"rank": 1, "targets": ("q",)}, r"targets: .*'q'"),
    ):
        with pytest.raises(ValueError, match=match):
            models.Lora(**values)
    with pytest.raises(ValueError, match="rank: expected at most 16 for layer_0/attention/qkv, found 17"):
        lora.init(RNG, lm, models.Lora(17))


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_adapter_back_and_refuses_to_be_overwritten(tmp_path):
    lm, _ = tiny_lm(0)
    adapter = random_adapter(lm, 1)
    models.save_adapter(tmp_path / "adapter", lm, SPEC, adapter, base="some/model")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    spec, found = models.load_adapter(tmp_path / "adapter", lm)
    assert spec == SPEC
    chex.assert_trees_all_equal(found, adapter)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        models.save_adapter(tmp_path / "adapter", lm, SPEC, adapter)
    data = (tmp_path / "adapter/adapter_model.safetensors").read_bytes()
    for _ in range(8):  # the order of what a file's header holds is not drawn anew
        models.save_adapter(tmp_path / "adapter", lm, SPEC, adapter, overwrite=True)
        assert (tmp_path / "adapter/adapter_model.safetensors").read_bytes() == data
    models.save_adapter(tmp_path / "adapter", lm, SPEC, lora.init(RNG, lm, SPEC), overwrite=True)
    assert not any(np.any(b) for _, b in lora.pairs(models.load_adapter(tmp_path / "adapter", lm)[1]).values())


def test_the_tensors_say_what_peft_reads_in_them(tmp_path):
    """peft: W' = W + (lora_alpha/r)·B·A for each of the checkpoint's own matrices, [out, in]."""
    lm, params = tiny_lm(0)
    adapter = random_adapter(lm, 1)
    models.save(tmp_path / "base", lm, params)
    models.save(tmp_path / "merged", lm, merge(params, adapter, SPEC))
    models.save_adapter(tmp_path / "adapter", lm, SPEC, adapter)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    changed = {name for name in base if not np.array_equal(base[name], merged[name])}
    assert len(changed) == 14  # q, k, v, o, gate, up, down of two layers
    assert {name.split(".")[-2] for name in changed} == set(config["target_modules"])
    for name in changed:
        module = "base_model.model." + name.removesuffix(".weight")
        a, b = tensors.pop(f"{module}.lora_A.weight"), tensors.pop(f"{module}.lora_B.weight")
        assert a.shape[0] == config["r"]
        expected = base[name] + config["lora_alpha"] / config["r"] * b @ a
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-5)
    assert not tensors


def test_a_folder_with_an_adapter_for_each_of_q_and_v_is_read_exactly(tmp_path):
    """peft's default for Llama: queries and values alone, each with its own A: ranks add up, keys stay."""
    lm, params = tiny_lm(0)
    rng = np.random.default_rng(0)
    tensors = {}
    for i in range(2):
        for part, out in (("q", 16), ("v", 8)):
            name = f"base_model.model.model.layers.{i}.self_attn.{part}_proj.lora_"
            tensors[f"{name}A.weight"] = jnp.asarray(rng.normal(size=(2, 16)), jnp.float32)
            tensors[f"{name}B.weight"] = jnp.asarray(rng.normal(size=(out, 2)), jnp.float32)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 16}))
    spec, adapter = models.load_adapter(folder, lm)
    assert (spec.scale, spec.targets) == (8.0, ("qkv",))
    merged = merge(params, adapter, spec)["transformer"]["layer_1"]["attention"]["qkv"]["kernel"]
    change = np.asarray(merged - params["transformer"]["layer_1"]["attention"]["qkv"]["kernel"])
    name = "base_model.model.model.layers.1.self_attn.{}_proj.lora_{}.weight"
    q, v = (8 * (tensors[name.format(p, "B")] @ tensors[name.format(p, "A")]).T for p in "qv")
    # For each of two heads of keys: its two queries, then its keys, then its values.
    parts = [x.reshape(16, 2, -1, 4) for x in (q, np.zeros((16, 8)), v)]
    np.testing.assert_allclose(change, np.concatenate(parts, axis=2), rtol=1e-4, atol=1e-4)
    # Saved again, ranks are evened out with zeros and the product stays.
    models.save_adapter(tmp_path / "again", lm, spec, adapter)
    again, found = models.load_adapter(tmp_path / "again", lm)
    chex.assert_trees_all_close(merge(params, found, again), merge(params, adapter, spec), rtol=1e-5)


def test_folders_that_cannot_be_read_are_refused_by_name(tmp_path):
    lm, _ = tiny_lm(0)
    with pytest.raises(ValueError, match=r"adapter_config\.json: expected in the folder"):
        models.load_adapter(tmp_path, lm)
    models.save_adapter(tmp_path / "a", lm, SPEC, random_adapter(lm, 1))
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    for changed, match in (
        ({"use_dora": True}, "use_dora: expected False"),
        ({"bias": "all"}, "bias: expected 'none'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern: "),
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA'"),
        ({"r": 0}, r"r: expected a number > 0, at most \d+, in .*adapter_config\.json, found 0"),
        ({"lora_alpha": None}, r"lora_alpha: expected a value > 0 in .*adapter_config\.json, found None"),
    ):
        (tmp_path / "a/adapter_config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=match):
            models.load_adapter(tmp_path / "a", lm)
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.layers\.1\."):  # a model of one layer
        models.load_adapter(tmp_path / "a", tiny_lm(0, num_layers=1)[0])
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight: expected shape \(3, 8\), found \(3, 16\)"):
        models.load_adapter(tmp_path / "a", tiny_lm(0, hidden_size=8)[0])
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    tensors.pop("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight")
    save_file(tensors, tmp_path / "a/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj: expected lora_A and lora_B"):
        models.load_adapter(tmp_path / "a", lm)
    (tmp_path / "a/adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: expected in the folder"):
        models.load_adapter(tmp_path / "a", lm)


def test_every_tensor_of_an_adapter_names_its_axes():
    lm, params = tiny_lm(0)
    adapter = random_adapter(lm, 1)
    for tree in (adapter, {"lora": lora.attach(params, adapter, SPEC)["lora"]}):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            assert len(sharding.logical_axes(sharding.path_name(path))) == leaf.ndim
    assert sharding.logical_axes("layer_0/attention/out/a") == ("heads", None)


def test_an_adapter_is_not_put_on_an_adapter():
    """Merging twice would count one twice, and stacking would leave the first one out."""
    lm, params = tiny_lm(0)
    spec = models.Lora(2, targets=["qkv"])
    adapter = models.lora.init(jax.random.key(0), lm, spec)
    attached = models.lora.attach(params, adapter, spec)
    with pytest.raises(ValueError, match="params: expected a model without an adapter"):
        models.lora.merge(attached, adapter, spec)
    policy = policies.adapters(lm, 1)
    stacked = {"policy": attached, "adapters": models.lora.stack([adapter], [spec]), "weights": jnp.ones(1)}
    prompts = padded(PROMPTS)
    with pytest.raises(ValueError, match="policy: expected a base without an adapter"):
        policy.init(stacked, jax.random.key(0), prompts, 2)
