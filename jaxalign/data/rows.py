"""Rows of data in their normal form, as text or chats: what the readers give and what tokenizing takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from jaxalign._files import TwiceError
from jaxalign.tokens import Text

Row = TypeVar("Row")


class Pair(NamedTuple):
    """A preference between two responses."""

    where: str
    """File and line."""
    prompt: Text
    """The prompt that both responses answer: a text, or messages."""
    chosen: Text
    """The preferred response: a text that goes on where the prompt ends; messages where the prompt is messages."""
    rejected: Text
    """The other response, of the same kind."""
    margin: float | None = None
    """The chosen response's score minus the rejected one's, None where the row has no scores."""
    truncated: tuple[bool, bool] = (False, False)
    """Whether the chosen and the rejected response were cut by a limit: such a one has no end."""


class Example(NamedTuple):
    """A text to learn."""

    where: str
    """File and line."""
    prompt: Text
    """The prompt: a text, "" for none; or messages, [] where the response is a whole conversation."""
    response: Text
    """What is learned: a text where the prompt is one, else messages, of which the assistant's turns count."""
    truncated: bool = False
    """Whether it was cut by a limit: it then has no end, and none is learned."""


class PromptText(NamedTuple):
    """A prompt."""

    where: str
    """File and line."""
    prompt: Text
    """The prompt: a text, or messages."""


class Rows(NamedTuple, Generic[Row]):
    """What a reader found."""

    rows: list[Row]
    """The good rows, in the order of the files."""
    skipped: int = 0
    """How many bad rows were left out."""
    reasons: Sequence[str] = ()
    """"file:line: reason" of the first 20 of them."""
    counts: Mapping[str, int] = {}
    """Kind of reason -> number, of bad rows and of what makes no row: "tie", "single response", "unwanted response"
    and, within ranked lists, "same responses"."""


class RowError(ValueError):
    """A row that cannot be used.

    Attributes:
      kind: a few words under which rows of this fault are counted.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def twice_row(error: TwiceError) -> RowError:
    """The error of a row in which a field stands twice."""
    return RowError("field twice", f"expected each field once, found {error}")


class Content(NamedTuple):
    """What a row of any form holds."""

    prompt: Text | None
    """The prompt, None where the row has none."""
    responses: tuple[Text, ...] = ()
    """The responses, all of the prompt's kind."""
    scores: tuple[float, ...] = ()
    """A score for each response that is compared, higher is better; () where the row compares nothing."""
    names: tuple[str, ...] = ()
    """The fields that hold the responses, for messages."""
    margin: float | None = None
    """The first score minus the second on the scale of the file, where it gives both."""
    scaled: bool = False
    """Whether differences of scores are the margin."""
    grouped: bool = False
    """Whether the response is compared with those of other rows that have the same prompt."""
    wanted: bool = True
    """Whether the response is one to learn: a label may say that it is not."""
    truncated: tuple[bool, ...] = ()
    """For each response whether it was cut by a limit; () for none."""
