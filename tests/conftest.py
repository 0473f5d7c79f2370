"""What every test shares: one thread, fixed seeds, no hub, and a GPU only where there is one."""

import os
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.torch_only import make_torch_only_environment

CACHE = Path(__file__).resolve().parents[1] / ".cache"

# libraries read these when they are imported or first used, which no line above does
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("HF_HOME", str(CACHE / "huggingface"))
os.environ.setdefault("MPLCONFIGDIR", str(CACHE / "matplotlib"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(CACHE / "torch_extensions"))
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))

torch.set_num_threads(1)

if find_spec("hypothesis"):  # the tests that run on GPUs do without it
    import hypothesis

    hypothesis.settings.register_profile("suite", derandomize=True, database=None, deadline=None)
    hypothesis.settings.register_profile(
        "thorough", max_examples=10_000, database=None, deadline=None, print_blob=True
    )
    hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def torch_only_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has torch and what torch requires, and nothing else."""
    return make_torch_only_environment(tmp_path_factory.mktemp("torch_only"))
