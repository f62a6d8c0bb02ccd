"""What stands where a Policy, a Critic, a function or a model is expected, and what a user's own one returns: both are
checked on the host."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.prompts import any_prompts
from jaxalign.types import Array, CheckedReward, Critic, Params, Policy, Prompts, State, StepOutput


def check_policy_argument(name: str, value: object) -> None:
    """ValueError naming the argument unless value is a Policy."""
    _check_kind(name, value, Policy)


def check_critic_argument(name: str, value: object) -> None:
    """ValueError naming the argument unless value is a Critic."""
    _check_kind(name, value, Critic)


def _check_kind(name: str, value: object, kind: type[Policy | Critic]) -> None:
    if not isinstance(value, kind):
        hint = ""
        if kind is Policy and hasattr(value, "prefill"):
            hint = " (policies.language_model makes one of a model)"
        elif kind is Critic and hasattr(value, "head_width"):
            hint = " (critics.args, value, genarm and follower make one of a model)"
        elif kind is Critic and (isinstance(value, CheckedReward) or takes(value, 5)):
            hint = " (critics.args makes one of a reward model, critics.transfer_q of a Reward and a baseline)"
        raise ValueError(f"{name}: expected a {kind.__name__}, found {described(value)}{hint}")


def described(value: object) -> str:
    """What stands in the place of a part, for error texts."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {called(value)}{_signature(value) or ''}"
    if value is None or isinstance(value, str | int | float):
        return repr(value)[:80]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"an array of shape {value.shape}"
    return f"a {type(value).__name__}" + (", as parameters are" if isinstance(value, Mapping) else "")


def _signature(value: Any) -> inspect.Signature | None:
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):  # of a builtin, or of what cannot be called
        return None
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
    return found.replace(parameters=bare, return_annotation=inspect.Signature.empty)


def takes(value: object, count: int) -> bool:
    """Whether a function can be called with so many arguments; a class and what cannot be called do not take any.
    Of a builtin it is not known, and it is taken to."""
    if isinstance(value, type) or not callable(value):
        return False
    signature = _signature(value)
    if signature is None:
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def takes_texts(value: object) -> bool:
    """Whether a reward takes (prompts, responses) and not (params, tokens, mask, prompt_length, index)."""
    return not takes(value, 5) and takes(value, 2)


REWARD = "a Reward, a function (params, tokens, mask, prompt_length, index)"


def check_reward_argument(name: str, value: object) -> None:
    """ValueError naming the argument, and the builder to call, unless value can be called as a Reward is."""
    if takes(value, 5):
        return
    hint = ""
    if hasattr(value, "head_width"):
        hint = "; rewards.from_model makes one of a model with a head"
    elif takes(value, 2):
        hint = "; rewards.from_text(tokenizer, f) makes one of a function of texts f(prompts, responses)"
    elif takes(value, 4):
        hint = "; rewards.from_numpy makes one of a function of numpy arrays f(tokens, mask, prompt_length, index)"
    found = described(value) if isinstance(value, str | type | Mapping) or callable(value) else type(value).__name__
    raise ValueError(f"{name}: expected {REWARD if callable(value) else 'a Reward'}, found {found}{hint}")


def check_function_argument(name: str, value: object) -> None:
    """ValueError naming the argument unless value can be called."""
    if not callable(value):
        found = repr(value)[:80] if not isinstance(value, Mapping) else described(value)
        raise ValueError(f"{name}: expected a function, found {found}")


def called(function: object) -> str:
    """A function's name for error texts."""
    name: str | None = getattr(function, "__qualname__", None)
    return name or repr(function)


def check_array(name: str, value: Any, shape: tuple[int, ...], meaning: str) -> None:
    """ValueError unless value is an array of floating-point numbers of this shape."""
    found = np.shape(value) if hasattr(value, "shape") else type(value).__name__
    if found != shape:
        raise ValueError(f"{name}: expected shape {shape}, {meaning}, found {found}")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name}: expected floating-point numbers, {meaning}, found {value.dtype}")


