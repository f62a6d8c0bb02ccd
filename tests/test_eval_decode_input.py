"""eval.decode: what it refuses, and what it says of it."""

from __future__ import annotations

import os

import jax.numpy as jnp
import pytest

from eval import decode
from jaxalign import evaluation, models
from jaxalign.evaluation.options import drop_stages
from tests.conftest import tiny_lm
from tests.test_eval_decode import arguments, command, folders, methods, read, tokenizer

__all__ = ["folders"]  # a fixture


def test_greedy_reports_its_own_kind_of_kl(folders, tmp_path):
    decode.main(arguments(folders, tmp_path / "out", "--temperature", "0"))
    for record in read(tmp_path / "out"):
        assert record["kl_kind"] == "surprisal"
        assert record["kl"] == pytest.approx(-record["log_prob_ref_sum"], abs=1e-4)


def test_appended_vocabulary_rows_are_cut_and_said(folders, tmp_path):
    with pytest.warns(UserWarning, match="13 rows cut to the common vocabulary of 11"):
        decode.main(arguments(folders, tmp_path / "out", *methods(f"genarm:{folders['wide']}@1")))


def test_bad_input_names_its_field_and_writes_nothing(folders, tmp_path):
    out = tmp_path / "out"
    arm, reward = f"genarm:{folders['arm']}", ("--reward", folders["reward"])
    cases = [
        (methods(f"genarm:{folders['other']}@1"), "id 9"),
        (methods(f"{arm}@0"), "method: expected positive strengths"),
        (methods(f"{arm}@nan"), "method: expected positive strengths"),
        (methods(f"{arm}@1,inf"), "method: expected positive strengths"),
        (methods(f"{arm}@1,1"), "method: expected each strength once"),
        (methods(f"{arm}@1", f"{arm}@1,2"), "method: expected each method and strength once"),
        (methods("nothing@1"), "method: expected a kind among"),
        (methods("nothing.at.all:here@1"), "method: expected MODULE:FUNCTION"),
        (methods(f"0 * {arm}@1"), "method: expected a weight other than 0"),
        (methods(f"{arm} + args:{folders['reward']}@1"), "critics of one kind"),
        (methods("blockwise:@2"), "method: expected blockwise:CRITIC:DIR"),
        (methods(f"args:{folders['arm']}@1"), "scalar head"),
        (methods("best_of_n@4"), "reward: expected a reward, which best_of_n@4 maximises, found none"),
        (methods(f"transfer:{folders['arm']}@1"), "reward: expected a reward, which transfer:.*@1 maximises"),
        (methods(f"blockwise:transfer:{folders['arm']}@2"), "reward: expected a reward, which blockwise:transfer"),
        ((*methods(f"{arm}@1"), "--top-k", "12"), "top_k: expected at most the vocabulary's 11"),
        (("--top-k", "-1"), "top_k"),
        (("--max-new-tokens", "0"), "max_new_tokens"),
        (("--max-new-tokens", "60"), "context of 64"),
        (("--prompts", str(tmp_path / "none.txt")), "prompts"),
        (("--dtype", "int8"), "dtype"),
        (("--mesh", "rows=2"), "mesh"),
        (("--no-include-base",), "method: expected something to decode"),
        (("--embedding", "tests.test_eval_decode:nothing"), "embedding: expected MODULE:FUNCTION"),
        (("--continuations", "0"), "continuations: expected at least 1, found 0"),
        (("--drop", "4"), "drop: expected TOKENS:SHARE with tokens that rise below max_new_tokens"),
        (("--drop", "4:0.5", "2:0.5"), "drop: expected TOKENS:SHARE with tokens that rise below max_new_tokens"),
        (("--drop", "4:1.5"), "drop: expected TOKENS:SHARE"),
        (("--block-size", "0"), "block_size: expected lengths of at least 1 token"),
        (("--block-size", "2", "2"), "block_size: .*each once"),
        (methods(f"blockwise:{arm}@1"), "method: expected at least 2 to choose from"),
        ((*methods(f"blockwise:{arm}@4"), "--temperature", "0"), "temperature: expected one > 0 for blockwise"),
        ((*methods("best_of_n@2"), *reward, "--temperature", "0"), "temperature: expected one > 0 for best_of_n@2"),
        ((*methods("smc@1"), *reward, "--temperature", "0.5"), "temperature: expected 1 for smc@1, found 0.5"),
        (("--rollouts", "0"), "rollouts"),
        ((*methods(f"transfer:{folders['reward']}@1"), *reward), "transfer:.*: expected a language model"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "temperature"),
        (("--reward-threshold", "inf"), "reward_threshold"),
        (("--batch-size", "0"), "batch_size"),
        (("--model", folders["reward"]), "model: expected a language model"),
        (methods(f"genarm:{folders['reward']}@1"), "genarm:.*: expected a language model"),
        (("--reward", folders["base"]), "reward: expected a model with a scalar head"),
        (("--gold", folders["q"]), "gold: expected a model with a scalar head"),
        (("--reward", str(tmp_path / "nowhere")), "path: expected a folder"),
        (("--prompts", str(tmp_path / "empty.txt")), "prompts: expected at least one prompt"),
        (("--prompts", str(tmp_path / "blank.txt")), "blank.txt:2: expected a prompt"),
        (("--prompts", str(tmp_path / "long.txt")), "prompts: .*context of 64, found a prompt of 61 tokens"),
        (("--prompts", str(tmp_path / "table.doc")), "prompts: expected a file that ends in"),
        (("--mesh", "data=1000"), "mesh"),
    ]
    (tmp_path / "table.doc").write_text("the cat\n")
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
    assert not list((tmp_path / "out").glob("*/responses.jsonl"))


