"""Readings of laws and their methods as texts of the command line."""

from __future__ import annotations

import pytest

from jaxalign.evaluation.readings import parse_reading
from jaxalign.evaluation.specs import parse_method


@pytest.mark.parametrize(
    ("text", "name", "numbers", "strength"),
    [
        ("soft", "soft", {}, "beta"),
        ("soft(beta=0.5)", "soft", {"beta": 0.5}, None),
        ("follower(bound=3)", "follower", {"bound": 3.0}, "beta"),
        ("follower(bound=3, threshold=-1)", "follower", {"bound": 3.0, "threshold": -1.0}, "beta"),
        ("calibrated(exp:5)", "calibrated", {}, "beta"),
        ("best_of", "best_of", {}, "n"),
        ("kl", "kl", {}, "nats"),
        ("cvar(level=0.1)", "cvar", {"level": 0.1}, None),
    ],
)
def test_readings_are_read_from_texts(text, name, numbers, strength):
    reading = parse_reading(text)
    assert (reading.read.name, reading.numbers, reading.strength) == (name, numbers, strength)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distribution:DIR@1", "expected a reading among"),
        ("distribution:DIR:other@1", "expected a reading among"),
        ("distribution:DIR:follower@1", r"found no \['bound'\]"),
        ("distribution:DIR:soft(n=2)@1", r"found also \['n'\]"),
        ("distribution:DIR:soft(beta=x)@1", "expected NUMBER=VALUE in the reading, found 'beta=x'"),
        ("distribution:DIR:soft(beta=-1)", "beta: expected a value > 0"),
        ("distribution:DIR:soft", "expected @ and strengths"),
        ("distribution:DIR:soft(beta=1)@1", "expected no strength"),
    ],
)
def test_method_texts_that_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_method(text)


def test_a_method_text_names_folder_reading_and_strengths():
    spec = parse_method("distribution:runs/laws/model:calibrated(exp:5)@0.3,1")
    assert (spec.terms[0].folder, spec.terms[0].reading, spec.strengths) == (
        "runs/laws/model",
        "calibrated(exp:5)",
        (0.3, 1.0),
    )
    assert spec.folders == {"distribution:runs/laws/model": "runs/laws/model"}
    summed = parse_method("distribution:a:soft(beta=2) + 0.5 * distribution:b:mean")
    assert [(term.weight, term.folder, term.reading) for term in summed.terms] == [
        (1.0, "a", "soft(beta=2)"),
        (0.5, "b", "mean"),
    ]
