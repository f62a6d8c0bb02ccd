"""Groups of options that training scripts are composed of, each with its check.

A script's `Config` is a frozen dataclass whose fields are such groups, beside options of its own; on the command line
and in config.json their options lie side by side. Functions take the groups that they read, never a whole config.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Protocol

from jaxalign import models
from jaxalign._checks import check_at_most
from jaxalign.data.text_options import TextOptions, check_text_options
from jaxalign.models import sharding
from jaxalign.training.tracking import Track, check_track

DType = Literal["float32", "bfloat16"]
Remat = Literal["auto", "none", "dots", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The run folder, and what holds for all of the run."""

    out: str
    """Run folder: config.json, summary.json, and what the job makes: model/ (Hugging Face form) with metrics.jsonl,
    tensorboard/ and checkpoints/, or a table of rewards with its rollouts/."""
    seed: int = 0
    """Seed of new weights, of the split, of the order of rows and of all draws."""
    dtype: DType = "float32"
    """Type of activations and of the weights as they are used; master weights, sums and rewards stay float32."""
    dry_run: bool = False
    """Compile the training step on shapes alone, for simulated devices where --mesh has more than there are, and say
    what it needs of each device. Configs, tokenizers and data are read, no weights; nothing is written."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that is trained."""

    model: str = ""
    """Hugging Face folder (or hub name) to start from: weights, config and tokenizer. An adapter's folder stands for
    the merged model, ADAPTER_DIR@BASE_DIR for the adapter on another base. Of a job with --base: that, by default."""
    architecture: str = ""
    """In place of --model: a config.json to start from with random weights; its vocabulary size is the tokenizer's."""
    tokenizer: str = ""
    """Folder of a tokenizer, with --architecture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOptions:
    """The rows that a model is trained on."""

    max_length: int = 256
    """Longest row [tokens], prompt and response; a longer prompt is cut after its header, a longer roll-out is an
    error."""
    validation: float = 0.05
    """Share of the prompts held out for the figures in summary.json, chosen by a hash of the prompt; 0: none."""
    skip_bad: bool = False
    """Skip and count bad rows of the data, in place of an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How long and how fast the model is trained."""

    epochs: float = 1.0
    """Passes over the training rows."""
    steps: int = 0
    """Optimizer steps (of train.rl: iterations) in place of --epochs; 0: not used."""
    batch_size: int = 32
    """Rows per optimizer step: texts, pairs, or prompts with all their roll-outs; of train.rl prompts per iteration."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; small models take more."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; it then falls on a cosine to a tenth."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices."""
    clip: float = 1.0
    """Largest global norm of a gradient."""
    save_every: int = 200
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    track: Track = "tensorboard"
    """Where the metrics go beside metrics.jsonl: tensorboard/ of the run folder, wandb or trackio (to be installed;
    their own environment variables say where to), or none."""
    profile: int = 0
    """Steps, after the first three, of which jax's profiler writes a trace to profile/ of the run folder; 0: none."""
    peak_tflops: float = 0.0
    """Most 10^12 operations per second of a device, by which metrics tell MFU. 0: that of its data sheet in bfloat16
    (A100, H100, TPU v5 and others), else none: MFU is left out. Of train.rl roll-outs and updates count, a reward's
    model does not."""

    def steps_for(self, rows: int) -> int:
        """Steps of a run over that many training rows."""
        return self.steps or max(1, math.ceil(self.epochs * rows / self.batch_size))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How an optimizer step is divided over time and devices, and what it keeps in memory."""

    accumulate: int = 1
    """Micro-batches that the rows of an optimizer step are run in, a divisor of their number: memory of one, gradient
    of all."""
    mesh: str = ""
    """Devices by axis, data=N or as in data=2,fsdp=4,tensor=2, -1 for the rest of them: data and fsdp share each
    micro-batch, fsdp and tensor the parameters (docs/scale.md). "": one device."""
    remat: Remat = "auto"
    """What the backward pass keeps of each layer: none: all that it reads; dots: products by weights; full: the layer's
    input alone, which computes each layer twice; auto: full where an accelerator's memory is less than the estimate."""

    device_memory: float = 0.0
    """With --dry-run: memory of a device [GB], of which it says whether it is enough; 0: 80, 96 and 141."""
    topology: str = ""
    """With --dry-run and --mesh: TPUs that are not there, as in v5e:4x4 or v5p:2x2x1, for which the TPU's own compiler
    compiles (pip install 'jaxalign[topology]')."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """A low-rank adapter in place of all weights."""

    lora_rank: int = 0
    """Rank of a low-rank adapter, trained on the frozen weights; 0: all weights are trained."""
    lora_alpha: float = 16.0
    """With --lora-rank: the adapter's term is scaled by alpha/rank [1]."""
    lora_targets: tuple[str, ...] = tuple(models.lora.TARGETS)
    """With --lora-rank: the projections that get an adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """Scored responses of a base, which a model learns from."""

    base: str
    """Folder of the base language model that makes the roll-outs."""
    prompts: str
    """Prompts: files, folders or a data set's name, of any form (docs/data.md)."""
    reward: str
    """Folder of a reward model (DIR#LABEL for one of several labels), or MODULE:FUNCTION, a program f(prompts,
    responses) -> numbers on lists of texts; or a weighted sum of such, "DIR - 0.1 * MODULE:FUNCTION"."""
    samples: int = 4
    """Roll-outs per prompt."""
    max_new_tokens: int = 128
    """Limit of a roll-out [tokens], its EOS included; one without EOS is scored as it stands."""
    shard: int = 256
    """Prompts per shard of roll-outs."""
    decode_batch: int = 64
    """Roll-outs decoded together, whole prompts."""
    rollouts: str = ""
    """Run folder of another train.value, train.shaping or train.calibrate with the same base, prompts, reward, samples,
    limit and seed: its roll-outs are read, none are made."""


