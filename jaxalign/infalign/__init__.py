"""InfAlign (arXiv 2412.19792): aligning a policy for the procedure that will be run on top of it.

A reward is calibrated to its quantile under the base (`calibration`), transformed (`transforms`), and maximised under a
KL penalty by any method: RLHF with the transformed reward. `procedures` names what runs on top. `curves` gives win
rates against KL for rewards without ties, which hold for every base and reward; `levels` gives them for finitely many
outcomes, with ties and for any rule; `fixed_point` solves for the optimal transformation in both.

The law that is judged comes first; bases, ranks, references and betas are keyword-only, since a swap of two arrays of
one shape would go unnoticed.
"""

from jaxalign.infalign.calibration import calibrate, calibration_table
from jaxalign.infalign.curves import (
    Curve,
    Grid,
    curve,
    curve_kl,
    curve_win_rate,
    distribution,
    grid,
    match_kl,
    tilted_curve,
)
from jaxalign.infalign.fixed_point import FixedPoint, WinRate, bon_fp, optimal_reward, optimal_transform, solve, won_fp
from jaxalign.infalign.levels import (
    Rule,
    Sampled,
    enumerated,
    keep_best,
    mid_rank,
    procedure_win_rate,
    ranks,
    rule_win_rate,
    sampled_win_rate,
    selected,
    win_rate,
    win_rate_gradient,
)
from jaxalign.infalign.parsing import fixed_transform, needs_beta, parse_transform
from jaxalign.infalign.partition import log_partition
from jaxalign.infalign.procedures import OfQuantile, Procedure, best_of, none, worst_of
from jaxalign.infalign.transforms import (
    Transform,
    best_of_n_power,
    check_increasing,
    exponential,
    identity,
    log,
    tabulated,
    worst_of_n_power,
)

__all__ = [
    "Curve",
    "FixedPoint",
    "Grid",
    "OfQuantile",
    "Procedure",
    "Rule",
    "Sampled",
    "Transform",
    "WinRate",
    "best_of",
    "best_of_n_power",
    "bon_fp",
    "calibrate",
    "calibration_table",
    "check_increasing",
    "curve",
    "curve_kl",
    "curve_win_rate",
    "distribution",
    "enumerated",
    "exponential",
    "fixed_transform",
    "grid",
    "identity",
    "keep_best",
    "log",
    "log_partition",
    "match_kl",
    "mid_rank",
    "needs_beta",
    "none",
    "optimal_reward",
    "optimal_transform",
    "parse_transform",
    "procedure_win_rate",
    "ranks",
    "rule_win_rate",
    "sampled_win_rate",
    "selected",
    "solve",
    "tabulated",
    "tilted_curve",
    "win_rate",
    "win_rate_gradient",
    "won_fp",
    "worst_of",
    "worst_of_n_power",
]
