"""Train a value model for controlled decoding on its own roll-outs:

python -m train.value --base DIR --prompts prompts.jsonl --reward DIR --out runs/value

The base answers every prompt; a reward model (--reward DIR) or a program (--reward module:function) scores the answers;
the model learns the value of each prefix. Roll-outs are written in numbered shards: an interrupted run goes on with the
first shard that is missing, and no prompt is lost or repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import cli, data, decoding, models, policies, rewards
from jaxalign.data import preferences
from jaxalign.training import objectives
from jaxalign.types import Params, Reward
from train import common


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(common.Options):
    """Options of train.value."""

    base: str
    """Folder of the base language model that makes the roll-outs; --model defaults to it."""
    prompts: str
    """File of prompts: .txt, .jsonl or .jsonl.gz."""
    reward: str
    """Folder of a reward model over the base's vocabulary, or MODULE:FUNCTION, a program f(prompts, responses) ->
    numbers on lists of texts."""
    samples: int = 4
    """Roll-outs per prompt."""
    max_new_tokens: int = 128
    """Limit of a roll-out [tokens], its EOS included; one without EOS is scored as it stands."""
    shard: int = 256
    """Prompts per shard of roll-outs."""
    decode_batch: int = 64
    """Roll-outs decoded together."""
    objective: Literal["fudge", "cd_q", "td"] = "fudge"
    """fudge: the roll-out's reward at every prefix; cd_q: exact mean over the base's next tokens (Q head); td: the next
    prefix's value."""
    head: Literal["scalar", "q"] = "scalar"
    """scalar: one value a prefix; q: the value of every next token at once."""
    head_size: int = 0
    """Width of the head's hidden layer; 0: the model's."""


class Rollout(NamedTuple):
    """prompt and response: token ids; reward: of the whole response."""

    prompt: list[int]
    response: list[int]
    reward: float


def judge(config: Config, lm: models.LanguageModel, tokenizer: Any) -> tuple[Reward, Params]:
    """The Reward of --reward and its parameters. ValueErrors: no such program, another vocabulary, no scalar head."""
    if rewards.is_program(config.reward):
        read = rewards.program(config.reward)
        return rewards.from_text(lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True), read), None
    models.check_tokens(tokenizer.get_vocab(), models.tokenizer(config.reward).get_vocab(), name="reward")
    reward_lm, params = models.load(config.reward, dtype=config.dtype)
    if reward_lm.vocab_size != lm.vocab_size:
        raise ValueError(f"reward: expected {lm.vocab_size} tokens as the base has, found {reward_lm.vocab_size}")
    return rewards.from_model(reward_lm), params


