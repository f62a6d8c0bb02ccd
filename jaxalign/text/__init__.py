"""From texts to texts: generation under any Policy, rewards and log-probabilities of texts, in batches.

Prompts are strings or chats; a chat goes through the tokenizer's template. docs/text.md has the examples:

    lm, params = models.load("FOLDER")
    tokenizer = models.tokenizer("FOLDER")
    text.generate(lm, params, tokenizer, ["Once upon a time"]).texts
"""

from jaxalign.text._generate import Generated, generate
from jaxalign.text._requests import Prompt
from jaxalign.text._score import log_prob, score
from jaxalign.text._texts import Stream
from jaxalign.tokens import Messages, Tokenizer

__all__ = ["Generated", "Messages", "Prompt", "Stream", "Tokenizer", "generate", "log_prob", "score"]
