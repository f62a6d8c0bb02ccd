"""Decoders: from a Policy to responses.

`sample` and `log_prob` give Completions. Every other decoder gives `types.Decoded`: the response kept for each prompt,
its KL with the kind of number that is, and an info of its own. Arguments come as (policy, reward or critic, params,
rng, prompts, *, keywords). What may differ per prompt is an entry of params, a dict or the decoder's Params; what sets
a shape or a count is a keyword:

    num_samples     responses, continuations or candidates      max_new_tokens  T
    num_particles   of smc                                      eos_ids         an id, ids, or the policy's own
    num_steps       moves of quest                              block_size      tokens between two selections
    max_tries       of rejection, first_above and cards         temperature     put on the policy from outside
    draft_tokens    of speculative                          width, groups   beams a search of beam, and searches

`sample`, `log_prob` and `best_of_n` take deterministic=G, chunks of G rows whose responses are the same in every batch;
`in_chunks` runs any other decoder, or one of your own, in chunks of G prompts.

Parts of decoders are functions to pass: `resampling` schemes and rules for smc, `stopping` rules of segments for cards
and ggro, `Cut` for quest.
"""

from jaxalign.decoding import resampling, stopping
from jaxalign.decoding._beam import BeamInfo, BeamParams, beam
from jaxalign.decoding._best_of_n import BestOfNInfo, BestOfNParams, best_of_n
from jaxalign.decoding._blockwise import BlockwiseInfo, BlockwiseParams, blockwise
from jaxalign.decoding._cards import CardsInfo, CardsParams, cards
from jaxalign.decoding._chunks import in_chunks
from jaxalign.decoding._ggro import GGROInfo, GGROParams, ggro
from jaxalign.decoding._kl import sum_of_steps, surprisal
from jaxalign.decoding._log_prob import log_prob
from jaxalign.decoding._margins import draw_margins
from jaxalign.decoding._power import power
from jaxalign.decoding._quest import Cut, QuestInfo, QuestParams, quest, uniform_cut
from jaxalign.decoding._rejection import FirstAboveParams, RejectionInfo, RejectionParams, first_above, rejection
from jaxalign.decoding._sampling import sample
from jaxalign.decoding._smc import SMCInfo, SMCParams, smc
from jaxalign.decoding._speculative import SpeculativeInfo, SpeculativeParams, speculative
from jaxalign.decoding.requests import join

__all__ = [
    "BeamInfo",
    "BeamParams",
    "BestOfNInfo",
    "BestOfNParams",
    "BlockwiseInfo",
    "BlockwiseParams",
    "CardsInfo",
    "CardsParams",
    "Cut",
    "FirstAboveParams",
    "GGROInfo",
    "GGROParams",
    "QuestInfo",
    "QuestParams",
    "RejectionInfo",
    "RejectionParams",
    "SMCInfo",
    "SMCParams",
    "SpeculativeInfo",
    "SpeculativeParams",
    "beam",
    "best_of_n",
    "blockwise",
    "cards",
    "draw_margins",
    "first_above",
    "ggro",
    "in_chunks",
    "join",
    "log_prob",
    "power",
    "quest",
    "rejection",
    "resampling",
    "sample",
    "smc",
    "speculative",
    "stopping",
    "sum_of_steps",
    "surprisal",
    "uniform_cut",
]
