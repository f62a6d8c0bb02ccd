"""python -m eval.bench decode: our sampling against transformers' `generate` on torch, same weights, same lengths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jaxalign import commands, decoding, policies

from . import common


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench decode."""

    batch: tuple[int, ...] = (1, 8, 32)
    """Batch sizes, one or several [prompts]."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 128
    """New tokens per prompt; no row stops early."""
    repeats: int = 7
    """Timed runs of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of the model."""
    width: int = 512
    """Width of the model, a multiple of 64; heads of 64."""
    torch: bool = True
    """Run torch's generate beside ours; without it only our tokens/s are printed."""


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of sampling at temperature 1 from a random Llama, and the ratio to torch's."""
    mesh = common.check(config, config.batch)
    lm, params = common.build(0, common.config(layers=config.layers, width=config.width), config.dtype)
    policy = policies.language_model(lm)
    twin = common.torch_twin(lm, params, "LlamaForCausalLM") if config.torch else None
    params = common.place(params, mesh)
    rows = []
    for size in config.batch:
        inputs = common.prompts(size, config.prompt)
        placed = common.share(inputs, mesh)

        def ours(inputs: Any = placed) -> None:
            drawn = decoding.sample(policy, params, jax.random.key(1), inputs, max_new_tokens=config.new, eos_ids=())
            jax.block_until_ready(drawn)

        runs: dict[str, Callable[[], None]] = {"jaxalign": ours}
        if twin is not None:
            runs["torch"] = _generate(twin, inputs, config.new, config.dtype)
        seconds = common.alternate(runs, repeats=config.repeats)
        row = {"batch": size} | {f"{name} tokens/s": size * config.new / s for name, s in seconds.items()}
        if twin is not None:
            row["ratio"] = seconds["torch"] / seconds["jaxalign"]
        rows.append(row)
    common.report("decode", rows, config.out)
    return rows


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


def _generate(model: Any, inputs: Any, new: int, dtype: str) -> Any:
    import numpy as np
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        model = model.to(device=device, dtype=getattr(torch, dtype))
    ids = torch.tensor(np.asarray(inputs.tokens), dtype=torch.long, device=device)

    def run() -> None:
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=new,
                min_new_tokens=new,
                pad_token_id=0,
            )
        if tuple(found.shape) != (ids.shape[0], ids.shape[1] + new):
            raise RuntimeError(f"generate: expected {new} new tokens in each row, found shape {tuple(found.shape)}")

    return run
