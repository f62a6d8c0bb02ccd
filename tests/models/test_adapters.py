"""Folders of adapters: what peft computes with them is what we compute; what is not known is refused by name."""

from __future__ import annotations

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import load_file, save_file

from jaxalign import models
from jaxalign.models.hf import adapter_fields, sources
from tests.conftest import tiny_lm
from tests.models.make_adapters import ADAPTERS, CASES, CLASSIFIER, TOKENS, outputs
from tests.models.make_golden import GOLDEN

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="live comparison needs peft")
PRODUCTS = [name for name, case in CASES.items() if "modules_to_save" not in case.fields and case.kind != CLASSIFIER]


def golden(name: str) -> np.ndarray:
    return np.load(ADAPTERS / name / "outputs.npz")["outputs"]


def ours(lm, params) -> np.ndarray:
    out = jax.jit(lm.apply)(params, jnp.asarray(TOKENS))
    return np.asarray(out.logits if lm.config.head is None else out.head[:, -1, 0])


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_an_adapters_folder_is_the_model_that_peft_makes_of_it(name):
    lm, params = models.load(ADAPTERS / name)
    assert_close(ours(lm, params), golden(name))
    base_lm, base = models.load(GOLDEN / CASES[name].base)
    if base_lm == lm:  # an adapter that is passed over would be as good
        assert np.abs(ours(base_lm, base) - golden(name)).max() > 0.1 * np.abs(golden(name)).max()


@pytest.mark.parametrize("name", PRODUCTS)
def test_an_adapter_beside_its_base_computes_the_same(name):
    lm, params = models.load(GOLDEN / CASES[name].base)
    spec, adapter = models.load_adapter(ADAPTERS / name, lm)
    assert_close(ours(lm, models.lora.attach(params, adapter, spec)), golden(name))
    assert spec.rslora == CASES[name].fields.get("use_rslora", False)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_saved_adapter_comes_back(name, tmp_path):
    lm, _ = models.load(GOLDEN / CASES[name].base)
    spec, adapter = models.load_adapter(ADAPTERS / name, lm)
    models.save_adapter(tmp_path / "again", lm, spec, adapter, base=str(GOLDEN / CASES[name].base))
    assert_close(ours(*models.load(tmp_path / "again")), golden(name))


@needs_peft
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")  # peft's own
@pytest.mark.parametrize("name", PRODUCTS)
def test_peft_reads_what_we_save(name, tmp_path):
    lm, _ = models.load(GOLDEN / CASES[name].base)
    spec, adapter = models.load_adapter(ADAPTERS / name, lm)
    models.save_adapter(tmp_path / "ours", lm, spec, adapter)
    assert_close(outputs(CASES[name], tmp_path / "ours"), golden(name))


@needs_peft
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::RuntimeWarning")  # peft's own
@pytest.mark.parametrize("name", ["score", "score_of_a_language_model"])
def test_peft_reads_a_reward_model_that_we_save_as_an_adapter(name, tmp_path):
    lm, _ = models.load(ADAPTERS / name)
    spec, keys = models.Lora(3, alpha=5.0, targets=("out", "down")), jax.random.split(jax.random.key(0), 3)
    adapter = jax.tree.map(lambda x: x + 0.1, models.lora.init(keys[0], lm, spec))
    head = {"score": {"kernel": jax.random.normal(keys[1], (lm.config.hidden_size, 1))}}
    models.save_adapter(tmp_path / "ours", lm, spec, adapter, head=head, base=str(GOLDEN / CASES[name].base))
    assert_close(ours(*models.load(tmp_path / "ours")), outputs(CASES[name], tmp_path / "ours"))


@needs_peft
def test_every_field_of_peft_is_sorted():
    """A field that peft adds is refused until somebody has sorted it."""
    import dataclasses

    import peft

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - {"runtime_config"}
    assert fields == {*adapter_fields.NEUTRAL, *adapter_fields.SUPPORTED, *adapter_fields.MUST_BE}


