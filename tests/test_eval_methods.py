"""eval.decode as a user runs it: every kind of method, one more method later, an interruption, refusals."""

from __future__ import annotations

import json
import pathlib
import re

import numpy as np
import pytest

from eval import decode
from jaxalign import metrics, models
from jaxalign.evaluation import engine, methods, plots, results, specs, tilts
from jaxalign.models import Follower, Head
from tests.conftest import tiny_lm
from tests.test_eval_decode import tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    heads = {"base": None, "reward": "reward", "gold": "reward", "q": "q", "scalar": "value", "arm": None, "dpo": None}
    for seed, (name, head) in enumerate(heads.items()):
        models.save(root / name, *tiny_lm(seed, head, num_layers=1), tokenizer=tokenizer())
    lm, params = tiny_lm(9, "q", num_layers=1)
    assert lm.config.head is not None
    spec = Follower("exceedance", beta=0.5, bound=2.0)
    head = Head("q", hidden_size=lm.config.head.hidden_size, follower=spec)
    models.save(root / "exceedance_2", models.with_head(lm, head), params, tokenizer=tokenizer())
    # The base's own body under a value head: its hidden states are edited.
    body, (value_lm, value) = tiny_lm(0, num_layers=1)[1], tiny_lm(5, "value", num_layers=1)
    models.save(root / "re_control", value_lm, value | {"transformer": body["transformer"]}, tokenizer=tokenizer())
    (root / "prompts.txt").write_text("the cat\na dog ran on the mat\nthe dog and the cat sat\n")
    return {name: str(root / name) for name in [*heads, "exceedance_2", "re_control", "prompts.txt"]}


def command(folders, out, *methods: str, options: tuple[str, ...] = ()) -> list[str]:
    given = ["--model", folders["base"], "--reward", folders["reward"], "--gold", folders["gold"]]
    given += ["--second-gold", folders["reward"]]
    given += ["--prompts", folders["prompts.txt"], "--out", str(out), "--max-new-tokens", "4", "--batch-size", "3"]
    given += [
        "--num-steps",
        "2",
        "--num-particles",
        "3",
        "--max-tries",
        "3",
        "--gradient-steps",
        "2",
        "--top-k",
        "3",
        "--block-size",
        "2",
    ]
    return [*given, *options, *(part for method in methods for part in ("--method", method))]


def every_method(folders) -> list[str]:
    return [
        "best_of_n@2",
        f"args:{folders['reward']}@1,0.5",
        f"value:{folders['scalar']}@1",
        f"value:{folders['q']}@1",
        f"genarm:{folders['arm']}@1",
        f"follower:{folders['exceedance_2']}",
        f"policy:{folders['dpo']}",
        f"transfer:{folders['dpo']}@1",
        f"blockwise:value:{folders['q']}@2",
        f"beam:value:{folders['q']}@2",
        f"re_control:{folders['re_control']}@0.5",
        "ggro@2",
        f"smc:value:{folders['q']}@1",
        "smc@1",
        "quest@1",
        "cards@1",
    ]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("run") / "out"
    decode.main(command(folders, out, *every_method(folders)))
    return out


def rows_of(out) -> list[dict]:
    return json.loads((pathlib.Path(out) / "results.json").read_text())


def test_every_kind_of_method_has_its_row(finished, folders):
    rows = rows_of(finished)
    assert len(rows) == 1 + len(every_method(folders)) + 1  # base, and two betas of one method
    by_name = {(row["method"], row["beta"]): row for row in rows}
    base = by_name["base", None]
    assert base["kl"] == 0
    assert base["win_rate"] == 0.5
    assert base["forwards"] == pytest.approx(1)
    assert by_name["best_of_2", None]["kl"] == pytest.approx(metrics.best_of_n_kl_bound(2), abs=1e-4)
    assert by_name[f"args:{folders['reward']}", 0.5]["forwards"] == pytest.approx(4)  # one token, three candidates
    assert by_name[f"value:{folders['q']}", 1.0]["forwards"] == pytest.approx(2)
    assert by_name[f"follower:{folders['exceedance_2']}", 0.5]["kl"] > 0
    assert by_name["ggro_2", None]["kl_kind"] == "surprisal"
    for row in rows:
        assert np.isfinite([row["gold"], row["reward"], row["kl"], row["forwards"]]).all(), row["method"]
        assert (row["second_gold"], row["second_gold_95"]) == (row["reward"], row["reward_95"])
        assert 1 < row["perplexity"] < np.inf
        assert row["forwards"] >= 1
        assert plots.family(row["method"]) in plots.STYLES
    assert (finished / "frontier.png").stat().st_size > 10_000


