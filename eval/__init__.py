from jaxalign import _signals

_signals.at_start()
