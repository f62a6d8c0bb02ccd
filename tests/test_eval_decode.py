"""eval.decode as a user runs it: folders made here, every kind of critic, resuming, and refusals before any output."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from eval import decode
from jaxalign import critics, data, decoding, models, policies, rewards, tokens
from jaxalign.decoding import _sampling
from jaxalign.evaluation import engine
from jaxalign.prompts import prompt_batch
from tests.conftest import tiny_lm

WORDS = ["<eos>", "the", "cat", "dog", "sat", "ran", "on", "a", "mat", "and", "slept"]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}and{% endif %}"


def tokenizer(words=WORDS):
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<eos>")
    raw = tokenizers.Tokenizer(model)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    heads = {"base": None, "reward": "reward", "gold": "reward", "scalar": "value", "q": "q", "arm": None}
    for seed, (name, head) in enumerate(heads.items()):
        models.save(root / name, *tiny_lm(seed, head, num_layers=1), tokenizer=tokenizer())
    models.save(root / "wide", *tiny_lm(4, vocab_size=13, num_layers=1), tokenizer=tokenizer([*WORDS, "x", "y"]))
    models.save(root / "other", *tiny_lm(4, num_layers=1), tokenizer=tokenizer([*WORDS[:9], "slept", "and"]))
    lm, params = tiny_lm(1, "reward", num_layers=1)
    broken = {**params, "head": jax.tree.map(lambda x: jnp.full_like(x, 3e38), params["head"])}
    models.save(root / "nan", lm, broken, tokenizer=tokenizer())
    models.save(root / "ends", *tiny_lm(4, vocab_size=13, num_layers=1, eos_ids=(0, 12)), tokenizer=tokenizer())
    (root / "prompts.txt").write_text("the cat\na dog ran on the mat\nthe dog and the cat sat\nsat\nthe mat\n")
    return {name: str(root / name) for name in [*heads, "wide", "other", "nan", "ends", "prompts.txt"]}


def arguments(folders, out, *extra: str) -> list[str]:
    return [
        *("--model", folders["base"], "--prompts", folders["prompts.txt"], "--out", str(out)),
        *("--max-new-tokens", "4", "--batch-size", "2", *extra),
    ]


def methods(*specs: str) -> list[str]:
    return [part for spec in specs for part in ("--method", spec)]


def all_methods(folders) -> list[str]:
    critics = [f"args:{folders['reward']}", f"value:{folders['scalar']}", f"value:{folders['q']}"]
    critics.append(f"genarm:{folders['arm']}")
    rewards = ["--reward", folders["reward"], "--gold", folders["gold"]]
    return [*methods("best_of_n@3", *(f"{critic}@0.5,2.0" for critic in critics)), *rewards]


def read(out) -> list[dict]:
    """The records of every method, in the order of their folders' names."""
    files = sorted(pathlib.Path(out).glob("*/responses.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def rows_of(out) -> list[dict]:
    return json.loads((pathlib.Path(out) / "results.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("run") / "out"
    decode.main(arguments(folders, out, *all_methods(folders)))
    return out


def test_every_method_decodes_every_prompt(finished, folders):
    records = read(finished)
    assert len(records) == (2 + 4 * 2) * 5
    summary = rows_of(finished)
    assert [row["method"] for row in summary][:2] == ["base", "best_of_3"]
    assert {row["kl_kind"] for row in summary} == {"exact", "bound"}
    for record in records:
        assert len(record["tokens"]) == len(record["log_prob"]) == len(record["log_prob_ref"])
        assert record["finished"] != record["truncated"]
        assert record["response"] == tokenizer().decode(record["tokens"], skip_special_tokens=True)
        assert record["kl"] >= 0
    by_method = {(r["method"], r["beta"]): r for r in summary}
    assert by_method["base", None]["kl"] == 0
    assert by_method["best_of_3", None]["reward"] >= by_method["base", None]["reward"]
    strong, weak = (by_method[f"genarm:{folders['arm']}", beta]["kl"] for beta in (0.5, 2.0))
    assert strong > weak > 0
    assert {"results.json", "frontier.png", "base", "best_of_n_3"} < {p.name for p in finished.iterdir()}
    assert sorted(p.name for p in (finished / "base").iterdir()) == [
        ".responses.jsonl.blake2b",
        "config.json",
        "inputs.json",
        "responses.jsonl",
        "summary.json",
        "versions.json",
    ]


def test_records_hold_the_models_own_numbers(finished, folders):
    """log_prob_ref and reward recomputed from the folders, one right-padded text at a time."""
    lm, params = models.load(folders["base"])
    judges = {name: models.load(folders[name]) for name in ("reward", "gold")}
    log_softmax = jax.jit(lambda p, tokens, mask: jax.nn.log_softmax(lm.apply(p, tokens, mask=mask).logits[0]))
    heads = {
        name: jax.jit(lambda p, tokens, mask, lm=judge: lm.apply(p, tokens, mask=mask).head[0, :, 0])
        for name, (judge, _) in judges.items()
    }
    fast = tokenizer()
    for record in read(finished)[::3]:
        prompt = fast(record["prompt"])["input_ids"]
        text = prompt + record["tokens"]
        tokens, mask = np.zeros((1, 16), np.int32), np.zeros((1, 16), bool)
        tokens[0, : len(text)], mask[0, : len(text)] = text, True
        log_prob = log_softmax(params, tokens, mask)
        for t, z in enumerate(record["tokens"]):
            assert record["log_prob_ref"][t] == pytest.approx(float(log_prob[len(prompt) - 1 + t, z]), abs=1e-4)
        for name, head in heads.items():
            assert record[name] == pytest.approx(float(head(judges[name][1], tokens, mask)[len(text) - 1]), abs=1e-4)


def test_an_interrupted_run_goes_on_and_ends_byte_for_byte_the_same(finished, folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    calls = []
    whole = engine.decode_batch

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(engine, "decode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode.main(arguments(folders, out, *all_methods(folders)))
    (partial,) = out.glob("*/responses.jsonl.partial")
    lines = partial.read_text().splitlines(keepends=True)
    assert not partial.with_suffix("").exists()
    # Cut in the middle of a batch, and in the middle of a line.
    partial.write_text("".join(lines[:-2]) + lines[-2][:20])
    done = len(calls)
    decode.main(arguments(folders, out, *all_methods(folders)))
    assert 0 < len(calls) - done < 30
    for file in finished.glob("*/responses.jsonl"):
        assert (out / file.relative_to(finished)).read_bytes() == file.read_bytes()
    # Once more: nothing is decoded again.
    done = len(calls)
    decode.main(arguments(folders, out, *all_methods(folders)))
    assert len(calls) == done


def test_responses_do_not_depend_on_the_batch(finished, folders, tmp_path):
    """Five rows at once, and the best of three; the same seed and index give the same tokens as in pairs."""
    extra = ("--reward", folders["reward"], *methods("best_of_n@3", f"args:{folders['reward']}@0.5"))
    decode.main([*arguments(folders, tmp_path / "out", *extra), "--batch-size", "5"])
    pairs = {(r["method"], r["beta"], r["index"]): r["tokens"] for r in read(finished)}
    records = read(tmp_path / "out")
    assert len(records) == 3 * 5
    for r in records:
        assert pairs[r["method"], r["beta"], r["index"]] == r["tokens"]


def test_deterministic_runs_give_the_same_bits_at_any_batch_size(folders, tmp_path):
    extra = ("--dtype", "bfloat16", "--deterministic", "2", *methods("best_of_n@3"), "--reward", folders["reward"])
    for size in ("1", "5"):
        decode.main([*arguments(folders, tmp_path / size, *extra), "--batch-size", size])
    found = [[{k: v for k, v in r.items() if k != "seconds"} for r in read(tmp_path / size)] for size in ("1", "5")]
    key = lambda r: (r["method"], r["index"])  # noqa: E731
    assert sorted(found[0], key=key) == sorted(found[1], key=key)
    for other in (("--stream",), ("--mesh", "data=1")):
        with pytest.raises(ValueError, match=f"{other[0][2:]}: expected none with --deterministic"):
            decode.main(arguments(folders, tmp_path / "refused", *extra, *other))


def test_other_prompts_under_the_same_name_are_refused(folders, tmp_path, monkeypatch):
    """Otherwise the responses of the old prompts would be reported for the new ones."""
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    extra = ("--prompts", str(prompts))
    whole = engine.decode_batch

    def interrupted(method, rng, prompts):
        if 2 in prompts.index.tolist():
            raise KeyboardInterrupt
        return whole(method, rng, prompts)

    prompts.write_text("the cat\nsat\nthe mat\n")
    with monkeypatch.context() as patch:
        patch.setattr(engine, "decode_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode.main(arguments(folders, out, *extra))
    for text in ("the cat\nran\nthe mat\n", "the cat\n"):
        prompts.write_text(text)
        with pytest.raises(ValueError, match=r"^prompts: expected 'sat' at index 1, .*partial"):
            decode.main(arguments(folders, out, *extra))
    prompts.write_text("the cat\nsat\nthe mat\n")
    decode.main(arguments(folders, out, *extra))
    for text, found in (("the cat\nsat\na mat\n", "'the mat' at index 2"), ("the cat\nsat\nthe mat\na\n", "4 prompts")):
        prompts.write_text(text)
        with pytest.raises(ValueError, match=rf"^prompts: .*{found}"):
            decode.main(arguments(folders, out, *extra))


@pytest.mark.skipif(bool(os.environ.get("JAX_DISABLE_JIT")), reason="counts traces")
def test_one_trace_per_bucket_of_prompt_lengths(folders, tmp_path, capsys):
    """Ten lengths in two buckets, two betas, a short last batch: two traces; then the table has a speed."""
    (tmp_path / "p.txt").write_text("".join("the " * n + "cat\n" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)))
    extra = ("--prompts", str(tmp_path / "p.txt"), *methods(f"genarm:{folders['arm']}@1,3"), "--no-include-base")
    extra += ("--max-new-tokens", "5")  # of no other test: equal builders share their traces
    before = _sampling._sample._cache_size()
    decode.main(arguments(folders, tmp_path / "out", *extra))
    assert _sampling._sample._cache_size() - before == 2
    summary = rows_of(tmp_path / "out")
    assert all(row["tokens_per_second"] > 0 for row in summary)
    # A call that decodes nothing keeps the speeds of the one that did, and says again what is there.
    capsys.readouterr()
    decode.main(arguments(folders, tmp_path / "out", *extra))
    assert rows_of(tmp_path / "out") == summary
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'out' / 'results.json'} (22 responses)"


def test_messages_and_a_single_response(folders, tmp_path, monkeypatch):
    """One chat prompt: its missing interval is null in the summary, not NaN. Roles that share a folder load it once."""
    row = {"messages": [{"role": "user", "content": "the dog"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    names, load = [], models.load
    monkeypatch.setattr(models, "load", lambda path, **options: names.append(path) or load(path, **options))
    extra = ("--prompts", str(tmp_path / "p.jsonl"), "--reward", folders["reward"], "--gold", folders["reward"])
    decode.main(arguments(folders, tmp_path / "out", *extra))
    assert names == [folders["base"], folders["reward"]]
    (record,) = read(tmp_path / "out")
    assert record["prompt"] == "the dog and"
    assert record["reward"] == record["gold"]
    (summary,) = rows_of(tmp_path / "out")
    assert summary["reward_95"] is summary["kl_95"] is summary["tokens_per_second"] is None


def test_a_weighted_sum_is_one_method(folders, tmp_path):
    spec = f"0.5 * genarm:{folders['arm']} + 0.2 * genarm:{folders['base']}"
    decode.main(arguments(folders, tmp_path / "out", *methods(f"{spec}@1"), "--no-include-base"))
    assert {r["method"] for r in read(tmp_path / "out")} == {spec}
    (row,) = rows_of(tmp_path / "out")
    assert row["forwards"] == pytest.approx(3)


def test_blocks_are_selected_by_each_critic(folders, tmp_path):
    """Two critics, two lengths: the KL is each response's bound; a block as long as the limit earns most by its critic,
    as best-of-n does, from the same draws."""
    critic = f"args:{folders['reward']}"
    specs = (critic, f"value:{folders['q']}")
    given = methods(
        *(f"{spec}@1" for spec in specs), *(f"blockwise:{spec}@3" for spec in specs), "best_of_n@3", f"beam:{critic}@1"
    )
    options = ("--block-size", "2", "9", "--continuations", "3", "--reward", folders["reward"], "--no-include-base")
    decode.main([*arguments(folders, tmp_path / "out", *given, *options), "--batch-size", "5"])
    records = read(tmp_path / "out")
    kinds = {r["kl_kind"] for r in records if r["method"].startswith("blockwise")}
    assert kinds == {"bound"}
    by_method = {}
    for r in records:
        by_method.setdefault(r["method"], []).append(r)
    beams = by_method.pop(f"beam_1x3x2 {critic}"), by_method.pop(f"beam_1x3x9 {critic}")
    for blocks, rows in zip(("3x2", "3x9"), beams, strict=True):  # one beam of three continuations
        assert [r["tokens"] for r in rows] == [r["tokens"] for r in by_method[f"blockwise_{blocks} {critic}"]]
    assert set(by_method) == {
        "best_of_3",
        *(f"{prefix}{s}" for s in specs for prefix in ("", "blockwise_3x2 ", "blockwise_3x9 ")),
    }
    for r in by_method[f"blockwise_3x2 {critic}"]:
        assert r["beta"] is None
        assert r["kl"] == pytest.approx(-(-len(r["tokens"]) // 2) * (np.log(3) - 2 / 3), abs=1e-4)
    whole = [r["tokens"] for r in by_method[f"blockwise_3x9 {critic}"]]
    assert whole == [r["tokens"] for r in by_method["best_of_3"]]


def words_counted(texts: list[str]) -> list[list[float]]:
    """An embedding for the tests: counts of three words."""
    return [[1.0 + text.split().count(word) for word in ("the", "cat", "dog")] for text in texts]


def test_coherence_is_reported_by_a_users_embedding(folders, tmp_path, capsys):
    spec = "tests.test_eval_decode:words_counted"
    decode.main(arguments(folders, tmp_path / "out", "--embedding", spec))
    (summary,) = rows_of(tmp_path / "out")
    found = []
    for r in read(tmp_path / "out"):
        x, y = (np.asarray(v) for v in words_counted([r["prompt"], r["response"]]))
        found.append(x @ y / np.sqrt((x @ x) * (y @ y)))
        assert r["coherence"] == pytest.approx(found[-1], abs=1e-5)
    assert summary["coherence"] == pytest.approx(np.mean(found), abs=1e-5)
    assert "coherence" in capsys.readouterr().out


def test_a_transfer_critic_rolls_out_its_model_and_scores_by_the_reward(folders, tmp_path):
    """The tokens of the library's own Transfer Q* with these models, at the run's key, indices and limits."""
    spec = f"transfer:{folders['arm']}"
    options = ("--reward", folders["reward"], "--rollouts", "2", "--lookahead", "2", "--top-k", "3")
    decode.main(arguments(folders, tmp_path / "out", *methods(f"{spec}@0.2"), *options, "--no-include-base"))
    records = read(tmp_path / "out")
    assert {record["method"] for record in records} == {spec}
    (lm, base), (other_lm, other), (reward_lm, judge) = (models.load(folders[n]) for n in ("base", "arm", "reward"))
    critic = critics.transfer_q(
        policies.language_model(other_lm), rewards.from_model(reward_lm), eos_ids=(0,), num_samples=2, lookahead=2
    )
    policy = policies.tilt(policies.language_model(lm), critic, top_k=3)
    params = {"policy": base, "critic": {"baseline": other, "reward": judge}, "beta": jnp.asarray(0.2)}
    ids = [
        prompt.tokens for prompt in data.tokenize_prompts(folders["prompts.txt"], tokens.text_format(tokenizer())).rows
    ]
    drawn = decoding.sample(
        policy,
        params,
        jax.random.fold_in(jax.random.key(0), 1),  # apart from the base's draws
        prompt_batch(ids),
        max_new_tokens=4,
        eos_ids=(0,),
        temperature=1.0,
    )
    for record in records:
        b = record["index"]
        assert record["tokens"] == drawn.tokens[b][drawn.mask[b]].tolist()
        np.testing.assert_allclose(record["log_prob"], drawn.log_prob[b][drawn.mask[b]], rtol=1e-3, atol=1e-4)


def test_another_config_in_the_folder_is_refused_and_named(finished, folders):
    before = (finished / "base/responses.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"seed: expected 0 .* found 1"):
        decode.main(arguments(folders, finished, *all_methods(folders), "--seed", "1"))
    assert (finished / "base/responses.jsonl").read_bytes() == before


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    root = pathlib.Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "eval.decode", *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | environment,
        check=False,
    )


def test_two_devices_decode_what_one_does(finished, folders, tmp_path):
    critic = f"args:{folders['reward']}"
    extra = (*methods(f"{critic}@0.5"), "--reward", folders["reward"], "--no-include-base")
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    found = command(*arguments(folders, tmp_path / "two", *extra, "--mesh", "data=2"), XLA_FLAGS=flags)
    assert found.returncode == 0, found.stderr
    one = [r for r in read(finished) if (r["method"], r["beta"]) == (critic, 0.5)]
    two = read(tmp_path / "two")
    assert len(one) == 5
    for a, b in zip(one, two, strict=True):
        assert (a["index"], a["tokens"]) == (b["index"], b["tokens"])
        np.testing.assert_allclose(a["log_prob"], b["log_prob"], atol=1e-5)
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-5)
