"""The training scripts as a user runs them: run folders, resuming, bad input, bfloat16, devices, transcripts."""

from __future__ import annotations

import json
import os
import pathlib
import signal

import chex
import jax
import numpy as np
import pytest

from eval import decode
from jaxalign import models, training
from jaxalign.data import preferences
from jaxalign.training import adapters, logging, profiling, rollouts
from jaxalign.worlds import files as files_of
from jaxalign.worlds import opinions
from tests.conftest import on_devices, tiny_lm
from train import arm, dpo, quickstart, reward_model, sft, value, world

SCRIPTS = {"sft": sft, "reward_model": reward_model, "arm": arm, "dpo": dpo, "value": value}
ROOT = pathlib.Path(__file__).parent.parent
SHORT = ("--steps", "2", "--batch-size", "8", "--max-length", "64", "--log-every", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """A tiny world, and base/: a model of two steps on it."""
    folder = tmp_path_factory.mktemp("files")
    sizes = ("--texts", "64", "--pairs", "48", "--held-out", "6", "--layers", "1", "--width", "16")
    world.main(["--out", str(folder / "world"), *sizes])
    sft.main([*options("sft", folder), "--out", str(folder / "base")])
    asked = opinions.prompts()[:6]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    return folder


def options(name: str, folder: pathlib.Path) -> list[str]:
    """The options of a short run of a script, all but --out."""
    if name == "sft":
        new = ("--architecture", str(folder / "world/config.json"), "--tokenizer", str(folder / "world/tokenizer"))
        return ["--data", str(folder / "world/texts.jsonl"), *new, *SHORT]
    base = str(folder / "base/model")
    if name == "value":
        rolls = (
            "--samples",
            "2",
            "--max-new-tokens",
            "8",
            "--shard",
            "2",
            "--decode-batch",
            "4",
            "--validation",
            "0.3",
        )
        judge = (
            "--validation",
            "0.3",
            "--reward",
            "jaxalign.worlds.opinions:golds",
            "--prompts",
            str(folder / "prompts.jsonl"),
        )
        return ["--base", base, *judge, *rolls, *SHORT]
    return ["--data", str(folder / "world/pairs.jsonl"), "--model", base, "--validation", "0.2", *SHORT]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_in_bfloat16_writes_its_folder_and_names_the_next_command(name, files, tmp_path, capsys):
    out = tmp_path / "run"
    command = [*options(name, files), "--out", str(out), "--dtype", "bfloat16"]
    SCRIPTS[name].main(command)
    last = capsys.readouterr().out.splitlines()[-1]
    assert str(out / "model") in last
    assert "next: python -m eval.decode" in last
    written = {path.name for path in out.iterdir()}
    assert {"model", "summary.json", "metrics.jsonl", "tensorboard", "config.json", "versions.json"} <= written
    _, params = models.load(out / "model")
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    rows = logging.read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    summary = json.loads((out / "summary.json").read_text())
    measured = {"sft": "validation_loss", "value": "squared_error"}.get(name, "pair_accuracy")
    assert np.isfinite(summary[measured])
    # The same command finds the run whole: nothing is computed again.
    before = (out / "model/model.safetensors").stat().st_mtime_ns
    SCRIPTS[name].main(command)
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (out / "model/model.safetensors").stat().st_mtime_ns == before


def test_a_profile_and_the_share_of_a_given_peak(files, tmp_path, capsys):
    out = tmp_path / "run"
    command = [*options("sft", files), "--out", str(out), "--peak-tflops", "0.5", "--validation", "0"]
    sft.main([*command, "--steps", "5", "--profile", "1"])
    printed = capsys.readouterr().out
    assert f"wrote {out / 'model'}, {out / 'profile'} and" in printed.splitlines()[-1]
    assert "traced, since" not in printed
    assert list((out / "profile").rglob("*.xplane.pb"))
    rows = logging.read(out / "metrics.jsonl")
    assert len(rows) == 5
    for row in rows:  # each with the tokens of its own step, the last too
        assert row["tokens_per_second"] > 0
        assert row["mfu"] == pytest.approx(row["tflops_per_second"] / 0.5)
        assert 0 < row["mfu"] < 1
    rate = rows[1]["tflops_per_second"] * 1e12 / rows[1]["tokens_per_second"]
    weights = sum(x.size for x in jax.tree.leaves(models.load(out / "model")[1]) if x.ndim > 1)
    assert 3 * weights < rate < 12 * weights  # operations of a token


def test_a_run_too_short_for_its_profile_says_so(tmp_path, capsys):
    with profiling.traced(tmp_path, 2) as (hooks,):
        hooks.after_step(1, jax.numpy.zeros(()))
    assert capsys.readouterr().out == "profile: 0 of 2 steps traced, since this start took 1\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_each_option_and_an_unknown_one_fails(name, capsys):
    with pytest.raises(SystemExit) as found:
        SCRIPTS[name].main(["--help"])
    assert found.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--learning-rate", "--max-length", "--mesh", "--dtype", "--seed", "[tokens]", "data=N"):
        assert option in shown
    with pytest.raises(SystemExit) as found:
        SCRIPTS[name].main(["--out", "x", "--learning-rat", "1"])
    assert found.value.code == 2


def test_a_run_that_was_asked_to_stop_goes_on_to_the_same_weights(files, tmp_path, capsys, monkeypatch):
    command = [*options("reward_model", files), "--steps", "4"]
    reward_model.main([*command, "--out", str(tmp_path / "whole")])
    seen = []
    pad = preferences.pad_pairs

    def stop_at_the_second(rows, *, length):
        seen.append(len(rows))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return pad(rows, length=length)

    monkeypatch.setattr(preferences, "pad_pairs", stop_at_the_second)
    with pytest.raises(SystemExit) as found:
        reward_model.main([*command, "--out", str(tmp_path / "stopped")])
    assert found.value.code == 143
    assert "stopped" in capsys.readouterr().out
    assert not (tmp_path / "stopped/summary.json").exists()
    monkeypatch.setattr(preferences, "pad_pairs", pad)
    reward_model.main([*command, "--out", str(tmp_path / "stopped")])
    both = [models.load(tmp_path / run / "model")[1] for run in ("whole", "stopped")]
    chex.assert_trees_all_equal(*both)


ADAPTER = ("--lora-rank", "2", "--lora-alpha", "4")


def test_an_adapter_is_trained_alone_and_its_run_goes_on_to_the_same_weights(files, tmp_path, capsys, monkeypatch):
    """In bfloat16: model/ is the frozen base plus adapter/, the optimizer keeps two moments of the adapter and no more,
    stopping and going on changes nothing, and the last line's command decodes."""
    create, states = training.create, []

    def note(params, optimizer):
        states.append(create(params, optimizer))
        return states[-1]

    monkeypatch.setattr(training, "create", note)
    command = [*options("arm", files), *ADAPTER, "--steps", "4", "--dtype", "bfloat16"]
    arm.main([*command, "--out", str(tmp_path / "whole")])
    last = capsys.readouterr().out.splitlines()[-1]
    lm, base = models.load(files / "base/model")
    spec, adapter = models.load_adapter(tmp_path / "whole/adapter", lm)
    assert spec == models.Lora(2, alpha=4.0)
    assert any(np.any(b) for _, b in models.lora.pairs(adapter).values())
    size = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    assert sum(leaf.size for leaf in jax.tree.leaves(states[0]) if leaf.shape) == 3 * size
    merged = models.load(tmp_path / "whole/model")[1]
    chex.assert_trees_all_close(merged, models.lora.merge(base, adapter, spec), rtol=1e-6, atol=1e-7)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((merged, adapter)))
    config = json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(files / "base/model")
    saved, pad = [], preferences.pad_pairs

    def stop_at_the_second(rows, *, length):
        saved.append(len(rows))
        if len(saved) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return pad(rows, length=length)

    monkeypatch.setattr(preferences, "pad_pairs", stop_at_the_second)
    with pytest.raises(SystemExit):
        arm.main([*command, "--out", str(tmp_path / "stopped")])
    monkeypatch.setattr(preferences, "pad_pairs", pad)
    arm.main([*command, "--out", str(tmp_path / "stopped")])
    for name, file in (("model", "model.safetensors"), ("adapter", "adapter_model.safetensors")):
        assert (tmp_path / "whole" / name / file).read_bytes() == (tmp_path / "stopped" / name / file).read_bytes()
    named = last.partition("next: python -m eval.decode ")[2].split()
    given = {"BASE": str(files / "base/model"), "FILE": str(files / "prompts.jsonl"), "DIR": str(tmp_path / "decoded")}
    decode.main([*(given.get(word, word) for word in named), "--max-new-tokens", "2", "--batch-size", "6"])
    assert (tmp_path / "decoded/results.json").exists()


