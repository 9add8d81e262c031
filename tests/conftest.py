import contextlib
import io
import multiprocessing
import os
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmark"))  # tests import exact, the evaluation by enumeration

torch.set_num_threads(1)  # also in the second process; for tiny tensors more threads only cost


def pytest_configure(config):
    config.addinivalue_line("markers", "beside(function, ...): see programs.beside")


def pytest_collection_modifyitems(items):
    """Files with the most tests marked beside come last, so that their results are ready."""
    marked = Counter(test.path for test in items if test.get_closest_marker("beside"))
    items.sort(key=lambda test: marked[test.path])


def call(folder, function, *args, **more):
    """In the second process: what the function returns, or what it printed and its error."""
    os.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            return function(*args, **more), None
        except BaseException:
            return None, printed.getvalue() + traceback.format_exc()


@pytest.fixture(scope="session", autouse=True)
def work(request, tmp_path_factory):
    """Let a second process call the functions of the tests marked beside. Yields {test: result}."""
    tests = [test for test in request.session.items if test.get_closest_marker("beside")]
    if not tests:
        yield {}
        return
    context = multiprocessing.get_context("spawn")
    # Ctrl-C is for the first process. When it leaves this block, the second one is ended.
    with context.Pool(1, signal.signal, [signal.SIGINT, signal.SIG_IGN]) as pool:
        results = {}
        for test in tests:
            assert "found" in test.fixturenames, f"{test.name} does not look at what is found"
            mark = test.get_closest_marker("beside")
            folder = tmp_path_factory.mktemp("beside")
            results[test.nodeid] = pool.apply_async(call, [folder, *mark.args], mark.kwargs)
        yield results


@pytest.fixture
def found(request, work):
    """What the function of the test's mark has returned."""
    result, error = work[request.node.nodeid].get(timeout=600)
    if error:
        pytest.fail(error, pytrace=False)
    return result
