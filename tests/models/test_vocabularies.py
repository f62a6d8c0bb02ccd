"""One rule for two vocabularies, in every command that reads two models: what texts hold is compared, the rest told."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from jaxalign import data, models, text
from jaxalign.evaluation import loading
from jaxalign.training import job, rl_rewards, rollouts
from jaxalign.training.options import ModelOptions
from jaxalign.training.rl_options import RewardOptions
from tests.conftest import forward, tiny_lm

WORDS = ("<unk>", "<eos>", "the", "cat", "sat", "on", "a", "mat")
RESERVED = ("<|r0|>", "<|r1|>", "<|r2|>")  # with the words 11 ids, as of the tiny model
RENAMED = ("<|r0|>", "<|eom|>", "<|r2|>")
TEMPLATE = "{% for m in messages %}<|r1|>{{ m.content }}{% endfor %}"


def made(words=WORDS, special=RESERVED, *, template=None, pad=None):
    """A tokenizer of words, then of special tokens, then of [PAD]."""
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in special])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>")
    if pad:
        fast.add_special_tokens({"pad_token": pad})
    fast.chat_template = template
    return fast


PLAIN = made()
PADDED = made(pad="[PAD]")
ACCEPTED = {
    "equal": (PLAIN, PLAIN, None),
    "renamed reserved tokens": (
        PLAIN,
        made(special=RENAMED),
        r"1 special tokens .*other names: .*<\|r1\|> = <\|eom\|>",
    ),
    "renamed, used by the other": (PLAIN, made(special=RENAMED, template="<|eom|>"), r"<\|r1\|> = <\|eom\|>"),
    "renamed, used by the base": (made(special=RENAMED, template="<|eom|>"), PLAIN, r"<\|eom\|> = <\|r1\|>"),
    "a padding token of the other": (PLAIN, PADDED, None),
    "a padding token of the base": (PADDED, PLAIN, r"no text holds are lacking: \['\[PAD\]'\]"),
    "words of the other": (made(special=()), made((*WORDS, "dog"), ()), None),
}
REFUSED = {
    "words that differ": (PLAIN, made((*WORDS[:-1], "hat")), "id 7 to be 'hat' where the base has 'mat'"),
    "a word and a reserved token": (PLAIN, made((*WORDS, "dog"), RESERVED[1:]), r"id 8 to be 'dog'"),
    "names that both use": (
        made(template=TEMPLATE),
        made(special=RENAMED, template="<|eom|>"),
        r"id 9 to be '<\|eom\|>' where the base has '<\|r1\|>'",
    ),
    "another EOS": (PLAIN, made(("<unk>", "</s>", *WORDS[2:])), "id 1 "),
    "words of the base": (made((*WORDS, "dog"), ()), made(special=()), "no id 8, which is 'dog' of the base"),
    "what the base's template writes": (made(template=TEMPLATE), made(special=RESERVED[:1]), r"no id 9.*<\|r1\|>"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_ids_that_no_text_holds_are_passed_over_and_told(name):
    base, other, told = ACCEPTED[name]
    if told is None:
        models.check_tokens(base, other)  # a warning would be an error
        return
    with pytest.warns(UserWarning, match=rf"^critic: .*{told}") as found:
        models.check_tokens(base, other)
    assert len(found) == 1


@pytest.mark.parametrize("name", REFUSED)
def test_ids_that_texts_hold_are_compared(name):
    base, other, match = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^reward: expected the base's vocabulary, found .*{match}"):
        models.check_tokens(base, other, name="reward")


def test_a_mapping_holds_ordinary_tokens_alone():
    models.check_tokens({"a": 0, "[PAD]": 1}, {"a": 0, "[PAD]": 1, "c": 2})
    with pytest.raises(ValueError, match=r"no id 1, which is '\[PAD\]'"):
        models.check_tokens({"a": 0, "[PAD]": 1}, {"a": 0})


def test_a_tokenizers_own_model_needs_a_row_for_what_texts_hold():
    models.check_rows(PLAIN, 11)
    with pytest.warns(UserWarning, match=r"^tokenizer: 1 special tokens lie beyond .*\['\[PAD\]'\]"):
        models.check_rows(PADDED, 11)
    with pytest.raises(ValueError, match="tokenizer: expected ids below the model's 7 tokens, found ids up to 10"):
        models.check_rows(PLAIN, 7)
    with pytest.raises(ValueError, match="reward: expected ids below the model's 9 tokens"):
        models.check_rows(made(template=TEMPLATE), 9, name="reward")


def test_a_smaller_model_beside_one_that_keeps_its_rows_reads_zeros():
    (base, params), (reward, reward_params) = tiny_lm(0, vocab_size=13), tiny_lm(1, "reward")
    with pytest.warns(UserWarning, match="reward: 11 rows filled up to the base's 13 with zeros"):
        _, (wide, filled) = models.match_vocabulary(
            (base, params), (reward, reward_params), names=("base", "reward"), keep_first=True
        )
    assert wide.vocab_size == 13
    tokens = jnp.array([[1, 2, 3, 10]])
    np.testing.assert_array_equal(forward(wide, filled, tokens).head, forward(reward, reward_params, tokens).head)
    assert np.isfinite(forward(wide, filled, jnp.array([[1, 12]])).head).all()
    for head in (None, "q"):
        with pytest.raises(ValueError, match="expected scores of 13 tokens as the base has, found 11"):
            models.match_vocabulary((base, params), tiny_lm(1, head), keep_first=True)


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """base and reward of 11 ids; those of 12 with [PAD]; reserved tokens renamed; another vocabulary."""
    root = tmp_path_factory.mktemp("vocabularies")
    forms = {"": (11, PLAIN), "_pad": (12, PADDED), "_renamed": (11, made(special=RENAMED))}
    forms["_other"] = (11, made((*WORDS[:-1], "hat")))
    for name, (size, tokenizer) in forms.items():
        for seed, (kind, head) in enumerate({"base": None, "reward": "reward"}.items()):
            lm, params = tiny_lm(seed, head, num_layers=1, vocab_size=size, eos_ids=(1,))
            models.save(root / f"{kind}{name}", lm, params, tokenizer=tokenizer)
    (root / "prompts.txt").write_text("the cat\n")
    return {path.name: str(path) for path in root.iterdir()}


def evaluate(base, reward):
    """eval.decode and eval.demo."""
    roles = {"model": base, "reward": reward}
    found = loading.load(roles, models.tokenizer(base), dtype="float32", mesh="", batch_size=1)
    return found["model"][0].vocab_size, found["reward"][0].vocab_size


def judge(base, reward):
    """train.calibrate, train.shaping, and train.value with prompts or with responses."""
    lm = models.load(base)[0]
    found = rollouts.open_reward(reward, lm, models.tokenizer(base), dtype="float32")[0]
    return lm.vocab_size, found.vocab_size


def reinforce(base, reward):
    """train.rl."""
    lm, params = models.load(base)
    started = job.StartedModel(lm, params, models.tokenizer(base))
    settings = {"base": base, "dtype": "float32", "max_new_tokens": 1}
    found = rl_rewards.compose(RewardOptions(reward=reward), started, [data.Prompt("", [2, 3])], **settings)
    return lm.vocab_size, found.reward.vocab_size


COMMANDS = [evaluate, judge, reinforce]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("base", "reward", "told"),
    [
        ("base", "reward", None),
        ("base", "reward_renamed", "other names"),
        ("base_renamed", "reward", "other names"),
        ("base", "reward_pad", r"rows cut to|\[PAD\]"),
        ("base_pad", "reward", r"rows (cut|filled)|\[PAD\]"),
    ],
)
def test_every_command_takes_vocabularies_that_texts_cannot_tell_apart(command, base, reward, told, folders):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        sizes = command(folders[base], folders[reward])
    assert len(set(sizes)) == 1
    assert bool(found) == (told is not None)
    if told:
        assert any(re.search(told, str(one.message)) for one in found)


@pytest.mark.parametrize("command", [evaluate])
def test_a_vocabulary_that_texts_tell_apart_is_refused(command, folders):
    with pytest.raises(ValueError, match="reward: expected the base's vocabulary, found id 7"):
        command(folders["base"], folders["reward_other"])


def test_a_tokenizer_with_a_padding_token_beyond_the_rows_starts_a_training_and_generates(folders, tmp_path):
    lm, params = models.load(folders["base"])
    models.save(tmp_path / "model", lm, params, tokenizer=PADDED)
    options = ModelOptions(model=str(tmp_path / "model"))
    with pytest.warns(UserWarning, match=r"beyond the model's rows, .*\[PAD\]"):
        job.start(options, lambda _: None, seed=0, dtype="float32", max_length=8)
    with pytest.warns(UserWarning, match=r"beyond the model's rows, .*\[PAD\]"):
        assert text.generate(lm, params, PADDED, ["the cat"], max_new_tokens=1, rng=jax.random.key(0))


def test_rollouts_of_a_base_are_read_by_the_model_that_learns_from_them(folders):
    """train.value and train.shaping with a --model other than the --base."""

    def load(base, model):
        tokenizer = models.tokenizer(folders[model])
        return rollouts.load_base(folders[base], tokenizer, dtype="float32", model=folders[model])[0].vocab_size

    assert load("base", "base") == load("base", "reward") == 11
    lacking = pytest.warns(UserWarning, match="model: 1 special tokens of the base that no text holds are lacking")
    with lacking, pytest.warns(UserWarning, match="base: 12 rows cut to the common vocabulary of 11"):
        assert load("base_pad", "reward") == 11
    with pytest.warns(UserWarning, match="other names"):
        assert load("base", "reward_renamed") == 11
    with pytest.raises(ValueError, match="model: expected the base's vocabulary, found id 7"):
        load("base", "reward_other")


def test_a_base_of_fewer_ids_than_the_values_that_are_learned_from_its_logits_is_named(folders):
    lm = models.load(folders["base_pad"])[0]
    with (
        pytest.warns(UserWarning, match="lacking"),
        pytest.raises(ValueError, match="base: expected scores of 12 tokens"),
    ):
        models.load_beside(folders["base"], lm, PADDED, name="base")
    with pytest.warns(UserWarning, match="rows cut to the base's vocabulary of 11"):
        assert models.load_beside(folders["base_pad"], models.load(folders["base"])[0], PLAIN)[0].vocab_size == 11


def test_a_command_names_one_of_several_chat_templates(folders, tmp_path):
    """train.sft, which stands for all that start from a model: the trained folder has the template that was used."""
    lm, params = models.load(folders["base"])
    words = made()
    words.chat_template = {"rag": "RAG", "tool_use": "TOOL"}
    models.save(tmp_path / "model", lm, params, tokenizer=words)
    options = ModelOptions(model=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=r"chat_template: expected one of \['rag', 'tool_use'\].*--chat-template"):
        job.start(options, lambda _: None, seed=0, dtype="float32", max_length=8)
    settings = {"seed": 0, "dtype": "float32", "max_length": 8}
    named = job.start(options, lambda _: None, **settings, chat_template="rag")
    assert named.tokenizer.chat_template == "RAG"


@pytest.mark.parametrize(
    "made",
    [
        lambda lm, params: models.with_eos(lm, (0, 3)),
        lambda lm, params: models.with_head(lm, models.Head("value", hidden_size=8)),
        lambda lm, params: models.cut_vocabulary(lm, params, 9)[0],
    ],
    ids=["with_eos", "with_head", "cut_vocabulary"],
)
def test_a_model_made_of_another_keeps_its_type_mesh_and_rematerialisation(made):
    lm, params = tiny_lm()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    lm = models.LanguageModel(lm.config, "bfloat16", mesh, "full")
    found = made(lm, params)
    assert found.config != lm.config
    assert (found.dtype, found.mesh, found.remat) == ("bfloat16", mesh, "full")
