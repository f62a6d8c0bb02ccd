"""The picture of a comparison has every method, those of one's own and sums of critics among them."""

from __future__ import annotations

import numpy as np
import pytest

from jaxalign.evaluation import plots
from jaxalign.evaluation.report import numbers


def row(method, kl, gold, beta=None):
    return {"method": method, "beta": beta, "kl": kl, "gold": gold, "gold_95": 0.1, "reward": gold, "reward_95": 0.1}


ROWS = [
    row("base", 0.0, 0.0),
    row("best_of_4", 0.6, 0.5),
    row("best_of_mine:longest", 0.7, 0.4, 4.0),
    row("mine:longest", 0.5, 0.3, 2.0),
    row("mine:longest", 1.0, 0.6, 4.0),
    row("_private.mine:shortest", 2.0, 0.1),
    row("0.5 * args:a/reward + value:b/value", 1.5, 0.7, 1.0),
    row("smc:0.5 * args:a + value:b", 1.2, 0.65, 1.0),
    row("values_of_mine:f", -0.4, 0.2),
    row("a_package_of_a_long_name.with.modules.in.it:and_a_function_of_a_long_name", 3.0, 0.2),
]
NAMES = [
    "base",
    "best-of-n",
    "SMC",
    "sum of critics",
    "best_of_mine:longest",
    "mine:longest",
    " _private.mine:shortest",
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn, in place of being closed."""
    from matplotlib import pyplot

    found = []
    monkeypatch.setattr(pyplot, "close", found.append)
    yield found
    monkeypatch.undo()
    for figure in found:
        pyplot.close(figure)


def test_every_method_is_drawn_under_a_name_of_its_own(drawn, tmp_path):
    plots.frontier(ROWS, tmp_path / "frontier.png")
    (figure,) = drawn
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert set(NAMES) < set(names)
    assert len(names) == len(set(names)) == 9
    assert all(len(name) <= 40 for name in names)
    for axes in figure.axes:
        points = {(x, y) for lines in axes.containers for x, y in zip(*lines[0].get_data(), strict=True)}
        assert points == {(r["kl"], r["gold"]) for r in ROWS}
        low, high = axes.get_xlim()
        assert all(low < r["kl"] < high for r in ROWS)
        looks = [(lines[0].get_color(), lines[0].get_marker(), lines[0].get_mfc()) for lines in axes.containers]
        assert len({str(look) for look in looks}) == len(looks)


def test_many_methods_of_ones_own_are_told_apart(drawn, tmp_path):
    rows = [row("base", 0.0, 0.0), *(row(f"mine:f{i}", 0.1 * i, i / 10) for i in range(40))]
    plots.frontier(rows, tmp_path / "frontier.png")
    (figure,) = drawn
    assert len(figure.legends[0].get_texts()) == 41
    looks = {(lines[0].get_color(), lines[0].get_marker()) for lines in figure.axes[0].containers}
    assert len(looks) == 41
    width, height = figure.get_size_inches() * figure.dpi
    box = figure.legends[0].get_window_extent()
    assert box.height <= height
    assert all(axes.get_window_extent().width > 0.2 * width for axes in figure.axes)
    assert np.isfinite(box.width)


@pytest.mark.parametrize(
    "method",
    ["best_of_mine:f", "values:f", "baseline:f", "beam_search.py:f", "policy_x.y:f", "re_controls:f", "ggro.g:h"],
)
def test_a_method_of_ones_own_is_of_no_family_of_the_librarys(method):
    assert plots.family(method) == plots.label(method) == method
    assert numbers._setting({"method": method, "beta": 2.0}) == "strength 2"


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("base", "base"),
        ("best_of_16", "best-of-n"),
        ("args:a/b", "ARGS"),
        ("value:a", "CD-FUDGE"),
        ("value:a/cd_q", "CD-Q"),
        ("blockwise_4x8 value:a", "blockwise CD"),
        ("beam_4x2x8 value:a", "beam search"),
        ("quest_8", "QUEST"),
        ("smc", "SMC"),
        ("smc:value:a", "SMC"),
        ("cards", "CARDS"),
        ("ggro_2", "GGRO"),
        ("policy:a/rl/model", "RL"),
        ("value:a + args:b", "sum of critics"),
        ("blockwise_4x8 0.5 * value:a + args:b", "sum of critics"),
    ],
)
def test_the_families_of_the_library(method, family):
    assert plots.family(method) == family
    assert family in plots.STYLES
