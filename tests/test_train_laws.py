"""train.value of laws of the reward, as a user runs it: what its folder tells, and what is then refused."""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eval import decode
from jaxalign import decoding, losses, models, policies, prompt_batch
from jaxalign.evaluation import loading
from jaxalign.evaluation.options import DecodeOptions
from jaxalign.evaluation.specs import parse_method
from jaxalign.training import dry_run, law_sources, laws, roll_in, tables, value_options, values
from jaxalign.training.options import RolloutOptions
from tests.conftest import tiny_lm
from tests.test_train_scripts import files, options
from train import value

__all__ = ["files"]  # a fixture


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> pathlib.Path:
    """A run folder of a Q head of laws."""
    out = tmp_path_factory.mktemp("laws") / "run"
    laws_run(files, out)
    return out


def decode_options(files, folder, out, *more: str) -> list[str]:
    """eval.decode's options for two tokens of two readings of a head."""
    given = {
        "--model": str(files / "base/model"),
        "--prompts": str(files / "prompts.jsonl"),
        "--reward": "jaxalign.worlds.opinions:golds",
        "--max-new-tokens": "8",
        "--batch-size": "6",
        "--out": str(out),
    }
    given |= dict(zip(more[::2], more[1::2], strict=True))
    methods = [f"distribution:{folder}:soft@1", f"value:{folder}@1"]
    return [x for pair in given.items() for x in pair] + [x for method in methods for x in ("--method", method)]


def test_a_folder_of_laws_tells_what_they_are_of_and_its_own_run_is_decoded(trained, files, tmp_path, capsys):
    about = json.loads((trained / "model" / law_sources.FILE).read_text())
    assert about["base"] == tables.folder_digest(files / "base/model")
    assert about["reward"].startswith("jaxalign.worlds.opinions:golds ")
    told = {"temperature": 1.0, "max_new_tokens": 8, "rollouts_per_prompt": 2, "clipped_share": 0.0}
    assert {name: about[name] for name in told} == told
    moved = tmp_path / "moved"  # names of folders do not count
    shutil.copytree(trained / "model", moved)
    decode.main(decode_options(files, moved, tmp_path / "out", "--max-new-tokens", "8"))
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == 3
    (moved / law_sources.FILE).unlink()
    capsys.readouterr()
    run = DecodeOptions(model=str(files / "base/model"), prompts="", out="", max_new_tokens=9)
    loading.check_laws(run, [parse_method(f"distribution:{moved}:soft@1")], None)
    assert f"note: {moved} has no laws.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "OTHER"), r"model: expected the base .* that the laws of .* are of, \w+, found \w+"),
        (("--reward", "jaxalign.worlds.opinions:gold"), r"reward: expected the reward .*golds .*found .*"),
        (("--reward", "2 * jaxalign.worlds.opinions:golds"), "reward: expected the reward"),
        (("--max-new-tokens", "9"), r"max_new_tokens: expected the max_new_tokens .* are of, 8, found 9"),
        (("--temperature", "0.7"), r"temperature: expected the temperature .* are of, 1.0, found 0.7"),
        (("--temperature", "0"), r"temperature: expected the temperature .* are of, 1.0, found 0.0"),
    ],
    ids=["base", "reward", "weight", "limit", "temperature", "greedy"],
)
def test_distribution_D11_laws_of_another_run_are_refused(more, message, trained, files, tmp_path):
    if "OTHER" in more:
        lm, params = models.load(files / "base/model")
        params["transformer"]["norm"]["scale"] = params["transformer"]["norm"]["scale"] + 1e-3
        models.save(tmp_path / "other", lm, params, tokenizer=models.tokenizer(str(files / "base/model")))
        more = ("--model", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=message):
        decode.main(decode_options(files, trained / "model", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:.*generation_config.json has")
@pytest.mark.parametrize(("fields", "found"), [({"top_p": 0.9}, "top_p=0.9"), ({"do_sample": False}, "0.0")])
def test_distribution_D11_a_generation_config_that_changes_the_draws_and_another_template_are_refused(
    fields, found, trained, files, tmp_path
):
    base = tmp_path / "base"
    shutil.copytree(files / "base/model", base)
    (base / "generation_config.json").write_text(json.dumps(fields))
    run = DecodeOptions(model=str(base), prompts="", out="", max_new_tokens=8, generation_config=True)
    specs = [parse_method(f"value:{trained / 'model'}@1")]
    tokenizer = models.tokenizer(str(base))
    with pytest.raises(ValueError, match=f"temperature: expected the temperature .* are of, 1.0, found .*{found}"):
        loading.check_laws(run, specs, tokenizer)
    (base / "generation_config.json").write_text(json.dumps({"temperature": 1.0, "top_k": 0}))
    loading.check_laws(run, specs, tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"model: expected the template .the chat template. that the laws of"):
        loading.check_laws(run, specs, tokenizer)


def laws_run(files, out, *more: str) -> None:
    """A short run of train.value that learns laws."""
    command = [*options("value", files), "--objective", "distribution", "--head", "q", "--head-size", "8"]
    value.main([*command, "--bins", "5", "--rank", "2", *more, "--out", str(out)])


def shards(folder: pathlib.Path) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(path)) for path in sorted((folder / "rollouts").glob("*.npz"))]


