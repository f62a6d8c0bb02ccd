"""What the training scripts share: options, a model to start from, the run around `training.fit`, its results."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign import _io, models, training
from jaxalign.data import batches, encoded, preferences
from jaxalign.data.text_options import TextOptions, check_text_options, format_of
from jaxalign.models import sharding
from jaxalign.prompts import bucket
from jaxalign.tokens import TextFormat
from jaxalign.training.measure import check_rows, checked_collate
from jaxalign.training.step import Loss
from jaxalign.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Options of every training script."""

    out: str
    """Run folder: model/ (Hugging Face form), summary.json, metrics.jsonl, tensorboard/, checkpoints/, config.json."""
    model: str = ""
    """Hugging Face folder (or hub name) to start from: weights, config and tokenizer. An adapter's folder stands for
    the merged model, ADAPTER_DIR@BASE_DIR for the adapter on another base."""
    architecture: str = ""
    """In place of --model: a config.json to start from with random weights; its vocabulary size is the tokenizer's."""
    tokenizer: str = ""
    """Folder of a tokenizer, with --architecture."""
    max_length: int = 256
    """Longest row [tokens], prompt and response; longer prompts lose their beginning."""
    epochs: float = 1.0
    """Passes over the training rows."""
    steps: int = 0
    """Optimizer steps in place of --epochs; 0: not used."""
    batch_size: int = 32
    """Rows (pairs) per optimizer step."""
    accumulate: int = 1
    """Micro-batches that a batch is run in, a divisor of --batch-size: memory of one, gradient of all."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls on a cosine to a tenth."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    validation: float = 0.05
    """Share of the prompts held out for the figures in summary.json, chosen by a hash of the prompt."""
    skip_bad: bool = False
    """Skip and count bad rows of the data, in place of an error."""
    save_every: int = 200
    """Optimizer steps between checkpoints."""
    log_every: int = 10
    """Optimizer steps between lines of metrics.jsonl."""
    seed: int = 0
    """Seed of new weights, of the split and of the order of rows."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of the weights as they are used; master weights, sums and rewards stay float32."""
    mesh: str = ""
    """data=N: N devices share each micro-batch; N divides --batch-size / --accumulate."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""
    text: TextOptions = dataclasses.field(default_factory=TextOptions)
    """How texts and chats become tokens."""


class Start(NamedTuple):
    """A model to train. params: float32 masters; tokenizer: transformers'."""

    lm: models.LanguageModel
    params: Params
    tokenizer: Any


class Data(NamedTuple):
    """Rows of a script's data, split by prompt. skipped: bad rows left out; reasons: of the first of them;
    counts: rows that were cut, left out or noted (`encoded.describe`); taught: ids in which responses end."""

    train: Sequence[Any]
    validation: Sequence[Any]
    skipped: int
    reasons: Sequence[str]
    counts: Mapping[str, int] = {}
    taught: tuple[int, ...] = ()


