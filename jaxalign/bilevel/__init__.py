"""Bilevel alignment: the gradient of a leader through a follower that decodes.

The leader's parameters phi (a reward, a critic, a bound) are among the follower's; its utility U(phi) = E_follower[u]
is what the follower's responses are worth to it. `leader_gradient` draws from any Policy or decoder that has a
derivative and differentiates one of the scalars of `jaxalign.shaping`; what leads where responses are enumerated, or
the follower is trained, is there. docs/bilevel.md derives both.
"""

from jaxalign.bilevel._followers import Estimator, Follower
from jaxalign.bilevel._gradient import LeaderGradient, LeaderParams, leader_gradient

__all__ = ["Estimator", "Follower", "LeaderGradient", "LeaderParams", "leader_gradient"]
