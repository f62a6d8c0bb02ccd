"""python -m eval.bench args: ARGS with k candidates against a torch loop with the reward cache expanded k times."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, critics, decoding, models, policies
from jaxalign.types import TokenBatch

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench args."""

    batch: tuple[int, ...] = (1, 16)
    """Batch sizes of ours, one or several [prompts]."""
    k: int = 10
    """Candidates per token."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per prompt; no row stops early."""
    repeats: int = 5
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of both models."""
    width: int = 512
    """Width of both models, a multiple of 64; heads of 64."""
    torch: bool = True
    """Run the torch loop beside ours; without it only our tokens/s are printed."""


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of ARGS-greedy with a reward model of the base's size.

    The torch loop is the authors' form, batch 1: the language model with its cache, and the reward model on the k
    candidates with the prompt's cache expanded k times and re-ordered into k copies of the winner. Each ratio is to its
    tokens/s at batch 1, since that code decodes one prompt at a time.
    """
    mesh = common.check(config, config.batch)
    k, new = config.k, config.new
    base = common.config(layers=config.layers, width=config.width)
    lm, params = common.build(0, base, config.dtype)
    reward_lm, reward_params = common.build(1, dataclasses.replace(base, head=models.Head("reward")), config.dtype)
    loop = None
    if config.torch:
        loop = _torch_loop(
            common.torch_twin(lm, params, "LlamaForCausalLM"),
            common.torch_twin(reward_lm, reward_params, "LlamaForSequenceClassification"),
            k,
            new,
            1.5,
            config.dtype,
        )
    params, reward_params = common.place((params, reward_params), mesh)
    policy = policies.tilt(policies.language_model(lm), critics.args(reward_lm), top_k=k)
    arguments = {"policy": params, "critic": reward_params, "beta": jnp.asarray(1 / 1.5)}

    def ours(inputs: TokenBatch) -> np.ndarray:
        drawn = decoding.sample(
            policy,
            arguments,
            jax.random.key(1),
            inputs,
            max_new_tokens=new,
            eos_ids=(),
            temperature=jnp.asarray(0.0),
        )
        return np.asarray(drawn.tokens)

    placed = {size: common.share(common.prompts(size, config.prompt), mesh) for size in config.batch}
    runs: dict[str, Any] = {f"jaxalign {size}": lambda x=inputs: ours(x) for size, inputs in placed.items()}
    single = common.prompts(1, config.prompt)
    if loop is not None:
        runs["torch"] = lambda: loop(single.tokens)
    seconds = common.alternate(runs, repeats=config.repeats)
    rows = []
    for size in config.batch:
        speed = size * new / seconds[f"jaxalign {size}"]
        row: dict[str, Any] = {"batch": size, "k": k, "jaxalign tokens/s": speed}
        if loop is not None:
            row["torch tokens/s at batch 1"] = new / seconds["torch"]
            row["ratio"] = speed * seconds["torch"] / new
            row["same tokens"] = float(np.mean(loop(single.tokens) == ours(single)[0]))
        rows.append(row)
    common.report("args", rows, config.out)
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


def _torch_loop(model: Any, reward_model: Any, k: int, new: int, weight: float, dtype: str) -> Any:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        model = model.to(device=device, dtype=getattr(torch, dtype))
        reward_model = reward_model.to(device=device, dtype=getattr(torch, dtype))
    reward_body, reward_head = reward_model.model, reward_model.score

    def run(tokens: Any) -> np.ndarray:
        with torch.inference_mode():
            ids = torch.tensor(np.asarray(tokens), dtype=torch.long, device=device)
            base = model(ids, use_cache=True)
            prefix = reward_body(ids.expand(k, -1), use_cache=True)
            cache, reward_cache, logits = base.past_key_values, prefix.past_key_values, base.logits[:, -1]
            drawn = []
            for _ in range(new):
                top, candidates = logits.topk(k, dim=-1)
                scored = reward_body(candidates.reshape(k, 1), past_key_values=reward_cache, use_cache=True)
                reward = reward_head(scored.last_hidden_state[:, -1]).reshape(1, k)
                pick = (top + weight * reward).argmax(dim=-1)
                token = candidates.gather(1, pick[:, None])
                reward_cache = scored.past_key_values
                reward_cache.reorder_cache(pick.expand(k))
                step = model(token, past_key_values=cache, use_cache=True)
                cache, logits = step.past_key_values, step.logits[:, -1]
                drawn.append(int(token))
        return np.asarray(drawn)

    return run
