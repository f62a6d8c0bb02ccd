"""A decoding run: any set of methods on the same prompts, base, reward and gold, each in a folder of its own."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

from jaxalign import _hosts, _io, _runs, models, policies, rewards
from jaxalign._checks import check_language_model
from jaxalign._programs import telling
from jaxalign.data import chats, encoded
from jaxalign.data.text_options import ending_ids, format_of
from jaxalign.evaluation import engine, fits, inspection, loading, plots, results, streaming
from jaxalign.evaluation.engine import Method, Texts
from jaxalign.evaluation.methods import METHODS
from jaxalign.evaluation.options import DecodeOptions, ResponseOptions, check_options
from jaxalign.evaluation.results import SCORED, Embed, Record
from jaxalign.evaluation.settings import Setting
from jaxalign.evaluation.specs import CRITICS, KINDS, Spec, parse_method
from jaxalign.prompts import prompt_batch
from jaxalign.tokens import TextFormat
from jaxalign.training import dry_run, reading


def run(options: DecodeOptions, *, quiet: bool = False) -> list[Record]:
    """Decodes what is missing, writes results.json and frontier.png and prints the table.

    Args:
      options: of the run.
      quiet: neither picture nor table.

    Returns:
      The rows of results.json, one per method and strength (`results.summarise`), with tokens_per_second.

    Raises:
      ValueError: names the option or the method. What can be checked before decoding is, and nothing is written then.
    """
    if options.text.show:
        reading.show(functools.partial(_read_prompts, options), options.text, model=options.model)
        return []
    if options.dry_run:
        dry_run.on_enough_devices(options, options.mesh)
    specs = check(options)
    scored = {name: getattr(options, name) for name in SCORED}
    tokenizer = models.tokenizer(options.model, chat_template=options.text.chat_template)
    prompts = _read_prompts(options, format_of(options.text, tokenizer)).rows
    texts = Texts([prompt.text for prompt in prompts], [prompt.tokens for prompt in prompts], tokenizer)
    sources = [prompt.source for prompt in prompts]
    reader = rewards.reader_of(format_of(options.text, tokenizer), None, sources, turns=chats.prompt_chat)
    folders = {"model": options.model} | loading.over_base_tokens(reader, scored)
    if options.draft not in ("", "below"):
        folders["draft"] = options.draft
    folders |= loading.other_models(options.with_model)
    for spec in specs:
        folders |= spec.folders
    if options.dry_run:
        fits.tell(options, specs, lambda spec: METHODS[spec.kind], folders, texts, reader)
    out = pathlib.Path(options.out)
    with _hosts.together():
        if _hosts.is_first():
            results.check_folder(out)
    loading.check_laws(options, specs, tokenizer)
    loaded = loading.load(folders, tokenizer, dtype=options.dtype, mesh=options.mesh, batch_size=options.batch_size)
    base, params = loaded["model"]
    check_language_model("model", base, options.model)
    if "draft" in loaded:
        check_language_model("draft", loaded["draft"][0], options.draft)
    base = models.with_eos(base, ending_ids(options.text, tokenizer, base.eos_ids, sources))
    loaded["model"] = base, params
    _check_sampling(options, specs, base)
    reader = reader._replace(form=format_of(options.text, tokenizer, base.eos_ids), lm=base)
    everything = prompt_batch(texts.ids)
    scorers = loading.scorers(scored, loaded, reader, everything, options.max_new_tokens, dtype=options.dtype)
    setting = Setting(options, loaded, scorers.get("reward"), texts, reader)
    with telling():  # a default threshold scores responses
        plans = {spec: METHODS[spec.kind](setting, spec) for spec in specs}
    if options.deterministic:
        plans = {spec: [engine.in_chunks(m, options.deterministic) for m in plan] for spec, plan in plans.items()}
    every = [(method.name, method.beta) for plan in plans.values() for method in plan]
    if twice := {str(key) for key in every if every.count(key) > 1}:
        raise ValueError(f"method: expected each method and strength once, found {sorted(twice)} twice")
    for plan in plans.values():
        for method in plan:
            method.check(everything)
    embed: Embed | None = rewards.program(options.embedding, name="embedding") if options.embedding else None
    watch = streaming.streamer(texts, functools.partial(print, end="", flush=True)) if options.stream else None
    stepwise = _base_steps(setting) if options.inspect else None
    with _runs.locked(out):
        records: list[Record] = []
        speeds: list[Record] = []
        for spec, plan in plans.items():
            folder, found = _decode(options, spec, plan, scorers, texts, embed, watch)
            records += found
            if stepwise is not None:
                inspection.inspect(
                    plan,
                    stepwise,
                    scorers.get("reward"),
                    texts,
                    folder,
                    count=options.inspect,
                    batch_size=options.batch_size,
                    mesh=options.mesh,
                    seed=options.seed,
                )
            speeds += json.loads((folder / "summary.json").read_text())
        rows = results.summarise(records)
        known = {(row["method"], row["beta"]): row["tokens_per_second"] for row in speeds}
        for row in rows:
            row["tokens_per_second"] = known[row["method"], row["beta"]]
        _io.write_json(out / results.TABLE, rows)
        written = str(out / results.TABLE)
        if not quiet and _hosts.is_first():
            if scorers:
                plots.frontier(rows, out / results.PICTURE)
                written += f" and {out / results.PICTURE}"
            results.print_table(rows)
            if unread := _unread(options, specs):
                print(f"note: no method of this run reads {', '.join(unread)}")
        print(f"wrote {written} ({len(records)} responses)")
        return rows


def _base_steps(setting: Setting) -> engine.Stepwise:
    """The base, along which the responses of methods are read that draw from no Policy of their own."""
    (method,) = METHODS["base"](setting, parse_method("base"))
    assert method.stepwise is not None
    return method.stepwise


def _read_prompts(options: DecodeOptions, form: TextFormat) -> encoded.Loaded:
    """The prompts as token ids (`reading.read_prompts`)."""
    room = models.read_config(options.model).max_length - options.max_new_tokens
    return reading.read_prompts(options.prompts, form, text=options.text, room=room)


def check(options: DecodeOptions) -> list[Spec]:
    """Checks what needs no file.

    Returns:
      The methods, the base first.

    Raises:
      ValueError: names the option.
    """
    check_options(options)
    loading.other_models(options.with_model)
    if options.inspect < 0:
        raise ValueError(f"inspect: expected at least 0 prompts, found {options.inspect}")
    for name in ("inspect", "stream"):
        if getattr(options, name) and _hosts.count() > 1:
            raise ValueError(f"{name}: expected one process, found {_hosts.count()}")
    if options.stream and options.draft:
        raise ValueError("stream: expected no --draft, which draws several tokens at a time, found both")
    for name in ("stream", "mesh"):
        if options.deterministic and getattr(options, name):
            raise ValueError(f"{name}: expected none with --deterministic, found {getattr(options, name)!r}")
    first = ("base",) if options.include_base or "base" in options.method else ()
    specs = [parse_method(text) for text in dict.fromkeys((*first, *options.method))]
    if not specs:
        raise ValueError("method: expected something to decode, found no method and no base")
    reward = rewards.reward_roles(options.reward, name="reward")
    for name in SCORED[1:]:
        rewards.reward_roles(getattr(options, name), name=name)
    for spec in specs:
        if spec.needs_reward and not options.reward:
            raise ValueError(f"reward: expected a reward, which {spec.text} maximises, found none")
        if spec.kind == "ggro" and "reward" not in reward:
            raise ValueError(
                f"reward: expected the folder of a reward model, whose gradient ggro reads, found {options.reward!r}"
            )
        if KINDS[spec.kind].draws == "several" and options.temperature == 0:
            raise ValueError(f"temperature: expected one > 0 for {spec.text}, whose greedy draws are equal, found 0")
        if KINDS[spec.kind].draws == "untempered" and options.temperature != 1:
            raise ValueError(f"temperature: expected 1 for {spec.text}, found {options.temperature}")
        if options.draft and "draft" not in spec.reads:
            raise ValueError(
                f"draft: expected methods that sample from one policy (base, policy:DIR, critics), found {spec.text}"
            )
        if options.draft == "below" and spec.kind == "policy":
            raise ValueError(f'draft: expected a folder for {spec.text}, which is no tilt of the base, found "below"')
    if options.draft == "below" and (options.temperature != 1 or options.generation_config):
        raise ValueError('draft: expected a folder beside --temperature and --generation-config, found "below"')
    slugs = [spec.slug for spec in specs]
    if len(set(slugs)) < len(slugs):
        raise ValueError(f"method: expected folders of different names for each kind, found {options.method}")
    return specs


def _check_sampling(options: DecodeOptions, specs: Sequence[Spec], base: models.LanguageModel) -> None:
    """ValueErrors for a generation_config.json that the methods cannot follow."""
    if not options.generation_config:
        return
    if not base.config.generation:
        raise ValueError(f"generation_config: expected fields in {options.model}/generation_config.json, found none")
    sampling = policies.read_generation_config(base.config.generation)
    if options.temperature != 1:
        raise ValueError(
            f"temperature: expected none beside --generation-config, which has {sampling.temperature}, found "
            f"{options.temperature}"
        )
    for spec in specs:
        if KINDS[spec.kind].draws == "several" and sampling.temperature == 0:
            raise ValueError(f"generation_config: expected one that draws for {spec.text}, found a greedy one")
        if KINDS[spec.kind].draws == "untempered" and sampling != policies.Sampling():
            raise ValueError(f"generation_config: expected none for {spec.text}, found {sampling}")


SOME_READ = {name for kind in (*KINDS.values(), *CRITICS.values()) for name in kind.reads}
"""Options that some kinds read and others do not."""


def _unread(options: ResponseOptions, specs: Sequence[Spec]) -> list[str]:
    """Options that are given and that no method reads."""
    unread = SOME_READ - {name for spec in specs for name in spec.reads}
    fields = [field for field in dataclasses.fields(ResponseOptions) if field.name in unread]
    return ["--" + f.name.replace("_", "-") for f in fields if getattr(options, f.name) != f.default]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _MethodOptions(ResponseOptions):
    """What decides the responses in a method's folder."""

    method: str


