"""eval.decode as a user runs it: folders made here, every kind of critic, resuming, and refusals before any output."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
import transformers

from eval import decode
from jaxalign import data, models
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
    (root / "prompts.txt").write_text("the cat\na dog ran on the mat\nthe dog and the cat sat\nsat\nthe mat\n")
    return {name: str(root / name) for name in [*heads, "wide", "other", "prompts.txt"]}


def arguments(folders, out, *extra: str) -> list[str]:
    return [
        *("--model", folders["base"], "--prompts", folders["prompts.txt"], "--out", str(out)),
        *("--max-new-tokens", "4", "--batch-size", "2", *extra),
    ]


def all_methods(folders) -> list[str]:
    specs = [f"args:{folders['reward']}", f"value:{folders['scalar']}", f"value:{folders['q']}"]
    specs.append(f"autoregressive:{folders['arm']}")
    critic = [part for spec in specs for part in ("--critic", spec)]
    judges = ["--reward", folders["reward"], "--gold", folders["gold"], "--best-of-n", "3"]
    return [*critic, "--beta", "0.5", "2.0", *judges]


def read(out) -> list[dict]:
    return [json.loads(line) for line in (pathlib.Path(out) / "responses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("run") / "out"
    decode.main(arguments(folders, out, *all_methods(folders)))
    return out


def test_every_method_decodes_every_prompt(finished, folders):
    records = read(finished)
    assert len(records) == (2 + 4 * 2) * 5
    summary = json.loads((finished / "summary.json").read_text())
    assert [row["method"] for row in summary][:2] == ["base", "best_of_3"]
    assert {row["kl_kind"] for row in summary} == {"sum of exact per-step KL", "bound log n - (n-1)/n"}
    for record in records:
        assert len(record["tokens"]) == len(record["log_prob"]) == len(record["log_prob_ref"])
        assert record["finished"] != record["truncated"]
        assert record["response"] == tokenizer().decode(record["tokens"], skip_special_tokens=True)
        assert record["kl"] >= 0
    by_method = {(r["method"], r["beta"]): r for r in summary}
    assert by_method["base", None]["kl"] == 0
    assert by_method["best_of_3", None]["reward"] >= by_method["base", None]["reward"]
    strong, weak = (by_method[f"autoregressive:{folders['arm']}", beta]["kl"] for beta in (0.5, 2.0))
    assert strong > weak > 0
    assert sorted(p.name for p in finished.iterdir()) == [
        "config.json",
        "responses.jsonl",
        "summary.json",
        "versions.json",
    ]


def test_records_hold_the_models_own_numbers(finished, folders):
    """log_prob_ref and reward recomputed from the folders, one text at a time."""
    lm, params = models.load(folders["base"])
    reward_lm, reward_params = models.load(folders["reward"])
    fast = tokenizer()
    for record in read(finished)[::7]:
        prompt = fast(record["prompt"])["input_ids"]
        tokens = np.array([prompt + record["tokens"]])
        logits = np.asarray(lm.apply(params, tokens).logits[0], np.float64)
        log_prob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for t, z in enumerate(record["tokens"]):
            assert record["log_prob_ref"][t] == pytest.approx(log_prob[len(prompt) - 1 + t, z], abs=1e-4)
        assert record["reward"] == pytest.approx(float(reward_lm.apply(reward_params, tokens).head[0, -1, 0]), abs=1e-4)


def test_an_interrupted_run_goes_on_and_ends_byte_for_byte_the_same(finished, folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    calls = []
    whole = decode.decode_batch

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(decode, "decode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode.main(arguments(folders, out, *all_methods(folders)))
    partial = out / "responses.jsonl.partial"
    lines = partial.read_text().splitlines(keepends=True)
    assert not (out / "responses.jsonl").exists()
    # Cut in the middle of a batch, and in the middle of a line.
    partial.write_text("".join(lines[:-2]) + lines[-2][:20])
    done = len(calls)
    decode.main(arguments(folders, out, *all_methods(folders)))
    assert 0 < len(calls) - done < 30
    assert (out / "responses.jsonl").read_bytes() == (finished / "responses.jsonl").read_bytes()
    # Once more: nothing is decoded again.
    done = len(calls)
    decode.main(arguments(folders, out, *all_methods(folders)))
    assert len(calls) == done


def test_responses_do_not_depend_on_the_batch_size(finished, folders, tmp_path):
    decode.main([*arguments(folders, tmp_path / "out", *all_methods(folders)), "--batch-size", "5"])
    for a, b in zip(read(tmp_path / "out"), read(finished), strict=True):
        assert (a["method"], a["beta"], a["index"], a["tokens"]) == (b["method"], b["beta"], b["index"], b["tokens"])


def test_a_weighted_sum_is_one_method(folders, tmp_path):
    specs = [part for name in ("arm", "base") for part in ("--critic", f"autoregressive:{folders[name]}")]
    decode.main(arguments(folders, tmp_path / "out", *specs, "--sum", "--weights", "0.5", "0.2", "--no-include-base"))
    assert {r["method"] for r in read(tmp_path / "out")} == {"+".join(specs[1::2])}


def test_another_config_in_the_folder_is_refused_and_named(finished, folders):
    before = (finished / "responses.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"seed: expected 0 .* found 1"):
        decode.main(arguments(folders, finished, *all_methods(folders), "--seed", "1"))
    assert (finished / "responses.jsonl").read_bytes() == before


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
    ]
    for extra, match in cases:
        with pytest.raises(ValueError, match=match):
            decode.main(arguments(folders, out, *extra))
    assert not out.exists()


def test_prompt_files(tmp_path):
    fast = tokenizer()
    rows = ['{"prompt": "the cat"}', '{"messages": [{"role": "user", "content": "the dog"}]}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    assert data.read_prompts(tmp_path / "a.jsonl", tokenizer=fast) == ["the cat", "the dog and"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((rows[0] + "\n").encode()))
    assert data.read_prompts(tmp_path / "a.jsonl.gz") == ["the cat"]
    for bad, reason in (("{", "JSON"), ("[1]", "object"), ('{"text": "x"}', "fields"), ('{"prompt": " "}', "empty")):
        (tmp_path / "bad.jsonl").write_text(rows[0] + "\n" + bad + "\n")
        with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{reason}"):
            data.read_prompts(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="chat template"):
        data.read_prompts(tmp_path / "a.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one prompt"):
        data.read_prompts(tmp_path / "empty.jsonl")


def test_buckets_and_batches():
    assert [data.bucket(n) for n in (1, 8, 9, 12, 13, 17, 24, 25, 33)] == [8, 8, 12, 12, 16, 24, 24, 32, 48]
    batch = data.prompt_batch([[1, 2], [3]], index=[7, 4], batch_size=3, pad_id=9)
    assert batch.tokens[:, -2:].tolist() == [[1, 2], [9, 3], [9, 3]]
    assert batch.index.tolist() == [7, 4, 4]
    assert batch.mask.sum(1).tolist() == [2, 1, 1]
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="sequences"):
            data.prompt_batch(bad)
    with pytest.raises(ValueError, match="length"):
        data.prompt_batch([[1, 2, 3]], length=2)
    with pytest.raises(ValueError, match="batch_size"):
        data.prompt_batch([[1], [2]], batch_size=1)
    with pytest.raises(ValueError, match="index"):
        data.prompt_batch([[1], [2]], index=[0])


def test_config_file_gives_defaults_and_unknown_keys_are_named(folders, tmp_path):
    values = {"model": folders["base"], "prompts": folders["prompts.txt"], "max_new_tokens": 2, "batch_size": 2}
    (tmp_path / "c.json").write_text(json.dumps(values))
    decode.main(["--config", str(tmp_path / "c.json"), "--out", str(tmp_path / "out"), "--seed", "3"])
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["max_new_tokens"], stored["seed"]) == (2, 3)
    (tmp_path / "c.toml").write_text('max_new_token = 2\nmodel = "x"\n')
    with pytest.raises(ValueError, match=r"config: .*max_new_token'"):
        decode.main(["--config", str(tmp_path / "c.toml"), "--prompts", "p", "--out", "o"])
    with pytest.raises(ValueError, match="config: expected a JSON or TOML file"):
        decode.main(["--config", str(tmp_path / "none.json")])


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


def test_help_and_unknown_options():
    found = command("--help")
    assert found.returncode == 0
    for option in ("--model", "--critic", "--beta", "--config", "--dtype", "--mesh", "--out"):
        assert option in found.stdout
    found = command("--model", "m", "--prompts", "p", "--out", "o", "--betta", "1")
    assert found.returncode == 2
    assert "--betta" in found.stderr


def test_two_devices_decode_what_one_does(folders, tmp_path):
    extra = ("--critic", f"args:{folders['reward']}", "--reward", folders["reward"])
    decode.main(arguments(folders, tmp_path / "one", *extra))
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    found = command(*arguments(folders, tmp_path / "two", *extra, "--mesh", "data=2"), XLA_FLAGS=flags)
    assert found.returncode == 0, found.stderr
    for a, b in zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True):
        assert a["tokens"] == b["tokens"]
        np.testing.assert_allclose(a["log_prob"], b["log_prob"], atol=1e-5)
