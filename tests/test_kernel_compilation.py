"""The kernels compile for the GPUs that they are meant for, which takes no GPU; nothing is run."""

from typing import Any

import pytest

triton = pytest.importorskip("triton")
from hf_automagic.kernels.arithmetic import IS_INTERPRETED, VERSION  # noqa: E402

if IS_INTERPRETED.value or VERSION < (3, 3):
    pytest.skip("needs triton's compiler, from 3.3 on", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from hf_automagic.kernels import decide, plain, sweeps, vectors, write  # noqa: E402

NUMBERS = {"n_tiles", "plane", "n_slices", "n_groups", "n_tensors"}
POINTERS = {
    **dict.fromkeys(("tiles", "slices", "tensors"), "*i32"),
    **dict.fromkeys(("table", "grads", "gains", "control", "ranges", "outside"), "*i64"),
    "finite": "*u8",
}
WIDE, THIN, RAGGED = {"BR": 1, "NB": 4, "BK": 128}, {"BR": 32, "NB": 1, "BK": 16}, {"BR": 8, "NB": 2, "BK": 32}
TILES = [(True, WIDE), (True, THIN), (False, RAGGED)]  # whether exact, and the shape


def cases() -> list[tuple[Any, int, dict[str, Any]]]:
    """Lists kernels with their warps and constants: all options are off where a tile is exact, and on elsewhere."""
    found: list[tuple[Any, int, dict[str, Any]]] = []
    for dtype in (tl.bfloat16, tl.float32):
        rounds = {"ROUND": dtype is tl.bfloat16}
        for exact, shape in TILES:
            tile = {"DTYPE": dtype, "EXACT": exact, **shape}
            kind, on = {"KIND": 1 if exact else 2}, {"ELEMENTS": not exact}
            more = {**rounds, "PAIRED": rounds["ROUND"], "CAUTIOUS": not exact, "GAINS": not exact}
            found += [
                (sweeps.sum_squares, 4, tile),
                (sweeps.sum_residuals, 1, {**tile, **kind, **on, "MEASURES": not exact}),
                (sweeps.count_agreement, 1, {**tile, **kind}),
                (write.write_steps, 2, {**tile, **kind, **on, **more, "CAUTIOUS_DECAY": not exact}),
            ]
        flags = {"ELEMENTS": True, "CAUTIOUS": True, "CAUTIOUS_DECAY": True, **rounds}
        found += [
            (plain.check_plain, 4, {"DTYPE": dtype, "SIZE": 1024}),
            (plain.step_plain, 4, {"DTYPE": dtype, "SIZE": 1024, **flags}),
        ]
    purposes = {"ROW": 1, "COL": 2, "RES_ROW": 3, "RES_COL": 4}
    finish = {"SIZE": 512, "MEASURES": True, "GLOBAL": True, "RECORD": True, "CAPACITY": 128}
    return [
        *found,
        (vectors.average_squares, 8, {"VS": 1024}),
        (vectors.average_residuals, 8, {"VS": 1024, "MEASURES": True}),
        (vectors.encode_vectors, 4, {"VS": 1024, **purposes}),
        (decide.decide, 4, {"HAS_NORM": True}),
        (decide.finish, 4, finish),
    ]


def type_of(name: str) -> str:
    """Returns the type of an argument as a launch has it."""
    if name in NUMBERS:
        return "i32"
    return "fp32" if name == "max_norm" else POINTERS.get(name, "*fp32")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_every_kernel_compiles_and_fits_into_shared_memory(capability: int):
    for kernel, warps, constants in cases():
        signature = {name: "constexpr" if name in constants else type_of(name) for name in kernel.arg_names}
        places = {name: (place,) for place, name in enumerate(kernel.arg_names)}
        aligned = {places[n]: [["tt.divisibility", 16]] for n, t in signature.items() if t.startswith("*")}
        source = ASTSource(kernel, signature, {places[n]: value for n, value in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert compiled.asm["cubin"], kernel.__name__
        assert compiled.metadata.shared <= 48 * 1024, kernel.__name__  # what every GPU has
