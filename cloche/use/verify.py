"""`cloche verify-resume`: on this machine, is a run that was killed and went on the same run, to the bit?"""

import hashlib
import json
from pathlib import Path
import random
import subprocess
import sys
import tempfile
import time
from typing import Any

from cloche.errors import FAILED, UserError
from cloche.recipe import change, find, parse
from cloche.training.log import say
from cloche.words import _, duration

TRAIN = [sys.executable, "-m", "cloche", "train"]


def verify_resume(recipe: str, data: str | None, sets: dict[str, Any], kills: int = 3) -> tuple[dict[str, Any], str]:
    """Train once undisturbed; once more, killed (SIGKILL) at moments of chance and started again each time; compare.

    Returns: {"same", "seconds", "kills": [{"after_s", "step"}], "sha256"}, where step is that of the newest checkpoint then; and a line
        for the eye.
    Raises: UserError when a file of the two differs, or when the command itself fails.
    """
    if kills < 1:
        raise UserError(_("there is nothing to verify without a kill"), f"--kills {kills}", _("for example --kills 3"))
    name, raw = find(recipe, data)
    with tempfile.TemporaryDirectory(prefix="cloche-verify-") as folder:
        mine, whole, broken = Path(folder, f"{name}.toml"), Path(folder, "whole"), Path(folder, "broken")
        mine.write_text(parse(change(raw, sets), name).toml(), encoding="utf-8")
        t0 = time.monotonic()
        _train(mine, whole)
        whole_s = time.monotonic() - t0
        say(_("undisturbed: {time}").format(time=duration(whole_s)))
        again, killed = whole / "recipe.toml", []  # what was measured before its first step is in it
        for k in range(kills):
            after_s = _killed(again, broken, random.uniform(0.0, whole_s / (kills + 1)), wait=k > 0)
            if after_s is None:
                break
            killed.append({"after_s": round(after_s, 2), "step": _newest(broken)})
            told = _("killed {n}: after {s} s; the newest checkpoint is of step {step}")
            say(told.format(n=k + 1, s=f"{after_s:.1f}", step=killed[-1]["step"]))
        _train(again, broken)
        left = {run: _bits(run) for run in (whole, broken)}
        if differ := [file for file, bits in left[whole].items() if left[broken][file] != bits]:
            what = _("killed {n} times, {recipe} does not end as the undisturbed run").format(n=len(killed), recipe=recipe)
            raise UserError(what, ", ".join(differ), _("please report it"), code=FAILED, name="not-the-same")
        text = _("killed {n} times and started again: the same bits in {files}").format(n=len(killed), files=", ".join(left[whole]))
        return {"same": True, "seconds": round(whole_s, 1), "kills": killed, "sha256": left[whole]}, text


def _train(recipe: Path, out: Path) -> None:
    done = subprocess.run([*TRAIN, str(recipe), "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise UserError(_("the training itself failed"), done.stderr.decode(errors="replace").strip(), code=FAILED)


def _killed(recipe: Path, out: Path, after_s: float, wait: bool) -> float | None:
    """Start it, kill it so long after its start or, with wait, its first checkpoint. Returns the seconds it had; None when it had ended."""
    silent, before, t0 = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}, _newest(out), time.monotonic()
    process = subprocess.Popen([*TRAIN, str(recipe), "--out", str(out), "--save-seconds", "0.2"], **silent)
    while wait and process.poll() is None and _newest(out) <= before:
        time.sleep(0.02)
    try:
        process.wait(after_s)
    except subprocess.TimeoutExpired:
        process.kill()
    if process.wait() > 0:
        raise UserError(_("the training itself failed"), "", _("cloche train says why: type it with the same recipe"), code=FAILED)
    return time.monotonic() - t0 if process.returncode else None


def _newest(run: Path) -> int:
    """The step of its newest checkpoint."""
    return max((int(p.name.removeprefix("step-")) for p in run.glob("checkpoints/step-*")), default=0)


def _bits(run: Path) -> dict[str, str]:
    """What has to be alike: a hash by file, of the results without what a clock says."""
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    told = json.dumps({k: v for k, v in results.items() if k not in ("seconds", "speed")}, sort_keys=True)
    found = {name: (run / name).read_bytes() for name in ("model.safetensors", "events.jsonl")} | {"results.json": told.encode()}
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}
