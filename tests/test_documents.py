"""The documents say what is so: their programs run, their commands parse, their links and paths exist, and every test
of tests/properties.toml is collected."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import jax
import jax.numpy as jnp
import pytest

from jaxalign import _options, commands, decoding, models, policies, tree
from jaxalign.data import tokenizers
from jaxalign.launch import compilation, processes, time_limit
from tests.conftest import EOS, VOCAB, tiny_lm
from tests.write_api import LISTED

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
TEXTS = [*PAGES, "CONTRIBUTING.md", "PAPERS.md", "CHANGELOG.md"]
HEADS = {"base": None, "dpo": None, "arm": None, "reward": "reward", "value": "value"}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "Why", "do", "cats", "purr?"]


def blocks(name: str, language: str) -> list[str]:
    """The blocks of a page, but those after a line <!-- not run: why -->."""
    text = re.sub(r"<!-- not run: [^\n]+ -->\n```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> pathlib.Path:
    """A folder as the pages describe it (docs/index.md): base, reward, value, arm and dpo, of one vocabulary."""
    root = tmp_path_factory.mktemp("pages")
    tokenizer = tokenizers.word_level(WORDS)
    for seed, (name, head) in enumerate(HEADS.items()):
        model = tiny_lm(seed, head, num_layers=1, vocab_size=len(tokenizer), eos_ids=(tokenizer.eos_token_id,))
        models.save(root / name, *model, tokenizer=tokenizer)
    (root / "prompts.txt").write_text("the cat sat on\na mat\n")
    return root


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_programs_of_a_page_run(page, folders, monkeypatch):
    """In order, as one program; a block that ends in comments prints them."""
    monkeypatch.chdir(folders)
    names: dict = {"__name__": "page"}
    for number, program in enumerate(blocks(page, "python")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(program, f"{page}, block {number}", "exec", dont_inherit=True), names)
        ending = re.search(r"((?:^# .*\n)+)\Z", program, re.MULTILINE)
        if ending:
            assert printed.getvalue().splitlines() == [line[2:] for line in ending[1].splitlines()]


def test_the_readme_shows_the_worked_example_and_guided_text(folders):
    first, second = blocks("README.md", "python")
    assert len([line for line in first.splitlines() if line.strip()]) <= 12
    for figure in ("(0.77, 0.23), utility 1.23", "(0.31, 0.69), utility 1.69"):
        assert figure in second


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


def test_the_extensions_of_contributing_work():
    names: dict = {"__name__": "contributing"}
    for program in blocks("CONTRIBUTING.md", "python"):
        assert len(program.splitlines()) < 25
        exec(compile(program, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    lm, params = tiny_lm(0)
    policy = policies.tilt(policies.language_model(lm), names["brevity"](0, VOCAB))
    prompts = tree.prompts(3)
    arguments = {"policy": params, "critic": None, "beta": jnp.asarray(0.05)}
    drawn = decoding.sample(policy, arguments, jax.random.key(0), prompts, max_new_tokens=4, eos_ids=EOS)
    assert drawn.finished.all()
    left, right = names["in_two_halves"](policy, arguments, jax.random.key(0), prompts, 2, EOS)
    assert left.tokens.shape == right.tokens.shape == (3, 2)
    reward = names["longest_first"](jnp.asarray(1.0), *decoding.join(prompts, drawn), jnp.arange(3))
    assert reward.shape == (3,)


# Commands ------------------------------------------------------------------------------------------------------------

STARTS = ("python -m train.", "python -m eval.", "jaxalign ")


def shell_lines(name: str) -> list[str]:
    """The commands of a page's shell blocks and of its indented lines, continued lines put together."""
    text = (ROOT / name).read_text()
    indented = "".join(line[4:] for line in re.findall(r"^    .*\n", text, re.MULTILINE))
    found = []
    for block in [*blocks(name, "bash"), indented]:
        block = re.sub(r"cat > .*?\nEND\n", "", block.replace("\\\n", " "), flags=re.DOTALL)
        found += [part.strip() for line in block.splitlines() for part in line.split("&&")]
    return [line for line in found if line.startswith(STARTS)]


def job_and_words(command: str) -> tuple[object, list[str]]:
    """The module of a job and the words after its name. AssertionError where there is no such job."""
    words = compilation.take(processes.take(shlex.split(command, comments=True))[1])[1]
    if words[0] == "jaxalign":
        module, rest = commands.load(words[1]), words[2:]
    else:
        module, rest = importlib.import_module(words[2]), words[3:]
    if not hasattr(module, "Config"):
        group = getattr(module, "__package__", module.__name__)
        if not rest or rest[0].startswith("-"):
            return None, []
        module, rest = importlib.import_module(f"{group}.{rest[0]}"), rest[1:]
    return module, rest


@pytest.mark.parametrize("page", [page for page in TEXTS if shell_lines(page)])
def test_the_commands_of_a_page_have_options_that_exist(page):
    for command in shell_lines(page):
        module, words = job_and_words(command)
        if module is not None and "--help" not in words:
            commands.parse(module.Config, description="", args=words)


