"""Policies: the language model, its tilt by a critic, edits of its hidden states, and transforms of its next-token
distribution.

Every builder here takes Policies (or a model) and gives a Policy. Builders are cached by value: the same call twice
gives the same object, so that a call inside an expression is not compiled again. A function of your own is compared by
identity: define it once, not as a lambda in the call.

Params of a builder are its NamedTuple, as TiltParams(policy, critic, beta), or a dict of the same names.
"""

from jaxalign.policies._adapters import AdaptersParams, adapters
from jaxalign.policies._combinations import PoliciesParams, mix, product
from jaxalign.policies._from_apply import Apply, ApplyPrefill, ApplyStep, from_apply, from_equinox, from_nnx, from_torch
from jaxalign.policies._generation import Sampling, read_generation_config, with_sampling
from jaxalign.policies._kl_budget import KLBudgetParams, kl_budget
from jaxalign.policies._language_model import language_model
from jaxalign.policies._re_control import (
    HiddenValue,
    ReControlExpectedParams,
    ReControlParams,
    Unembed,
    head_value,
    linear_value,
    re_control,
    re_control_expected,
)
from jaxalign.policies._tilt import TiltParams, tilt
from jaxalign.policies._truncation import (
    MinPParams,
    TemperatureParams,
    TopPParams,
    TypicalParams,
    min_p,
    temperature,
    top_k,
    top_p,
    typical,
)
from jaxalign.policies._with_reference import ReferenceParams, with_reference

__all__ = [
    "AdaptersParams",
    "Apply",
    "ApplyPrefill",
    "ApplyStep",
    "HiddenValue",
    "KLBudgetParams",
    "MinPParams",
    "PoliciesParams",
    "ReControlExpectedParams",
    "ReControlParams",
    "ReferenceParams",
    "Sampling",
    "TemperatureParams",
    "TiltParams",
    "TopPParams",
    "TypicalParams",
    "Unembed",
    "adapters",
    "from_apply",
    "from_equinox",
    "from_nnx",
    "from_torch",
    "head_value",
    "kl_budget",
    "language_model",
    "linear_value",
    "min_p",
    "mix",
    "product",
    "re_control",
    "re_control_expected",
    "read_generation_config",
    "temperature",
    "tilt",
    "top_k",
    "top_p",
    "typical",
    "with_reference",
    "with_sampling",
]
