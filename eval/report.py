"""Write one HTML page from run folders, to look at in a browser and to send around; it fetches nothing:

python -m eval.report runs/quickstart --out report.html
python -m eval.report runs/decode_a runs/decode_b --title "Two bases" --out report.html

A run folder is one of eval.decode, train.quickstart or a training script, or any folder with such inside. The page
shows gold and proxy reward against KL with intervals, the methods with what they cost, win rates on the same prompts,
where the learned reward is exploited, training curves, responses beside each other, the tokens of those that
eval.decode --inspect has looked at, and the commands and versions behind it all. Every figure has its table.
"""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from jaxalign import _hosts, _options, commands, launch
from jaxalign.evaluation import report


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of eval.report."""

    runs: commands.Positional[tuple[str, ...]] = ()
    """Run folders."""
    out: str
    """The page, an .html file."""
    title: str = ""
    """Its heading. Default: the names of the folders."""
    prompts: int = 200
    """Prompts whose responses are on the page; the numbers are of all in any case."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def run(config: Config) -> str:
    """Writes the page; gives its path."""
    _hosts.check_single("eval.report")
    if not config.out.endswith((".html", ".htm")):
        raise ValueError(f"out: expected the name of an .html file, found {config.out!r}")
    notes = report.write_report(config.runs, config.out, title=config.title, prompts=config.prompts, command=command_of)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {config.out}")
    return config.out


def command_of(options: dict[str, Any]) -> str | None:
    """The command that a folder's options are of: the job with these options and the fewest others; None without."""
    found = []
    for folder in commands.FOLDERS:
        for name in commands.jobs(f"{launch.__name__}.{folder}"):
            job = commands.load(name)
            if hasattr(job, "Config"):
                known = _options.names(job.Config)
                if set(options) <= known:
                    found.append((len(known - set(options)), f"jaxalign {name}", job.Config))
    if not found:
        return None
    _, command, config = min(found, key=lambda one: one[:2])
    defaults = _options.defaults(config)
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        default = defaults.get(name)
        if value == (list(default) if isinstance(default, tuple) else default) or value is None:
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif name == "method" and isinstance(value, list):
            words += [f"{flag} {shlex.quote(str(method))}" for method in value]
        else:
            words.append(" ".join([flag, *map(shlex.quote, map(str, value if isinstance(value, list) else [value]))]))
    return " \\\n    ".join([command, *words]) if len(words) > 4 else " ".join([command, *words])


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
