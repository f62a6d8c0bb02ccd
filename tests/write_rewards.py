"""The table of docs/models.md: through which tokenizer a reward model reads responses, and which methods can use it.
`python -m tests.write_rewards` writes it anew."""

from __future__ import annotations

import pathlib
import tempfile
import warnings

import jax
import jax.numpy as jnp

from jaxalign import models, rewards, tokens
from tests import token_cases as cases
from tests.conftest import tiny_lm

PAGE = pathlib.Path(__file__).parent.parent / "docs/models.md"
START, END = "<!-- written by python -m tests.write_rewards -->", "<!-- end of the table -->"
CHAT = [{"role": "user", "content": "How are you?"}]
PROMPTS = {"texts": ["How are you?"], "chats": [CHAT]}


def folders(top: pathlib.Path) -> dict[str, tuple[str, str]]:
    """What the reward model is -> (how --reward names it, what its folder holds, tokenizer and template), beside a base
    with ChatML in top/base."""
    base = cases.byte_level(cases.CHATML, eos_token="<|im_end|>")
    padded = cases.byte_level(cases.CHATML, eos_token="<|im_end|>")
    padded.add_special_tokens({"pad_token": "[PAD]"})
    kinds = {
        "the base's tokenizer and template": (base, None),
        "the base's tokenizer and an appended [PAD]": (padded, None),
        "the base's tokenizer, no template": (cases.byte_level(eos_token="<|im_end|>"), None),
        "the base's tokenizer, another template": (cases.byte_level(cases.ZEPHYR, eos_token="<|im_end|>"), None),
        "another tokenizer and template": (cases.dummy_space(cases.ZEPHYR, eos_token="<|im_end|>"), None),
        "another tokenizer, no template": (cases.dummy_space(eos_token="<|im_end|>"), None),
        "several labels, one named (`DIR#LABEL`)": (base, "LABEL_1"),
        "several labels, none named": (base, ""),
        "a language model (no score)": (base, "lm"),
    }
    lm, params = tiny_lm(0, vocab_size=len(base), eos_ids=(4,), num_layers=1, max_length=64)
    models.save(top / "base", lm, params, tokenizer=base)
    found = {}
    for number, (name, (tokenizer, label)) in enumerate(kinds.items()):
        head = None if label == "lm" else "reward"
        made, weights = tiny_lm(1, head, vocab_size=len(tokenizer), eos_ids=(4,), num_layers=1, max_length=64)
        if label in ("", "LABEL_1"):
            made = models.with_head(made, models.Head("reward", num_labels=2))
            weights = {**weights, "head": jax.tree.map(lambda x: jnp.concatenate([x, -x], axis=-1), weights["head"])}
        models.save(top / str(number), made, weights, tokenizer=tokenizer)
        found[name] = str(top / str(number)) + ("#LABEL_1" if label == "LABEL_1" else ""), name
    return found


def cell(reader: rewards.Reader, spec: str) -> tuple[str, bool]:
    """(how responses are read, whether methods that score tokens can use it); what is refused is quoted."""
    folder, label = rewards.split_label(spec)
    try:
        reward, params = rewards.open_reward(reader, folder, label=label)
        tokens_of = [1, 7, 8, 4]
        row = jnp.asarray([tokens_of]), jnp.ones((1, len(tokens_of)), bool), jnp.asarray([2]), jnp.asarray([0])
        reward(params, *row)
    except ValueError as error:
        return f"refused: “{str(error).split(' in /')[0].split(' at /')[0]}”", False
    own = rewards.own_reading(reader, folder)
    if not own:
        tail, _ = rewards.template_tail(reader, models.load(folder)[0])
        return "the base's tokens" + (", and the tail of its template" if tail else ""), True
    return f"whole responses through its own tokenizer ({own})", False


def table() -> str:
    lines = ["| reward model | prompts in plain text | chats | methods that score tokens |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = pathlib.Path(name)
        made = folders(top)
        lm, _ = models.load(top / "base")
        form = tokens.text_format(models.tokenizer(top / "base"), eos_ids=(4,))
        for kind, (spec, _) in made.items():
            read = {prompts: cell(rewards.reader_of(form, lm, sources), spec) for prompts, sources in PROMPTS.items()}
            works = [prompts for prompts, (_, ok) in read.items() if ok]
            with_tokens = "yes" if len(works) == 2 else f"with {works[0]}" if works else "refused by name"
            both = [read["texts"][0], read["chats"][0]]
            lines.append(f"| {kind} | {both[0]} | {both[1]} | {with_tokens} |")
    return "\n".join(lines)


def written(page: str) -> str:
    """The page with the table as it is now."""
    before, rest = page.split(START)
    return f"{before}{START}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    print(f"wrote {PAGE}")
