"""How methods are decoded, measured, compared and drawn: the work behind `python -m eval.decode`.

`run(DecodeOptions(…))` is that command as a function. A method of your own is a function MODULE:FUNCTION that takes
`MethodInputs` and gives a decoder (`jaxalign.evaluation.functions`).
"""

from jaxalign.evaluation.functions import MethodInputs, OwnDraw, OwnMethod, sampled
from jaxalign.evaluation.options import DecodeOptions
from jaxalign.evaluation.runs import run

__all__ = ["DecodeOptions", "MethodInputs", "OwnDraw", "OwnMethod", "run", "sampled"]