def test_perplexity_is_that_of_the_mean_nats_per_token():
    shared = {"method": "base", "beta": None, "kl": 0.0, "kl_kind": "exact", "truncated": True}
    records = [
        shared | {"index": i, "tokens": [5] * n, "log_prob_ref_sum": -nats}
        for i, (n, nats) in enumerate([(2, 4.0), (4, 4.0), (1, 3.0)])
    ]
    (row,) = results.summarise(records)
    each = metrics.mean_interval([2.0, 1.0, 3.0])
    assert row["perplexity"] == pytest.approx(np.exp(each.mean))
    assert row["perplexity_95"] == pytest.approx(np.exp(each.mean) * each.half_width)
    (row,) = results.summarise([shared | {"index": 0, "tokens": [], "log_prob_ref_sum": 0.0}])
    assert "perplexity" not in row


@pytest.mark.parametrize(
    ("method", "family", "label"),
    [
        ("distribution:a/laws/model:soft", "distributional CD", "distributional CD"),
        ("distribution:a/laws/model:follower(bound=2)", "Stackelberg", "Stackelberg, B 2"),
        ("distribution:laws:calibrated(exp:5)", "InfAlign's tilt", "InfAlign's tilt, exp:5"),
        ("distribution:laws:best_of@4", "best-of-n by tokens", "best-of-n by tokens, 4"),
        ("blockwise_4x8 distribution:laws:mean", "blockwise CD", "blockwise CD, 4 of 8 tokens"),
    ],
)
def test_readings_of_a_head_of_laws_stand_under_their_methods_names(method, family, label):
    assert plots.family(method) == family
    assert plots.label(method) == label
    assert family in plots.STYLES


def test_one_more_method_decodes_that_method_alone(finished, folders, monkeypatch):
    before = rows_of(finished)
    drawn = []
    whole = engine.decode_batch

    def counted(method, rng, prompts):
        drawn.append(method.name)
        return whole(method, rng, prompts)

    monkeypatch.setattr(engine, "decode_batch", counted)
    decode.main(command(folders, finished, *every_method(folders), "best_of_n@3"))
    assert set(drawn) == {"best_of_3"}
    assert rows_of(finished)[:-1] == before
    # The same folder again for fewer methods: nothing is decoded, the table holds what was asked for.
    drawn.clear()
    decode.main(command(folders, finished, "best_of_n@2"))
    assert not drawn
    assert [row["method"] for row in rows_of(finished)] == ["base", "best_of_2"]
    decode.main(command(folders, finished, *every_method(folders)))
    assert rows_of(finished) == before


def test_an_interrupted_run_goes_on(finished, folders, tmp_path, monkeypatch):
    chosen = ("best_of_n@2", f"value:{folders['q']}@1")
    whole = engine.decode_batch

    def interrupted(method, rng, prompts):
        if method.name.startswith("value"):
            raise KeyboardInterrupt
        return whole(method, rng, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode.main(command(folders, tmp_path / "out", *chosen))
    assert not (tmp_path / "out" / "results.json").exists()
    decode.main(command(folders, tmp_path / "out", *chosen))
    wanted = {(row["method"], row["beta"]): row["reward"] for row in rows_of(finished)}
    for row in rows_of(tmp_path / "out"):
        assert row["reward"] == wanted[row["method"], row["beta"]]


def test_other_options_under_the_same_name_are_refused(finished, folders):
    with pytest.raises(ValueError, match="seed: expected 0"):
        decode.main(command(folders, finished, "best_of_n@2", options=("--seed", "1")))


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("magic@1", "method: expected a kind among"),
        ("value@1", "method: expected a folder for value"),
        ("best_of_n:x@4", "method: expected no folder for best_of_n"),
        ("best_of_n@2.5", "method: expected positive strengths, whole numbers"),
        ("best_of_n@1", "method: expected at least 2 to choose from"),
        ("best_of_n", "method: expected @ and strengths"),
        ("policy:x@1", "method: expected no strength"),
        ("args:x@1,1", "method: expected each strength once"),
        ("args:x@one", "method: expected numbers after @"),
        ("smc:nothing:x@1", "method: expected smc:CRITIC:DIR"),
        ("args:nowhere@1", "nowhere"),
        ("smc:value@1", "method: expected a folder for smc"),
    ],
)
def test_bad_methods_are_named_and_nothing_is_written(method, match, folders, tmp_path):
    with pytest.raises(ValueError, match=match):
        decode.main(command(folders, tmp_path / "out", method))
    assert not (tmp_path / "out").exists()


