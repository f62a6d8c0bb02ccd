"""python -m tests.models.make_adapters [NAME …]: writes tests/models/adapters, tiny adapters by peft and what peft
computes; of these names alone where some are given.

Needs torch and peft. The bases are the checkpoints of tests/models/golden; an adapter's weights are random with a seed,
large enough that a wrong scale, rank or target shows. The outputs are those of PeftModel's own forward in float32, of
the adapter as peft reads it back.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, NamedTuple

import numpy as np

from tests.models.make_golden import GOLDEN

ADAPTERS = pathlib.Path(__file__).parent / "adapters"
TOKENS = [[7, 8, 9, 10, 11, 12], [20, 21, 22, 60, 5, 30]]  # no padding, no pad id: every rule reads the last token
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Case(NamedTuple):
    """An adapter: its base among the golden checkpoints, the class that reads it, the fields of its LoraConfig."""

    base: str
    kind: str
    fields: dict[str, Any]


LM, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
CASES = {
    "queries_and_values": Case("llama", LM, {"target_modules": ["q_proj", "v_proj"], "r": 2, "lora_alpha": 6}),
    "rslora": Case("qwen3", LM, {"target_modules": EVERY, "use_rslora": True, "r": 4, "lora_alpha": 3}),
    "all_linear": Case("mistral", LM, {"target_modules": "all-linear", "init_lora_weights": "gaussian", "r": 2}),
    "regex": Case("llama", LM, {"target_modules": r".*layers\.1.*\.(k_proj|up_proj)", "r": 3}),
    "layers": Case("llama", LM, {"target_modules": ["o_proj", "down_proj"], "layers_to_transform": [1], "r": 2}),
    "layers_by_name": Case(
        "llama",
        LM,
        {"target_modules": ["gate_proj"], "layers_to_transform": 0, "layers_pattern": "layers", "r": 2},
    ),
    "excluded": Case(
        "llama", LM, {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*|.*\.q_proj", "r": 2}
    ),
    "excluded_names": Case("llama", LM, {"target_modules": EVERY, "exclude_modules": ["k_proj", "down_proj"], "r": 2}),
    "patterns": Case(
        "qwen2",
        LM,
        {
            "target_modules": EVERY,
            "r": 2,
            "lora_alpha": 4,
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 1, "model.layers.0.mlp.up_proj": 4},
            # "proj" matches nothing; up_proj matches twice: the first key of the file, which peft sorts, counts.
            "alpha_pattern": {"up_proj": 5, "^model.layers.0.self_attn.v_proj": 9, r"(k|up)_proj": 2, "proj": 7},
        },
    ),
    "patterns_rslora": Case(
        "llama",
        LM,
        {
            "target_modules": ["q_proj", "k_proj", "v_proj"],
            "use_rslora": True,
            "r": 2,
            "rank_pattern": {"k_proj": 4},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "lm_head": Case("llama", LM, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "r": 2}),
    "lm_head_tied": Case("llama3", LM, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"], "r": 2}),
    "gpt2": Case("gpt2", LM, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "r": 2}),
    "phi3": Case("phi3", LM, {"target_modules": "all-linear", "r": 2}),
    "gpt_neox": Case("gpt_neox", LM, {"target_modules": ["query_key_value", "dense", "dense_4h_to_h"], "r": 2}),
    "falcon": Case("falcon40", LM, {"target_modules": "all-linear", "r": 2}),
    "gemma2": Case("gemma2", LM, {"target_modules": EVERY, "r": 2}),
    "gemma3": Case("gemma3", LM, {"target_modules": ["q_proj", "v_proj"], "r": 2}),
    "olmo2": Case("olmo2", LM, {"target_modules": ["k_proj", "up_proj"], "r": 2}),
    "opt": Case("opt", LM, {"target_modules": ["q_proj", "v_proj", "fc1"], "r": 2}),
    "smollm3": Case("smollm3", LM, {"target_modules": ["o_proj", "gate_proj"], "r": 2}),
    "granite": Case("granite", LM, {"target_modules": ["v_proj", "down_proj"], "r": 2}),
    "mixtral": Case("mixtral", LM, {"target_modules": ["q_proj", "o_proj"], "r": 2}),
    "qwen3_moe": Case("qwen3_moe", LM, {"target_modules": ["k_proj", "v_proj"], "r": 2}),
    "score": Case("llama_reward", CLASSIFIER, {"target_modules": EVERY, "task_type": "SEQ_CLS", "r": 2}),
    "score_of_a_language_model": Case("qwen2", CLASSIFIER, {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}),
}


def base_model(case: Case):
    """transformers' model of a case's base, in float32."""
    import torch
    import transformers

    labels = {"num_labels": 1} if case.kind == CLASSIFIER else {}
    return getattr(transformers, case.kind).from_pretrained(GOLDEN / case.base, dtype=torch.float32, **labels)


def build(case: Case):
    """peft's model of a case, with random weights of the adapter."""
    import peft
    import torch

    torch.manual_seed(1)
    model = peft.get_peft_model(base_model(case), peft.LoraConfig(**{"task_type": "CAUSAL_LM"} | case.fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_((0.15 * torch.randn_like(parameter)).bfloat16())
    return model


def outputs(case: Case, folder: pathlib.Path) -> np.ndarray:
    """Logits [B,L,V], or scores [B] of a classifier, of the adapter in a folder, by PeftModel's own forward."""
    import peft
    import torch

    model = peft.PeftModel.from_pretrained(base_model(case), folder).eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(TOKENS)).logits
    return (found if found.ndim == 3 else found[:, 0]).numpy().astype(np.float32)


def main() -> None:
    for name in sys.argv[1:] or CASES:
        case = CASES[name]
        model, folder = build(case), ADAPTERS / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        # The base lies in the same place from the adapter's folder in every checkout.
        values = json.loads((folder / "adapter_config.json").read_text())
        values["base_model_name_or_path"] = f"../../golden/{case.base}"
        for field in ("target_modules", "exclude_modules"):  # sets in peft: written in any order
            values[field] = sorted(values[field]) if isinstance(values[field], list) else values[field]
        (folder / "adapter_config.json").write_text(json.dumps(values, indent=2) + "\n")
        np.savez_compressed(folder / "outputs.npz", outputs=outputs(case, folder))


if __name__ == "__main__":
    main()
