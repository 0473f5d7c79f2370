"""A Trainer on two ranks, by DDP and by FSDP2: as one process on both batches, and resumed to the bit."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import trainer_ranks
from tests.ranks import Ranks

KINDS = ["SHARDED_STATE_DICT", "FULL_STATE_DICT"]  # of accelerate's FSDP2; the second is the Trainer's default


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    two = Ranks(2)
    yield two
    two.stop()


def resumes_exactly(ranks: Ranks, folder: Path, kind: str, is_sharded: bool = True) -> dict[str, Any]:
    """Trains six steps, and three from the checkpoint after three; checks that the ranks and the two runs agree."""
    first, second = ranks.run(trainer_ranks.train, str(folder / "a"), kind, 6, None, is_sharded)
    checkpoint = str(folder / "a" / "checkpoint-3")
    resumed, _ = ranks.run(trainer_ranks.train, str(folder / "b"), kind, 6, checkpoint, is_sharded)
    assert all(held is is_sharded for held in first["placed"])
    assert first["pairs"] == [0, 0, 1, 1, 2, 2, 3, 3]
    for other in (second, resumed):
        assert (other["rates"], other["history"]) == (first["rates"], first["history"])
        for name, param in first["params"].items():
            assert torch.equal(other["params"][name], param)
            for key, held in first["states"][name].items():
                assert torch.equal(other["states"][name][key], held)
    return first


@pytest.mark.slow
@pytest.mark.matrix("T13", "T14")
@pytest.mark.parametrize(("kind", "is_sharded"), [("", False), *((kind, True) for kind in KINDS)])
def test_two_ranks_train_as_one_process_and_resume_to_the_bit(
    ranks: Ranks, tmp_path: Path, kind: str, is_sharded: bool
):
    alone = trainer_ranks.train(str(tmp_path / "alone"), "", 6, None, False)
    two = resumes_exactly(ranks, tmp_path, kind, is_sharded)
    assert two["history"] == pytest.approx(alone["history"], rel=1e-4)
    start = trainer_ranks.start()
    for name, param in alone["params"].items():
        # the halves' gradients add up in another order, and a code may fall to either side
        assert float((two["params"][name] - param).norm() / (param - start[name]).norm()) < 2e-2


@pytest.mark.gpu
@pytest.mark.matrix("T14")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_resume_to_the_bit(tmp_path: Path, kind: str):
    ranks = Ranks(2, "cpu:gloo,cuda:nccl")
    try:
        resumes_exactly(ranks, tmp_path, kind)
    finally:
        ranks.stop()
