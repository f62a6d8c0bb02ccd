"""Decode a user's prompts with a user's models, by every method asked for:

python -m eval.decode --model DIR --critic args:REWARD_DIR --critic autoregressive:ARM_DIR --beta 0.5 1.0 \\
    --reward REWARD_DIR --prompts prompts.jsonl --out runs/decode

Each critic is a method, run at every beta, beside the base and (with --best-of-n) best-of-n; with --block it also
selects blocks of the base. The same command again goes on where it was stopped; a response depends on the seed and on
the prompt's index alone.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib

import jax.numpy as jnp

from jaxalign import _io, commands, critics, data, policies, rewards
from jaxalign.evaluation import engine, loading, methods, results
from jaxalign.evaluation.engine import Method, Texts
from jaxalign.evaluation.methods import Setting
from jaxalign.types import Critic, Params

KINDS = ("args", "value", "autoregressive", "follower", "transfer")


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of eval.decode."""

    model: str
    """Folder (or hub name) of the base language model, with its tokenizer."""
    prompts: str
    """File of prompts: .txt, one per line; .jsonl or .jsonl.gz with "prompt" or "messages"."""
    out: str
    """Run folder: responses.jsonl, summary.json, config.json, versions.json."""
    critic: commands.Repeated[tuple[str, ...]] = ()
    """KIND:DIR; give the option again for another method. KIND is args, value, autoregressive, follower, a head of
    train.value for a shaped reward, decoded at the beta it was trained for, or transfer, an aligned language model
    whose roll-outs --reward scores. Replaces the list of --config."""
    beta: tuple[float, ...] = (1.0,)
    """KL weights, one or several, each > 0 [units of the critic's score per nat]; autoregressive: 1/alpha."""
    sum: bool = False
    """Combine all critics into one weighted sum, one method."""
    weights: tuple[float, ...] = ()
    """With --sum: one weight per critic [1]; all 1 when empty."""
    top_k: int | None = None
    """Candidates per token; 0: the whole vocabulary. Default: 10 for scalar heads, which are scored one candidate at a
    time; the whole vocabulary for Q heads and autoregressive rewards, which give all scores at once."""
    rollouts: int = 1
    """Roll-outs per candidate of a transfer critic."""
    lookahead: int | None = None
    """Tokens of a transfer critic's roll-out; 0: none. Default: up to the end of the response."""
    best_of_n: tuple[int, ...] = ()
    """Also decode best-of-n of the base by --reward, for each n [responses per prompt] given."""
    block: tuple[int, ...] = ()
    """Also decode the base blockwise by each --critic, for each length of a block [tokens] given: the best of
    --candidates continuations is kept, then the next block."""
    candidates: int = 8
    """With --block: continuations per block, of which the critic keeps one."""
    include_base: bool = True
    """Also decode the base itself."""
    reward: str = ""
    """Folder of a reward model that scores every response (the proxy), or a program or sum as in --gold."""
    gold: str = ""
    """Folder of a second reward model that no method saw, or MODULE:FUNCTION, a program f(prompts, responses) ->
    numbers on lists of texts; or a weighted sum of such, "DIR - 0.1 * MODULE:FUNCTION"."""
    embedding: str = ""
    """MODULE:FUNCTION, a program f(texts) -> one vector each (SimCSE in ARGS' tables): reports coherence, the cosine of
    prompt and response."""
    max_new_tokens: int = 128
    """Limit of a response [tokens], its EOS included."""
    temperature: float = 1.0
    """Sampling temperature, the outermost transform; 0 is greedy."""
    batch_size: int = 16
    """Prompts decoded together."""
    seed: int = 0
    """Seed of all draws."""
    dtype: str = "float32"
    """Type of all models' parameters and activations: float32 or bfloat16."""
    mesh: str = ""
    """data=N: N devices share each batch; N divides --batch-size."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def check(config: Config) -> None:
    """Value checks that need no file. ValueErrors name the option."""
    if config.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, found {config.max_new_tokens}")
    if config.batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, found {config.batch_size}")
    if not config.beta or any(not 0 < beta < math.inf for beta in config.beta):
        raise ValueError(f"beta: expected finite values > 0, found {config.beta}")
    if not 0 <= config.temperature < math.inf:
        raise ValueError(f"temperature: expected a finite value >= 0, found {config.temperature}")
    # Records are told apart by method and beta.
    for name in ("beta", "critic", "best_of_n", "block"):
        values = getattr(config, name)
        if len(set(values)) < len(values) and not (name == "critic" and config.sum):
            raise ValueError(f"{name}: expected each value once, found {values}")
    if not config.critic and (config.top_k is not None or config.beta != (1.0,)):
        field, value = ("beta", config.beta) if config.top_k is None else ("top_k", config.top_k)
        raise ValueError(f"{field}: expected a --critic that uses it, found {value} and no critic")
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: expected float32 or bfloat16, found {config.dtype!r}")
    for spec in config.critic:
        if spec.partition(":")[0] not in KINDS or not spec.partition(":")[2]:
            raise ValueError(f"critic: expected KIND:DIR with KIND among {KINDS}, found {spec!r}")
    if any(spec.startswith("transfer:") for spec in config.critic):
        if "reward" not in rewards.reward_roles(config.reward, name="reward"):
            raise ValueError(f"reward: expected a folder, which a transfer critic scores by, found {config.reward!r}")
    elif config.rollouts != 1 or config.lookahead is not None:
        field, given = ("rollouts", config.rollouts) if config.lookahead is None else ("lookahead", config.lookahead)
        raise ValueError(f"{field}: expected a transfer critic that uses it, found {given} and none")
    if config.weights and (not config.sum or len(config.weights) != len(config.critic)):
        raise ValueError(
            f"weights: expected --sum and one weight per critic ({len(config.critic)}), found {len(config.weights)}"
        )
    if config.sum and not config.critic:
        raise ValueError("sum: expected at least one --critic, found none")
    if config.top_k is not None and config.top_k < 0:
        raise ValueError(f"top_k: expected 0 (all) or at least 1, found {config.top_k}")
    if any(n < 2 for n in config.best_of_n) or (config.best_of_n and not config.reward):
        raise ValueError(f"best_of_n: expected n >= 2 and a --reward to select by, found {config.best_of_n}")
    if config.best_of_n and config.temperature == 0:
        raise ValueError(f"best_of_n: expected a temperature > 0, found {config.best_of_n} equal greedy responses")
    if any(block < 1 for block in config.block):
        raise ValueError(f"block: expected at least 1 token, found {config.block}")
    if config.candidates < 2:
        raise ValueError(f"candidates: expected at least 2, found {config.candidates}")
    if config.block and not config.critic:
        raise ValueError(f"block: expected a --critic to select by, found {config.block} and no critic")
    if config.candidates != 8 and not config.block:
        raise ValueError(f"candidates: expected with --block, found {config.candidates} and no block")
    if config.block and config.temperature == 0:
        raise ValueError(f"block: expected a temperature > 0, found {config.candidates} equal greedy continuations")
    if not (config.critic or config.include_base or config.best_of_n):
        raise ValueError("critic: expected something to decode, found no critic, no base and no best_of_n")


def folders(config: Config) -> dict[str, str]:
    """Role -> folder of every model of a run."""
    named = {"model": config.model} | {f"critic {spec}": spec.partition(":")[2] for spec in config.critic}
    return named | rewards.reward_roles(config.reward, name="reward") | rewards.reward_roles(config.gold, name="gold")


def plan(config: Config, setting: Setting, loaded: dict[str, loading.Model]) -> list[Method]:
    """All methods of a run, the base first."""
    out = [methods.sampled(setting, "base", None, setting.base, setting.params)] if config.include_base else []
    out += [methods.best_of_n(setting, n) for n in config.best_of_n]
    ten = min(10, setting.lm.vocab_size)
    built: list[tuple[str, Critic, Params, float | methods.Cost]] = []
    for spec in config.critic:
        kind, folder = spec.split(":", 1)
        lm, params = loaded[f"critic {spec}"]
        if kind in ("autoregressive", "transfer"):
            loading.check_language_model(f"critic {spec}", lm, folder)
        if kind == "transfer":
            critic, value = methods.transfer(
                setting, (lm, params), rollouts=config.rollouts, lookahead=config.lookahead
            )
            top_k = ten if config.top_k is None else (config.top_k or lm.vocab_size)
            price = methods.transfer_cost(top_k=top_k, rollouts=config.rollouts, lookahead=config.lookahead)
            built.append((spec, critic, value, price))
        else:
            critic, each = methods.critic_of(kind, lm)
            built.append((spec, critic, params, each))
    whole = {spec: cost == 1 for spec, _, _, cost in built}  # critics that give all scores at once
    if config.sum:
        weights = jnp.asarray(config.weights or (1.0,) * len(built), jnp.float32)
        summed = critics.weighted_sum([critic for _, critic, _, _ in built])
        name, costs = "+".join(config.critic), [cost for _, _, _, cost in built]
        whole = {name: all(whole.values())}
        params = {"critics": tuple(value for _, _, value, _ in built), "weights": weights}
        flat = [cost for cost in costs if not callable(cost)]
        # A roll-out's cost depends on the prompt: a sum with one is counted without the others' few tokens.
        total = next((cost for cost in costs if callable(cost)), sum(flat) if all(flat) else 0)
        built = [(name, summed, params, total)]
    for name, critic, params, cost in built:
        k = (
            (None if whole[name] else min(10, setting.lm.vocab_size))
            if config.top_k is None
            else (config.top_k or None)
        )
        out += methods.tilted(setting, name, critic, params, betas(config, name, loaded), top_k=k, per_token=cost)
        out += [
            methods.blockwise(setting, name, critic, params, candidates=config.candidates, block=block, per_token=cost)
            for block in config.block
        ]
    return out


def betas(config: Config, name: str, loaded: dict[str, loading.Model]) -> tuple[float, ...]:
    """The KL weights of a method: --beta, or the one that a follower's head was trained for. ValueError where --beta
    asks such a head for others."""
    spec = name.split("+")[0]
    if not spec.startswith("follower:"):
        return config.beta
    head = loaded[f"critic {spec}"][0].config.head
    assert head is not None
    assert head.follower is not None
    if config.beta != (1.0,) and head.follower.beta not in config.beta:
        raise ValueError(f"beta: expected {head.follower.beta}, which {name} was trained for, found {config.beta}")
    return (head.follower.beta,)


def run(config: Config, *, quiet: bool = False) -> pathlib.Path:
    """Decodes, writes the run folder, prints the table (unless quiet); gives the path of responses.jsonl."""
    check(config)
    given = folders(config)
    tokenizer, loaded = loading.load(given, dtype=config.dtype, mesh=config.mesh, batch_size=config.batch_size)
    lm, params = loaded["model"]
    loading.check_language_model("model", lm, config.model)
    prompts = data.tokenize_prompts(config.prompts, tokenizer)
    texts = Texts([prompt.text for prompt in prompts], [prompt.tokens for prompt in prompts], tokenizer)
    everything = data.prompt_batch(texts.ids)
    judged = {"reward": config.reward, "gold": config.gold}
    judges = loading.judges(judged, loaded, tokenizer, everything, config.max_new_tokens)
    setting = Setting(
        lm,
        policies.language_model(lm),
        params,
        config.max_new_tokens,
        config.temperature,
        judges.get("reward"),
        loaded["reward"][0] if "reward" in loaded else None,
    )
    chosen = plan(config, setting, loaded)
    # Every host check on all prompts, before anything is written.
    for method in chosen:
        method.check(everything)
    embed = rewards.program(config.embedding, name="embedding") if config.embedding else None
    out = _io.open_run(config.out, config, inputs=list(given.values()))
    final = out / "responses.jsonl"
    speed = engine.decode(
        chosen,
        judges,
        texts,
        final,
        batch_size=config.batch_size,
        mesh=config.mesh,
        seed=config.seed,
        embed=embed,
    )
    records = results.read(final)
    results.check_texts(records, texts.texts, final, expected=len(chosen) * len(texts.texts))
    rows = results.summarise(records)
    results.add_speed(rows, speed, out / "summary.json")
    _io.write_json(out / "summary.json", rows)
    if not quiet:
        results.print_table(rows)
    print(f"wrote {final} ({len(records)} responses) and {out / 'summary.json'}")
    return final


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
