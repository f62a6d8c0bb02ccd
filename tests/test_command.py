"""The `jaxalign` command: its jobs, its errors, jobs within a process, and the packages of the wheel."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib
import warnings

import pytest
import setuptools

from jaxalign import _options, _runs, commands
from jaxalign.launch import compilation

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A group of options."""

    rate: float = 0.5
    """Step size [1]."""
    steps: int = 10
    """Updates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A group with a required option."""

    out: str
    """Run folder."""
    config: str = ""
    """JSON or TOML file of defaults."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of a test, composed of groups."""

    place: Place
    optimizer: Optimizer = Optimizer(rate=2.0)
    names: commands.Repeated[tuple[str, ...]] = ()
    """One or several."""


def ended(code: int, *arguments: str, capsys) -> str:
    """What a command line that ends with that code prints on stderr."""
    with pytest.raises(SystemExit) as stop:
        commands.main(arguments)
    assert stop.value.code == code
    return capsys.readouterr().err


def test_groups_of_options_are_flat_on_the_command_line_and_in_files(tmp_path):
    parse = lambda *args: _options.parse(Config, description="", args=args)  # noqa: E731
    assert parse("--out", "x", "--steps", "3") == Config(place=Place(out="x"), optimizer=Optimizer(rate=2.0, steps=3))
    for text in ('{"out": "x", "rate": 1}', '{"place": {"out": "x"}, "optimizer": {"rate": 1}}'):
        path = tmp_path / "c.json"
        path.write_text(text)
        found = parse("--config", str(path), "--names", "a", "--names", "b")
        place = Place(out="x", config=str(path))
        assert found == Config(place=place, optimizer=Optimizer(rate=1.0), names=("a", "b"))
    assert _options.flat(parse("--out", "x")) == {"out": "x", "config": "", "rate": 2.0, "steps": 10, "names": ()}


