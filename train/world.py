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
from collections.abc import Sequence
from typing import Any, Literal

from jaxalign import _io, commands, models
from jaxalign.data import tokenizers
from jaxalign.worlds import opinions, summaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.world."""

    out: str
    """Folder of the files, new or empty."""
    task: Literal["opinions", "summaries"] = "opinions"
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


def rows(config: Config) -> dict[str, list[dict[str, str]]]:
    """Rows of each file, by its name."""
    if config.task == "opinions":
        asked = opinions.prompts()
        kept, held = [p for i, p in enumerate(asked) if i % 5], asked[::5]
        drift = opinions.prompts("held_out")
        world: Any = opinions
    else:
        kept = summaries.items(3_000, seed=config.seed)
        known = set(kept)
        held = [p for p in summaries.items(2 * config.held_out, seed=config.seed + 1) if p not in known]
        drift = summaries.items(config.held_out, seed=config.seed, split="held_out")
        world = summaries
    return {
        "texts": world.corpus(config.texts, seed=config.seed, prompt_pool=kept),
        "pairs": world.preferences(config.pairs, seed=config.seed, prompt_pool=kept),
        "prompts": _prompts(kept, len(kept)),
        "held_out": _prompts(held, config.held_out),
        "drift": _prompts(drift, config.held_out),
    }


def _prompts(asked: Sequence[str], n: int) -> list[dict[str, str]]:
    """n prompts spread over all (over the topics, that is), each once at most."""
    n = min(n, len(asked))
    return [{"prompt": asked[i * len(asked) // n]} for i in range(n)]


def architecture(config: Config, vocabulary: Any) -> models.Config:
    """A small Llama for the words of the task."""
    return models.Config(
        vocab_size=len(vocabulary),
        hidden_size=config.width,
        num_layers=config.layers,
        num_heads=4,
        num_kv_heads=4,
        head_dim=config.width // 4,
        intermediate_size=3 * config.width,
        max_length=128,
        eos_ids=(vocabulary.eos_token_id,),
        tie_embeddings=True,
    )


def run(config: Config) -> pathlib.Path:
    """Writes the files, whole or not at all; gives their folder."""
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
    for name, found in rows(config).items():
        (temporary / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
        print(f"{name}.jsonl: {len(found)} rows")
    vocabulary = tokenizers.word_level((opinions if config.task == "opinions" else summaries).words())
    vocabulary.save_pretrained(temporary / "tokenizer")
    _io.write_json(temporary / "config.json", models.config_to_hf(architecture(config, vocabulary)))
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
