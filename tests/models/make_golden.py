"""python -m tests.models.make_golden: writes tests/models/golden, tiny checkpoints by transformers and their outputs.

Needs torch. Weights are random with a seed, larger than usual so that an error in any part shows in the logits, and
stored as bfloat16, which halves the files; the outputs are those of the same values in float32. Logits and rewards are
what the model's own `forward` gives: which token a classifier is read at is transformers' to say.
"""

from __future__ import annotations

import json
import pathlib

import numpy as np

from tests.models.families import CHECKPOINTS, COMMON, LIVE, PADDINGS, PADS, ROWS, inputs, reward_batches

GOLDEN = pathlib.Path(__file__).parent / "golden"


def build(name: str):
    """transformers' torch model of a checkpoint, random."""
    import torch
    import transformers

    family, kind, fields = (CHECKPOINTS | LIVE)[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON | fields)
    model = getattr(transformers, f"{family}{kind}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.15 if parameter.ndim > 1 else 0.3
            shift = 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0
            parameter.copy_((shift + scale * torch.randn_like(parameter)).bfloat16())
        model.tie_weights()
    return model


def outputs(model, padding: str, rows: list[list[int]] = ROWS) -> np.ndarray:
    """Logits [B,L,V] of real positions (zeros at padding)."""
    import torch

    tokens, mask = (torch.tensor(x) for x in inputs(padding, rows))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    return (logits * mask[..., None]).numpy()


def scores(model, pad: str) -> dict[str, np.ndarray]:
    """Padding -> the labels' scores [B,W] of a classifier whose config has that pad id, by its own `forward`."""
    import torch

    model.config.pad_token_id = PADS[pad]
    found = {}
    with torch.no_grad():
        for padding, (tokens, mask) in reward_batches(pad).items():
            logits = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask)).logits.numpy()
            found.setdefault(padding.split()[0], []).append(logits)
    return {padding: np.concatenate(parts) for padding, parts in found.items()}


def everything(model) -> dict[str, np.ndarray]:
    """What outputs.npz holds: padding -> logits, or "pad id, padding" -> scores of a classifier."""
    if not hasattr(model, "score"):
        return {padding: outputs(model, padding) for padding in PADDINGS}
    before = model.config.pad_token_id
    found = {f"{pad}, {padding}": x for pad in PADS for padding, x in scores(model, pad).items()}
    model.config.pad_token_id = before
    return found


def main() -> None:
    for name in CHECKPOINTS:
        model = build(name)
        folder = GOLDEN / name
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "outputs.npz", **{k: x.astype(np.float32) for k, x in everything(model).items()})
        model.bfloat16().save_pretrained(folder)
        # Written by version: keep what the computation depends on, drop the version string.
        config = json.loads((folder / "config.json").read_text())
        config.pop("transformers_version", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "generation_config.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