def test_the_first_loss_of_an_adapter_is_the_bases_and_its_gradient_the_adapters(files, tmp_path):
    """b = 0: before the first step the model is the base; training all weights starts from the same loss."""
    rows = {}
    for name, extra in (("whole", ()), ("adapter", ADAPTER), ("down", (*ADAPTER, "--lora-targets", "down"))):
        arm.main([*options("arm", files), *extra, "--out", str(tmp_path / name)])
        rows[name] = logging.read(tmp_path / name / "metrics.jsonl")
    np.testing.assert_allclose(rows["adapter"][0]["loss"], rows["whole"][0]["loss"], rtol=1e-6)
    assert rows["adapter"][0]["grad_norm"] > rows["down"][0]["grad_norm"] > 0
    assert not (tmp_path / "whole/adapter").exists()
    spec = models.load_adapter(tmp_path / "down/adapter", models.load(files / "base/model")[0])[0]
    assert spec.targets == ("down",)


def test_a_loss_with_an_adapter_gets_the_base_as_its_frozen_model():
    """So that DPO's reference costs nothing, and stays what it was."""
    lm, params = tiny_lm(0)
    spec = models.Lora(2)
    adapter = jax.tree.map(lambda x: x + 1, models.lora.init(jax.random.key(0), lm, spec))
    seen = {}

    def loss(params, batch, frozen):
        seen.update(params=params, frozen=frozen)
        return batch

    assert adapters.with_adapter(loss, spec)(adapter, "batch", params) == "batch"
    assert seen["frozen"] is params
    assert seen["params"]["transformer"] is params["transformer"]
    assert "lora" in seen["params"]


