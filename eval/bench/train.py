"""python -m eval.bench train: an optimizer step of sft, reward model and autoregressive reward model, against torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, models, training
from jaxalign.training import dry_run, objectives

from . import common

TOLERANCE = 1e-4  # of the loss, relative to 1 + |loss|, float32
BETA_R = 0.05
CLIP, B2 = 1.0, 0.95


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench train."""

    batch: int = 8
    """Rows of a step, an even number: chosen and rejected each take half of them."""
    length: int = 256
    """Length of a row, at least 2 [tokens]; no row is padded."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    repeats: int = 7
    """Timed steps of each side, alternating; the median is printed."""
    layers: int = 8
    """Layers of the model."""
    width: int = 512
    """Width of the model, a multiple of 64; heads of 64."""
    torch: bool = True
    """Run torch beside ours; without it only our tokens/s are printed."""


LOSSES: dict[str, Callable[[models.LanguageModel], Any]] = {
    "sft": objectives.language_model,
    "reward_model": objectives.bradley_terry,
    "arm": lambda lm: objectives.autoregressive_reward(lm, beta_r=BETA_R),
}


def run(config: Config) -> list[dict[str, Any]]:
    """Tokens/s of a step (loss, gradient, clipping, AdamW with its schedule) from the same weights on the same rows.

    torch is transformers' Llama with the fused torch.optim.AdamW; every token but the first counts. The memory is the
    compiler's plan for one device: the arguments (weights and moments, updated in place), the results and the buffers.
    GFLOP are the matrix products that the loss asks for (three times the forward pass, attention whole), whatever
    either side computes again or leaves out.

    RuntimeError: before or after two steps the two losses differ by more than 1e-4 (1 + |loss|) in float32.
    """
    mesh = common.check(config, (config.batch,))
    if config.batch % 2 or config.length < 2:
        raise ValueError(
            f"batch, length: expected an even number and at least 2, found {config.batch}, {config.length}"
        )
    common.check(config, (config.batch // 2,))
    tokens = common.prompts(config.batch, config.length).tokens
    steps = 3 + config.repeats
    optimizer, schedule = training.adamw(learning_rate=config.learning_rate, steps=steps, clip=CLIP, b2=B2)
    rates = [float(schedule(i)) for i in range(steps)]
    rows = []
    for stage in LOSSES:
        head = models.Head("reward") if stage == "reward_model" else None
        lm, params = common.build(0, common.config(layers=config.layers, width=config.width, head=head))
        runs: dict[str, Callable[[], float]] = {}
        if config.torch:
            cls = "LlamaForSequenceClassification" if head else "LlamaForCausalLM"
            twin = common.torch_twin(lm, params, cls)
            runs["torch"] = _torch_step(twin, stage, np.asarray(tokens), iter(rates), config.dtype)
        work = _model_flops(params, config) / 1e9
        state = common.place(training.create(params, optimizer), mesh)
        batch = jax.tree.map(lambda x: x[None], common.share(_batch(stage, tokens), mesh))
        jitted: Any = training.train_step(
            LOSSES[stage](models.LanguageModel(lm.config, config.dtype)), optimizer, schedule=schedule, donate=True
        )
        compiled = jitted.lower(state, batch, None).compile()
        runs = {"jaxalign": stepper(compiled, state, batch)} | runs
        del params, state  # donated
        # Before the timing: a wrong result has no speed. These steps warm both sides up as well.
        losses = {name: [step() for _ in range(3)] for name, step in runs.items()}
        difference = {"max difference": _difference(stage, losses, config.dtype)} if config.torch else {}
        seconds = common.alternate(runs, repeats=config.repeats, warmup=0)
        row: dict[str, Any] = {"stage": stage, "rows x length": f"{config.batch} x {config.length}"}
        row |= {f"{name} tokens/s": tokens.size / value for name, value in seconds.items()}
        if config.torch:
            row["ratio"] = seconds["torch"] / seconds["jaxalign"]
        rows.append(row | {"jaxalign MB": dry_run.bytes_held(compiled) / 1e6, "GFLOP": work} | difference)
    common.report("train", rows, config.out)
    return rows


def _batch(stage: str, tokens: jax.Array) -> Any:
    real = jnp.ones(tokens.shape, bool)
    whole = {"tokens": tokens, "mask": real, "loss_mask": real}
    if stage == "sft":
        return whole
    half = tokens.shape[0] // 2
    return {
        "chosen": jax.tree.map(lambda x: x[:half], whole),
        "rejected": jax.tree.map(lambda x: x[half:], whole),
    }


def stepper(step: Any, state: Any, batch: Any) -> Callable[[], float]:
    """Takes one more step at each call and gives the loss before it."""
    kept = [state]

    def run() -> float:
        state, metrics = step(kept.pop(), batch, None)
        kept.append(jax.block_until_ready(state))
        return float(metrics["loss"])

    return run


def _torch_step(model: Any, stage: str, tokens: Any, rates: Iterator[float], dtype: str) -> Any:
    """As `stepper`, by torch. On a GPU bfloat16 is autocast, the weights staying float32."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    model.config.pad_token_id = 0  # which no row holds
    ids = torch.tensor(tokens, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, B2), weight_decay=0.0, fused=True)

    def loss() -> Any:
        if stage == "sft":
            return model(ids, labels=ids, use_cache=False).loss
        if stage == "reward_model":
            chosen, rejected = model(ids, use_cache=False).logits[:, 0].float().chunk(2)
            return -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        logits = model(ids[:, :-1], use_cache=False).logits.float().flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        chosen, rejected = nll.reshape(len(ids), -1).sum(dim=1).chunk(2)
        return -torch.nn.functional.logsigmoid(BETA_R * (rejected - chosen)).mean()

    def run() -> float:
        optimizer.param_groups[0]["lr"] = next(rates)
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda" and dtype == "bfloat16"):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return float(value.detach())

    return run


def _difference(stage: str, losses: dict[str, list[float]], dtype: str) -> float:
    """The largest of the losses, relative to 1 + |torch's loss|. RuntimeError above the tolerance in float32."""
    found, expected = (np.asarray(losses[name]) for name in ("jaxalign", "torch"))
    difference = np.abs(found - expected) / (1 + np.abs(expected))
    # A NaN fails as well.
    bad = np.flatnonzero(~(difference <= TOLERANCE))
    if dtype == "float32" and bad.size:
        i = bad[0]
        raise RuntimeError(f"train {stage}: expected torch's loss {expected[i]} after {i} steps, found {found[i]}")
    return float(difference.max())


def _model_flops(params: Any, config: Config) -> int:
    """2 FLOPs per weight of a matrix and token, 4·L·width per layer and token in attention; the backward pass twice."""
    weights = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1) - params["transformer"]["embedding"].size
    attention = 2 * config.length * config.width * config.layers
    return int(6 * config.batch * config.length * (weights + attention))


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))
