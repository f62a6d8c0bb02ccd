"""Jobs whose checkout and home folder cannot be written to."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

READ_ONLY = """
import errno, os, sys

PLACES = {{"open": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.link": 2, "os.truncate": 1}}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

def read_only(event, args):
    if event not in PLACES or event == "open" and not args[2] & WRITES:
        return
    for path in args[:PLACES[event]]:
        if not isinstance(path, (str, bytes, os.PathLike)) or event != "open" and not os.path.isabs(path):
            continue  # relative ones may be so to an open folder
        place = os.path.realpath(os.fsdecode(path))
        if place.startswith({roots!r}):
            if "__pycache__" not in place:
                with open({log!r}, "a") as sink:
                    print(event, place, file=sink)
            raise OSError(errno.EROFS, "Read-only file system", place)

sys.addaudithook(read_only)
"""
IN_A_CHECKOUT = """
import sys
from jaxalign import commands
words = {words!r}
for job in words:
    commands.start(job)
"""


MOUNTED = (
    'for place in "$1" "$2"; do mount --bind "$place" "$place" && mount -o remount,ro,bind "$place" || exit 9; done'
)
"""Shell words that make two folders read-only for a process and its children, and run the rest of the words."""


def mounted_read_only(*folders: str) -> list[str]:
    """The words before a command to which the kernel refuses every write to the folders; [] where it lets nobody."""
    alone = ["unshare", "--mount", *(["--map-root-user"] if os.geteuid() else [])]
    words = [*alone, "sh", "-c", f'{MOUNTED}; shift 2; exec "$@"', "sh", *folders]
    if shutil.which("unshare") is None:
        return []
    tried = f"touch {shlex.quote(folders[0])}/tried 2>/dev/null && exit 9; exit 0"
    return (
        words if subprocess.run([*words, "sh", "-c", tried], capture_output=True, check=False).returncode == 0 else []
    )


@pytest.mark.parametrize("how", ["hook", "mount"])
def test_jobs_run_in_a_checkout_and_a_home_that_cannot_be_written(how, tmp_path):
    """A hook of the interpreter refuses every write there, root's too; what is tried is a line of the log. A read-only
    mount refuses those of native code as well. matplotlib goes elsewhere with its settings where it has no home."""
    world, out, home = tmp_path / "world", tmp_path / "out", tmp_path / "home"
    home.mkdir()
    (tmp_path / "site").mkdir()
    roots, log = (f"{ROOT}{os.sep}", f"{home}{os.sep}"), tmp_path / "tried"
    before: list[str] = []
    if how == "hook":
        (tmp_path / "site/sitecustomize.py").write_text(READ_ONLY.format(roots=roots, log=str(log)))
    elif not (before := mounted_read_only(str(ROOT), str(home))):
        pytest.skip("this system lets its users mount nothing")
    sft = f"sft --data {world}/texts.jsonl --architecture {world}/config.json --tokenizer {world}/tokenizer --steps 1"
    decode = f"decode --model {out}/sft/model --prompts {world}/held_out.jsonl --reward jaxalign.worlds.opinions:golds"
    jobs = [
        f"world --out {world} --texts 24 --pairs 4 --held-out 3 --layers 1 --width 8",
        f"{sft} --batch-size 4 --max-length 48 --validation 0 --out {out}/sft",
        f"{decode} --max-new-tokens 3 --batch-size 4 --out {out}/decode",
        f"report {out} --out {out}/report.html",
    ]
    env = os.environ | {"HOME": str(home), "PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "HF_HOME", "MPLCONFIGDIR", "JAX_COMPILATION_CACHE_DIR"):
        env.pop(name, None)
    program = IN_A_CHECKOUT.format(words=[job.split() for job in jobs])
    found = subprocess.run(
        [*before, sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert (out / "report.html").exists()
    assert (out / "decode/frontier.png").exists()
    tried = log.read_text().splitlines() if log.exists() else []
    assert [line for line in tried if line != f"os.mkdir {home}/.config/matplotlib"] == []
    assert "Traceback" not in found.stderr
    assert not [line for line in found.stderr.splitlines() if "ead-only" in line and "matplotlib" not in line]
    assert how == "hook" or not any(home.iterdir())