def check_training_options(config: TrainingOptions) -> None:
    """Value checks that need no file. ValueErrors name the option."""
    for name in ("epochs", "learning_rate", "clip"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name}: expected a finite value > 0, found {getattr(config, name)}")
    for name, low in (("steps", 0), ("batch_size", 1), ("save_every", 1), ("log_every", 1), ("max_length", 2)):
        if getattr(config, name) < low:
            raise ValueError(f"{name}: expected at least {low}, found {getattr(config, name)}")
    for name in ("warmup", "validation"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: expected a share in [0, 1), found {getattr(config, name)}")
    if not 0 <= config.weight_decay < math.inf:
        raise ValueError(f"weight_decay: expected a finite value >= 0, found {config.weight_decay}")
    if config.accumulate < 1 or config.batch_size % config.accumulate:
        raise ValueError(f"accumulate: expected a divisor of batch_size {config.batch_size}, found {config.accumulate}")
    if bool(config.model) == bool(config.architecture):
        raise ValueError(
            "model: expected either --model or --architecture, found " + ("both" * bool(config.model) or "neither")
        )
    if bool(config.architecture) != bool(config.tokenizer):
        raise ValueError("tokenizer: expected with --architecture, and only there")
    check_text_options(config.text)
    mesh = sharding.make_mesh(config.mesh)
    if mesh is not None and (config.batch_size // config.accumulate) % mesh.size:
        raise ValueError(
            f"mesh: expected a divisor of batch_size / accumulate = {config.batch_size // config.accumulate}, "
            f"found {config.mesh!r}"
        )


def start(config: TrainingOptions, head: Callable[[models.Config], models.Head | None]) -> Start:
    """The model of --model or --architecture with the head that `head` gives for it: its own weights where it has them,
    else new ones from the seed. ValueError: a tokenizer that does not fit, a context shorter than --max-length."""
    rng, head_rng = jax.random.split(jax.random.key(config.seed))
    if config.architecture:
        tokenizer = models.tokenizer(config.tokenizer, chat_template=config.text.chat_template)
        path = pathlib.Path(config.architecture)
        if not path.is_file():
            raise ValueError(f"architecture: expected a config.json, found no file {path}")
        eos = tokenizer.eos_token_id
        values = json.loads(path.read_text()) | {"vocab_size": len(tokenizer), "eos_token_id": eos}
        body = models.LanguageModel(models.config_from_hf(values))
        lm = models.with_head(body, head(body.config))
        params = lm.init(rng)
    else:
        tokenizer = models.tokenizer(config.model, chat_template=config.text.chat_template)
        lm, params = models.load(config.model)
        if head(lm.config) != lm.config.head:
            lm, params = replace_head(lm, params, head(lm.config), head_rng)
    models.check_rows(tokenizer, lm.vocab_size)
    if config.max_length > lm.max_length:
        raise ValueError(
            f"max_length: expected at most the model's context of {lm.max_length}, found {config.max_length}"
        )
    reads = with_tokenizer_pad(lm.config, tokenizer)
    return Start(models.LanguageModel(reads, config.dtype), params, tokenizer)


def with_tokenizer_pad(config: models.Config, tokenizer: Any) -> models.Config:
    """The config of a reward model with the pad id that its texts are padded with: the tokenizer's, or its own where
    the tokenizer has none. A model without a reward head keeps its config.

    A reward model is trained at the token at which transformers reads it by that id (`models.read_index`), so that the
    saved folder has one meaning: with an EOS as pad id that is the token before the end of a response. Where neither
    has a pad id none is written: transformers then scores one text at a time, at its last token. What comes of it is
    told in one line.
    """
    if config.head is None or config.head.kind != "reward":
        return config
    pad = config.pad_id if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
    if pad is None:
        print("reward model: no pad id in tokenizer and config; transformers will score one text at a time")
    elif pad in {*config.eos_ids, tokenizer.eos_token_id}:
        print(f"reward model: the pad id {pad} is an EOS; the model is trained and read at the token before it")
    elif config.pad_id not in (None, pad):
        print(f"reward model: the tokenizer's pad id {pad} takes the place of the config's {config.pad_id}")
    return dataclasses.replace(config, pad_id=pad)


def replace_head(
    lm: models.LanguageModel, params: Params, head: models.Head | None, rng: jax.Array
) -> tuple[models.LanguageModel, Params]:
    """The same transformer under another head with new weights; lm_head stays or goes as the head's kind says.
    ValueError: a language model is asked of a classifier, which has no lm_head."""
    new = models.with_head(lm, head)
    if new.has_lm_head and not lm.has_lm_head:
        raise ValueError("model: expected a language model, found a sequence classifier without lm_head")
    wanted = jax.eval_shape(new.init, rng)
    body = {name: params["transformer"][name] for name in wanted["transformer"]}
    return new, {"transformer": body} | ({} if head is None else {"head": new.init_head(rng)})


def form_of(config: TrainingOptions, begin: Start) -> TextFormat:
    """How the job's texts become tokens. ValueError for a tokenizer without an end of a response."""
    form = format_of(config.text, begin.tokenizer, begin.lm.eos_ids)
    if not form.closing:
        raise ValueError("tokenizer: expected an EOS token, which ends each response, found none (--eos-token)")
    return form


def with_taught(begin: Start, data: Data) -> Start:
    """The model whose EOS ids hold those in which the data's responses end: what is taught to end a response ends
    generation. An id that is added is told."""
    known = begin.lm.eos_ids
    added = [i for i in data.taught if i not in known]
    if not added:
        return begin
    words = ", ".join(f"{begin.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in added)
    print(f"responses end in {words}, which joins the model's EOS ids {list(known)}", flush=True)
    config = dataclasses.replace(begin.lm.config, eos_ids=(*known, *added))
    return begin._replace(lm=dataclasses.replace(begin.lm, config=config))


def split(loaded: encoded.Loaded, config: TrainingOptions) -> Data:
    """Train and validation rows; --validation 0 leaves the second empty. What was cut or left out is told."""
    for line in encoded.describe(loaded.counts):
        print(line, flush=True)
    if config.validation == 0:
        return Data(loaded.rows, [], loaded.skipped, loaded.reasons, loaded.counts, loaded.taught)
    train, validation = preferences.split_by_prompt(loaded.rows, fraction=config.validation, seed=config.seed)
    return Data(train, validation, loaded.skipped, loaded.reasons, loaded.counts, loaded.taught)


def row_length(config: TrainingOptions, lengths: Sequence[int]) -> int:
    """Tokens that a batch's rows are padded to: the bucket of the longest, so that few shapes are compiled."""
    return min(bucket(max(lengths), smallest=32), config.max_length)


def run(
    config: TrainingOptions,
    begin: Start,
    data: Data,
    loss: Loss,
    collate: Callable[[list[Any]], Any],
    *,
    stage: str,
    out: pathlib.Path,
    frozen: Params = None,
) -> Params:
    """Trains and gives the parameters, float32; resumes from the run folder."""
    steps = config.steps or max(1, math.ceil(config.epochs * len(data.train) / config.batch_size))
    optimizer, schedule = training.adamw(
        learning_rate=config.learning_rate,
        steps=steps,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
    )
    mesh = sharding.make_mesh(config.mesh)
    params = jax.tree.map(jnp.array, begin.params)  # a copy, which the steps may take
    state = training.create(params, optimizer)
    place: Callable[[Any], Any] = lambda batch: batch  # noqa: E731
    if mesh is not None:
        everywhere, by_row = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "data"))
        # Moments are kept as their parameters are.
        state = jax.device_put(state, everywhere)._replace(params=sharding.shard(params, mesh))
        frozen = None if frozen is None else sharding.shard(frozen, mesh)
        place = lambda batch: jax.device_put(batch, by_row)  # noqa: E731
    source = batches.batches(
        data.train,
        checked_collate(collate),
        batch_size=config.batch_size,
        seed=config.seed,
        accumulate=config.accumulate,
    )
    position = {"seed": config.seed, "batch_size": config.batch_size, "rows": batches.fingerprint(data.train)}
    final = training.fit(
        training.train_step(loss, optimizer, schedule=schedule, donate=True),
        state,
        source,
        steps=steps,
        out=out,
        stage=stage,
        position=position,
        frozen=frozen,
        place=place,
        donate=True,
        save_every=config.save_every,
        log_every=config.log_every,
    )
    return jax.device_get(final.params)


def evaluate(
    f: Callable[[Params, Any], Any], params: Params, rows: Sequence[Any], collate: Callable[[list[Any]], Any], size: int
) -> Any:
    """f(params, batch), a tree of arrays [b,...], of all rows, in batches of `size` filled up with the last row."""
    compiled, pad = jax.jit(f), checked_collate(collate)
    parts = []
    for part in iterate(rows, size):
        found = compiled(params, pad(part + [part[-1]] * (size - len(part))))
        check_rows(getattr(f, "__name__", "f"), found, size)
        parts.append(first_rows(found, len(part)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def first_rows(tree: Any, count: int) -> Any:
    """The first rows of every array, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[:count], tree)


def finish(
    out: pathlib.Path, begin: Start, params: Params, data: Data, summary: dict[str, Any], following: str
) -> dict[str, Any]:
    """Writes model/ and summary.json, says so, and names the next command. summary.json comes last: where it is, the
    run is whole."""
    lm = models.LanguageModel(with_taught(begin, data).lm.config, "float32")
    models.save(out / "model", lm, params, tokenizer=begin.tokenizer, overwrite=True)
    rows = {"rows": len(data.train), "validation_rows": len(data.validation), "skipped_rows": data.skipped}
    summary = rows | dict(data.counts) | summary
    _io.write_json(out / "summary.json", summary)
    for reason in data.reasons:
        print(f"skipped {reason}")
    report(out, summary, following)
    return summary


def report(out: pathlib.Path, summary: dict[str, Any], following: str, *, product: str = "model") -> None:
    """The figures, and as the last line what was written and what comes next."""
    show(summary)
    print(f"wrote {out / product} and {out / 'summary.json'}; next: {following}", flush=True)


def show(summary: dict[str, Any]) -> None:
    """One line per figure."""
    for name, value in summary.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def finished(out: pathlib.Path) -> dict[str, Any] | None:
    """The summary of a run that is whole, None otherwise."""
    path = out / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def interval(values: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """(mean, 95 % half-width) as floats for JSON, Nones without values."""
    from jaxalign import metrics

    if len(values) < 2:
        return None, None
    found = metrics.mean_interval(values)
    return found.mean, found.half_width


def iterate(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive parts of at most `size` rows."""
    for begin in range(0, len(rows), size):
        yield list(rows[begin : begin + size])
