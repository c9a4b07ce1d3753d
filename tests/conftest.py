"""What every test shares: an own cache folder, one thread count, and an honest word about what could not run here."""

import os
import shutil

import pytest
import torch

TOOLS = {"chromium": "chromium", "strace": "strace"}


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """No test reads or fills the person's cache."""
    os.environ["CLOCHE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["LANGUAGE"] = "en"
    torch.set_num_threads(2)


@pytest.fixture(scope="module")
def one_thread():
    """Work this small is faster on one, above all where others use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def quiet_machine(one_thread):
    """How fast this machine multiplies does not matter here, so it is not measured after every training."""
    from cloche.use import train  # here: most tests need none of it

    patch = pytest.MonkeyPatch()
    patch.setattr(train, "limit_of", lambda *given: 1e9)
    yield
    patch.undo()


def pytest_runtest_setup(item):
    for mark in item.iter_markers("needs"):
        if shutil.which(TOOLS[mark.args[0]]) is None:
            pytest.skip(f"not run: needs {mark.args[0]}")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("not run: needs a CUDA device")


def pytest_terminal_summary(terminalreporter):
    found = {r.longrepr[2].removeprefix("Skipped: ") for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)}
    for text in sorted(found):
        terminalreporter.write_line(text)
