"""The tables that the kernels read: tensors, tiles and slices, made once for a plan."""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..config import AutomagicConfig
from ..quantization import Log16
from ..transforms.cautious import Cautious
from ..transforms.decay import CautiousWeightDecay
from ..transforms.lora import ScaleByRowGain
from ..transforms.self_tuning import LOG_RATIO, MeasureAgreement, ScaleByElementRate
from . import fields as f
from .support import VECTORS, Stacked, codec_kind, has

ITERATION = 2048  # elements that a program of any sweep holds at a time, at most
SMALLEST_TILE, LARGEST_TILE = 2**13, 2**18  # elements of a program
PROGRAMS = 4096  # that keep a device busy
SLICE = 512  # elements of a vector that a program owns
CONSTANTS = f.GROUP_WIDTH.value - f.BETA1.value  # of a group's line: what follows from its options
PURPOSES = {name: zlib.crc32(name.encode()) for name in VECTORS}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What one launch has in common; tensors of the same kind step in the same launches.

    Args:
        dtype: of weights and gradients.
        is_matrix: whether the second moment is factored.
        codec: of the momentum, see `support.codec_kind`.
        rows, blocks, block: elements that a program holds at a time, at most, powers of two.
        exact: no column is masked, and addresses are multiples of 16 bytes.
        elements: with an element mask.
        cautious: with the cautious mask.
        gains: with ALLoRA's gains.
        rounds: weights are rounded at random.
        paired: and rows, of an even length, hold whole pairs of neighbours that share their draws.
        cautious_decay: weights decay only along with the step.
        measures: the agreement of gradient and momentum is asked for.
    """

    dtype: torch.dtype
    is_matrix: bool
    codec: int
    rows: int
    blocks: int
    block: int
    exact: bool
    elements: bool
    cautious: bool
    gains: bool
    rounds: bool
    paired: bool
    cautious_decay: bool
    measures: bool


def kind_of(bucket: Stacked) -> Kind:
    """Sorts a bucket."""
    codec, block = codec_kind(bucket)
    cols = bucket.layout.cols
    width = _power_of_two(block)
    blocks = min(_power_of_two(-(-cols // block)), max(1, 512 // width))
    aligned = all(p.data_ptr() % 16 == 0 for p in bucket.params)
    rounds = bucket.dtype != torch.float32 and bucket.config.stochastic_rounding
    return Kind(
        bucket.dtype,
        bucket.layout.is_matrix,
        codec,
        max(1, ITERATION // (width * blocks)),
        blocks,
        width,
        aligned and block == width >= 16 and cols % block == 0,
        has(bucket.chain, ScaleByElementRate),
        has(bucket.chain, Cautious),
        has(bucket.chain, ScaleByRowGain),
        rounds,
        rounds and cols % 2 == 0,
        has(bucket.chain, CautiousWeightDecay),
        has(bucket.chain, MeasureAgreement),
    )


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _tiles_of_groups(ends: Sequence[int]) -> Tensor:
    """Returns the first tile of each group and the one after its last  # [groups, 2], int64"""
    stops = list(itertools.accumulate(ends, max))
    return torch.tensor([[0, *stops[:-1]], stops], dtype=torch.int64).T.contiguous()