@pytest.mark.parametrize("page", TEXTS)
def test_jobs_and_options_that_a_page_mentions_exist(page):
    for command in re.findall(r"`((?:python -m (?:train|eval)\.|jaxalign )[^`]+)`", (ROOT / page).read_text()):
        words = processes.take(command.split())[1]
        if "NAME" in command or words[-1] == "jaxalign":
            continue
        module, rest = job_and_words(" ".join(words))
        options = {word.split("=")[0] for word in rest if word.startswith("--")} - {"--help"}
        if module is None or not options:
            continue
        with pytest.raises(SystemExit), contextlib.redirect_stdout(io.StringIO()) as helped:
            commands.parse(module.Config, description="", args=["--help"])
        missing = {option for option in options if option not in helped.getvalue()}
        assert not missing, command


# Paths, links, properties ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_paths_in_backticks_exist(name):
    for path in re.findall(r"`((?:jaxalign|train|eval|tests|docs|examples|\.ci)/[\w./]*)`", (ROOT / name).read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("name", TEXTS)
def test_links_to_files_resolve(name):
    here = (ROOT / name).parent
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
        assert (here / target).exists(), target


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "CHANGELOG.md"])  # which names what is gone
def test_names_in_backticks_exist(name):
    """`decoding.smc`, `policies.tilt(…)`: what a page names is there."""
    rooms = "advantages critics decoding gibbs infalign losses mdp metrics models policies rewards shaping tree types"
    for room, rest in re.findall(
        rf"`(?:jaxalign\.)?({'|'.join(rooms.split())})((?:\.\w+)+)", (ROOT / name).read_text()
    ):
        found = importlib.import_module(f"jaxalign.{room}")
        for part in rest.split(".")[1:]:
            assert hasattr(found, part) or part in getattr(found, "__annotations__", {}), f"{room}{rest}"
            found = getattr(found, part, None)


def test_every_test_of_the_properties_is_collected():
    methods = tomllib.loads((ROOT / "tests/properties.toml").read_text())
    rows = [test for method in methods.values() for entry in method.values() for test in entry["tests"]]
    assert all(entry["property"] for method in methods.values() for entry in method.values())
    assert len(rows) > 250
    files = sorted({row.split("::")[0] for row in rows})
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    collected = set(re.findall(r"^(tests/[\w/]+\.py::\w+)", found.stdout, re.MULTILINE))
    assert [row for row in rows if row not in collected] == []


@pytest.mark.parametrize("package", LISTED.split())
def test_every_public_name_is_listed_with_its_parameters(package):
    """docs/api.md ends with the names of each package's `__all__`, as `python -m tests.write_api` writes them; a
    function's line names all its parameters."""
    module = importlib.import_module(f"jaxalign.{package}")
    section = (ROOT / "docs/api.md").read_text().split(f"### jaxalign.{package}\n\n```text\n")[1].split("```")[0]
    lines = {re.split(r"\W", line)[0]: line for line in section.splitlines() if not line.startswith(" ")}
    assert set(lines) == set(module.__all__)
    for name, line in lines.items():
        found = getattr(module, name)
        if callable(found) and inspect.isfunction(inspect.unwrap(found)):  # the library's own, also under jit
            for parameter in inspect.signature(found).parameters:
                assert re.search(rf"\b{parameter}: ", line), (name, parameter)


OF_EVERY_JOB = {"--help", "--debug", "--version", "--skip-bad"}
OF_EVERY_JOB |= {time_limit.WORD}
OF_EVERY_JOB |= {
    "--distributed",
    "--coordinator",
    "--num-processes",
    "--process-id",
    compilation.WORD,
    "--stopped-code",
}


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "CHANGELOG.md"])
def test_options_in_backticks_are_some_jobs(page):
    """`--lora-rank`, `eval.decode --top-k`: an option belongs to the job named before it, or to some job."""
    for code in re.findall(r"`([^`\n]*--[a-z][^`\n]*)`", (ROOT / page).read_text()):
        if re.search(r"\b(pip|git|pytest|ruff)\b", code):
            continue
        job = re.search(r"\b(train|eval)\.(\w+)", code)
        names = every_option() if job is None else options_of(importlib.import_module(job[0]))
        found = re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
        wrong = {option for option in found if not {option, option.replace("--no-", "--", 1)} & names}
        assert not wrong - OF_EVERY_JOB, code


def options_of(module) -> set[str]:
    """The options of a job, and of every job of a group."""
    if hasattr(module, "Config"):
        return {f"--{name.replace('_', '-')}" for name in _options._options(module.Config)}
    return every_option()


@functools.cache
def every_option() -> set[str]:
    names = [f"{folder}.{path.stem}" for folder in ("train", "eval") for path in (ROOT / folder).glob("[a-z]*.py")]
    names += [f"eval.{path.parent.name}.{path.stem}" for path in (ROOT / "eval").glob("*/[a-z]*.py")]
    found = [importlib.import_module(name) for name in names]
    return set().union(*(options_of(module) for module in found if hasattr(module, "Config")))
