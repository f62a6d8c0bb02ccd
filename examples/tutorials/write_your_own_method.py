# %% [markdown]
# # Write your own method and compare it
#
# A method is a policy, a critic or a decoder of your own. We write a critic, check that it keeps the laws that every
# decoder relies on, measure it on a process that is small enough to be solved exactly, and put it beside best-of-n on
# a language model, in one table and one report.

# %%
import pathlib

import jax
import jax.numpy as jnp

from jaxalign import Critic, decoding, evaluation, models, policies, prompt_batch, testing, tree
from jaxalign.data import tokenizers

# %% [markdown]
# ## A critic of three functions
#
# It dislikes to repeat itself: a token scores -1 for each time that it already stands in the response. `init` makes
# the state of B rows, `score` rates candidates [B,K] (None: the whole vocabulary), and `advance` takes in the chosen
# one. Scores that add up over the tokens are an "increment".


# %%
def no_repeats(vocab_size: int) -> Critic:
    def init(params, rng, prompts, max_new_tokens):
        return jnp.zeros((prompts.tokens.shape[0], vocab_size))  # how often each token stands in each response

    def score(params, rng, counts, output, candidates):
        rated = jnp.broadcast_to(jnp.arange(vocab_size), counts.shape) if candidates is None else candidates
        return -params * jnp.take_along_axis(counts, rated, axis=1), (counts, rated)

    def advance(params, proposal, choice):  # -1: this row has ended
        counts, rated = proposal
        token = jnp.take_along_axis(rated, jnp.maximum(choice, 0)[:, None], axis=1)
        return counts + jax.nn.one_hot(token[:, 0], vocab_size) * (choice >= 0)[:, None]

    return Critic(init, score, advance, kind="increment")


# %% [markdown]
# ## Does it keep the laws?
#
# `testing.check_critic` runs it as decoders do: with rows that end, candidates in any order, prompts padded on either
# side, under jit. A fault is named with its law.

# %%
testing.check_critic(no_repeats(7), 1.0, prompt_batch([[1, 2], [3], [2, 3, 1]]), vocab_size=7)

# %% [markdown]
# ## Against the exact answer
#
# On a tree of three tokens every response can be listed. What a tilt by this critic should be is the base times
# exp(score / beta) at each step, so greedy responses of a strong tilt hold no token twice.

# %%
process = tree.Tree(vocab_size=4, horizon=3, eos_id=None)
table, _ = tree.random(jax.random.key(0), process)
guided = policies.tilt(tree.policy(process), no_repeats(4))


@jax.jit
def repeats(beta):
    params = policies.TiltParams(table, 1.0, beta)
    drawn = decoding.sample(guided, params, jax.random.key(1), tree.prompts(2000), max_new_tokens=3, eos_ids=())
    different = jax.vmap(lambda row: jnp.zeros(4).at[row].set(1.0).sum())(drawn.tokens)
    return 3 - different.mean(), drawn.kl.sum(axis=1).mean()


for beta in (10.0, 1.0, 0.1):
    again, kl = repeats(beta)
    print(f"beta {beta}: {again:.3f} repeats a response at {kl:.3f} nats")

# %% [markdown]
# ## On a language model, beside best-of-n
#
# The evaluation takes a method by `MODULE:FUNCTION`: a function of what is given (policy, parameters, strength) that
# returns draw(rng, prompts). Here a random model of eleven words stands for yours; the reward counts different words.

# %%
tokenizer = tokenizers.word_level(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and"])
models.save("runs/own/model", *models.tiny(tokenizer), tokenizer=tokenizer, overwrite=True)
pathlib.Path("runs/own/prompts.txt").write_text("the cat\na dog ran\nthe tree\n")


def variety(prompts, responses):
    return [float(len(set(response.split()))) for response in responses]


def fresh(given):
    policy = policies.tilt(given.policy, no_repeats(len(tokenizer)))
    params = policies.TiltParams(given.params, 1.0, given.strength)
    return lambda rng, prompts: decoding.sample(policy, params, rng, prompts, **given.limits)


rows = evaluation.run(
    evaluation.DecodeOptions(
        model="runs/own/model",
        prompts="runs/own/prompts.txt",
        out="runs/own/decode",
        reward="__main__:variety",
        method=("best_of_n@4", "__main__:fresh@2,0.5"),
        max_new_tokens=8,
    )
)
for row in rows:
    print(f"{row['method']:>20} at {row['beta']}: {row['reward']:.2f} different words at {row['kl']:.2f} nats")

# %% [markdown]
# The same from a shell, with your function in a file, and a page with the figures and the responses side by side:
#
#     python -m eval.decode --model DIR --prompts FILE --reward FILE.py:variety --method best_of_n@4 \
#         --method FILE.py:fresh@2,0.5 --out runs/own/decode
#     python -m eval.report runs/own/decode --out report.html
