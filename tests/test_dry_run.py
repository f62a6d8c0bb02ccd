"""--dry-run of every training script: what a step needs, compiled on shapes alone."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from eval import decode
from jaxalign import _devices, models, training
from jaxalign.data import encoded
from jaxalign.training import dry_run, rollouts, states
from jaxalign.training.options import RolloutOptions
from jaxalign.worlds import opinions
from tests.conftest import tiny_lm
from train import arm, calibrate, distil, dpo, reward_model, rl, sft, shaping, value, world

GOLD = "jaxalign.worlds.opinions:golds"
SHORT = "--batch-size 8 --max-length 64"
TEXTS = "--data {folder}/world/texts.jsonl"
PAIRS = "--data {folder}/world/pairs.jsonl --model {folder}/base"
DRAWN = f"--prompts {{folder}}/prompts.jsonl --reward {GOLD} --max-new-tokens 8"
ROLLED = DRAWN + " --base {folder}/base"
JOBS = {
    "sft": (sft, f"{TEXTS} --model {{folder}}/base {SHORT}"),
    "sft of an architecture": (
        sft,
        f"{TEXTS} --architecture {{folder}}/world/config.json --tokenizer {{folder}}/world/tokenizer {SHORT}",
    ),
    "sft in parts": (sft, f"{TEXTS} --model {{folder}}/base {SHORT} --accumulate 2"),
    "reward_model": (reward_model, f"{PAIRS} {SHORT}"),
    "reward_model with lora": (reward_model, f"{PAIRS} {SHORT} --lora-rank 2"),
    "arm": (arm, f"{PAIRS} {SHORT}"),
    "dpo": (dpo, f"{PAIRS} {SHORT}"),
    "dpo with lora": (dpo, f"{PAIRS} {SHORT} --lora-rank 2 --dtype bfloat16"),
    "value": (value, f"{ROLLED} {SHORT}"),
    "value of cd_q": (value, f"{ROLLED} {SHORT} --objective cd_q --head q"),
    "value, frozen": (value, f"{ROLLED} {SHORT} --objective td --frozen"),
    "shaping": (shaping, f"{ROLLED} --max-length 64 --bound 2 --beta 1 --samples 4 --validation 0.5"),
    "shaping of a network": (
        shaping,
        f"{ROLLED} --max-length 64 --bound 2 --beta 1 --samples 4 --validation 0.5 --leader network",
    ),
    "rl": (rl, f"{DRAWN} --model {{folder}}/base --max-length 64"),
    "rl, ppo with lora and a model": (
        rl,
        f"{DRAWN.replace(GOLD, '{folder}/base')} --model {{folder}}/base --max-length 64 --algorithm ppo --lora-rank 2",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A tiny world, and base/: a model's folder without weights."""
    folder = tmp_path_factory.mktemp("dry")
    sizes = ("--texts", "64", "--pairs", "48", "--held-out", "4", "--layers", "2", "--width", "32")
    world.main(["--out", str(folder / "world"), *sizes])
    (folder / "base").mkdir()
    for path in (folder / "world/tokenizer").iterdir():
        (folder / "base" / path.name).write_bytes(path.read_bytes())
    (folder / "base/config.json").write_bytes((folder / "world/config.json").read_bytes())
    asked = opinions.prompts()[:6]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in asked))
    return folder


def dry(job, line: str, folder: pathlib.Path, *more: str) -> dry_run.Estimate | None:
    words = line.format(folder=folder).split()
    with pytest.raises(dry_run.Told) as told:
        job.main([*words, *more, "--dry-run", "--out", str(folder / "out")])
    assert told.value.code == 0
    assert not (folder / "out").exists()
    return told.value.estimate


@pytest.mark.parametrize("name", JOBS)
def test_a_dry_run_reads_no_weights_and_writes_nothing(folder, name, capsys):
    found = dry(*JOBS[name], folder)
    assert found is not None
    assert found.parameters > 0
    assert found.total >= found.parameters + found.optimizer + found.frozen + found.temporaries
    assert found.flops_per_token > 0
    assert (found.frozen > 0) == (name.startswith(("dpo", "rl", "value of", "value, frozen")) or "lora" in name)
    # Two moments of what is trained, and counters.
    assert found.optimizer == pytest.approx(2 * found.parameters, rel=0.05, abs=64)
    assert "fits 80 GB" in capsys.readouterr().out


def test_parts_of_a_batch_change_no_operations_of_a_token(folder):
    """The compiler's own count takes the body of the loop over micro-batches once."""
    whole, parts = (dry(*JOBS[name], folder) for name in ("sft", "sft in parts"))
    assert whole is not None
    assert parts is not None
    assert whole.flops_per_token == parts.flops_per_token


@pytest.mark.parametrize("name", ["dpo with lora", "rl"])
def test_frozen_weights_are_held_in_half_precision_whatever_is_rematerialised(folder, name):
    job, line = JOBS[name]
    line = line.replace(" --dtype bfloat16", "") + " --dtype bfloat16"
    plain, full = dry(job, line, folder), dry(job, line, folder, "--remat", "full")
    assert plain is not None
    assert full is not None
    assert plain.frozen == full.frozen


