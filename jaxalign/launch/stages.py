"""The stages of `train.quickstart` as data: which job runs with which options, at two sizes."""

from __future__ import annotations

import contextlib
import ctypes
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxalign import _io
from jaxalign.worlds import opinions

GOLD = "jaxalign.worlds.opinions:golds"
LENGTH = 64  # longest row [tokens]
INSPECTED = 4  # prompts whose responses the report shows token by token


class Stage(NamedTuple):
    """A job of the quickstart."""

    title: str
    """What is printed when it begins."""
    job: str
    """Its name, as `jaxalign.commands.run` takes it."""
    options: dict[str, Any]
    """Of the job, by the names of its command line."""
    once: bool = False
    """Whether the job refuses a folder that it has written: it is done where that is."""


class Size(NamedTuple):
    """What a preset sets."""

    layers: int
    width: int
    texts: int
    pairs: int
    rollouts: int  # per prompt
    epochs: dict[str, float]  # sft, reward_model, value, cd_q, edit, arm, dpo
    table: int  # base samples per prompt that rewards are calibrated by
    rl_steps: int
    prompts: int
    strengths: dict[str, str]  # of each method, as eval.decode's --method takes them after @
    particles: int
    moves: int
    bounds: tuple[float, ...]  # of shaped rewards [units of reward], at beta 1


SIZES = {
    "default": Size(
        layers=2,
        width=128,
        texts=12_000,
        pairs=6_000,
        rollouts=8,
        epochs={
            "sft": 1.5,
            "reward_model": 1.5,
            "value": 3,
            "cd_q": 1,
            "edit": 2,
            "arm": 1.5,
            "dpo": 0.7,
        },
        table=16,
        rl_steps=20,
        prompts=96,
        strengths={
            "best_of_n": "2,4,8,16",
            "args": "4,2,1,0.5,0.25",
            "value": "2,1,0.5,0.25,0.12",
            "soft": "2,1,0.5",
            "calibrated": "0.3",
            "best_of": "4,16",
            "cd_q": "2,1,0.5,0.25",
            "blockwise": "4",
            "genarm": "4,2,1,0.5,0.25,0.06",
            "transfer": "1",
            "re_control": "1,4,16",
            "ggro": "4",
            "smc": "1,0.5",
            "quest": "1",
            "cards": "1",
        },
        particles=16,
        moves=16,
        bounds=(2.0, 6.0, 12.0),
    ),
    "tiny": Size(
        layers=1,
        width=64,
        texts=1_500,
        pairs=600,
        rollouts=2,
        epochs={"sft": 1, "reward_model": 1, "value": 1, "cd_q": 1, "edit": 1, "arm": 1, "dpo": 1},
        table=4,
        rl_steps=2,
        prompts=16,
        strengths={
            "best_of_n": "4",
            "value": "0.5",
            "genarm": "1",
        },
        particles=4,
        moves=4,
        bounds=(2.0,),
    ),
}


def training_stages(out: pathlib.Path, preset: str, shared: dict[str, Any]) -> list[Stage]:
    """The stages that make the world and train its models.

    Args:
      out: the run folder; each stage has a folder of its own in it.
      preset: a key of SIZES.
      shared: seed, dtype and mesh.

    Returns:
      The stages in order; each reads the folders of those before it.
    """
    size, data, base = SIZES[preset], out / "data", str(out / "sft" / "model")
    shared = shared | {"batch_size": 64, "max_length": LENGTH, "save_every": 100, "log_every": 20}
    pairs = shared | {"data": str(data / "pairs.jsonl"), "model": base}
    sampled = {
        "prompts": str(data / "prompts.jsonl"),
        "reward": str(out / "reward_model" / "model"),
        "max_new_tokens": opinions.MAX_NEW_TOKENS,
        "seed": shared["seed"],
    }
    values = shared | sampled | {"base": base, "samples": size.rollouts, "decode_batch": 512, "learning_rate": 1e-3}
    made = values | {"rollouts": str(out / "value")}  # the roll-outs of the first value model

    def stage(title: str, job: str, folder: str, options: dict[str, Any], **more: Any) -> Stage:
        return Stage(title, job, options | more | {"out": str(out / folder)}, once=job == "world")

    def epochs(name: str) -> dict[str, Any]:
        return {"epochs": size.epochs[name]}

    texts = {name: getattr(size, name) for name in ("texts", "pairs", "layers", "width")}
    new = {"architecture": str(data / "config.json"), "tokenizer": str(data / "tokenizer")}
    table = sampled | {"base": base, "dtype": shared["dtype"], "samples": size.table}
    policy_gradient = shared | sampled | {"model": base, "calibration": str(out / "table"), "transform": "identity"}
    q_head = {"head": "q"}
    return [
        stage("world and tokenizer", "world", "data", texts, held_out=size.prompts, seed=shared["seed"]),
        stage(
            "base model (sft)",
            "sft",
            "sft",
            shared | new | epochs("sft"),
            data=str(data / "texts.jsonl"),
            learning_rate=4e-3,
        ),
        stage("reward model", "reward_model", "reward_model", pairs | epochs("reward_model"), learning_rate=1e-3),
        # One head for every strength: its mean is the value, and shaped rewards are read from it.
        stage("laws of the reward", "value", "value", values | q_head | epochs("value"), objective="distribution"),
        stage(
            "value model by Bellman's equation (CD-Q)",
            "value",
            "cd_q",
            made | q_head | epochs("cd_q"),
            objective="cd_q",
        ),
        stage(
            "value on the base's hidden states (RE-Control)",
            "value",
            "edit",
            made | epochs("edit"),
            objective="td",
            frozen=True,
        ),
        stage("autoregressive reward model", "arm", "arm", pairs | epochs("arm"), learning_rate=5e-4, beta_r=0.5),
        stage("aligned model (DPO)", "dpo", "dpo", pairs | epochs("dpo"), learning_rate=3e-4, beta=0.3),
        stage("calibration table", "calibrate", "table", table),
        stage(
            "aligned model (RL on calibrated rewards)",
            "rl",
            "rl",
            policy_gradient,
            beta=0.15,
            samples=4,
            steps=size.rl_steps,
            learning_rate=1e-3,
            validation=0.0,  # it is measured among the other methods
        ),
    ]


