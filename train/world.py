"""Write a task of the embedded world as files that every training script reads:

python -m train.world --task opinions --out runs/world
python -m train.world --task summaries --out runs/news
python -m train.world --task everyday --out runs/everyday

texts.jsonl (for train.sft), pairs.jsonl (train.reward_model, train.arm), prompts.jsonl (train.value), held_out.jsonl
(eval.decode: prompts of none of the others), drift.jsonl (prompts on topics of none of the others), tokenizer/ and
config.json, a small Llama's. The true utility of a text is the program jaxalign.worlds.opinions:golds, or
jaxalign.worlds.summaries:golds.

everyday is a world of real text for a pretrained model of chats: prompts.jsonl and held_out.jsonl alone, from 200
requests. Its true utility is jaxalign.worlds.sentiment:golds, and second_golds by another lexicon; train.preferences
makes pairs of the model's own samples.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, Literal

from jaxalign import _hosts, _io, commands, models
from jaxalign.data import tokenizers
from jaxalign.models.hf.files import whole_folder
from jaxalign.worlds import files, opinions, summaries

EVERYDAY_GOLD = "jaxalign.worlds.sentiment:golds"
HELD_OUT = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.world."""

    out: str
    """Folder of the files, new or empty."""
    task: Literal["opinions", "summaries", "everyday"] = "opinions"
    """opinions: loaded and neutral views, readers like flattery; summaries: of news items, readers like length;
    everyday: requests to a pretrained model, without texts, tokenizer and config."""
    texts: int = 12_000
    """Texts of the base."""
    pairs: int = 6_000
    """Preference pairs."""
    prompts: int = 0
    """Of everyday: requests to train on, of 160; 0: all."""
    held_out: int = 0
    """Prompts to decode; as many at most under drift. 0: 128, of everyday all 40."""
    layers: int = 2
    """Layers of the model in config.json."""
    width: int = 128
    """Its width; four heads share it."""
    seed: int = 0
    """Seed of everything."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> pathlib.Path:
    """Writes the files, whole or not at all; gives their folder."""
    _hosts.check_single("train.world")
    _check(config)
    out = pathlib.Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, found {out}")
    with whole_folder(out, overwrite=False) as temporary:
        if config.task == "everyday":
            rows: dict[str, Any] = files.everyday_rows(prompts=config.prompts, held_out=config.held_out)
            following = (
                f"train.preferences --base DIR --prompts {out / 'prompts.jsonl'} --reward {EVERYDAY_GOLD} --out DIR"
            )
        else:
            sizes = {name: getattr(config, name) for name in ("texts", "pairs", "seed")}
            rows = files.world_rows(config.task, held_out=config.held_out or HELD_OUT, **sizes)
            vocabulary = tokenizers.word_level((opinions if config.task == "opinions" else summaries).words())
            vocabulary.save_pretrained(temporary / "tokenizer")
            architecture = files.small_llama(vocabulary, layers=config.layers, width=config.width)
            _io.write_json(temporary / "config.json", models.config_to_hf(architecture))
            following = f"train.sft --data {out / 'texts.jsonl'} --architecture {out / 'config.json'} "
            following += f"--tokenizer {out / 'tokenizer'} --out DIR"
        for name, found in rows.items():
            _io.write_lines(temporary / f"{name}.jsonl", found)
            print(f"{name}.jsonl: {len(found)} rows")
    print(f"wrote {out}; next: python -m {following}")
    return out


def _check(config: Config) -> None:
    """ValueErrors that name the option."""
    default = Config(out=config.out)
    for name in ("texts", "pairs", "layers", "width", "seed") if config.task == "everyday" else ("prompts",):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(f"{name}: expected none for --task {config.task}, found {getattr(config, name)}")
    for name, least in (("texts", 1), ("pairs", 1), ("layers", 1), ("held_out", 0), ("prompts", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}: expected at least {least}, found {getattr(config, name)}")
    if config.width < 8 or config.width % 8:
        raise ValueError(f"width: expected a multiple of 8, four heads of even size, found {config.width}")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