def test_a_calibration_says_what_its_responses_need(folder, capsys):
    line = f"{ROLLED} --samples 4 --decode-batch 8 --max-length 64"
    programs, models_too = (dry(calibrate, words, folder) for words in (line, line.replace(GOLD, "{folder}/base")))
    assert "8 responses at a time" in capsys.readouterr().out
    assert programs is not None
    assert models_too is not None
    assert programs.total == programs.frozen + programs.temporaries
    # The reward's weights count, which drawing does not read.
    assert models_too.frozen == 2 * programs.frozen
    assert models_too.total - programs.total >= 0.99 * programs.frozen


def test_what_drawing_needs_counts_the_weights_of_a_guide(folder):
    options = RolloutOptions(base=str(folder / "base"), prompts="", reward=GOLD, max_new_tokens=4)
    given = {"dtype": "float32", "stage": "value", "mesh": ""}
    prompts = [encoded.Prompt("", [1, 2])]
    alone, guided = (rollouts.tell_memory(options, prompts, guide=g, **given) for g in ("", str(folder / "base")))
    assert guided.frozen == 2 * alone.frozen
    assert guided.total - alone.total == alone.frozen


@pytest.mark.parametrize("name", ["sft", "sft in parts"])
def test_the_figures_are_those_of_the_real_step(folder, tmp_path, name, monkeypatch):
    """The largest batch's own program, of real arrays: within 15 %."""
    line, memory = JOBS[name][1].replace("--model {folder}/base", "").split(), []
    found = dry(*JOBS[name], folder)

    def measured(step, state, batches, **options):
        batch = max((next(batches(i)) for i in range(8)), key=lambda batch: batch["tokens"].size)
        memory.append(step.lower(state, batch, None).compile().memory_analysis())
        raise dry_run.Told

    monkeypatch.setattr(training, "fit", measured)
    new = ["--architecture", "{folder}/world/config.json", "--tokenizer", "{folder}/world/tokenizer"]
    with pytest.raises(dry_run.Told):
        sft.main([word.format(folder=folder) for word in [*line, *new, "--out", str(tmp_path / "real")]])
    real = memory[0].argument_size_in_bytes + memory[0].output_size_in_bytes - memory[0].alias_size_in_bytes
    assert found.total == pytest.approx(real + memory[0].temp_size_in_bytes, rel=0.15)


def test_a_mesh_of_more_devices_is_compiled_for_simulated_ones(folder, capsys):
    assert len(jax.devices()) < 4
    dry(*JOBS["sft"], folder, "--mesh", "data=2,fsdp=2")
    told = capsys.readouterr().out
    assert "compiled for 4 of cpu" in told
    with pytest.raises(ValueError, match=r"^mesh: expected .* divides the rows of a micro-batch, 8, found"):
        sft.main([*JOBS["sft"][1].format(folder=folder).split(), "--mesh", "data=3", "--dry-run", "--out", "none"])


def test_a_head_of_a_dry_run_is_a_shape():
    lm, params = tiny_lm()
    shapes = jax.eval_shape(lambda: params)
    _, found = states.replace_head(lm, shapes, models.Head("value", hidden_size=8), jax.random.key(0))
    _, real = states.replace_head(lm, params, models.Head("value", hidden_size=8), jax.random.key(0))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(found))
    assert found == jax.eval_shape(lambda: real)


TOPOLOGY = ["--mesh", "fsdp=8,tensor=2", "--topology", "v5e:4x4"]


def test_a_topology_is_compiled_for_in_a_process_that_has_its_devices(folder, monkeypatch):
    """The package is not part of the tests: what that process is started with stands for it."""
    line, started = [*JOBS["sft"][1].format(folder=folder).split(), "--out", "none"], []
    monkeypatch.setitem(sys.modules, "libtpu", types.SimpleNamespace(get_library_path=lambda: "here/libtpu.so"))
    found = subprocess.CompletedProcess([], 0, "told\n", "")
    monkeypatch.setattr(subprocess, "run", lambda words, **given: started.append((words, given["env"])) or found)
    with pytest.raises(dry_run.Told):
        sft.main([*line, *TOPOLOGY, "--dry-run"])
    ((words, environment),) = started
    assert words[3] == "sft"
    wanted = {"JAXALIGN_TOPOLOGY": "v5e:4x4", "TPU_LIBRARY_PATH": "here/libtpu.so", "TPU_SKIP_MDS_QUERY": "1"}
    assert wanted.items() <= environment.items()
    assert environment["JAX_PLATFORMS"] == "cpu"


def test_a_process_of_a_topology_makes_its_meshes_of_described_devices(monkeypatch):
    described = [f"device {i}" for i in range(16)]
    monkeypatch.setenv(_devices.VARIABLE, "v5e:4x4")
    monkeypatch.setattr(_devices, "_described", lambda name: tuple(described))
    assert _devices.every() == described
    assert _devices.backend() == "tpu"
    monkeypatch.delenv(_devices.VARIABLE)
    assert _devices.every() == jax.devices()
    assert _devices.backend() == jax.default_backend()


