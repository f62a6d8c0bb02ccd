"""train.rl as a user runs it, and dpo of an adapter beside it."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import advantages, data, decoding, models, policies, shaping
from jaxalign.prompts import prompt_batch
from jaxalign.training import job, logging, rl_rewards
from jaxalign.training import rl as rl_parts
from jaxalign.training.rl import PromptRow, collate_prompts
from jaxalign.training.rl_options import RewardOptions
from jaxalign.worlds import opinions
from tests.conftest import on_devices
from train import calibrate, dpo, rl, sft, world

GOLD = f"{__name__}:lengths"
ROOT = pathlib.Path(__file__).parent.parent
PROMPTS, LIMIT, K = 8, 6, 4
calls = {"count": 0}


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    """Letters of the response: a reward in which nearly every sample differs."""
    return [len(text) / 10 for text in responses]


def some(prompts: list[str], responses: list[str]) -> list[float]:
    """NaN for the prompts with an odd number of letters."""
    return [
        float("nan") if len(prompt) % 2 else float(len(text)) for prompt, text in zip(prompts, responses, strict=True)
    ]


def broken(prompts: list[str], responses: list[str]) -> list[float]:
    """NaN for all from the second call on."""
    calls["count"] += 1
    return [float("nan") if calls["count"] > 1 else float(len(text)) for text in responses]


def broken_once(prompts: list[str], responses: list[str]) -> list[float]:
    """NaN in the second call."""
    calls["count"] += 1
    return [float("nan") if calls["count"] == 2 else float(len(text)) for text in responses]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """A tiny world, base/ and a calibration table/ of K samples under the true utility."""
    folder = tmp_path_factory.mktemp("rl")
    sizes = ("--texts", "64", "--pairs", "16", "--held-out", "4", "--layers", "1", "--width", "16")
    world.main(["--out", str(folder / "world"), *sizes])
    new = ("--architecture", str(folder / "world/config.json"), "--tokenizer", str(folder / "world/tokenizer"))
    short = ("--steps", "2", "--batch-size", "8", "--max-length", "64")
    sft.main(["--data", str(folder / "world/texts.jsonl"), *new, *short, "--out", str(folder / "base")])
    asked = opinions.prompts()[:PROMPTS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    calibrate.main([*table_options(folder), "--out", str(folder / "table")])
    return folder


def table_options(folder: pathlib.Path) -> list[str]:
    given = {"base": folder / "base/model", "prompts": folder / "prompts.jsonl", "reward": GOLD, "samples": K}
    given |= {"max-new-tokens": LIMIT, "max-length": 64, "shard": 3, "decode-batch": 8}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def options(folder: pathlib.Path, *more: str, reward: str = GOLD) -> list[str]:
    given = {"model": folder / "base/model", "prompts": folder / "prompts.jsonl", "reward": reward, "steps": 2}
    given |= {"max-new-tokens": LIMIT, "max-length": 64, "batch-size": 2, "samples": 4, "validation": 0.3}
    given |= {"learning-rate": 1e-3, "log-every": 1}
    return [*(text for name, value in given.items() for text in (f"--{name}", str(value))), *more]


RUNS = {
    "rloo": (),
    "grpo": ("--algorithm", "grpo", "--kl", "k3", "--dtype", "bfloat16", "--lora-rank", "2"),
    "ppo": ("--algorithm", "ppo", "--minibatches", "2", "--passes", "2"),
    "lora": ("--lora-rank", "2", "--accumulate", "2", "--target-kl", "0.5"),
    "exact kl": ("--kl", "exact", "--passes", "2"),
    "exact kl, adapter, bfloat16": ("--kl", "exact", "--lora-rank", "2", "--dtype", "bfloat16", "--algorithm", "ppo"),
    "ppo with lora": ("--algorithm", "ppo", "--lora-rank", "2"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_a_language_model_and_says_reward_and_kl_before_and_after(name, files, tmp_path, capsys):
    # The table was made in float32, and is not that of bfloat16 rewards.
    table = () if "bfloat16" in RUNS[name] else ("--calibration", str(files / "table"))
    command = [*options(files, *RUNS[name], *table, "--transform", "exp:3")]
    rl.main([*command, "--peak-tflops", "0.5", "--out", str(tmp_path / "run")])
    assert "next: python -m eval.decode" in capsys.readouterr().out.splitlines()[-1]
    lm, params = models.load(tmp_path / "run/model")
    before = models.load(files / "base/model")[1]
    assert lm.config.head is None
    assert jax.tree.structure(params) == jax.tree.structure(before)
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(before), strict=True)]
    assert max(moved) > 0
    assert np.isfinite(moved).all()
    if name == "grpo":
        # The adapter goes into the float32 weights: what it does not reach is not rounded to bfloat16.
        assert min(moved) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    for field in ("score", "score_before", "reward", "reward_before", "kl", "kl_95", "beta"):
        assert np.isfinite(summary[field])
    assert summary["kl"] > 0
    rows = logging.read(tmp_path / "run/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tflops_per_second"] / 0.5)
        assert 0 < row["mfu"] < 1
        assert "flops" not in row
    # At the first iteration the policy is the reference, and what it draws is on its own terms.
    assert abs(rows[0]["kl"]) < (0.1 if "bfloat16" in RUNS[name] else 1e-4)
    if name == "lora":
        # The adapter is kept by itself, and beta follows the KL to its target.
        spec, adapter = models.load_adapter(tmp_path / "run/adapter", lm)
        merged = models.lora.merge(before, adapter, spec)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), params, merged)
        expected = advantages.adapt_beta(rows[0]["beta"], kl=rows[0]["kl"], target=0.5)
        assert rows[1]["beta"] == pytest.approx(float(expected), rel=1e-6)
        assert rows[1]["beta"] < rows[0]["beta"]


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_no_ratio_is_clipped_in_bfloat16_where_each_sample_serves_one_update(algorithm, files, tmp_path):
    small = ("--ratio-clip", "1e-8", "--dtype", "bfloat16", "--accumulate", "2", "--algorithm", algorithm)
    rl.main([*options(files, *small), "--out", str(tmp_path / "run")])
    for row in logging.read(tmp_path / "run/metrics.jsonl"):
        assert row["clipped"] == 0
        # The passes that draw and that learn round differently, which is measured.
        assert 0 < row["mismatch"] <= row["mismatch_max"] < 0.5


@pytest.mark.parametrize("algorithm", ["rloo", "ppo", "exact"])
def test_no_ratio_is_clipped_in_bfloat16_before_the_policy_moves(algorithm, files, tmp_path):
    # A rate so small that no parameter moves: any ratio but 1 is rounding.
    kind = ("--kl", "exact") if algorithm == "exact" else ("--algorithm", algorithm)
    small = ("--ratio-clip", "1e-8", "--dtype", "bfloat16", "--learning-rate", "1e-30", "--minibatches", "2", *kind)
    rl.main([*options(files, *small, "--passes", "2", "--accumulate", "2"), "--out", str(tmp_path / "run")])
    for row in logging.read(tmp_path / "run/metrics.jsonl"):
        assert row["clipped"] == row["clipped_first"] == 0
        assert 0 <= row["mismatch"] <= row["mismatch_max"] < 0.5
        assert 0 <= row["sampler_kl"] < 0.01


def test_weights_of_the_sampler_are_told(files, tmp_path):
    given = ("--algorithm", "grpo", "--dtype", "bfloat16", "--passes", "2", "--sampler-clip", "1.0")
    rl.main([*options(files, *given), "--out", str(tmp_path / "run")])
    assert all(0 < row["sampler_clipped"] < 1 for row in logging.read(tmp_path / "run/metrics.jsonl"))
    with pytest.raises(ValueError, match=r"sampler_clip: expected with ratios by token .* found 1\.0 with rloo"):
        rl.main([*options(files, "--sampler-clip", "1.0"), "--out", str(tmp_path / "refused")])
    with pytest.raises(ValueError, match="sampler_weights: expected with --sampler-clip"):
        rl.main([*options(files, "--sampler-weights", "response"), "--out", str(tmp_path / "refused")])


def test_a_run_that_goes_on_is_the_uninterrupted_one(files, tmp_path, monkeypatch):
    command = options(files, "--steps", "3", "--save-every", "1")
    rl.main([*command, "--out", str(tmp_path / "whole")])
    kept = rl_parts.make_iteration

    def stops(*arguments, **named):
        step = kept(*arguments, **named)

        def once(state, batch, frozen):
            if int(state.step) == 2:
                raise KeyboardInterrupt
            return step(state, batch, frozen)

        return once

    monkeypatch.setattr(rl_parts, "make_iteration", stops)
    with pytest.raises(KeyboardInterrupt):
        rl.main([*command, "--out", str(tmp_path / "cut")])
    monkeypatch.undo()
    rl.main([*command, "--out", str(tmp_path / "cut")])
    whole, cut = (models.load(tmp_path / name / "model")[1] for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)


def test_a_batch_with_a_reward_that_is_no_number_is_dropped_and_counted(files, tmp_path, capsys):
    calls["count"] = 0
    command = options(files, "--steps", "3", "--validation", "0", reward=f"{__name__}:broken_once")
    rl.main([*command, "--out", str(tmp_path / "run")])
    assert "dropped iteration 2: rewards that are not finite for prompts" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/summary.json").read_text())["dropped_iterations"] == 1
    rows = logging.read(tmp_path / "run/metrics.jsonl")
    assert [row["dropped"] for row in rows] == [0, 1, 1]


def test_three_such_batches_in_a_row_stop_the_run_and_name_the_prompts(files, tmp_path):
    calls["count"] = 0
    command = options(files, "--steps", "9", "--validation", "0", reward=f"{__name__}:broken")
    with pytest.raises(FloatingPointError, match=r"3 batches in a row, the last for prompts \[\d"):
        rl.main([*command, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--samples", "1"), "samples: expected at least 2 for rloo"),
        (("--beta", "0"), "beta: expected a finite value > 0"),
        (("--minibatches", "3"), "minibatches: expected"),
        (("--transform", "exp:0"), "transform: expected one of"),
        (("--bound", "2"), "bound: expected with --calibration"),
        (("--max-length", "8"), "max_length: expected at least"),
        (("--transform", "log"), "transform: expected log with --calibration"),
        (("--transform", "bon_fp:2"), "transform: expected bon_fp:2 with --calibration"),
        (("--transform", "won_fp:2", "--calibration", "x", "--target-kl", "1"), "won_fp:2, solved for one beta"),
    ],
)
def test_bad_options_are_named(files, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        rl.main([*options(files, *change), "--out", str(tmp_path / "run")])


MESH = """
from train import rl
rl.main({})
"""


def test_four_devices_train_as_one(files, tmp_path):
    command = [*options(files, "--calibration", str(files / "table")), "--batch-size", "4", "--steps", "3"]
    rl.main([*command, "--out", str(tmp_path / "one")])
    on_devices(MESH.format([*command, "--mesh", "data=4", "--out", str(tmp_path / "four")]))
    one, four = (logging.read(tmp_path / f"{run}/metrics.jsonl") for run in ("one", "four"))
    assert len(one) == len(four) == 3
    for a, b in zip(one, four, strict=True):
        for name in ("loss", "reward", "kl", "grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_composed_reward_is_shaped_after_it_is_transformed_and_calibrated(files, tmp_path):
    options = RewardOptions(reward=GOLD, calibration=str(files / "table"), transform="exp:3", beta=0.5)
    lm, params = models.load(files / "base/model")
    tokenizer = models.tokenizer(str(files / "base/model"))
    asked = [tokenizer(p)["input_ids"] for p in opinions.prompts()[:PROMPTS]]
    given = [data.Prompt(p, ids, p) for p, ids in zip(opinions.prompts(), asked, strict=False)]
    begin = job.StartedModel(lm, params, tokenizer)
    settings = {"base": str(files / "base/model"), "dtype": "float32", "max_new_tokens": LIMIT}
    prompts = prompt_batch(asked, length=12)
    drawn = decoding.sample(
        policies.language_model(lm), params, jax.random.key(5), prompts, max_new_tokens=LIMIT, eos_ids=lm.config.eos_ids
    )
    text = decoding.join(prompts, drawn)
    # The rows of the prompts, and the same rows as they are numbered where a prompt comes again.
    for index in (jnp.arange(PROMPTS, dtype=jnp.int32), jnp.arange(PROMPTS, dtype=jnp.int32) + 2 * PROMPTS):
        plain, shaped = (
            rl_rewards.compose(dataclasses.replace(options, bound=bound), begin, given, **settings)
            for bound in (0.0, 2.0)
        )
        score = np.asarray(plain.raw(plain.raw_params, *text, index))
        with np.load(files / "table/table.npz") as table:
            base = table["reward"]
        c = ((base < score[:, None]) + 0.5 * (base == score[:, None])).mean(axis=1)
        phi = lambda c: np.expm1(3 * c) / np.expm1(3)  # noqa: E731
        np.testing.assert_allclose(plain.reward(plain.params, *text, index), phi(c), rtol=1e-5)
        own = phi(((base[:, None] < base[:, :, None]) + 0.5 * (base[:, None] == base[:, :, None])).mean(axis=2))
        threshold = np.asarray(shaping.optimal_threshold(own, gain=4.0))
        np.testing.assert_allclose(shaped.params["map"]["threshold"], threshold, rtol=1e-5)
        paid = shaped.reward(shaped.params, *text, index)
        np.testing.assert_allclose(paid, 2.0 * (phi(c) > threshold), rtol=1e-6)
    assert 0 < float(paid.sum()) < 2 * PROMPTS


def test_a_prompt_that_comes_again_in_a_batch_draws_something_else():
    rows = [
        PromptRow([5, 6], 3),
        PromptRow([7], 1),
        PromptRow([5, 6], 3),
        PromptRow([5, 6], 3),
    ]
    found = collate_prompts(rows, length=4, count=10)
    np.testing.assert_array_equal(found["index"], [3, 1, 13, 23])
    np.testing.assert_array_equal(found["row"], [3, 1, 3, 3])


def test_held_out_prompts_without_a_reward_are_left_out_and_counted(files, tmp_path, capsys):
    command = options(files, "--steps", "1", "--validation", "0.5", "--batch-size", "8", reward=f"{__name__}:some")
    rl.main([*command, "--out", str(tmp_path / "run")])
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 < found["without_reward"] < found["validation_rows"]
    assert np.isfinite(found["reward"])
    assert "left out: rewards that are not finite for held-out prompts" in capsys.readouterr().out


def test_training_raises_the_reward(files, tmp_path):
    """Longer words pay more: 30 iterations at a small beta."""
    command = options(files, "--steps", "30", "--batch-size", "4", "--samples", "8", "--beta", "0.01")
    rl.main([*command, "--learning-rate", "2e-2", "--out", str(tmp_path / "run")])
    rows = logging.read(tmp_path / "run/metrics.jsonl")
    first, last = (np.mean([row["reward"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.5


def test_dpo_of_an_adapter_starts_at_its_reference(files, tmp_path):
    """The weights under the adapter are the reference: the first loss is log 2, and model/ is base and adapter."""
    given = ["--data", str(files / "world/pairs.jsonl"), "--model", str(files / "base/model"), "--validation", "0.3"]
    short = ["--steps", "2", "--batch-size", "4", "--max-length", "64", "--log-every", "1", "--learning-rate", "1e-2"]
    dpo.main([*given, *short, "--lora-rank", "2", "--out", str(tmp_path / "run")])
    rows = logging.read(tmp_path / "run/metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert rows[0]["margin"] == 0
    lm, base = models.load(files / "base/model")
    spec, adapter = models.load_adapter(tmp_path / "run/adapter", lm)
    assert any(np.any(b) for _, b in models.lora.pairs(adapter).values())
    merged = models.lora.merge(base, adapter, spec)
    found = models.load(tmp_path / "run/model")[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), found, merged)
