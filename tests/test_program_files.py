"""Programs named MODULE:FUNCTION are inputs of the runs that read them: edited code does not go on with old numbers."""

from __future__ import annotations

import json
import re

import pytest

from eval import decode
from jaxalign import _runs, rewards
from jaxalign.training import tables
from tests.test_eval_decode import arguments, folders, methods, tokenizer
from train import calibrate, rl, shaping, value

__all__ = ["folders"]  # a fixture

PROGRAM = """
import functools

def letters(prompts, responses):
    return [len(text) / 10 for text in responses]

def vectors(texts):
    return [[float(len(text)), 1.0] for text in texts]

halved = functools.partial(letters)
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The file of a module of the user's that is named in options."""
    (tmp_path / "modules").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    path = tmp_path / "modules" / f"own_{tmp_path.name}.py"
    path.write_text(PROGRAM)
    return path


def edit(path) -> None:
    path.write_text(PROGRAM + "\n# edited\n")


def test_the_files_of_a_program(program):
    own = program.stem
    assert rewards.program_files(f"{own}:letters") == (str(program),)
    # Both the module that is named and the one whose code runs.
    other = program.with_name(f"face_{own}.py")
    other.write_text(f"from {own} import halved, letters\n")
    for name in ("letters", "halved"):
        assert rewards.program_files(f"face_{own}:{name}") == (str(other), str(program))
    assert rewards.program_files("builtins:len") == ()
    with pytest.raises(ValueError, match="gold: expected MODULE:FUNCTION"):
        rewards.program_files(f"{own}:nothing", name="gold")


def test_the_inputs_of_a_reward(program, tmp_path):
    own = program.stem
    spec = f"{tmp_path} - 0.5 * {own}:letters + builtins:len"
    assert rewards.reward_inputs(spec) == (str(tmp_path), str(program))
    assert rewards.reward_inputs("") == ()
    with pytest.raises(ValueError, match="gold: expected MODULE:FUNCTION"):
        rewards.reward_inputs(f"{own}:nothing", name="gold")


@pytest.mark.parametrize("command", [calibrate, rl, shaping, value], ids=lambda module: module.__name__)
def test_a_training_run_with_an_edited_program_is_refused(command, program, folders, tmp_path, monkeypatch):
    base = "model" if command is rl else "base"
    options = [f"--{base}", folders["base"], "--prompts", folders["prompts.txt"], "--out", str(tmp_path / "run")]
    options += ["--reward", f"{program.stem}:letters", "--max-new-tokens", "4", "--max-length", "32"]
    options += ["--validation", "0.5"] if command is shaping else []  # which needs held-out prompts to measure on
    begin = _runs.begin

    def begin_and_end(out) -> None:
        """A run that ends as soon as it has noted its inputs."""
        begin(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(_runs, "begin", begin_and_end)
    for _ in range(2):  # the second goes on with the same program
        with pytest.raises(KeyboardInterrupt):
            command.main(options)
    inputs = json.loads((tmp_path / "run/inputs.json").read_text())
    assert str(program) in [name for name, *_ in inputs["files"]]
    edit(program)
    with pytest.raises(ValueError, match=f"inputs: .*{re.escape(program.name)}.* changed"):
        command.main(options)


@pytest.mark.parametrize("option", ["--reward", "--gold", "--embedding"])
def test_a_decoding_run_with_an_edited_program_is_refused(option, program, folders, tmp_path):
    function = "vectors" if option == "--embedding" else "letters"
    options = arguments(folders, tmp_path / "out", option, f"{program.stem}:{function}", *methods("base"))
    decode.main(options)
    decode.main(options)
    edit(program)
    with pytest.raises(ValueError, match=f"inputs: .*{re.escape(program.name)}.* changed"):
        decode.main(options)


def test_a_table_made_with_an_edited_program_is_another(program, folders):
    def made(spec: str) -> str:
        about = tables.made_with(folders["base"], spec, tokenizer(), [[1, 2]], max_new_tokens=4, dtype="float32")
        return about["reward"]

    spec = f"{program.stem}:letters"
    before = made(spec), made(f"{folders['reward']} - 0.5 * {spec}"), made("builtins:len")
    assert len(set(before)) == 3
    assert made(spec) == before[0]
    edit(program)
    after = made(spec), made(f"{folders['reward']} - 0.5 * {spec}"), made("builtins:len")
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, False, True]
