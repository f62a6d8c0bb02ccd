"""Texts and chats as token ids, and ids as text: the one place that decides on special tokens and templates.

`text_format` puts together a tokenizer, the ids that begin and end a text and the template's arguments;
`encode_prompt`, `encode_pair` and `encode_chat` give token ids, and `show_row` prints them.
"""

from jaxalign.tokens._chat import with_system
from jaxalign.tokens._decode import byte_tokens, decode_text, settled_text
from jaxalign.tokens._encode import (
    NOTES,
    Encoded,
    PromptTokens,
    chat_end,
    conversation_text,
    encode_chat,
    encode_pair,
    encode_prompt,
    encode_text,
    ends_of_reply,
    prompt_text,
    turn_end,
)
from jaxalign.tokens._format import Messages, Text, TextFormat, Tokenizer, text_format
from jaxalign.tokens._show import LEGEND, show_row

__all__ = [
    "LEGEND",
    "NOTES",
    "Encoded",
    "Messages",
    "PromptTokens",
    "Text",
    "TextFormat",
    "Tokenizer",
    "byte_tokens",
    "chat_end",
    "conversation_text",
    "decode_text",
    "encode_chat",
    "encode_pair",
    "encode_prompt",
    "encode_text",
    "ends_of_reply",
    "prompt_text",
    "settled_text",
    "show_row",
    "text_format",
    "turn_end",
    "with_system",
]