def check_output(name: str, output: Any, batch: int | None = None) -> StepOutput:
    """The StepOutput that a Policy's init or step gave, whose shapes and types are checked while it is traced.

    Args:
      name: the function for the error text, as "policy.step".
      output: log_prob and log_prob_ref [B,V], log_norm [B], hidden [B,D] or None.
      batch: B where it is known.

    Raises:
      ValueError: naming the function, the field, the shape expected and the shape found.
    """
    if not isinstance(output, StepOutput):
        raise ValueError(f"{name}: expected (state, StepOutput), found {type(output).__name__} in place of the output")
    shape = np.shape(output.log_prob)
    if len(shape) != 2 or (batch is not None and shape[0] != batch):
        rows = "B" if batch is None else batch
        raise ValueError(f"{name}: expected log_prob of shape ({rows}, V), found {shape}")
    check_array(f"{name}: log_prob", output.log_prob, shape, "a log-probability per row and token")
    check_array(f"{name}: log_prob_ref", output.log_prob_ref, shape, "a log-probability per row and token")
    check_array(f"{name}: log_norm", output.log_norm, shape[:1], "one number per row")
    if output.hidden is not None and (np.ndim(output.hidden) != 2 or np.shape(output.hidden)[0] != shape[0]):
        raise ValueError(f"{name}: expected hidden of shape ({shape[0]}, D) or None, found {np.shape(output.hidden)}")
    return output


class LawError(ValueError):
    """What a user's own part gave breaks a law of `jaxalign.types`, whatever was being done with it."""

    def __init__(self, law: int, complaint: str) -> None:
        self.law = law
        super().__init__(complaint)


