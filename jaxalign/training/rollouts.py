"""Roll-outs of a base, scored, in numbered shards: what train.value and train.shaping learn from.

An interrupted job goes on with the first shard that is missing; no prompt is lost or repeated. Several processes share
the shards that are missing, each on devices of its own.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _devices, _hosts, _io, _progress, _runs, _signals, decoding, models, policies, rewards
from jaxalign._checks import check_language_model
from jaxalign.data import chats, encoded
from jaxalign.data.text_options import TextOptions, ending_ids, format_of
from jaxalign.models import sharding
from jaxalign.prompts import prompt_batch
from jaxalign.tokens import Text
from jaxalign.training import dry_run, roll_in
from jaxalign.training.job import StartedModel, first_rows, iterate
from jaxalign.training.options import RolloutOptions, RunOptions
from jaxalign.training.training_job import Job
from jaxalign.types import Array, Params, Policy, Reward, TokenBatch

AGAIN = "remove that file and the summary.json of its run, and repeat the command that made it"


class Rollout(NamedTuple):
    """A response to a prompt, scored."""

    prompt: list[int]
    """Token ids."""
    response: list[int]
    """Token ids."""
    reward: float
    """Of the whole response."""
    row: int
    """Row of the prompt in its file."""
    start: int = 0
    """How many of its first tokens another policy than the base wrote (`roll_in`)."""


def inputs(options: RolloutOptions) -> list[str]:
    """The files and folders that roll-outs are made of or read from."""
    # The shards alone: the folder around them is written anew each time its own command is repeated.
    return [*_source_inputs(options), str(pathlib.Path(options.rollouts) / "rollouts") if options.rollouts else ""]


def _source_inputs(options: RolloutOptions) -> list[str]:
    return [*models.source_folders(options.base), options.prompts, *rewards.reward_inputs(options.reward)]


def open_reward(
    spec: str,
    lm: models.LanguageModel,
    tokenizer: Any,
    *,
    dtype: str,
    sources: Sequence[Text] | None = None,
    text: TextOptions | None = None,
    between_programs: bool = False,
) -> tuple[Reward, Params]:
    """The Reward of --reward.

    Args:
      spec: as `rewards.parse_reward` reads it.
      lm: the model whose responses are scored.
      tokenizer: its tokenizer.
      dtype: type that reward models compute in.
      sources: all prompts as they were given, by their index.
      text: how the prompts became tokens.
      between_programs: of its programs, as in `rewards.from_text`.

    Returns:
      The Reward and its parameters.

    Raises:
      ValueError: no such program, no scalar head.
    """
    reader = rewards.reader_of(
        format_of(TextOptions() if text is None else text, tokenizer, lm.eos_ids), lm, sources, turns=chats.prompt_chat
    )

    def open_model(role: str, folder: str, label: str | None) -> tuple[Reward, Params]:
        return rewards.open_reward(reader, folder, label=label, dtype=dtype, name=role)

    return rewards.build_reward(spec, open_model=open_model, reader=reader, between_programs=between_programs)


def reward_shapes(spec: str, *, dtype: str) -> tuple[Reward, Params]:
    """For a dry run: a reward that computes nothing, with the shapes of the parameters of --reward.

    Args:
      spec: as `rewards.parse_reward` reads it.
      dtype: type that reward models compute in.

    Returns:
      The Reward and a tuple of the shapes of each model's parameters.
    """
    folders = rewards.reward_roles(spec).values()
    return _nothing, tuple(dry_run.load_shapes(folder, dtype=dtype)[1] for folder in folders)


def _nothing(params: Params, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
    return jnp.zeros(prompt_length.shape, jnp.float32)


def tell_memory(
    options: RolloutOptions, prompts: Sequence[encoded.Prompt], *, dtype: str, stage: str, mesh: str, guide: str = ""
) -> dry_run.Estimate:
    """Says for a dry run what drawing a batch of responses needs of a device.

    Args:
      options: the base, the reward, and how many responses are drawn together.
      prompts: all prompts; the longest are taken.
      dtype: type of the models.
      stage: name of the job.
      mesh: of the devices that draw it, as `sharding.make_mesh` reads it.
      guide: folder of the head that writes the first tokens, whose weights count; "": none.

    Returns:
      The figures, without operations; passes of a reward and of a guide are not among them.

    Raises:
      ValueError: a mesh that the models do not fit.
    """
    devices = sharding.make_mesh(mesh, local=True)
    lm, base = dry_run.load_shapes(options.base, dtype=dtype)
    lm = models.LanguageModel(lm.config, dtype, devices)
    reward, params = reward_shapes(options.reward, dtype=dtype)
    policy, size = policies.language_model(lm), max(options.decode_batch // options.samples, 1)
    rows = dry_run.rows_of_batch([prompt.tokens for prompt in prompts], size)

    def draw(params: Params, rng: Array, batch: TokenBatch, beside: Params) -> Any:
        del beside  # lies on the devices
        drawn: dict[str, Any] = {"num_samples": options.samples, "max_new_tokens": options.max_new_tokens}
        return decoding.best_of_n(policy, reward, params, rng, batch, eos_ids=lm.config.eos_ids, **drawn).info

    head = dry_run.load_shapes(guide, dtype=dtype)[1] if guide else None
    arguments, beside = dry_run.abstract(({"policy": base, "reward": params}, head), devices)
    batch = prompt_batch(rows, batch_size=size)
    held = dry_run.held(jax.jit(draw), arguments, jax.random.key(0), batch, beside)
    number, kind = 1 if devices is None else devices.size, _devices.every()[0].device_kind
    print(f"{stage}: an estimate, by the program compiled for {number} of {kind}; per device:")
    print(
        f"  {size * options.samples} responses at a time: {held / 1e9:.4g} GB, weights included; a reward's pass aside"
    )
    weights, tokens = dry_run.bytes_of((arguments, beside)), size * options.samples * options.max_new_tokens
    return dry_run.Estimate(number, 0, 0, weights, held - weights, held, 0.0, tokens)


def load_base(
    base: str, tokenizer: Any, *, dtype: str, model: str = "", mesh: jax.sharding.Mesh | None = None
) -> tuple[models.LanguageModel, Params]:
    """The base that makes the roll-outs, over the ids of the tokenizer, whose model learns from them.

    Args:
      base: its folder.
      tokenizer: of the model that learns from the roll-outs.
      dtype: type of its parameters and activations.
      model: folder of the model that learns, or of its tokenizer; "" where that is the base's own.
      mesh: devices that it lies on.

    Returns:
      The base and its parameters.

    Raises:
      ValueError: a folder of no language model; a base whose texts hold ids that this tokenizer reads as other tokens,
        or whose EOS it lacks.
    """
    lm, params = models.load(base, dtype=dtype, mesh=mesh)
    check_language_model("base", lm, base)
    if model in ("", base):
        return lm, params
    models.check_tokens(models.tokenizer(base), tokenizer, name="model")
    known = 1 + max(tokenizer.get_vocab().values())
    if known >= lm.vocab_size:
        return lm, params
    cut, cut_params = models.match_vocabulary((lm, params), names=("base",), size=known)[0]
    models.check_ends_kept(lm, cut, name="base")
    return cut, cut_params if mesh is None else sharding.shard(cut_params, mesh)


def roll_out(
    options: RolloutOptions,
    prompts: Sequence[encoded.Prompt],
    tokenizer: Any,
    *,
    run: RunOptions,
    out: pathlib.Path,
    stage: str,
    max_length: int,
    text: TextOptions,
    model: str = "",
    mesh: str = "",
    rolls_in: roll_in.RollIn | None = None,
) -> list[Rollout]:
    """Makes roll-outs in shards; shards that are there are read.

    Args:
      options: the base, the reward, and how many roll-outs are made.
      prompts: all prompts of the file, in order.
      tokenizer: of the model that learns from the roll-outs.
      run: seed of all draws, type of the models.
      out: run folder, in which rollouts/ is written.
      stage: name of the job on the progress bar.
      max_length: longest row [tokens], prompt and response.
      text: how the prompts became tokens; what ends a response follows from it (`ending_ids`).
      model: as in `load_base`.
      mesh: devices that draw and score, as `sharding.make_mesh` reads it.
      rolls_in: what writes the first tokens, and whose roll-outs are read as well; None: the base alone.

    Returns:
      All roll-outs, in order of prompt and sample; those of earlier rounds first.

    Raises:
      ValueError: shards were made from other prompts, or a roll-out is longer than `max_length` with its prompt.
    """
    digest = digest_of(prompts)
    shards = -(-len(prompts) // options.shard)
    folder = (pathlib.Path(options.rollouts) if options.rollouts else out) / "rollouts"
    paths = roll_in.shard_paths(folder, shards)
    if options.rollouts:
        _check_same(options, run, paths)
    shard_rows = [range(k * options.shard, min((k + 1) * options.shard, len(prompts))) for k in range(shards)]
    # What the first process finds missing is dealt out: the others may look later, when some are written.
    lacking: list[int] = json.loads(_hosts.from_first(json.dumps([k for k in range(shards) if not paths[k].exists()])))
    rolls_in = roll_in.RollIn("", 1.0) if rolls_in is None else rolls_in
    before = roll_in.shards_of(rolls_in.earlier)
    if lacking:
        devices = sharding.make_mesh(mesh, local=True)  # each process has shards of its own
        lm, params = load_base(options.base, tokenizer, dtype=run.dtype, model=model, mesh=devices)
        sources = [prompt.source for prompt in prompts]
        lm = models.with_eos(lm, ending_ids(text, tokenizer, lm.eos_ids, sources))
        policy = policies.language_model(lm)
        reward, reward_params = open_reward(options.reward, lm, tokenizer, dtype=run.dtype, sources=sources, text=text)
        arguments = {"policy": params, "reward": reward_params}
        guide = roll_in.guide_of(rolls_in, options, lm, params, tokenizer, dtype=run.dtype)
        _runs.begin(out)
        folder.mkdir(exist_ok=True)
        more: dict[str, Any] = {} if guide is None else {"guide": guide}
        with _progress.progress(f"{stage}: roll-outs", len(prompts), unit="prompt") as bar:
            ends = lm.config.eos_ids
            bar.update(sum(map(len, (shard_rows[k] for k in range(shards) if k not in lacking))))
            for k in _hosts.dealt(lacking):
                _signals.check()
                write_shard(
                    options, run.seed, policy, reward, arguments, ends, prompts, shard_rows[k], paths[k], digest, **more
                )
                bar.update(len(shard_rows[k]))
        _hosts.barrier("roll-outs")
    found = [row for path in [*before, *paths] for row in _read(path, prompts, digest, options.prompts)]
    longest = max(len(row.prompt) + len(row.response) for row in found)
    if longest > max_length:
        raise ValueError(f"max_length: expected at least the longest roll-out's {longest} tokens, found {max_length}")
    _runs.begin(out)  # where nothing was drawn
    return found


def digest_of(prompts: Sequence[encoded.Prompt]) -> str:
    """A short hash of the token ids of all prompts, which each shard holds."""
    return hashlib.blake2b(repr([p.tokens for p in prompts]).encode(), digest_size=8).hexdigest()


def longest_rollouts(options: RolloutOptions, prompts: Sequence[encoded.Prompt]) -> list[Rollout]:
    """Rows of the largest size that roll-outs have, for a dry run: the first tokens of the vocabulary, and rewards that
    differ."""
    response = list(range(options.max_new_tokens))
    return [Rollout(p.tokens, response, float(k), row) for row, p in enumerate(prompts) for k in range(options.samples)]


def roll_out_for(
    job: Job,
    options: RolloutOptions,
    prompts: Sequence[encoded.Prompt],
    started: StartedModel,
    rolls_in: roll_in.RollIn | None = None,
) -> list[Rollout]:
    """`roll_out` in a job's folder, by its seed and type, for the model that it trains; in a dry run, rows of the
    largest size."""
    config = job.config
    if config.run.dry_run:
        if not options.rollouts:
            guide, mesh = "" if rolls_in is None else rolls_in.folder, config.mesh.mesh
            tell_memory(options, prompts, dtype=config.run.dtype, stage=job.stage, mesh=mesh, guide=guide)
        return longest_rollouts(options, prompts)
    return roll_out(
        options,
        prompts,
        started.tokenizer,
        run=config.run,
        out=job.out,
        stage=job.stage,
        max_length=config.rows.max_length,
        text=config.text,
        model=config.model.model or config.model.tokenizer,
        mesh=config.mesh.mesh,
        rolls_in=rolls_in,
    )


def _check_same(options: RolloutOptions, run: RunOptions, paths: list[pathlib.Path]) -> None:
    """ValueError where the roll-outs of --rollouts are not those that this run would make, or are not complete."""
    folder = pathlib.Path(options.rollouts)
    other = folder / "config.json"
    made = _runs.stored_options(folder) if other.exists() else {}
    wanted = {name: getattr(options, name) for name in ("base", "reward", "samples", "max_new_tokens", "shard")}
    began = _runs.began_in(folder)
    for name, value in (wanted | {"seed": run.seed, "dtype": run.dtype}).items():
        if made.get(name) != value and not _runs.same_place(made.get(name), value, began):
            raise ValueError(f"rollouts: expected those of {name} {value}, found {made.get(name)} in {other}")
    # Other weights under the same name made other roll-outs.
    changed = _runs.changed_inputs(folder, inputs=_source_inputs(options))
    if changed:
        raise ValueError(f"rollouts: expected those of the files as they are now, found {changed} changed since")
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"rollouts: expected all {len(paths)} shards in {paths[0].parent}, found none of {missing}")


def _read(path: pathlib.Path, prompts: Sequence[encoded.Prompt], digest: str, name: str) -> list[Rollout]:
    names = ("index", "tokens", "length", "reward")
    shard = _io.read_arrays(path, ("prompts", *names), then=AGAIN)
    if str(shard["prompts"]) != digest:
        raise ValueError(f"prompts: expected those that {path} was made from, found others in {name}")
    columns = [shard[n] for n in names]
    start = shard["start"] if "start" in shard else np.zeros_like(columns[0])
    return [
        Rollout(prompts[i].tokens, tokens[:length].tolist(), float(reward), int(i), int(begin))
        for i, tokens, length, reward, begin in zip(*columns, start, strict=True)
    ]


def write_shard(
    options: RolloutOptions,
    seed: int,
    policy: Policy,
    reward: Reward,
    arguments: Params,
    eos_ids: tuple[int, ...],
    prompts: Sequence[encoded.Prompt],
    rows: range,
    path: pathlib.Path,
    digest: str,
    guide: roll_in.Guide | None = None,
) -> None:
    """Makes one shard, a function of the seed and its prompts' rows. Its file is whole or absent.

    Args:
      options: samples, limit and rows decoded together.
      seed: of the draws.
      policy, reward, arguments: the base, the Reward, and {"policy", "reward"}, their parameters.
      eos_ids: the ids that end a response.
      prompts: all prompts.
      rows: those of the shard.
      path: the shard's file.
      digest: of all prompts, which is kept with the roll-outs.
      guide: what writes the first tokens, as many as are kept with them; None: the base.

    Raises:
      ValueError: a reward that is not finite.
    """
    parts = []
    size = max(options.decode_batch // (options.samples if guide is None else 1), 1)
    limits: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "eos_ids": eos_ids}
    for part in iterate(list(rows), size):
        _signals.check()
        batch = prompt_batch([prompts[i].tokens for i in part], index=part, batch_size=size)
        rng = jax.random.key(seed)
        if guide is None:
            drawn = decoding.best_of_n(
                policy, reward, arguments, rng, batch, num_samples=options.samples, **limits
            ).info
            length = drawn.samples.mask.sum(axis=-1)
            kept = roll_in.Drawn(drawn.samples.tokens, length, drawn.reward, jnp.zeros_like(length))
        else:
            kept = roll_in.draw(guide, policy, reward, arguments, rng, batch, samples=options.samples, **limits)
        tokens, length, scores, start = first_rows(tuple(kept), len(part))
        if not np.isfinite(scores).all():
            raise ValueError(f"reward: expected finite numbers, found {scores} for prompts {part}")
        index = np.repeat(part, options.samples)
        parts.append((index, tokens.reshape(-1, tokens.shape[-1]), *(x.reshape(-1) for x in (length, scores, start))))
    names = ("index", "tokens", "length", "reward", "start")
    told: dict[str, Any] = dict(zip(names, (np.concatenate(x) for x in zip(*parts, strict=True)), strict=True))
    _io.write_arrays(path, told | {"prompts": digest})


def by_prompt(rows: list[Rollout]) -> dict[int, list[Rollout]]:
    """Groups roll-outs: row of the prompt -> its roll-outs, in order."""
    found: dict[int, list[Rollout]] = {}
    for row in rows:
        found.setdefault(row.row, []).append(row)
    return found