def test_roll_outs_go_on_with_the_missing_shard_and_lose_or_repeat_no_prompt(files, tmp_path, monkeypatch):
    command = options("value", files)
    value.main([*command, "--out", str(tmp_path / "whole")])
    write, written = rollouts.write_shard, []

    def fail_at_the_second(*args):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(args)
        write(*args)

    monkeypatch.setattr(rollouts, "write_shard", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        value.main([*command, "--out", str(tmp_path / "stopped")])
    folder = tmp_path / "stopped/rollouts"
    assert [path.name for path in folder.iterdir()] == ["00000.npz"]
    before = (folder / "00000.npz").stat().st_mtime_ns
    monkeypatch.setattr(rollouts, "write_shard", write)
    value.main([*command, "--out", str(tmp_path / "stopped")])
    assert (folder / "00000.npz").stat().st_mtime_ns == before
    indices = []
    for shard in ("00000.npz", "00001.npz", "00002.npz"):
        whole, found = (np.load(tmp_path / run / "rollouts" / shard) for run in ("whole", "stopped"))
        indices += found["index"].tolist()
        for field in whole.files:
            np.testing.assert_array_equal(found[field], whole[field])
    assert indices == np.repeat(np.arange(6), 2).tolist()
    chex.assert_trees_all_equal(*(models.load(tmp_path / run / "model")[1] for run in ("whole", "stopped")))


@pytest.mark.parametrize(
    ("name", "extra", "match"),
    [
        ("sft", ("--epochs", "0"), "epochs: "),
        ("sft", ("--accumulate", "3"), "accumulate: expected a divisor of batch_size 8"),
        ("sft", ("--model", "x"), "found both"),
        ("sft", ("--mesh", "data=999"), "mesh: "),
        ("sft", ("--max-length", "1000"), "max_length: expected at most the model's context of 128"),
        ("sft", ("--data", "absent.jsonl"), r"absent\.jsonl"),
        ("reward_model", ("--model", "absent"), "absent"),
        ("arm", ("--beta-r", "0"), "beta_r: "),
        ("dpo", ("--beta", "0"), "beta: "),
        ("dpo", ("--label-smoothing", "0.5"), "label_smoothing: "),
        ("dpo", ("--loss", "ipo", "--label-smoothing", "0.1"), "label_smoothing: .* 0 for ipo"),
        ("arm", ("--lora-rank", "-1"), "lora_rank: expected at least 0"),
        ("arm", ("--lora-alpha", "2"), "lora_alpha: expected with --lora-rank"),
        ("arm", (*ADAPTER, "--lora-targets", "q"), r"lora_targets: .*'q'"),
        ("arm", ("--lora-rank", "99"), "rank: expected at most 16"),
        ("value", ("--objective", "cd_q"), "head: expected q"),
        ("value", ("--samples", "0"), "samples: "),
        ("value", ("--objective", "exceedance"), "bound: expected a value > 0"),
        ("value", ("--objective", "soft"), "beta: expected a value > 0"),
        ("value", ("--bound", "1", "--beta", "1", "--samples", "1"), "samples: expected at least 2"),
        ("value", ("--reward", "jaxalign.worlds.opinions:nothing"), "nothing"),
        ("value", ("--max-length", "9"), "max_length: "),
    ],
)
def test_bad_options_are_named(name, extra, match, files, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        SCRIPTS[name].main([*options(name, files), *extra, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run/model").exists()


def test_a_changed_prompt_file_is_not_mixed_with_old_roll_outs(files, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text((files / "prompts.jsonl").read_text())
    command = [*options("value", files), "--prompts", str(prompts), "--out", str(tmp_path / "run")]
    value.main(command)
    (tmp_path / "run/summary.json").unlink()
    prompts.write_text(json.dumps({"prompt": opinions.prompts()[9]}) + "\n")
    with pytest.raises(ValueError, match=r"inputs: .*prompts\.jsonl"):
        value.main(command)


DEVICES = """
from train import dpo, reward_model, sft
for script, options in ((sft, {sft!r}), (reward_model, {reward_model!r}), (dpo, {dpo!r})):
    script.main(options)
"""


def test_four_devices_give_the_losses_of_one(files, tmp_path):
    commands = {}
    for name in ("sft", "reward_model", "dpo"):
        command = [*options(name, files), "--steps", "3"]
        SCRIPTS[name].main([*command, "--out", str(tmp_path / f"one_{name}")])
        commands[name] = [*command, "--mesh", "data=4", "--out", str(tmp_path / f"four_{name}")]
    on_devices(DEVICES.format(**commands))
    for name in commands:
        one, four = (logging.read(tmp_path / f"{run}_{name}/metrics.jsonl") for run in ("one", "four"))
        assert len(one) == 3
        for a, b in zip(one, four, strict=True):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
            np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)


def test_the_tasks_of_the_world_hold_no_prompt_twice(tmp_path):
    for task in ("opinions", "summaries"):
        found = files_of.world_rows(task, texts=80, pairs=40, held_out=16, seed=0)
        asked = {name: {row["prompt"] for row in rows} for name, rows in found.items()}
        seen = asked["texts"] | asked["pairs"] | asked["prompts"]
        assert not seen & (asked["held_out"] | asked["drift"])
        assert not asked["held_out"] & asked["drift"]
        assert len(asked["held_out"]) == len(found["held_out"]) == 16
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="out: expected a new or empty folder"):
        world.run(world.Config(out=str(tmp_path / "full")))


def test_quickstart_refuses_unknown_presets(capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--out", "x", "--preset", "huge"])
    assert "huge" in capsys.readouterr().err + capsys.readouterr().out
