"""Texts and chats as token ids: against transformers, and in literal rows."""

from __future__ import annotations

import itertools

import pytest

from jaxalign import tokens
from tests import token_cases as cases
from tests import write_templates

ASK = [{"role": "user", "content": "How are you?"}]
SYSTEM = [{"role": "system", "content": "One two three."}]
REPLY = {"role": "assistant", "content": "I am fine."}
MORE = [*ASK, REPLY, {"role": "user", "content": "What is the capital of France?"}]
LAST = {"role": "assistant", "content": "Paris."}
TEMPLATES = ("CHATML", "LLAMA2", "ZEPHYR", "THINK", "NO_SYSTEM", "BARE")
KINDS = {"byte_level": cases.byte_level, "dummy_space": cases.dummy_space}


def made(kind, template=None, **options):
    tokenizer = KINDS[kind](None if template is None else getattr(cases, template), **options)
    return tokenizer, tokens.text_format(tokenizer)


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(ids)


def whole(row):
    return [*row.prompt, *row.response, *row.closing, *row.tail]


def ids_of(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=True, **options)["input_ids"]


def once(ids, bos=1):
    return [bos, *itertools.dropwhile(lambda i: i == bos, ids)]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_chats_are_what_transformers_makes_of_them(kind, template):
    """The template's tokens, with BOS once where the tokenizer writes one."""
    tokenizer, form = made(kind, template)
    theirs = once if form.prefix else list
    for prompt in (ASK, MORE):
        asked = theirs(ids_of(tokenizer, prompt, add_generation_prompt=True))
        assert tokens.encode_prompt(form, prompt).ids == asked
        row = tokens.encode_pair(form, prompt, "Yes, I am.")
        said = theirs(ids_of(tokenizer, [*prompt, {"role": "assistant", "content": "Yes, I am."}]))
        if tokens.NOTES.keys().isdisjoint(row.notes):
            assert row.prompt == asked
        if template != "BARE":  # which writes no end: the tokenizer's is appended
            assert whole(row) == said
        begun = [*prompt, {"role": "assistant", "content": "Yes, I"}]
        goes_on = ids_of(tokenizer, begun, continue_final_message=True)
        assert tokens.encode_prompt(form, begun).ids == theirs(goes_on)


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_is_the_templates_and_is_learned_once(kind):
    for template, closing, tail in (
        ("CHATML", ["<|im_end|>"], True),
        ("ZEPHYR", ["</s>"], True),
        ("THINK", ["</s>"], False),
        ("NO_SYSTEM", ["</s>"], False),
    ):
        tokenizer, form = made(kind, template)
        row = tokens.encode_pair(form, ASK, "Yes")
        assert words(tokenizer, row.closing) == closing
        assert bool(row.tail) == tail
        assert tokenizer.decode(row.tail).strip() == ""
        long = tokens.encode_pair(form, MORE, "Yes </s> No <|im_end|> One")
        assert words(tokenizer, long.closing) == closing
        assert "One" in tokenizer.decode(long.response)  # a response that holds an end stays whole
        assert "inner_end" in long.notes
    tokenizer, form = made(kind, "LLAMA2")
    assert words(tokenizer, tokens.encode_pair(form, ASK, "Yes").closing)[-1] == "</s>"
    tokenizer, form = made(kind, "BARE")
    assert tokens.encode_pair(form, ASK, "Yes").closing[-1] == tokenizer.eos_token_id


