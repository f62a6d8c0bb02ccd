"""Preference pairs and texts from files: every form, every refusal with its file and line; splits, padding, order."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import tokenizers

from jaxalign import tokens
from jaxalign.data import batches, preferences
from jaxalign.data.tokenizers import word_level
from jaxalign.worlds import opinions

PAIR = {"prompt": "the cat", "chosen": "runs", "rejected": "sits down"}
USER = {"role": "user", "content": "the cat"}
RUNS, SITS = {"role": "assistant", "content": "runs"}, {"role": "assistant", "content": "sits down"}
TEMPLATE = (
    "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"
    "{% for m in messages %}{{ m.role }} {{ m.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


WORDS = ["the", "cat", "runs", "sits", "down", "user", "assistant", "end", "<s>"]


@pytest.fixture(scope="module")
def tokenizer():
    """<eos> is 1, the 3, cat 4, runs 5, sits 6, down 7, user 8, assistant 9, end 10, <s> 11."""
    made = word_level(WORDS)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def with_bos():
    """Puts <s> before every text, as Llama's does."""
    made = word_level(WORDS)
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 11)]
    )
    made.chat_template = "<s> " + TEMPLATE
    return made


def file(tmp_path, rows, name: str = "d.jsonl"):
    """rows: bytes, or a list of lines of JSON and of objects."""
    path = tmp_path / name
    if name.endswith(".parquet") and not isinstance(rows, bytes):
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist(rows), path)
        return path
    if not isinstance(rows, bytes):
        rows = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
    return path


def form_of(tokenizer, eos_id):
    ends = () if eos_id is None else (eos_id,)
    return tokens.text_format(tokenizer, eos_ids=ends, closing=ends)


def pairs(path, tokenizer, *, eos_id=1, max_length=32, **options):
    return preferences.tokenize_pairs(path, form_of(tokenizer, eos_id), max_length=max_length, **options)


def texts(path, tokenizer, *, eos_id=1, max_length=32, **options):
    return preferences.tokenize_texts(path, form_of(tokenizer, eos_id), max_length=max_length, **options)


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.parquet"])
def test_every_kind_of_file(name, tmp_path, tokenizer):
    other = {"prompt": "sits", "chosen": "the cat", "rejected": "the end"}
    loaded = pairs(file(tmp_path, [PAIR, other], name), tokenizer)
    assert [row[:3] for row in loaded.rows] == [([3, 4], [5, 1], [6, 7, 1]), ([6], [3, 4, 1], [3, 10, 1])]
    assert [row.where for row in loaded.rows] == [f"{tmp_path / name}:1", f"{tmp_path / name}:2"]
    assert (loaded.skipped, loaded.reasons) == (0, [])
    chats = [{"chosen": [USER, RUNS], "rejected": [USER, SITS]}]
    assert pairs(file(tmp_path, chats, name), tokenizer).rows[0][:3] == ([8, 3, 4, 1, 9], [5, 1], [6, 7, 1])


def test_transcripts_are_split_at_the_last_turn(tmp_path, tokenizer):
    before = "\n\nHuman: the\n\nAssistant: cat\n\nHuman: end\n\nAssistant:"
    rows = [{"chosen": before + " runs", "rejected": before + " sits down"}]
    path = file(tmp_path, rows)
    assert pairs(path, tokenizer).rows[0][1:3] == ([5, 1], [6, 7, 1])
    assert pairs(path, tokenizer).rows[0].prompt == tokenizer(before)["input_ids"]
    assert texts(path, tokenizer).rows[0][:2] == pairs(path, tokenizer).rows[0][:2]
    assert preferences.read_strings(path).rows == [rows[0]["chosen"], " sits down"]