REFUSED = {
    "use_dora": True,
    "init_lora_weights": "pissa",
    "bias": "lora_only",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "use_qalora": True,
    "alora_invocation_tokens": [1, 2],
    "trainable_token_indices": [0],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "layer_replication": [[0, 2], [1, 2]],
    "megatron_config": {"hidden_size": 8},
    "loftq_config": {"loftq_bits": 4},
    "ensure_weight_tying": True,
    "arrow_config": {"top_k": 3},
    "corda_config": {"corda_method": "kpm"},
    "eva_config": {"rho": 2.0},
    "kasa_config": {"beta": 1.0},
    "lora_ga_config": {"scale": "stable"},
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "modules_to_save": ["embed_tokens"],
    "task_type": "SEQ_2_SEQ_LM",
    "peft_type": "LOHA",
    "a_field_of_tomorrow": 1,
}
MORE = [
    *(("init_lora_weights", kind) for kind in ("olora", "corda", "eva", "loftq", "pissa_niter_4", "lora_ga", "mica")),
    ("bias", "all"),
    ("peft_type", None),
    ("rank_pattern", {"q_proj": 5}),
    ("rank_pattern", {"(": 2}),
    ("alpha_pattern", {"q_proj": -1}),
    ("target_modules", ["q_proj", "v_proj", "k_proj"]),
    ("target_modules", ["q_proj"]),
    ("target_modules", "*"),
    ("lora_alpha", float("nan")),
]


