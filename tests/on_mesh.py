"""What eight simulated devices give beside one: run as a process of its own by test_mesh.py."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import models, training
from jaxalign.models import sharding

MESHES = ("data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2")
CONFIG = models.Config(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=16,
    num_kv_heads=8,
    head_dim=4,
    intermediate_size=24,
    max_length=64,
    eos_ids=(0,),
    family="qwen2",
    qkv_bias=True,
)
TOKENS = jax.random.randint(jax.random.key(1), (8, 12), 1, 32)


def build(head: models.Head | None = None, seed: int = 0, **changes: Any) -> tuple[models.LanguageModel, Any]:
    """A model with weights large enough that the next-token distribution is far from uniform."""
    config = models.Config(**{**vars(CONFIG), "head": head, **changes})
    lm = models.LanguageModel(config)
    return lm, jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, lm.init(jax.random.key(seed)))


def on(mesh: Any, lm: models.LanguageModel, params: Any) -> tuple[models.LanguageModel, Any]:
    """The model on a mesh."""
    return models.LanguageModel(lm.config, lm.dtype, mesh), sharding.shard(params, mesh)


def close(found: Any, expected: Any, tolerance: float = 2e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def loss_of(lm: models.LanguageModel) -> Callable[..., Any]:
    def loss(params: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        hidden = lm.hidden(params, batch["tokens"])[:, :-1]
        log_prob = models.token_log_prob(lm, params, hidden, batch["tokens"][:, 1:], chunk=5)
        return -log_prob.mean(), training.LossAux(jnp.float32(1), {})

    return loss


def gradient_of(lm: models.LanguageModel) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(lambda params, tokens: loss_of(lm)(params, {"tokens": tokens}, None)[0]))


def steps_of(lm: models.LanguageModel) -> Callable[..., Any]:
    """A prefill, two steps and four candidates: all logits."""

    def both(params: Any, tokens: Any) -> Any:
        hidden, cache = lm.prefill(params, tokens[:, :8], tokens[:, :8] > 3, 12)
        found = [lm.logits(params, hidden)]
        for i in range(2):
            hidden, cache = lm.step(params, cache, tokens[:, 8 + i])
            found.append(lm.logits(params, hidden))
        hidden, entries = lm.candidates(params, cache, tokens[:, 4:8])
        cache = lm.commit(cache, entries, tokens[:, 0] % 4)
        return found, lm.logits(params, hidden), cache.length

    return jax.jit(both)


def check_model(spec: str) -> None:
    """Log-probabilities, gradients by all parameters, a prefill and steps against the cache are those of one device."""
    mesh = sharding.make_mesh(spec)
    for changes in ({}, {"tie_embeddings": True, "num_kv_heads": 2}):
        lm, params = build(**changes)
        placed_lm, placed = on(mesh, lm, params)
        tokens = jax.device_put(TOKENS, sharding.batch_sharding(mesh))
        close(gradient_of(placed_lm)(placed, tokens), gradient_of(lm)(params, TOKENS))
        close(steps_of(placed_lm)(placed, tokens), steps_of(lm)(params, TOKENS))
        one = TOKENS[:1]  # rows that do not divide are on each device
        close(steps_of(placed_lm)(placed, one), steps_of(lm)(params, one))
        odd = TOKENS.at[0, 0].set(32)  # as on one device, an id beyond the table gives NaN
        found = placed_lm.embed(placed, odd)
        assert np.isnan(found[0, 0]).all()
        assert not np.isnan(found[1:]).any()
        close(found[1:], lm.embed(params, odd)[1:])


def check_folders(spec: str, folder: pathlib.Path) -> None:
    """A folder is read into the shards that `shard` gives, with an adapter too, and written from them to the same
    bytes."""
    mesh = sharding.make_mesh(spec)
    lm, params = build(models.Head("reward"))
    adapter_spec = models.Lora(2)
    adapter = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(x.size), x.shape),
        models.lora.init(jax.random.key(5), lm, adapter_spec),
    )
    models.save(folder / "base", lm, params, overwrite=True)
    models.save_adapter(folder / "adapter", lm, adapter_spec, adapter, base=str(folder / "base"), overwrite=True)
    for name in ("base", "adapter"):
        _, alone = models.load(folder / name)
        found_lm, found = models.load(folder / name, mesh=mesh)
        assert found_lm == models.LanguageModel(found_lm.config, mesh=mesh)
        wanted = sharding.shard(alone, mesh)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, wanted)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, wanted)))
        if name == "base":
            models.save(folder / "again", found_lm, found, overwrite=True)
            written = [(folder / name / "model.safetensors").read_bytes() for name in ("base", "again")]
            assert written[0] == written[1]
    half = models.load(folder / "base", dtype="bfloat16", mesh=mesh)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, params)


GATHER = re.compile(r'= (\(?.*?\)?) (?:all-gather|all-to-all)(?:-start)?\(.*?op_name="([^"]*)"')
IN_ITS_LAYER = re.compile(r"layer_\d+[/.].*(qkv|out|gate_up|down)/sharding_constraint|Transformer\.logits[/)]")


def check_program(what: str, program: Any, config: models.Config, rows: int) -> None:
    """Nothing of [tokens, vocabulary] is put together, and no matrix outside the layer that multiplies by it."""
    smallest = config.hidden_size * config.hidden_size
    for line in program.as_text().splitlines():
        found = GATHER.search(line)
        if found is None:
            continue
        for shape in re.findall(r"\w+\[([\d,]+)\]", found[1]):
            axes = [int(size) for size in shape.split(",")]
            logits = config.vocab_size in axes and config.hidden_size not in axes
            assert not logits, f"{what}: vocabulary in {line.strip()[:300]}"
            if math.prod(axes) >= smallest and not set(axes) & {rows, rows // 2, rows // 4, rows // 8}:  # activations
                assert IN_ITS_LAYER.search(found[2]), f"{what}: a matrix in {line.strip()[:300]}"


def check_programs(spec: str) -> float:
    """The compiled training and decoding step of a mesh; the state's bytes on each device."""
    mesh = sharding.make_mesh(spec)
    config = dataclasses.replace(CONFIG, vocab_size=1024, hidden_size=64, num_layers=2, intermediate_size=192)
    lm = models.LanguageModel(config, mesh=mesh)
    optimizer, _ = training.adamw(learning_rate=1e-3, steps=10)

    def placed(tree: Any) -> Any:
        places = sharding.placements(tree, mesh, others=True)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, places)

    params = placed(jax.eval_shape(lm.init, jax.random.key(0)))
    state = placed(jax.eval_shape(lambda p: training.create(p, optimizer), params))
    rows, split = 24, sharding.batch_sharding
    tokens = jax.ShapeDtypeStruct((1, rows, 20), jnp.int32, sharding=split(mesh, ahead=1))
    step = training.train_step(loss_of(lm), optimizer, mesh=mesh)
    program = step.lower(state, {"tokens": tokens}).compile()  # type: ignore[attr-defined]
    check_program(f"{spec}: training", program, config, rows)
    first = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split(mesh))
    prompt = jax.ShapeDtypeStruct((rows, 8), jnp.int32, sharding=split(mesh))
    cache = placed(jax.eval_shape(lambda p, t: lm.prefill(p, t, t >= 0, 24)[1], params, prompt))

    def decode(params: Any, cache: Any, token: Any) -> Any:
        hidden, cache = lm.step(params, cache, token)
        logits = lm.logits(params, hidden)
        return logits.argmax(axis=-1), jax.nn.logsumexp(logits, axis=-1), cache

    check_program(f"{spec}: decoding", jax.jit(decode).lower(params, cache, first).compile(), config, rows)
    return float(program.memory_analysis().argument_size_in_bytes)


def check_bytes() -> None:
    """A state takes an eighth of its bytes on each device where the parameters are split over eight, a quarter of these
    over four, but for the vectors."""
    whole = check_programs("data=8")
    for spec, share in (("fsdp=8", 8), ("tensor=8", 8), ("data=2,fsdp=2,tensor=2", 4)):
        found = check_programs(spec)
        print(f"{spec}: {found / whole:.4f} of the bytes")
        assert 1 / share <= found / whole < 1.05 / share, (spec, found, whole)


def main() -> None:
    check_bytes()
    for spec in MESHES:
        check_model(spec)
        with tempfile.TemporaryDirectory() as folder:
            check_folders(spec, pathlib.Path(folder))
