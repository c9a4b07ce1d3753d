"""What a run folder says, read as an enemy's: bounded in time, and whatever fails in its use is told as the fault of its file."""

from contextlib import contextmanager
from pathlib import Path
import tomllib

from cloche.errors import UserError
from cloche.files import damaged, read_bytes
from cloche.words import _

MOST_RECIPE_BYTES, MOST_DOTS = 64 << 10, 500  # a key a.a.a.… of 64 kB takes tomllib 17 s


def read_toml(path: Path) -> dict:
    """The tables of a run's recipe. Raises: UserError "damaged"."""
    try:
        return parse_toml(read_bytes(path, MOST_RECIPE_BYTES))
    except (ValueError, RecursionError) as error:
        raise damaged(path, "{found}", str(error)) from None


def parse_toml(raw: bytes) -> dict:
    """Raises: ValueError, RecursionError; soon, whatever it is given."""
    if len(raw) > MOST_RECIPE_BYTES or any(line.count(b".") > MOST_DOTS for line in raw.splitlines()):
        raise ValueError(_("longer than any recipe"))
    return tomllib.loads(raw.decode())


@contextmanager
def believing(path: Path):
    """Around the use of what a file says, beyond what was checked: whatever fails is the fault of the file, a UserError "damaged"."""
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        raise damaged(path, "{found}", f"{type(fault).__name__}: {fault}") from fault