def test_the_first_of_the_models_ends_is_the_end():
    """A template may write several special tokens; the one that ends generation is learned, what follows is not."""
    template = cases.CHATML.replace("<|im_end|>\n{% endfor %}", "<|im_end|><|endoftext|>\n{% endfor %}")
    tokenizer = cases.byte_level(template)
    stop, text = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for ends, closing in (((stop,), [stop]), ((text,), [stop, text]), ((text, stop), [stop])):
        row = tokens.encode_pair(tokens.text_format(tokenizer, eos_ids=ends), ASK, "Yes")
        assert row.closing == closing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_stands_once_and_an_added_eos_never_ends_a_prompt(kind, bos, eos):
    tokenizer, form = made(kind, "ZEPHYR", bos=bos, eos=eos)
    start = [1] if bos else []
    assert list(form.prefix) == start
    assert (
        tokens.encode_prompt(form, "hello there").ids
        == start + tokenizer("hello there", add_special_tokens=False).input_ids
    )
    for text in ("<s>hello", "hello", "<s><s>hello"):
        ids = tokens.encode_prompt(form, text).ids
        assert ids.count(1) == (1 if bos else text.count("<s>"))
        assert tokenizer.eos_token_id not in ids
    _, form = made(kind, "LLAMA2", bos=bos, eos=eos)
    ids = tokens.encode_prompt(form, ASK).ids
    assert ids[0] == 1
    assert ids.count(1) == 1
    _, form = made(kind, "ZEPHYR", bos=bos, eos=eos)
    ids = tokens.encode_prompt(form, ASK).ids  # the template writes none: the tokenizer's stands there
    assert ids[:1] == [1] if bos else 1 not in ids
    row = tokens.encode_pair(form, "hello", " there")
    assert row.prompt[: len(start)] == start
    assert 1 not in row.response
    assert row.closing == [2]


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("Human: hello\n\nAssistant:", " Yes, I am."),
        ("Human: hello\n\nAssistant: ", "Yes, I am."),
        ("Human: hello\n\nAssistant:", "Yes, I am."),
        ("The capital of", " France is Paris."),
        ("hel", "lo there"),
        ("hello\n", "\nthere"),
        ("", "hello there"),
    ],
)
def test_responses_in_plain_text_go_on_where_the_prompt_ends(prompt, response):
    """Prompt and response decode to their text, and only an empty prompt's response begins with a dummy space."""
    for kind in KINDS:
        tokenizer, form = made(kind)
        row = tokens.encode_pair(form, prompt, response)
        assert row.prompt == ([*form.prefix] if not prompt else tokens.encode_prompt(form, prompt).ids)
        assert tokens.decode_text(tokenizer, [*row.prompt, *row.response]) == prompt + response
        both = tokens.encode_text(form, prompt + response)
        assert ("boundary" in row.notes) == (both[: len(row.prompt)] != row.prompt)
        if "boundary" not in row.notes:
            assert [*row.prompt, *row.response] == both
        if kind == "dummy_space" and prompt and not response.startswith(" "):
            assert not words(tokenizer, row.response)[0].startswith("▁")


def test_a_text_that_holds_its_end_gets_no_second():
    for kind in KINDS:
        _tokenizer, form = made(kind)
        for text in (" Yes</s>", " Yes"):
            row = tokens.encode_pair(form, "hello", text)
            assert row.closing == [2]
            assert 2 not in row.response
        assert tokens.encode_pair(form._replace(closing=()), "hello", " Yes").closing == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["CHATML", "LLAMA2", "ZEPHYR", "NO_SYSTEM"])
def test_every_assistant_turn_is_learned_with_its_end(kind, template):
    tokenizer, form = made(kind, template)
    chat = [*MORE, LAST]
    row = tokens.encode_chat(form, chat)
    assert whole(row) == (once if form.prefix else list)(ids_of(tokenizer, chat))
    learned = [i for i, on in zip([*row.response, *row.closing], row.learned, strict=True) if on]
    parts = [tokens.encode_pair(form, chat[:n], chat[n]["content"]) for n in (1, 3)]
    assert learned == [i for part in parts for i in (*part.response, *part.closing)]
    assert row.prompt == parts[0].prompt
    last = tokens.encode_chat(form, chat, learn="last")
    assert (last.prompt, last.response, last.closing) == (parts[1].prompt, parts[1].response, parts[1].closing)
    assert whole(last) == whole(row)
    # A pair whose responses go over several turns: the prompt's own turns are not learned.
    pair = tokens.encode_pair(form, chat[:2], chat[2:])
    assert (pair.response, pair.learned) == (parts[1].response, None) or pair.learned
    assert [*pair.prompt, *pair.response, *pair.closing] == [*row.prompt, *row.response, *row.closing]


