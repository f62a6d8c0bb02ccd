"""Responses on a terminal while they are drawn: `python -m eval.decode --stream`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import jax
import numpy as np

from jaxalign import _hosts
from jaxalign.decoding.requests import with_temperature
from jaxalign.evaluation.engine import Batch, Drawn, Method, Stepwise, Texts, Watch
from jaxalign.prompts import prompt_index
from jaxalign.text._generate import draw_in_chunks
from jaxalign.text._requests import Batch as TextBatch
from jaxalign.text._texts import watch_texts
from jaxalign.types import Array, Completions, Decoded

EVERY = 1  # tokens between two looks at what was drawn


class Write(Protocol):
    """Shows a piece of text."""

    def __call__(self, text: str, /) -> object: ...


class Page:
    """Texts that grow at once, shown one after another: the first that has not ended is shown as it grows."""

    def __init__(self, heads: list[str], write: Write):
        self.waiting = list(heads)  # what of each is not shown yet
        self.ended = [False] * len(heads)
        self.current = 0
        self.write = write

    def add(self, row: int, text: str) -> None:
        """A text grows."""
        self.waiting[row] += text
        self._show()

    def end(self, rows: Iterable[int]) -> None:
        """Texts are whole."""
        for row in rows:
            self.ended[row] = True
        self._show()

    def _show(self) -> None:
        while self.current < len(self.waiting):
            if text := self.waiting[self.current]:
                self.write(text)
            self.waiting[self.current] = ""
            if not self.ended[self.current]:
                return
            self.write("\n")
            self.current += 1


def streamer(prompts: Texts, write: Write) -> Watch:
    """Draws batches and shows their responses, one under another: each as it grows where the method draws token by
    token, else whole when the batch is done. Responses are those of the method's own `draw`.

    Args:
      prompts: of the run.
      write: shows a piece of text.

    Returns:
      What `engine.decode` takes as `watch`.
    """

    def watch(method: Method, rng: Array, batch: Batch, /) -> Drawn:
        name = method.name if method.beta is None else f"{method.name} at {method.beta:g}"
        page = Page([f"\n[{name}] {prompts.texts[i]}\n> " for i in batch.rows], write)
        if method.stepwise is not None:
            return _draw(method.stepwise, rng, batch, prompts, page)
        drawn = method.draw(rng, batch.prompts)
        tokens, mask = _hosts.host_value((drawn.completions.tokens, drawn.completions.mask))
        for b in range(len(batch.rows)):
            page.add(b, prompts.tokenizer.decode(tokens[b][mask[b]].tolist(), skip_special_tokens=True))
        page.end(range(len(batch.rows)))
        return drawn

    return watch


def _draw(stepwise: Stepwise, rng: Array, batch: Batch, prompts: Texts, page: Page) -> Drawn:
    """As `decoding.sample`, a few tokens at a time."""
    limits = stepwise.limits
    policy, params, inner = with_temperature(stepwise.policy, stepwise.params, batch.prompts, limits["temperature"])
    rows = list(range(len(batch.rows)))
    texts = TextBatch(rows, np.asarray(prompt_index(batch.prompts)), batch.prompts)
    show = watch_texts(lambda row, text: page.add(row, text), prompts.tokenizer, limits["eos_ids"], texts)

    def watch(drawn: Completions, last: bool) -> None:
        show(drawn, last)
        finished = _hosts.host_value(drawn.finished)
        page.end([b for b in rows if last or finished[b]])

    drawn = draw_in_chunks(policy, params, inner, rng, limits["max_new_tokens"], limits["eos_ids"], EVERY, watch)
    one: Completions = jax.tree.map(lambda x: x[:, 0], drawn)
    return Decoded(one, stepwise.kl(one), None)
