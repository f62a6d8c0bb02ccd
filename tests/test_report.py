"""The report: what a page made of small run folders holds, what is refused, what is told, and that all is escaped."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re
import shutil
import tomllib

import pytest

from eval import report as job
from jaxalign import commands
from jaxalign.evaluation.report import folders, numbers, write_report
from jaxalign.evaluation.report import page as page_module

SCRIPT = "</script><script>alert(1)</script>"
IMAGE = "<img src=x onerror=alert(2)>"


def record(method: str, beta: float | None, index: int, **more):
    """A line of responses.jsonl."""
    text = f"about {index}" if index else f"{SCRIPT} & \u2028"
    return {
        "method": method,
        "beta": beta,
        "index": index,
        "prompt": text,
        "response": f"{IMAGE} {method} {beta} {index}",
        "tokens": [1, 2, 3 + index],
        "kl": 0.0,
        "kl_kind": "exact",
        "truncated": False,
        "forwards": 1.0,
    } | more


def write_lines(path: pathlib.Path, lines) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_method(folder: pathlib.Path, lines, **options) -> None:
    """A method's folder as eval.decode writes it."""
    write_lines(folder / "responses.jsonl", lines)
    keys = dict.fromkeys((line["method"], line["beta"]) for line in lines)
    rows = [{"method": method, "beta": beta, "tokens_per_second": 1234.0} for method, beta in keys]
    (folder / "summary.json").write_text(json.dumps(rows))
    given = {"model": "BASE", "prompts": "p.jsonl", "gold": "m:f", "seed": 3, "method": folder.name} | options
    (folder / "config.json").write_text(json.dumps(given))
    (folder / "versions.json").write_text(json.dumps({"python": "3.11", "jax": "0.10 <b>"}))


def make_run(root: pathlib.Path, *, gold=True) -> pathlib.Path:
    """Base, GenARM at two strengths (the stronger gains proxy and loses gold), best of 2 and 4, a method with markup in
    its name, and a training run."""
    n = range(6)
    scores = lambda g, r, **kl: {"gold": g, "reward": r, **kl} if gold else {"reward": r, **kl}  # noqa: E731
    decode = root / "decode"
    make_method(decode / "base", [record("base", None, i, **scores(0.1 * i, 0.1 * i)) for i in n])
    genarm = [record("genarm:x/arm/model", 1.0, i, **scores(1 + 0.1 * i, 1.0, kl=1.0)) for i in n]
    genarm += [record("genarm:x/arm/model", 0.5, i, **scores(-1 + 0.1 * i, 3.0 + 0.01 * i, kl=4.0)) for i in n]
    make_method(decode / "genarm_arm", genarm)
    best = [record(f"best_of_{k}", None, i, **scores(0.2 * k, 0.3 * k, kl=0.3 * k)) for k in (2, 4) for i in n]
    make_method(decode / "best_of_n", best)
    own = [record(f"mine:{IMAGE}", 2.0, i, **scores(0.2, 0.2, kl=0.5)) for i in n]  # a tie with the base at 2
    make_method(decode / "own", own, prompts=IMAGE)
    write_lines(
        root / "sft/metrics.jsonl", [{"step": k, "loss": 5 / k, "tokens_per_second": 10 * k} for k in (1, 2, 4)]
    )
    (root / "sft/summary.json").write_text('{"validation_loss": 0.61, "rows": 5}')
    (root / "timings.json").write_text('{"base <model>": 2.5}')
    return root


