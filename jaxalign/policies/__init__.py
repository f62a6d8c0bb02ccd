"""Policies: the language model, the tilt by a critic, edits of its hidden states, and the transforms of a next-token
distribution.

Every function here takes Policies (or a model) and gives a Policy; build it once and reuse it, since a new closure is
a new trace.
"""

from jaxalign.policies.adapters import adapters
from jaxalign.policies.base import language_model, with_reference
from jaxalign.policies.editing import edit, edit_expected, head_value, linear_value
from jaxalign.policies.tilting import tilt
from jaxalign.policies.truncation import temperature, top_k, top_p

__all__ = [
    "adapters",
    "edit",
    "edit_expected",
    "head_value",
    "language_model",
    "linear_value",
    "temperature",
    "tilt",
    "top_k",
    "top_p",
    "with_reference",
]
