"""python -m eval.bench rl: an iteration of train.rl (RLOO), roll-out and update, against TRL's RLOO trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import commands, models, training
from jaxalign.training import job, policy_gradient, rl, rl_iteration, rl_rewards
from jaxalign.training.rl_options import RLOptions
from jaxalign.types import Array

from . import common

BETA, CLIP = 0.05, 1.0


@dataclasses.dataclass(frozen=True)
class Config(common.Options):
    """Options of eval.bench rl."""

    batch: int = 16
    """Responses of an iteration."""
    samples: int = 4
    """Responses per prompt."""
    prompt: int = 32
    """Prompt length [tokens]."""
    new: int = 64
    """New tokens per response; no row stops early."""
    repeats: int = 6
    """Timed iterations of each side; the median is printed."""
    layers: tuple[int, ...] = (8, 2)
    """Layers of the model of each row."""
    width: tuple[int, ...] = (512, 128)
    """Width of that model, a multiple of 64; heads of 64."""
    vocab: tuple[int, ...] = (8192, 384)
    """Vocabulary of that model; 2, 128 and 384 is about the embedded world's model."""
    torch: bool = True
    """Run TRL's trainer beside ours (needs torch and trl); without it only our figures are printed."""


def run(config: Config) -> list[dict[str, Any]]:
    """Samples/s of an iteration: roll-out, reward, reference, one AdamW step on all responses. The same weights,
    prompts and lengths on both sides; the reward is the share of even tokens, which costs nothing on either.

    Both update all weights in float32, clip the gradient's norm to 1, take the KL (beta 0.05) off the reward and keep
    the reference beside.
    """
    mesh = common.check(config, (config.batch,))
    if mesh is not None:
        raise ValueError(f"mesh: expected none, found {config.mesh!r}")
    if config.samples < 2 or config.batch % config.samples:
        raise ValueError(f"samples: expected a divisor >= 2 of the batch of {config.batch}, found {config.samples}")
    if config.torch and config.dtype != "float32":
        raise ValueError("dtype: expected float32 beside torch, which updates float32 weights here")
    if not len(config.layers) == len(config.width) == len(config.vocab):
        raise ValueError(
            f"layers, width, vocab: expected one of each per row, found {config.layers}, {config.width}, {config.vocab}"
        )
    sizes = list(zip(config.layers, config.width, config.vocab, strict=True))
    rows = []
    for layers, width, vocab in sizes:
        lm, params = common.build(0, common.config(layers=layers, width=width, vocab=vocab))
        torch_side = _trl(lm, params, config) if config.torch else None
        found = _ours(lm, params, config)
        row: dict[str, Any] = {"layers": layers, "width": width, "vocabulary": vocab, "parameters": _size(params)}
        seconds = statistics.median(one["whole"] for one in found)
        rollout, update = (statistics.median(one[name] for one in found) for name in ("rollout", "update"))
        tokens = config.batch * config.new
        row |= {"samples/s": config.batch / seconds, "roll-out tokens/s": tokens / rollout}
        row |= {"update tokens/s": tokens / update, "share of roll-out": rollout / (rollout + update)}
        if torch_side is not None:
            row |= {"TRL samples/s": config.batch / torch_side, "ratio": torch_side / seconds}
        rows.append(row)
    common.report("rl", rows, config.out)
    return rows


def _size(params: Any) -> str:
    return f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f}M"


def even_share(params: Any, tokens: Array, mask: Array, prompt_length: Array, index: Array) -> Array:
    """The share of even tokens of the response."""
    response = mask & (jnp.cumsum(mask, axis=-1) > prompt_length[:, None])
    return (response & (tokens % 2 == 0)).sum(axis=-1) / jnp.maximum(response.sum(axis=-1), 1)


def _ours(lm: models.LanguageModel, params: Any, config: Config) -> list[dict[str, float]]:
    """Seconds of roll-out and update of each timed iteration."""
    count = config.batch // config.samples
    options = RLOptions(samples=config.samples, max_new_tokens=config.new)
    lm = models.LanguageModel(dataclasses.replace(lm.config, eos_ids=()), config.dtype)
    optimizer, schedule = training.adamw(learning_rate=1e-5, steps=100, clip=CLIP)
    reward = rl_rewards.Composed(even_share, None, even_share, None)
    learner, trained, frozen = rl.learner_of(options, job.StartedModel(lm, params, None), reward, seed=0)
    once = options.passes * options.minibatches == 1
    loss = policy_gradient.loss(learner.method, policy_gradient.of_model(lm), once=once)
    update = training.train_step(loss, optimizer, schedule=schedule, donate=True)
    state = rl_iteration.RLState(
        jnp.zeros((), jnp.int32),
        training.create(jax.tree.map(jnp.array, trained), optimizer),
        jnp.asarray(BETA, jnp.float32),
        jnp.zeros(2, jnp.int32),
    )
    seconds: list[dict[str, float]] = []
    iteration = rl_iteration.make_iteration(learner, update, after=seconds.append)
    prompts = common.prompts(count, config.prompt, vocab=lm.vocab_size)
    batch = {"prompt_tokens": prompts.tokens, "prompt_mask": prompts.mask, "index": jnp.arange(count, dtype=jnp.int32)}
    batch["row"] = batch["index"]
    batch = jax.tree.map(lambda x: x[None], batch)
    # From end to end, as the other side is timed.
    for _ in range(2 + config.repeats):
        begin_at = time.perf_counter()
        state, _ = iteration(state, batch, frozen)
        seconds[-1]["whole"] = time.perf_counter() - begin_at
    return seconds[2:]


def _trl(lm: models.LanguageModel, params: Any, config: Config) -> float:
    """Median seconds of a step of TRL's RLOOTrainer."""
    import datasets
    import tokenizers
    import torch
    import transformers
    import trl

    words = {f"w{i}": i for i in range(lm.vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w1"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w0", pad_token="w0")
    prompts = np.asarray(common.prompts(config.batch // config.samples, config.prompt, vocab=lm.vocab_size).tokens)
    steps = 2 + config.repeats
    texts = [" ".join(f"w{i}" for i in row) for row in prompts.tolist()] * steps

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(i % 2 == 0 for i in row) / max(len(row), 1) for row in completion_ids]

    stamps: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc,unused-ignore]  # untyped base
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        # It reads its reference from the folder that the model came from.
        models.save(f"{folder}/model", lm, params)
        model = transformers.LlamaForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.float32)
        arguments = trl.RLOOConfig(
            output_dir=folder,
            per_device_train_batch_size=config.batch,
            num_generations=config.samples,
            max_completion_length=config.new,
            generation_kwargs={"min_new_tokens": config.new},
            beta=BETA,
            learning_rate=1e-5,
            max_steps=steps,
            max_grad_norm=CLIP,
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = trl.RLOOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        stamps.append(time.perf_counter())
        trainer.train()
    found = statistics.median(np.diff(stamps)[2:])
    if not math.isfinite(found):
        raise RuntimeError("trl: expected timed steps, found none")
    return float(found)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))
