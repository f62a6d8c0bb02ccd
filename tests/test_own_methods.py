"""A method of one's own in eval.decode, --method MODULE:FUNCTION: what it receives, and what is said of bad results."""

from __future__ import annotations

import textwrap

import jax.numpy as jnp
import numpy as np
import pytest

from eval import decode
from jaxalign import decoding
from jaxalign.evaluation import MethodInputs, OwnDraw, functions
from jaxalign.evaluation.functions import check_decoded
from jaxalign.types import KL, Completions, Decoded, TokenBatch
from tests.test_eval_decode import arguments, folders, methods, read, rows_of

__all__ = ["folders"]  # a fixture


def again(given: MethodInputs) -> OwnDraw:
    """The base, with a KL and numbers of its own."""

    def draw(rng, prompts):
        drawn = decoding.sample(given.policy, given.params, rng, prompts, **given.limits)
        info = {"length": drawn.mask.sum(axis=1), "table": drawn.mask}
        return Decoded(drawn, KL(jnp.full(drawn.mask.shape[0], 0.25), "bound"), info)

    return draw


def no_decoder(given: MethodInputs) -> str:
    return "responses"


def of_strength(given: MethodInputs) -> OwnDraw:
    n = int(given.strength)
    return lambda rng, prompts: decoding.sample(given.policy, given.params, rng, prompts, num_samples=n, **given.limits)


def late(given: MethodInputs) -> OwnDraw:
    def draw(rng, prompts):
        return given.missing

    return draw


def text(given: MethodInputs):
    return lambda rng, prompts: ["a response"] * prompts.tokens.shape[0]


HERE = __name__


def test_a_method_of_ones_own_stands_beside_the_others(folders, tmp_path, monkeypatch):
    # The module that the documentation shows, as a file of the user's.
    shown = (functions.__doc__ or "").partition(":\n\n")[2]
    (tmp_path / "my_method.py").write_text(textwrap.dedent(shown))
    monkeypatch.syspath_prepend(str(tmp_path))
    given = methods("my_method:longest@2,4", f"{HERE}:again", "best_of_n@2")
    decode.main(arguments(folders, tmp_path / "out", *given, "--reward", folders["reward"]))
    rows = {(row["method"], row["beta"]): row for row in rows_of(tmp_path / "out")}
    assert list(rows) == [
        ("base", None),
        ("my_method:longest", 2.0),
        ("my_method:longest", 4.0),
        (f"{HERE}:again", None),
        ("best_of_2", None),
    ]
    assert (
        rows["my_method:longest", 4.0]["tokens"]
        >= rows["my_method:longest", 2.0]["tokens"]
        >= rows["base", None]["tokens"]
    )
    own = rows[f"{HERE}:again", None]
    assert (own["kl"], own["kl_kind"]) == (0.25, "bound")
    assert own["win_rate"] is not None
    assert "forwards" not in own
    assert rows["my_method:longest", 2.0]["kl_kind"] == "bound"
    for record in read(tmp_path / "out"):
        if record["method"] == f"{HERE}:again":
            assert record["info"] == {"length": len(record["tokens"])}
    # Edited code is another method: its old responses are not taken for its own.
    (tmp_path / "my_method.py").write_text(textwrap.dedent(shown) + "\n# edited\n")
    with pytest.raises(ValueError, match=r"inputs: .* my_method|inputs: .*my_method.py.* changed"):
        decode.main(arguments(folders, tmp_path / "out", *given, "--reward", folders["reward"]))


def test_what_is_no_decoder_is_named(folders, tmp_path):
    for name, match in (
        (
            "of_strength",
            r":of_strength: expected draw.*\(strength is None: .*without @STRENGTH\), found TypeError: .*line",
        ),
        (
            "late",
            r":late: expected Decoded or Completions.*, found AttributeError: .*'missing' \(.*own_methods.py, line",
        ),
        ("no_decoder", r":no_decoder: expected draw\(rng, prompts\) -> Decoded, found a str"),
        ("text", ":text: expected Decoded or Completions, found a list"),
        ("nothing", "method: expected MODULE:FUNCTION"),
    ):
        with pytest.raises(ValueError, match=match):
            decode.main(arguments(folders, tmp_path / name, *methods(f"{HERE}:{name}")))


