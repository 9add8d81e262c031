import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmark"))  # tests import exact, the evaluation by enumeration

torch.set_num_threads(1)  # the tensors are tiny: a second thread only costs


def pytest_configure(config):
    line = "beside(function, ...): a second process calls the function for the fixture beside"
    config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items):
    """Files with much for the second process come last: then it is done when they come."""
    much = Counter(test.path for test in items if test.get_closest_marker("beside"))
    items.sort(key=lambda test: much[test.path])


def begin_work(folder):
    """The second process works in an empty folder, on one core."""
    torch.set_num_threads(1)
    os.chdir(folder)


@pytest.fixture(scope="session", autouse=True)
def work(request, tmp_path_factory):
    """What takes long is done by a second process while other tests go on: a future by test."""
    context = multiprocessing.get_context("spawn")
    folder = tmp_path_factory.mktemp("work")
    with ProcessPoolExecutor(1, context, begin_work, [folder]) as pool:
        futures = {}
        for test in request.session.items:
            mark = test.get_closest_marker("beside")
            if mark:
                futures[test.nodeid] = pool.submit(*mark.args, **mark.kwargs)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def beside(request, work):
    """What the function in the test's mark has returned in the second process."""
    return work[request.node.nodeid].result()
