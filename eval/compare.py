"""Compare any set of methods on the same prompts, base, reward and gold, at several strengths:

python -m eval.compare --model DIR --reward REWARD_DIR --gold MODULE:FUNCTION --prompts FILE --out DIR \\
    --method base --method best_of_n@4,16 --method args:REWARD_DIR@2,1 --method value:DIR@1,0.5 \\
    --method blockwise:value:DIR@4,8 --method transfer:DPO_DIR@1 --method smc:value:DIR@1

A method is KIND[:DIR][@STRENGTHS]; each has a folder of its own under --out, so that the same command with one method
more decodes that method alone, and an interrupted run goes on where it was stopped. results.json and frontier.png hold
gold and proxy reward, KL with its kind, win rate over the base, diversity, tokens/s, and tokens that pass through
models for each token of a response.

    KIND           DIR                               STRENGTHS
    base           -                                 -
    policy         an aligned model (DPO, RL)        -
    best_of_n      -                                 n [responses]
    args           a reward model                    beta
    value          a value model                     beta
    follower       a head for a shaped reward        its own beta
    autoregressive an autoregressive reward model    beta = 1/alpha
    transfer       an aligned baseline               beta
    blockwise      value:DIR, args:DIR, …            K [blocks of --block tokens]
    edit           train.value --frozen              step size
    ggro           -                                 candidates per segment
    smc            value:DIR, … or none (the base)   beta
    quest          -                                 beta
    cards          -                                 beta
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _io, commands, data, decoding, models, policies, rewards
from jaxalign.evaluation import engine, loading, methods, plots, results
from jaxalign.evaluation.engine import Method, Texts
from jaxalign.evaluation.loading import Model
from jaxalign.evaluation.methods import Setting
from jaxalign.evaluation.specs import Spec, parse

READ_BY = {
    "top_k": ("args", "value", "follower", "transfer", "ggro", "smc"),
    "block": ("blockwise",),
    "rollouts": ("transfer",),
    "lookahead": ("transfer",),
    "edit_steps": ("edit",),
    "particles": ("smc",),
    "moves": ("quest",),
    "entropy": ("ggro", "cards"),
    "goal": ("cards",),
    "tries": ("cards",),
}
"""Option -> the kinds that read it; all read the others."""


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of eval.compare that decide a method's responses."""

    model: str
    """Folder (or hub name) of the base language model, with its tokenizer."""
    prompts: str
    """File of prompts: .txt, one per line; .jsonl or .jsonl.gz with "prompt" or "messages"."""
    reward: str
    """The reward that methods maximise (the proxy): folder of a reward model, or, for methods that need no gradient of
    it, MODULE:FUNCTION or a weighted sum, "DIR - 0.1 * MODULE:FUNCTION"."""
    gold: str = ""
    """A second reward that no method sees, as --reward."""
    top_k: int = 10
    """Candidates per token of args, transfer and scalar value heads, and tokens that ggro may force."""
    block: int = 8
    """Length of a block of blockwise decoding [tokens]."""
    rollouts: int = 1
    """Roll-outs per candidate of transfer."""
    lookahead: int | None = None
    """Tokens of a roll-out of transfer. Default: to the end of the response."""
    edit_steps: int = 30
    """Gradient steps of edit."""
    particles: int = 16
    """Particles of smc."""
    moves: int = 32
    """Moves of quest."""
    entropy: float = 2.0
    """Entropy at which ggro and cards begin a new segment [nats]."""
    goal: float | None = None
    """Reward that cards asks of a segment [units of reward]. Default: the 0.9 quantile of 32 base responses."""
    tries: int = 20
    """Proposals per segment of cards."""
    max_new_tokens: int = 128
    """Limit of a response [tokens], its EOS included."""
    batch_size: int = 16
    """Prompts decoded together."""
    seed: int = 0
    """Seed of all draws."""
    dtype: str = "float32"
    """Type of all models' parameters and activations: float32 or bfloat16."""
    mesh: str = ""
    """data=N: N devices share each batch; N divides --batch-size."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Options):
    """Options of eval.compare."""

    out: str
    """Run folder: results.json, frontier.png, and a folder per method."""
    method: commands.Repeated[tuple[str, ...]]
    """KIND[:DIR][@STRENGTHS], as above; give the option again for another method. base is added where it is missing."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


