"""Decode prompts with your own models, by any set of methods, each at several strengths:

python -m eval.decode --model DIR --reward REWARD_DIR --gold MODULE:FUNCTION --prompts FILE --out DIR \\
    --method best_of_n@4,16 --method args:REWARD_DIR@2,1 --method value:DIR@1,0.5 \\
    --method "0.5 * genarm:DIR + 0.2 * genarm:DIR2@1" --method blockwise:value:DIR@4,8 --method my_module:function@1

A method is KIND[:DIR][@STRENGTHS]; the base is decoded beside them. Each has a folder of its own under --out, so that
the same command with one method more decodes that method alone, and an interrupted run goes on where it was stopped; a
response depends on the seed and on the prompt's index alone. responses.jsonl of each folder holds prompt, response,
log-probabilities, KL and rewards; results.json and frontier.png hold gold and proxy reward, KL with its kind, win rate
over the base, diversity, tokens/s, and tokens that pass through models for each token of a response. --inspect N writes
tokens.jsonl, what each token cost and brought; python -m eval.report makes a page of the folder. --reward is needed
by the methods marked *.

    KIND           DIR                               STRENGTHS
    base           -                                 -
    policy         an aligned model (DPO, RL)        -
    args           a reward model                    beta
    value          a value model                     beta
    follower       a head for a shaped reward        -, it has its own beta
    distribution   a head of laws, DIR:READING       beta, n or nats, as the reading has it
    genarm         an autoregressive reward model    beta = 1/alpha
    transfer *     an aligned baseline               beta
    best_of_n *    -                                 n [responses]
    blockwise      value:DIR, args:DIR, ...          K [continuations of --block-size tokens]
    beam           value:DIR, args:DIR, ...          beams [each of --continuations of --block-size]
    re_control     train.value --frozen              step size
    ggro *         -                                 candidates per segment
    smc *          value:DIR, ... or none (the base) beta
    quest *        -                                 beta
    cards *        -                                 beta

args, value, follower, distribution, genarm and transfer are critics; a weighted sum of critics, "0.5 * args:DIR +
value:DIR@1", is one method, and stands behind blockwise:, beam: and smc: as well. MODULE:FUNCTION is a method of your
own: a function of jaxalign.evaluation.MethodInputs that gives draw(rng, prompts) -> Decoded or Completions; see
jaxalign.evaluation.functions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxalign import commands, evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(evaluation.DecodeOptions):
    """Options of eval.decode."""

    method: commands.Repeated[tuple[str, ...]] = ()
    """KIND[:DIR][@STRENGTHS] or MODULE:FUNCTION[@STRENGTHS], as above; give the option again for another method."""
    with_model: commands.Repeated[tuple[str, ...]] = ()
    """NAME=DIR: a further model for MODULE:FUNCTION, over the base's vocabulary; give the option again for another."""


def run(config: Config) -> list[dict[str, Any]]:
    """Decodes what is missing; gives the rows of results.json."""
    return evaluation.run(config)


def main(args: list[str] | None = None) -> None:
    run(commands.parse(Config, description=__doc__ or "", args=args))


if __name__ == "__main__":
    commands.execute(main)
