"""Roll-outs of a base, scored, in numbered shards: what train.value and train.shaping learn from.

An interrupted job goes on with the first shard that is missing; no prompt is lost or repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxalign import _io, _progress, data, decoding, models, policies, rewards, tokens
from jaxalign.data import chats, encoded, preferences
from jaxalign.data.text_options import TextOptions, format_of
from jaxalign.prompts import prompt_batch
from jaxalign.tokens import Text
from jaxalign.training import job, reading
from jaxalign.types import Params, Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What roll-outs are made from, and how."""

    base: str
    """Folder of the base language model that makes the roll-outs."""
    prompts: str
    """Prompts: files, folders or a data set's name, of any form (docs/data.md)."""
    reward: str
    """Folder of a reward model (DIR#LABEL for one of several labels), or MODULE:FUNCTION, a program f(prompts,
    responses) -> numbers on lists of texts; or a weighted sum of such, "DIR - 0.1 * MODULE:FUNCTION"."""
    samples: int = 4
    """Roll-outs per prompt."""
    max_new_tokens: int = 128
    """Limit of a roll-out [tokens], its EOS included; one without EOS is scored as it stands."""
    shard: int = 256
    """Prompts per shard of roll-outs."""
    decode_batch: int = 64
    """Roll-outs decoded together."""
    rollouts: str = ""
    """Run folder of another train.value, train.shaping or train.calibrate with the same base, prompts, reward, samples,
    limit and seed: its roll-outs are read, none are made."""
    max_length: int = 256
    """Longest row [tokens], prompt and response; a longer roll-out is an error."""
    seed: int = 0
    """Seed of all draws."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of the weights as they are used; rewards stay float32."""
    text: TextOptions = dataclasses.field(default_factory=TextOptions)
    """How texts and chats become tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions(Source, job.TrainingOptions):
    """Options of scripts that train on roll-outs; --model defaults to --base."""


class Rollout(NamedTuple):
    """prompt and response: token ids; reward: of the whole response; row: of the prompt in its file."""

    prompt: list[int]
    response: list[int]
    reward: float
    row: int


def check(config: RolloutOptions) -> None:
    """ValueErrors that name the option."""
    job.check_training_options(config)
    check_source(config)


def check_source(config: Source) -> None:
    """ValueErrors that name the option."""
    for name in ("samples", "max_new_tokens", "shard", "decode_batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")


def inputs(config: Source) -> list[str]:
    """The files and folders that a run reads."""
    folders = _source_inputs(config)
    if isinstance(config, job.TrainingOptions):
        folders += [*models.source_folders(config.model), config.architecture, config.tokenizer]
    # The shards alone: the folder around them is written anew each time its own command is repeated.
    return [*folders, str(pathlib.Path(config.rollouts) / "rollouts") if config.rollouts else ""]


def _source_inputs(config: Source) -> list[str]:
    return [*models.source_folders(config.base), config.prompts, *rewards.reward_inputs(config.reward)]


def judge(
    spec: str, lm: models.LanguageModel, tokenizer: Any, *, dtype: str, sources: Sequence[Text] | None = None
) -> tuple[Reward, Params]:
    """The Reward of --reward (`rewards.parse_reward`) and its parameters; sources: all prompts as they were given.
    ValueErrors: no such program, no scalar head."""
    reader = rewards.Reader(tokens.text_format(tokenizer, eos_ids=lm.eos_ids), lm, sources, chats.prompt_chat)

    def open_model(role: str, folder: str, label: str | None) -> tuple[Reward, Params]:
        return rewards.open_reward(reader, folder, label=label, dtype=dtype, name=role)

    return rewards.build_reward(spec, open_model=open_model, reader=reader)


def load_base(config: Source, tokenizer: Any) -> tuple[models.LanguageModel, Params]:
    """The base that makes the roll-outs, over the ids of the tokenizer, whose model learns from them. ValueError: a
    base whose texts hold ids that this tokenizer reads as other tokens."""
    lm, params = models.load(config.base, dtype=config.dtype)
    if not isinstance(config, job.TrainingOptions) or (config.model or config.tokenizer) in ("", config.base):
        return lm, params
    models.check_tokens(models.tokenizer(config.base), tokenizer, name="model")
    known = 1 + max(tokenizer.get_vocab().values())
    if known >= lm.vocab_size:
        return lm, params
    return models.match_vocabulary((lm, params), names=("base",), size=known)[0]


def roll_out(config: Source, out: pathlib.Path, tokenizer: Any, *, stage: str) -> list[Rollout]:
    """All roll-outs, in order of prompt and sample; shards that are there are read. ValueError: they were made from
    other prompts, or one is longer than --max-length with its prompt."""
    prompts = read_prompts(config, tokenizer)
    digest = hashlib.blake2b(repr([p.tokens for p in prompts]).encode(), digest_size=8).hexdigest()
    shards = -(-len(prompts) // config.shard)
    folder = (pathlib.Path(config.rollouts) if config.rollouts else out) / "rollouts"
    paths = [folder / f"{k:05d}.npz" for k in range(shards)]
    if config.rollouts:
        _check_same(config, paths)
    folder.mkdir(exist_ok=True)
    if not all(path.exists() for path in paths):
        lm, params = load_base(config, tokenizer)
        policy = policies.language_model(lm)
        sources = [prompt.source for prompt in prompts]
        reward, reward_params = judge(config.reward, lm, tokenizer, dtype=config.dtype, sources=sources)
        arguments = {"policy": params, "reward": reward_params}
        with _progress.progress(f"{stage}: roll-outs", len(prompts), unit="prompt") as bar:
            for k, path in enumerate(paths):
                rows = range(k * config.shard, min((k + 1) * config.shard, len(prompts)))
                if not path.exists():
                    write_shard(config, policy, reward, arguments, lm.config.eos_ids, prompts, rows, path, digest)
                bar.update(len(rows))
    found = [row for path in paths for row in _read(path, prompts, digest, config.prompts)]
    longest = max(len(row.prompt) + len(row.response) for row in found)
    if longest > config.max_length:
        raise ValueError(
            f"max_length: expected at least the longest roll-out's {longest} tokens, found {config.max_length}"
        )
    return found


def read_prompts(config: Any, tokenizer: Any) -> list[data.Prompt]:
    """The prompts of --prompts as token ids (`reading.read_prompts`)."""
    room = config.max_length - config.max_new_tokens
    return reading.read_prompts(config.prompts, config.text, format_of(config.text, tokenizer), room=room)


def _check_same(config: Source, paths: list[pathlib.Path]) -> None:
    """ValueError where the roll-outs of --rollouts are not those that this run would make, or are not complete."""
    other = pathlib.Path(config.rollouts) / "config.json"
    made = json.loads(other.read_text()) if other.exists() else {}
    for name in ("base", "reward", "samples", "max_new_tokens", "shard", "seed", "dtype"):
        if made.get(name) != getattr(config, name):
            raise ValueError(
                f"rollouts: expected those of {name} {getattr(config, name)}, found {made.get(name)} in {other}"
            )
    # By their time of change: other weights under the same name made other roll-outs.
    changed = _io.changed_inputs(pathlib.Path(config.rollouts), inputs=_source_inputs(config))
    if changed:
        raise ValueError(f"rollouts: expected those of the files as they are now, found {changed} changed since")
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"rollouts: expected all {len(paths)} shards in {paths[0].parent}, found none of {missing}")


def _read(path: pathlib.Path, prompts: list[data.Prompt], digest: str, name: str) -> list[Rollout]:
    with np.load(path) as shard:
        if str(shard["prompts"]) != digest:
            raise ValueError(f"prompts: expected those that {path} was made from, found others in {name}")
        columns = (shard[n] for n in ("index", "tokens", "length", "reward"))
        return [
            Rollout(prompts[i].tokens, tokens[:length].tolist(), float(paid), int(i))
            for i, tokens, length, paid in zip(*columns, strict=True)
        ]


def write_shard(
    config: Source,
    policy: Any,
    reward: Reward,
    arguments: Params,
    eos_ids: tuple[int, ...],
    prompts: list[data.Prompt],
    rows: range,
    path: pathlib.Path,
    digest: str,
) -> None:
    """One shard: a function of the seed and its prompts' rows. Written under a temporary name, then renamed."""
    parts = []
    size = max(config.decode_batch // config.samples, 1)
    for part in job.iterate(list(rows), size):
        batch = prompt_batch([prompts[i].tokens for i in part], index=part, batch_size=size)
        drawn = decoding.best_of_n(
            policy,
            reward,
            arguments,
            jax.random.key(config.seed),
            batch,
            num_samples=config.samples,
            max_new_tokens=config.max_new_tokens,
            eos_ids=eos_ids,
        ).info
        kept = drawn.samples.tokens, drawn.samples.mask, drawn.reward
        tokens, mask, paid = job.first_rows(kept, len(part))
        if not np.isfinite(paid).all():
            raise ValueError(f"reward: expected finite numbers, found {paid} for prompts {part}")
        index = np.repeat(part, config.samples)
        parts.append((index, tokens.reshape(-1, tokens.shape[-1]), mask.sum(-1).reshape(-1), paid.reshape(-1)))
    index, tokens, length, paid = (np.concatenate(x) for x in zip(*parts, strict=True))
    temporary = path.with_name(f".{path.name}")
    with temporary.open("wb") as sink:
        np.savez(sink, index=index, tokens=tokens, length=length, reward=paid, prompts=np.asarray(digest))
    temporary.replace(path)


def pad(rows: list[Rollout], *, length: int) -> dict[str, np.ndarray]:
    """{"tokens", "mask", "loss_mask" [b,L], "reward" [b]}, right-padded."""
    texts = [encoded.TextTokens(row.prompt, row.response, "roll-out") for row in rows]
    return preferences.pad_texts(texts, length=length) | {"reward": np.asarray([r.reward for r in rows], np.float32)}


def by_prompt(rows: list[Rollout]) -> dict[int, list[Rollout]]:
    """Row of the prompt -> the roll-outs of that prompt, in order."""
    found: dict[int, list[Rollout]] = {}
    for row in rows:
        found.setdefault(row.row, []).append(row)
    return found


def total_length(row: Rollout) -> int:
    """Tokens of prompt and response."""
    return len(row.prompt) + len(row.response)