def test_rounds_roll_in_with_the_head_before_and_learn_from_all_rollouts(files, tmp_path):
    """An interruption in the last round, between two shards, goes on with the shard that is missing."""
    command = ("--rounds", "2", "--roll-in-beta", "0.5")
    laws_run(files, tmp_path / "run", *command)
    first, last = shards(tmp_path / "run/rounds/1"), shards(tmp_path / "run")
    assert not any(shard["start"].any() for shard in first)
    for one, two in zip(first, last, strict=True):
        np.testing.assert_array_equal(one["index"], two["index"])
        assert (two["start"] >= 0).all()
        assert (two["start"] < two["length"]).all()
    assert max(shard["start"].max() for shard in last) > 0
    found = json.loads((tmp_path / "run/summary.json").read_text())
    assert found["rollouts"] == 24
    alone = json.loads((tmp_path / "run/rounds/1/summary.json").read_text())
    assert alone["rollouts"] == 12
    for path in (tmp_path / "run/summary.json", tmp_path / "run/rollouts/00001.npz"):
        path.unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    kept = [(tmp_path / f"run/{name}").stat().st_mtime_ns for name in ("rollouts/00000.npz", "rounds/1/summary.json")]
    laws_run(files, tmp_path / "run", *command)
    again = [(tmp_path / f"run/{name}").stat().st_mtime_ns for name in ("rollouts/00000.npz", "rounds/1/summary.json")]
    assert kept == again
    assert json.loads((tmp_path / "run/summary.json").read_text()) == found
    for one, two in zip(last, shards(tmp_path / "run"), strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, two[name])
    # More steps of the first head would not be those whose draws the last one learns from.
    with pytest.raises(
        ValueError, match=r"^steps: expected . of the run in .*rounds/1, whose head writes .*, found 9;"
    ):
        laws_run(files, tmp_path / "run", *command, "--steps", "9")
    assert json.loads((tmp_path / "run/summary.json").read_text()) == found
    assert json.loads((tmp_path / "run/rounds/1/summary.json").read_text()) == alone


def test_a_roll_in_is_of_a_head_of_the_same_base_and_reward(trained, files, tmp_path, capsys):
    guided = ("--roll-in", str(trained / "model"), "--roll-in-beta", "1")
    with pytest.raises(dry_run.Told):
        laws_run(files, tmp_path / "shapes", *guided, "--dry-run")
    assert not (tmp_path / "shapes").exists()
    with pytest.raises(ValueError, match="reward: expected the reward"):
        laws_run(files, tmp_path / "other", *guided, "--reward", "2 * jaxalign.worlds.opinions:golds")
    with pytest.raises(ValueError, match="roll_in: expected the folder of a head of laws, found None"):
        laws_run(files, tmp_path / "base", "--roll-in", str(files / "base/model"), "--roll-in-beta", "1")
    with pytest.raises(ValueError, match=r"earlier: expected run folders of train\.value, found no roll-outs"):
        laws_run(files, tmp_path / "none", "--earlier", str(tmp_path))


def test_rewards_beyond_a_range_are_named_or_clipped_and_counted(files, tmp_path):
    ends = ("--reward-range", "-1.5,0")
    with pytest.raises(ValueError, match=r"reward: expected rewards in \[-1.5, 0\], or --clip-reward, found -2 for"):
        laws_run(files, tmp_path / "run", *ends)
    laws_run(files, tmp_path / "clipped", *ends, "--clip-reward")
    rewards = np.concatenate([shard["reward"] for shard in shards(tmp_path / "clipped")])
    share = float((np.abs(rewards + 0.75) > 0.75).mean())
    assert share > 0
    summary = json.loads((tmp_path / "clipped/summary.json").read_text())
    assert (summary["clipped_share"], summary["support"]) == (share, [-1.5, 0.0])
    assert json.loads((tmp_path / "clipped/model" / law_sources.FILE).read_text())["clipped_share"] == share


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1, found 0"),
        ({"rounds": 2}, "roll_in_beta: expected > 0 with --roll-in or --rounds alone, found 0"),
        ({"roll_in_beta": 1.0}, "roll_in_beta: expected > 0 with --roll-in or --rounds alone, found 1"),
        ({"rounds": 2, "roll_in_beta": -1.0}, "roll_in_beta: expected a finite value"),
        ({"rounds": 2, "roll_in_beta": 1.0, "objective": "fudge"}, "rounds: expected --objective distribution"),
        ({"clip_reward": True, "objective": "fudge"}, "clip_reward: expected --objective distribution"),
        ({"clip_reward": True}, "reward_range: expected LOW,HIGH or --atoms with --clip-reward, found neither"),
        ({"reward_range": "1,-1"}, "reward_range: expected LOW,HIGH"),
        ({"reward_range": "1"}, "reward_range: expected LOW,HIGH"),
        ({"reward_range": "0,1", "atoms": "0,1"}, "reward_range: expected none beside --atoms"),
        ({"bin_width": 0.1}, "reward_range: expected LOW,HIGH with --bin-width, which divides it, found none"),
        ({"bin_width": -0.1, "reward_range": "0,1"}, "bin_width: expected a finite value"),
        ({"bin_width": 0.1, "reward_range": "0,1", "bins": 9}, "bins: expected none beside --bin-width, found 9"),
        ({"bin_width": 0.1, "objective": "fudge"}, "bin_width: expected --objective distribution"),
    ],
)
def test_options_of_laws_that_are_refused(more, message):
    given = value_options.ValueOptions(**{"objective": "distribution"} | more)
    with pytest.raises(ValueError, match=message):
        value_options.check_value_options(given, RolloutOptions(base="b", prompts="p", reward="r"), model="b")


