"""Decoders that keep, drop and propose rows, on a mesh of eight simulated devices beside one; run by test_mesh.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import critics, decoding, models, policies, prompt_batch, rewards
from jaxalign.critics import reads
from jaxalign.models import sharding
from tests.on_mesh import build, close, on

MESH = "data=2,fsdp=2,tensor=2"
LIMITS: dict[str, Any] = {"max_new_tokens": 4, "eos_ids": (0,)}
ROWS = 8


class Models(NamedTuple):
    """Models and their parameters, on one device or on a mesh."""

    base: tuple[models.LanguageModel, Any]
    laws: tuple[models.LanguageModel, Any]
    reward: tuple[models.LanguageModel, Any]
    draft: tuple[models.LanguageModel, Any]


def tiny() -> Models:
    law = models.Distribution((-1.0, 0.0, 0.5, 2.0), rank=2)
    heads = (None, models.Head("q", hidden_size=8, distribution=law), models.Head("reward"), None)
    return Models(*(build(head, seed, num_layers=1) for seed, head in enumerate(heads)))


def searched(m: Models, rng: Any, prompts: Any) -> Any:
    """Two groups of two beams by the mean of laws; the reward chooses."""
    sizes = {"width": 2, "num_samples": 2, "block_size": 2, "groups": 2}
    params = {"policy": m.base[1], "critic": m.laws[1], "reward": m.reward[1]}
    reward = rewards.from_model(m.reward[0])
    parts = policies.language_model(m.base[0]), critics.value(m.laws[0])
    return decoding.beam(*parts, params, rng, prompts, **sizes, reward=reward, **LIMITS)


def dropped(m: Models, rng: Any, prompts: Any) -> Any:
    params = {"policy": m.base[1], "reward": m.reward[1]}
    parts = policies.language_model(m.base[0]), rewards.from_model(m.reward[0])
    return decoding.best_of_n(*parts, params, rng, prompts, num_samples=4, drop=((1, 2),), **LIMITS)


def proposed(m: Models, rng: Any, prompts: Any) -> Any:
    """A tilt by soft values of laws, over the vocabulary, through a draft."""
    critic = critics.distribution(m.laws[0], reads.soft())
    own = critics.DistributionParams(m.laws[1], {"beta": jnp.asarray(0.5)})
    params = {"target": policies.TiltParams(m.base[1], own, 1.0), "draft": m.draft[1]}
    target, draft = policies.tilt(policies.language_model(m.base[0]), critic), policies.language_model(m.draft[0])
    return decoding.speculative(target, draft, params, rng, prompts, draft_tokens=2, **LIMITS)


DECODERS: tuple[Callable[[Models, Any, Any], Any], ...] = (searched, dropped, proposed)


def main(spec: str = MESH) -> None:
    """All that each decoder gives is on the mesh what it is on one device: tokens to the last, numbers to 1e-4."""
    mesh = sharding.make_mesh(spec)
    one = tiny()
    many = Models(*(on(mesh, *each) for each in one))
    prompts = prompt_batch([[1 + i, 2, 3 + i % 3][: 1 + i % 3] for i in range(ROWS)], index=range(ROWS))
    placed = jax.device_put(prompts, sharding.batch_sharding(mesh))
    for decode in DECODERS:
        began = time.process_time()
        expected, found = decode(one, jax.random.key(1), prompts), decode(many, jax.random.key(1), placed)
        np.testing.assert_array_equal(found.completions.tokens, expected.completions.tokens, decode.__name__)
        close(found, expected, 1e-4)
        assert len(np.unique(np.asarray(expected.completions.tokens), axis=0)) > 2
        print(f"{decode.__name__}: {time.process_time() - began:.1f} s of CPU", flush=True)
