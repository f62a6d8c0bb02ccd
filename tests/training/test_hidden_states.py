"""Hidden states of a frozen base: computed once, equal to those of the pass, refused where they are of another."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxalign.training import hidden_states as states
from jaxalign.training.value_options import ValueOptions
from jaxalign.training.values import ValueRow, collate_values
from tests.conftest import tiny_lm

ROWS = [ValueRow([1 + i % 3, 2], [3 + i % 5] * (1 + i % 4), 0.5, 0.5, 0.0) for i in range(7)]
COLLATE = collate_values(ValueOptions(), 32)


def counted(lm, monkeypatch) -> list[int]:
    """The rows of each pass through the base, as traced and run."""
    passes: list[int] = []
    whole = states._write

    def write(path, lm, params, rows, collate, size):
        passes.append(len(rows))
        whole(path, lm, params, rows, collate, size)

    monkeypatch.setattr(states, "_write", write)
    return passes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_states_are_those_of_the_pass_computed_once_and_go_on(dtype, tmp_path, monkeypatch):
    lm, params = tiny_lm(0, dtype=dtype, max_length=64)
    monkeypatch.setattr(states, "SHARD", 3)
    passes = counted(lm, monkeypatch)
    read = lambda: states.stored_states(tmp_path / "states", lm, params, ROWS, COLLATE, size=2)  # noqa: E731
    found = read()
    assert passes == [3, 3, 1]
    batch = states.with_states(COLLATE, found)([(row, i) for i, row in enumerate(ROWS)])
    whole = COLLATE(ROWS)
    expected = np.asarray(lm.hidden(params, whole["tokens"], mask=whole["mask"]), np.float32)
    kept = np.where(whole["mask"][..., None], expected, 0)
    np.testing.assert_allclose(batch["hidden"].astype(np.float32), kept, atol=2e-5 if dtype == "float32" else 0.05)
    read()
    assert passes == [3, 3, 1]
    (tmp_path / "states/00001.npy").unlink()
    read()
    assert passes == [3, 3, 1, 3]


def test_states_of_another_base_or_other_rows_are_refused(tmp_path):
    lm, params = tiny_lm(0, max_length=64)
    folder = tmp_path / "states"
    states.stored_states(folder, lm, params, ROWS, COLLATE, size=4)
    with pytest.raises(ValueError, match="states: expected those of this run's rows"):
        states.stored_states(folder, lm, params, ROWS[:-1], COLLATE, size=4)
    with pytest.raises(ValueError, match="states: expected those of this run's base"):
        states.stored_states(folder, lm, jax.tree.map(lambda x: x * 1.01, params), ROWS, COLLATE, size=4)


def test_states_that_are_not_finite_or_not_as_written_are_named(tmp_path):
    lm, params = tiny_lm(0, max_length=64)
    folder, path = tmp_path / "states", tmp_path / "states/00000.npy"
    read = lambda params: states.stored_states(folder, lm, params, ROWS, COLLATE, size=4)  # noqa: E731
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(np.nan), params)
    with pytest.raises(
        ValueError, match=r"^states: expected finite numbers of the base, found others for rows of 00000"
    ):
        read(broken)
    assert not path.exists()
    (folder / "stamp.json").unlink()
    read(params)
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=rf"^00000\.npy: expected the file as it was written, .* {path}; remove that"):
        read(params)
    (folder / ".00000.npy.blake2b").unlink()  # as one from before there were digests
    read(params)
    whole[-4:] = np.float32(np.inf).tobytes()
    path.write_bytes(whole)
    with pytest.raises(
        ValueError, match=rf"^states: expected finite numbers, found others in {path}; remove that file"
    ):
        read(params)
