"""One seed, one dtype and one thread for every test, and no GPU, on which nothing here was ever compared."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; processes that tests start inherit it
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """For pytest-xdist's ``--dist loadgroup``: a file's tests that share what is made once for the module stay in one
    process; each other test runs where there is room."""
    for item in items:
        if any(made.scope == "module" for found in item._fixtureinfo.name2fixturedefs.values() for made in found):
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(autouse=True)
def reproducible():
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def toy_folder():
    from virtue.models import resolve
    return resolve("toy")
