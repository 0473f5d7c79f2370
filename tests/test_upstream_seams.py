"""Claims about other packages' names that we rest on: where one is gone, a sentence tells the version and our file."""

import importlib
import importlib.metadata
from dataclasses import dataclass

import pytest
from packaging.version import Version

pytest.importorskip("transformers")


@dataclass(frozen=True)
class Seam:
    """A name that is private, or that we wrap, and the file of ours that depends on it."""

    module: str
    name: str
    file: str
    since: str = "0"


SEAMS = [
    Seam("transformers.training_args", "OptimizerNames._member_map_", "integrations/transformers.py"),
    Seam("transformers.training_args", "OptimizerNames._member_names_", "integrations/transformers.py"),
    Seam("transformers.training_args", "OptimizerNames._value2member_map_", "integrations/transformers.py"),
    Seam("transformers.trainer_optimizer", "_OPTIMIZER_HANDLERS", "integrations/transformers.py", since="5.2.0"),
    Seam("transformers.trainer", "Trainer.get_optimizer_cls_and_kwargs", "integrations/transformers.py"),
    Seam("transformers.trainer", "Trainer.create_optimizer", "integrations/transformers.py"),
    Seam("transformers.trainer", "Trainer.compute_loss", "integrations/trainers.py"),
    Seam("transformers.trainer", "Trainer.create_model_card", "trainer.py"),
    Seam("transformers.trainer", "Trainer._load_best_model", "trainer.py"),
    Seam("transformers.trainer_callback", "ExportableState", "callbacks.py"),
    Seam("peft.tuners.tuners_utils", "BaseTunerLayer.adapter_layer_names", "peft_layers.py"),
    Seam("accelerate.optimizer", "AcceleratedOptimizer", "reporting/rates.py"),
]


def missing(seam: Seam) -> str:
    """Returns what to mend, nothing where the name is there."""
    package = seam.module.partition(".")[0]
    version = importlib.metadata.version(package)
    if Version(version) < Version(seam.since):
        return ""
    try:
        found = importlib.import_module(seam.module)
        for part in seam.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return f"{package} {version} has no {seam.module}.{seam.name} any more; mend hf_automagic/{seam.file}"
    return ""


@pytest.mark.matrix("T24")
@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.module}.{seam.name}")
def test_a_name_that_we_rest_on_is_there(seam):
    pytest.importorskip(seam.module.partition(".")[0])
    assert not missing(seam), missing(seam)


@pytest.mark.matrix("T24")
@pytest.mark.parametrize("gone", [("transformers.trainer", "Trainer.gone"), ("transformers.gone", "it")])
def test_a_name_that_is_gone_is_told_with_the_version_and_our_file(gone):
    version = importlib.metadata.version("transformers")
    told = f"transformers {version} has no {'.'.join(gone)} any more; mend hf_automagic/trainer.py"
    assert missing(Seam(*gone, "trainer.py")) == told
    assert not missing(Seam(*gone, "trainer.py", since="99"))
