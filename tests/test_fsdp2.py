"""FSDP2: parameters cut by rows over two processes are stepped, saved and loaded as in one."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Shard

from hf_automagic.optim import distributed
from tests import sharded_runs
from tests.ranks import Ranks
from tests.sharded_runs import ALL, ALONE, SHAPES, SHARDED

# Sums over rows are added in another order; 40 times what was seen. A code on the edge between two may fall to either
# side, as the random rounding of a 16-bit code may.
SAME, CODED = 1e-5, 1e-3


pytestmark = pytest.mark.matrix("T14")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    two = Ranks(2)
    yield two
    two.stop()


def worst(found: dict, expected: dict, options: dict) -> float:
    """Returns the largest distance between two reports' parameters, relative to how far the parameter went."""
    start = {name: p.detach() for name, p in sharded_runs.build(options, ALL, is_sharded=False)[0].named()}
    return max(
        float((found["params"][name] - p).norm() / (p - start[name]).norm()) for name, p in expected["params"].items()
    )


def same_bits(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(torch.nan_to_num(first[name], -7.0), torch.nan_to_num(second[name], -7.0)) for name in first
    )


OPTIONS = [
    ({"quantize_states": False}, SAME),
    ({}, CODED),
    ({"vector_precision": "log16"}, CODED),
    ({"error_correction": True, "momentum_scales": (1, 5)}, CODED),
    ({"adaptive_block_size": True, "block_error_target": 0.006, "sync_frequency": 3}, CODED),
    ({"quantize_states": False, "lr_granularity": "element", "sync_frequency": 5}, SAME),
    ({"quantize_states": False, "context": True, "cautious": True, "max_grad_norm": 0.01}, SAME),
    ({"quantize_states": False, "weight_decay": 0.1, "weight_decay_mode": "selective", "lr_pool": "group"}, SAME),
    ({"quantize_states": False, "allora": True, "lora_rank_penalty": True, "rank_penalty_every": 4}, SAME),
    (
        {"quantize_states": False, "edge_suppression": True, "frequency_penalty": 0.1}
        | {"background_regularization": True, "spatial_awareness": True},
        SAME,
    ),
]


