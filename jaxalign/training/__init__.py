"""Training: a pure step, one visible loop around it, checkpoints that resume bit for bit, metrics that others read."""

from jaxalign._signals import Stopped
from jaxalign.training._fit import StepFunction, fit
from jaxalign.training.checkpoints import latest_step, open_checkpoints
from jaxalign.training.hooks import Hooks
from jaxalign.training.logging import MetricWriter
from jaxalign.training.step import Loss, LossAux, TrainState, TrainStep, adamw, create, train_step

__all__ = [
    "Hooks",
    "Loss",
    "LossAux",
    "MetricWriter",
    "StepFunction",
    "Stopped",
    "TrainState",
    "TrainStep",
    "adamw",
    "create",
    "fit",
    "latest_step",
    "open_checkpoints",
    "train_step",
]