def edited(tmp_path, **fields):
    """A copy of an adapter's folder with changed fields of adapter_config.json."""
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "queries_and_values", folder, dirs_exist_ok=True)
    values = json.loads((ADAPTERS / "queries_and_values/adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(GOLDEN / "llama")
    (folder / "adapter_config.json").write_text(json.dumps(values | fields))
    return folder


@pytest.mark.parametrize(("field", "value"), [*REFUSED.items(), *MORE])
def test_a_field_that_changes_what_is_computed_is_refused_by_name(field, value, tmp_path):
    folder = edited(tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        models.load(folder)
    if field != "task_type":  # which asks for a class of the whole model
        with pytest.raises(ValueError, match=f"^{field}: expected"):
            models.load_adapter(folder, models.load(GOLDEN / "llama")[0])


def test_every_field_that_is_not_neutral_has_a_row_above():
    assert set(adapter_fields.MUST_BE) <= set(REFUSED)


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_is_empty_is_passed_over(value, tmp_path):
    assert_close(ours(*models.load(edited(tmp_path, a_field_of_tomorrow=value))), golden("queries_and_values"))


def test_neutral_fields_change_nothing(tmp_path):
    fields = {"lora_dropout": 0.3, "peft_version": "9", "inference_mode": False, "revision": "main"}
    found = models.load(edited(tmp_path, **fields, auto_mapping={"base_model_class": "LlamaForCausalLM"}))
    assert_close(ours(*found), golden("queries_and_values"))


def test_trained_embeddings_and_other_tensors_are_refused_by_name(tmp_path):
    folder = edited(tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.model.embed_tokens.weight": jnp.zeros((61, 32))}, file)
    with pytest.raises(ValueError, match=r"^embed_tokens: .*model\.embed_tokens\.weight"):
        models.load(folder)
    save_file(tensors | {"base_model.model.lm_head.lora_A.weight": jnp.zeros((2, 32))}, file)
    with pytest.raises(ValueError, match=r"found \['lm_head\.lora_A\.weight'\]"):
        models.load(folder)
    many = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_A.weight": jnp.zeros((2, 32)) for i in range(40)}
    save_file(tensors | many, file)
    with pytest.raises(ValueError, match=r"and 28 more") as error:
        models.load(folder)
    assert str(error.value).count("lora_A") == 10
    save_file({key.removeprefix("base_model."): leaf for key, leaf in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"names that begin with 'base_model\.model\.'"):
        models.load(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .*adapter_model\.bin"):
        models.load(folder)


def test_wrappers_in_the_names_of_an_adapters_tensors_are_left_out(tmp_path):
    folder = edited(tmp_path)
    file = folder / "adapter_model.safetensors"
    save_file({key.replace("model.model.", "model._orig_mod.model."): x for key, x in load_file(file).items()}, file)
    assert_close(ours(*models.load(folder)), golden("queries_and_values"))


# Where a base is found ------------------------------------------------------------------------------------------------


def test_a_base_is_named_by_the_adapter_or_in_its_place(tmp_path, monkeypatch):
    for name, value in {"from_here": "base", "beside": "../beside_base"}.items():
        folder = edited(tmp_path / name, base_model_name_or_path=value)
        target = tmp_path / "base" if name == "from_here" else folder.parent / "beside_base"
        shutil.copytree(GOLDEN / "llama", target)
        monkeypatch.chdir(tmp_path)
        assert_close(ours(*models.load(folder)), golden("queries_and_values"))
    monkeypatch.chdir(tmp_path)
    lost = edited(tmp_path / "lost", base_model_name_or_path="gone/nowhere/at/all")
    with pytest.raises(ValueError, match=r"base_model_name_or_path: .*'gone/nowhere/at/all'.*@BASE_DIR"):
        models.load(lost)
    for found in (models.load(f"{lost}@{GOLDEN / 'llama'}"), models.load(lost, base=GOLDEN / "llama")):
        assert_close(ours(*found), golden("queries_and_values"))
    with pytest.raises(ValueError, match=r"base_model_name_or_path: expected a base"):
        models.load(edited(tmp_path / "none", base_model_name_or_path=None))
    with pytest.raises(ValueError, match=r"base: expected one base"):
        models.load(f"{lost}@{GOLDEN / 'llama'}", base=GOLDEN / "llama")
    with pytest.raises(ValueError, match=r"base: expected with an adapter's folder"):
        models.load(GOLDEN / "llama", base=GOLDEN / "llama")
    with pytest.raises(ValueError, match=r"k_proj|lora_B\.weight: expected shape"):
        models.load(f"{lost}@{GOLDEN / 'qwen3'}")


def test_a_place_is_read_with_folders_that_hold_an_at_sign(tmp_path):
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a").mkdir()
    assert sources.split_source(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), "")
    assert sources.split_source(f"{tmp_path}/a@b@c") == (f"{tmp_path}/a", "b@c")
    assert sources.split_source("owner/adapter@owner/base") == ("owner/adapter", "owner/base")
    assert sources.split_source("owner/model") == ("owner/model", "")


def test_adapters_are_stacked_on_an_adapter(tmp_path):
    """The second was trained on the merged first: both are merged, in float32."""
    lm, params = models.load(GOLDEN / "llama")
    first = models.load_adapter(ADAPTERS / "queries_and_values", lm)[::-1]
    second = models.load_adapter(ADAPTERS / "layers", lm)[::-1]
    folder = edited(tmp_path, base_model_name_or_path=str(ADAPTERS / "layers"))
    found = models.load(folder)[1]
    expected = models.lora.merge(models.lora.merge(params, *first), *second)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
    assert sources.find_source(folder).folders == (folder, ADAPTERS / "layers", ADAPTERS / "layers/../../golden/llama")


def test_adapters_that_name_each_other_and_folders_of_two_kinds_are_refused(tmp_path):
    folder = edited(tmp_path)
    with pytest.raises(ValueError, match=r"found .* again"):
        models.load(edited(tmp_path, base_model_name_or_path=str(folder)))
    shutil.copy(GOLDEN / "llama/model.safetensors", folder)
    with pytest.raises(ValueError, match="found the weights of both"):
        models.load(folder)


# Scores and lm_heads --------------------------------------------------------------------------------------------------


def test_a_score_makes_a_reward_model_of_a_language_model(tmp_path):
    lm, _ = models.load(ADAPTERS / "score_of_a_language_model")
    assert lm.config.head == models.Head("reward")
    folder = tmp_path / "scoreless"
    shutil.copytree(ADAPTERS / "score_of_a_language_model", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("base_model.model.score.weight")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"modules_to_save: expected a score"):
        models.load(f"{folder}@{GOLDEN / 'qwen2'}")
    with pytest.raises(ValueError, match=r"modules_to_save: .*models\.load"):
        models.load_adapter(ADAPTERS / "score", models.load(GOLDEN / "llama_reward")[0])


@pytest.mark.parametrize("pad", ["</s>", {"content": "</s>", "special": True}, "cat", None, "gone"])
def test_a_score_is_read_by_the_pad_id_of_the_tokenizer_beside_the_adapter(pad, tmp_path):
    """As TRL leaves a reward model: an adapter and the tokenizer by whose pad id it was trained."""
    folder = tmp_path / "adapter"
    shutil.copytree(ADAPTERS / "score", folder)
    added = [{"id": 7, "content": "</s>", "special": True}]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": {"vocab": {"cat": 9}}}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    source = f"{folder}@{GOLDEN / 'llama_reward'}"
    own = 9 if pad == "cat" else 7
    if pad in (None, "gone"):
        assert models.load(source)[0].config.pad_id == models.load(GOLDEN / "llama_reward")[0].config.pad_id
        return
    with pytest.warns(UserWarning, match=f"the pad id {own} of the adapter's tokenizer"):
        assert models.load(source)[0].reward_pad_id == own


def test_a_head_of_another_kind_is_not_saved_beside_an_adapter(tmp_path):
    for head, match in (
        ("value", "head: expected None"),
        (None, "head: expected None"),
        ("reward", "head/score/kernel"),
    ):
        lm, _ = tiny_lm(0, head)
        adapter = models.lora.init(jax.random.key(0), lm, models.Lora(2))
        wrong = {"score": {"kernel": jnp.zeros((3, 1))}}
        with pytest.raises(ValueError, match=match):
            models.save_adapter(tmp_path / "a", lm, models.Lora(2), adapter, head=wrong)


def test_several_adapters_are_stacked_with_the_scales_of_their_modules():
    lm, params = models.load(GOLDEN / "llama")
    found = [models.load_adapter(ADAPTERS / name, lm) for name in ("patterns_rslora", "queries_and_values")]
    stacked = models.lora.stack([adapter for _, adapter in found], [spec for spec, _ in found])
    for i, name in enumerate(("patterns_rslora", "queries_and_values")):
        one = {**params, "lora": jax.tree.map(lambda x, i=i: x[i], stacked)}
        assert_close(ours(lm, one), golden(name))


def test_an_lm_head_of_its_own_unties_the_embedding(tmp_path):
    lm, params = models.load(ADAPTERS / "lm_head_tied")
    assert not lm.config.tie_embeddings
    models.save(tmp_path / "whole", lm, params)
    assert_close(ours(*models.load(tmp_path / "whole")), golden("lm_head_tied"))


def test_bfloat16_is_reached_by_one_rounding(tmp_path):
    found = models.load(ADAPTERS / "rslora", dtype="bfloat16")[1]
    wide = models.load(ADAPTERS / "rslora")[1]
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide))


def test_rslora_divides_by_the_root_of_the_rank(tmp_path):
    lm, _ = tiny_lm(0)
    spec = models.Lora(4, alpha=6.0, rslora=True)
    assert spec.scale == 3.0
    adapter = models.lora.init(jax.random.key(0), lm, spec)
    models.save_adapter(tmp_path / "a", lm, spec, adapter)
    assert models.load_adapter(tmp_path / "a", lm)[0] == spec
