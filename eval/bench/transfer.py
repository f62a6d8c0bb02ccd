"""python -m eval.bench transfer: Transfer Q* with k candidates against a loop of one torch generate per candidate."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, critics, models, policies, rewards, rollout
from jaxalign.types import Params, Policy, TokenBatch

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench transfer."""

    batch: tuple[int, ...] = (1, 8)
    """Batch sizes of ours, one or several [prompts]."""
    k: int = 10
    """Candidates per token."""
    lookahead: int = 20
    """Tokens of each roll-out; none stops early."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 4
    """New tokens per prompt."""
    repeats: int = 3
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of the three models: base, baseline, reward."""
    width: int = 512
    """Width of the three models, a multiple of 64; heads of 64."""
    torch: bool = True
    """Run the torch loop beside ours; without it only our tokens/s are printed."""


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of Transfer Q* with greedy roll-outs, one for each candidate, a token being chosen greedily.

    The torch loop is the authors' form, one prompt and one generate() per candidate, but its generate goes on from a
    copy of the prefix's cache (theirs reads the prefix anew), and the reward model scores all k texts in one pass. Each
    ratio is to its tokens/s at one prompt, since that code decodes one prompt at a time.
    """
    mesh = common.check(config, config.batch)
    k, new, ahead = config.k, config.new, config.lookahead
    shape = common.config(layers=config.layers, width=config.width)
    lm, params = common.build(0, shape, config.dtype)
    other_lm, other = common.build(1, shape, config.dtype)
    reward_lm, reward_params = common.build(2, dataclasses.replace(shape, head=models.Head("reward")), config.dtype)
    weight = 4.0  # of the reward, so that the choice is not the base's own
    torch_loop = None
    if config.torch:
        twins = [
            common.torch_twin(lm, params, "LlamaForCausalLM"),
            common.torch_twin(other_lm, other, "LlamaForCausalLM"),
        ]
        twins.append(common.torch_twin(reward_lm, reward_params, "LlamaForSequenceClassification"))
        torch_loop = _torch_loop(twins, k, new, ahead, weight, config.dtype)
    params, other, reward_params = common.place((params, other, reward_params), mesh)
    greedy = policies.temperature(policies.language_model(other_lm))
    critic = critics.transfer_q(greedy, rewards.from_model(reward_lm), eos_ids=(), num_samples=1, lookahead=ahead)
    policy = policies.temperature(policies.tilt(policies.language_model(lm), critic, top_k=k))
    zero = jnp.asarray(0.0)
    scored = {"baseline": {"policy": other, "temperature": zero}, "reward": reward_params}
    tilted = {"policy": params, "critic": scored, "beta": jnp.asarray(1 / weight)}
    arguments = {"policy": tilted, "temperature": zero}

    def ours(inputs: TokenBatch) -> np.ndarray:
        return np.asarray(_decode(policy, arguments, inputs, new, ahead))

    placed = {size: common.share(common.prompts(size, config.prompt), mesh) for size in config.batch}
    runs: dict[str, Any] = {f"jaxalign {size}": lambda x=inputs: ours(x) for size, inputs in placed.items()}
    single = common.prompts(1, config.prompt)
    if torch_loop is not None:
        runs["torch"] = lambda: torch_loop(single.tokens)
    seconds = common.alternate(runs, repeats=config.repeats)
    rows = []
    for size in config.batch:
        speed = size * new / seconds[f"jaxalign {size}"]
        row: dict[str, Any] = {"batch": size, "k": k, "lookahead": ahead, "jaxalign tokens/s": speed}
        if torch_loop is not None:
            row["torch tokens/s at batch 1"] = new / seconds["torch"]
            row["ratio"] = speed * seconds["torch"] / new
            row["same tokens"] = float(np.mean(torch_loop(single.tokens) == ours(single)[0]))
        rows.append(row)
    common.report("transfer", rows, config.out)
    return rows


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _decode(policy: Policy, params: Params, inputs: TokenBatch, new: int, ahead: int) -> Any:
    """`new` tokens [B,new] of a response that may have `ahead` more, so that every roll-out has its full length."""
    start, draws = jax.random.split(jax.random.key(1))
    state, output = policy.init(params, start, inputs, new + ahead)
    return rollout.rollout(policy, params, draws, state, output, steps=new, eos_ids=(), last_step=False)[2].tokens


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


def _torch_loop(twins: list[Any], k: int, new: int, ahead: int, weight: float, dtype: str) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        twins = [twin.to(device=device, dtype=getattr(torch, dtype)) for twin in twins]
    model, baseline, reward_model = twins

    def run(tokens: Any) -> np.ndarray:
        with torch.inference_mode():
            ids = torch.tensor(np.asarray(tokens), dtype=torch.long, device=device)
            base, other = model(ids, use_cache=True), baseline(ids, use_cache=True)
            drawn = []
            for _ in range(new):
                top, candidates = base.logits[:, -1].log_softmax(dim=-1).topk(k, dim=-1)
                texts = []
                for z in candidates[0]:
                    text = torch.cat([ids, z[None, None]], dim=1)
                    found = baseline.generate(
                        text,
                        attention_mask=torch.ones_like(text),
                        past_key_values=copy.deepcopy(other.past_key_values),
                        do_sample=False,
                        max_new_tokens=ahead,
                        min_new_tokens=ahead,
                        pad_token_id=0,
                    )
                    if found.shape[1] != text.shape[1] + ahead:
                        raise RuntimeError(f"generate: expected {ahead} new tokens, found shape {tuple(found.shape)}")
                    texts.append(found)
                body = reward_model.model(torch.cat(texts))
                reward = reward_model.score(body.last_hidden_state[:, -1]).reshape(1, k)
                token = candidates.gather(1, (top + weight * reward).argmax(dim=-1, keepdim=True))
                drawn.append(int(token))
                ids = torch.cat([ids, token], dim=1)
                base = model(token, past_key_values=base.past_key_values, use_cache=True)
                other = baseline(token, past_key_values=other.past_key_values, use_cache=True)
        return np.asarray(drawn)

    return run
