"""The options of a decoding run, and their checks that need no file."""

from __future__ import annotations

import dataclasses
import math

from jaxalign._checks import check_at_most
from jaxalign.data.text_options import TextOptions, check_text_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseOptions:
    """Options that decide a method's responses and what is measured on them."""

    model: str
    """Folder (or hub name) of the base language model, with its tokenizer."""
    prompts: str
    """Prompts: files, folders or a data set's name, of any form (docs/data.md)."""
    reward: str = ""
    """The reward that methods maximise (the proxy): folder of a reward model, or, for methods that need no gradient of
    it, MODULE:FUNCTION, a program f(prompts, responses) -> one number each on lists of texts, or a weighted sum of
    such, "DIR - 0.1 * MODULE:FUNCTION". Without it, methods that need none are decoded."""
    gold: str = ""
    """A second reward that no method sees, as --reward."""
    second_gold: str = ""
    """A further one beside --gold, as --reward: a method that games the one is found out by the other."""
    embedding: str = ""
    """MODULE:FUNCTION, a program f(texts) -> one vector each (SimCSE in ARGS' tables): reports coherence, the cosine of
    prompt and response."""
    with_model: tuple[str, ...] = ()
    """NAME=DIR: a further model for MODULE:FUNCTION, over the base's vocabulary; give the option again for another."""
    top_k: int | None = None
    """Candidates per token of a tilt by critics; 0: the whole vocabulary. Also the tokens that ggro may force. Default:
    10 for ggro and for critics that score one candidate at a time (args, transfer, scalar value heads); the whole
    vocabulary for Q heads and genarm, which give all scores at once."""
    block_size: tuple[int, ...] = (8,)
    """Lengths of a block of blockwise decoding and beam search [tokens]; each is decoded."""
    continuations: int = 4
    """Continuations of each beam of beam search."""
    drop: tuple[str, ...] = ()
    """TOKENS:SHARE, as 8:0.5: after so many tokens the reward scores best_of_n's samples, of which this share of n goes
    on."""
    rollouts: int = 1
    """Roll-outs per candidate of transfer."""
    lookahead: int | None = None
    """Tokens of a roll-out of transfer; 0: none. Default: to the end of the response."""
    gradient_steps: int = 30
    """Gradient steps of re_control at each token."""
    num_particles: int = 16
    """Particles of smc."""
    num_steps: int = 32
    """Moves of quest's chain."""
    num_samples: int = 64
    """Base samples per prompt from which quest's KL is estimated."""
    entropy_threshold: float = 2.0
    """Entropy at which ggro and cards begin a new segment [nats]."""
    reward_threshold: float | None = None
    """Reward that a segment of cards has to reach [units of reward]. Default: the 0.9 quantile of 32 base responses."""
    max_tries: int = 20
    """Proposals per segment of cards."""
    max_new_tokens: int = 128
    """Limit of a response [tokens], its EOS included."""
    temperature: float = 1.0
    """Sampling temperature, the outermost transform; 0 is greedy. Methods that keep one of several draws need one > 0,
    smc needs 1, and ggro is greedy at any."""
    generation_config: bool = False
    """Draw as the base's generation_config.json says (temperature, top_k, top_p; do_sample false is greedy), in place
    of --temperature, in every method; ggro stays greedy."""
    draft: str = ""
    """Folder of a small language model over the base's tokens that proposes tokens, which base, policy and critics that
    score every token at once (genarm, Q heads) verify: the law is theirs, and decoding is faster where the two agree.
    "below": the base itself, for critics. "": none."""
    draft_tokens: int = 4
    """Tokens that the draft proposes at a time."""
    batch_size: int = 16
    """Prompts decoded together."""
    deterministic: int = 0
    """G: decode G prompts at a time, each padded to the bucket of its own length, so that responses are the same at any
    --batch-size and beside any other prompts (on one device, jax version and dtype); 0: a batch at once."""
    seed: int = 0
    """Seed of all draws."""
    dtype: str = "float32"
    """Type of all models' parameters and activations: float32 or bfloat16."""
    mesh: str = ""
    """Devices by axis, data=N or as in data=2,fsdp=4,tensor=2, -1 for the rest of them: data and fsdp share each
    batch, fsdp and tensor the parameters (docs/scale.md). "": one device."""
    text: TextOptions = dataclasses.field(default_factory=TextOptions)
    """How texts and chats become tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions(ResponseOptions):
    """Options of a decoding run (`evaluation.run`, `python -m eval.decode`)."""

    out: str
    """Run folder: results.json, frontier.png, and a folder per method with its responses.jsonl."""
    method: tuple[str, ...] = ()
    """`KIND[:DIR][@STRENGTHS]` or `MODULE:FUNCTION[@STRENGTHS]`, as above; give the option again for another method."""
    inspect: int = 0
    """Write tokens.jsonl for the first so many prompts of each method: per token its log-probability, KL, Q and reward,
    and the likeliest candidates. eval.report shows it."""
    stream: bool = False
    """Print responses while they are drawn; those of methods that select among whole texts when they are done."""
    dry_run: bool = False
    """Compile the methods on shapes alone, for simulated devices where --mesh has more than there are, and say what
    they need of each device. Configs, tokenizers and prompts are read, no weights; nothing is written."""
    device_memory: float = 0.0
    """With --dry-run: memory of a device [GB], of which it says whether it is enough; 0: 80, 96 and 141."""
    topology: str = ""
    """With --dry-run and --mesh: TPUs that are not there, as in v5e:4x4 or v5p:2x2x1, for which the TPU's own compiler
    compiles (pip install 'jaxalign[topology]')."""
    include_base: bool = True
    """Decode the base too, where it is not among the methods: win rates are over it."""
    config: str = ""
    """JSON or TOML file of defaults for these options."""


AT_LEAST = {
    "continuations": 1,
    "rollouts": 1,
    "gradient_steps": 1,
    "num_particles": 1,
    "num_steps": 2,
    "num_samples": 1,
    "max_tries": 1,
    "max_new_tokens": 1,
    "draft_tokens": 1,
    "batch_size": 1,
    "lookahead": 0,
    "deterministic": 0,
    "top_k": 0,
}
"""Option -> its least value; None, a default, is let through."""


def check_options(options: ResponseOptions) -> None:
    """Checks every value that needs no file and no method.

    Raises:
      ValueError: names the option, what was expected and what was found.
    """
    check_text_options(options.text)
    for name, least in AT_LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
        if value is not None:
            check_at_most(name, value)
    blocks = options.block_size
    if not blocks or min(blocks) < 1 or len(set(blocks)) < len(blocks):
        raise ValueError(f"block_size: expected lengths of at least 1 token, each once, found {blocks}")
    drop_stages(options, 2)
    for name in (
        "entropy_threshold",
        "temperature",
        *(("device_memory",) if isinstance(options, DecodeOptions) else ()),
    ):
        if not 0 <= getattr(options, name) < math.inf:
            raise ValueError(f"{name}: expected a finite value >= 0, found {getattr(options, name)}")
    if options.reward_threshold is not None and not math.isfinite(options.reward_threshold):
        raise ValueError(f"reward_threshold: expected a finite value, found {options.reward_threshold}")
    if isinstance(options, DecodeOptions) and options.topology and not options.dry_run:
        raise ValueError(f"topology: expected with --dry-run, found {options.topology!r} alone")
    if options.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype: expected float32 or bfloat16, found {options.dtype!r}")


def drop_stages(options: ResponseOptions, n: int) -> tuple[tuple[int, int], ...]:
    """The pairs (tokens, samples that go on) of `drop` for n samples; a share that drops none is passed over.

    Raises:
      ValueError: what is no TOKENS:SHARE with a share below 1, or tokens that do not rise below the limit.
    """
    stages: list[tuple[int, int]] = []
    before, left = 0, n
    for text in options.drop:
        tokens, _, share = text.partition(":")
        try:
            end, part = int(tokens), float(share)
        except ValueError:
            end, part = 0, 0.0
        if not (before < end < options.max_new_tokens and 0 < part < 1):
            raise ValueError(
                f"drop: expected TOKENS:SHARE with tokens that rise below max_new_tokens = {options.max_new_tokens} "
                f"and shares between 0 and 1, found {options.drop}"
            )
        keep = max(int(n * part), 1)
        if keep < left:
            stages.append((end, keep))
            left = keep
        before = end
    return tuple(stages)
