"""The tutorials of examples/tutorials/: each runs from its first cell to its last, and what it prints is what its text
says. The one on a real model reads a small random one in its place, with a chat template and real text's letters."""

from __future__ import annotations

import pathlib
import runpy

import jax
import numpy as np
import pytest

from jaxalign import models
from jaxalign.data import tokenizers
from jaxalign.worlds import sentiment

FOLDER = pathlib.Path(__file__).parent.parent / "examples" / "tutorials"
FILES = sorted(FOLDER.glob("*.py"))
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)


def run(name: str) -> dict:
    """The names that a tutorial leaves."""
    return runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_tutorial_is_cells_of_text_and_code(path):
    cells = path.read_text().split("# %%")
    assert cells[0] == ""
    assert cells[1].startswith(" [markdown]\n# # ")
    assert sum(not cell.startswith(" [markdown]") for cell in cells[1:]) >= 3


def test_differentiate_through_alignment(capsys):
    """The worked example's numbers, the threshold rule by ascent, and a likelihood whose slope is 0 at its own beta."""
    names = run("differentiate_through_alignment")
    np.testing.assert_allclose(names["delivered"](names["utility"]), 1.232, atol=5e-4)
    np.testing.assert_allclose(names["delivered"](names["best"]), 1.691, atol=5e-4)
    np.testing.assert_allclose(names["found"], names["best"], atol=0.01)
    slope = jax.grad(names["likelihood"], argnums=1)
    assert float(slope(names["q"], 0.25)) > 1
    assert abs(float(slope(names["q"], 0.5))) < 0.5  # 512 draws: a standard error of about .1
    assert float(slope(names["q"], 1.0)) < -0.5


def test_write_your_own_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("write_your_own_method")
    again, kl = zip(*(names["repeats"](beta) for beta in (10.0, 1.0, 0.1)), strict=True)
    assert again[0] > again[1] > again[2]
    assert kl[0] < kl[1] < kl[2]
    assert again[2] < 0.01
    assert [row["method"] for row in names["rows"]] == ["base", "best_of_4", "__main__:fresh", "__main__:fresh"]


def test_steer_a_real_model(tmp_path, monkeypatch):
    """Best-of-8 keeps the friendliest; guidance costs more KL at a smaller beta."""
    monkeypatch.chdir(tmp_path)
    requests = [
        *sentiment.prompts("train"),
        *sentiment.prompts("held_out"),
        "You are cheerful and friendly. system user",
    ]
    tokenizer = tokenizers.byte_level(requests, vocab_size=400)
    tokenizer.chat_template = TEMPLATE
    models.save("runs/smollm2", *models.tiny(tokenizer), tokenizer=tokenizer)
    names = run("steer_a_real_model")
    best = names["best"].info
    assert (best.reward.max(axis=1) >= best.reward[:, 0]).all()
    kl = [float(names["draw"](beta).kl.sum(axis=1).mean()) for beta in (2.0, 1.0, 0.5)]
    assert 0 < kl[0] < kl[1] < kl[2]