def test_transcripts_of_opinions_give_the_pairs_they_were_made_of(tmp_path):
    tokenizer = word_level([*opinions.words(), "Human:", "Assistant:"])
    drawn = opinions.preferences(20, seed=5)
    loaded = pairs(file(tmp_path, opinions.transcripts(drawn)), tokenizer, max_length=128)
    decoded = [[tokenizer.decode(ids) for ids in row[:3]] for row in loaded.rows]
    assert decoded == [
        [f"Human: {row['prompt']} Assistant:", row["chosen"] + " <eos>", row["rejected"] + " <eos>"] for row in drawn
    ]


def test_chats_with_and_without_a_prompt_are_the_same_pair(tmp_path, tokenizer):
    apart = {"prompt": [USER], "chosen": [RUNS], "rejected": [SITS]}
    together = {"prompt": None, "chosen": [USER, RUNS], "rejected": [USER, SITS]}
    rows = pairs(file(tmp_path, [apart, together]), tokenizer).rows
    assert rows[0][:3] == rows[1][:3] == ([8, 3, 4, 1, 9], [5, 1], [6, 7, 1])
    with pytest.raises(ValueError, match=r"d.jsonl:1: expected a tokenizer with a chat template"):
        pairs(file(tmp_path, [apart]), word_level(["the"]))


def test_texts_in_every_form(tmp_path, tokenizer):
    forms = [PAIR, *({"prompt": "the cat", name: "runs"} for name in ("response", "completion", "chosen"))]
    assert [row[:2] for row in texts(file(tmp_path, forms), tokenizer).rows] == [([3, 4], [5, 1])] * 4
    chat, whole = texts(file(tmp_path, [{"messages": [USER, RUNS]}, {"text": "the cat"}]), tokenizer).rows
    assert chat[:2] == ([8, 3, 4, 1, 9], [5, 1])
    assert whole[:2] == ([], [3, 4, 1])


def test_special_tokens_come_from_the_tokenizer_or_from_the_template(tmp_path, with_bos):
    chat = {"chosen": [USER, RUNS], "rejected": [USER, SITS]}
    plain, templated = pairs(file(tmp_path, [PAIR, chat]), with_bos).rows
    assert plain[:3] == ([11, 3, 4], [5, 1], [6, 7, 1])
    assert templated[:3] == ([11, 8, 3, 4, 1, 9], [5, 1], [6, 7, 1])
    assert texts(file(tmp_path, [{"text": "the cat"}]), with_bos).rows[0][:2] == ([11], [3, 4, 1])


def test_eos_ends_a_response_exactly_once(tmp_path, tokenizer):
    rows = [{**PAIR, "chosen": chosen} for chosen in ("runs", "runs <eos>", "runs <eos> <eos>")]
    assert [row.chosen for row in pairs(file(tmp_path, rows), tokenizer).rows] == [[5, 1]] * 3
    assert pairs(file(tmp_path, [PAIR]), tokenizer, eos_id=None).rows[0][1:3] == ([5], [6, 7])
    later = word_level(WORDS)
    later.chat_template = TEMPLATE.replace("<eos> {% endfor", "<eos> end {% endfor")
    chat = [{"chosen": [USER, RUNS], "rejected": [USER, SITS]}]
    assert pairs(file(tmp_path, chat), later).rows[0][1:3] == ([5, 1], [6, 7, 1])


