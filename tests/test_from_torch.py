"""Torch modules as Policies, Critics and Rewards, through a stand-in for torch; and by torch itself where it is."""

from __future__ import annotations

import contextlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import critics, decoding, policies, rewards, testing
from tests.conftest import PROMPTS, VOCAB, padded
from tests.test_from_apply import WEIGHTS, decayed, text_scores


class Tensor(np.ndarray):
    """What the library asks of torch's tensors."""

    def to(self, device):
        found = self.copy()
        found.place = device
        return found

    def float(self):
        return self.astype(np.float32)

    def cpu(self):
        return self

    def numpy(self):
        return np.asarray(self)


@pytest.fixture
def torch(monkeypatch):
    """A stand-in for torch, which the library imports inside alone."""
    grads = []
    no_grad = contextlib.contextmanager(lambda: (grads.append(False), (yield), grads.pop()))
    fake = types.SimpleNamespace(from_numpy=lambda x: x.view(Tensor), no_grad=no_grad, disabled=grads)
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


class Torch:
    """A torch module with parameters on a device: a function of numpy arrays, whose numbers may stand in `logits`."""

    def __init__(self, function, *, logits=False):
        self.function, self.logits, self.seen = function, logits, set()

    def parameters(self):
        return iter([types.SimpleNamespace(device="cuda:1")])

    def __call__(self, tokens, mask):
        grads = bool(sys.modules["torch"].disabled)
        self.seen.add((tokens.dtype.name, mask.dtype.name, tokens.place, mask.place, grads))
        found = np.asarray(self.function(np.asarray(tokens), np.asarray(mask)), np.float64).view(Tensor)
        return types.SimpleNamespace(logits=found) if self.logits else found


SEEN = {("int64", "bool", "cuda:1", "cuda:1", True)}


def test_a_torch_module_is_read_on_the_host(torch):
    """int64 and bool tensors where its parameters lie, without gradients; `logits` read."""
    table = np.asarray(WEIGHTS)
    module = Torch(lambda tokens, mask: table[tokens], logits=True)
    policy, params = policies.from_torch(module, vocab_size=VOCAB, eos_ids=0)
    assert policies.from_torch(module, vocab_size=VOCAB, eos_ids=0) == (policy, params)
    found = decoding.sample(policy, params, jax.random.key(0), padded(PROMPTS), max_new_tokens=3, temperature=0.0)
    for row, prompt in enumerate(PROMPTS):
        assert int(found.tokens[row, 0]) == table[prompt[-1]].argmax()
    assert module.seen == SEEN


@pytest.mark.parametrize(("f", "kind", "per"), [("place", "increment", "token"), ("text", "level", "text")])
def test_a_torch_module_as_a_critic_has_the_numbers_of_the_function(f, kind, per, torch):
    """Of each place and token, and of texts, whose one label's logits [N,1] are numbers; with the laws of critics."""
    table = np.asarray(WEIGHTS)

    def place(tokens, mask):
        return np.cumsum(table[tokens] * mask[..., None], axis=1) / 3

    def text(tokens, mask):
        each = np.take_along_axis(table[tokens[:, 0]], tokens, axis=1) * mask
        return (each * np.arange(1, mask.shape[1] + 1)).sum(axis=1, keepdims=True) / 10

    module = Torch({"place": place, "text": text}[f], logits=f == "text")
    critic, params = critics.from_torch(module, kind=kind, per=per, vocab_size=VOCAB)
    assert critics.from_torch(module, kind=kind, per=per, vocab_size=VOCAB)[0] is critic
    assert params == ()
    if f == "text":
        testing.check_critic(critic, params, padded(PROMPTS), vocab_size=VOCAB, max_new_tokens=3, gradients=False)

    def summed(params, tokens, mask):
        return jnp.cumsum(params[tokens] * mask[..., None], axis=1) / 3

    same = critics.from_apply({"place": summed, "text": text_scores}[f], kind=kind, per=per, vocab_size=VOCAB)
    base = policies.from_apply(decayed, vocab_size=VOCAB)
    tokens, mask = jnp.array([[1, 2], [3, 3], [0, 5], [6, 7], [9, 9]]), jnp.ones((5, 2), bool)

    def total(weights, critic, own):
        given = policies.TiltParams(weights, own, 1.0)
        tilted = policies.tilt(base, critic)
        return decoding.log_prob(tilted, given, jax.random.key(0), padded(PROMPTS), tokens, mask).log_prob.sum()

    found, expected = (jax.value_and_grad(total)(WEIGHTS, c, own) for c, own in ((critic, ()), (same, WEIGHTS)))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert module.seen == SEEN
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)  # by the policy's parameters; the module has none


