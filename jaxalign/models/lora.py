"""Low-rank adapters: a second, small tree of parameters beside a model's (LoRA, arXiv 2106.09685, eq. 3).

A projection x·W of the transformer becomes x·W + scale·(x·a)·b with a [in,rank] and b [rank,out], where out may be
several axes, as of W [in,out]. An adapter is a tree
{"layer_0": {"attention": {"qkv": {"a", "b"}, …}, …}, …} of plain arrays. `attach` puts it beside a model's parameters,
whose arrays it shares: every function of the model then applies it inside the forward pass. `merge` adds it to copies
of the weights. The fused projections have one adapter each: one `a` serves queries, keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxalign._arrays import at_least_float32
from jaxalign._checks import check_rng
from jaxalign.models.language_model import LanguageModel
from jaxalign.types import Array, Params

TARGETS = {"qkv": "attention/qkv", "out": "attention/out", "gate_up": "gate_up", "down": "down"}
"""The projections of a layer that an adapter may change, and their places in it."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """What an adapter is, without its arrays.

    Fields:
      rank: of each product a·b.
      alpha: the scale is alpha/rank.
      targets: the projections that have one, names of `TARGETS`.
      rslora: whether the scale is alpha/sqrt(rank) in its place (rank-stabilised LoRA, arXiv 2312.03732).

    Raises:
      ValueError: a rank below 1, an alpha that is not finite and > 0, no target or an unknown one.
    """

    rank: int
    alpha: float = 16.0
    targets: tuple[str, ...] = tuple(TARGETS)
    rslora: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))  # hashable, as jit wants a static argument
        if self.rank < 1:
            raise ValueError(f"rank: expected at least 1, found {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: expected a finite value > 0, found {self.alpha}")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise ValueError(f"targets: expected some of {tuple(TARGETS)}, found {self.targets}")

    @property
    def scale(self) -> float:
        """alpha/rank, or alpha/sqrt(rank) with `rslora`, by which a·b is multiplied."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def init(rng: Array, lm: LanguageModel, spec: Lora) -> Params:
    """A new adapter: a uniform within ±1/sqrt(in) (Kaiming's, as peft draws it), b zero, so that it changes nothing.

    Args:
      rng: a key; consumed.
      lm: the model it belongs to.
      spec: its rank and targets.

    Returns:
      The adapter's tree, in the model's dtype.

    Raises:
      ValueError: a rank above a projection's smaller side, or an rng that is no key.
    """
    check_rng(rng)
    adapter: Params = _init(rng, lm, spec)
    return adapter


@functools.partial(jax.jit, static_argnums=(1, 2))
def _init(rng: Array, lm: LanguageModel, spec: Lora) -> Params:
    places = [f"layer_{i}/{TARGETS[name]}" for i in range(lm.config.num_layers) for name in spec.targets]
    kernels = kernel_shapes(jax.eval_shape(lm.init, jax.random.key(0)))
    absent = sorted({name for name in spec.targets if f"layer_0/{TARGETS[name]}" not in kernels})
    if absent:
        there = tuple(name for name in TARGETS if f"layer_0/{TARGETS[name]}" in kernels)
        raise ValueError(f"targets: expected some of {there}, which the model has (experts have none), found {absent}")
    flat = {}
    for place, key in zip(places, jax.random.split(rng, len(places)), strict=True):
        inside, *outside = kernels[place]
        largest = min(inside, math.prod(outside))
        if spec.rank > largest:
            raise ValueError(f"rank: expected at most {largest} for {place}, found {spec.rank}")
        bound = inside**-0.5
        flat[f"{place}/a"] = jax.random.uniform(key, (inside, spec.rank), lm.dtype, -bound, bound)
        flat[f"{place}/b"] = jnp.zeros((spec.rank, *outside), lm.dtype)
    return traverse_util.unflatten_dict(flat, sep="/")


def attach(params: Params, adapter: Params, spec: Lora) -> Params:
    """Puts an adapter beside a model's parameters, under "lora": every function of the model then applies it.

    Differentiable in both; jax.grad with respect to `adapter` trains it alone.

    Args:
      params: the model's.
      adapter: its adapter.
      spec: the adapter's.

    Returns:
      The parameters, with the same arrays.

    Raises:
      ValueError: an adapter of another model, naming the tensor.
    """
    check_fits(kernel_shapes(params), adapter)
    return {**params, "lora": scaled(adapter, spec)}


def merge(params: Params, adapter: Params, spec: Lora) -> Params:
    """Adds an adapter to copies of the weights: W + scale·a·b in place of W.

    Args:
      params, adapter, spec: as in `attach`.

    Returns:
      The parameters of a model without adapters.

    Raises:
      ValueError: as `attach`, and parameters that hold an adapter already, which would be left in.
    """
    if "lora" in params:
        raise ValueError("params: expected a model without an adapter beside it, found one under 'lora'")
    check_fits(kernel_shapes(params), adapter)
    flat = traverse_util.flatten_dict(params["transformer"], sep="/")
    for place, (a, b) in pairs(adapter).items():
        kernel = flat[f"{place}/kernel"]
        change = spec.scale * jnp.tensordot(at_least_float32(a), at_least_float32(b), axes=1, precision="highest")
        flat[f"{place}/kernel"] = (at_least_float32(kernel) + change).astype(kernel.dtype)
    return {**params, "transformer": traverse_util.unflatten_dict(flat, sep="/")}


