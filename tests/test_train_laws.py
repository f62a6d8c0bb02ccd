"""train.value of laws of the reward, as a user runs it: what its folder tells, and what is then refused."""

from __future__ import annotations

import json
import pathlib
import shutil

import pytest

from eval import decode
from jaxalign import models
from jaxalign.evaluation import loading
from jaxalign.evaluation.options import DecodeOptions
from jaxalign.evaluation.specs import parse_method
from jaxalign.training import law_sources, tables
from tests.test_train_scripts import files, options
from train import value

__all__ = ["files"]  # a fixture


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory) -> pathlib.Path:
    """A run folder of a Q head of laws."""
    out = tmp_path_factory.mktemp("laws") / "run"
    command = [*options("value", files), "--objective", "distribution", "--head", "q", "--head-size", "8"]
    value.main([*command, "--bins", "5", "--rank", "2", "--out", str(out)])
    return out


def decoding(files, folder, out, *more: str) -> list[str]:
    """eval.decode's options for two tokens of two readings of a head."""
    given = {
        "--model": str(files / "base/model"),
        "--prompts": str(files / "prompts.jsonl"),
        "--reward": "jaxalign.worlds.opinions:golds",
        "--max-new-tokens": "8",
        "--batch-size": "6",
        "--out": str(out),
    }
    given |= dict(zip(more[::2], more[1::2], strict=True))
    methods = [f"distribution:{folder}:soft@1", f"value:{folder}@1"]
    return [x for pair in given.items() for x in pair] + [x for method in methods for x in ("--method", method)]


def test_a_folder_of_laws_tells_what_they_are_of_and_its_own_run_is_decoded(trained, files, tmp_path, capsys):
    about = json.loads((trained / "model" / law_sources.FILE).read_text())
    assert about["base"] == tables.folder_digest(files / "base/model")
    assert about["reward"].startswith("jaxalign.worlds.opinions:golds ")
    told = {"temperature": 1.0, "max_new_tokens": 8, "rollouts_per_prompt": 2, "clipped_share": 0.0}
    assert {name: about[name] for name in told} == told
    moved = tmp_path / "moved"  # names of folders do not count
    shutil.copytree(trained / "model", moved)
    decode.main(decoding(files, moved, tmp_path / "out", "--max-new-tokens", "8"))
    assert len(json.loads((tmp_path / "out/results.json").read_text())) == 3
    (moved / law_sources.FILE).unlink()
    capsys.readouterr()
    run = DecodeOptions(model=str(files / "base/model"), prompts="", out="", max_new_tokens=9)
    loading.check_laws(run, [parse_method(f"distribution:{moved}:soft@1")], None)
    assert f"note: {moved} has no laws.json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "OTHER"), r"model: expected the base .* that the laws of .* are of, \w+, found \w+"),
        (("--reward", "jaxalign.worlds.opinions:gold"), r"reward: expected the reward .*golds .*found .*"),
        (("--reward", "2 * jaxalign.worlds.opinions:golds"), "reward: expected the reward"),
        (("--max-new-tokens", "9"), r"max_new_tokens: expected the max_new_tokens .* are of, 8, found 9"),
    ],
    ids=["base", "reward", "weight", "limit"],
)
def test_laws_of_another_base_reward_or_limit_are_refused(more, message, trained, files, tmp_path):
    if "OTHER" in more:
        lm, params = models.load(files / "base/model")
        params["transformer"]["norm"]["scale"] = params["transformer"]["norm"]["scale"] + 1e-3
        models.save(tmp_path / "other", lm, params, tokenizer=models.tokenizer(str(files / "base/model")))
        more = ("--model", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=message):
        decode.main(decoding(files, trained / "model", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()
