"""Write a task of the embedded world as files that every training script reads:

python -m train.world --task opinions --out runs/world
python -m train.world --task summaries --out runs/news

texts.jsonl (for train.sft), pairs.jsonl (train.reward_model, train.arm), prompts.jsonl (train.value), held_out.jsonl
(eval.decode: prompts of none of the others), drift.jsonl (prompts on topics of none of the others), tokenizer/ and
config.json, a small Llama's. The true utility of a text is the program jaxalign.worlds.opinions:golds, or
jaxalign.worlds.summaries:golds.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

from jaxalign import _hosts, _io, commands, models
from jaxalign.data import tokenizers
from jaxalign.worlds import files, opinions, summaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.world."""

    out: str
    """Folder of the files, new or empty."""
    task: files.Task = "opinions"
    """opinions: loaded and neutral views, readers like flattery; summaries: of news items, readers like length."""
    texts: int = 12_000
    """Texts of the base."""
    pairs: int = 6_000
    """Preference pairs."""
    held_out: int = 128
    """Prompts to decode; as many at most under drift."""
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
    for name in ("texts", "pairs", "held_out", "layers"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")
    if config.width < 8 or config.width % 8:
        raise ValueError(f"width: expected a multiple of 8, four heads of even size, found {config.width}")
    out = pathlib.Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, found {out}")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    sizes = {name: getattr(config, name) for name in ("texts", "pairs", "held_out", "seed")}
    for name, found in files.world_rows(config.task, **sizes).items():
        (temporary / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        print(f"{name}.jsonl: {len(found)} rows")
    vocabulary = tokenizers.word_level((opinions if config.task == "opinions" else summaries).words())
    vocabulary.save_pretrained(temporary / "tokenizer")
    architecture = files.small_llama(vocabulary, layers=config.layers, width=config.width)
    _io.write_json(temporary / "config.json", models.config_to_hf(architecture))
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    print(
        f"wrote {out}; next: python -m train.sft --data {out / 'texts.jsonl'} --architecture {out / 'config.json'} "
        f"--tokenizer {out / 'tokenizer'} --out DIR"
    )
    return out


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
