"""python -m eval.bench speculative: GenARM and controlled decoding through a draft, beside plain sampling.

The models are made to agree as far as `noise` lets them: each is one table of pairs of tokens plus random layers of its
own, and the draft's table is that of base and critic together. The rate at which the draft's tokens are accepted is
printed; without it a ratio means nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxalign import commands, critics, decoding, models, policies
from jaxalign._blocks import verify_policy
from jaxalign.types import Array, Params, Policy, StepOutput, TokenBatch

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench speculative."""

    batch: tuple[int, ...] = (1,)
    """Batch sizes, one or several [prompts]."""
    method: tuple[Literal["genarm", "cd"], ...] = ("genarm", "cd")
    """Targets: the base under an autoregressive reward, or under a Q head of controlled decoding."""
    draft_tokens: tuple[int, ...] = (4,)
    """Tokens that the draft proposes in a round, one or several."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 128
    """New tokens per prompt; no row stops early."""
    repeats: int = 7
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of base and critic."""
    width: int = 512
    """Width of base and critic, a multiple of 64; heads of 64."""
    draft_layers: int = 2
    """Layers of the draft."""
    draft_width: int = 192
    """Width of the draft, a multiple of 64 and at most `width`."""
    vocab: int = common.VOCAB
    """Vocabulary [tokens]."""
    noise: float = 1.0
    """Weight of what the random layers add to the common table: 0 for models that agree exactly."""
    spread: float = 3.0
    """Standard deviation of the base's logits; the critic's is half of it."""


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of plain sampling, of speculation with the small draft and with the base as the draft ("below"), and
    their ratios; a pass of the target over G + 1 tokens and a step of the draft, in steps of the target; the share of
    drafted tokens that are accepted, and tokens per round."""
    mesh = common.check(config, config.batch)
    if config.draft_width > config.width:
        raise ValueError(f"draft_width: expected at most the width {config.width}, found {config.draft_width}")
    targets, draft, draft_params = _models(config)
    draft_params = common.place(draft_params, mesh)
    rows = []
    for size in config.batch:
        inputs = common.share(common.prompts(size, config.prompt, vocab=config.vocab), mesh)
        for name in config.method:
            target, params = targets[name]
            params = common.place(params, mesh)
            for tokens in config.draft_tokens:
                row = {"batch": size, "method": name, "G": tokens}
                rows.append(row | _measure(config, target, params, draft, draft_params, inputs, tokens))
    common.report("speculative", rows, config.out)
    return rows


def _measure(
    config: Config, target: Policy, params: Params, draft: Policy, draft_params: Params, inputs: TokenBatch, tokens: int
) -> dict[str, float]:
    """The columns of one target and one number of drafted tokens."""
    size, rng = inputs.tokens.shape[0], jax.random.key(1)

    def plain() -> None:
        drawn = decoding.sample(target, params, rng, inputs, max_new_tokens=config.new, eos_ids=())
        jax.block_until_ready(drawn)

    def through(by: Any, own: Params) -> decoding.SpeculativeInfo:
        both = {"target": params} if by == "below" else {"target": params, "draft": own}
        found = decoding.speculative(
            target, by, both, rng, inputs, draft_tokens=tokens, max_new_tokens=config.new, eos_ids=()
        )
        jax.block_until_ready(found)
        return found.info

    small, below = through(draft, draft_params), through("below", None)
    runs: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "draft": lambda: through(draft, draft_params),
        "below": lambda: through("below", None),
        **_passes(config, target, params, draft, draft_params, inputs, tokens),
    }
    seconds = common.alternate(runs, repeats=config.repeats)
    speeds = {f"{name} tokens/s": size * config.new / seconds[name] for name in ("plain", "draft", "below")}
    ratios = {f"{name} ratio": seconds["plain"] / seconds[name] for name in ("draft", "below")}
    passes = {f"{name}/step": seconds[name] / seconds["step"] for name in ("block", "draft step")}
    found = {}
    for name, info in (("draft", small), ("below", below)):
        found[f"{name} accepted"] = float(info.accepted.sum() / info.drafted.sum())
        found[f"{name} tokens/round"] = size * config.new / float(info.rounds.sum())
    return speeds | ratios | passes | found


def _passes(
    config: Config, target: Policy, params: Params, draft: Policy, draft_params: Params, inputs: TokenBatch, tokens: int
) -> dict[str, Callable[[], Any]]:
    """A step of the target, its pass over G + 1 tokens, and a step of the draft, 16 times each."""
    rng, size = jax.random.key(0), inputs.tokens.shape[0]
    token, block = jnp.ones(size, jnp.int32), jnp.ones((size, tokens + 1), jnp.int32)

    def repeated(policy: Policy, own: Params, once: Callable[[Params, Any], Array]) -> Callable[[], Any]:
        state, _ = jax.jit(policy.init, static_argnums=3)(own, rng, inputs, config.new)

        @jax.jit
        def many(own: Params, state: Any) -> Array:
            # Each pass waits for the one before: what it reads depends on it, by nothing.
            found: Array = jax.lax.fori_loop(0, 16, lambda _, total: total + once(own, (state, total)), jnp.zeros(()))
            return found

        return lambda: jax.block_until_ready(many(own, state))

    def told(output: StepOutput) -> Array:
        return output.log_prob.max(axis=-1).sum() + output.log_norm.sum()  # all of it has to be computed

    def step(policy: Policy) -> Callable[[Params, Any], Array]:
        def once(own: Params, held: tuple[Any, Array]) -> Array:
            state, total = held
            return told(policy.step(own, rng, state, token + (total > 1e30))[1])

        return once

    def verify(own: Params, held: tuple[Any, Array]) -> Array:
        state, total = held
        outputs, _ = verify_policy(target, own, rng, state, block + (total > 1e30), jnp.ones(block.shape, bool))
        return told(outputs)

    return {
        "step": repeated(target, params, step(target)),
        "block": repeated(target, params, verify),
        "draft step": repeated(draft, draft_params, step(draft)),
    }


def _models(config: Config) -> tuple[dict[str, tuple[Policy, Params]], Policy, Params]:
    """The targets by name, and the draft, over one table of pairs of tokens."""
    rank, keys = config.draft_width, jax.random.split(jax.random.key(0), 4)
    reads, writes, scores = (jax.random.normal(key, (config.vocab, rank)) for key in keys[:3])
    wide = jnp.linalg.qr(jax.random.normal(keys[3], (config.width, rank)))[0].T  # [rank, width], orthonormal rows
    writes, scores = config.spread * writes, config.spread / 2 * scores

    def small(seed: int, head: models.Head | None, layers: int, width: int, table: Array) -> tuple[Any, Params]:
        """A model whose logits, or whose head's values, are the table's at the last token, plus its layers' noise."""
        shape = common.config(layers=layers, width=width, vocab=config.vocab, head=head)
        lm, params = common.build(seed, shape, config.dtype)
        up = wide if width != rank else jnp.eye(rank)
        body = dict(params["transformer"])
        body["embedding"] = (reads @ up * (width / rank) ** 0.5).astype(config.dtype)
        out = (up.T @ table.T / width**0.5).astype(config.dtype)
        for name, layer in body.items():
            if name.startswith("layer_"):
                quiet = {"attention": layer["attention"] | {"out": _times(layer["attention"]["out"], config.noise)}}
                body[name] = layer | quiet | {"down": _times(layer["down"], config.noise)}
        if head is None:
            return lm, {"transformer": body | {"lm_head": out}}
        bias = params["head"]["outer"]["bias"]
        return lm, {"transformer": body, "head": {"outer": {"kernel": out, "bias": bias}}}

    base, base_params = small(0, None, config.layers, config.width, writes)
    arm, arm_params = small(1, None, config.layers, config.width, scores)
    q, q_params = small(2, models.Head("q"), config.layers, config.width, scores)
    draft, draft_params = small(3, None, config.draft_layers, config.draft_width, writes + scores)
    below, beta = policies.language_model(base), jnp.asarray(1.0)
    targets = {
        "genarm": (
            policies.tilt(below, critics.genarm(arm)),
            {"policy": base_params, "critic": arm_params, "beta": beta},
        ),
        "cd": (
            policies.tilt(below, critics.value(q)),
            {"policy": base_params, "critic": q_params, "beta": beta},
        ),
    }
    return targets, policies.language_model(draft), draft_params


def _times(layer: Any, weight: float) -> Any:
    return jax.tree.map(lambda x: x * weight, layer)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))