def decoding_groups(out: pathlib.Path, preset: str) -> dict[str, tuple[str, ...]]:
    """Title -> methods, as eval.decode's --method takes them, that are decoded together."""
    size = SIZES[preset]
    names = ("reward_model", "value", "cd_q", "arm", "dpo", "edit", "rl")
    model = {name: str(out / name / "model") for name in names}
    laws = f"distribution:{model['value']}"
    wanted = {  # method -> (title, KIND:DIR)
        "best_of_n": ("base and best-of-n", "best_of_n"),
        "args": ("ARGS", f"args:{model['reward_model']}"),
        "value": ("distributional CD by means", f"{laws}:mean"),
        "soft": ("distributional CD", f"{laws}:soft"),
        "calibrated": ("InfAlign's tilt", f"{laws}:calibrated(exp:5)"),
        "best_of": ("best-of-n by tokens", f"{laws}:best_of"),
        "cd_q": ("CD-Q", f"value:{model['cd_q']}"),
        "blockwise": ("blockwise CD", f"blockwise:{laws}:mean"),
        "genarm": ("GenARM", f"genarm:{model['arm']}"),
        "transfer": ("Transfer Q*", f"transfer:{model['dpo']}"),
        "re_control": ("RE-Control", f"re_control:{model['edit']}"),
        "ggro": ("GGRO", "ggro"),
        "smc": ("SMC", f"smc:{laws}:mean"),
        "quest": ("QUEST", "quest"),
        "cards": ("CARDS", "cards"),
    }
    groups: dict[str, tuple[str, ...]] = {
        title: (f"{kind}@{size.strengths[method]}",)
        for method, (title, kind) in wanted.items()
        if method in size.strengths
    }
    groups["Stackelberg"] = tuple(f"{laws}:follower(bound={bound:g})@1" for bound in size.bounds)
    return groups | {"DPO": (f"policy:{model['dpo']}",), "RL": (f"policy:{model['rl']}",)}


def decode_options(out: pathlib.Path, preset: str, shared: dict[str, Any]) -> dict[str, Any]:
    """Options of every decoding: `evaluation.DecodeOptions` without its methods. Arguments as `training_stages`."""
    size = SIZES[preset]
    return shared | {
        "model": str(out / "sft" / "model"),
        "prompts": str(out / "data" / "held_out.jsonl"),
        "reward": str(out / "reward_model" / "model"),
        "gold": GOLD,
        "num_particles": size.particles,
        "num_steps": size.moves,
        "max_new_tokens": opinions.MAX_NEW_TOKENS,
        "batch_size": size.prompts,
        "inspect": INSPECTED,
        "out": str(out / "decode"),
    }


class Clock:
    """Seconds per stage, kept in a file so that a run in several sittings knows them all."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.exists():
            self.seconds = _io.read_json(path, then="remove that file: its times alone are lost")

    def begin(self, title: str) -> None:
        """Prints a stage's title with the time that the stages before it took."""
        minutes, seconds = divmod(round(sum(self.seconds.values())), 60)
        print(f"{title} ({minutes}:{seconds:02d} so far)", flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to those of a stage, and gives back the memory that it has freed."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - begin, 2)
            _io.write_json(self.path, self.seconds)
            give_back_memory()


def give_back_memory() -> None:
    """Has the C library return to the system what is free: after a stage it keeps up to a gigabyte, in pieces that the
    next stage's arrays do not fit into. Where it has no such call nothing is done."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
