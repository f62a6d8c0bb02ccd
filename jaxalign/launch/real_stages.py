"""The stages of `train.quickstart` on a pretrained model of real text, SmolLM2-135M-Instruct, as data.

The base answers everyday requests (`worlds.sentiment`); a noisy reader prefers what VADER calls friendly. All models
are adapters or heads on the base: two cores and 8 GB are enough.
"""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

from jaxalign.launch.stages import Stage

GOLD, SECOND_GOLD = "jaxalign.worlds.sentiment:golds", "jaxalign.worlds.sentiment:second_golds"
NOISE = 0.1  # of the reader [units of gold]


class Size(NamedTuple):
    """What a preset sets."""

    toy: bool  # a random model of the same form
    prompts: int  # to train on
    held_out: int  # to decode
    tokens: int  # longest response
    samples: int  # per prompt, of which neighbours are compared
    rollouts: int  # per prompt, for laws, values and the calibration table
    length: int  # longest row [tokens]
    validation: float  # share of the prompts that figures of training are of
    passes: dict[str, float]  # epochs of reward_model, laws, edit
    steps: dict[str, int]  # optimizer steps of arm and dpo, eight pairs each
    rl: dict[str, int]  # steps, batch_size, samples; accumulate where it is another than below
    accumulate: int  # micro-batches of a step
    strengths: dict[str, str]  # of each method, as eval.decode's --method takes them after @; a method that is not here
    # is left out
    particles: int
    lookahead: int
    inspect: int  # prompts whose responses the report shows token by token


SIZES = {
    "smollm2": Size(
        toy=False,
        prompts=160,
        held_out=32,
        tokens=32,
        samples=8,
        rollouts=4,
        length=112,
        validation=0.1,
        passes={"reward_model": 2, "laws": 6, "edit": 6},
        steps={"arm": 48, "dpo": 48},
        rl={"steps": 8, "batch_size": 16, "samples": 4, "accumulate": 4},
        accumulate=2,
        strengths={
            "best_of_n": "4,16",
            "args": "1,0.5,0.25",
            "unguided": "50",
            "laws": "2,1,0.5,0.25",
            "blockwise": "4",
            "transfer": "0.5",
            "genarm": "1,0.5,0.25",
            "re_control": "1,4",
            "ggro": "4",
            "smc": "0.5",
            "follower": "0.5",
            "calibrated": "0.5",
        },
        particles=8,
        lookahead=4,
        inspect=2,
    ),
    "smollm2-short": Size(
        toy=False,
        prompts=96,
        held_out=16,
        tokens=24,
        samples=8,
        rollouts=4,
        length=96,
        validation=0.15,
        passes={"reward_model": 2, "laws": 6, "edit": 6},
        steps={"arm": 20, "dpo": 20},
        rl={"steps": 4, "batch_size": 8, "samples": 4},
        accumulate=2,
        strengths={
            "best_of_n": "4",
            "args": "0.5",
            "unguided": "50",
            "laws": "1,0.5,0.25",
            "blockwise": "4",
            "genarm": "1,0.5",
            "re_control": "1",
            "smc": "0.5",
            "follower": "0.5",
            "calibrated": "0.5",
        },
        particles=4,
        lookahead=2,
        inspect=0,
    ),
    "smollm2-toy": Size(
        toy=True,
        prompts=8,
        held_out=4,
        tokens=6,
        samples=2,
        rollouts=2,
        length=128,
        validation=0.2,
        passes={"reward_model": 1, "laws": 1, "edit": 1},
        steps={"arm": 1, "dpo": 1},
        rl={"steps": 1, "batch_size": 4, "samples": 2},
        accumulate=2,
        strengths={"best_of_n": "2", "laws": "1", "genarm": "1"},
        particles=2,
        lookahead=1,
        inspect=0,
    ),
}


