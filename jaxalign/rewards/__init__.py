"""Rewards of whole responses: (params, tokens [N,L], mask [N,L], prompt_length [N], index [N]) -> reward [N].

`models` makes them of reward models, `text_models` of those with a tokenizer of their own, `programs` of functions of
text or numpy arrays, `combinators` of other Rewards, `specs` of what a command line names. Each keeps a prefix
(`PrefixReward`) where all its parts do. All come out in at least float32, and whatever a function of the user's returns
is checked where it is traced.
"""

from jaxalign.rewards.combinators import RewardMap, calibrated, map_reward, pool, shaped, weighted_sum
from jaxalign.rewards.folders import (
    Reader,
    base_tokens,
    open_reward,
    own_reading,
    own_texts,
    reader_of,
    split_label,
    template_tail,
)
from jaxalign.rewards.functions import TextFunction, from_apply, from_equinox, from_nnx, from_torch
from jaxalign.rewards.models import TokenGradient, from_model, log_likelihood, token_gradient
from jaxalign.rewards.params import (
    CalibratedParams,
    LabelParams,
    MapParams,
    PoolParams,
    ShapedParams,
    WeightedSumParams,
)
from jaxalign.rewards.policies import from_policy
from jaxalign.rewards.programs import from_numpy, from_text
from jaxalign.rewards.specs import (
    Term,
    build_reward,
    is_program,
    parse_reward,
    program,
    program_files,
    reward_inputs,
    reward_roles,
)
from jaxalign.rewards.text_models import SourceReward, text_model
from jaxalign.rewards.values import call_reward, check_values, compiled, on_host

__all__ = [
    "CalibratedParams",
    "LabelParams",
    "MapParams",
    "PoolParams",
    "Reader",
    "RewardMap",
    "ShapedParams",
    "SourceReward",
    "Term",
    "TextFunction",
    "TokenGradient",
    "WeightedSumParams",
    "base_tokens",
    "build_reward",
    "calibrated",
    "call_reward",
    "check_values",
    "compiled",
    "from_apply",
    "from_equinox",
    "from_model",
    "from_nnx",
    "from_numpy",
    "from_policy",
    "from_text",
    "from_torch",
    "is_program",
    "log_likelihood",
    "map_reward",
    "on_host",
    "open_reward",
    "own_reading",
    "own_texts",
    "parse_reward",
    "pool",
    "program",
    "program_files",
    "reader_of",
    "reward_inputs",
    "reward_roles",
    "shaped",
    "split_label",
    "template_tail",
    "text_model",
    "token_gradient",
    "weighted_sum",
]