class Page(html.parser.HTMLParser):
    """What a browser would build: elements with their attributes, and the text outside scripts."""

    def __init__(self, path: pathlib.Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        (self.scripts if self.inside == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def data(self):
        return json.loads(self.scripts[0])

    def rows(self, section: str) -> list[str]:
        """The rows of the tables of a section, as text."""
        body = self.source.partition(f'<section id="{section}"')[2].partition("</section>")[0]
        return [" ".join(re.sub("<[^>]*>", " ", row).split()) for row in re.findall("<tr.*?</tr>", body, re.DOTALL)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = make_run(tmp_path_factory.mktemp("report") / "run")
    assert write_report([root], root.parent / "page.html", command=job.command_of) == []
    return Page(root.parent / "page.html")


def test_nothing_of_a_run_is_markup(page):
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not re.search(r"[<>&]", page.scripts[0])
    assert "alert" not in page.scripts[1]
    # It is there as text.
    assert any(SCRIPT in prompt for prompt in page.data["prompts"])
    assert any(IMAGE in series["name"] for series in page.data["series"])
    assert IMAGE in page.text
    assert "base <model>" in page.text
    assert f"--prompts '{IMAGE}'" in page.text
    assert "0.10 <b>" in page.text


def test_the_page_needs_nothing_else(page):
    assert not [tag for tag, a in page.elements if "src" in a or (tag == "link" and a.get("href") != "data:,")]
    assert all(a["href"].startswith("#") for tag, a in page.elements if tag == "a")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(|fetch\(|XMLHttp|innerHTML", page.source)
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline'; img" not in policy  # scripts are held to their digest


def test_every_figure_has_its_table_and_every_control_its_name(page):
    for section in ("frontier", "methods", "wins", "overoptimisation", "training"):
        assert len(page.rows(section)) > 1, section
    captions = [tag for tag, _ in page.elements if tag == "caption"]
    assert len(captions) == len([tag for tag, _ in page.elements if tag == "table"])
    assert ("html", {"lang": "en"}) in page.elements
    labels = page.source.count("<label")
    assert labels == len([tag for tag, a in page.elements if tag in ("select", "input")])
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in page.elements if tag == "a"} <= set(ids)


def test_numbers_of_the_tables(page):
    methods = {row.split(" ± ")[0]: row for row in page.rows("methods")[1:]}
    assert "GenARM beta 0.5 \u22120.75" in methods
    assert "1,234" in methods["GenARM beta 1 1.25"]
    assert "best-of-n n 2 0.40" in methods
    best = [a["data-series"] for tag, a in page.elements if tag == "tr" and "data-best" in a]
    assert len(best) == len(set(best)) == 4
    wins = page.rows("wins")
    assert wins[1].split()[:2] == ["1", "GenARM"]
    assert "best-of-n against base: 100 ± 0 %" in page.source
    assert "base against best-of-n: 0 ± 0 %" in page.source
    assert re.search(r"mine:[^>]* against base: 42 ± ", html.unescape(page.source).replace(IMAGE, ""))
    lost = next(row for row in page.rows("overoptimisation") if row.startswith("GenARM"))
    assert "2.00" in lost
    assert "proxy up, gold down" in lost
    assert "not seen" in next(row for row in page.rows("overoptimisation") if row.startswith("best-of-n"))
    assert page.rows("training")[1].startswith("sft 4 5.000 1.250 20 validation loss 0.61")
    assert "GenARM at beta 1 has the highest gold: 1.25" in page.text
    assert re.search(r"It is the best of \d+ settings on these same prompts", page.text)
    assert "2.5 base" not in page.text
    assert "jaxalign decode" in page.text
    assert "--seed 3" in page.text
    assert "--dtype" not in page.text


def test_styles_are_distinct_and_responses_complete(page):
    styles = [series["style"] for series in page.data["series"]]
    assert styles[0] == -1
    assert sorted(styles[1:]) == [0, 1, 2]
    assert len(page.data["responses"]) == len(page.data["rows"]) == 6
    assert all(len(own) == len(page.data["prompts"]) == 6 for own in page.data["responses"])
    curve = page.data["training"][0]
    assert curve["metrics"]["loss"] == [[1, 2, 4], [5.0, 2.5, 1.25]]


def test_without_gold_the_proxy_decides_and_several_runs_stand_beside_each_other(tmp_path):
    one, two = make_run(tmp_path / "a/run", gold=False), make_run(tmp_path / "b/run")
    make_method(
        two / "decode/more", [record("quest_32", 1.0, i, gold=9.0, reward=1.0, kl=2.0) for i in range(3)], gold="m:g"
    )
    table = numbers.gather(folders.read_runs([one]))
    assert table.measures == ("reward",)
    assert numbers.overshoots(table) == []
    genarm = next(series for series in table.series if series.name == "GenARM")
    assert table.rows[genarm.best].setting == "beta 0.5"
    notes = write_report([one, two], tmp_path / "out/page.html", prompts=2)
    assert any("2 of 6 prompts" in note for note in notes)
    assert any(note.startswith("The gold is not the same in all runs (m:f, m:g)") for note in notes)
    page = Page(tmp_path / "out/page.html")
    names = [series["name"] for series in page.data["series"]]
    assert {"GenARM · a/run", "GenARM · b/run", "base · a/run", "QUEST · b/run"} < set(names)
    assert len(page.data["prompts"]) == 2
    assert any(note in page.text for note in notes)


def test_two_models_of_a_kind_are_two_series(tmp_path):
    for name in ("v1", "v2"):
        lines = [record(f"value:x/{name}/model", 1.0, i, gold=1.0, reward=1.0) for i in range(2)]
        make_method(tmp_path / "decode" / name, lines)
    names = [series.name for series in numbers.gather(folders.read_runs([tmp_path])).series]
    assert names == ["CD-FUDGE (value:v1)", "CD-FUDGE (value:v2)"]


def test_half_a_run_is_told(tmp_path):
    make_run(tmp_path)
    best = tmp_path / "decode/best_of_n"
    lines = (best / "responses.jsonl").read_text().splitlines(keepends=True)
    (best / "responses.jsonl").unlink()
    (best / "summary.json").unlink()
    (best / "responses.jsonl.partial").write_text("".join(lines[:4]))
    (best / "responses.jsonl.partial-00001").write_text("".join(lines[3:7]) + lines[7][:20])
    (tmp_path / "decode/own/config.json").unlink()
    (tmp_path / "decode/base/summary.json").unlink()
    (tmp_path / "sft/summary.json").unlink()
    notes = write_report([tmp_path], tmp_path / "page.html")
    for part in (
        "decode/best_of_n: decoding was not finished; the page shows the 7 responses",
        "decode/own: there is no config.json",
        "decode/base: there is no summary.json",
        "sft: training was not finished; the curve ends at step 4",
    ):
        assert len([note for note in notes if note.startswith(part)]) == 1, part
    text = Page(tmp_path / "page.html").text
    assert all(note in text for note in notes)


def test_what_is_no_run_is_refused_by_name(tmp_path):
    def refused(*runs, match):
        with pytest.raises(ValueError, match=match):
            write_report(runs, tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()

    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    refused(match="^runs: expected at least one run folder")
    refused(tmp_path / "none", match="^runs: expected a run folder, found nothing at .*none")
    refused(tmp_path / "run/timings.json", match="found a file at .*timings")
    refused(tmp_path / "empty", match=r"^runs: expected responses.jsonl or metrics.jsonl in .*empty, found neither")
    refused(tmp_path / "run", tmp_path / "run/../run", match="each folder once")
    lines = tmp_path / "run/decode/own/responses.jsonl"
    good = lines.read_text()
    for text, match in (
        ('{"method": 1', "^$"),
        (good + "{broken}\n", "own/responses.jsonl: expected a JSON object in line 7"),
        (good + "[1]\n", "in line 7, found a list"),
        (good.replace('"kl"', '"kll"'), "expected .* in each line, found no kl in 1"),
        (
            good.replace('"gold": 0.2', '"gold": NaN'),
            "own/responses.jsonl: expected a finite gold, found nan in line 1",
        ),
    ):
        lines.write_text(text)
        if match != "^$":
            refused(tmp_path / "run", match=match)
    lines.write_text(good)
    (tmp_path / "run/decode/own/summary.json").write_text("{")
    refused(tmp_path / "run", match="own/summary.json: expected JSON")
    (tmp_path / "run/decode/own/summary.json").write_text('{"loss": 1}')
    refused(tmp_path / "run", match="own/summary.json: expected a list of rows, found dict")
    (tmp_path / "run/decode/own/summary.json").unlink()
    write_lines(tmp_path / "run/decode/own/tokens.jsonl", [{"method": "base", "beta": None, "index": 0}])
    refused(tmp_path / "run", match="own/tokens.jsonl: expected .* in each line, found no pieces in 1")
    (tmp_path / "run/decode/own/tokens.jsonl").unlink()
    make_method(tmp_path / "run/other/base", [record("base", None, 0, gold=9.0, reward=9.0)])
    refused(tmp_path / "run", match=r"found base in .*decode.base and in .*other.base")
    shutil.rmtree(tmp_path / "run/other")
    write_lines(tmp_path / "run/sft/metrics.jsonl", [{"loss": 1}])
    refused(tmp_path / "run", match=r"sft/metrics.jsonl: expected a step in each line, found none in 1")


def test_folders_of_a_run_that_answer_other_prompts_are_not_put_together(tmp_path):
    """Index 0 is one prompt in one folder and another in the next; the third has both, in another order."""

    def answers(method, prompts, gold):
        return [record(method, None, i, gold=gold, reward=0.0) | {"prompt": text} for i, text in enumerate(prompts)]

    make_method(tmp_path / "one/base", answers("base", ["a", "b"], 1.0))
    make_method(tmp_path / "two/best_of_2", answers("best_of_2", ["c", "d"], 0.0))
    make_method(tmp_path / "two/best_of_4", answers("best_of_4", ["b", "a"], 2.0))
    table = numbers.gather(folders.read_runs([tmp_path]))
    rows = {row.numbers["method"]: row for row in table.rows}
    assert {name: [prompt for prompt, _ in row.records] for name, row in rows.items()} == {
        "base": ["a", "b"],
        "best_of_2": ["c", "d"],
        "best_of_4": ["b", "a"],
    }
    assert "win_rate" not in rows["best_of_2"].numbers
    assert rows["best_of_4"].numbers["win_rate"] == 1


def test_what_is_no_number_is_null_to_the_scripts():
    assert (
        page_module.as_json({"a": [1.0, float("nan")], "b": (float("inf"), "<")})
        == '{"a":[1.0,null],"b":[null,"\\u003c"]}'
    )


def test_the_command(tmp_path, capsys):
    make_run(tmp_path / "run")
    out = tmp_path / "page.html"
    with pytest.raises(SystemExit) as stop:
        commands.main(["report", str(tmp_path / "run"), "--out", str(out), "--title", "A <title>"])
    assert stop.value.code == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert "<h1>A &lt;title&gt;</h1>" in out.read_text()
    assert commands.run("report", runs=[str(tmp_path / "run")], out=str(out)) == str(out)
    for words, match in (
        (["--out", str(out)], "runs: expected at least one"),
        ([str(tmp_path), "--out", "x.txt"], "x.txt"),
    ):
        with pytest.raises(SystemExit) as stop:
            commands.main(["report", *words])
        assert stop.value.code == 2
        assert match in capsys.readouterr().err


def test_the_wheel_holds_the_files_of_the_page():
    root = pathlib.Path(__file__).parent.parent
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["jaxalign"]
    held = {path for pattern in patterns for path in (root / "jaxalign").glob(pattern)}
    assets = pathlib.Path(folders.__file__).parent / "assets"
    others = {path for path in (root / "jaxalign").rglob("*") if path.suffix in (".html", ".css", ".js")}
    assert {assets / name for name in ("page.html", "page.css", *page_module.SCRIPTS)} == others <= held


def test_a_folder_with_training_alone(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    (tmp_path / "summary.json").write_text("{}")
    assert write_report([tmp_path], tmp_path / "page.html") == []
    page = Page(tmp_path / "page.html")
    assert [a["id"] for tag, a in page.elements if tag == "section"] == ["training", "provenance"]
