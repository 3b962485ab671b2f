"""One seed, one dtype and one thread for every test, and no GPU, on which nothing here was ever compared."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; processes that tests start inherit it

import pytest
import torch

torch.set_num_threads(1)


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
