"""What eight simulated devices give beside one: run as a process of its own by test_mesh.py."""

from __future__ import annotations

import dataclasses
import gc
import math
import pathlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
EXPERTS = models.Block(experts=models.Experts(5, 2))
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


HOLD = re.compile(r"sdy\.sharding_constraint .*?<@\w+, \[(.*?)\]> : tensor<([\dx]+)x\w+> loc\((#loc\d*)\)")
FUNCTION = re.compile(r"func\.func \w+ @(\w+)\(")
CALL = re.compile(r"call @(\w+)\(.*loc\((#loc\d*)\)$")
IN_ITS_LAYER = re.compile(r"layer_\d+[/.].*(qkv|out|gate_up|down|experts)/|Transformer\.logits/")
GATHER = re.compile(r'= (\(?.*?\)?) (?:all-gather|all-to-all)(?:-start)?\(.*?op_name="([^"]*)"')
OF_A_LAYER = re.compile(
    r"layer_\d+[/.].*((qkv|out|gate_up|down)/sharding_constraint|qkv/slice|experts/while/body/)|Transformer\.logits[/)]"
    r"|^[\w.]*params\[.{0,2}transformer.{0,2}\]\[.{0,2}(layer_\d+.*(qkv|out|gate_up|down).*kernel|lm_head).{0,2}\]$"
)


def holds(lowered: str) -> Iterator[tuple[list[int], str, str]]:
    """(shape, mesh axes that it is split over, names of the operation and of the calls that lead to it) of each array
    that a traced program holds."""
    names = dict(re.findall(r'^(#loc\d*) = loc\("([^"]*)"', lowered, re.MULTILINE))
    inside, found, callers = "", [], {}
    for line in lowered.splitlines():
        if begins := FUNCTION.search(line):
            inside = begins[1]
        elif call := CALL.search(line):
            callers[call[1]] = (inside, names.get(call[2], ""))
        elif hold := HOLD.search(line):
            found.append((hold, inside))
    for hold, function in found:
        name = names.get(hold[3], "")
        while function in callers:
            function, caller = callers[function]
            name = f"{caller}/{name}"
        yield [int(size) for size in hold[2].split("x")], hold[1], name


def gathers(compiled: str) -> Iterator[tuple[list[int], str, str]]:
    """(shape, name of the operation, line) of each array that a compiled program puts together from devices."""
    for line in compiled.splitlines():
        found = GATHER.search(line)
        if found is not None:
            for shape in re.findall(r"\w+\[([\d,]+)\]", found[1]):
                yield [int(size) for size in shape.split(",")], found[2], line.strip()[:300]


def check_program(what: str, lowered: str, compiled: str, lm: models.LanguageModel, tokens: tuple[int, int]) -> None:
    """Nothing of [tokens, vocabulary] is put together, and no matrix outside the layer that multiplies by it, nor over
    the devices that share its columns; of experts one at a time.

    The layer is that in which the traced program holds the matrix. What the compiler puts together are the arrays of
    those products alone; some versions of jax name it by the place and others by the argument, which is in no layer.
    """
    config, mesh = lm.config, lm.mesh
    assert mesh is not None
    smallest = config.hidden_size**2
    activations = {n // d for n in (tokens[0], math.prod(tokens)) for d in (1, 2, 4, 8)}
    for axes, split, name in holds(lowered):
        if math.prod(axes) >= smallest and not set(axes) & activations:
            assert mesh.shape.get("tensor", 1) == 1 or '"tensor"' in split, f"{what}: all columns {axes} in {name}"
            split_by_rows = mesh.shape.get("fsdp", 1) == 1 or '"fsdp"' in split
            assert split_by_rows or IN_ITS_LAYER.search(name), f"{what}: a matrix {axes} in {name}"
    experts = 0 if config.block.experts is None else config.block.experts.count
    wanted = matrices(lm)
    for axes, name, line in gathers(compiled):
        logits = config.vocab_size in axes and config.hidden_size not in axes
        assert not logits, f"{what}: vocabulary in {line}"
        if math.prod(axes) >= smallest // mesh.shape.get("tensor", 1) and not set(axes) & activations:
            assert OF_A_LAYER.search(name), f"{what}: a matrix in {line}"
            assert not experts or experts not in axes, f"{what}: several experts in {line}"
            assert sorted(size for size in axes if size > 1) in wanted, f"{what}: another shape in {line}"


def matrices(lm: models.LanguageModel) -> list[list[int]]:
    """The sizes, in order, of the weights of each product as a device holds them once they are put together over fsdp;
    of experts those of one."""
    assert lm.mesh is not None
    params = jax.eval_shape(lm.init, jax.random.key(0))
    places = jax.tree.leaves(sharding.placements(params, lm.mesh, {**sharding.RULES, "embed": None}))
    found = []
    for (path, x), place in zip(jax.tree_util.tree_leaves_with_path(params), places, strict=True):
        one = re.search("experts/(gate_up|down)", sharding.path_name(path)) is not None
        found.append(sorted(size for size in place.shard_shape(x.shape)[one:] if size > 1))
    return found


def check_programs(spec: str, **changes: Any) -> float:
    """The compiled training and decoding step of a mesh; the state's bytes on each device."""
    mesh = sharding.make_mesh(spec)
    sizes = {"vocab_size": 1024, "hidden_size": 64, "num_layers": 2, "intermediate_size": 192}
    config = dataclasses.replace(CONFIG, **sizes | changes)
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
    traced = step.lower(state, {"tokens": tokens})  # type: ignore[attr-defined]
    program = traced.compile()
    check_program(f"{spec}: training", traced.as_text(debug_info=True), program.as_text(), lm, (rows, 20))
    first = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split(mesh))
    prompt = jax.ShapeDtypeStruct((rows, 8), jnp.int32, sharding=split(mesh))
    cache = placed(jax.eval_shape(lambda p, t: lm.prefill(p, t, t >= 0, 24)[1], params, prompt))

    def decode(params: Any, cache: Any, token: Any) -> Any:
        hidden, cache = lm.step(params, cache, token)
        logits = lm.logits(params, hidden)
        return logits.argmax(axis=-1), jax.nn.logsumexp(logits, axis=-1), cache

    decoding = jax.jit(decode).lower(params, cache, first)
    check_program(f"{spec}: decoding", decoding.as_text(debug_info=True), decoding.compile().as_text(), lm, (rows, 1))
    return float(program.memory_analysis().argument_size_in_bytes)


