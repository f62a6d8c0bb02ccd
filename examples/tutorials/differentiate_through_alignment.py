# %% [markdown]
# # Differentiate through alignment
#
# Whoever pays a model for its responses does not decide what it says: the model answers the reward r by the policy
#
#     pi_r(y)  ∝  pi_ref(y) · exp( r(y) / beta ),
#
# and the payer cares for the utility E_{pi_r}[u] of that answer. Everything in between is a JAX function, so the
# payer's reward can be found by gradients, and checked against the one that is known to be best.

# %%
import jax
import jax.numpy as jnp
import optax

from jaxalign import decoding, gibbs, policies, shaping, tree

log_base, utility = jnp.log(jnp.array([0.9, 0.1])), jnp.array([1.0, 2.0])


def delivered(reward, beta=1.0):
    return gibbs.utility(gibbs.log_policy(log_base, reward, beta=beta), utility)


print("paying the utility delivers", delivered(utility))  # 1.23
print("its gradient by the reward", jax.grad(delivered)(utility))

# %% [markdown]
# ## The leader's problem by gradient ascent
#
# The reward has to lie in [0, 3]. We climb on it with optax, through the follower's policy, and end at the threshold
# rule: all of the bound above a threshold, which is the utility that it delivers, and nothing below.

# %%
bound, optimizer = 3.0, optax.adam(0.3)
raw = jnp.zeros(2)  # the reward is bound * sigmoid(raw)
state = optimizer.init(raw)


@jax.jit
def climb(raw, state):
    loss = lambda raw: -delivered(bound * jax.nn.sigmoid(raw))
    updates, state = optimizer.update(jax.grad(loss)(raw), state)
    return optax.apply_updates(raw, updates), state


for _ in range(200):
    raw, state = climb(raw, state)
found = bound * jax.nn.sigmoid(raw)
threshold = shaping.optimal_threshold(utility, log_base=log_base, gain=bound)
best = shaping.threshold_reward(utility, threshold=threshold, bound=bound)
print("climbed to", found, "which delivers", delivered(found))  # 1.69
print("threshold rule", best, "delivers", delivered(best), "its threshold", threshold)

# %% [markdown]
# ## How the answer moves
#
# The threshold is the root of an equation, and has a derivative of its own: by the utilities, the base, and the bound.
# Two derivatives work too, as a payer who looks ahead needs them.

# %%
value = lambda bound: delivered(
    shaping.threshold_reward(
        utility,
        threshold=shaping.optimal_threshold(utility, log_base=log_base, gain=bound),
        bound=bound,
    )
)
print("delivered at bound 3:", value(3.0), "slope:", jax.grad(value)(3.0), "bend:", jax.grad(jax.grad(value))(3.0))

# %% [markdown]
# ## Through a decoder
#
# The follower may be a decoder: here a process of three tokens over four, tilted token by token. With the soft value
# as its critic that is the exact policy above. The likelihood of given responses has a gradient by the critic's table,
# and by beta, which tells what strength explains them.

# %%
process = tree.Tree(vocab_size=4, horizon=3)
table, paid = tree.random(jax.random.key(0), process)
q = tree.q_values(process, tree.soft_value(process, table, paid, beta=0.5), reward=paid)
guided = policies.tilt(tree.policy(process), tree.critic(process, "level"))
prompts, limits = tree.prompts(512), {"max_new_tokens": 3, "eos_ids": 0}
drawn = decoding.sample(guided, policies.TiltParams(table, q, 0.5), jax.random.key(1), prompts, **limits)


@jax.jit
def likelihood(q, beta):
    params = policies.TiltParams(policy=table, critic=q, beta=beta)
    scored = decoding.log_prob(guided, params, jax.random.key(2), prompts, drawn.tokens, drawn.mask)
    return scored.log_prob.sum(axis=1).mean()


for beta in (0.25, 0.5, 1.0):  # the slope is near 0 at the beta that drew them
    print(f"beta {beta}: {likelihood(q, beta):.4f} nats, slope {jax.grad(likelihood, argnums=1)(q, beta):+.4f}")
print("largest gradient by a critic's entry:", jnp.abs(jax.grad(likelihood)(q, 0.5)).max())