def check(config: Config) -> list[Spec]:
    """The methods, base first. ValueErrors name the option."""
    for name in ("top_k", "block", "rollouts", "edit_steps", "particles", "tries", "max_new_tokens", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: expected at least 1, found {getattr(config, name)}")
    if config.moves < 2:
        raise ValueError(f"moves: expected at least 2, found {config.moves}")
    if config.lookahead is not None and config.lookahead < 0:
        raise ValueError(f"lookahead: expected at least 0, found {config.lookahead}")
    if not 0 <= config.entropy < math.inf:
        raise ValueError(f"entropy: expected a finite value >= 0, found {config.entropy}")
    if config.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: expected float32 or bfloat16, found {config.dtype!r}")
    if not config.reward:
        raise ValueError("reward: expected a reward, found none")
    specs = [parse(text) for text in dict.fromkeys(("base", *config.method))]
    judged = rewards.reward_roles(config.reward, name="reward")
    if "reward" not in judged and any(spec.kind == "ggro" for spec in specs):
        raise ValueError(
            f"reward: expected the folder of a reward model, whose gradient ggro reads, found {config.reward!r}"
        )
    slugs = [spec.slug for spec in specs]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"method: expected folders of different names for each kind, found {config.method}")
    return specs


def build(config: Config, setting: Setting, spec: Spec, loaded: dict[str, Model], goal: float) -> list[Method]:
    """The methods of one spec, one per strength."""
    lm, params = loaded.get(spec.text, (setting.lm, setting.params))
    if spec.kind == "base":
        return [methods.sampled(setting, "base", None, setting.base, setting.params)]
    if spec.kind == "policy":
        loading.check_language_model(spec.text, lm, spec.folder)
        aligned = policies.with_reference(policies.language_model(lm), setting.base)
        both = {"policy": params, "reference": setting.params}
        # The base is read for its KL alone.
        return [methods.sampled(setting, spec.name, None, aligned, both, per_token=1)]
    if spec.kind == "best_of_n":
        return [methods.best_of_n(setting, int(n)) for n in spec.strengths]
    if spec.kind == "ggro":
        counts = [int(n) for n in spec.strengths]
        return methods.nudge(setting, counts, entropy=config.entropy, top_k=config.top_k)
    if spec.kind == "quest":
        return methods.quest(setting, spec.strengths, moves=config.moves, samples=64)
    if spec.kind == "cards":
        return [
            methods.cards(setting, beta, goal=goal, entropy=config.entropy, tries=config.tries)
            for beta in spec.strengths
        ]
    if spec.kind == "edit":
        return _edit(config, setting, spec, lm, params)
    if spec.kind == "transfer":
        loading.check_language_model(spec.text, lm, spec.folder)
        ahead = config.lookahead
        critic, given = methods.transfer(setting, (lm, params), rollouts=config.rollouts, lookahead=ahead)
        price = methods.transfer_cost(top_k=config.top_k, rollouts=config.rollouts, lookahead=ahead)
        return methods.tilted(
            setting, spec.name, critic, given, spec.strengths, top_k=_candidates(config, setting), per_token=price
        )
    if spec.kind == "smc" and not spec.critic:
        return _smc(config, setting, spec, lambda beta: (setting.base, setting.params), per_token=1)
    kind = spec.critic or spec.kind
    if kind == "autoregressive":
        loading.check_language_model(spec.text, lm, spec.folder)
    critic, cost = methods.critic_of(kind, lm)
    if spec.kind == "blockwise":
        return [
            methods.blockwise(setting, f"{kind}:{spec.folder}", critic, params, candidates=int(k), block=config.block)
            for k in spec.strengths
        ]
    if spec.kind == "smc":
        # The proposal is a tilt at the target's own beta; a whole vocabulary keeps the target whole, and candidates
        # of a scalar head cut it, as truncated_support in the responses tells.
        proposal = policies.tilt(setting.base, critic, top_k=None if cost else _candidates(config, setting))
        given = {"policy": setting.params, "critic": params}
        at = lambda beta: (proposal, given | {"beta": jnp.asarray(critic.beta or beta, jnp.float32)})  # noqa: E731
        return _smc(config, setting, spec, at, per_token=1 + (cost or _candidates(config, setting)))
    top_k = None if cost else _candidates(config, setting)
    betas = spec.strengths
    if spec.kind == "follower":
        assert lm.config.head is not None
        assert lm.config.head.follower is not None
        betas = (lm.config.head.follower.beta,)
    return methods.tilted(setting, spec.name, critic, params, betas, top_k=top_k, per_token=cost)


def _candidates(config: Config, setting: Setting) -> int:
    return min(config.top_k, setting.lm.vocab_size)


def _smc(config: Config, setting: Setting, spec: Spec, proposal: Any, *, per_token: float) -> list[Method]:
    """proposal(beta) -> (Policy, its parameters)."""
    return [
        methods.smc(setting, spec.name, beta, *proposal(beta), particles=config.particles, per_token=per_token)
        for beta in spec.strengths
    ]


def _edit(config: Config, setting: Setting, spec: Spec, lm: models.LanguageModel, params: Any) -> list[Method]:
    body, own = (jax.tree.leaves(p["transformer"]) for p in (setting.params, params))
    if len(body) != len(own) or not all(np.array_equal(a, b) for a, b in zip(body, own, strict=True)):
        raise ValueError(
            f"{spec.name}: expected a head on the base's own hidden states (train.value --frozen), found another model"
        )
    value = policies.head_value(lm)
    edited = policies.re_control(setting.base, setting.lm.logits, value, steps=config.edit_steps)
    return [
        methods.sampled(
            setting,
            spec.name,
            size,
            edited,
            {"policy": setting.params, "value": params, "step_size": jnp.asarray(size, jnp.float32)},
        )
        for size in spec.strengths
    ]


