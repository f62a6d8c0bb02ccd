"""One benchmark in a process of its own: it prints its rows as lines of JSON, each as soon as it is known."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from typing import Any

import jax

from . import sizes


def work(text: str) -> None:
    """Measures the rows of a benchmark that begin in time. A row that fails does not end those after it.

    Args:
      text: JSON of {"function": "training.sft", "options": {...}, "tiny": bool, "until": seconds since 1970}.

    Raises:
      ValueError: the sizes are those of a GPU, and the device is a CPU.
    """
    asked: dict[str, Any] = json.loads(text)
    if jax.default_backend() == "cpu" and not asked["tiny"]:
        raise ValueError("device: expected a GPU, or --tiny, found a CPU")
    _tell({"device": jax.devices()[0].device_kind, "jax": jax.__version__})
    module, _, function = asked["function"].rpartition(".")
    found = getattr(importlib.import_module(f"{__package__}.{module}"), function)
    for title, measure in found(sizes.of(asked["tiny"]), **asked["options"]):
        if time.time() > asked["until"]:
            _tell({"left out": title})
            continue
        try:
            _tell({"row": measure()})
        except Exception as error:
            traceback.print_exc()
            _tell({"failed": title, "why": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


def _tell(values: dict[str, Any]) -> None:
    print(json.dumps(values), flush=True)