def test_a_config_from_keywords_names_what_is_wrong():
    with pytest.raises(ValueError, match="steps: expected one value, found 2 and 4 in the options"):
        _options.from_fields(Config, {"out": "x", "optimizer": {"steps": 2}, "steps": 4})
    made = _options.from_fields(Config, {"out": "x", "steps": 4, "names": ["a"]})
    assert made == Config(place=Place(out="x"), optimizer=Optimizer(rate=2.0, steps=4), names=("a",))
    for values, named in (({}, "out: expected a value"), ({"out": 1}, "out: expected str"), ({"of": 1}, r"\['of'\]")):
        with pytest.raises(ValueError, match=named):
            _options.from_fields(Config, values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changed:
    """A config with defaults of its own for a group that has a required option."""

    place: Place = dataclasses.field(default_factory=functools.partial(Place, config="mine"))
    steps: int = 3
    """Updates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twice:
    """Two groups with one option."""

    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    changed: Changed


def test_a_config_has_its_own_defaults_of_a_group(capsys):
    parse = lambda *args: _options.parse(Changed, description="", args=args)  # noqa: E731
    assert parse("--out", "x") == Changed(place=Place(out="x", config="mine"))
    assert _options.from_fields(Changed, {"place": {"out": "x"}, "steps": 4}).place.config == "mine"
    assert _options.defaults(Changed) == {"config": "mine", "steps": 3}
    with pytest.raises(SystemExit):
        parse("--steps", "4")
    assert "--out: expected a value, which is required" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--help")
    assert "mine" in capsys.readouterr().out


def test_one_option_of_two_groups_is_refused_by_name():
    calls = (
        lambda: _options.parse(Twice, description="", args=["--out", "x"]),
        lambda: _options.parse(Twice, description="", args=["--help"]),
        lambda: _options.from_fields(Twice, {"out": "x"}),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^steps: expected one option of this name in Twice, found two"):
            call()


def test_a_run_folder_holds_the_options_of_groups_flat(tmp_path):
    out, config = tmp_path / "run", Config(place=Place(out="x"), names=("a",))
    written = {"out": "x", "config": "", "rate": 2.0, "steps": 10, "names": ["a"]}
    # As they are written, with nested groups, and from before there was an option or a whole group.
    for before in (None, {"place": {"out": "x"}, "optimizer": {"rate": 2.0}, "names": ["a"]}, {"names": ["a"]}):
        if before is not None:
            (out / "config.json").write_text(json.dumps(before))
        _runs.open_run(out, dataclasses.replace(config, place=Place(out="y")))
        _runs.open_run(out, config)
        assert json.loads((out / "config.json").read_text()) == written
    with pytest.raises(ValueError, match=r"^steps: expected 10 of the run .*, found 5"):
        _runs.open_run(out, dataclasses.replace(config, optimizer=Optimizer(rate=2.0, steps=5)))
    # A config's own default of the group, not the group's.
    (out / "config.json").write_text(json.dumps({"names": ["a"]}))
    with pytest.raises(ValueError, match=r"^rate: expected 2\.0 of the run .*, found 0\.5"):
        _runs.open_run(out, dataclasses.replace(config, optimizer=Optimizer()))


def test_every_module_that_can_be_run_from_a_clone_is_a_job_of_the_command(capsys):
    scripts = {
        path.parent.name if path.stem == "__main__" else path.stem
        for folder in ("train", "eval")
        for path in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*/__main__.py")]
        if '__name__ == "__main__"' in path.read_text()
    }
    found = {**commands.jobs("jaxalign.launch.train"), **commands.jobs("jaxalign.launch.eval")}
    assert set(found) == scripts
    assert all(found.values())
    with pytest.raises(SystemExit) as stop:
        commands.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(line in printed for line in found.values())


def test_help_and_version_import_no_jax():
    program = (
        "import sys\nfrom jaxalign import commands\n"
        "for words in (['--help'], ['--version'], ['bench']):\n"
        "    try:\n        commands.start(words)\n    except SystemExit:\n        pass\n"
        "print([name for name in ('jax', 'tyro', 'tqdm') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -u -m jaxalign --help | true"
    found = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stderr == ""


def test_bad_usage_is_one_line_and_exit_code_2(tmp_path, capsys):
    out = str(tmp_path / "out")
    for words, named in (
        (["sff"], "expected a name like sft"),
        (["bench", "trian"], "expected a name like train"),
        (["sft", "--data", "x", "--out", "y", "--steps", "1.5"], r"--steps: expected a whole number, found '1.5'\n"),
        (
            ["sft", "--data", "x", "--out", "y", "--learning-rate", "x"],
            r"--learning-rate: expected a number, found 'x'\n",
        ),
        (["sft", "--data", "x", "--out", "y", "--steps"], r"--steps: expected a value, found none\n"),
        (["sft", "--data", "x", "--out", "y", "stray"], r"expected options as --name VALUE, found 'stray'\n"),
        (
            ["arm", "--data", "x", "--out", "y", "--dtype", "int8"],
            r"--dtype: expected one of \('float32', 'bfloat16'\)",
        ),
        (["tokenizer", "--data", "x", "--outt", "y"], "--outt: expected an option of --help, .* closest is --out"),
        (["tokenizer", "--data", "x"], "--out: expected a value"),
        (["tokenizer", "--data", "x", "--out", out, "--vocab-size", "many"], "--vocab-size"),
        (["tokenizer", "--data", str(tmp_path / "none.jsonl"), "--out", out], "none.jsonl"),
    ):
        printed = ended(2, *words, capsys=capsys)
        assert len(printed.splitlines()) == 1, printed
        assert re.search(named, printed), printed
    assert not (tmp_path / "out").exists()
    assert "jaxalign" in ended(2, capsys=capsys)


def test_debug_shows_the_traceback_and_a_failed_run_ends_with_1(capsys):
    def fail(error: BaseException):
        def main(arguments: list[str]) -> None:
            assert arguments == ["x"]
            raise error

        return main

    for error, code, line in (
        (ValueError("n: expected\n 2"), 2, "error: n: expected 2"),
        (FloatingPointError("loss: nan\nand more"), 1, "error: FloatingPointError: loss: nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ):
        for extra in ([], ["--debug"]):
            with pytest.raises(SystemExit) as stop:
                commands.execute(fail(error), ["x", *extra])
            assert stop.value.code == code
            printed = capsys.readouterr().err
            assert printed.splitlines()[-1].startswith(line)
            assert ("Traceback" in printed) == (bool(extra) and code != 130)


COMPUTES = """
import os, signal, sys
import jax
import jax.numpy as jnp
from jaxalign import commands

def main(arguments):
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda _, y: jnp.tanh(y @ y), x))
    result = long(jnp.ones((200, 200)))
    if arguments == ["error"]:
        raise RuntimeError("no more")
    os.kill(os.getpid(), signal.SIGTERM)

if __name__ == "__main__":
    commands.execute(main, sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["file", "module"])
