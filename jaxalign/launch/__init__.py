"""The launch scripts of train/ and eval/, importable wherever the library is: `jaxalign.launch.train.sft`.

A wheel holds both folders inside this package. In a clone they stand at its top, where `python -m train.sft` finds
them; the clone's root then joins this package's path.
"""

from __future__ import annotations

import pathlib

_here = pathlib.Path(__file__).parent
if not (_here / "train").is_dir():
    __path__.append(str(_here.parent.parent))