class Tables:
    """Tables of all tensors of some buckets on their device.

    Args:
        buckets: (number of the group, bucket), sorted by group, stacks allocated.
        n_groups: param groups of the optimizer.
    """

    def __init__(self, buckets: Sequence[tuple[int, Stacked]], n_groups: int) -> None:
        """Lays out tiles, slices and scratch, and uploads the tables."""
        self.params = [p for _, bucket in buckets for p in bucket.params]
        self.device = self.params[0].device
        self.places = self.tiles = self.slices_planned = self.work_size = 0
        self.has_log16 = False
        self.kinds: dict[Kind, list[int]] = {}
        self.exact: list[bool] = []
        lines: list[list[int]] = []
        slices: list[tuple[int, int, int]] = []
        ends = [0] * n_groups
        total = sum(p.numel() for p in self.params)
        target = _power_of_two(min(max(total // PROGRAMS, SMALLEST_TILE), LARGEST_TILE))
        for group, bucket in buckets:
            kind = kind_of(bucket)
            for i in range(len(bucket.params)):
                work = self.kinds.setdefault(kind, [])
                tensor = len(lines)
                line = self._line(group, bucket, i, kind, target)
                count = line[f.COL_TILES.value] * line[f.ROW_TILES.value] if kind.is_matrix else 0
                work += [n for tile in range(count) for n in (tensor, tile)] if kind.is_matrix else [tensor]
                if kind.is_matrix:
                    for side, length in enumerate((bucket.layout.rows, bucket.layout.cols)):
                        slices += [(tensor, side, first) for first in range(0, length, SLICE)]
                lines.append(line)
                self.exact.append(kind.exact)
            ends[group] = self.tiles
        self.table = torch.tensor(lines, dtype=torch.int64).to(self.device)
        self.slices = torch.tensor(slices, dtype=torch.int32).to(self.device)
        self.n_slices = len(slices)
        self.ranges = _tiles_of_groups(ends).to(self.device)
        self.measures = any(kind.measures for kind in self.kinds)
        self.programs = {
            kind: torch.tensor(numbers, dtype=torch.int32).to(self.device) for kind, numbers in self.kinds.items()
        }

    def _line(self, group: int, bucket: Stacked, i: int, kind: Kind, target: int) -> list[int]:
        """Describes one tensor, and moves the ends of scratch, tiles and slices past it."""
        rows, cols = bucket.layout.rows, bucket.layout.cols
        _, block = codec_kind(bucket)
        line = [0] * f.WIDTH.value
        blocks = -(-cols // block)
        height = max(kind.rows, target // (kind.blocks * kind.block) // kind.rows * kind.rows)
        col_tiles, row_tiles = -(-blocks // kind.blocks), -(-rows // height)
        address = {name: stack[i].data_ptr() for name, stack in bucket.stacks.items()}
        for column, value in (  # no dictionary: a constant of triton before 3.5 has no hash
            (f.PARAM, bucket.params[i].data_ptr()),
            (f.STEP, address["step"]),
            (f.MOMENTUM, address.get("exp_avg_codes") or address["exp_avg"]),
            (f.SCALE, address.get("exp_avg_scale", 0)),
            (f.ZERO, address.get("exp_avg_zero", 0)),
            (f.MASK, address.get("lr_mask", 0)),
            (f.MOMENT, address.get("exp_avg_sq", 0)),
            (f.ROWS, rows),
            (f.COLS, cols),
            (f.BLOCKS, blocks),
            (f.BLOCK, block),
            (f.COL_TILES, col_tiles),
            (f.ROW_TILES, row_tiles),
            (f.TILE_ROWS, height),
            (f.FIRST_TILE, self.tiles),
            (f.FIRST_SLICE, self.slices_planned),
            (f.GROUP, group),
            (f.KEY, bucket.positions[i]),
            (f.SEED, bucket.config.seed),
        ):
            line[column.value] = value
        self.tiles += col_tiles * row_tiles if kind.is_matrix else 1
        if kind.is_matrix:
            line[f.ROW_PARTS.value] = self.places
            line[f.COL_PARTS.value] = self.places + rows * col_tiles
            self.places += rows * col_tiles + cols * row_tiles
            line[f.ROW_SLICES.value], line[f.COL_SLICES.value] = -(-rows // SLICE), -(-cols // SLICE)
            self.slices_planned += -(-rows // SLICE) - (-cols // SLICE)
            self._add_vectors(line, address, bucket)
        return line

    def _add_vectors(self, line: list[int], address: Mapping[str, int], bucket: Stacked) -> None:
        """Notes where the four averages are; those in 16 bits are worked on in float32 in `work`."""
        for number, name in enumerate(VECTORS):
            stored = next(s for s in bucket.stored if s.spec.name == name)
            if type(stored.codec) is Log16:
                self.has_log16 = True
                line[f.VECTORS.value + number] = -1 - self.work_size
                line[f.CODES.value + number] = address[f"{name}_codes"]
                line[f.CODE_SCALES.value + number] = address[f"{name}_scale"]
                self.work_size += math.prod(stored.shape(bucket.layout.rows, bucket.layout.cols))
            else:
                line[f.VECTORS.value + number] = address[name]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Returns the float32 elements of parts, work, sums and the two sums of slices; each ends on 256 bytes."""
        planes = f.SUM_PLANES.value * self.tiles
        slices = (self.n_slices, f.SLICE_PLANES.value * self.n_slices)
        return tuple(-(-size // 64) * 64 for size in (3 * self.places, self.work_size, planes, *slices))

    @property
    def scratch_size(self) -> int:
        """Returns the float32 elements that a step needs beside the states."""
        return sum(self.sizes)

    def cut(self, scratch: Tensor) -> tuple[Tensor, ...]:
        """Cuts a step's scratch into its parts."""
        return scratch.split(list(self.sizes))


def group_constants(config: AutomagicConfig) -> list[float]:
    """Returns the columns of a group's line that follow from its options, from `fields.BETA1` on."""
    beta1, beta2, beta3 = config.betas
    logs = [math.log(beta) if beta else -math.inf for beta in config.betas]
    limit = math.floor(math.log(config.mask_band) / LOG_RATIO)
    clear = 2 * math.sqrt((1 - beta1) / (1 + beta1))
    return [
        beta1, 1 - beta1, 1 - beta2, 1 - beta3, *logs, config.clip_threshold, config.eps[1], config.weight_decay,
        clear, float(limit), float(config.sync_frequency),
    ]  # fmt: skip