def completions(**changed) -> Completions:
    zeros = np.zeros((2, 3), np.float32)
    fields = {"tokens": np.zeros((2, 3), np.int32), "mask": zeros > 0, "log_prob": zeros, "log_prob_ref": zeros}
    fields |= {"log_norm": zeros, "kl": None, "finished": np.zeros(2, bool), "truncated": np.ones(2, bool)}
    return Completions(**(fields | changed))


PROMPTS = TokenBatch(np.ones((2, 4), np.int32), np.ones((2, 4), bool), np.arange(2))


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (None, "^mine: expected Decoded or Completions, found a NoneType"),
        (
            Decoded("text", KL(np.zeros(2), "bound"), None),
            "^mine: expected Decoded or Completions, found a Decoded of str",
        ),
        (
            completions(tokens=np.zeros((1, 3), np.int32)),
            r"^mine: expected tokens of shape \(2, 1 to 3\), found \(1, 3\)",
        ),
        (completions(tokens=np.zeros((2, 4), np.int32)), r"^mine: expected tokens of shape .*, found \(2, 4\)"),
        (completions(tokens=np.zeros((2, 1, 3), np.int32)), r"^mine: expected tokens of shape .*, found \(2, 1, 3\)"),
        (completions(mask=np.zeros((2, 2), bool)), r"^mine: expected mask of tokens' shape \(2, 3\), found \(2, 2\)"),
        (completions(log_prob=np.zeros(2)), "^mine: expected log_prob of tokens' shape"),
        (completions(finished=np.zeros((2, 1), bool)), r"^mine: expected finished of shape \(2,\), found \(2, 1\)"),
        (completions(tokens=np.zeros((2, 3))), "^mine: expected integers in tokens, found float64"),
        (completions(mask=np.zeros((2, 3), int)), "^mine: expected booleans in mask, found int64"),
        (Decoded(completions(), 0.0, None), r"^mine: expected kl as a KL of shape \(2,\), found float"),
        (Decoded(completions(), KL(np.zeros((2, 1)), "exact"), None), r"^mine: expected kl .* found \(2, 1\)"),
    ],
)
def test_results_of_another_shape_name_the_function(found, match):
    with pytest.raises(ValueError, match=match):
        check_decoded("mine", found, PROMPTS, 3)


def test_completions_bring_the_kl_that_is_known():
    ratio = check_decoded("mine", completions(log_prob=np.full((2, 3), 0.5, np.float32)), PROMPTS, 3).kl
    assert ratio.kind == "log_ratio"
    np.testing.assert_allclose(ratio.value, 1.5)
    exact = check_decoded("mine", completions(kl=np.full((2, 3), 0.25, np.float32)), PROMPTS, 3).kl
    assert exact.kind == "exact"
    np.testing.assert_allclose(exact.value, 0.75)


# Numbers that no decoder gives ----------------------------------------------------------------------------------------


def real(**changed) -> Completions:
    """All three tokens of both responses count."""
    return completions(**({"mask": np.ones((2, 3), bool)} | changed))


def all_of(value, dtype=np.float32):
    return np.full((2, 3), value, dtype)


