"""Any function of token arrays, a flax, equinox or torch module as a Reward of whole texts."""

from __future__ import annotations

from typing import Any, Protocol

from jaxalign import _modules, mdp
from jaxalign._builders import cached
from jaxalign._parts import check_function_argument
from jaxalign.rewards.values import check_values
from jaxalign.shapes import RewardValues, TextIndex, TextLength, TextMask, TextTokens
from jaxalign.types import Array, Params, Reward


class TextFunction(Protocol):
    """One score [N] for each text of tokens [N,L], real where mask [N,L] is True, right-padded."""

    def __call__(self, params: Params, tokens: TextTokens, mask: TextMask, /) -> Array: ...


def from_apply(score: TextFunction) -> Reward:
    """Builds the Reward of any function of whole texts, prompt and response, in jax.

    params: those of the function. A function that needs to know where the response begins is a Reward already
    (`types.Reward`).

    Args:
      score: score(params, tokens [N,L], mask [N,L]) -> [N]; the texts are right-padded. Define it once: it is compared
        by identity.

    Returns:
      A Reward, differentiable in params where the function is.

    Raises:
      ValueError: no function; while tracing, a result of another shape than [N], with the function's name.
    """
    check_function_argument("score", score)
    return _from_apply(score)


@cached
def _from_apply(score: TextFunction) -> Reward:
    def reward(
        params: Params, tokens: TextTokens, mask: TextMask, prompt_length: TextLength, index: TextIndex
    ) -> RewardValues:
        text, real = mdp.compact(tokens, mask)
        return check_values(score(params, text, real), (tokens.shape[0],), function=score)

    return reward


def from_nnx(module: Any) -> tuple[Reward, Params]:
    """Builds the Reward of a flax nnx module module(tokens [N,L], mask [N,L]) -> [N], and its parameters.

    Args:
      module: an nnx.Module; it is split once, and its state are the parameters.

    Returns:
      (Reward, params), differentiable in params.

    Raises:
      ValueError: as in `from_apply`.
    """
    function, params = _modules.of_nnx(module)
    return from_apply(function), params


def from_equinox(module: Any) -> tuple[Reward, Params]:
    """Builds the Reward of an equinox module module(tokens [N,L], mask [N,L]) -> [N], and its parameters.

    Args:
      module: an equinox.Module of whole batches (jax.vmap one of single texts); its arrays are the parameters.

    Returns:
      (Reward, params), differentiable in params.

    Raises:
      ValueError: as in `from_apply`.
    """
    function, params = _modules.of_equinox(module)
    return from_apply(function), params


def from_torch(module: Any) -> tuple[Reward, Params]:
    """Builds the Reward of a torch module module(tokens [N,L], mask [N,L]) -> [N], which is called on the host.

    transformers' classifiers with one label serve as they are: an output with `logits` [N,1] is read. There are no
    parameters, and so no gradients. A model over other tokens than the policy's is a function of strings
    (`from_text`).

    Args:
      module: in evaluation mode; called under no_grad with an int64 and a bool tensor where its parameters lie.

    Returns:
      (Reward, ()).

    Raises:
      ValueError: no function; when it is used, an error of the module or another shape than [N], with its name.
    """
    return from_apply(_modules.of_torch(module)), ()
