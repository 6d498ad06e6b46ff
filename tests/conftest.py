"""Set before JAX is imported anywhere: 8 CPU devices, no silent broadcasting between ranks, and one
store of compiled programs, which tests, workers and the processes they start share. And the whole
runs that several files of tests look at."""

import collections
import gc
import os
import signal
from pathlib import Path

import forked
import pytest
from runs import QUICK_COMPILING

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {QUICK_COMPILING}"
)
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "xla"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# Traced programs keep many objects, and few of them are in cycles that are worth looking for.
gc.set_threshold(100_000, 20, 50)


# A signal that is ignored, as nohup ignores it, would be ignored in the processes of tests too; one
# that is handled is not.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


# Files whose tests are whole runs, or wait for several processes; the longest first.
LONGEST = (
    "kills", "train_command", "hosts", "faults", "init_from", "memorized", "families", "meshes",
    "surfaces", "live_page", "browser", "mixture", "packing", "export", "imported", "report",
    "language_model", "products", "gpt", "optimizer", "serve", "sample_command", "decode", "step",
    "tools",
)  # fmt: skip
# Files that `make test` leaves out: comparisons with other programs, and of many compiled programs.
THOROUGH = (
    "bench", "collectives", "compiler", "context", "engine", "experts", "families", "hf", "kernels",
    "lm_eval", "plan", "remat", "scan",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The longest files first, and the cases that `make test` keeps of thorough tests.

    A file that begins last is what one worker alone would end with. `thorough(keep=n)` leaves the
    first n cases of a parametrised test in `make test`.
    """
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    cases = collections.Counter()
    for item in items:
        if item.path.stem.removeprefix("test_") in THOROUGH:
            item.add_marker(pytest.mark.thorough)
            continue
        mark = item.get_closest_marker("thorough")
        function = item.nodeid.split("[")[0]
        cases[function] += 1
        if mark is not None and cases[function] <= mark.kwargs.get("keep", 0):
            item.own_markers[:] = [own for own in item.own_markers if own.name != "thorough"]


@pytest.fixture(scope="session", autouse=True)
def environment_of_forks():
    forked.early()


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing disturbed: config.toml, run/, cache/, corpus.txt."""
    from runs import SAMPLE, train, write_config

    folder = tmp_path_factory.mktemp("unbroken")
    assert train(write_config(folder, sample=SAMPLE)) == 0
    return folder


@pytest.fixture(scope="session")
def unbroken_process(tmp_path_factory):
    """As `unbroken`, by a process on one device, whose sums are in another order."""
    from runs import run_process, write_config

    folder = tmp_path_factory.mktemp("process")
    code, output = run_process(write_config(folder))
    assert code == 0, output
    return folder


@pytest.fixture
def copy(unbroken, tmp_path):
    """A copy of `unbroken` to break: its config names the original's corpus and the copy's run."""
    from runs import copied

    copied(unbroken, tmp_path)
    return tmp_path