def check_bytes() -> None:
    """A state takes an eighth of its bytes on each device where the parameters are split over eight, a quarter of these
    over four, but for the vectors."""
    whole = check_programs("data=8")
    for spec, share in (("fsdp=8", 8), ("tensor=8", 8), ("data=2,fsdp=2,tensor=2", 4)):
        found = check_programs(spec)
        print(f"{spec}: {found / whole:.4f} of the bytes")
        assert 1 / share <= found / whole < 1.05 / share, (spec, found, whole)
    alone = check_programs("data=8", block=EXPERTS)
    for spec, share in (("fsdp=8", 8), ("data=2,fsdp=2,tensor=2", 4)):
        found = check_programs(spec, block=EXPERTS)
        assert 1 / share <= found / alone < 1.05 / share, (spec, found, alone)


def check_errors() -> None:
    """What does not divide is named in one line, with what was expected and found."""
    odd = models.Config(**{**vars(CONFIG), "num_heads": 12, "num_kv_heads": 4})
    eight, shard = sharding.make_mesh("tensor=8"), sharding.shard
    assert sharding.make_mesh("data=-1,tensor=2").shape == {"data": 4, "tensor": 2}
    assert sharding.make_mesh("tensor=2,data=2").axis_names == ("data", "tensor")
    wide = {"transformer": {"lm_head": jnp.zeros((16, 30))}}
    for call, message in (
        (lambda: sharding.make_mesh("data=4,fsdp=4"), "mesh: expected at most 8 devices, found 16 in 'data=4,fsdp=4'"),
        (lambda: sharding.make_mesh("data=-1,fsdp=3"), "mesh: data: expected other sizes whose product divides 8 dev"),
        (
            lambda: sharding.make_mesh("data=-1,fsdp=-1"),
            "mesh: expected -1 for one axis at most, found it for data and",
        ),
        (
            lambda: sharding.make_mesh("rows=2"),
            "mesh: expected axes of ('data', 'fsdp', 'tensor'), as in data=2,fsdp=4",
        ),
        (lambda: sharding.make_mesh("fsdp=0"), "mesh: fsdp: expected a size >= 1, or -1 for the rest, found '0'"),
        (
            lambda: sharding.check_rows_divide(sharding.make_mesh("fsdp=8"), 12, name="batch_size"),
            "batch_size 12, found",
        ),
        (
            lambda: models.LanguageModel(odd, mesh=eight),
            "num_heads: expected a multiple of the mesh's tensor=8 devices",
        ),
        (
            lambda: shard(wide, eight),
            "transformer/lm_head: expected axis vocab to divide over tensor=8 devices, found si",
        ),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as found:
            call()
        assert "\n" not in str(found.value)


def check_peak(folder: str, spec: str) -> None:
    """Reading a folder takes no more memory of the host than what the devices hold and 1.2 times the largest array;
    writing one 1.2 times the largest array. (Some MB are of the interpreter.)"""
    jax.block_until_ready(jnp.zeros(3) + 1)
    (lm, params), read = peak_of(lambda: models.load(folder, mesh=sharding.make_mesh(spec)))
    held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    _, written = peak_of(lambda: models.save(f"{folder}_again", lm, params))
    print(f"{spec}: read {(read - held) / largest:.2f}, written {written / largest:.2f} of the largest")
    assert read - held < 1.2 * largest + (24 << 20), (read, held, largest)
    assert written < 1.2 * largest + (24 << 20), (written, largest)


def peak_of(f: Callable[[], Any]) -> tuple[Any, int]:
    """(what f gives, the most bytes that the process held meanwhile beyond those before)."""

    def held() -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    ended, most, before = threading.Event(), [0], held()

    def watch() -> None:
        while not ended.wait(0.001):
            most[0] = max(most[0], held() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = f()
    ended.set()
    watcher.join()
    return found, most[0]


def main() -> None:
    gc.disable()  # a tenth of the time; the process is short
    check_errors()
    check_bytes()
    for spec in MESHES:
        check_model(spec)
        with tempfile.TemporaryDirectory() as folder:
            check_folders(spec, pathlib.Path(folder))