@pytest.mark.parametrize(
    ("ends", "width", "bins"), [("0,1", 0.1, 11), ("-1.5,0", 0.5, 4), ("0,1", 0.3, 5), ("0,1", 7, 2)]
)
def test_a_width_of_bins_is_the_largest_distance_of_points(ends, width, bins):
    given = value_options.ValueOptions(objective="distribution", reward_range=ends, bin_width=width)
    assert value_options.number_of_bins(given) == bins
    head = values.value_head(given, tiny_lm(2)[0].config)
    assert len(head.distribution.support) == bins


def test_rounds_make_their_own_rollouts():
    given = value_options.ValueOptions(objective="distribution", rounds=2, roll_in_beta=1.0)
    read = RolloutOptions(base="b", prompts="p", reward="r", rollouts="other")
    with pytest.raises(ValueError, match="rounds: expected roll-outs that this run makes, found --rollouts"):
        value_options.check_value_options(given, read, model="b")


def test_the_base_goes_on_from_given_tokens():
    """The first tokens are as given, and the others have the base's probabilities; a row that is given none is free."""
    lm, params = tiny_lm(2)
    base = policies.language_model(lm)
    prompts = prompt_batch([[5, 6, 7], [8, 9], [4]])
    own = roll_in.BegunParams(params, jnp.array([[3, 4, 0, 0], [6, 0, 0, 0], [0, 0, 0, 0]]), jnp.array([2, 1, 0]))
    found = decoding.sample(roll_in.begun(base), own, jax.random.key(3), prompts, max_new_tokens=4, eos_ids=())
    np.testing.assert_array_equal(found.tokens[0, :2], [3, 4])
    assert int(found.tokens[1, 0]) == 6
    given = np.arange(4) < np.array([2, 1, 0])[:, None]
    np.testing.assert_array_equal(np.asarray(found.log_prob)[given], 0)
    plain = decoding.log_prob(base, params, jax.random.key(0), prompts, found.tokens, found.mask)
    np.testing.assert_allclose(np.asarray(found.log_prob)[~given], np.asarray(plain.log_prob)[~given], atol=1e-5)


def test_laws_are_learned_from_where_the_base_writes():
    """A row that others began counts from the prefix of `start` tokens on, the law after the last of them included."""
    lm = models.with_head(
        tiny_lm(0)[0], models.Head("q", hidden_size=8, distribution=models.Distribution((-1.0, 0.0, 1.0), rank=2))
    )
    params = lm.init(jax.random.key(1))
    tokens, mask = jnp.asarray([[5, 6, 7, 3, 1, 2]]), jnp.ones((1, 6), bool)
    batch = {"tokens": tokens, "mask": mask, "loss_mask": mask.at[0, :2].set(False), "reward": jnp.asarray([0.4])}
    target = np.asarray(losses.two_hot(0.4, support=(-1.0, 0.0, 1.0)))
    hidden = lm.hidden(params, tokens)
    own = -np.asarray(lm.head(params, hidden))[0, 1:] @ target  # prefixes of 0 to 4 tokens
    after = -np.asarray(lm.laws_after(params, hidden[:, :-1], tokens[:, 1:, None]))[0, 1:, 0] @ target  # of 1 to 4
    for start in range(4):
        total, aux = laws.laws(lm)(params, batch | {"start": jnp.asarray([start])}, None)
        assert aux.weight == 5 - start
        expected = (own[start:].sum() + after[max(start - 1, 0) :].sum()) / (5 - start)
        np.testing.assert_allclose(total, expected, rtol=1e-5)
