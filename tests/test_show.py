"""--show: the first rows of every job as tokens with their ids, and nothing written; and the options for texts."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from jaxalign import commands, models
from tests import token_cases as cases
from tests.conftest import tiny_lm

USER = {"role": "user", "content": "How are you?"}
REPLY = {"role": "assistant", "content": "I am fine."}
PAIR = {"prompt": [USER], "chosen": [REPLY], "rejected": [{"role": "assistant", "content": "No."}]}
CHAT = {"messages": [USER, REPLY, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Yes."}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    top = tmp_path_factory.mktemp("show")
    tokenizer = cases.byte_level(cases.CHATML)
    lm, params = tiny_lm(0, num_layers=1, vocab_size=len(tokenizer), eos_ids=(2,), max_length=128)
    models.save(top / "base", lm, params, tokenizer=tokenizer)
    rows = {"pairs": [PAIR, PAIR], "chats": [CHAT, CHAT, CHAT]}
    for name, found in rows.items():
        (top / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return top


def lines(capsys, job, **options):
    capsys.readouterr()
    assert commands.run(job, **options) in ({}, [], None)
    return capsys.readouterr().out


@pytest.mark.parametrize("job", ["arm", "dpo", "reward_model", "sft", "rl", "value", "calibrate", "shaping", "decode"])
def test_every_job_that_reads_texts_shows_them(job, folder, tmp_path, capsys):
    options = {"out": str(tmp_path / "run"), "show": 1}
    base, chats = str(folder / "base"), str(folder / "chats.jsonl")
    options |= {
        "arm": {"model": base, "data": str(folder / "pairs.jsonl")},
        "dpo": {"model": base, "data": str(folder / "pairs.jsonl")},
        "reward_model": {"model": base, "data": str(folder / "pairs.jsonl")},
        "sft": {"model": base, "data": chats},
        "rl": {"model": base, "prompts": chats, "reward": "x:y"},
        "value": {"base": base, "prompts": chats, "reward": "x:y"},
        "calibrate": {"base": base, "prompts": chats, "reward": "x:y"},
        "shaping": {"base": base, "prompts": chats, "reward": "x:y"},
        "decode": {"model": base, "prompts": chats},
    }[job]
    out = lines(capsys, job, **options)
    assert "'<|im_start|>':3 'user':331" in out
    assert out.count("chats.jsonl:1" if "chats.jsonl" in out else "pairs.jsonl:1") == 1
    assert ("+'<|im_end|>':4" in out) == (job in ("arm", "dpo", "reward_model", "sft"))
    assert ("~'Ċ':206" in out) == (job == "reward_model")  # what a reward model reads after the end
    assert ("+'Ye" in out) == (job == "sft")
    assert not (tmp_path / "run").exists()


def test_options_of_texts_reach_the_tokens(folder, tmp_path, capsys):
    given = {"base": str(folder / "base"), "responses": str(folder / "chats.jsonl"), "reward": "x:y"}
    assert "+'I':48" in lines(capsys, "value", **given, out=str(tmp_path / "run"), show=1)
    common = {"model": str(folder / "base"), "out": str(tmp_path / "run"), "show": 1}
    chats = common | {"data": str(folder / "chats.jsonl")}
    assert "'yst'" not in lines(capsys, "sft", **chats)
    assert "'yst'" in lines(capsys, "sft", **chats, system="One two")
    assert "+'I':48" in lines(capsys, "sft", **chats)
    assert "+'I':48" not in lines(capsys, "sft", **chats, learn="last")
    (tmp_path / "own.jsonl").write_text(json.dumps({"q": "hello", "a": " Yes", "b": " No"}) + "\n")
    own = common | {"data": str(tmp_path / "own.jsonl"), "columns": "prompt=q,chosen=a,rejected=b"}
    plain = lines(capsys, "dpo", **own)
    assert "+'ĠYes':302" in plain
    assert "+'</s>':2" in plain
    assert "+'<|endoftext|>':5" in lines(capsys, "dpo", **own, eos_token="<|endoftext|>")
    assert "'<|im_start|>'" in lines(capsys, "dpo", **own, as_messages=True)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("chat_template_kwargs", "{x", "chat_template_kwargs: expected a JSON object"),
        ("chat_template_kwargs", "[1]", "chat_template_kwargs: expected a JSON object"),
        ("eos_token", "<none>", "eos_token: expected a token of the tokenizer or its id, found '<none>'"),
        ("columns", "what=x", "columns: expected names among"),
        ("show", -1, "show: expected at least 0"),
    ],
)
def test_bad_options_are_named(option, value, message, folder, tmp_path):
    chats = {"model": str(folder / "base"), "data": str(folder / "chats.jsonl"), "out": str(tmp_path / "run")}
    with pytest.raises(ValueError, match=message):
        commands.run("sft", **chats, **({"show": 1} | {option: value}))


def test_rows_are_coloured_on_a_terminal_alone(folder, tmp_path):
    command = [sys.executable, "-m", "train.sft", "--model", str(folder / "base"), "--show", "1"]
    command += ["--data", str(folder / "chats.jsonl"), "--out", str(tmp_path / "run")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\033[" not in found.stdout
    assert "3 rows; + is learned, ~ is read by a reward model alone" in found.stdout


def test_sft_refuses_compare_which_makes_pairs_alone(folder, tmp_path):
    options = {"data": str(folder / "pairs.jsonl"), "model": str(folder / "base"), "out": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"compare: expected 'all', .* found 'best'"):
        commands.run("sft", show=1, compare="best", **options)
