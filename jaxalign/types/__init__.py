"""The types of the algebra: what a Policy, a Critic and a Reward are, and what decoders give.

One idea carries the library: for a state s of a token-level decision process the aligned policy is
pi(z|s) ∝ pi_ref(z|s) · exp(Q(s,z)/beta). A `Policy` is pi or pi_ref, a `Critic` is Q, a `Reward` is what lies behind Q.
All three are made of pure, jit-safe functions; parameters are plain pytrees and travel beside them. A Protocol per
function states its arguments by name; a function of your own keeps those names.

Laws that every Policy and Critic keeps (`jaxalign.testing` checks them for your own):

1. Every array leaf of a state or StepOutput has the batch axis first, so `take_rows` and `repeat_rows` are tree maps.
2. Token -1 (choice -1) means that the row is frozen for this step: its state is kept, its output is undefined.
3. What is per prompt (beta, weights) is read from params at init, broadcast to [B] and kept in the state.
4. `prompts` may mirror `params`: one TokenBatch goes to all models, a dict gives each model its own template.
5. log_prob = log_prob_ref + increments - log_norm on the support; a truncation's kept mass enters log_norm.
6. A Policy is built once and reused: a new closure is a new trace. The library's builders are cached by value.
"""

from __future__ import annotations

from jaxalign.results import KL, Completions, Decoded, KLKind
from jaxalign.shapes import Array, ArrayLike
from jaxalign.types._models import CandidateModel, HeadModel, LanguageModel
from jaxalign.types._policies import (
    Critic,
    CriticKind,
    HostCheck,
    Params,
    Policy,
    Prompts,
    State,
    StepOutput,
    TokenBatch,
)
from jaxalign.types._policies import CriticAccept as CriticAccept
from jaxalign.types._policies import CriticAdvance as CriticAdvance
from jaxalign.types._policies import CriticInit as CriticInit
from jaxalign.types._policies import CriticScore as CriticScore
from jaxalign.types._policies import CriticVerify as CriticVerify
from jaxalign.types._policies import PolicyAccept as PolicyAccept
from jaxalign.types._policies import PolicyInit as PolicyInit
from jaxalign.types._policies import PolicyLogProb as PolicyLogProb
from jaxalign.types._policies import PolicyStep as PolicyStep
from jaxalign.types._policies import PolicyVerify as PolicyVerify
from jaxalign.types._rewards import CheckedReward, PrefixReward, PrefixTokenGradient, Reward, TextReward
from jaxalign.types._rewards import PrefixCommit as PrefixCommit
from jaxalign.types._rewards import PrefixInit as PrefixInit
from jaxalign.types._rewards import PrefixScore as PrefixScore
from jaxalign.types._rewards import PrefixTokenGradientScore as PrefixTokenGradientScore

__all__ = [
    "KL",
    "Array",
    "ArrayLike",
    "CandidateModel",
    "CheckedReward",
    "Completions",
    "Critic",
    "CriticKind",
    "Decoded",
    "HeadModel",
    "HostCheck",
    "KLKind",
    "LanguageModel",
    "Params",
    "Policy",
    "PrefixReward",
    "PrefixTokenGradient",
    "Prompts",
    "Reward",
    "State",
    "StepOutput",
    "TextReward",
    "TokenBatch",
]