def roll_out(config: Config, out: pathlib.Path, tokenizer: Any) -> list[Rollout]:
    """All roll-outs, in order of prompt and sample; shards that are there are read."""
    prompts = data.tokenize_prompts(config.prompts, tokenizer)
    digest = hashlib.blake2b(repr([p.tokens for p in prompts]).encode(), digest_size=8).hexdigest()
    shards = -(-len(prompts) // config.shard)
    folder = out / "rollouts"
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{k:05d}.npz" for k in range(shards)]
    if not all(path.exists() for path in paths):
        lm, params = models.load(config.base, dtype=config.dtype)
        policy = policies.language_model(lm)
        reward, reward_params = judge(config, lm, tokenizer)
        arguments = {"policy": params, "reward": reward_params}
        with cli.progress("value: roll-outs", len(prompts), unit="prompt") as bar:
            for k, path in enumerate(paths):
                rows = range(k * config.shard, min((k + 1) * config.shard, len(prompts)))
                if not path.exists():
                    _write_shard(config, policy, reward, arguments, lm.config.eos_ids, prompts, rows, path, digest)
                bar.update(len(rows))
    out_rows = []
    for path in paths:
        with np.load(path) as shard:
            if str(shard["prompts"]) != digest:
                raise ValueError(f"prompts: expected those that {path} was made from, found others in {config.prompts}")
            for i, tokens, length, paid in zip(
                *(shard[n] for n in ("index", "tokens", "length", "reward")), strict=True
            ):
                out_rows.append(Rollout(prompts[i].tokens, tokens[:length].tolist(), float(paid)))
    return out_rows


def _write_shard(
    config: Config,
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
    for part in common.iterate(list(rows), size):
        batch = data.prompt_batch([prompts[i].tokens for i in part], index=part, batch_size=size)
        drawn = decoding.best_of_n(
            policy,
            reward,
            arguments,
            jax.random.key(config.seed),
            batch,
            n=config.samples,
            max_new_tokens=config.max_new_tokens,
            eos_ids=eos_ids,
        )
        kept = drawn.samples.tokens, drawn.samples.mask, drawn.reward
        tokens, mask, paid = common.first_rows(kept, len(part))
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
    texts = [preferences.TextTokens(row.prompt, row.response, "roll-out") for row in rows]
    return preferences.pad_texts(texts, length=length) | {"reward": np.asarray([r.reward for r in rows], np.float32)}


def run(config: Config) -> dict[str, Any]:
    """Rolls out, trains, writes the run folder, gives its summary."""
    if not (config.model or config.architecture):
        config = dataclasses.replace(config, model=config.base)
    common.check(config)
    for name in ("samples", "max_new_tokens", "shard", "decode_batch"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")
    if config.objective == "cd_q" and config.head != "q":
        raise ValueError("head: expected q for --objective cd_q, whose target is a mean over the vocabulary")
    inputs = [config.base, config.prompts, config.reward, config.model, config.architecture, config.tokenizer]
    out = cli.open_run(config.out, config, inputs=inputs)
    following = f"python -m eval.decode --model {config.base} --critic value:{out / 'model'} --prompts FILE --out DIR"
    done = common.finished(out)
    if done is not None:
        common.report(out, done, following)
        return done
    kind: Any = "q" if config.head == "q" else "value"
    begin = common.start(config, lambda body: models.Head(kind, hidden_size=config.head_size or body.hidden_size))
    rows = roll_out(config, out, begin.tokenizer)
    longest = max(len(row.prompt) + len(row.response) for row in rows)
    if longest > config.max_length:
        raise ValueError(
            f"max_length: expected at least the longest roll-out's {longest} tokens, found {config.max_length}"
        )
    split = common.split(preferences.Loaded(rows, 0, []), config)

    def collate(rows: list[Rollout]) -> dict[str, np.ndarray]:
        return pad(rows, length=common.row_length(config, [len(r.prompt) + len(r.response) for r in rows]))

    base: Any = None
    frozen: Params = None
    if config.objective == "cd_q":
        base, frozen = models.load(config.base, dtype=config.dtype)
    loss = objectives.value(begin.lm, config.objective, base=base)
    params = common.run(config, begin, split, loss, collate, stage="value", out=out, frozen=frozen)

    def score(params: Params, batch: Any) -> Any:
        cast = objectives.cast(begin.lm, params)
        hidden = begin.lm.hidden(cast, batch["tokens"], mask=batch["mask"])
        found = objectives.values_of(begin.lm, cast, hidden, batch["tokens"])
        error = jnp.where(batch["loss_mask"], (found - batch["reward"][:, None]) ** 2, 0).sum(-1)
        return {"error": error / batch["loss_mask"].sum(-1), "reward": batch["reward"]}

    paid = np.asarray([row.reward for row in rows])
    summary: dict[str, Any] = {
        "rollouts": len(rows),
        "reward": float(paid.mean()),
        "reward_deviation": float(paid.std()),
    }
    if split.validation:
        found = common.evaluate(score, params, split.validation, collate, config.batch_size)
        mean, half = common.interval(found["error"])
        # Of the reward's variance; the share that a prefix cannot know is never explained.
        explained = 1 - float(found["error"].mean() / found["reward"].var()) if found["reward"].var() > 0 else None
        summary |= {"squared_error": mean, "squared_error_95": half, "explained_variance": explained}
    return common.finish(out, begin, params, split, summary, following)


def main(args: list[str] | None = None) -> None:
    run(cli.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    main()
