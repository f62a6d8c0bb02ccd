"""Train a byte-level BPE tokenizer on the texts of a data file:

python -m train.tokenizer --data pairs.jsonl --vocab-size 4096 --out runs/tokenizer

The data is that of train.sft and train.reward_model; of a pair, prompt and both responses are read.
"""

from __future__ import annotations

import dataclasses
import pathlib

from jaxalign import _hosts, commands
from jaxalign.data import preferences, tokenizers
from jaxalign.models.hf.files import whole_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.tokenizer."""

    data: str
    """Texts or preference pairs without chat messages: files, folders or a data set's name (docs/data.md)."""
    out: str
    """Folder of the tokenizer, new or empty."""
    vocab_size: int = 4096
    """Tokens, <pad>, <eos>, <unk> and the 256 bytes included."""
    skip_bad: bool = False
    """Skip and count bad rows of the data, in place of an error."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> pathlib.Path:
    """Trains and writes the tokenizer; gives its folder."""
    _hosts.check_single("train.tokenizer")
    out = pathlib.Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, found {out}")
    loaded = preferences.read_strings(config.data, skip_bad=config.skip_bad)
    tokenizer = tokenizers.byte_level(loaded.rows, vocab_size=config.vocab_size)
    with whole_folder(out, overwrite=False) as temporary:
        tokenizer.save_pretrained(temporary)
    print(f"{len(loaded.rows)} texts, {loaded.skipped} bad rows skipped, {len(tokenizer)} tokens")
    print(
        f"wrote {out}; next: python -m train.sft --tokenizer {out} --architecture FILE --data {config.data} --out DIR"
    )
    return out


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