def test_a_topology_is_refused_without_what_it_needs(folder, heads, monkeypatch):
    line = [*JOBS["sft"][1].format(folder=folder).split(), "--out", "none"]
    decoding = ["--model", f"{heads}/base", "--prompts", f"{heads}/prompts.jsonl", "--out", "none"]
    monkeypatch.setitem(sys.modules, "libtpu", None)
    for job, words, error in (
        (sft, [*line, *TOPOLOGY], r"topology: expected with --dry-run, found 'v5e:4x4' alone"),
        (decode, [*decoding, *TOPOLOGY], r"topology: expected with --dry-run, found 'v5e:4x4' alone"),
        (sft, [*line, *TOPOLOGY[2:], "--dry-run"], r"topology: expected with --mesh, .* found 'v5e:4x4' alone"),
        (sft, [*line, *TOPOLOGY, "--dry-run"], r"topology: expected the TPU's compiler .* found no package libtpu"),
    ):
        with pytest.raises(ValueError, match=f"^{error}"):
            job.main(words)


def test_what_fits_leaves_room_for_the_runtime():
    found = dry_run.Estimate(1, 0, 0, 0, 0, int(78e9), 0.0, 1)
    assert not found.fits(80)
    assert found.fits(96)


def test_a_distillation_reads_the_samples_that_are_there(folder):
    with pytest.raises(ValueError, match="calibration"):
        distil.main(["--calibration", str(folder / "none"), "--model", str(folder / "base"), "--dry-run", "--out", "x"])


@pytest.fixture(scope="module")
def heads(folder) -> pathlib.Path:
    """reward/ and edit/: folders of a reward model and of a value model, without weights."""
    base = models.read_config(str(folder / "base"))
    for name, head in (("reward", models.Head("reward")), ("edit", models.Head("value", hidden_size=8))):
        (folder / name).mkdir()
        for path in (folder / "base").iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
        written = models.config_to_hf(dataclasses.replace(base, head=head))
        (folder / name / "config.json").write_text(json.dumps(written))
    return folder


METHODS = ("best_of_n@2,4", "args:{}/reward@1", "cards@1", "re_control:{}/edit@1")


def test_a_dry_run_of_decoding_says_what_each_method_needs(heads, capsys):
    words = ["--model", f"{heads}/base", "--prompts", f"{heads}/prompts.jsonl", "--reward", f"{heads}/reward"]
    words += ["--max-new-tokens", "4", "--batch-size", "2", "--gradient-steps", "1", "--num-particles", "2"]
    words += [word for method in METHODS for word in ("--method", method.format(heads))]
    with pytest.raises(dry_run.Told) as told:
        decode.main([*words, "--dry-run", "--device-memory", "80", "--out", f"{heads}/out"])
    assert not (heads / "out").exists()
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("decode: an estimate"))
    assert len(lines[begin + 1 :]) == 1 + len(METHODS) + 1  # the base, and best of 2 and of 4 are two programs
    assert all(line.endswith(": fits 80 GB") for line in lines[begin + 1 :])
    assert told.value.estimate is not None


def test_options_of_the_cpus_compiler_are_for_a_cpu_alone(monkeypatch):
    """A compiler of other devices refuses them."""
    given = []

    class Lowered:
        def compile(self, compiler_options=None):
            given.append(compiler_options)

    dry_run.planned(Lowered())
    monkeypatch.setenv(_devices.VARIABLE, "v5e:4x4")
    dry_run.planned(Lowered())
    assert given == [dry_run.cpu_options(), None]


def test_options_that_the_cpus_compiler_lacks_are_left_out(monkeypatch):
    known = dry_run.cpu_options()
    assert known.items() <= dry_run.AS_ACCELERATORS.items()
    assert "xla_backend_optimization_level" in known
    monkeypatch.setattr(dry_run, "AS_ACCELERATORS", {"xla_no_such_option": True, "xla_backend_optimization_level": "0"})
    assert dry_run.cpu_options.__wrapped__() == {"xla_backend_optimization_level": "0"}


def test_a_loop_over_tokens_is_planned_without_float32_copies_of_all_matrices():
    """The CPU multiplies bfloat16 in float32; the copies are made ahead of the loop unless its compiler is told."""
    if "xla_cpu_scheduler_type" not in dry_run.cpu_options():
        pytest.skip("this jaxlib orders loops in one way alone")

    def loop(weights, x):
        def body(_, x):
            for w in weights:
                x = jnp.tanh(x @ w)
            return x

        return jax.lax.fori_loop(0, 9, body, x)

    weights = [jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)] * 8
    compiled = dry_run.planned(jax.jit(loop).lower(weights, jax.ShapeDtypeStruct((4, 256), jnp.bfloat16)))
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 256 * 256 * 4
