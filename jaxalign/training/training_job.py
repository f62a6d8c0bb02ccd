"""The course of a training script: a run folder that is opened, a model, a fit, figures, and a summary."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from jaxalign import _io, models
from jaxalign.training import adapters
from jaxalign.training import job as functions
from jaxalign.training.step import Loss
from jaxalign.types import Params

C = TypeVar("C", bound=functions.TrainingOptions)
C_co = TypeVar("C_co", bound=functions.TrainingOptions, covariant=True)


@dataclasses.dataclass(frozen=True)
class Job(Generic[C_co]):
    """A training run and its folder: open, ask whether it is finished, start, fit, evaluate, finish."""

    config: C_co
    """The script's options."""
    stage: str
    """Name of the training in metrics and checkpoints."""
    out: pathlib.Path
    """The run folder."""
    following: str
    """The command that comes next."""
    product: str = "model"
    """What the run writes, in its folder."""

    @staticmethod
    def open(
        config: C,
        *,
        stage: str,
        following: Callable[[pathlib.Path], str],
        inputs: Sequence[str] | None = None,
        product: str = "model",
    ) -> Job[C]:
        """Checks the options and opens the run folder.

        Args:
          config: the script's options.
          stage: name of the training in metrics and checkpoints.
          following: run folder -> the command that comes next, for the last line of the output.
          inputs: files and folders that the run reads, whose change is noticed when it is resumed; those of the model
            where it is None.
          product: what the run writes, in its folder.

        Returns:
          The job; its folder holds config.json.

        Raises:
          ValueError: an option is not as expected, or the folder is of another run.
        """
        functions.check_training_options(config)
        model = [config.model, config.architecture, config.tokenizer]
        read = [folder for name in (model if inputs is None else inputs) for folder in models.source_folders(name)]
        out = _io.open_run(config.out, config, inputs=read)
        return Job(config, stage, out, following(out), product)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that is whole, which is printed, None for one that is to be done."""
        done = functions.finished(self.out)
        if done is not None:
            functions.report(self.out, done, self.following, product=self.product)
        return done

    def start(self, head: Callable[[models.Config], models.Head | None]) -> functions.Start:
        """Loads or makes the model to train.

        Args:
          head: config -> the head that the model has to have; its own weights are kept where it has them.

        Returns:
          Model, float32 parameters and tokenizer.

        Raises:
          ValueError: a tokenizer that does not fit, a context shorter than --max-length.
        """
        return functions.start(self.config, head)

    def fit(
        self,
        begin: functions.Start,
        data: functions.Data,
        loss: Loss,
        collate: Callable[[list[Any]], Any],
        *,
        frozen: Params = None,
    ) -> Params:
        """Trains, going on from the newest checkpoint in the run folder; with --lora-rank it trains an adapter alone.

        Args:
          begin: its params are trained; they are copied.
          data: its training rows are used.
          loss: loss(params, batch, frozen) -> (loss, LossAux).
          collate: a list of b rows -> a tree of arrays [b,...].
          frozen: parameters that the loss takes and that are not trained; with an adapter None or those of `begin`.

        Returns:
          The trained parameters, float32, on the host.
        """
        if isinstance(self.config, adapters.AdapterOptions):
            return adapters.run(self.config, begin, data, loss, collate, stage=self.stage, out=self.out, frozen=frozen)
        return functions.run(self.config, begin, data, loss, collate, stage=self.stage, out=self.out, frozen=frozen)

    def evaluate(
        self,
        f: Callable[[Params, Any], Any],
        params: Params,
        rows: Sequence[Any],
        collate: Callable[[list[Any]], Any],
    ) -> Any:
        """f(params, batch), a tree of arrays [b,...], of all rows, in batches of --batch-size."""
        return functions.evaluate(f, params, rows, collate, self.config.batch_size)

    def finish(
        self, begin: functions.Start, params: Params, data: functions.Data, summary: dict[str, Any]
    ) -> dict[str, Any]:
        """Writes the trained model and the summary, and prints the figures and the next command.

        Args:
          begin: its model and tokenizer are written.
          params: the trained parameters.
          data: its numbers of rows go into the summary.
          summary: figures of the run.

        Returns:
          The summary as it is written to summary.json, last of all: where that file is, the run is whole.
        """
        return functions.finish(self.out, begin, params, data, summary, self.following)