BAD = [
    ("{", "expected JSON"),
    ("[" * 100_000, "expected JSON"),
    ("[1]", "JSON object, found list"),
    (b'{"prompt": "\xe9", "chosen": "runs", "rejected": "sits"}', "expected JSON, found 'utf-8'"),
    (r'{"prompt": "\ud83d", "chosen": "runs", "rejected": "sits"}', "surrogates not allowed"),
    ('{"prompt": "the", "chosen": "runs"}', r"found fields \['chosen', 'prompt'\]"),
    ('{"prompt": "the", "chosen": "runs", "rejected": null}', r"found fields \['chosen', 'prompt'\]"),
    ('{"prompt": 3, "chosen": "runs", "rejected": "sits"}', "text in prompt, found int"),
    ('{"prompt": "the", "chosen": ["runs"], "rejected": "sits"}', "text in chosen, found list"),
    ('{"prompt": "", "chosen": "runs", "rejected": "sits"}', "a prompt token, found none"),
    ('{"prompt": "the", "chosen": "runs", "rejected": " "}', "response in rejected, found an empty one"),
    ('{"prompt": "the", "chosen": "runs", "rejected": "<eos>"}', "a response token, found none"),
    ('{"prompt": "the", "chosen": "runs", "rejected": "runs"}', "the same tokens twice"),
    ('{"prompt": "the", "chosen": "runs", "rejected": "runs <eos>"}', "the same tokens twice"),
    ('{"chosen": "runs", "rejected": "sits"}', "found neither in chosen"),
    (r'{"chosen": "a\n\nAssistant: b", "rejected": "c\n\nAssistant: d"}', "found two prompts"),
    (json.dumps({"chosen": [USER, RUNS], "rejected": [RUNS, SITS]}), "found two prompts"),
    (json.dumps({"chosen": [RUNS], "rejected": [SITS]}), "found an empty or another one"),
    (json.dumps({"prompt": [RUNS], "chosen": [RUNS], "rejected": [SITS]}), "the user speaks first"),
    (json.dumps({"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [SITS]}), "messages as"),
    (json.dumps({"prompt": [USER], "chosen": [{**RUNS, "content": ""}], "rejected": [SITS]}), "an empty message"),
    (json.dumps({**PAIR, "chosen": "runs " * 31 + "end"}), "at most 31 tokens, found 33"),
]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_is_named_or_skipped(line, reason, tmp_path, tokenizer):
    line = line.encode() if isinstance(line, str) else line
    path = file(tmp_path, json.dumps(PAIR).encode() + b"\n\n" + line + b"\r\n" + json.dumps(PAIR).encode())
    with pytest.raises(ValueError, match=rf"d\.jsonl:3: .*{reason}"):
        pairs(path, tokenizer)
    loaded = pairs(path, tokenizer, skip_bad=True)
    assert (len(loaded.rows), loaded.skipped, len(loaded.reasons)) == (2, 1, 1)
    assert loaded.reasons[0].startswith(f"{path}:3: ")
    assert loaded.rows[1].where == f"{path}:4"


def test_skipped_rows_are_all_counted_and_the_first_twenty_told(tmp_path, tokenizer):
    loaded = pairs(file(tmp_path, ["{"] * 14 + [PAIR] + ["{"] * 9), tokenizer, skip_bad=True)
    assert (len(loaded.rows), loaded.skipped, len(loaded.reasons)) == (1, 23, 20)
    nulls = file(tmp_path, [PAIR, {**PAIR, "rejected": None}, {**PAIR, "prompt": None}], "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet:2: .*found fields \['chosen', 'prompt'\]"):
        pairs(nulls, tokenizer)
    assert pairs(nulls, tokenizer, skip_bad=True).skipped == 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": " "}, "text in text, found an empty one"),
        ({"prompt": "the", "text": "cat"}, "found fields"),
        ({"response": "cat"}, "found fields"),
        ({"prompt": "the", "response": "cat", "completion": "cat"}, "found fields"),
        ({"prompt": "the", "response": 3}, "expected text in prompt and response"),
        ({"messages": [USER]}, "fewer than two"),
        ({"text": "<eos>"}, "a response token, found none"),
    ],
)
def test_a_bad_text_is_named(row, reason, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=rf"d\.jsonl:2: .*{reason}"):
        texts(file(tmp_path, [PAIR, row]), tokenizer)


def test_bad_files_are_named(tmp_path, tokenizer):
    for content in (b"", b"\n\n"):
        with pytest.raises(
            ValueError, match=r"^data: expected at least one good row, found none in .*d\.jsonl \(0 bad"
        ):
            pairs(file(tmp_path, content), tokenizer)
    with pytest.raises(ValueError, match=r"found none in .* \(2 bad\)"):
        pairs(file(tmp_path, ["{", "{"]), tokenizer, skip_bad=True)
    with pytest.raises(ValueError, match=r"^data: .* found no such file at .*none\.jsonl"):
        pairs(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(ValueError, match=r"^data: .* found suffix '\.xml'"):
        pairs(file(tmp_path, b"the", "d.xml"), tokenizer)
    with pytest.raises(ValueError, match=r"^data: expected a Parquet file, found .*d\.parquet"):
        pairs(file(tmp_path, b"the cat", "d.parquet"), tokenizer)
    pa = pytest.importorskip("pyarrow")
    one = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xe9"))
    rows = pa.table([one] * 3, names=["prompt", "chosen", "rejected"])
    pytest.importorskip("pyarrow.parquet").write_table(rows, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"^data: expected a Parquet file, found 'utf-8' .*d\.parquet"):
        pairs(tmp_path / "d.parquet", tokenizer)
    whole = gzip.compress(json.dumps(PAIR).encode())
    for broken in (b"raw text", whole[:-9]):
        path = tmp_path / "d.jsonl.gz"
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"expected gzip data, found .*d\.jsonl\.gz"):
            pairs(path, tokenizer, skip_bad=True)


def test_text_of_every_kind_comes_through(tmp_path):
    """A byte order mark, U+2028 (no end of line in JSON), whole surrogate pairs, and what is not ASCII."""
    lines = [json.dumps({"text": "a\u2028é"}, ensure_ascii=False), r'{"text": "\ud83d\ude00"}', '{"text": "\\u00e9"}']
    path = file(tmp_path, ("\ufeff" + "\r\n".join(lines)).encode())
    assert preferences.read_strings(path).rows == ["a\u2028é", "😀", "é"]
    both = file(tmp_path, [{"chosen": [USER, RUNS], "rejected": [USER, SITS]}, PAIR])
    assert preferences.read_strings(both, skip_bad=True)[:2] == (["the catruns", "sits down"], 1)


def test_a_long_prompt_loses_its_beginning_and_a_long_text_its_end(tmp_path, tokenizer):
    path = file(tmp_path, [{**PAIR, "prompt": "the cat runs sits down"}])
    assert pairs(path, tokenizer, max_length=5).rows[0][:3] == ([6, 7], [5, 1], [6, 7, 1])
    assert pairs(path, tokenizer, max_length=4).rows[0].prompt == [7]
    with pytest.raises(ValueError, match=r"d\.jsonl:1: .* at most 2 tokens, found 3 \(max_length 3\)"):
        pairs(path, tokenizer, max_length=3)
    assert texts(path, tokenizer, max_length=3).rows[0][:2] == ([7], [5, 1])
    whole = file(tmp_path, [{"text": "the cat runs"}])
    assert texts(whole, tokenizer, max_length=2).rows[0][:2] == ([], [3, 4])


def test_padding():
    rows = [preferences.PairTokens([3, 4], [5, 1], [6, 7, 1], "f:1"), preferences.PairTokens([3], [1], [5, 1], "f:2")]
    padded = preferences.pad_pairs(rows, length=6)
    assert padded["chosen"]["tokens"].tolist() == [[3, 4, 5, 1, 0, 0], [3, 1, 0, 0, 0, 0]]
    assert padded["rejected"]["tokens"].tolist() == [[3, 4, 6, 7, 1, 0], [3, 5, 1, 0, 0, 0]]
    assert padded["rejected"]["mask"].astype(int).tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0]]
    assert padded["rejected"]["loss_mask"].astype(int).tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]]
    assert [padded["chosen"][name].dtype for name in ("tokens", "mask", "loss_mask")] == [np.int32, bool, bool]


