"""eval.decode: what it refuses, and what it says of it."""

from __future__ import annotations

import json
import os

import jax
import jax.numpy as jnp
import pytest

from eval import decode
from jaxalign import models
from tests.conftest import tiny_lm
from tests.test_eval_decode import arguments, command, folders, read, tokenizer

__all__ = ["folders"]  # a fixture


def test_greedy_reports_its_own_kind_of_kl(folders, tmp_path):
    decode.main(arguments(folders, tmp_path / "out", "--temperature", "0"))
    for record in read(tmp_path / "out"):
        assert record["kl_kind"] == "mean -log pi_ref(y)"
        assert record["kl"] == pytest.approx(-record["log_prob_ref_sum"], abs=1e-4)


def test_appended_vocabulary_rows_are_cut_and_said(folders, tmp_path):
    with pytest.warns(UserWarning, match="13 rows cut to the common vocabulary of 11"):
        decode.main(arguments(folders, tmp_path / "out", "--critic", f"autoregressive:{folders['wide']}"))


def test_bad_input_names_its_field_and_writes_nothing(folders, tmp_path):
    out = tmp_path / "out"
    arm = ("--critic", f"autoregressive:{folders['arm']}")
    cases = [
        (("--critic", f"autoregressive:{folders['other']}"), "id 9"),
        ((*arm, "--beta", "0"), "beta"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--max-new-tokens", "60"), "context of 64"),
        ((*arm, "--top-k", "12"), "top_k: expected at most the vocabulary's 11"),
        ((*arm, "--sum", "--weights", "1", "2"), "weights"),
        (("--critic", "nothing"), "critic: expected KIND:DIR"),
        (("--critic", f"args:{folders['arm']}"), "scalar head"),
        (("--best-of-n", "4"), "best_of_n"),
        (("--prompts", str(tmp_path / "none.txt")), "prompts"),
        (("--dtype", "int8"), "dtype"),
        (("--mesh", "rows=2"), "mesh"),
        (("--no-include-base",), "critic"),
        ((*arm, "--beta", "nan"), "beta"),
        ((*arm, "--beta", "1", "inf"), "beta"),
        ((*arm, "--beta", "1", "1"), "beta: expected each value once"),
        ((*arm, *arm), "critic: expected each value once"),
        (("--beta", "2"), "beta: expected a --critic"),
        (("--top-k", "5"), "top_k: expected a --critic"),
        (("--top-k", "-1", *arm), "top_k"),
        ((*arm, "--weights", "1"), "weights: expected --sum"),
        ((*arm, "--critic", f"args:{folders['reward']}", "--sum"), "critics of one kind"),
        (("--sum",), "sum"),
        (("--embedding", "tests.test_eval_decode:nothing"), "embedding: expected MODULE:FUNCTION"),
        (("--block", "4"), "block: expected a --critic"),
        ((*arm, "--block", "0"), "block: expected at least 1"),
        ((*arm, "--block", "4", "--candidates", "1"), "candidates: expected at least 2"),
        ((*arm, "--candidates", "4"), "candidates: expected with --block"),
        ((*arm, "--block", "4", "--temperature", "0"), "block: expected a temperature > 0"),
        (("--critic", f"transfer:{folders['arm']}"), "reward: expected a folder, which a transfer critic scores by"),
        ((*arm, "--rollouts", "2"), "rollouts: expected a transfer critic"),
        ((*arm, "--lookahead", "0"), "lookahead: expected a transfer critic"),
        (("--critic", f"transfer:{folders['arm']}", "--reward", folders["reward"], "--rollouts", "0"), "rollouts"),
        (("--critic", f"transfer:{folders['reward']}", "--reward", folders["reward"]), "expected a language model"),
        (("--temperature", "-1"), "temperature"),
        (("--batch-size", "0"), "batch_size"),
        (("--best-of-n", "2", "--reward", folders["reward"], "--temperature", "0"), "best_of_n: .*temperature > 0"),
        (("--model", folders["reward"]), "model: expected a language model"),
        (("--critic", f"autoregressive:{folders['reward']}"), "critic autoregressive:.*: expected a language model"),
        (("--reward", folders["base"]), "reward: expected a model with a scalar head"),
        (("--gold", folders["q"]), "gold: expected a model with a scalar head"),
        (("--reward", str(tmp_path / "nowhere")), "path: expected a folder"),
        (("--prompts", str(tmp_path / "empty.txt")), "prompts: expected at least one prompt"),
        (("--prompts", str(tmp_path / "blank.txt")), "blank.txt:2: expected a prompt"),
        (("--prompts", str(tmp_path / "long.txt")), "prompts: .*context of 64, found a prompt of 61 tokens"),
        (("--mesh", "data=1000"), "mesh"),
    ]
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text("the cat\n\n")
    (tmp_path / "long.txt").write_text("the cat\n" + "cat " * 61 + "\n")
    for extra, match in cases:
        with pytest.raises(ValueError, match=match):
            decode.main(arguments(folders, out, *extra))
        assert not out.exists(), extra


def test_a_lost_eos_and_a_broken_reward_are_refused(folders, tmp_path):
    with (
        pytest.warns(UserWarning, match="cut to the common vocabulary"),
        pytest.raises(ValueError, match=r"model: expected EOS ids within .* 11 tokens, found \[12\]"),
    ):
        decode.main(arguments(folders, tmp_path / "out", "--model", folders["ends"], "--reward", folders["reward"]))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="gold: expected finite rewards"):
        decode.main(arguments(folders, tmp_path / "out", "--gold", folders["nan"]))
    assert not (tmp_path / "out" / "responses.jsonl").exists()


def test_help_and_unknown_options():
    found = command("--help")
    assert found.returncode == 0
    for option in ("--model", "--critic", "--beta", "--config", "--dtype", "--mesh", "--out"):
        assert option in found.stdout
    found = command("--model", "m", "--prompts", "p", "--out", "o", "--betta", "1")
    assert found.returncode == 2
    assert "--betta" in found.stderr


def test_a_model_without_a_distribution_is_refused_and_writes_no_record(folders, tmp_path):
    """NaN weights used to decode to token 0 with a KL of 0."""
    lm, params = tiny_lm(0, num_layers=1)
    models.save(tmp_path / "broken", lm, jax.tree.map(lambda x: x * jnp.nan, params), tokenizer=tokenizer())
    critic = f"autoregressive:{tmp_path / 'broken'}"
    with pytest.raises(
        ValueError, match=rf"{critic}: expected finite log_prob, found NaN or infinity for prompts \[0, "
    ):
        decode.main(arguments(folders, tmp_path / "out", "--critic", critic))
    assert not (tmp_path / "out" / "responses.jsonl").exists()
    records = (tmp_path / "out" / "responses.jsonl.partial").read_text().splitlines()
    assert {json.loads(line)["method"] for line in records} == {"base"}


def test_a_run_is_not_continued_with_other_weights(folders, tmp_path):
    lm, params = tiny_lm(0, num_layers=1)
    models.save(tmp_path / "model", lm, params, tokenizer=tokenizer())
    given = arguments(folders | {"base": str(tmp_path / "model")}, tmp_path / "out")
    decode.main(given)
    decode.main(given)
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"^inputs: .*model.safetensors"):
        decode.main(given)
