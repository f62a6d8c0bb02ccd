"""Training: a pure step, one visible loop around it, checkpoints that resume bit for bit, metrics that others read."""

from jaxalign.training._fit import Stopped, fit
from jaxalign.training.checkpoints import latest_step, open_checkpoints
from jaxalign.training.logging import MetricWriter
from jaxalign.training.step import Measured, TrainState, adamw, create, train_step

__all__ = [
    "Measured",
    "MetricWriter",
    "Stopped",
    "TrainState",
    "adamw",
    "create",
    "fit",
    "latest_step",
    "open_checkpoints",
    "train_step",
]