def _decode(
    options: DecodeOptions,
    spec: Spec,
    plan: list[Method],
    scorers: dict[str, loading.Scorer],
    texts: Texts,
    embed: Embed | None,
    watch: engine.Watch | None,
) -> tuple[pathlib.Path, list[Record]]:
    """A method's folder and records, decoded unless they are there."""
    # An option that this method does not read may change without harm to its responses.
    unread = SOME_READ - spec.reads
    shared = {f.name: getattr(options, f.name) for f in dataclasses.fields(ResponseOptions) if f.name not in unread}
    # Not the prompts: their texts are compared with those of the responses.
    inputs = [options.model, *spec.folders.values()]
    if options.draft not in ("", "below") and "draft" in spec.reads:
        inputs.append(options.draft)
    for name in SCORED:
        inputs += rewards.reward_inputs(getattr(options, name), name=name)
    # Responses and their numbers belong to the code as it was.
    if spec.kind == "function":
        inputs += rewards.program_files(spec.target, name="method")
    if options.embedding:
        inputs += rewards.program_files(options.embedding, name="embedding")
    stored = _MethodOptions(**shared, method=spec.text)
    read = [folder for name in inputs for folder in models.source_folders(name)]
    folder = _runs.open_run(str(pathlib.Path(options.out) / spec.slug), stored, inputs=read)
    final = folder / "responses.jsonl"
    speed = engine.decode(
        plan,
        scorers,
        texts,
        final,
        batch_size=options.batch_size,
        mesh=options.mesh,
        seed=options.seed,
        embed=embed,
        watch=watch,
    )
    records = results.read(final)
    results.check_texts(records, texts.texts, final, expected=len(plan) * len(texts.texts))
    rows = results.summarise(records)
    results.add_speed(rows, speed, folder / "summary.json")
    _io.write_json(folder / "summary.json", rows)
    _hosts.barrier("decode: summary")  # which is read from the file
    return folder, records