@pytest.mark.parametrize(("prompt", "response"), [([3, 4], []), ([], [5]), ([], [])])
def test_an_empty_loss_mask_is_named(prompt, response):
    good = preferences.TextTokens([3], [5, 1], "f:1")
    with pytest.raises(ValueError, match=r"^f:7: .*empty loss mask"):
        preferences.pad_texts([good, preferences.TextTokens(prompt, response, "f:7")], length=4)
    with pytest.raises(ValueError, match=r"^f:1: expected at most 2 tokens, found 3"):
        preferences.pad_texts([good], length=2)


def split(rows, *, fraction=0.2, seed=0):
    return preferences.split_by_prompt(rows, fraction=fraction, seed=seed)


def test_no_prompt_is_on_both_sides_of_a_split_and_its_side_is_its_own():
    rows = [preferences.TextTokens([i, i + 1], [5, r], f"f:{i}") for r in range(3) for i in range(2000)]
    training, validation = split(rows)
    sides = [{tuple(row.prompt) for row in part} for part in (training, validation)]
    assert sides[0] & sides[1] == set()
    assert len(training) + len(validation) == 6000
    # Binomial of 2000 at 0.2 has the standard deviation 17.9: five of them.
    assert abs(len(sides[1]) - 400) < 90
    order = np.random.default_rng(0).permutation(6000)
    fewer = [rows[i] for i in order[:3000]]
    for part, side in zip(split(fewer), sides, strict=True):
        assert {tuple(row.prompt) for row in part} <= side
    assert {tuple(row.prompt) for row in split(rows, seed=1)[1]} != sides[1]


