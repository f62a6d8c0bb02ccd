"""Operations of an optimizer step by formula, and what a device can do at most: MFU is the ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxalign import models
from jaxalign.models import sharding
from jaxalign.types import Params

PEAK_TFLOPS = {
    "NVIDIA A100": 312.0,
    "NVIDIA B200": 2250.0,
    "NVIDIA GH200": 989.0,
    "NVIDIA H100": 989.0,
    "NVIDIA H100 NVL": 835.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    "NVIDIA H200 NVL": 835.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "TPU v4": 275.0,
    "TPU v5": 459.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}
"""Beginning of `jax.Device.device_kind` -> dense products in bfloat16, by its data sheet [10¹² operations/s]."""


class Work(NamedTuple):
    """What a step of training has to do, and how fast it could be done."""

    flops: Callable[[Any], float]
    """Host batch -> operations of its optimizer step."""
    peak: float
    """Of all devices together [operations/s]."""


def peak_flops(kind: str, dtype: str, *, given: float = 0.0) -> float | None:
    """Gives the most operations per second of one device.

    Args:
      kind: its name, as `jax.Device.device_kind` says it.
      dtype: type of the products. The table knows those in bfloat16 alone: how fast float32 is depends on the precision
        that jax is set to.
      given: in place of the table's [10¹² operations/s]; 0 for none.

    Returns:
      Operations per second, None where nothing is known, as on a CPU.
    """
    if given:
        return given * 1e12
    known = [name for name in PEAK_TFLOPS if kind == name or kind.startswith((name + " ", name + "-"))]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known and dtype == "bfloat16" else None


def matrix_weights(lm: models.LanguageModel, params: Params) -> int:
    """Counts the weights by which each token is multiplied: those of matrices, without the table of embeddings.

    Args:
      lm: the model. A tied table counts as the output matrix, and of experts those that a token runs through.
      params: its parameters or an adapter's, arrays or shapes.

    Returns:
      Their number.
    """
    experts, total = lm.config.block.experts, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, size = sharding.path_name(path), math.prod(np.shape(leaf))
        if len(np.shape(leaf)) < 2 or name.endswith("transformer/positions"):
            continue
        if name.endswith("transformer/embedding") and not (lm.config.tie_embeddings and lm.has_lm_head):
            continue
        if experts is not None and name.endswith(("experts/gate_up", "experts/down")):
            size = size * experts.per_token // experts.count
        total += size
    return total


def attention_flops(config: models.Config, length: int) -> int:
    """Counts the operations of the scores and sums of one text's attention, in a forward pass of all layers.

    Args:
      config: of the model.
      length: of the text [tokens]. As is usual, all keys count, also those that the causal mask hides.

    Returns:
      4 · heads · head size · length · keys, summed over the layers; a window bounds the keys.
    """
    keys = sum(min(length, config.window(layer) or length) for layer in range(config.num_layers))
    return 4 * config.num_heads * config.head_dim * length * keys


def counter(
    lm: models.LanguageModel, trained: Params, frozen: Params = None, *, compared: bool = False
) -> Callable[[Sequence[int]], float]:
    """Makes the count of a step's operations: 2 for each weight and token forward, twice that backward.

    The backward pass of trained weights takes as much for the states as for the weights; frozen weights under an
    adapter take the first alone. Norms, the softmax and the optimizer are left out, and so is what rematerialisation
    computes again: this is the work that the loss asks for (as in PaLM, arXiv 2204.02311, appendix B).

    Args:
      lm: the model that is trained.
      trained: its parameters, an adapter's, or those of a head alone; arrays or shapes.
      frozen: parameters that read the same texts: a reference, the weights under an adapter or a head.
      compared: whether the weights under an adapter are read once more, by themselves, as a reference.

    Returns:
      lengths of the texts of a step [tokens] -> its operations.
    """
    own, other = matrix_weights(lm, trained), matrix_weights(lm, frozen)
    whole, body = "transformer" in trained, isinstance(frozen, Mapping) and "transformer" in frozen
    adapter = not whole and set(trained) != {"head"}
    passes = (2 + compared if adapter else 1) if body else 0  # of frozen weights
    attention = 3 * whole + ((3 + compared if adapter else 1) if body else 0)

    def count(lengths: Sequence[int]) -> float:
        weighed = 2.0 * sum(lengths) * (3 * own + passes * other)
        return weighed + attention * sum(attention_flops(lm.config, length) for length in lengths)

    return count


def policy_gradient_counter(
    lm: models.LanguageModel, trained: Params, reference: Params, *, passes: int, reads: int, compared: bool
) -> Callable[[Sequence[int], Sequence[int]], float]:
    """Makes the count of the operations of an iteration on a policy's own responses.

    A prompt is read once, each of its responses token by token; the reference reads all texts once, and the policy
    `reads` times before the updates, each of which is a step as `counter` has it. What a reward's model does is left
    out.

    Args:
      lm: the policy's model.
      trained: its parameters, or those of an adapter on the reference, with a head beside it or not.
      reference: the reference's parameters.
      passes: updates that each response serves.
      reads: passes over the texts without a gradient, before the updates.
      compared: whether each update reads the reference again, as for the exact KL.

    Returns:
      (lengths of the B prompts, lengths of their B·n responses, those of a prompt together) [tokens] -> operations.
    """
    own = matrix_weights(lm, trained) + (0 if "transformer" in trained else matrix_weights(lm, reference))
    again = compared or "transformer" not in trained
    update = counter(lm, trained, reference if again else None, compared=compared)

    def forward(weights: int, lengths: Sequence[int]) -> float:
        return 2.0 * weights * sum(lengths) + sum(attention_flops(lm.config, length) for length in lengths)

    def count(prompts: Sequence[int], responses: Sequence[int]) -> float:
        before = [length for length in prompts for _ in range(len(responses) // len(prompts))]
        texts = [length + new for length, new in zip(before, responses, strict=True)]
        drawn = forward(own, prompts) + forward(own, texts) - forward(own, before)
        ahead = reads * forward(own, texts) + forward(matrix_weights(lm, reference), texts)
        return drawn + ahead + passes * update(texts)

    return count


def text_lengths(batch: Any) -> list[int]:
    """The lengths of a batch's texts [tokens]: real tokens of each row of the leaves named "mask"."""
    named = jax.tree_util.tree_leaves_with_path(batch)
    masks = [leaf for path, leaf in named if getattr(path[-1], "key", None) == "mask"]
    return [int(length) for mask in masks for length in np.asarray(mask).sum(axis=-1).ravel()]


def work_of(
    lm: models.LanguageModel,
    trained: Params,
    frozen: Params = None,
    *,
    compared: bool = False,
    devices: int,
    peak_tflops: float = 0.0,
) -> Work | None:
    """What the steps of a run have to do, None where the peak of its devices is not known.

    Args:
      lm, trained, frozen, compared: as in `counter`.
      devices: how many share a step.
      peak_tflops: of each; 0 for that of its kind (`peak_flops`).
    """
    peak = peak_flops(jax.devices()[0].device_kind, str(lm.dtype), given=peak_tflops)
    if peak is None:
        return None
    count = counter(lm, trained, frozen, compared=compared)
    return Work(lambda batch: count(text_lengths(batch)), peak * devices)