def check_batch_first(name: str, state: State, batch: int) -> None:
    """LawError (1) naming the leaf of a state that has not the batch axis first."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if np.shape(leaf)[:1] != (batch,):
            raise LawError(
                1,
                f"{name}: expected every array of the state to have the batch axis ({batch}) first, found shape "
                f"{np.shape(leaf)} at {jax.tree_util.keystr(path) or 'the state'}",
            )


def check_same_types(name: str, what: str, before: Any, after: Any, *, shapes: bool = True) -> None:
    """LawError (6) unless a step kept the structure, dtypes and (with `shapes`) shapes of the state or output that it
    was given, as a loop that is compiled once needs. A leaf of weak type takes the type of what replaces it."""
    left: Any = jax.tree.structure(before)
    right: Any = jax.tree.structure(after)
    if left != right:
        raise LawError(6, f"{name}: expected the {what} to keep its structure {left}, found {right}")
    new = jax.tree.leaves(after)
    for (path, old), leaf in zip(jax.tree_util.tree_leaves_with_path(before), new, strict=True):
        weak = getattr(old, "weak_type", False)
        expected, found = (np.shape(old), jnp.result_type(old)), (np.shape(leaf), jnp.result_type(leaf))
        if (shapes and expected[0] != found[0]) or (expected[1] != found[1] and not weak):
            raise LawError(
                6,
                f"{name}: expected the {what} to keep shape {expected[0]} and dtype {expected[1]} at "
                f"{jax.tree_util.keystr(path) or 'its array'}, found {found[0]} and {found[1]}",
            )


def start_policy(
    policy: Policy, params: Params, rng: Array, prompts: Prompts, max_new_tokens: int
) -> tuple[State, StepOutput]:
    """policy.init, whose result is checked while it is traced."""
    name = f"policy.init ({called(policy.init)})"
    state, output = pair(name, policy.init(params, rng, prompts, max_new_tokens), "(state, StepOutput)")
    check_output(name, output, any_prompts(prompts).tokens.shape[0])
    check_batch_first(name, state, output.log_prob.shape[0])
    return state, output


def step_policy(policy: Policy, params: Params, rng: Array, state: State, token: Array) -> tuple[State, StepOutput]:
    """policy.step, whose result is checked while it is traced."""
    name = f"policy.step ({called(policy.step)})"
    moved, output = pair(name, policy.step(params, rng, state, token), "(state, StepOutput)")
    check_same_types(name, "state", state, moved)
    return moved, check_output(name, output, token.shape[0])


def start_critic(critic: Critic, params: Params, rng: Array, prompts: Prompts, max_new_tokens: int) -> State:
    """critic.init, whose result is checked while it is traced: a state whose leaves have the batch axis first."""
    state = critic.init(params, rng, prompts, max_new_tokens)
    check_batch_first(f"critic.init ({called(critic.init)})", state, any_prompts(prompts).tokens.shape[0])
    return state


def advance_critic(
    critic: Critic, params: Params, proposal: State, choice: Array, *, before: State | None = None
) -> State:
    """critic.advance, whose result is checked while it is traced: a state whose leaves have the batch axis first and,
    where it has the proposal's structure, its dtypes. before: the state of a loop that carries states and not
    proposals, whose types it has to keep."""
    name = f"critic.advance ({called(critic.advance)})"
    state = critic.advance(params, proposal, choice)
    check_batch_first(name, state, choice.shape[0])
    if before is not None:
        check_same_types(name, "state", before, state)
        return state
    left: Any = jax.tree.structure(state)
    if left == jax.tree.structure(proposal):
        check_same_types(name, "state", proposal, state, shapes=False)  # a proposal may hold more of a row
    return state


def score_critic(
    critic: Critic, params: Params, rng: Array, state: State, output: StepOutput, candidates: Array | None
) -> tuple[Array, State]:
    """critic.score, whose result is checked while it is traced: q [B,K] of floating-point numbers (one column for each
    candidate, V where candidates is None) and a proposal whose leaves have the batch axis first."""
    name = f"critic.score ({called(critic.score)})"
    q, proposal = pair(name, critic.score(params, rng, state, output, candidates), "(q, proposal)")
    shape = output.log_prob.shape if candidates is None else candidates.shape
    check_array(f"{name}: q", q, shape, "one score per row and candidate")
    check_batch_first(name, proposal, shape[0])
    return q, proposal


def check_proposal(critic: Critic, before: State, after: State) -> None:
    """LawError (6) unless a critic's proposal keeps its types from one token to the next, as a loop carries it."""
    name = f"critic.score ({called(critic.score)}) after critic.advance ({called(critic.advance)})"
    check_same_types(name, "proposal", before, after)


def pair(name: str, found: Any, meaning: str) -> Any:
    """ValueError unless a function returned two things."""
    if not isinstance(found, tuple) or len(found) != 2:
        size = f" of {len(found)}" if isinstance(found, tuple) else ""
        raise ValueError(f"{name}: expected a pair {meaning}, found a {type(found).__name__}{size}")
    return found


def check_model(name: str, lm: object, needs: Sequence[str]) -> None:
    """ValueError naming what a language model of one's own lacks of the methods and properties `needs`."""
    if isinstance(lm, type | Policy | Critic | str):
        raise ValueError(f"{name}: expected a language model, found {lm if isinstance(lm, str) else type(lm).__name__}")
    # `dir` and not hasattr: a property may raise where the model has no head.
    offered = set(dir(lm)) | set(getattr(lm, "__dict__", {}))
    missing = [need for need in needs if need not in offered]
    if missing:
        raise ValueError(f"{name}: expected a model with {', '.join(needs)}, found none of {', '.join(missing)}")


def check_same_vocabulary(name: str, left: Policy | Critic, right: Policy | Critic) -> None:
    """ValueError where both know their vocabulary and differ."""
    if left.vocab_size is not None and right.vocab_size is not None and left.vocab_size != right.vocab_size:
        raise ValueError(
            f"{name}: expected one vocabulary, found {left.vocab_size} and {right.vocab_size} tokens "
            "(models.match_vocabulary cuts appended rows)"
        )