def with_kl(value, kind="exact", info=None):
    return Decoded(real(), KL(value, kind), info)


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (real(tokens=all_of(10**6, np.int32)), r"tokens from 0 to 236, found 1000000 for prompts \[0, 1\]"),
        (real(tokens=all_of(237, np.int64)), "tokens from 0 to 236, found 237"),
        (real(tokens=all_of(-5, np.int32)), "tokens from 0 to 236, found -5"),
        (real(tokens=[[0] * 3] * 2), "an array in tokens, found list"),
        (real(mask=np.ma.array(np.ones((2, 3), bool), mask=True)), "an array in mask, found MaskedArray"),
        (real(log_prob=all_of(0, complex)), "real numbers in log_prob, found complex128"),
        (real(log_prob=all_of("x", object)), "real numbers in log_prob, found object"),
        (real(log_prob_ref=all_of("x", str)), "real numbers in log_prob_ref, found <U1"),
        (real(log_norm=all_of(True, bool)), "real numbers in log_norm, found bool"),
        (real(log_norm=[[0.0] * 3] * 2), "an array in log_norm, found list"),
        (real(kl=all_of(0, complex)), "real numbers in kl, found complex128"),
        (real(log_prob=all_of(3)), r"log_prob <= 0, found 3 for prompts \[0, 1\]"),
        (real(log_prob_ref=np.asarray([[-1, -1, -1], [0, 0.5, 0]])), r"log_prob_ref <= 0, found 0.5 for prompts \[1\]"),
        (real(truncated=np.asarray([0.5, 0.5])), "booleans in truncated, found float64"),
        (real(truncated=np.asarray(["no", "no"])), "booleans in truncated, found <U2"),
        (real(truncated=[False, True]), "an array in truncated, found list"),
        (real(kl=all_of(-20 / 3)), r"a KL of kind exact >= 0, found -20 for prompts \[0, 1\]"),
        (with_kl(np.asarray([1.0, -20.0])), r"a KL of kind exact >= 0, found -20 for prompts \[1\]"),
        (with_kl(np.asarray([1.0, -1.0]), "bound"), "a KL of kind bound >= 0, found -1"),
        (with_kl(np.zeros(2, complex)), "real numbers in kl, found complex128"),
        (with_kl(np.asarray(["a", "b"])), "real numbers in kl, found <U1"),
        (with_kl([0.0, 0.0]), "an array in kl, found list"),
        (with_kl(np.zeros(2), "exactly"), "a KL of kind exact, bound, .*, found 'exactly'"),
        (with_kl(np.zeros(2), info=[1, 2]), "info as a NamedTuple, a dict or None, found list"),
        (with_kl(np.zeros(2), info={"n": np.asarray(["a", "b"])}), "finite real numbers in info n, found <U1"),
        (with_kl(np.zeros(2), info={"n": np.asarray([1j, 2])}), "finite real numbers in info n, found complex128"),
        (with_kl(np.zeros(2), info={"n": np.asarray([1, np.nan])}), r"finite real numbers in info n, found \[.*nan"),
    ],
)  # fmt: skip
def test_numbers_that_no_decoder_gives_name_the_function(found, match):
    with pytest.raises(ValueError, match=f"^mine: expected {match}"):
        check_decoded("mine", found, PROMPTS, 3, vocab_size=237)


@pytest.mark.parametrize(
    "found",
    [
        completions(tokens=all_of(10**6, np.int32), log_prob=all_of(3)),  # entries that do not count
        real(log_prob=all_of(1e-5), log_prob_ref=all_of(-1, jnp.bfloat16), kl=all_of(-1e-6)),
        real(log_norm=all_of(5), tokens=all_of(236, np.uint8), log_prob=all_of(-3, np.int32)),
        with_kl(np.asarray([1.0, -20.0]), "log_ratio"),
        with_kl(np.asarray([1.0, -20.0]), "estimate", {"n": np.arange(2), "ok": np.ones(2, bool), "text": "kept"}),
    ],
)
def test_what_a_decoder_may_give_is_taken(found):
    assert check_decoded("mine", found, PROMPTS, 3, vocab_size=237).completions is not None


def outside(given: MethodInputs) -> OwnDraw:
    def draw(rng, prompts):
        drawn = decoding.sample(given.policy, given.params, rng, prompts, **given.limits)
        return drawn._replace(tokens=drawn.tokens * 0 + int(given.strength))

    return draw


@pytest.mark.parametrize("token", ["-5", "1000000"])
def test_tokens_outside_the_vocabulary_end_a_job_by_the_methods_name(token, folders, tmp_path):
    with pytest.raises(ValueError, match=rf":outside: expected tokens from 0 to \d+, found {token} for prompts \["):
        decode.main(
            arguments(folders, tmp_path / "out", *methods(f"{HERE}:outside@{token}"), "--reward", folders["reward"])
        )
