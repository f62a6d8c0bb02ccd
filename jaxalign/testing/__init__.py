"""The laws of Policies, Critics and Rewards, checked for parts of your own.

`check_policy`, `check_critic` and `check_reward` run a part on a small batch of prompts and raise an AssertionError
that names the law and says what was seen. They need jax alone and run under any test runner. The laws, by number:

1-6. Those of `jaxalign.types`.
7. Neither the side nor the amount of the prompts' padding matters, nor the ids in it.
8. The rows beside a row do not matter.
9. Gradients are finite in every floating-point leaf of params.
10. A policy's parallel log_prob gives the numbers of its steps.
11. Scores of candidates are those of the whole vocabulary at these tokens, and so is a move to one.
12. A critic's kind is right: "level" gives the score of the text, "increment" what a token adds to it.
13. Numbers are finite.
14. A reward gives one floating-point number for each text.
15. A reward reads nothing beyond the mask.
16. A reward looks up what is per prompt by index, not by the row's place in the batch.
17. The form of a reward that keeps a prefix gives the same numbers.
18. Verifying a block of tokens gives the numbers of their steps, and accepting some of it gives the state after them.
"""

from jaxalign.testing._critics import TextScore, check_critic
from jaxalign.testing._laws import LAWS, PER_PROMPT
from jaxalign.testing._policies import Increments, check_policy
from jaxalign.testing._rewards import check_reward

__all__ = ["LAWS", "PER_PROMPT", "Increments", "TextScore", "check_critic", "check_policy", "check_reward"]
