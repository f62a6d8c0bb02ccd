"""KL-budgeted decoding: a tilt whose beta is found at each token, so that the token spends a given KL.

Source: gibbs.match_kl at every state
Equation: pi ∝ b exp(q/beta_s), beta_s with KL(pi || b) = the budget at every state
When: scores of no known unit, or a bound on what each token may change
Cost: base and critic, one pass each; a root per token
"""

from jaxalign import critics, evaluation, policies


def method(base, critic):
    return policies.kl_budget(base, critic)


def build(given):
    value, v = given.model("value")
    params = policies.KLBudgetParams(given.params, v, given.strength)
    return evaluation.sampled(given, method(given.policy, critics.value(value)), params)