@pytest.mark.parametrize(("word", "code", "line"), [("signal", 143, "stopped by SIGTERM;"), ("error", 1, "error: Run")])
def test_a_job_ends_while_a_computation_is_running(word, code, line, how, tmp_path):
    """Python's own end would wait for it, or crash."""
    (tmp_path / "computes.py").write_text(COMPUTES)
    command = ["computes.py"] if how == "file" else ["-m", "computes"]
    found = subprocess.run(
        [sys.executable, *command, word],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert found.returncode == code, found.stderr
    assert found.stderr.splitlines()[-1].startswith(line)


ENDS = """
import atexit, os, signal, sys, time
from jaxalign import _signals, commands

def main(arguments):
    if arguments == ["loading"]:
        with _signals.importing():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    with _signals.importing():
        pass
    atexit.register(os.kill, os.getpid(), signal.SIGTERM if arguments == ["done"] else signal.SIGHUP)
    if arguments == ["stopped"]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

if __name__ == "__main__":
    commands.execute(main)
"""


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(
    ("word", "code", "line"),
    [
        ("loading", 143, "stopped by SIGTERM before anything was done; the same command begins again\n"),
        ("stopped", 143, "stopped by SIGTERM; the same command goes on from what is saved\n"),
        ("done", 0, ""),
        ("hung up", 0, ""),
    ],
)
def test_a_signal_while_modules_are_loaded_or_python_ends(word, code, line, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    found = subprocess.run(
        [sys.executable, "ends.py", word],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert (found.returncode, found.stderr) == (code, line)


COMPILES = """
import sys
from jaxalign import commands

def main(arguments):
    import jax
    import jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert arguments == ["x"], arguments
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3)))

commands.execute(main, sys.argv[1:])
"""


def test_compiled_programs_are_kept_from_one_start_to_the_next(tmp_path):
    def told(*words: str, **environment: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", COMPILES, *words],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        ).stderr

    folder = str(tmp_path / "programs")
    first = told("--compilation-cache", folder, "x")
    found = re.fullmatch(rf"compilation cache {re.escape(folder)}: 0 programs read, (\d+) compiled\n", first)
    assert found is not None, first
    every = f"compilation cache {folder}: {found[1]} programs read, 0 compiled\n"
    assert int(found[1]) > 0
    assert told("x", JAX_COMPILATION_CACHE_DIR=folder) == every
    with pytest.raises(ValueError, match=r"^compilation-cache: expected --compilation-cache DIR, found 'none'"):
        compilation.take(["x", "--compilation-cache"])
    assert compilation.take(["a", "--compilation-cache=there", "b"]) == ("there", ["a", "b"])


def test_a_job_runs_in_process_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"job: expected a name like tokenizer"):
        commands.run("tokeniser")
    with pytest.raises(ValueError, match=r"seeds: expected"):
        commands.run("studies tree", seeds=0)
    found = commands.run("world", out=str(tmp_path / "world"), texts=20, pairs=5, held_out=2)
    assert (found / "texts.jsonl").is_file()


def _packages(monkeypatch, *words: str) -> dict:
    """What setup.py tells setuptools under these words of a build."""
    kept: dict = {}
    monkeypatch.setattr(setuptools, "setup", lambda **given: kept.update(given))
    monkeypatch.setattr(sys, "argv", ["setup.py", *words])
    monkeypatch.chdir(ROOT)
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {})
    return kept


def test_the_wheel_holds_every_package(monkeypatch):
    kept = _packages(monkeypatch, "bdist_wheel")
    folders = {path.parent for name in ("jaxalign", "train", "eval") for path in (ROOT / name).rglob("*.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in folders}
    mapped = {name if name.startswith("jaxalign") else f"jaxalign.launch.{name}" for name in names}
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    presets = "jaxalign.launch.train.presets"  # files alone
    assert set(kept["packages"]) == mapped | {presets}
    assert kept["package_dir"] == {"jaxalign.launch.train": "train", "jaxalign.launch.eval": "eval"}
    assert data[presets] == ["*.toml"]


def test_an_editable_install_is_one_folder_on_the_path(monkeypatch):
    kept = _packages(monkeypatch, "editable_wheel")
    assert kept["package_dir"] == {"": "."}  # otherwise setuptools installs an import hook, which editors cannot read
    assert not [name for name in kept["packages"] if name.startswith("jaxalign.launch.")]


def test_a_warning_is_one_line_without_its_place(capsys):
    def main(_):
        warnings.warn("base: 12 rows cut\nto 11", stacklevel=1)

    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as ended:
            commands.execute(main, [])
    assert ended.value.code == 0
    assert capsys.readouterr().err == "note: base: 12 rows cut to 11\n"
    assert warnings.showwarning is shown