def scaled(adapter: Params, spec: Lora) -> Params:
    """The adapter with its scale in b: what the forward pass reads."""
    return _map_pairs(lambda a, b: (a, b * jnp.asarray(spec.scale, b.dtype)), adapter)


def stack(adapters: Sequence[Params], specs: Sequence[Lora]) -> Params:
    """m adapters of one model as one tree, for `policies.adapters`.

    Args:
      adapters: the trees. Ranks and targets may differ: zeros fill the rest and change nothing.
      specs: one for each.

    Returns:
      A tree of leaves [m,...], with the scales in b.

    Raises:
      ValueError: no adapter, one spec too many or too few, adapters of different models (the tensor is named).
    """
    if not adapters or len(adapters) != len(specs):
        raise ValueError(
            f"adapters: expected at least one, and a spec for each, found {len(adapters)} and {len(specs)}"
        )
    all_pairs = [pairs(scaled(adapter, spec)) for adapter, spec in zip(adapters, specs, strict=True)]
    flat = {}
    for place in sorted({place for found in all_pairs for place in found}):
        present = [found[place] for found in all_pairs if place in found]
        rank, inside, outside = max(a.shape[1] for a, _ in present), present[0][0].shape[0], present[0][1].shape[1:]
        parts = []
        for i, found in enumerate(all_pairs):
            a, b = found.get(place, (jnp.zeros((inside, 0), present[0][0].dtype), jnp.zeros((0, *outside))))
            if (a.shape[0], b.shape[1:]) != (inside, outside):
                raise ValueError(
                    f"{place} of adapter {i}: expected {inside} inputs and {_times(outside)} outputs as in the others, "
                    f"found {a.shape[0]} and {_times(b.shape[1:])}"
                )
            parts.append(pad_rank(a, b, rank))
        flat[f"{place}/a"] = jnp.stack([a for a, _ in parts])
        flat[f"{place}/b"] = jnp.stack([b.astype(present[0][1].dtype) for _, b in parts])
    return traverse_util.unflatten_dict(flat, sep="/")


def _times(axes: Sequence[int]) -> str:
    return "x".join(map(str, axes))


def pad_rank(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """a [in,r] and b [r,out] with zeros up to `rank`: the same product."""
    more = rank - a.shape[1]
    return jnp.pad(a, ((0, 0), (0, more))), jnp.pad(b, ((0, more), *((0, 0),) * (b.ndim - 1)))


def pairs(adapter: Params) -> dict[str, tuple[Array, Array]]:
    """Place ("layer_0/attention/qkv") -> (a, b). ValueError naming what is neither or stands alone."""
    flat = traverse_util.flatten_dict(adapter, sep="/")
    places = sorted({name.rpartition("/")[0] for name in flat})
    odd = sorted({f"{place}/{leaf}" for place in places for leaf in "ab"} ^ set(flat))
    if odd:
        raise ValueError(f"adapter: expected a and b at every place, found one missing or another leaf: {odd}")
    return {place: (flat[f"{place}/a"], flat[f"{place}/b"]) for place in places}


def _map_pairs(f: Any, adapter: Params) -> Params:
    flat = {}
    for place, (a, b) in pairs(adapter).items():
        flat[f"{place}/a"], flat[f"{place}/b"] = f(a, b)
    return traverse_util.unflatten_dict(flat, sep="/")


def kernel_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Place -> (in, *out) of the projections that an adapter may change."""
    flat = traverse_util.flatten_dict(params["transformer"], sep="/")
    ends = tuple(f"/{place}/kernel" for place in TARGETS.values())
    return {name.removesuffix("/kernel"): leaf.shape for name, leaf in flat.items() if name.endswith(ends)}


def check_fits(kernels: dict[str, tuple[int, ...]], adapter: Params, *, m: int | None = None) -> None:
    """ValueError naming the tensor of an adapter (m None), or of m stacked ones, that does not fit the projections."""
    ahead = () if m is None else (m,)
    for place, (a, b) in pairs(adapter).items():
        if place not in kernels:
            raise ValueError(f"adapter: expected projections of the model, found {place!r}")
        inside, *outside = kernels[place]
        rank = jnp.shape(a)[-1] if jnp.ndim(a) else 0
        for name, leaf, shape in (("a", a, (*ahead, inside, rank)), ("b", b, (*ahead, rank, *outside))):
            if jnp.shape(leaf) != shape:
                raise ValueError(f"{place}/{name}: expected shape {shape}, found {jnp.shape(leaf)}")
