"""The folder that eval.decode writes results to: those of another job, or a user's own, are not overwritten."""

from __future__ import annotations

import json

import pytest

from eval import decode
from jaxalign.evaluation import results
from tests.test_eval_decode import arguments, folders, methods, rows_of

__all__ = ["folders"]  # a fixture


def test_results_of_others_are_refused_before_anything_is_decoded(folders, tmp_path):
    out = tmp_path / "mine"
    given = [*methods("best_of_n@2"), "--reward", folders["reward"]]
    out.mkdir()
    for name, text in (("results.json", '{"mine": 1}'), ("frontier.png", "mine")):
        (out / name).write_text(text)
        with pytest.raises(ValueError, match=rf"^out: expected a folder with no {name} but .* in {out};"):
            decode.main(arguments(folders, out, *given))
        assert {path.name: path.read_text() for path in out.iterdir()} == {name: text}
        (out / name).unlink()
    decode.main(arguments(folders, out, *given))
    before = rows_of(out)
    (out / "frontier.png").write_text("an old one")
    decode.main(arguments(folders, out, *given))  # its own are written again
    assert rows_of(out) == before
    assert (out / "frontier.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "text", ["", "[1]", "{}", '[{"mine": 1}]', "[]", '[{"method": "base"}, 1]', "\x00", "[" * 100_000]
)
def test_a_table_that_is_not_of_decoding_is_known(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"^out: expected a folder with no results\.json but decoding's own, .*; name"):
        results.check_folder(tmp_path)


def test_a_table_of_decoding_is_known(tmp_path):
    results.check_folder(tmp_path / "absent")
    results.check_folder(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([{"method": "base"}]))
    (tmp_path / "frontier.png").touch()
    results.check_folder(tmp_path)
