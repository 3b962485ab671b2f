"""One seed, one dtype, one thread for every test, and no GPU: nothing was compared on one."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; processes that tests start inherit it
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


LONG = ("test_scripts", "test_wiring", "test_resume", "test_parallel")


def pytest_collection_modifyitems(items):
    """The longest files first: no process of pytest-xdist begins one when all others are done."""
    items.sort(key=lambda item: next(
        (i for i, name in enumerate(LONG) if item.path.name.startswith(name)), len(LONG)))


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def toy_folder():
    from virtue.plumbing.loading import resolve
    return resolve("toy")
