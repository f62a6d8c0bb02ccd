"""Weighted sums of rewards, as options name them: --reward "DIR - 0.1 * MODULE:FUNCTION"."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest

from eval import decode
from jaxalign import commands, rewards
from jaxalign.training import rollouts, tables
from tests.conftest import VOCAB, on_devices, tiny_lm
from tests.test_eval_decode import arguments, folders, methods, read, tokenizer

__all__ = ["folders"]  # a fixture

LETTERS = f"{__name__}:letters"
MALFORMED = ("0.5*a + b", "a + - b", "+ a", "a -- b", "a +b", " * a", "b +  * a", "1e-50 * a", "1e39 * a")


def letters(prompts: list[str], responses: list[str]) -> list[float]:
    return [len(text) / 10 for text in responses]


def test_a_sum_is_read_term_by_term(tmp_path):
    assert rewards.parse_reward("a/b") == ((1.0, "a/b"),)
    assert rewards.parse_reward(" 1 * a ") == ((1.0, "a"),)
    assert rewards.parse_reward("0.5 * a + b - 2e-1 * m.n:f") == ((0.5, "a"), (1.0, "b"), (-0.2, "m.n:f"))
    # Signs within names, as hub names and versions have them, are no signs of a sum.
    assert rewards.parse_reward("org/model-v1+x - org/m-2") == ((1.0, "org/model-v1+x"), (-1.0, "org/m-2"))
    (tmp_path / "a + b").mkdir()
    assert rewards.parse_reward(str(tmp_path / "a + b")) == ((1.0, str(tmp_path / "a + b")),)


@pytest.mark.parametrize("spec", ["", "a + ", "x * a", "0 * a", "nan * a", "inf * a", "2 * ", "- 0.1 * a", *MALFORMED])
def test_what_is_no_sum_is_refused(spec):
    with pytest.raises(ValueError, match="gold: expected"):
        rewards.parse_reward(spec, name="gold")


def test_a_trainers_reward_is_the_weighted_sum_of_its_terms(folders):
    lm, _ = tiny_lm(0, num_layers=1)
    spec = f"{folders['reward']} + 0.5 * {folders['gold']} - 3 * {LETTERS}"
    reward, params = rollouts.open_reward(spec, lm, tokenizer(), dtype="float32")
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, VOCAB, (4, 7)), jnp.int32)
    text = tokens, jnp.ones((4, 7), bool), jnp.full(4, 3), jnp.arange(4)
    each = [rollouts.open_reward(name, lm, tokenizer(), dtype="float32") for _, name in rewards.parse_reward(spec)]
    one, two, three = (np.asarray(r(p, *text)) for r, p in each)
    np.testing.assert_allclose(reward(params, *text), one + 0.5 * two - 3 * three, rtol=1e-5)
    assert np.abs(one).min() > 0
    assert np.ptp(three) > 0


def test_a_table_is_of_one_sum(folders):
    made = lambda reward: tables.made_with(  # noqa: E731
        folders["base"], reward, tokenizer(), [[1, 2]], max_new_tokens=4, dtype="float32"
    )["reward"]
    one, two = folders["reward"], folders["gold"]
    assert made(one) == tables.folder_digest(one)
    different = [one, two, f"{one} + {two}", f"{one} - {two}", f"0.5 * {one} + {two}", f"{one} + {LETTERS}", LETTERS]
    different += [f"0.1234567 * {one} + {two}", f"0.12345671 * {one} + {two}"]
    assert len({made(spec) for spec in different}) == len(different)
    assert made(f"{one} + 1.0 * {two}") == made(f"{two} + {one}")


def test_rl_maximises_a_calibrated_sum_and_its_table_names_the_next_command(folders, tmp_path, capsys):
    shared = {
        "prompts": folders["prompts.txt"],
        "reward": f"{folders['reward']} + {folders['gold']} - 0.1 * {LETTERS}",
        "max_new_tokens": 4,
        "max_length": 32,
    }
    table = str(tmp_path / "table")
    commands.run("calibrate", **shared, base=folders["base"], samples=4, out=table)
    assert f"--reward '{shared['reward']}' --calibration" in capsys.readouterr().out.splitlines()[-1]
    summary = commands.run(
        "rl",
        **shared,
        model=folders["base"],
        calibration=table,
        steps=2,
        batch_size=2,
        samples=2,
        validation=0.4,
        out=str(tmp_path / "run"),
    )
    assert np.isfinite(summary["reward"])
    # The folders of the sum are inputs of the run.
    names = [name for name, *_ in json.loads((tmp_path / "run/inputs.json").read_text())["files"]]
    assert all(any(name.startswith(folders[role] + "/") for name in names) for role in ("reward", "gold"))


def test_responses_are_scored_by_a_sum(folders, tmp_path):
    assert rewards.reward_roles(folders["gold"], name="gold") == {"gold": folders["gold"]}
    assert rewards.reward_roles(LETTERS, name="gold") == rewards.reward_roles("", name="gold") == {}
    spec = f"2 * {folders['reward']} - 0.5 * {LETTERS}"
    assert rewards.reward_roles(spec, name="gold") == {f"gold {folders['reward']}": folders["reward"]}
    decode.main(arguments(folders, tmp_path / "out", "--reward", folders["reward"], "--gold", spec))
    for record in read(tmp_path / "out"):
        (less,) = letters([], [record["response"]])
        assert record["gold"] == pytest.approx(2 * record["reward"] - 0.5 * less, abs=1e-4)
    decode.main(arguments(folders, tmp_path / "one", "--reward", f"1 * {LETTERS}", *methods("best_of_n@3")))
    for record in read(tmp_path / "one"):
        assert record["reward"] == pytest.approx(letters([], [record["response"]])[0], abs=1e-6)
    best, base = ([r["reward"] for r in read(tmp_path / "one") if r["method"] == m] for m in ("best_of_3", "base"))
    assert np.mean(best) > np.mean(base)
    # Roll-outs are scored by any reward, on the host where it is a program.
    given = (*methods(f"transfer:{folders['arm']}@0.1"), "--reward", f"1 * {LETTERS}", "--top-k", "3")
    decode.main(arguments(folders, tmp_path / "transfer", *given))
    found, base = (
        [r["reward"] for r in read(tmp_path / "transfer") if r["method"].startswith(m)] for m in ("transfer", "base")
    )
    assert np.mean(found) > np.mean(base)


MESH = """
from eval import decode
decode.main({})
"""


def test_a_sum_of_models_and_programs_scores_on_a_mesh(folders, tmp_path):
    spec = f"{folders['reward']} - 0.1 * {LETTERS}"
    command = arguments(folders, tmp_path / "one", "--reward", folders["reward"], "--gold", spec)
    decode.main(command)
    command[command.index(str(tmp_path / "one"))] = str(tmp_path / "two")
    on_devices(MESH.format([*command, "--mesh", "data=2"]), count=2)
    one, two = ([record["gold"] for record in read(tmp_path / name)] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


def test_methods_maximise_a_sum_where_no_gradient_is_needed(folders, tmp_path):
    spec = f"0.5 * {folders['reward']} - 0.1 * {LETTERS}"
    command = ["--model", folders["base"], "--prompts", folders["prompts.txt"], "--reward", spec]
    command += ["--max-new-tokens", "4", "--out", str(tmp_path / "run"), "--gold", folders["reward"]]
    decode.main([*command, "--method", "best_of_n@3"])
    for row in json.loads((tmp_path / "run/results.json").read_text()):
        assert row["reward"] < 0.5 * row["gold"]
    kept = json.loads(next((tmp_path / "run").glob("best*/inputs.json")).read_text())
    assert any(name.startswith(folders["reward"] + "/") for name, *_ in kept["files"])
    with pytest.raises(ValueError, match="reward: expected the folder of a reward model, whose gradient ggro reads"):
        decode.main([*command, "--method", "ggro@4"])