def test_a_torch_module_as_a_reward(torch):
    """Of whole texts, right-padded, in a compiled program and outside it; its errors are ValueErrors of one line."""
    table = np.asarray(WEIGHTS)
    module = Torch(lambda tokens, mask: (table[tokens].sum(axis=-1) * mask).sum(axis=1, keepdims=True), logits=True)
    reward, params = rewards.from_torch(module)
    assert rewards.from_torch(module) == (reward, params) == (reward, ())
    base = policies.from_apply(decayed, vocab_size=VOCAB)
    given = {"policy": WEIGHTS, "reward": params}
    found = decoding.best_of_n(base, reward, given, jax.random.key(0), padded(PROMPTS), num_samples=2, max_new_tokens=2)
    tokens, mask = (np.asarray(x) for x in (found.info.samples.tokens, found.info.samples.mask))
    prompts = np.array([table[prompt].sum() for prompt in PROMPTS])
    expected = prompts[:, None] + (table[tokens].sum(axis=-1) * mask).sum(axis=-1)
    np.testing.assert_allclose(found.info.reward, expected, rtol=1e-4, atol=1e-5)
    text = jnp.array([[0, 1, 2]]), jnp.array([[False, True, True]]), jnp.array([1]), jnp.array([0])
    np.testing.assert_allclose(reward((), *text), table[[1, 2]].sum(), rtol=1e-5)
    assert module.seen == SEEN

    def fails(tokens, mask):
        raise RuntimeError("out of memory")

    broken = rewards.from_torch(Torch(fails))[0]
    match = r"from_torch: Torch: expected numbers of shape \(10,\), found RuntimeError: out of memory"
    with pytest.raises(ValueError, match=match) as raised:
        decoding.best_of_n(base, broken, given, jax.random.key(0), padded(PROMPTS), num_samples=2, max_new_tokens=2)
    assert "\n" not in str(raised.value)
    wide = Torch(lambda tokens, mask: table[tokens][..., :3])
    policy = policies.from_torch(wide, vocab_size=VOCAB)[0]
    with pytest.raises(ValueError, match=r"expected numbers of shape \(5, \d, 11\), found \(5, \d, 3\)"):
        decoding.sample(policy, (), jax.random.key(0), padded(PROMPTS), max_new_tokens=1)
    for build, match in (
        (lambda: critics.from_torch(module, kind="level"), "vocab_size: expected the number of scores of a place"),
        (lambda: rewards.from_torch(3), "module: expected a torch module that can be called, found int"),
        (lambda: policies.from_torch(module, vocab_size=0), "vocab_size: expected at least 1 token, found 0"),
    ):
        with pytest.raises(ValueError, match=match):
            build()


def test_torch_modules_live():
    """A classifier of transformers, and a module of a table, by torch itself."""
    torch = pytest.importorskip("torch")
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_labels=1, pad_token_id=0, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    texts = jnp.array([[4, 1, 2, 5], [3, 4, 5, 0]]), jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]], bool)
    reward, params = rewards.from_torch(model)
    found = rewards.call_reward(reward, params, *texts, jnp.array([1, 1]), jnp.array([0, 1]))
    with torch.no_grad():
        expected = model(torch.tensor(np.asarray(texts[0])), torch.tensor(np.asarray(texts[1]))).logits[:, 0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    table = torch.nn.Embedding.from_pretrained(torch.tensor(np.asarray(WEIGHTS)))

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, tokens, mask):
            return self.table(tokens)

    policy, own = policies.from_torch(Bigram(), vocab_size=VOCAB)
    tilted = policies.tilt(policy, critics.from_torch(Bigram(), kind="increment", vocab_size=VOCAB)[0])
    lasts = jnp.array([prompt[-1] for prompt in PROMPTS])
    output = tilted.init(policies.TiltParams(own, (), 1.0), jax.random.key(0), padded(PROMPTS), 2)[1]
    np.testing.assert_allclose(output.log_prob, jax.nn.log_softmax(2 * WEIGHTS)[lasts], atol=1e-5)
