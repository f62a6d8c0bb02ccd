"""The exact oracle: small decision processes, enumerated and solved.

`Tree` names the process; tables over its states and responses are plain arrays. `structure` enumerates, `values` solves
by backward induction, `laws` gives the laws of policies and decoders over whole responses, `algebra` turns tables into
Policies, Critics and Rewards, so that every decoder runs on a tree.
"""

from jaxalign.tree.algebra import critic, policy, prompts, response_index, reward
from jaxalign.tree.laws import (
    best_of_n_bound,
    best_of_n_law,
    blockwise_bound,
    blockwise_law,
    expected,
    greedy_response,
    optimal_log_prob,
    policy_of,
    response_log_prob,
    sequence_kl,
    state_log_prob,
    step_kl,
    win_rate,
    worst_of_n_law,
)
from jaxalign.tree.structure import Tree, random
from jaxalign.tree.values import max_value, optimal_policy, q_values, soft_value, tilted_policy, transfer_value, value

__all__ = [
    "Tree",
    "best_of_n_bound",
    "best_of_n_law",
    "blockwise_bound",
    "blockwise_law",
    "critic",
    "expected",
    "greedy_response",
    "max_value",
    "optimal_log_prob",
    "optimal_policy",
    "policy",
    "policy_of",
    "prompts",
    "q_values",
    "random",
    "response_index",
    "response_log_prob",
    "reward",
    "sequence_kl",
    "soft_value",
    "state_log_prob",
    "step_kl",
    "tilted_policy",
    "transfer_value",
    "value",
    "win_rate",
    "worst_of_n_law",
]
