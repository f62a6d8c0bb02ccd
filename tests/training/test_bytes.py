"""What a run holds on its devices: no weights twice, none in another type than they are used in, and moments of what is
trained alone."""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import tracemalloc

import chex
import jax
import pytest

from jaxalign import models, training
from jaxalign.models.hf import folders, tensors, writing
from jaxalign.training import job
from jaxalign.training import rl as rl_training
from jaxalign.training.options import ModelOptions
from jaxalign.worlds import opinions
from tests.conftest import tiny_lm
from train import arm, dpo, reward_model, rl, sft, value, world

GOLD = "jaxalign.worlds.opinions:golds"
PAIRS = "--data {folder}/world/pairs.jsonl --model {folder}/base"
SHORT = "--steps 1 --batch-size 4 --max-length 64 --validation 0 --dtype bfloat16"
LORA = "--lora-rank 2"
DRAWN = f"--prompts {{folder}}/prompts.jsonl --reward {GOLD} --max-new-tokens 4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A tiny world, and base/: a model of random float32 weights."""
    folder = tmp_path_factory.mktemp("bytes")
    sizes = ("--texts", "64", "--pairs", "48", "--held-out", "4", "--layers", "3", "--width", "64")
    world.main(["--out", str(folder / "world"), *sizes])
    lm = models.LanguageModel(models.config_from_hf(json.loads((folder / "world/config.json").read_text())))
    tokenizer = models.tokenizer(folder / "world/tokenizer")
    models.save(folder / "base", lm, lm.init(jax.random.key(0)), tokenizer=tokenizer)
    asked = opinions.prompts()[:4]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    return folder


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def buffers() -> dict[int, int]:
    gc.collect()
    return {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays()}


def held_in_training(main, line: str, folder: pathlib.Path, out: pathlib.Path, monkeypatch) -> tuple[int, int, int]:
    """Bytes (that the run had put on the device when its training began, of what is trained, of its moments)."""
    found, fit, before = [], training.fit, buffers()

    def measured(step, state, *args, **options):
        now, train = buffers(), getattr(state, "train", state)
        found.append((sum(now[key] for key in now.keys() - before.keys()), size(train.params), size(train.opt_state)))
        return fit(step, state, *args, **options)

    monkeypatch.setattr(training, "fit", measured)
    monkeypatch.setattr(rl_training, "fit", measured)
    main([*f"{line} {SHORT}".format(folder=folder).split(), "--out", str(out)])
    return found[0]


@pytest.mark.parametrize(
    ("job", "line", "whole"),
    [
        (sft, PAIRS, 0),
        (dpo, PAIRS, 2),
        (arm, f"{PAIRS} {LORA}", 2),
        (reward_model, f"{PAIRS} {LORA}", 2),
        (rl, f"{DRAWN} --model {{folder}}/base {LORA}", 2),
        (value, f"{DRAWN} --base {{folder}}/base --objective td --frozen --samples 1 --no-store-states", 2),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_run_holds_its_state_and_frozen_weights_in_half_precision(job, line, whole, folder, tmp_path, monkeypatch):
    """12 bytes of each number that is trained (itself and two moments), 2 of each other weight of the model."""
    base = size(models.load(folder / "base")[1]) // 4
    found, trained, moments = held_in_training(job.main, line, folder, tmp_path / "run", monkeypatch)
    assert moments == pytest.approx(2 * trained, abs=64)
    assert (
        trained == pytest.approx(4 * base, rel=0.01) if LORA not in line and "--frozen" not in line else trained < base
    )
    assert found <= trained + moments + whole * base + 0.03 * 4 * base
    lm, params = models.load(tmp_path / "run/model")
    assert json.loads((tmp_path / "run/model/config.json").read_text())["dtype"] == "float32"
    if "--frozen" in line:
        assert lm.config.head is not None
        chex.assert_trees_all_equal(params["transformer"], models.load(folder / "base")[1]["transformer"])


@pytest.mark.parametrize("objective", ["fudge", "cd_q --head q"])
def test_values_train_no_lm_head_which_they_are_not_read_by(objective, folder, tmp_path, monkeypatch):
    """Neither masters nor moments of it; it is written as it came, whatever the decay."""
    lm, tied = models.load(folder / "base")
    lm = models.LanguageModel(dataclasses.replace(lm.config, tie_embeddings=False))
    head = jax.random.normal(jax.random.key(2), (lm.config.hidden_size, lm.vocab_size))
    params = {"transformer": tied["transformer"] | {"lm_head": head}}
    models.save(tmp_path / "base", lm, params, tokenizer=models.tokenizer(folder / "base"))
    line = f"{DRAWN} --base {tmp_path}/base --objective {objective} --head-size 2 --samples 1 --weight-decay 0.5"
    _, trained, moments = held_in_training(value.main, line, folder, tmp_path / "run", monkeypatch)
    beside = 4 * 3 * lm.vocab_size if "q" in objective else 0
    assert size(tied) < trained < size(tied) + beside + 4 * 4 * lm.config.hidden_size
    assert moments == pytest.approx(2 * trained, abs=64)
    written = models.load(tmp_path / "run/model")[1]
    chex.assert_trees_all_equal(written["transformer"]["lm_head"], head)


def test_a_trained_head_goes_on_from_float32_beside_frozen_weights(folder, tmp_path):
    """Of a reward model that an adapter is trained on, the head is read as it lies on disk."""
    tokenizer = models.tokenizer(folder / "base")
    lm = models.with_head(models.load(folder / "base")[0], models.Head("reward"))
    params = lm.init(jax.random.key(1))
    models.save(tmp_path / "reward", lm, params, tokenizer=tokenizer)
    options = ModelOptions(model=str(tmp_path / "reward"))
    started = job.start(options, lambda _: lm.config.head, seed=0, dtype="bfloat16", max_length=16, trained=False)
    chex.assert_trees_all_equal(started.params["head"], params["head"])
    assert {x.dtype.name for x in jax.tree.leaves(started.params["transformer"])} == {"bfloat16"}


def test_an_adapter_is_merged_tensor_by_tensor_when_it_is_saved(tmp_path, monkeypatch):
    """The host holds one array and a block at a time, and the folder is the merged model."""
    for module in (tensors, writing):
        monkeypatch.setattr(module, "BLOCK", 1 << 14)
    lm, params = tiny_lm(0, num_layers=4, hidden_size=128, intermediate_size=512, vocab_size=512)
    models.save(tmp_path / "base", lm, params)
    spec = models.Lora(2)
    adapter = jax.tree.map(lambda x: x + 0.1, models.lora.init(jax.random.key(1), lm, spec))
    models.save_adapter(tmp_path / "adapter", lm, spec, adapter, base=str(tmp_path / "base"))
    largest = max(x.nbytes for x in jax.tree.leaves(params))
    with folders.stored(tmp_path / "adapter") as (found, arrays):
        tracemalloc.start()
        models.save(tmp_path / "merged", found, arrays)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    chex.assert_trees_all_close(
        models.load(tmp_path / "merged")[1], models.lora.merge(params, adapter, spec), rtol=1e-5, atol=1e-6
    )
    assert peak < 1.2 * largest + (1 << 18) < size(params) / 3, (peak, largest)
