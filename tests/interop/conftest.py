"""What the tests against PEFT, transformers, TRL and datasets share:
a tiny base, and adapters with values in them.

    pip install -e ".[test,interop]" && pytest tests/interop

Where a library is absent, the tests that need it are skipped. None needs a network.
"""
import os

import pytest
import torch
from tiny import ARCHITECTURES, make_tiny_model

# TRL and datasets would report that they run
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random Mistral of two layers and its tokenizer, as files."""
    return make_tiny_model(tmp_path_factory.mktemp("interop") / "base")


@pytest.fixture(scope="session", params=ARCHITECTURES)
def every(request, tmp_path_factory):
    """The same of each architecture."""
    return make_tiny_model(tmp_path_factory.mktemp("every") / "base", model_type=request.param)


@pytest.fixture
def model(folder):
    from virtue.plumbing.loading import load_model

    return load_model(folder)


@pytest.fixture
def adapt():
    """adapt(model, name, seed, **settings): an adapter of random values: a lost one shows."""
    from virtue.lora import adapter_parameters, add_adapter

    def add(model, name, seed, **settings):
        add_adapter(model, name, **{"rank": 4, "alpha": 6.0, "seed": seed, **settings})
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(model, name):
            if parameter.requires_grad:  # the identity of a whole matrix stays
                spread = 0.1 if settings.get("rank", 4) else 0.02
                parameter.data = torch.randn(parameter.shape, generator=generator) * spread
    return add
