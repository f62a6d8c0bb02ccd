"""python -m eval.bench args: ARGS with k candidates against a torch loop with the reward cache expanded k times."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.bench import common
from jaxalign import critics, decoding, models, policies


def main(
    batch: tuple[int, ...] = (1, 16),
    k: int = 10,
    prompt: int = 32,
    new: int = 64,
    repeats: int = 5,
    layers: int = 8,
    width: int = 512,
    dtype: str = "float32",
    torch: bool = True,
    out: str | None = None,
) -> list[dict[str, Any]]:
    """Tokens/s of ARGS-greedy with a reward model of the base's size.

    The torch loop is the authors' form, batch 1: the language model with its cache, and the reward model on the k
    candidates with the prompt's cache expanded k times and re-ordered into k copies of the winner. Each ratio is to its
    tokens/s at batch 1, since that code decodes one prompt at a time.

    Args:
        batch: Batch sizes of ours [prompts].
        k: Candidates per token.
        prompt: Prompt length [tokens].
        new: New tokens per prompt.
        repeats: Timed runs of each side, alternating; the median is printed.
        layers: Layers of both models.
        width: Width of both models (heads of 64).
        dtype: Type of the weights.
        torch: Run the torch loop beside ours.
        out: Folder for args.json.
    """
    lm, params = common.build(0, common.config(layers=layers, width=width), dtype)
    reward_lm, reward_params = common.build(
        1, common.config(layers=layers, width=width, head=models.Head("reward")), dtype
    )
    policy = policies.tilt(policies.language_model(lm), critics.args(reward_lm), top_k=k)
    arguments = {"policy": params, "critic": reward_params, "beta": jnp.asarray(1 / 1.5)}

    def ours(size: int) -> np.ndarray:
        drawn = decoding.sample(
            policy,
            arguments,
            jax.random.key(1),
            common.prompts(size, prompt),
            max_new_tokens=new,
            eos_ids=(),
            temperature=jnp.asarray(0.0),
        )
        return np.asarray(drawn.tokens)

    loop = None
    if torch:
        loop = _torch_loop(
            common.torch_twin(lm, params, "LlamaForCausalLM"),
            common.torch_twin(reward_lm, reward_params, "LlamaForSequenceClassification"),
            k,
            new,
            1.5,
            dtype,
        )
    runs: dict[str, Any] = {f"jaxalign {size}": lambda size=size: ours(size) for size in batch}
    if loop is not None:
        runs["torch"] = lambda: loop(common.prompts(1, prompt).tokens)
    seconds = common.alternate(runs, repeats=repeats)
    rows = []
    for size in batch:
        speed = size * new / seconds[f"jaxalign {size}"]
        row: dict[str, Any] = {"batch": size, "k": k, "jaxalign tokens/s": speed}
        if loop is not None:
            row["torch tokens/s at batch 1"] = new / seconds["torch"]
            row["ratio"] = speed * seconds["torch"] / new
            row["same tokens"] = float(np.mean(loop(common.prompts(1, prompt).tokens) == ours(1)[0]))
        rows.append(row)
    common.report("args", rows, out)
    return rows


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
