"""Policies: the language model, the tilt by a critic, edits of its hidden states, and the transforms of a next-token
distribution.

Every function here takes Policies (or a model) and gives a Policy; build it once and reuse it, since a new closure is
a new trace.
"""

from jaxalign.policies._adapters import adapters
from jaxalign.policies._language_model import language_model, with_reference
from jaxalign.policies._re_control import head_value, linear_value, re_control, re_control_expected
from jaxalign.policies._tilt import tilt
from jaxalign.policies._truncation import temperature, top_k, top_p

__all__ = [
    "adapters",
    "head_value",
    "language_model",
    "linear_value",
    "re_control",
    "re_control_expected",
    "temperature",
    "tilt",
    "top_k",
    "top_p",
    "with_reference",
]
