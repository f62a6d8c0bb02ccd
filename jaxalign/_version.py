"""The version, in one place: pyproject.toml reads it from here, `jaxalign.__version__` gives it."""

__version__ = "0.2.0"
