"""Text in, guided text out: strings and a chat, a guided policy, and a stream of the text as it grows."""

from jaxalign import critics, models, policies, text
from jaxalign.data import tokenizers

tokenizer = tokenizers.word_level(["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and"])
tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
lm, params = models.tiny(tokenizer)
reward, reward_params = models.tiny(tokenizer, head="reward", seed=1)

policy = policies.tilt(policies.language_model(lm), critics.args(reward), top_k=5)
guided = policies.TiltParams(policy=params, critic=reward_params, beta=0.1)
prompts = ["the cat", [{"role": "user", "content": "a dog ran"}]]
out = text.generate(policy, guided, tokenizer, prompts, stream=print, max_new_tokens=9)
print(out.texts, "KL to the base [nats]:", out.completions.kl.sum(axis=1))