@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_the_prompt_are_not_learned(kind):
    """A response over several turns, after a prompt with an assistant's turn; contents that the template strips."""
    _tokenizer, form = made(kind, "LLAMA2")
    more = {"role": "user", "content": " hello "}
    reply = [{"role": "assistant", "content": " Yes "}, more, {"role": "assistant", "content": " No. "}]
    row = tokens.encode_pair(form, MORE, reply)
    learned = [i for i, on in zip([*row.response, *row.closing], row.learned, strict=True) if on]
    expected = [
        i
        for prompt, said in ((MORE, reply[0]), ([*MORE, *reply[:2]], reply[2]))
        for part in [tokens.encode_pair(form, prompt, [said])]
        for i in (*part.response, *part.closing)
    ]
    assert learned == expected
    assert row.prompt == tokens.encode_prompt(form, MORE).ids
    assert row.notes == ()


def test_earlier_thoughts_that_a_template_leaves_out():
    """The earlier turn is not what the conversation shows: it is not learned, and the row says so."""
    tokenizer, form = made("byte_level", "THINK")
    chat = [ASK[0], {"role": "assistant", "content": "<think>one</think>I am fine."}, MORE[2], LAST]
    row = tokens.encode_chat(form, chat)
    assert row.notes == ("turns_not_found",)
    learned = [i for i, on in zip([*row.response, *row.closing], row.learned, strict=True) if on]
    assert tokenizer.decode(learned) == "Paris.</s>"
    plain = tokens.encode_chat(form, [*MORE, LAST])
    learned = [i for i, on in zip([*plain.response, *plain.closing], plain.learned, strict=True) if on]
    assert tokenizer.decode(learned) == "I am fine.</s>Paris.</s>"
    assert plain.notes == ()


def test_an_opening_for_generation_alone_is_not_taught():
    tokenizer, form = made("byte_level", "THINK")
    assert tokenizer.decode(tokens.encode_prompt(form, ASK).ids).endswith("<|assistant|><think>\n")
    row = tokens.encode_pair(form, ASK, "I am fine.")
    assert tokenizer.decode(row.prompt).endswith("<|assistant|>")
    assert row.notes == ("generation_opening",)


def test_turns_after_the_assistants_last_are_left_out():
    _, form = made("byte_level", "CHATML")
    row = tokens.encode_chat(form, [*MORE, LAST, ASK[0]])
    assert row.notes == ("trailing_turns",)
    assert row._replace(notes=()) == tokens.encode_chat(form, [*MORE, LAST])
    with pytest.raises(ValueError, match=r"expected an assistant's turn to learn, found roles \['user'\]"):
        tokens.encode_chat(form, ASK)


def test_a_response_goes_on_with_a_begun_turn():
    tokenizer, form = made("byte_level", "CHATML")
    row = tokens.encode_pair(form, [*ASK, {"role": "assistant", "content": "I am"}], " fine.")
    assert tokenizer.decode(row.prompt).endswith("<|im_start|>assistant\nI am")
    assert tokenizer.decode([*row.response, *row.closing]) == " fine.<|im_end|>"


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_holds_bos_and_the_system_turn(kind):
    tokenizer, form = made(kind, "CHATML")
    prompt = tokens.encode_prompt(form, [*SYSTEM, *MORE])
    head = tokenizer.decode(prompt.ids[: prompt.header])
    assert "One two three." in head
    assert "How" not in head
    assert head.rstrip().endswith("user")
    assert prompt.ids[: len(form.prefix)] == list(form.prefix)
    row = tokens.encode_pair(form, [*SYSTEM, *MORE], "Paris.")
    assert (row.header, row.prompt) == (prompt.header, prompt.ids)
    text = tokens.encode_prompt(form, "hello there")
    assert text.header == len(form.prefix)


