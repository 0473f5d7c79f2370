"""Whether weights have been trained or are as they were initialised, read off the weights themselves.

Elements of a fresh matrix are independent draws of one law, Gaussian or narrower: the squares of its rows, and of its
columns, add up to what chance allows, and there are no outliers. Training lifts whole rows and columns. Measured in
standard deviations of chance, fresh matrices of ten architectures lay below 3, those of a network after 600 steps
above 13, those of a pretrained encoder in the hundreds. Norms start constant and do not stay so.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .distributed import local

LIMIT = 8.0  # standard deviations of chance
ROWS, COLS = 256, 1024  # of a matrix that are looked at
MOST = 64  # matrices that are looked at
SHARE = 0.9  # of what is looked at has to be fresh: layers that start in a pattern of their own are few
SMALLEST_SIDE, SMALLEST = 8, 1024  # rows and columns, and elements: fewer tell nothing


def look_trained(weights: Iterable[Tensor], norms: Iterable[Tensor] = ()) -> bool | None:
    """Says whether weights have been trained, None where they do not tell.

    Reads the device once or twice. Of sharded weights every rank looks at its own rows and all come to one answer, so
    that every rank has to ask.

    Args:
        weights: what multiplies: of linear layers, convolutions and the like; others tell nothing.
        norms: scales and shifts of normalisations.
    """
    weights = list(weights)
    if any(tensor.is_meta for tensor in weights):
        return None
    meshes = list(dict.fromkeys(mesh for w in weights if (mesh := getattr(w, "device_mesh", None)) is not None))
    matrices = [w.detach().flatten(1) for w in map(local, weights) if w.ndim > 1 and _is_readable(w)]
    telling = [w for w in matrices if min(w.shape) >= SMALLEST_SIDE and w.numel() >= SMALLEST]
    trained_norms = _count_varying([norm.detach() for norm in map(local, norms) if _is_readable(norm)])
    fresh = seen = 0
    if meshes or not trained_norms:
        fresh, seen = _count_fresh(telling[:: -(-len(telling) // MOST) or 1])
    for mesh in meshes:
        counts = torch.tensor([fresh, seen, trained_norms], device=mesh.device_type)
        for axis in range(mesh.ndim):
            torch.distributed.all_reduce(counts, group=mesh.get_group(axis))
        fresh, seen, trained_norms = counts.tolist()
    if not (trained_norms or seen):
        return None
    return trained_norms > 0 or fresh < SHARE * seen


def _is_readable(tensor: Tensor) -> bool:
    """Whether it is a plain tensor of numbers, here and whole: not a subclass, not emptied, offloaded or quantised."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.is_floating_point()
    return is_plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() > 0


def _count_varying(vectors: Sequence[Tensor]) -> int:
    """Counts the vectors whose elements are not all equal."""
    return sum(map(bool, _read([(vector != vector.flatten()[0]).any() for vector in vectors])))


def _count_fresh(matrices: Sequence[Tensor]) -> tuple[int, int]:
    """Returns how many elements look fresh, and of how many; what is constant does not count."""
    distances: list[float] = _read([_distance_from_chance(w[:ROWS, :COLS].to(torch.float32)) for w in matrices])
    sizes = [w.numel() for w in matrices]
    told = [(size, distance) for size, distance in zip(sizes, distances, strict=True) if distance != float("inf")]
    return sum(size for size, distance in told if distance < LIMIT), sum(size for size, _ in told)


def _distance_from_chance(w: Tensor) -> Tensor:
    """Returns by how many standard deviations a matrix is less even than chance, infinite where it is constant  # []

    For independent elements of variance 1 and fourth moment m, the sum of squares of a row of n has variance
    n (m - 1), and m itself, for a Gaussian, lies around 3 with variance 24 / numel.
    """
    square = w.square() / w.square().mean()
    fourth = square.square().mean()
    distances = [(fourth - 3) / (24 / w.numel()) ** 0.5]
    for axis in (0, 1):
        sums, length = square.sum(axis), w.shape[axis]
        spread = (sums - length).square().sum() / (length * (fourth - 1))
        distances.append((spread - (len(sums) - 1)) / (2 * (len(sums) - 1)) ** 0.5)
    return torch.where(fourth > 1 + 1e-3, torch.stack(distances).amax(), torch.inf)


def _read(numbers: Sequence[Tensor]) -> list[float]:
    """Reads numbers of any device, those of one device at once."""
    devices = dict.fromkeys(number.device for number in numbers)
    read = {device: iter(torch.stack([n for n in numbers if n.device == device]).tolist()) for device in devices}
    return [next(read[number.device]) for number in numbers]