def test_help_and_unknown_options():
    found = command("--help")
    assert found.returncode == 0
    for option in ("--model", "--method", "--top-k", "--config", "--dtype", "--mesh", "--out"):
        assert option in found.stdout
    found = command("--model", "m", "--prompts", "p", "--out", "o", "--betta", "1")
    assert found.returncode == 2
    assert "--betta" in found.stderr


def test_a_model_without_a_distribution_is_refused_and_writes_no_record(folders, tmp_path):
    """Weights whose products overflow; NaN would decode to token 0 with a KL of 0."""
    lm, params = tiny_lm(0, num_layers=1)
    body = params["transformer"]
    broken = {"transformer": body | {"lm_head": 3e38 * jnp.sign(body["lm_head"])}}
    models.save(tmp_path / "broken", lm, broken, tokenizer=tokenizer())
    method = f"genarm:{tmp_path / 'broken'}"
    with pytest.raises(
        ValueError, match=rf"{method}: expected finite log_prob, found NaN or infinity for prompts \[0, "
    ):
        decode.main(arguments(folders, tmp_path / "out", *methods(f"{method}@1")))
    assert {record["method"] for record in read(tmp_path / "out")} == {"base"}
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_run_is_not_continued_with_other_weights(folders, tmp_path):
    lm, params = tiny_lm(0, num_layers=1)
    models.save(tmp_path / "model", lm, params, tokenizer=tokenizer())
    given = arguments(folders | {"base": str(tmp_path / "model")}, tmp_path / "out")
    decode.main(given)
    decode.main(given)
    weights = tmp_path / "model" / "model.safetensors"
    size = weights.stat().st_size
    os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
    decode.main(given)  # the bytes are the same
    models.save(tmp_path / "model", lm, tiny_lm(1, num_layers=1)[1], tokenizer=tokenizer(), overwrite=True)
    assert weights.stat().st_size == size
    with pytest.raises(ValueError, match=r"^inputs: .*model.safetensors"):
        decode.main(given)


def columns(prompts: list[str], responses: list[str]) -> list[list[float]]:
    """A reward of a wrong shape: [N,1]."""
    return [[float(len(text))] for text in responses]


def words(prompts: list[str], responses: list[str]) -> list[str]:
    """A reward that gives no numbers."""
    return ["good" for _ in responses]


def flat(texts: list[str]) -> list[float]:
    """An embedding of one number per text."""
    return [1.0 for _ in texts]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            ("--gold", f"{__name__}:columns"),
            r"columns: expected one real number per text, shape \(2,\), found shape \(2, 1\)",
        ),
        (("--gold", f"{__name__}:words"), "words: expected one real number per text, .* found shape"),
        (("--reward", f"{__name__}:columns", "--method", "best_of_n@2"), "columns: expected one real number per text"),
        (("--gold", f"1 * {__name__}:words + 2 * {__name__}:columns"), "words: expected one real number per text"),
        (
            ("--embedding", f"{__name__}:flat"),
            r"^embedding: expected one vector per text, .* found \(2,\)",
        ),
    ],
)
def test_programs_that_give_something_else_are_named(options, match, folders, tmp_path):
    with pytest.raises(ValueError, match=match):
        decode.main(arguments(folders, tmp_path / "out", *options))


def test_options_that_no_method_reads_are_noted(folders, tmp_path, capsys):
    decode.main(arguments(folders, tmp_path / "out", "--rollouts", "2", "--top-k", "3"))
    assert "note: no method of this run reads --top-k, --rollouts" in capsys.readouterr().out
    decode.main(arguments(folders, tmp_path / "out", "--top-k", "3", *methods(f"genarm:{folders['arm']}@1")))
    assert "note: " not in capsys.readouterr().out


def test_stages_that_drop_samples_for_each_number_of_them():
    """A share that would drop none is passed over."""
    options = evaluation.DecodeOptions(
        model="", prompts="", out="", max_new_tokens=9, drop=("2:0.5", "4:0.25", "6:0.2")
    )
    found = {n: drop_stages(options, n) for n in (2, 8, 16)}
    assert found == {2: ((2, 1),), 8: ((2, 4), (4, 2), (6, 1)), 16: ((2, 8), (4, 4), (6, 3))}
