"""One seed, one dtype and one thread for every test."""
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
