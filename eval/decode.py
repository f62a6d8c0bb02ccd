"""Decode a user's prompts with a user's models, by every method asked for:

python -m eval.decode --model DIR --critic args:REWARD_DIR --critic autoregressive:ARM_DIR --beta 0.5 1.0 \\
    --reward REWARD_DIR --prompts prompts.jsonl --out runs/decode

Each critic is a method, run at every beta, beside the base and (with --best-of-n) best-of-n; with --block it also
selects blocks of the base. The same command again goes on where it was stopped; a response depends on the seed and on
the prompt's index alone.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec

from eval import results
from jaxalign import cli, critics, data, decoding, metrics, models, policies, rewards
from jaxalign.checks import check_prompt_fits
from jaxalign.types import Completions, Critic, Params, Policy, Reward, TokenBatch

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
    critic: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
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
    """Folder of a reward model that scores every response (the proxy)."""
    gold: str = ""
    """Folder of a second reward model that no method saw, or MODULE:FUNCTION, a program f(prompts, responses) ->
    numbers on lists of texts."""
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


class Method(NamedTuple):
    """One row group of the results."""

    name: str
    beta: float | None
    policy: Policy
    params: Params
    n: int  # responses per prompt, or continuations per block, of which the best is kept
    kl_kind: str
    block: int = 0  # length of a block, 0: none
    judge: tuple[Critic, Params] | None = None  # which selects blocks


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
        if not config.reward or rewards.is_program(config.reward):
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


def load_all(config: Config) -> tuple[Any, dict[str, tuple[models.LanguageModel, Params]]]:
    """(tokenizer, models by role), all over one vocabulary: equal, appended rows cut with a warning, or an error."""
    mesh = cli.make_mesh(config.mesh)
    if mesh is not None and config.batch_size % mesh.size:
        raise ValueError(f"mesh: expected a divisor of batch_size {config.batch_size}, found {config.mesh!r}")
    folders = {"model": config.model} | {f"critic {spec}": spec.partition(":")[2] for spec in config.critic}
    judges = {name: getattr(config, name) for name in ("reward", "gold") if getattr(config, name)}
    folders |= {name: folder for name, folder in judges.items() if not rewards.is_program(folder)}
    tokenizer = models.tokenizer(config.model)
    distinct: dict[str, str] = {}  # folder -> its first role: one load where roles share a folder, the model first
    for name, folder in folders.items():
        distinct.setdefault(folder, name)
    for folder, name in distinct.items():
        if folder != config.model:
            models.check_tokens(tokenizer.get_vocab(), models.tokenizer(folder).get_vocab(), name=name)
    pairs = [models.load(folder, dtype=config.dtype, mesh=mesh) for folder in distinct]
    matched = models.match_vocabulary(*pairs, names=tuple(distinct.values()))
    by_folder = dict(zip(distinct, matched, strict=True))
    loaded = {name: by_folder[folder] for name, folder in folders.items()}
    lost = set(pairs[0][0].config.eos_ids) - set(matched[0][0].config.eos_ids)
    if lost:
        raise ValueError(
            f"model: expected EOS ids within the common vocabulary of {matched[0][0].vocab_size} tokens, found "
            f"{sorted(lost)}: responses would not end"
        )
    for name, (lm, _) in loaded.items():
        drawn = name == "model" or name.startswith(("critic autoregressive:", "critic transfer:"))
        if drawn and not lm.has_lm_head:
            raise ValueError(f"{name}: expected a language model, found a sequence classifier in {folders[name]}")
        if name in ("reward", "gold") and lm.head_width != 1:
            raise ValueError(f"{name}: expected a model with a scalar head, found {lm.config.head} in {folders[name]}")
    return tokenizer, loaded


def build_critic(spec: str, lm: models.LanguageModel) -> tuple[Critic, bool]:
    """(critic, whether it gives the scores of the whole vocabulary at once)."""
    kind = spec.partition(":")[0]
    if kind == "args":
        return critics.args(lm), False
    if kind == "value":
        return critics.value(lm), lm.config.head is not None and lm.config.head.kind == "q"
    if kind == "follower":
        return critics.follower(lm), lm.config.head is not None and lm.config.head.kind == "q"
    return critics.autoregressive(lm), True


def transfer_critic(
    config: Config, spec: str, loaded: dict[str, tuple[models.LanguageModel, Params]]
) -> tuple[Critic, Params]:
    """Direct transfer from the model of spec, scored by --reward."""
    (lm, params), (reward_lm, reward_params) = loaded[f"critic {spec}"], loaded["reward"]
    critic = critics.transfer_q(
        policies.language_model(lm),
        rewards.from_model(reward_lm),
        eos_ids=loaded["model"][0].config.eos_ids,
        rollouts=config.rollouts,
        lookahead=config.lookahead,
    )
    return critic, {"baseline": params, "reward": reward_params}


def methods(config: Config, loaded: dict[str, tuple[models.LanguageModel, Params]]) -> list[Method]:
    """All methods of a run, the base first."""
    lm, params = loaded["model"]
    base = policies.language_model(lm)
    sampled = "mean -log pi_ref(y)" if config.temperature == 0 else "sum of exact per-step KL"
    out = [Method("base", None, base, params, 1, sampled)] if config.include_base else []
    for n in config.best_of_n:
        bound = "bound log n - (n-1)/n" if config.temperature == 1 else "bound, to the tempered base"
        out.append(Method(f"best_of_{n}", None, base, params, n, bound))
    built: list[tuple[str, Critic, bool]] = []
    values: list[Params] = []
    for spec in config.critic:
        if spec.startswith("transfer:"):
            critic, value = transfer_critic(config, spec, loaded)
            built.append((spec, critic, False))
            values.append(value)
        else:
            built.append((spec, *build_critic(spec, loaded[f"critic {spec}"][0])))
            values.append(loaded[f"critic {spec}"][1])
    if config.sum:
        weights = jnp.asarray(config.weights or (1.0,) * len(built), jnp.float32)
        summed = critics.weighted_sum([critic for _, critic, _ in built])
        built = [("+".join(config.critic), summed, all(whole for _, _, whole in built))]
        values = [{"critics": tuple(values), "weights": weights}]
    for (name, critic, whole), critic_params in zip(built, values, strict=True):
        k = (None if whole else min(10, lm.vocab_size)) if config.top_k is None else (config.top_k or None)
        policy = policies.tilt(base, critic, top_k=k)
        for beta in betas(config, name, loaded):
            used = beta if critic.beta is None else critic.beta
            tilted = {"policy": params, "critic": critic_params, "beta": jnp.asarray(used, jnp.float32)}
            out.append(Method(name, beta, policy, tilted, 1, sampled))
        for block in config.block:
            selected = f"blockwise_{config.candidates}x{block} {name}"
            bound = "bound ceil(|y|/M) (log K - (K-1)/K)"
            bound += "" if config.temperature == 1 else ", to the tempered base"
            judge = (critic, critic_params)
            out.append(Method(selected, None, base, params, config.candidates, bound, block, judge))
    return out


def betas(config: Config, name: str, loaded: dict[str, tuple[models.LanguageModel, Params]]) -> tuple[float, ...]:
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


class Batch(NamedTuple):
    """rows: indices of the prompts; prompts: padded to batch_size rows."""

    rows: list[int]
    prompts: TokenBatch


def batches(config: Config, ids: list[list[int]]) -> list[Batch]:
    """Prompts of near lengths together. The same batches for every method and after every interruption."""
    mesh = cli.make_mesh(config.mesh)
    order = sorted(range(len(ids)), key=lambda i: (data.bucket(len(ids[i])), i))
    out = []
    for begin in range(0, len(order), config.batch_size):
        rows = order[begin : begin + config.batch_size]
        prompts = data.prompt_batch([ids[i] for i in rows], index=rows, batch_size=config.batch_size)
        if mesh is not None:
            prompts = jax.device_put(prompts, NamedSharding(mesh, PartitionSpec("data")))
        out.append(Batch(rows, prompts))
    return out


class Judge(NamedTuple):
    """A jitted Reward and its parameters."""

    reward: Reward
    params: Params


def decode_batch(
    config: Config, method: Method, proxy: Judge | None, prompts: TokenBatch, eos_ids: tuple[int, ...]
) -> Completions:
    """One batch by one method; best-of-n selects by the proxy, blockwise by its critic."""
    shared: dict[str, Any] = {"max_new_tokens": config.max_new_tokens, "eos_ids": eos_ids}
    shared["temperature"] = 1.0 if config.temperature == 1 else jnp.asarray(config.temperature, jnp.float32)
    rng = jax.random.key(config.seed)
    if method.judge is not None:
        critic, values = method.judge
        pair = {"policy": method.params, "critic": values}
        return decoding.blockwise(
            method.policy, critic, pair, rng, prompts, candidates=method.n, block=method.block, **shared
        )
    if method.n == 1:
        return decoding.sample(method.policy, method.params, rng, prompts, **shared)
    assert proxy is not None
    both = {"policy": method.params, "reward": proxy.params}
    return decoding.best_of_n(method.policy, proxy.reward, both, rng, prompts, n=method.n, **shared).best


def run(config: Config, *, quiet: bool = False) -> pathlib.Path:
    """Decodes, writes the run folder, prints the table (unless quiet); gives the path of responses.jsonl."""
    check(config)
    tokenizer, loaded = load_all(config)
    prompts = data.tokenize_prompts(config.prompts, tokenizer)
    texts, ids = [prompt.text for prompt in prompts], [prompt.tokens for prompt in prompts]
    plan = methods(config, loaded)
    # Every host check on all prompts, before anything is written.
    everything = data.prompt_batch(ids)
    for method in plan:
        assert method.policy.check is not None
        method.policy.check(method.params, everything, config.max_new_tokens)
    judges: dict[str, Judge] = {}
    for name in ("reward", "gold"):
        if name in loaded:
            check_prompt_fits(loaded[name][0], everything, config.max_new_tokens, name=name)
            judges[name] = Judge(jax.jit(rewards.from_model(loaded[name][0])), loaded[name][1])
        elif getattr(config, name):
            judges[name] = Judge(
                rewards.from_text(functools.partial(_text, tokenizer), rewards.program(getattr(config, name))), None
            )
    embed = rewards.program(config.embedding, name="embedding") if config.embedding else None
    models_given = [config.model, config.reward, config.gold, *(c.partition(":")[2] for c in config.critic)]
    out = cli.open_run(config.out, config, inputs=[path for path in models_given if path])
    final, partial = out / "responses.jsonl", out / "responses.jsonl.partial"
    speed: dict[tuple[str, float | None], float] = {}
    if not final.exists():
        eos_ids = loaded["model"][0].config.eos_ids
        records, speed = _decode_all(config, plan, judges, embed, texts, ids, tokenizer, eos_ids, partial)
        order = {(m.name, m.beta): k for k, m in enumerate(plan)}
        records.sort(key=lambda r: (order[r["method"], r["beta"]], r["index"]))
        results.write(final, records)
        partial.unlink()
    records = results.read(final)
    results.check_texts(records, texts, final, expected=len(plan) * len(texts))
    rows = results.summarise(records)
    results.add_speed(rows, speed, out / "summary.json")
    cli.write_json(out / "summary.json", rows)
    if not quiet:
        results.print_table(rows)
    print(f"wrote {final} ({len(records)} responses) and {out / 'summary.json'}")
    return final


def _decode_all(
    config: Config,
    plan: list[Method],
    judges: dict[str, Judge],
    embed: Callable[..., Any] | None,
    texts: list[str],
    ids: list[list[int]],
    tokenizer: Any,
    eos_ids: tuple[int, ...],
    partial: pathlib.Path,
) -> tuple[list[dict[str, Any]], dict[tuple[str, float | None], float]]:
    """All records, and the tokens/s of each method and beta that was decoded here beyond its first, compiling batch.
    Each finished batch is appended to the partial file, from which the next call goes on."""
    found = {(r["method"], r["beta"], r["index"]): r for r in results.read(partial)}
    results.check_texts(list(found.values()), texts, partial)
    parts = batches(config, ids)
    # A batch that was cut short is decoded again whole: the same shapes and neighbours give the same bits.
    whole = {
        (k, j)
        for k, method in enumerate(plan)
        for j, batch in enumerate(parts)
        if all((method.name, method.beta, i) in found for i in batch.rows)
    }
    records = [found[plan[k].name, plan[k].beta, i] for k, j in sorted(whole) for i in parts[j].rows]
    results.write(partial, records)
    total = len(plan) * len(ids)
    traced: set[Any] = set()
    timed: dict[tuple[str, float | None], tuple[int, float]] = {}
    progress = cli.progress("decode", total, initial=len(records), unit="response")
    with partial.open("a") as sink, progress:
        for k, method in enumerate(plan):
            for j, batch in enumerate(parts):
                if (k, j) in whole:
                    continue
                begin = time.perf_counter()
                drawn = decode_batch(config, method, judges.get("reward"), batch.prompts, eos_ids)
                jax.block_until_ready(drawn)
                seconds = time.perf_counter() - begin
                joined = decoding.join(batch.prompts, drawn)
                scores = {
                    name: np.asarray(judge.reward(judge.params, *joined, batch.prompts.index))
                    for name, judge in judges.items()
                }
                for name, values in scores.items():
                    if not np.isfinite(values).all():
                        raise ValueError(f"{name}: expected finite rewards, found {values} for prompts {batch.rows}")
                host = jax.tree.map(np.asarray, drawn)
                check_finite(method, host, batch.rows)
                new = [
                    _record(method, i, texts[i], tokenizer, host, b)
                    | {name: round(float(values[b]), 6) for name, values in scores.items()}
                    for b, i in enumerate(batch.rows)
                ]
                if embed is not None:
                    add_coherence(new, embed)
                sink.writelines(json.dumps(record, allow_nan=False) + "\n" for record in new)
                sink.flush()
                records += new
                tokens = int(host.mask[: len(batch.rows)].sum())
                # Methods that differ in beta alone share the trace.
                critic = None if method.judge is None else method.judge[0]
                trace = (method.policy, critic, method.block, method.n, batch.prompts.tokens.shape)
                if trace in traced:
                    before = timed.get((method.name, method.beta), (0, 0.0))
                    timed[method.name, method.beta] = (before[0] + tokens, before[1] + seconds)
                traced.add(trace)
                progress.set_postfix_str(f"{method.name} {tokens / seconds:.0f} tokens/s")
                progress.update(len(batch.rows))
    return records, {key: count / seconds for key, (count, seconds) in timed.items()}


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def add_coherence(records: list[dict[str, Any]], embed: Callable[[list[str]], Any]) -> None:
    """Writes the cosine of prompt and response into each record. ValueError where there is none."""
    vectors = (np.asarray(embed([r[name] for r in records]), np.float64) for name in ("prompt", "response"))
    with np.errstate(invalid="ignore"):
        found = metrics.coherence(*vectors)
    bad = [r["index"] for r, value in zip(records, found, strict=True) if not np.isfinite(value)]
    if bad:
        raise ValueError(f"embedding: expected finite vectors other than 0, found none for prompts {bad}")
    for record, value in zip(records, found.tolist(), strict=True):
        record["coherence"] = round(value, 6)


def check_finite(method: Method, host: Completions, rows: list[int]) -> None:
    """ValueError that names the method and the prompts where a policy has no distribution (NaN weights, an overflow).
    host: Completions of numpy arrays; the rows beyond len(rows) are padding."""
    count = len(rows)
    for name in ("log_prob", "log_prob_ref", "log_norm", "kl"):
        values = getattr(host, name)
        if values is None:
            continue
        bad = [i for i, row in zip(rows, np.isfinite(values[:count]).all(axis=1), strict=True) if not row]
        if bad:
            raise ValueError(f"{method.name}: expected finite {name}, found NaN or infinity for prompts {bad}")


def _record(method: Method, index: int, prompt: str, tokenizer: Any, host: Completions, b: int) -> dict[str, Any]:
    real = host.mask[b]
    log_prob, log_ref = host.log_prob[b][real], host.log_prob_ref[b][real]
    if method.block:
        kl = float(metrics.blockwise_kl_bound(np.asarray(real), method.block, method.n))
    elif method.n > 1:
        kl = metrics.best_of_n_kl_bound(method.n)
    elif method.kl_kind.startswith("mean"):
        kl = -float(log_ref.sum())
    else:
        assert host.kl is not None
        kl = float(host.kl[b].sum())
    tokens = host.tokens[b][real].tolist()
    return {
        "method": method.name,
        "beta": method.beta,
        "index": index,
        "prompt": prompt,
        "response": tokenizer.decode(tokens, skip_special_tokens=True),
        "tokens": tokens,
        "log_prob": [round(float(x), 6) for x in log_prob],
        "log_prob_ref": [round(float(x), 6) for x in log_ref],
        "log_prob_sum": round(float(log_prob.sum()), 5),
        "log_prob_ref_sum": round(float(log_ref.sum()), 5),
        "log_norm_sum": round(float(host.log_norm[b][real].sum()), 5),
        "kl": round(kl, 5),
        "kl_kind": method.kl_kind,
        "finished": bool(host.finished[b]),
        "truncated": bool(host.truncated[b]),
    }


def main(args: list[str] | None = None) -> None:
    run(cli.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    main()
