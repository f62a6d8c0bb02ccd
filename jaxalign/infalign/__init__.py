"""InfAlign (arXiv 2412.19792): aligning a policy for the procedure that will be run on top of it.

A reward is calibrated to its quantile under the base (`calibration`), transformed (`transforms`), and then maximised
under a KL penalty by any method: RLHF with the transformed reward.
"""

from jaxalign.infalign.calibration import calibrate, calibration_table
from jaxalign.infalign.transforms import (
    Transform,
    best_of_n_power,
    check_increasing,
    exponential,
    identity,
    log,
    parse,
    tabulated,
    worst_of_n_power,
)

__all__ = [
    "Transform",
    "best_of_n_power",
    "calibrate",
    "calibration_table",
    "check_increasing",
    "exponential",
    "identity",
    "log",
    "parse",
    "tabulated",
    "worst_of_n_power",
]
