"""python -m eval.bench decode: our sampling against transformers' `generate` on torch, same weights, same lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from eval.bench import common
from jaxalign import decoding, policies


def main(
    batch: tuple[int, ...] = (1, 8, 32),
    prompt: int = 32,
    new: int = 128,
    repeats: int = 7,
    layers: int = 8,
    width: int = 512,
    dtype: str = "float32",
    torch: bool = True,
    out: str | None = None,
) -> list[dict[str, Any]]:
    """Tokens/s of sampling at temperature 1 from a random Llama, and the ratio to torch's.

    Args:
        batch: Batch sizes [prompts].
        prompt: Prompt length [tokens].
        new: New tokens per prompt; no row stops early.
        repeats: Timed runs of each side, alternating; the median is printed.
        layers: Layers of the model.
        width: Width of the model (heads of 64).
        dtype: Type of our weights; torch runs the same on an accelerator, float32 otherwise.
        torch: Run torch's generate beside ours; without it only our tokens/s are printed.
        out: Folder for decode.json.
    """
    lm, params = common.build(0, common.config(layers=layers, width=width), dtype)
    policy = policies.language_model(lm)
    twin = common.torch_twin(lm, params, "LlamaForCausalLM") if torch else None
    rows = []
    for size in batch:
        inputs = common.prompts(size, prompt)

        def ours(inputs: Any = inputs) -> None:
            drawn = decoding.sample(policy, params, jax.random.key(1), inputs, max_new_tokens=new, eos_ids=())
            jax.block_until_ready(drawn)

        runs: dict[str, Callable[[], None]] = {"jaxalign": ours}
        if twin is not None:
            runs["torch"] = _generate(twin, inputs, new, dtype)
        seconds = common.alternate(runs, repeats=repeats)
        row = {"batch": size} | {f"{name} tokens/s": size * new / s for name, s in seconds.items()}
        if twin is not None:
            row["ratio"] = seconds["torch"] / seconds["jaxalign"]
        rows.append(row)
    common.report("decode", rows, out)
    return rows


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