def training_stages(out: pathlib.Path, preset: str, shared: dict[str, Any]) -> list[Stage]:
    """The stages that write the base and its prompts and train models. Arguments and result as of
    `stages.training_stages`."""
    size, base, prompts = SIZES[preset], str(out / "base"), str(out / "data" / "prompts.jsonl")
    rows = shared | {"max_length": size.length, "save_every": 100, "log_every": 5, "accumulate": size.accumulate}
    rows |= {"validation": size.validation}
    lora = {"lora_rank": 8, "batch_size": 8, "learning_rate": 5e-4}
    labelled = {"model": base, "data": str(out / "preferences" / "pairs.jsonl")}
    pairs = rows | lora | labelled
    sampled = {"base": base, "prompts": prompts, "samples": size.rollouts, "max_new_tokens": size.tokens}
    sampled |= {"max_length": size.length, "decode_batch": 64} | shared
    proxy = {"reward": str(out / "reward_model" / "model")}
    # By another seed than that of the labelled samples: the reward model is more certain of what it was trained on.
    fresh = sampled | {"seed": shared["seed"] + 1}
    heads = rows | fresh | proxy | {"batch_size": 32, "learning_rate": 1e-3, "accumulate": 1}
    made = {"rollouts": str(out / "laws")}  # the roll-outs of the first value model
    rl = rows | lora | size.rl | proxy | {"model": base, "prompts": prompts, "max_new_tokens": size.tokens}

    def stage(title: str, job: str, folder: str, options: dict[str, Any], *, once: bool = False) -> Stage:
        long = {"epochs": size.passes[folder]} if folder in size.passes else {}
        long |= {"steps": size.steps[folder]} if folder in size.steps else {}
        return Stage(title, job, options | long | {"out": str(out / folder)}, once=once)

    return [
        stage("SmolLM2-135M-Instruct as a folder", "smollm2", "base", {"toy": size.toy}, once=True),
        stage(
            "everyday requests",
            "world",
            "data",
            {"task": "everyday", "prompts": size.prompts, "held_out": size.held_out},
            once=True,
        ),
        stage(
            "samples and noisy preferences",
            "preferences",
            "preferences",
            sampled | {"samples": size.samples, "reward": GOLD, "noise": NOISE},
        ),
        # Friendliness is spread over a text, and pairs are few: a head on the mean of the base's states learns more
        # than an adapter does.
        stage(
            "reward model",
            "reward_model",
            "reward_model",
            rows | labelled | {"batch_size": 8, "learning_rate": 1e-2, "pooling": "mean", "frozen": True},
        ),
        stage(
            "laws of the reward, on the frozen base",
            "value",
            "laws",
            heads | {"objective": "distribution", "frozen": True, "bins": 25},
        ),
        stage(
            "value on the base's hidden states (RE-Control)",
            "value",
            "edit",
            heads | made | {"objective": "td", "frozen": True},
        ),
        stage("autoregressive reward model (LoRA)", "arm", "arm", pairs | {"beta_r": 0.5}),
        stage("aligned model (DPO, LoRA)", "dpo", "dpo", pairs | {"beta": 0.1}),
        stage("calibration table", "calibrate", "table", fresh | proxy | made),
        stage(
            "aligned model (RL on calibrated rewards, LoRA)",
            "rl",
            "rl",
            rl | {"calibration": str(out / "table"), "transform": "identity", "beta": 0.05, "validation": 0.0},
        ),
    ]


def decoding_groups(out: pathlib.Path, preset: str) -> dict[str, tuple[str, ...]]:
    """Title -> methods, as eval.decode's --method takes them, that are decoded together."""
    strengths = SIZES[preset].strengths
    model = {name: str(out / name / "model") for name in ("reward_model", "laws", "edit", "arm", "dpo", "rl")}
    laws = f"distribution:{model['laws']}"
    wanted = {  # method -> (title, KIND:DIR)
        "best_of_n": ("base and best-of-n", "best_of_n"),
        "args": ("ARGS", f"args:{model['reward_model']}"),
        # At so large a beta what a method's top_k does alone, which the others are to be compared with.
        "unguided": ("the ten likeliest tokens", f"{laws}:soft"),
        "laws": ("distributional CD", f"{laws}:soft"),
        "follower": ("Stackelberg on tokens", f"{laws}:follower(bound=2)"),
        "calibrated": ("InfAlign's tilt", f"{laws}:calibrated(exp:5)"),
        "blockwise": ("blockwise CD", f"blockwise:{laws}:mean"),
        "transfer": ("Transfer Q*", f"transfer:{model['dpo']}"),
        "genarm": ("GenARM", f"genarm:{model['arm']}"),
        "re_control": ("RE-Control", f"re_control:{model['edit']}"),
        "ggro": ("GGRO", "ggro"),
        "smc": ("SMC", "smc"),
    }
    groups: dict[str, tuple[str, ...]] = {
        title: (f"{kind}@{strengths[name]}",) for name, (title, kind) in wanted.items() if name in strengths
    }
    return groups | {"DPO": (f"policy:{model['dpo']}",), "RL": (f"policy:{model['rl']}",)}


def left_out(preset: str) -> list[str]:
    """Methods of the largest preset that another one leaves out."""
    return [name for name in SIZES["smollm2"].strengths if name not in SIZES[preset].strengths]


def decode_options(out: pathlib.Path, preset: str, shared: dict[str, Any]) -> dict[str, Any]:
    """Options of every decoding, as `stages.decode_options`."""
    size = SIZES[preset]
    return shared | {
        "model": str(out / "base"),
        "prompts": str(out / "data" / "held_out.jsonl"),
        "reward": str(out / "reward_model" / "model"),
        "gold": GOLD,
        "second_gold": SECOND_GOLD,
        "num_particles": size.particles,
        "lookahead": size.lookahead,
        "max_new_tokens": size.tokens,
        "batch_size": min(size.held_out, 16),
        "inspect": size.inspect,
        "out": str(out / "decode"),
    }
