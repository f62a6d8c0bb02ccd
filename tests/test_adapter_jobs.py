"""Adapters named where a model may stand on a command line: as base, policy, critic, reward and start of a training."""

from __future__ import annotations

import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import pytest
from safetensors.flax import load_file, save_file

from eval import decode
from jaxalign import _runs, models
from jaxalign.data import tokenizers
from jaxalign.evaluation import specs
from jaxalign.training import job, tables
from jaxalign.training.options import ModelOptions
from tests.conftest import tiny_lm
from train import arm, calibrate, reward_model, sft

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran"]  # with <pad>, <eos> and <unk> the tiny model's 11
SPEC = models.Lora(2, alpha=6.0)


def adapter_of(lm, seed):
    return jax.tree.map(lambda x: x + 0.2, models.lora.init(jax.random.key(seed), lm, SPEC))


def reward_adapter(folder: pathlib.Path, lm, base: str) -> None:
    """An adapter of peft's SEQ_CLS form on a language model: products and a score."""
    models.save_adapter(folder, lm, SPEC, adapter_of(lm, 7), base=base)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    score = 0.5 * jax.random.normal(jax.random.key(8), (1, lm.config.hidden_size))
    save_file(load_file(file) | {"base_model.model.score.weight": score}, file)
    changed = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    config.write_text(json.dumps(json.loads(config.read_text()) | changed))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> pathlib.Path:
    """base/; tuned/ and reward/, adapters that name it; lost/, an adapter whose base is gone; merged folders of all."""
    root = tmp_path_factory.mktemp("adapters")
    words = tokenizers.word_level(WORDS)
    lm, params = tiny_lm(0, num_layers=1, eos_ids=(1,))
    models.save(root / "base", lm, params, tokenizer=words)
    for seed, (name, base) in enumerate({"tuned": "../base", "lost": "gone/for/good"}.items()):
        models.save_adapter(root / name, lm, SPEC, adapter_of(lm, seed), base=base)
        whole = models.lora.merge(params, adapter_of(lm, seed), SPEC)
        models.save(root / f"{name}_merged", lm, whole, tokenizer=words)
    reward_adapter(root / "reward", lm, "../base")
    models.save(root / "reward_merged", *models.load(root / "reward"), tokenizer=words)
    (root / "prompts.txt").write_text("the cat\na dog ran on the mat\n")
    rows = [{"prompt": "the cat", "response": "sat on the mat"}, {"prompt": "a dog", "response": "ran"}]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [
        {"prompt": "the cat", "chosen": "sat", "rejected": "ran"},
        {"prompt": "a", "chosen": "mat", "rejected": "a"},
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return root


def decoded(root, out, model, reward, *methods):
    options = [part for method in methods for part in ("--method", method)]
    decode.main(
        [
            *(
                "--model",
                str(model),
                "--reward",
                str(reward),
                "--prompts",
                str(root / "prompts.txt"),
                "--out",
                str(out),
            ),
            *("--max-new-tokens", "4", "--batch-size", "2", "--include-base", *options),
        ]
    )
    files = sorted(pathlib.Path(out).glob("*/responses.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return sorted((row["prompt"], row["response"], row["reward"]) for row in rows)


def test_adapters_decode_as_their_merged_models_do(root, tmp_path):
    base, lost, reward = root / "base", f"{root / 'lost'}@{root / 'base'}", root / "reward"
    adapters = decoded(
        root,
        tmp_path / "adapters",
        root / "tuned",
        f"{reward}@{base}",
        f"policy:{lost}",
        f"genarm:{lost}@0.7",
        f"args:{reward}@0.5,2",
        "best_of_n@2",
    )
    whole = decoded(
        root,
        tmp_path / "whole",
        root / "tuned_merged",
        root / "reward_merged",
        f"policy:{root / 'lost_merged'}",
        f"genarm:{root / 'lost_merged'}@0.7",
        f"args:{root / 'reward_merged'}@0.5,2",
        "best_of_n@2",
    )
    assert len(adapters) == len(whole) == 12
    assert [row[:2] for row in adapters] == [row[:2] for row in whole]
    assert [row[2] for row in adapters] == pytest.approx([row[2] for row in whole], rel=1e-4)
    assert (tmp_path / "adapters/policy_lost").is_dir()


def test_training_starts_from_an_adapter_and_its_adapter_is_put_on_it(root, tmp_path):
    start = f"{root / 'lost'}@{root / 'base'}"
    short = ("--steps", "1", "--batch-size", "2", "--max-length", "16", "--validation", "0", "--learning-rate", "1e-3")
    sft.main(["--model", start, "--data", str(root / "texts.jsonl"), "--out", str(tmp_path / "sft"), *short])
    assert models.load(tmp_path / "sft/model")[0] == models.load(start)[0]
    lora = ("--lora-rank", "2", "--lora-alpha", "4")
    arm.main(["--model", start, "--data", str(root / "pairs.jsonl"), "--out", str(tmp_path / "arm"), *short, *lora])
    chain, merged = models.load(tmp_path / "arm/adapter")[1], models.load(tmp_path / "arm/model")[1]
    for a, b in zip(jax.tree.leaves(chain), jax.tree.leaves(merged), strict=True):
        assert jnp.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_reward_model_is_trained_as_an_adapter_and_a_score(root, tmp_path):
    """On a language model: adapter/ names it and holds the products and the score, model/ is the same, merged."""
    short = ("--steps", "2", "--batch-size", "2", "--max-length", "16", "--validation", "0", "--learning-rate", "1e-2")
    lora = ("--lora-rank", "2", "--lora-alpha", "4", "--dtype", "bfloat16")
    start = ["--model", str(root / "base"), "--data", str(root / "pairs.jsonl"), *short, *lora]
    reward_model.main([*start, "--out", str(tmp_path / "run")])
    lm, params = models.load(tmp_path / "run/model")
    with pytest.warns(UserWarning, match="the pad id 0 of the adapter's tokenizer takes the place of the base's None"):
        found, adapted = models.load(tmp_path / "run/adapter")
    assert found == lm
    assert lm.config.head == models.Head("reward")
    assert lm.reward_pad_id == 0
    chex.assert_trees_all_close(adapted, params, rtol=1e-5, atol=1e-6)
    base, trained = models.load(root / "base")[1]["transformer"], params["transformer"]
    assert jnp.any(trained["layer_0"]["down"]["kernel"] != base["layer_0"]["down"]["kernel"])
    assert jnp.all(trained["embedding"] == base["embedding"])
    started = job.start(
        ModelOptions(model=str(root / "base")), lambda _: lm.config.head, seed=0, dtype="float32", max_length=16
    )
    new = started.params["head"]["score"]["kernel"]
    assert jnp.any(new != params["head"]["score"]["kernel"])


def test_a_reward_model_that_pools_by_the_mean_is_read_so_from_both_folders(root, tmp_path):
    short = ("--steps", "1", "--batch-size", "2", "--max-length", "16", "--validation", "0", "--learning-rate", "1e-2")
    start = ["--data", str(root / "pairs.jsonl"), *short]
    lora = ("--model", str(root / "base"), "--lora-rank", "2", "--pooling", "mean")
    reward_model.main([*start, *lora, "--out", str(tmp_path / "run")])
    lm, params = models.load(tmp_path / "run/model")
    assert lm.config.head == models.Head("reward", pooling="mean")
    with pytest.warns(UserWarning, match="the pad id 0 of the adapter's tokenizer"):
        found, adapted = models.load(tmp_path / "run/adapter")
    assert found == lm
    chex.assert_trees_all_close(adapted, params, rtol=1e-5, atol=1e-6)
    for pooling, kept in (((), "mean"), (("--pooling", "last"), "last")):  # a reward model keeps its own unless told
        reward_model.main([*start, "--model", str(tmp_path / "run/model"), *pooling, "--out", str(tmp_path / kept)])
        assert models.read_config(tmp_path / kept / "model").reward_pooling == kept
    values = json.loads((tmp_path / "run/model/config.json").read_text()) | {"classifier_pooling": "cls"}
    with pytest.raises(ValueError, match="classifier_pooling: expected 'mean' or none, found 'cls'"):
        models.config_from_hf(values)


def test_the_head_of_a_frozen_reward_model_is_trained_alone(root, tmp_path):
    short = ("--steps", "2", "--batch-size", "2", "--max-length", "16", "--validation", "0", "--learning-rate", "1e-2")
    start = ["--model", str(root / "base"), "--data", str(root / "pairs.jsonl"), *short, "--frozen"]
    reward_model.main([*start, "--weight-decay", "0.5", "--out", str(tmp_path / "run")])
    lm, params = models.load(tmp_path / "run/model")
    base = models.load(root / "base")[1]["transformer"]
    chex.assert_trees_all_equal(params["transformer"], {name: base[name] for name in params["transformer"]})
    new = job.start(
        ModelOptions(model=str(root / "base")), lambda _: lm.config.head, seed=0, dtype="float32", max_length=16
    )
    assert jnp.any(new.params["head"]["score"]["kernel"] != params["head"]["score"]["kernel"])
    with pytest.raises(ValueError, match="lora_rank: expected 0 with --frozen, found 2"):
        reward_model.main([*start, "--lora-rank", "2", "--out", str(tmp_path / "other")])


def test_rollouts_come_from_an_adapter_scored_by_an_adapter(root, tmp_path):
    """train.calibrate: the table of two adapters is that of their merged models, and names both by their weights."""
    short = ("--samples", "2", "--max-new-tokens", "3", "--shard", "2", "--decode-batch", "4", "--max-length", "16")
    asked = ("--prompts", str(root / "prompts.txt"), *short)
    for name, base, reward in (("adapters", "tuned", "reward"), ("whole", "tuned_merged", "reward_merged")):
        calibrate.main(
            ["--base", str(root / base), "--reward", str(root / reward), "--out", str(tmp_path / name), *asked]
        )
    found, expected = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("adapters", "whole"))
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_notices_that_the_base_of_its_adapter_has_changed(root, tmp_path):
    lm, params = models.load(root / "base")
    models.save(tmp_path / "base", lm, params)
    models.save_adapter(tmp_path / "adapter", lm, SPEC, adapter_of(lm, 0), base="../base")
    read = models.source_folders(str(tmp_path / "adapter"))
    assert [pathlib.Path(name).resolve() for name in read] == [tmp_path / "adapter", tmp_path / "base"]
    before = _runs._inputs(read), tables.folder_digest(tmp_path / "adapter")
    models.save(tmp_path / "base", lm, jax.tree.map(lambda x: x + 1, params), overwrite=True)
    after = _runs._inputs(read), tables.folder_digest(tmp_path / "adapter")
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert models.source_folders("owner/model") == ("owner/model",)
    assert models.source_folders("module:function") == ("module:function",)


def test_a_folder_of_the_bases_name_that_holds_no_model_is_not_taken_for_it(root, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where "../base" is a folder of something else
    found = [pathlib.Path(name).resolve() for name in models.source_folders(str(root / "tuned"))]
    assert found == [root / "tuned", root / "base"]


def test_the_sign_of_a_base_is_told_from_that_of_strengths(root, monkeypatch):
    monkeypatch.chdir(root)
    for text, folder, strengths in (
        ("genarm:tuned@base@0.5,2", "tuned@base", (0.5, 2.0)),
        ("policy:tuned@base", "tuned@base", ()),
        (f"genarm:tuned@{root}/base@1", f"tuned@{root}/base", (1.0,)),
        ("genarm:tuned@1e-1", "tuned", (0.1,)),
    ):
        found = specs.parse_method(text)
        assert [*found.folders.values()] == [folder]
        assert found.strengths == strengths
    assert specs.parse_method("policy:tuned@base").slug == "policy_tuned"
    with pytest.raises(ValueError, match="numbers after @"):
        specs.parse_method("genarm:tuned@nowhere")
