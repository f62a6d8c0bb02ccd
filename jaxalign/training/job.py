"""What the training scripts share: a model to start from, rows that are split, figures, and what a run leaves."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import _hosts, _io, _runs, _signals, models
from jaxalign._checks import check_language_model
from jaxalign.data import encoded, preferences
from jaxalign.data.text_options import TextOptions, format_of, token_id
from jaxalign.models import sharding
from jaxalign.models.hf import files, weight_files
from jaxalign.prompts import bucket
from jaxalign.tokens import TextFormat
from jaxalign.training import dry_run, profiling, states
from jaxalign.training.measure import check_rows, checked_collate
from jaxalign.training.options import DType, ModelOptions
from jaxalign.types import Params


class StartedModel(NamedTuple):
    """A model to train."""

    lm: models.LanguageModel
    """The model, which computes in the run's type."""
    params: Params
    """Its parameters: float32 masters of what is trained; the rest may be of the run's type."""
    tokenizer: Any
    """Its tokenizer, transformers'."""


class Data(NamedTuple):
    """Rows of a script's data, split by prompt."""

    train: Sequence[Any]
    """Rows that are trained on."""
    validation: Sequence[Any]
    """Rows that are held out."""
    skipped: int
    """Number of bad rows that were left out."""
    reasons: Sequence[str]
    """Why, for the first of them."""
    counts: Mapping[str, int] = {}
    """Kind -> number of rows that were cut, left out or noted (`encoded.describe`)."""
    taught: tuple[int, ...] = ()
    """Token ids in which responses end."""


def start(
    options: ModelOptions,
    head: Callable[[models.Config], models.Head | None],
    *,
    seed: int,
    dtype: DType,
    max_length: int,
    chat_template: str = "",
    eos_token: str = "",
    mesh: str = "",
    shapes_only: bool = False,
    trained: bool = True,
) -> StartedModel:
    """Loads or makes the model to train.

    Args:
      options: --model, or --architecture and --tokenizer.
      head: config -> the head that the model has to have; its own weights are kept where it has them.
      seed: of new weights.
      dtype: type that the model computes in.
      max_length: longest row [tokens].
      chat_template: name of one of the tokenizer's several chat templates, or "".
      eos_token: the token, or its id, that becomes the tokenizer's EOS, with which it is saved; "" leaves its own.
      mesh: devices that the parameters lie on, as `sharding.make_mesh` reads it.
      shapes_only: for a dry run: shapes stand for the parameters, and no weights are read.
      trained: whether the model's own weights are trained. Where they are not, those of a folder are read in `dtype`,
        all but the head.

    Returns:
      Model, parameters and tokenizer. What is trained is float32.

    Raises:
      ValueError: a tokenizer that does not fit, a context shorter than `max_length`, a --model that is no language
        model where one is trained.
    """
    rng, head_rng = jax.random.split(jax.random.key(seed))
    devices = sharding.make_mesh(mesh)
    if options.architecture:
        tokenizer = _with_end(models.tokenizer(options.tokenizer, chat_template=chat_template), eos_token)
        path = pathlib.Path(options.architecture)
        if not path.is_file():
            raise ValueError(f"architecture: expected a config.json, found no file {path}")
        values, eos = files.read_json(path), tokenizer.eos_token_id
        values |= {"vocab_size": len(tokenizer), "eos_token_id": eos}
        body = models.LanguageModel(models.config_from_hf(values))
        lm = models.with_head(body, head(body.config))
        params = jax.eval_shape(lm.init, rng) if shapes_only else states.initial(lm, rng, devices)
    else:
        tokenizer = _with_end(models.tokenizer(options.model, chat_template=chat_template), eos_token)
        load = dry_run.load_shapes if shapes_only else functools.partial(models.load, mesh=devices)
        lm, params = load(options.model, dtype="float32" if trained else dtype)
        wanted = head(lm.config)
        if wanted is None:
            check_language_model("model", lm, options.model)
        if wanted != lm.config.head:
            lm, params = states.replace_head(lm, params, wanted, head_rng)
            params = params if devices is None or shapes_only else sharding.shard(params, devices)
        elif wanted is not None and not trained and not shapes_only:
            params = states.with_stored_head(params, options.model, devices)
    models.check_rows(tokenizer, lm.vocab_size)
    if max_length > lm.max_length:
        raise ValueError(f"max_length: expected at most the model's context of {lm.max_length}, found {max_length}")
    reads = with_tokenizer_pad(lm.config, tokenizer)
    return StartedModel(models.LanguageModel(reads, dtype, devices), params, tokenizer)


def _with_end(tokenizer: Any, eos_token: str) -> Any:
    """The tokenizer, whose EOS is the token of --eos-token where one is given."""
    if eos_token:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token_id(tokenizer, eos_token))
    return tokenizer


