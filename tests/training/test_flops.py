"""Operations of a step by formula against the compiler's count, the peaks of devices, and MFU in the metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import models, training
from jaxalign.training import adapters, flops, objectives
from tests.conftest import needs_jit, tiny_config, tiny_lm

WIDE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 192,
    "max_length": 64,
}
SPEC = models.Lora(4, 8.0)
TEXT = {name: np.ones((1, 4, 48), kind) for name, kind in (("tokens", np.int32), ("mask", bool), ("loss_mask", bool))}
PAIR = {"chosen": TEXT, "rejected": TEXT}


def counted(lm, loss, trained, frozen, batch) -> float:
    """Operations by the compiler, of one step without loops."""
    optimizer, _ = training.adamw(learning_rate=1e-3, steps=4)
    state = jax.eval_shape(lambda params: training.create(params, optimizer), trained)
    step = training.train_step(loss, optimizer)
    return step.lower(state, batch, frozen).compile().cost_analysis()["flops"]


def shapes(lm, spec=None):
    params = jax.eval_shape(lm.init, jax.random.key(0))
    return params, None if spec is None else models.lora.init(jax.random.key(1), lm, spec)


@needs_jit
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"windows": (8, None)}], ids=str)
def test_all_weights_agree_with_the_compiler(changes):
    lm = models.LanguageModel(tiny_config(**WIDE, **changes))
    params, _ = shapes(lm)
    found = flops.counter(lm, params)(flops.text_lengths(TEXT))
    real = counted(lm, objectives.language_model(lm), params, None, TEXT)
    # The compiler computes all scores of a window and masks them.
    assert found == pytest.approx(real, rel=0.08 if "windows" in changes else 0.05)
    assert found < real


@needs_jit
@pytest.mark.parametrize("compared", [False, True])
def test_an_adapter_agrees_with_the_compiler(compared):
    """Weights under an adapter have no gradient of their own; as the reference of DPO they are read once more."""
    lm = models.LanguageModel(tiny_config(**WIDE))
    params, adapter = shapes(lm, SPEC)
    plain = objectives.dpo(lm, beta=0.1) if compared else objectives.autoregressive_reward(lm, beta_r=0.1)
    found = flops.counter(lm, adapter, params, compared=compared)(flops.text_lengths(PAIR))
    real = counted(lm, adapters.with_adapter(plain, SPEC), adapter, params, PAIR)
    assert found == pytest.approx(real, rel=0.06)


@needs_jit
def test_a_reference_agrees_with_the_compiler():
    lm = models.LanguageModel(tiny_config(**WIDE))
    params, _ = shapes(lm)
    found = flops.counter(lm, params, params)(flops.text_lengths(PAIR))
    assert found == pytest.approx(counted(lm, objectives.dpo(lm, beta=0.1), params, params, PAIR), rel=0.05)


def test_a_head_on_a_frozen_body_is_one_pass():
    lm = models.LanguageModel(tiny_config(models.Head("value", hidden_size=8), **WIDE))
    params, _ = shapes(lm)
    body, head = {"transformer": params["transformer"]}, {"head": params["head"]}
    forward = 2 * 7 * flops.matrix_weights(lm, body) + flops.attention_flops(lm.config, 7)
    assert flops.counter(lm, head, body)([7]) == forward + 6 * 7 * flops.matrix_weights(lm, head)
    assert flops.counter(lm, head)([7]) == 6 * 7 * (64 * 8 + 8)  # the body has read the rows before


def test_a_token_counts_the_experts_that_it_runs_through():
    dense = models.LanguageModel(tiny_config(**WIDE))
    sparse = models.LanguageModel(tiny_config(**WIDE, block=models.Block(experts=models.Experts(4, 2))))
    each = 2 * 3 * 64 * 192  # two layers
    more = flops.matrix_weights(sparse, shapes(sparse)[0]) - flops.matrix_weights(dense, shapes(dense)[0])
    assert more == each + 2 * 64 * 4  # two of four experts, and the router


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("compared", [False, True])
def test_an_iteration_draws_reads_and_updates(compared, adapter):
    lm = models.LanguageModel(tiny_config(**WIDE))
    params, lora = shapes(lm, SPEC)
    trained = {"adapter": lora} if adapter else params
    count = flops.policy_gradient_counter(lm, trained, params, passes=3, reads=2, compared=compared)
    base, own = flops.matrix_weights(lm, params), flops.matrix_weights(lm, trained)
    whole = base + own if adapter else own
    texts, attention = [7, 9, 4, 6], lambda *lengths: sum(flops.attention_flops(lm.config, x) for x in lengths)
    # Prompts of 5 and 3 tokens, two responses of each.
    drawn = 2 * whole * (5 + 3 + 2 + 4 + 1 + 3) + attention(5, 3, *texts) - attention(5, 5, 3, 3)
    read = 2 * (2 * whole * 26 + attention(*texts)) + 2 * base * 26 + attention(*texts)
    # Forward, and backward by states and weights; of weights under an adapter by states alone.
    update = 2 * 26 * ((3 * own + 2 * base) if adapter else 3 * own) + 3 * attention(*texts)
    again = compared * (2 * 26 * base + attention(*texts))
    assert count([5, 3], [2, 4, 1, 3]) == pytest.approx(drawn + read + 3 * (update + again))


def test_only_real_tokens_count():
    short = {**TEXT, "mask": np.arange(48)[None, None] < np.asarray([[5], [48], [0], [1]])[None]}
    assert flops.text_lengths(short) == [5, 48, 0, 1]


@pytest.mark.parametrize(
    ("kind", "dtype", "given", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 0.0, 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 0.0, 756e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 0.0, 312e12),
        ("NVIDIA L40S", "bfloat16", 0.0, 362e12),
        ("TPU v5 lite", "bfloat16", 0.0, 197e12),
        ("TPU v5", "bfloat16", 0.0, 459e12),
        ("NVIDIA H100 80GB HBM3", "float32", 0.0, None),
        ("NVIDIA H1000", "bfloat16", 0.0, None),
        ("cpu", "bfloat16", 0.0, None),
        ("cpu", "float32", 1.5, 1.5e12),
    ],
)
def test_the_peak_is_known_or_given(kind, dtype, given, expected):
    assert flops.peak_flops(kind, dtype, given=given) == expected


def test_nothing_is_told_of_a_device_without_a_peak():
    lm, params = tiny_lm()
    assert flops.work_of(lm, params, devices=1) is None
    work = flops.work_of(lm, params, devices=4, peak_tflops=2.0)
    assert work is not None
    assert work.peak == 8e12
    assert work.flops({"mask": jnp.ones((1, 2, 3), bool)}) == flops.counter(lm, params)([3, 3])