class TrainingConfig(Protocol):
    """What the config of a script that trains a model is composed of, at least."""

    @property
    def run(self) -> RunOptions:
        """The run folder, seed and type."""

    @property
    def model(self) -> ModelOptions:
        """The model to start from."""

    @property
    def rows(self) -> RowOptions:
        """The rows, and which of them are held out."""

    @property
    def optimizer(self) -> OptimizerOptions:
        """How long and how fast."""

    @property
    def mesh(self) -> MeshOptions:
        """Micro-batches and devices."""

    @property
    def text(self) -> TextOptions:
        """How texts and chats become tokens."""


def check_training_config(config: TrainingConfig, *, rows_per_step: int | None = None) -> None:
    """Checks the options of a training script that need no file.

    Args:
      config: its groups are checked.
      rows_per_step: rows of an optimizer step; --batch-size where it is None.

    Raises:
      ValueError: it names the option, what was expected and what was found.
    """
    if config.mesh.topology and not config.run.dry_run:
        raise ValueError(f"topology: expected with --dry-run, found {config.mesh.topology!r} alone")
    check_optimizer_options(config.optimizer)
    check_row_options(config.rows)
    if rows_per_step is None:
        check_mesh_options(config.mesh, config.optimizer.batch_size, name="batch_size")
    else:
        check_mesh_options(config.mesh, rows_per_step, name="the rows of an optimizer step,")
    check_model_options(config.model)
    check_text_options(config.text)


def check_model_options(options: ModelOptions) -> None:
    """ValueErrors that name the option."""
    if bool(options.model) == bool(options.architecture):
        found = "both" if options.model else "neither"
        raise ValueError(f"model: expected either --model or --architecture, found {found}")
    if bool(options.architecture) != bool(options.tokenizer):
        raise ValueError("tokenizer: expected with --architecture, and only there")


def check_row_options(options: RowOptions) -> None:
    """ValueErrors that name the option."""
    _at_least(options, max_length=2)
    _shares(options, "validation")


def check_optimizer_options(options: OptimizerOptions) -> None:
    """ValueErrors that name the option."""
    check_finite(options, "epochs", "learning_rate", "clip", above=True)
    check_finite(options, "weight_decay", "peak_tflops")
    check_track(options.track)
    _at_least(options, steps=0, batch_size=1, save_every=1, log_every=1, profile=0)
    _shares(options, "warmup")


def check_mesh_options(options: MeshOptions, rows: int, *, name: str) -> None:
    """ValueErrors that name the option; rows, name: number of rows of an optimizer step, and what gives it."""
    check_finite(options, "device_memory")
    if options.accumulate < 1 or rows % options.accumulate:
        raise ValueError(f"accumulate: expected a divisor of {name} {rows}, found {options.accumulate}")
    sharding.check_rows_divide(
        sharding.make_mesh(options.mesh), rows // options.accumulate, name="the rows of a micro-batch,"
    )


def check_rollout_options(options: RolloutOptions) -> None:
    """ValueErrors that name the option."""
    _at_least(options, samples=1, max_new_tokens=1, shard=1, decode_batch=1)


def check_finite(options: Any, *names: str, above: bool = False) -> None:
    """ValueError where an option is not finite, negative, or 0 where `above` is set."""
    for name in names:
        value = getattr(options, name)
        if not 0 <= value < math.inf or (above and value == 0):
            raise ValueError(f"{name}: expected a finite value {'>' if above else '>='} 0, found {value}")


AT_ONCE = ("batch_size", "max_length", "samples", "max_new_tokens", "shard", "decode_batch")
"""Options that give the sizes of arrays."""


def _at_least(options: Any, **least: int) -> None:
    for name, low in least.items():
        if getattr(options, name) < low:
            raise ValueError(f"{name}: expected at least {low}, found {getattr(options, name)}")
        if name in AT_ONCE:
            check_at_most(name, getattr(options, name))


def _shares(options: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(options, name) < 1:
            raise ValueError(f"{name}: expected a share in [0, 1), found {getattr(options, name)}")
