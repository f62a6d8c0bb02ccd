"""Options of alignment by regression, with their checks."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxalign import infalign
from jaxalign.training.options import check_finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionOptions:
    """What the log-ratio of a policy to its base is fitted to, and how."""

    table: str
    """Folder of train.calibrate: its samples are learned from, and rewards become their quantile among them."""
    fresh: str = ""
    """Folder of another train.calibrate of the same base, reward, prompts and limit with another seed: its samples are
    learned from as well, ranked in --table's."""
    transform: str = ""
    """Map of the quantile: identity (""), log, exp:A, bon:N, won:N, or the optimum for best-of-N and worst-of-N at
    --beta, bon_fp:N and won_fp:N."""
    target_kl: float = 0.0
    """KL of the policy to its base [nats]: beta is the one at which that is the mean over tables of this size; one
    correction follows, on fresh draws, where the KL that is measured is off by more than a tenth. Or --beta."""
    beta: float = 0.0
    """KL weight [units of the transformed reward per nat], in place of --target-kl."""
    bound: float = 0.0
    """Bound B of a Stackelberg threshold reward, B·1[r > m(x)], with m from the table at gain B/beta; 0: none. With
    --transform, of the transformed quantile."""
    loss: Literal["reverse", "forward", "square"] = "reverse"
    """reverse: the regret of RL at this beta, read off samples of the base; forward: covers the optimum; square: of
    log-ratios, as QRPO has it, for targets that are not steep (losses.regress)."""
    normaliser: Literal["known", "posterior", "centred"] = "posterior"
    """log Z of --fresh and --refresh samples. known: its mean over tables; posterior: for this table, by the ranks of
    the --fresh samples; centred: none, each prompt's mean error is taken off (square alone). Of the table's own samples
    it is exact."""
    huber: float = 0.0
    """With square: the loss is linear beyond this error [nats]; 0: nowhere."""
    group: int = 4
    """With centred: responses of a prompt that come together, at least 2."""
    refresh: int = 1
    """Rounds. Before each but the first the policy draws. It then learns from all draws so far and from as many of the
    base's samples, weighted by the base over the mixture of all that drew, at most 20."""
    refresh_samples: int = 8
    """Responses to each prompt that a round, or a correction of beta, draws."""
    check_every: int = 50
    """Optimizer steps between readings of the loss on held-out prompts, whose best parameters are kept."""
    patience: int = 4
    """Readings without a better one after which a round ends."""


def check_regression_options(options: RegressionOptions) -> None:
    """ValueErrors that name the option."""
    check_finite(options, "target_kl", "beta", "bound", "huber")
    if bool(options.target_kl) == bool(options.beta):
        raise ValueError(
            f"target_kl: expected either --target-kl or --beta > 0, found {options.target_kl:g} and {options.beta:g}"
        )
    solved = infalign.needs_beta(options.transform)
    for name in ("transform", "bound"):
        if options.target_kl and (solved if name == "transform" else options.bound):
            raise ValueError(f"{name}: expected without --target-kl: it is solved for one --beta")
    infalign.check_increasing(infalign.parse_transform(options.transform or "identity", beta=options.beta or None))
    if options.loss != "square":
        if options.normaliser == "centred":
            raise ValueError(f"normaliser: expected centred with --loss square alone, found {options.loss}")
        if options.huber:
            raise ValueError(f"huber: expected with --loss square alone, found {options.huber:g} with {options.loss}")
    least = {"group": 2 if options.normaliser == "centred" else 1}
    least |= {"refresh": 1, "refresh_samples": 1, "check_every": 1, "patience": 1}
    for name, low in least.items():
        if getattr(options, name) < low:
            raise ValueError(f"{name}: expected at least {low}, found {getattr(options, name)}")