def with_tokenizer_pad(config: models.Config, tokenizer: Any) -> models.Config:
    """Gives a reward model the pad id that its texts are padded with: the tokenizer's, or its own where the tokenizer
    has none. A model without a reward head keeps its config.

    A reward model is trained at the token at which transformers reads it by that id (`models.read_index`), so that the
    saved folder has one meaning: with an EOS as pad id that is the token before the end of a response. Where neither
    has a pad id none is written: transformers then scores one text at a time, at its last token. One printed line says
    what is done.

    Args:
      config: of the model.
      tokenizer: its tokenizer.

    Returns:
      The config with that pad id.
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


def form_of(text: TextOptions, started: StartedModel) -> TextFormat:
    """How the job's texts become tokens. ValueError for a tokenizer without an end of a response."""
    form = format_of(text, started.tokenizer, started.lm.eos_ids)
    if not form.closing:
        raise ValueError("tokenizer: expected an EOS token, which ends each response, found none (--eos-token)")
    return form


def with_taught(started: StartedModel, data: Data) -> StartedModel:
    """Adds the ids in which the data's responses end to the model's EOS ids: what is taught to end a response ends
    generation.

    Args:
      started: the model.
      data: `taught` is read.

    Returns:
      The model with those ids; each one that is added is printed.
    """
    known = started.lm.eos_ids
    added = [i for i in data.taught if i not in known]
    if not added:
        return started
    words = ", ".join(f"{started.tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in added)
    print(f"responses end in {words}, which joins the model's EOS ids {list(known)}", flush=True)
    config = dataclasses.replace(started.lm.config, eos_ids=(*known, *added))
    return started._replace(lm=dataclasses.replace(started.lm, config=config))


def split(loaded: encoded.Loaded, *, validation: float, seed: int) -> Data:
    """Splits rows by prompt into those to train on and those held out, and tells what was cut or left out.

    Args:
      loaded: the rows.
      validation: share of the prompts that is held out, in [0, 1); 0 leaves the second part empty.
      seed: of the split.

    Returns:
      The rows in their order, split, with what is known of those that were left out.
    """
    for line in encoded.describe(loaded.counts):
        print(line, flush=True)
    if validation == 0:
        return Data(loaded.rows, [], loaded.skipped, loaded.reasons, loaded.counts, loaded.taught)
    train, held_out = preferences.split_by_prompt(loaded.rows, fraction=validation, seed=seed)
    return Data(train, held_out, loaded.skipped, loaded.reasons, loaded.counts, loaded.taught)


def row_length(lengths: Sequence[int], max_length: int) -> int:
    """Tokens that a batch's rows are padded to: the bucket of the longest, so that few shapes are compiled."""
    return min(bucket(max(lengths), smallest=32), max_length)


def evaluate(
    f: Callable[[Params, Any], Any], params: Params, rows: Sequence[Any], collate: Callable[[list[Any]], Any], size: int
) -> Any:
    """Applies a function to all rows, in batches that are filled up with the last row.

    Args:
      f: f(params, batch) -> a tree of arrays [b,...]; it is jitted.
      params: its parameters. Where they lie on a mesh whose data and fsdp axes divide b, so do the rows of a batch:
        each device, and of several processes each, reads its share.
      rows: all rows.
      collate: a list of b rows -> a tree of arrays [b,...].
      size: b, rows of a batch.

    Returns:
      The tree of arrays [rows,...], on the host.

    Raises:
      ValueError: `f` or `collate` gives arrays of another number of rows.
    """
    compiled, pad = jax.jit(f), checked_collate(collate)
    if dry_run.is_abstract(params):  # numbers that nothing reads before the dry run ends
        shapes = jax.eval_shape(f, params, pad(list(rows[:1])))
        return jax.tree.map(lambda x: np.full((len(rows), *x.shape[1:]), 0.5, x.dtype), shapes)
    devices = sharding.mesh_of(params)
    place: Callable[[Any], Any] = lambda batch: batch  # noqa: E731
    if devices is not None and size % sharding.row_devices(devices) == 0:
        place = lambda batch: _hosts.put(batch, sharding.batch_sharding(devices))  # noqa: E731
    parts = []
    for part in iterate(rows, size):
        _signals.check()
        found = compiled(params, place(pad(part + [part[-1]] * (size - len(part)))))
        check_rows(getattr(f, "__name__", "f"), found, size)
        parts.append(first_rows(found, len(part)))
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def first_rows(tree: Any, count: int) -> Any:
    """The first rows of every array, on the host."""
    return jax.tree.map(lambda x: x[:count], _hosts.host_value(tree))


def finish(
    out: pathlib.Path,
    started: StartedModel,
    params: Params,
    data: Data,
    summary: dict[str, Any],
    following: str,
    beside: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes model/ and summary.json, and prints the figures and the next command.

    Args:
      out: the run folder.
      started: its model and tokenizer are written.
      params: the trained parameters.
      data: its numbers of rows go into the summary.
      summary: figures of the run.
      following: the command that comes next.
      beside: name of a further JSON file in model/ -> what it holds.

    Returns:
      The summary as it is written, last of all: where summary.json is, the run is whole.
    """
    lm = models.LanguageModel(with_taught(started, data).lm.config, "float32")
    check_converged(params, summary, out)
    models.save(out / "model", lm, params, tokenizer=started.tokenizer, overwrite=True)
    for name, value in (beside or {}).items():
        _io.write_json(out / "model" / name, value)
    rows = {"rows": len(data.train), "validation_rows": len(data.validation), "skipped_rows": data.skipped}
    summary = rows | dict(data.counts) | summary
    _io.write_json(out / "summary.json", summary)
    for reason in data.reasons:
        print(f"skipped {reason}")
    report(out, summary, following)
    return summary


def check_converged(params: Params, summary: Mapping[str, Any], out: pathlib.Path) -> None:
    """Checks that a trained model and its figures are finite, before anything is written.

    Args:
      params: the trained parameters; what is read from folders is not looked at.
      summary: figures of the run.
      out: the run folder, for the error.

    Raises:
      FloatingPointError: it names the first that is not.
    """
    bad = [name for name, value in summary.items() if isinstance(value, float) and not np.isfinite(value)]
    arrays = {k: x for k, x in jax.tree_util.tree_leaves_with_path(params) if isinstance(x, jax.Array)}
    finite = _all_finite(list(arrays.values()))
    bad += [jax.tree_util.keystr(k, simple=True, separator="/") for k, f in zip(arrays, finite, strict=True) if not f]
    if bad:
        raise FloatingPointError(
            f"{bad[0]}: expected a finite value after the last step, found another; the run in {out} has diverged and "
            "no model is written: name another --out, with a smaller --learning-rate"
        )


def _all_finite(arrays: list[jax.Array]) -> np.ndarray:
    """Whether each array is finite, [number]."""
    if not arrays:
        return np.ones(0, bool)
    found: np.ndarray = _hosts.host_value(
        jax.jit(lambda every: jnp.stack([jnp.isfinite(x).all() for x in every]))(arrays)
    )
    return found


def report(out: pathlib.Path, summary: dict[str, Any], following: str, *, product: str = "model") -> None:
    """Prints the figures, and as the last line what was written (`product`, in `out`) and what comes next."""
    _runs.release(out)
    show(summary)
    product = f"{out / product}, {out / profiling.FOLDER}" if (out / profiling.FOLDER).is_dir() else str(out / product)
    print(f"wrote {product} and {out / 'summary.json'}; next: {following}", flush=True)


def show(summary: dict[str, Any]) -> None:
    """Prints a line per figure."""
    for name, value in summary.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")


def finished(out: pathlib.Path, *, product: str = "model", beside: Sequence[str] = ()) -> dict[str, Any] | None:
    """The summary of a run that is whole, None otherwise.

    Args:
      out: the run folder.
      product: what the run writes in it; "model" has to be whole.
      beside: names of what has to be there beside it.

    Returns:
      What summary.json holds; None without one, and where the run is to go on with more steps.

    Raises:
      ValueError: a damaged summary.json, or one without the product of the run.
    """
    path, text = out / "summary.json", ""
    with _hosts.together():  # of several processes the first looks, since it also writes
        if _hosts.is_first() and path.exists() and not _runs.goes_on(out):
            again = "the same command goes on from the last checkpoint or shard"
            text, then = json.dumps(_io.read_json(path, then=f"remove that file: {again}")), f"remove {path}: {again}"
            if gone := [name for name in (product, *beside) if not (out / name).exists()]:
                raise ValueError(f"out: expected {gone[0]} of the finished run in {out}, found none; {then}")
            if product == "model" and (part := weight_files.lacking(out / product)):
                raise ValueError(f"out: expected a whole model of the finished run in {out}, found no {part}; {then}")
    text = _hosts.from_first(text)
    return json.loads(text) if text else None


def interval(values: np.ndarray) -> tuple[float, float] | tuple[None, None]:
    """Gives (mean, 95 % half-width) as floats for JSON, Nones for fewer than two values."""
    from jaxalign import metrics

    if len(values) < 2:
        return None, None
    found = metrics.mean_interval(values)
    return found.mean, found.half_width


def iterate(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    """Gives consecutive parts of at most `size` rows."""
    for first in range(0, len(rows), size):
        yield list(rows[first : first + size])