def test_a_split_holds_on_every_machine():
    """A literal: with another hash, a run's validation rows become a later run's training rows."""
    _, validation = split([preferences.TextTokens([i], [5], "f") for i in range(16)], fraction=0.5)
    assert [row.prompt[0] for row in validation] == [1, 2, 4, 10, 15]


def test_rows_are_split_by_the_prompt_as_it_was_before_it_was_cut(tmp_path, tokenizer):
    rows = [
        {"prompt": "the cat " * n, "chosen": "runs " * r, "rejected": "end"} for n in range(20, 40) for r in range(1, 9)
    ]
    parts = split(pairs(file(tmp_path, rows), tokenizer, max_length=32).rows, fraction=0.5)
    sides = [{(int(row.where.rpartition(":")[2]) - 1) // 8 for row in part} for part in parts]  # 8 lines a prompt
    assert sides[0] & sides[1] == set()
    assert sorted(sides[0] | sides[1]) == list(range(20))


def test_texts_without_a_prompt_are_split_too(tmp_path, tokenizer):
    rows = [{"text": f"the {'cat ' * n}"} for n in range(40)] * 2
    parts = split(texts(file(tmp_path, rows), tokenizer, max_length=64).rows, fraction=0.5)
    sides = [{len(row.response) for row in part} for part in parts]
    assert sides[0] & sides[1] == set()
    assert min(map(len, sides)) > 8


def test_splits_refuse_what_cannot_be():
    rows = [preferences.TextTokens([3], [5], "f:1")] * 9
    for fraction in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match=rf"^fraction: expected a share in \(0, 1\), found {fraction}"):
            split(rows, fraction=fraction)
    with pytest.raises(
        ValueError, match=r"^fraction: expected a (training|validation) part with rows, found none of 9"
    ):
        split(rows)


def test_the_order_of_pairs_is_a_function_of_seed_and_step():
    rows = [preferences.PairTokens([i], [i, 1], [i, 2, 1], f"f:{i}") for i in range(7)]

    def tokens(seed, step, count):
        source = batches.batches(
            rows, lambda group: preferences.pad_pairs(group, length=4), batch_size=4, seed=seed, accumulate=2
        )
        return [batch["chosen"]["tokens"] for batch, _ in zip(source(step), range(count), strict=False)]

    whole = np.stack(tokens(0, 0, 7))
    assert whole.shape == (7, 2, 2, 4)
    np.testing.assert_array_equal(whole[3:], tokens(0, 3, 4))
    assert (whole != np.stack(tokens(1, 0, 7))).any()
    np.testing.assert_array_equal(np.sort(whole[..., 0].reshape(4, 7)), [np.arange(7)] * 4)  # each row once a pass
