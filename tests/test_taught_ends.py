"""What a job teaches to end a response ends generation: in both files of the saved model."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from jaxalign import models, text
from tests.token_cases import CHATML, byte_level
from train import arm, dpo, reward_model, sft


@pytest.mark.filterwarnings("ignore:.*the tokenizer has EOS")
@pytest.mark.parametrize("option", [(), ("--eos-token", "<|user|>")])
def test_all_responses_of_a_trained_model_end_though_its_base_ends_elsewhere(option, tmp_path):
    tokenizer = byte_level(eos_token="<|im_end|>")
    known, taught = tokenizer.convert_tokens_to_ids(["<|endoftext|>", option[-1] if option else "<|im_end|>"])
    config = models.Config(
        len(tokenizer), 32, 1, 2, 2, 16, 64, 64, eos_ids=known, bos_id=tokenizer.convert_tokens_to_ids("<s>")
    )
    lm = models.LanguageModel(config)
    models.save(tmp_path / "base", lm, lm.init(jax.random.key(0)), tokenizer=tokenizer)
    rows = [{"prompt": "hello", "response": " there"}, {"prompt": "a b", "response": " c"}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"), "--max-length", "32"]
    command += ["--steps", "60", "--batch-size", "8", "--learning-rate", "0.02", "--validation", "0", *option]
    sft.main([*command, "--out", str(tmp_path / "run")])
    for name in ("config.json", "generation_config.json"):
        assert set(json.loads((tmp_path / "run/model" / name).read_text())["eos_token_id"]) == {known, taught}
    expected = option[-1] if option else "<|im_end|>"
    assert models.tokenizer(tmp_path / "run/model").eos_token == expected
    trained, params = models.load(tmp_path / "run/model")
    made = text.generate(trained, params, tokenizer, ["hello", "a b"] * 2, seed=1, max_new_tokens=12)
    assert np.asarray(made.completions.finished).sum() == 4


@pytest.mark.filterwarnings("ignore:.*the tokenizer has EOS")
@pytest.mark.parametrize("job", [arm, dpo, reward_model])
@pytest.mark.parametrize(("prompt", "option"), [("chat", ()), ("text", ("--eos-token", "<|im_end|>"))])
def test_what_pairs_end_in_joins_the_ends_of_each_kind_of_model(job, prompt, option, tmp_path):
    tokenizer = byte_level(CHATML, eos_token="<|endoftext|>")
    own, taught = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    lm = models.LanguageModel(models.Config(len(tokenizer), 32, 1, 2, 2, 16, 64, 64, eos_ids=own))
    models.save(tmp_path / "base", lm, lm.init(jax.random.key(0)), tokenizer=tokenizer)
    asked = [{"role": "user", "content": "hello"}] if prompt == "chat" else "hello"
    rows = [{"prompt": asked, "chosen": " Yes", "rejected": " No"}] * 4
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "pairs.jsonl"), "--max-length", "32"]
    command += ["--steps", "1", "--batch-size", "2", "--validation", "0", *option]
    job.main([*command, "--out", str(tmp_path / "run")])
    for name in ("config.json", "generation_config.json"):
        assert set(json.loads((tmp_path / "run/model" / name).read_text())["eos_token_id"]) == {own, taught}
    saved = models.tokenizer(tmp_path / "run/model")
    assert saved.eos_token == ("<|im_end|>" if option else "<|endoftext|>")