def test_a_system_turn_is_given_where_a_chat_has_none():
    tokenizer, _ = made("byte_level", "CHATML")
    form = tokens.text_format(tokenizer, system="One two three.")
    plain = tokens.text_format(tokenizer)
    assert tokens.encode_prompt(form, ASK) == tokens.encode_prompt(plain, [*SYSTEM, *ASK])
    own = [{"role": "system", "content": "Yes."}, *ASK]
    assert tokens.encode_prompt(form, own) == tokens.encode_prompt(plain, own)
    refusing = tokens.text_format(cases.byte_level(cases.NO_SYSTEM), system="Yes.")
    with pytest.raises(ValueError, match="accepts, found System role not supported"):
        tokens.encode_prompt(refusing, ASK)


def test_arguments_reach_the_template():
    template = cases.CHATML.replace("assistant\n{%", "assistant\n{% if not thinking %}<think></think>{% endif %}{%")
    tokenizer = cases.byte_level(template)
    for thinking in (True, False):
        form = tokens.text_format(tokenizer, template_options={"thinking": thinking})
        assert tokenizer.decode(tokens.encode_prompt(form, ASK).ids).endswith("</think>") != thinking


def test_tool_turns_and_several_system_turns_go_to_the_template():
    tokenizer, form = made("byte_level", "CHATML")
    chat = [*SYSTEM, *SYSTEM, *ASK, REPLY, {"role": "tool", "content": "ten"}, LAST]
    row = tokens.encode_chat(form, chat)
    assert whole(row) == ids_of(tokenizer, chat)
    learned = [i for i, on in zip([*row.response, *row.closing], row.learned, strict=True) if on]
    assert tokenizer.decode(learned) == "I am fine.<|im_end|>Paris.<|im_end|>"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda form: tokens.encode_prompt(form, "<missing>" if 0 else ""), "at least one token, found none in ''"),
        (lambda form: tokens.encode_prompt(form, []), "expected messages as"),
        (lambda form: tokens.encode_prompt(form, ["hello"]), "expected messages as"),
        (lambda form: tokens.encode_prompt(form, [{"content": "hello"}]), 'expected a "role" in message 0'),
        (lambda form: tokens.encode_pair(form, ASK, ""), "expected a response token, found none"),
        (lambda form: tokens.encode_pair(form, "hello", ""), "expected a response token, found none"),
        (lambda form: tokens.encode_pair(form, "hello", [REPLY]), "a text in reply to a text, found messages"),
        (lambda form: tokens.encode_chat(form, ASK, learn="first"), "expected 'all' or 'last', found 'first'"),
        (lambda form: tokens.show_row(form.tokenizer, [("said", [1])]), "expected kinds among"),
    ],
)
def test_what_cannot_be_encoded_is_named(call, message):
    _, form = made("byte_level", "CHATML")
    with pytest.raises(ValueError, match=message):
        call(form)
    with pytest.raises(ValueError, match="expected a tokenizer with a chat template"):
        tokens.encode_prompt(tokens.text_format(cases.byte_level()), ASK)


def test_an_empty_response_where_one_is_scored():
    for template, end in (("CHATML", "<|im_end|>"), ("ZEPHYR", "</s>")):
        tokenizer, form = made("byte_level", template)
        row = tokens.encode_pair(form, ASK, "", allow_empty=True)
        assert row.response == []
        assert words(tokenizer, row.closing) == [end]
        assert tokens.encode_pair(form, "hello", "", allow_empty=True).closing == [2]


def test_rows_are_shown_with_what_is_learned_and_read():
    tokenizer, form = made("byte_level", "ZEPHYR")
    row = tokens.encode_pair(form, ASK, "Yes")
    parts = [("given", row.prompt[:1]), ("learned", row.response), ("end", row.closing), ("read", row.tail)]
    assert tokens.show_row(tokenizer, parts) == "'<|user|>':6\n+'Ye':277 +'s':90\n+'</s>':2\n~'Ċ':206"
    assert "\033[32m" in tokens.show_row(tokenizer, parts, colour=True)


def test_the_page_of_tokens_has_the_table_of_these_templates():
    page = write_templates.PAGE.read_text()
    assert write_templates.written(page) == page, "python -m tests.write_templates writes the table anew"
