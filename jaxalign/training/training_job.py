"""The course of a training script: a run folder that is opened, a model, a fit, figures, and a summary."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign import _hosts, _runs, models
from jaxalign.data import encoded
from jaxalign.tokens import TextFormat
from jaxalign.training import adapters, dry_run, fitting, memory, mesh_checks
from jaxalign.training import job as functions
from jaxalign.training.options import OptimizerOptions, RolloutOptions, TrainingConfig, check_training_config
from jaxalign.training.step import Loss
from jaxalign.types import Params


def check_length(folder: pathlib.Path, optimizer: OptimizerOptions, why: str) -> None:
    """Checks that a run that cannot be prolonged goes on with as many steps and epochs as it had.

    Args:
      folder: the run folder; one without config.json passes.
      optimizer: the options now.
      why: it cannot be prolonged, for the error.

    Raises:
      ValueError: another number of steps or epochs.
    """
    with _hosts.together():
        if not _hosts.is_first() or not (folder / _runs.CONFIG).exists():
            return
        before = _runs.stored_options(folder)
        for name in sorted(_runs.GROWING & before.keys()):
            if before[name] != getattr(optimizer, name):
                raise ValueError(
                    f"{name}: expected {before[name]} of the run in {folder}, {why}, found "
                    f"{getattr(optimizer, name)}; {_runs.ELSE}"
                )


@dataclasses.dataclass(frozen=True)
class Job:
    """A training run and its folder: open, ask whether it is finished, start, fit, evaluate, finish."""

    config: TrainingConfig
    """The script's options."""
    stage: str
    """Name of the training in metrics and checkpoints."""
    out: pathlib.Path
    """The run folder."""
    following: str
    """The command that comes next."""
    product: str = "model"
    """What the run writes, in its folder."""
    rows_per_step: int = 0
    """Rows of an optimizer step."""

    @staticmethod
    def open(
        config: TrainingConfig,
        *,
        stage: str,
        following: Callable[[pathlib.Path], str],
        inputs: Sequence[str] = (),
        product: str = "model",
        rows_per_step: int | None = None,
        drawn: RolloutOptions | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> Job:
        """Checks the options and opens the run folder.

        Args:
          config: the script's options.
          stage: name of the training in metrics and checkpoints.
          following: run folder -> the command that comes next, for the last line of the output.
          inputs: files and folders that the run reads beside those of the model, whose change is noticed when it is
            resumed.
          product: what the run writes, in its folder.
          rows_per_step: rows of an optimizer step, which micro-batches and devices share; --batch-size where it is
            None.
          drawn: roll-outs that the run makes, which have to divide over the mesh as the model has.
          beside: role -> folder, of further models that have to.

        Returns:
          The job; its folder holds config.json.

        Raises:
          ValueError: an option is not as expected, a model or rows do not divide over the mesh, or the folder is of
            another run.
        """
        if config.run.dry_run:
            dry_run.on_enough_devices(config, config.mesh.mesh)
        check_training_config(config, rows_per_step=rows_per_step)
        if config.run.dry_run:
            out = pathlib.Path(config.run.out)
            return Job(config, stage, out, following(out), product)
        mesh_checks.check_models({"model": config.model.model, **(beside or {})}, config.mesh.mesh)
        if drawn is not None:
            mesh_checks.check_rollouts(drawn, config.mesh.mesh)
        names = [*inputs, config.model.model, config.model.architecture, config.model.tokenizer]
        read = [folder for name in names for folder in models.source_folders(name)]
        out = _runs.open_run(config.run.out, config, inputs=read, later=True)
        return Job(config, stage, out, following(out), product, rows_per_step or config.optimizer.batch_size)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is whole, which is printed, None for one that is to be done."""
        done = None if self.config.run.dry_run else functions.finished(self.out, product=self.product)
        if done is not None:
            functions.report(self.out, done, self.following, product=self.product)
        return done

    def start(
        self,
        head: Callable[[models.Config], models.Head | None],
        *,
        texts_per_row: int = 1,
        trained: bool = True,
    ) -> functions.StartedModel:
        """Loads or makes the model to train.

        Args:
          head: config -> the head that the model has to have; its own weights are kept where it has them.
          texts_per_row: texts that a row of an optimizer step holds, by which --remat is chosen.
          trained: whether the model's own weights are trained, and not an adapter or a head alone: what is not trained
            is loaded in the run's type.

        Returns:
          Model, parameters and tokenizer. What is trained is float32.

        Raises:
          ValueError: a tokenizer that does not fit, a context shorter than --max-length.
        """
        config = self.config
        length, texts = config.rows.max_length, self.rows_per_step * texts_per_row
        started = functions.start(
            config.model,
            head,
            seed=config.run.seed,
            dtype=config.run.dtype,
            max_length=length,
            chat_template=config.text.chat_template,
            eos_token=config.text.eos_token,
            mesh=config.mesh.mesh,
            shapes_only=config.run.dry_run,
            trained=trained,
        )
        lm = memory.with_remat(started.lm, started.params, config.mesh, texts=texts, length=length)
        return started._replace(lm=lm)

    def form(self, started: functions.StartedModel) -> TextFormat:
        """How the job's texts become tokens. ValueError for a tokenizer without an end of a response."""
        return functions.form_of(self.config.text, started)

    def split(self, loaded: encoded.Loaded) -> functions.Data:
        """The rows split by prompt into those to train on and those held out; what was cut or left out is told. The
        inputs are read now, and the run folder gets its config.json."""
        self.begin()
        return functions.split(loaded, validation=self.config.rows.validation, seed=self.config.run.seed)

    def begin(self) -> None:
        """Writes config.json, inputs.json and versions.json of a folder that has none yet."""
        if not self.config.run.dry_run:
            _runs.begin(self.out)

    def fit(
        self,
        started: functions.StartedModel,
        data: functions.Data,
        loss: Loss,
        collate: Callable[[list[Any]], Any],
        *,
        frozen: Params = None,
        adapter: models.Lora | None = None,
        redraw: fitting.Redraw | None = None,
    ) -> Params:
        """Trains, going on from the newest checkpoint in the run folder.

        Args:
          started: its params are trained, and used up.
          data: its training rows are used.
          loss: loss(params, batch, frozen) -> (loss, LossAux).
          collate: a list of b rows -> a tree of arrays [b,...].
          frozen: parameters that the loss takes and that are not trained.
          adapter: where it is given, it is trained in place of all weights (`adapters.fit_adapter`).
          redraw: draws the batch that each step learns from (`fitting.fit_model`).

        Returns:
          The trained parameters, float32; an adapter's as `adapters.written` gives them.
        """
        config = self.config
        self.begin()
        if config.run.dry_run and not dry_run.is_abstract(started.params):
            started = started._replace(params=dry_run.abstract(started.params, None))
        options: dict[str, Any] = {"optimizer": config.optimizer, "mesh": config.mesh, "seed": config.run.seed}
        options |= {"stage": self.stage, "out": self.out, "frozen": frozen, "redraw": redraw}
        if adapter is None:
            return fitting.fit_model(started, data, loss, collate, **options)
        base = config.model.model
        return adapters.fit_adapter(adapter, started, data, loss, collate, base=base, **options)

    def evaluate(
        self,
        f: Callable[[Params, Any], Any],
        params: Params,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Any],
    ) -> Any:
        """f(params, batch), a tree of arrays [b,...], of all rows, in batches of --batch-size."""
        return functions.evaluate(f, params, rows, collate, self.config.optimizer.batch_size)

    def finish(
        self,
        started: functions.StartedModel,
        params: Params,
        data: functions.Data,
        summary: dict[str, Any],
        beside: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes the trained model and the summary, and prints the figures and the next command.

        Args:
          started: its model and tokenizer are written.
          params: the trained parameters.
          data: its numbers of rows go into the summary.
          summary: figures of the run.
          beside: name of a further JSON file in model/ -> what it holds.

        Returns:
          The summary as it is written to summary.json, last of all: where that file is, the run is whole.
        """
        with adapters.whole(params, folder=self.config.model.model, out=self.out) as whole:
            return functions.finish(self.out, started, whole, data, summary, self.following, beside)