def test_the_same_strength_twice_is_refused(folders, tmp_path):
    """Its responses would count twice, and the intervals would be too narrow."""
    with pytest.raises(ValueError, match="method: expected each method and strength once"):
        decode.main(command(folders, tmp_path / "out", "best_of_n@2", "best_of_n@2,3"))


def test_a_head_for_other_hidden_states_edits_none(folders, tmp_path):
    with pytest.raises(ValueError, match="expected a head on the base's own hidden states"):
        decode.main(command(folders, tmp_path / "out", f"re_control:{folders['scalar']}@1"))


def test_an_option_that_a_method_does_not_read_may_change(finished, folders):
    before = rows_of(finished)
    decode.main(command(folders, finished, "best_of_n@2", options=("--reward-threshold", "3")))
    assert rows_of(finished) == [row for row in before if row["method"] in ("base", "best_of_2")]
    decode.main(command(folders, finished, *every_method(folders)))


def test_draws_are_apart_from_the_bases(finished):
    """Else the base's response is among the n, and best-of-n wins too often."""
    texts = {}
    for name in ("base", "best_of_n_2"):
        lines = (finished / name / "responses.jsonl").read_text().splitlines()
        texts[name] = [json.loads(line)["tokens"] for line in lines]
    assert texts["base"] != texts["best_of_n_2"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--num-steps", "1"), "num_steps: "),
        (("--block-size", "0"), "block_size: "),
        (("--entropy-threshold", "-1"), "entropy_threshold: "),
        (("--lookahead", "-1"), "lookahead: "),
        (("--reward", ""), "reward: expected a reward, which best_of_n@2 maximises, found none"),
        (("--dtype", "int8"), "dtype: "),
    ],
)
def test_bad_options_are_named(options, match, folders, tmp_path):
    with pytest.raises(ValueError, match=match):
        decode.main(command(folders, tmp_path / "out", "best_of_n@2", options=options))


def test_every_kind_has_a_builder():
    assert set(methods.METHODS) == set(specs.KINDS)
    assert set(tilts.CRITICS) == set(specs.CRITICS)


def test_the_help_lists_every_kind_and_critic():
    listed = re.findall(r"^    (\w+)(?: \*)? {2,}", decode.__doc__, re.MULTILINE)
    assert {*listed, "tilt", "function"} == {"KIND", *specs.KINDS, *specs.CRITICS}


def test_the_parts_of_a_method():
    summed = specs.parse_method("0.5 * args:a/model - 2 * transfer:org/b@1,0.5")
    assert (summed.kind, summed.strengths, summed.needs_reward) == ("tilt", (1.0, 0.5), True)
    assert summed.terms == (specs.Term(0.5, "args", "a/model"), specs.Term(-2.0, "transfer", "org/b"))
    assert summed.folders == {"args:a/model": "a/model", "transfer:org/b": "org/b"}
    assert summed.reads == {"top_k", "rollouts", "lookahead", "draft", "draft_tokens"}
    assert summed.slug == "0.5_args_a_-2_transfer_b_1_0.5"
    blocks = specs.parse_method("blockwise:value:x + genarm:y@4")
    assert (blocks.kind, blocks.name, len(blocks.terms)) == ("blockwise", "blockwise:value:x + genarm:y", 2)
    assert not blocks.needs_reward
    own = specs.parse_method("my.module:function@-1,0")
    assert (own.kind, own.target, own.strengths, own.slug) == ("function", "my.module:function", (-1.0, 0.0), own.slug)
    assert specs.parse_method("policy:runs/rl@v2/model").target == "runs/rl@v2/model"
    # A follower's head brings its beta, in a sum as well.
    assert specs.parse_method("follower:x + value:y").strengths == ()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("follower:x + value:y@1", "method: expected no strength"),
        ("args:x + ranked:y@1", "method: expected a kind among"),
        ("smc:args:x + ranked:y@1", "method: expected smc:CRITIC:DIR"),
        ("args:x + @1", "method: expected a weight other than 0 and a reward"),
        ("two * args:x@1", "method: expected WEIGHT"),
        ("blockwise:args:x@2.5", "method: expected positive strengths, whole numbers"),
        ("my.module:function@inf", "method: expected finite strengths"),
        ("my.module:function@1,1", "method: expected each strength once"),
        ("transfer@1", "method: expected a folder for transfer"),
    ],
)
def test_what_is_no_method_is_refused(method, match):
    with pytest.raises(ValueError, match=match):
        specs.parse_method(method)