def default_goal(config: Config, setting: Setting, prompts: Texts) -> float:
    """The 0.9 quantile of the proxy over 32 base responses: one for each of up to 32 prompts."""
    judge = setting.judge
    ids = prompts.ids[:: max(len(prompts.ids) // 32, 1)][:32]
    found = decoding.best_of_n(
        setting.base,
        judge.reward,
        {"policy": setting.params, "reward": judge.params},
        jax.random.key(config.seed),
        data.prompt_batch(ids),
        n=-(-32 // len(ids)),
        **setting.options,
    )
    return float(np.quantile(np.asarray(found.reward)[: len(ids)], 0.9))


def run(config: Config, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Decodes what is missing, writes results.json and frontier.png, prints the table; gives its rows. quiet: neither
    picture nor table."""
    specs = check(config)
    folders = (
        {"model": config.model}
        | rewards.reward_roles(config.reward, name="reward")
        | rewards.reward_roles(config.gold, name="gold")
    )
    folders |= {spec.text: spec.folder for spec in specs if spec.folder}
    tokenizer, loaded = loading.load(folders, dtype=config.dtype, mesh=config.mesh, batch_size=config.batch_size)
    lm, params = loaded["model"]
    loading.check_language_model("model", lm, config.model)
    prompts = data.tokenize_prompts(config.prompts, tokenizer)
    texts = Texts([prompt.text for prompt in prompts], [prompt.tokens for prompt in prompts], tokenizer)
    everything = data.prompt_batch(texts.ids)
    judges = loading.judges(
        {"reward": config.reward, "gold": config.gold}, loaded, tokenizer, everything, config.max_new_tokens
    )
    base = policies.language_model(lm)
    reward_lm = loaded["reward"][0] if "reward" in loaded else None
    setting = Setting(lm, base, params, config.max_new_tokens, 1.0, judges["reward"], reward_lm)
    goal = 0.0
    if any(spec.kind == "cards" for spec in specs):
        goal = default_goal(config, setting, texts) if config.goal is None else config.goal
    plans = {spec: build(config, setting, spec, loaded, goal) for spec in specs}
    every = [(method.name, method.beta) for plan in plans.values() for method in plan]
    if twice := {str(key) for key in every if every.count(key) > 1}:
        raise ValueError(f"method: expected each method and strength once, found {sorted(twice)} twice")
    for plan in plans.values():
        for method in plan:
            method.check(everything)
    records: list[dict[str, Any]] = []
    speeds: list[dict[str, Any]] = []
    for spec, plan in plans.items():
        folder, found = _decode(config, spec, plan, judges, texts)
        records += found
        speeds += json.loads((folder / "summary.json").read_text())
    rows = results.summarise(records)
    known = {(row["method"], row["beta"]): row["tokens_per_second"] for row in speeds}
    for row in rows:
        row["tokens_per_second"] = known[row["method"], row["beta"]]
    out = pathlib.Path(config.out)
    _io.write_json(out / "results.json", rows)
    if quiet:
        print(f"wrote {out / 'results.json'} ({len(records)} responses)")
        return rows
    plots.frontier(rows, out / "frontier.png")
    results.print_table(rows)
    print(f"wrote {out / 'results.json'} and {out / 'frontier.png'} ({len(records)} responses)")
    return rows


def _decode(
    config: Config, spec: Spec, plan: list[Method], judges: dict[str, engine.Judge], texts: Texts
) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    """A method's folder and records, decoded unless they are there."""
    # An option that this kind does not read may change without harm to its responses.
    read = [field.name for field in dataclasses.fields(Options) if spec.kind in READ_BY.get(field.name, (spec.kind,))]
    shared: dict[str, Any] = {name: getattr(config, name) for name in read}
    inputs = [config.model, config.prompts, spec.folder]
    inputs += [
        *rewards.reward_roles(config.reward, name="reward").values(),
        *rewards.reward_roles(config.gold, name="gold").values(),
    ]
    folder = _io.open_run(
        str(pathlib.Path(config.out) / spec.slug), _Run(**shared, method=spec.text), inputs=[x for x in inputs if x]
    )
    final = folder / "responses.jsonl"
    speed = engine.decode(plan, judges, texts, final, batch_size=config.batch_size, mesh=config.mesh, seed=config.seed)
    records = results.read(final)
    results.check_texts(records, texts.texts, final, expected=len(plan) * len(texts.texts))
    rows = results.summarise(records)
    results.add_speed(rows, speed, folder / "summary.json")
    _io.write_json(folder / "summary.json", rows)
    return folder, records


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run(Options):
    """What decides the responses in a method's folder."""

    method: str


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