@pytest.mark.parametrize(("options", "tolerance"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_two_ranks_step_as_one_process(ranks: Ranks, options: dict, tolerance: float):
    alone = sharded_runs.run(options, ALL, 8, ALONE)
    first, second = ranks.run(sharded_runs.run, options, ALL, 8, SHARDED)
    assert worst(first, alone, options) < tolerance
    assert same_bits(first["shared"], second["shared"])  # rates, counters, events, context
    moved = [float(found["shared"]["0 update_rms "]) for found in (first, alone)]
    assert moved[0] == pytest.approx(moved[1], rel=0.01) != 0
    assert (first["bytes"], first["blocks"]) == (alone["bytes"], alone["blocks"])
    for name, states in alone["states"].items():
        assert same_bits(first["states"][name], second["states"][name])
        assert {k: (t.shape, t.dtype) for k, t in first["states"][name].items()} == {
            k: (t.shape, t.dtype) for k, t in states.items()
        }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_without_sums_two_ranks_give_the_bits_of_one_process(ranks: Ranks, dtype: torch.dtype):
    """Adam's order sums nothing over rows: what is left is rounding, which must draw from the place in the whole."""
    options = {"momentum_order": "before", "factored": False, "self_tuning": False}
    alone = sharded_runs.run(options, SHAPES, 5, ALONE | {"dtype": dtype})
    first, _ = ranks.run(sharded_runs.run, options, SHAPES, 5, SHARDED | {"dtype": dtype})
    assert same_bits(first["params"], alone["params"])
    for name, states in alone["states"].items():
        assert same_bits(first["states"][name], states)


def test_one_shard_gives_the_bits_of_a_plain_parameter(ranks: Ranks):
    """Two copies of all rows, as where a mesh shards over one rank."""
    options = {"vector_precision": "log16", "allora": True, "context": True, "error_correction": True}
    alone = sharded_runs.run(options, ALL, 5, ALONE)
    for copy in ranks.run(sharded_runs.run, options, ALL, 5, SHARDED | {"copies": 2}):
        assert same_bits(copy["params"], alone["params"])
        for name, states in alone["states"].items():
            assert same_bits(copy["states"][name], states)


@pytest.mark.slow
def test_two_copies_of_two_shards_step_as_one_process():
    options, four = {"quantize_states": False, "allora": True, "max_grad_norm": 0.01}, Ranks(4)
    try:
        first, *others = four.run(sharded_runs.run, options, ALL, 5, SHARDED | {"copies": 2})
    finally:
        four.stop()
    assert worst(first, sharded_runs.run(options, ALL, 5, ALONE), options) < SAME
    for other in others:
        assert same_bits(other["params"], first["params"])
        assert same_bits(other["shared"], first["shared"])


def test_states_lie_with_their_rows_in_the_form_of_one_process(ranks: Ranks):
    options = {"lr_granularity": "element", "error_correction": True}
    alone = sharded_runs.describe_states(options, SHAPES)
    first, second = ranks.run(sharded_runs.describe_states, options, SHAPES)
    for key, (_, shape, dtype, _) in alone.items():
        name, state = key.split()
        is_along_rows = not ("_col" in state or state == "step" or state.endswith("row_scale"))
        rows = SHAPES[name][0]
        held = -(-rows // 2)
        assert first[key] == (is_along_rows, shape, dtype, held if is_along_rows else None)
        assert second[key] == (is_along_rows, shape, dtype, rows - held if is_along_rows else None)


@pytest.mark.parametrize("spoiled", ["tall", "bias"])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_the_step_on_all(ranks: Ranks, spoiled: str):
    for told in ranks.run(sharded_runs.spoil_one_rank, {"context": True}, spoiled):
        assert same_bits(told["after"]["params"], told["before"]["params"])
        for name, states in told["before"]["states"].items():
            assert same_bits(told["after"]["states"][name], states)
        assert told["after"]["shared"]["0 counters skipped"] == 1
        assert spoiled in told["events"][-1].action


def goes_from_two_to_one_and_back(ranks: Ranks, options: dict, folder: Path, kind: dict) -> None:
    alone, shared, two, one = ALONE | kind, SHARDED | kind, str(folder / "two"), str(folder / "one")
    straight, _ = ranks.run(sharded_runs.run, options, ALL, 9, shared)
    saved = ranks.run(sharded_runs.save, two, options, range(3), shared)[0]
    loaded = sharded_runs.load_and_train(two, options, range(0), alone)
    assert same_bits(loaded["params"], saved["params"])
    assert same_bits(loaded["shared"], saved["shared"])
    for name, states in saved["states"].items():
        assert same_bits(loaded["states"][name], states)
    saved = sharded_runs.save(one, options, range(3, 6), alone, two)
    back, _ = ranks.run(sharded_runs.load_and_train, one, options, range(0), shared)
    assert same_bits(back["shared"], saved["shared"])
    for name, states in saved["states"].items():
        assert same_bits(back["states"][name], states)
    end, _ = ranks.run(sharded_runs.load_and_train, one, options, range(6, 9), shared)
    assert worst(end, straight, options) < CODED


@pytest.mark.parametrize("options", [{}, {"vector_precision": "log16", "context": True}], ids=str)
def test_a_checkpoint_goes_from_two_ranks_to_one_and_back(ranks: Ranks, options: dict, tmp_path: Path):
    goes_from_two_to_one_and_back(ranks, options, tmp_path, {})


def passes_through_one_file(ranks: Ranks, folder: Path, kind: dict) -> None:
    options, file = {"context": True, "vector_precision": "log16"}, str(folder / "optimizer.pt")
    told, _ = ranks.run(sharded_runs.pass_through_one_file, options, file, SHARDED | kind)
    assert same_bits(told["resumed"]["params"], told["whole"]["params"])
    assert same_bits(told["resumed"]["shared"], told["whole"]["shared"])
    for name, states in told["whole"]["states"].items():
        assert same_bits(told["resumed"]["states"][name], states)


def test_whole_states_in_one_file_resume_to_the_bit(ranks: Ranks, tmp_path: Path):
    passes_through_one_file(ranks, tmp_path, {})


def test_a_plain_checkpoint_loads_into_shards_and_is_stored_in_other_ways(ranks: Ranks):
    model, optimizer = sharded_runs.build({}, ALL, is_sharded=False)
    sharded_runs.train(model, optimizer, range(3))
    saved = optimizer.state_dict()
    alone = sharded_runs.change_storage(saved)
    first, _ = ranks.run(sharded_runs.change_storage, saved)
    assert worst(first, alone, {}) < CODED
    for name, states in alone["states"].items():
        assert first["states"][name].keys() == states.keys()


def test_layers_sharded_one_by_one_train_as_one_process_on_both_batches(ranks: Ranks):
    alone = sharded_runs.train_layers(10)
    first, second = ranks.run(sharded_runs.train_layers, 10)
    assert same_bits(first["params"], second["params"])
    assert first["history"] == second["history"] == pytest.approx(alone["history"], rel=1e-5)
    start = {name: p.detach() for name, p in sharded_runs.Layers().named_parameters()}
    for name, p in alone["params"].items():
        assert float((first["params"][name] - p).norm() / (p - start[name]).norm()) < 1e-2  # gradients differ too


@pytest.mark.parametrize(
    ("options", "expected"),
    # gradients; second moment, clip, confidence; pooled sums. Caution and the element mask have sums of theirs.
    [({"quantize_states": False}, 5), ({}, 5), ({"cautious": True, "lr_granularity": "element"}, 7)],
    ids=str,
)
def test_a_step_takes_a_few_reductions_for_all_parameters(ranks: Ranks, options: dict, expected: int):
    few = {"uneven": SHAPES["uneven"]}
    assert ranks.run(sharded_runs.count_reductions, options, few) == [expected, expected]
    assert ranks.run(sharded_runs.count_reductions, options, ALL) == [expected, expected]


def test_shards_too_large_for_a_chunk_are_swept_in_pieces(ranks: Ranks):
    options = {"cautious": True, "vector_precision": "log16"}
    pieces, _ = ranks.run(sharded_runs.run_in_pieces, options)
    assert worst(pieces, sharded_runs.run(options, ALL, 4, ALONE), options) < CODED


REFUSALS = {
    "axis": "spatial_axes (0,) name axis 0, along which a parameter of shape (6, 4) is cut over 2 ranks",
    "columns": "sharded by its first axis alone; use fully_shard without tensor parallelism",
    "fsdp1": "is a flat piece of FSDP1, which has no rows to factor or to quantise; use FSDP2",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_cannot_be_stepped_as_it_lies_is_refused_before_the_first_step(ranks: Ranks, kind: str):
    for sentence in ranks.run(sharded_runs.refusal, kind):
        assert REFUSALS[kind] in sentence


def test_a_parameter_that_is_offloaded_is_refused_before_the_first_step():
    mesh = SimpleNamespace(size=lambda axis: 2, device_type="cuda")
    param = SimpleNamespace(placements=(Shard(0),), device_mesh=mesh, device=torch.device("cpu"), shape=(4, 2), ndim=2)
    with pytest.raises(ValueError, match=r"p lies on cpu and its mesh on cuda.*without CPUOffloadPolicy"):
        distributed.find_shard(param, "p")


def test_parameters_sharded_over_different_ranks_are_refused():
    meshes = [SimpleNamespace(get_group=lambda axis: None) for _ in range(2)]
    params, shards = [SimpleNamespace(device_mesh=mesh) for mesh in meshes], [held(0, 0, (0, 1)), held(0, 2, (0, 2))]
    with pytest.raises(ValueError, match=r"over different ranks, \(0, 1\) and \(0, 2\); .* build one for each"):
        distributed.RankSums.among(params, shards)


def held(axis: int, first_row: int, ranks: tuple[int, ...]) -> distributed.Shard:
    return distributed.Shard(axis, ranks, first_row, 2)


def test_a_rank_that_logs_alone_waits_for_nobody(ranks: Ranks):
    assert ranks.run(sharded_runs.ranks_of_pairs) == [(True, 2), (True, 2)]


def test_flat_pieces_of_deepspeed_are_refused_with_the_remedy():
    optimizer = sharded_runs.build({}, SHAPES, is_sharded=False)[1]
    for group in optimizer.param_groups:  # what ZeRO does to the optimizer that it is given
        flat = torch.cat([p.detach().flatten() for p in group["params"]]).requires_grad_()
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    with pytest.raises(ValueError, match="DeepSpeed ZeRO replaces parameters by flat pieces"):
        optimizer.step()


# the same on two GPUs, by NCCL


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    two = Ranks(2, "cpu:gloo,cuda:nccl")
    yield two
    two.stop()


ON_GPUS = {"device": "cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize(("options", "tolerance"), OPTIONS, ids=[str(options) for options, _ in OPTIONS])
def test_two_gpus_step_as_one(gpus: Ranks, options: dict, tolerance: float):
    alone = sharded_runs.run(options, ALL, 8, ALONE | ON_GPUS)
    first, second = gpus.run(sharded_runs.run, options, ALL, 8, SHARDED | ON_GPUS)
    assert worst(first, alone, options) < max(tolerance, 1e-4)  # products of matrices add up in another order, too
    assert same_bits(first["shared"], second["shared"])


@pytest.mark.gpu
def test_a_checkpoint_goes_from_two_gpus_to_one_and_back(gpus: Ranks, tmp_path: Path):
    goes_from_two_to_one_and_back(gpus, {"vector_precision": "log16", "context": True}, tmp_path, ON_GPUS)


@pytest.mark.gpu
def test_whole_states_in_one_file_resume_to_the_bit_on_gpus(gpus: Ranks, tmp_path: Path):
    passes_through_one_file(gpus, tmp_path, ON_GPUS)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"context": True, "max_grad_norm": 1.0, "allora": True}], ids=str)
def test_a_step_of_shards_asks_the_device_nothing(gpus: Ranks, options: dict):
    assert gpus.run(sharded_runs.step_without_questions, options) == [True, True]
