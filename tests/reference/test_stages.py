"""The reference stage by stage: closed forms, published constants, statistics."""

import math

import pytest
import torch
from torch import Tensor

from . import came, cautious, decay, lora, self_tuning, spatial
from .runs import noise

# stage 4


def test_smoothing_reduces_white_noise_to_the_published_share():
    """LSGD, arXiv 1806.06317: variance factor (1 + 2s) / (1 + 4s)^(3/2), 0.268 at s = 1; on 3 x 3 kernels 0.141."""
    impulse = torch.zeros(64, dtype=torch.float64)
    impulse[0] = 1
    assert spatial.smooth(impulse, (0,), 1.0).square().sum().item() == pytest.approx(3 / 5**1.5, abs=1e-6)
    kernel = torch.zeros(3, 3, dtype=torch.float64)
    kernel[0, 0] = 1
    assert spatial.smooth(kernel, (0, 1), 1.0).square().sum().item() == pytest.approx(0.375**2, abs=1e-12)


def test_smoothing_a_three_tap_axis_shrinks_the_deviation_from_its_mean():
    x, sigma = noise(5, 4, 3, 1), 0.7
    mean = x.mean(dim=2, keepdim=True)
    assert (spatial.smooth(x, (2,), sigma) - (mean + (x - mean) / (1 + 3 * sigma))).abs().max() < 1e-12


def test_smoothing_solves_its_equation():
    x = noise(2, 2, 5, 7)
    y = spatial.smooth(x, (3,), 0.3)
    assert (y - 0.3 * spatial.laplacian(y, (3,)) - x).abs().max() < 1e-12


def test_only_rough_directions_are_smoothed():
    """Roughness of one wave of length 8: 2 - 2 cos(2 pi / 8) = 0.586; of an alternating one: 4."""
    wave = (2 * math.pi / 8 * torch.arange(8, dtype=torch.float64)).cos()
    alternating = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    assert torch.equal(spatial.suppress_edges(wave, (0,), 0.5, 0.59), wave)
    assert (spatial.suppress_edges(wave, (0,), 0.5, 0.58) - wave / (1 + 0.5 * 0.585786)).abs().max() < 1e-6
    assert (spatial.suppress_edges(alternating, (0,), 0.5, 0.6) - alternating / 3).abs().max() < 1e-12


def test_frequency_penalty_keeps_the_mean_and_halves_nyquist():
    wave = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    filtered = spatial.penalise_frequencies(5 + wave, (0,), 1.0)
    assert (filtered - (5 + wave / 2)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("shape", "declared", "axes"),
    [((8, 4, 3, 3), None, (2, 3)), ((8, 4, 1, 5), None, (3,)), ((8, 4, 1, 1), None, ()), ((16, 64), None, ()),
     ((64,), None, ()), ((512, 64), (0,), (0,)), ((512, 64), (-1,), (1,))],
    ids=str,
)  # fmt: skip
def test_only_kernels_and_declared_axes_have_neighbours(shape, declared, axes):
    assert spatial.spatial_axes(shape, declared) == axes


def test_row_weights_stay_in_their_bands():
    strong, weak = torch.ones(6, 9), torch.full((2, 9), 1e-3)
    background = spatial.background_weights(torch.cat([strong, weak]).double())
    assert torch.equal(background[:6], torch.ones(6, dtype=torch.float64))
    assert ((background[6:] >= 0.5) & (background[6:] < 0.51)).all()
    variance = torch.tensor([1e-9, 1.0, 1.0, 16.0, 1e9], dtype=torch.float64)
    assert spatial.awareness_weights(variance, 0.0).tolist() == [2.0, 1.0, 1.0, 0.5, 0.5]
    assert spatial.awareness_weights(variance, 1.0).tolist() == [1.0] * 5


# stages 5 and 11


def test_row_norms_need_only_the_gram_matrix():
    a, b, scaling = noise(4, 30), noise(20, 4, seed=1), -1.5
    gram = abs(scaling) * ((b @ (a @ a.T)) * b).sum(dim=1).clamp(min=0).sqrt()
    assert (lora.row_norms(a, b, scaling) - gram).abs().max() < 1e-12


def test_allora_leaves_a_fresh_adapter_alone_and_damps_grown_rows():
    a, b = noise(4, 30), torch.zeros(20, 4, dtype=torch.float64)
    gains, gain_a = lora.allora_gains(a, b, 1.0, 2.0)
    assert (gains == 1).all()
    assert gain_a == 1.0
    b[3] = noise(4)
    gains, gain_a = lora.allora_gains(a, b, 1.0, 2.0)
    assert gains[3].item() == pytest.approx(1 / math.sqrt(1 + 4 * (b[3] @ a).norm().item()))
    assert gain_a == pytest.approx(gains[3].item())


@pytest.mark.parametrize(("rank", "rows", "cols"), [(4, 20, 30), (8, 5, 30), (1, 6, 7)])
def test_rank_penalty_scales_the_singular_values_of_the_product(rank, rows, cols):
    """The factors equal the canon's form through thin QR: B + Q_B U (D^1/2 - I) U^T R_B, and A alike."""
    a, b = noise(rank, cols), noise(rows, rank, seed=1)
    new_a, new_b = lora.shrink_spectrum(a, b, lr=1e-2, strength=1.0, emphasis=1.2, every=10)
    u, sigma, v = lora.spectrum(a, b)
    factors = lora.shrink_factors(sigma, 1e-2, 1.0, 1.2, 10)
    assert (factors < 1).all()
    assert (new_b @ new_a - u @ torch.diag(factors * sigma) @ v.T).abs().max() < 1e-10

    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    core_u, core_sigma, core_vt = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    change = torch.diag(factors.sqrt() - 1)
    assert (core_sigma - sigma).abs().max() < 1e-10
    assert (b + q_b @ core_u @ change @ core_u.T @ r_b - new_b).abs().max() < 1e-10
    assert ((a.T + q_a @ core_vt.T @ change @ core_vt @ r_a).T - new_a).abs().max() < 1e-10


def test_emphasis_shrinks_small_singular_values_more():
    sigma = torch.tensor([7.0, 1.0], dtype=torch.float64)  # rms 5
    assert lora.shrink_factors(sigma, 0.01, 1.0, 2.0, 10).tolist() == pytest.approx([1 - 0.5 / 7, 0.5])
    assert lora.shrink_factors(sigma, 0.001, 1.0, 2.0, 10).tolist() == pytest.approx([1 - 0.05 / 7, 0.95])
    assert lora.shrink_factors(sigma, 0.01, 1.0, 1.0, 10).tolist() == pytest.approx([0.9, 0.9])


def test_ranks_of_a_flat_spectrum_count_its_values():
    assert lora.effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert lora.stable_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)


# stage 6


@pytest.mark.parametrize(("beta", "share"), [(0.9, 0.644), (0.8, 0.705)])
def test_cautious_mask_keeps_the_share_that_noise_predicts(beta, share):
    """1/2 + asin(sqrt(1 - b^2)) / pi of the elements agree when the momentum is an average of pure noise."""
    m = g = torch.zeros(400, 200, dtype=torch.float64)
    for step in range(round(8 / (1 - beta))):
        g = noise(400, 200, seed=step)
        m = came.ema(m, g, beta)
    assert cautious.agreeing_share(m, g) == pytest.approx(share, abs=0.01)
    assert share == pytest.approx(0.5 + math.asin(math.sqrt(1 - beta**2)) / math.pi, abs=1e-3)


def test_cautious_scale_is_bounded_and_ignores_untouched_elements():
    d = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 1.0]])
    g = torch.tensor([[1.0, -1.0, -1.0, -1.0, 1.0, 0.0]])
    assert cautious.mask_cautiously(d, g).tolist() == [[2.0, 0, 0, 0, 0, 0]]
    assert cautious.mask_cautiously(d, g, "paper").tolist() == [[3.0, 0, 0, 0, 0, 0]]
    d, g = torch.tensor([[1.0, 1.0, -1.0, 0.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0]])
    assert cautious.agreeing_share(d, g) == pytest.approx(2 / 3)
    tiny = torch.full((1, 3), 1e-30)
    assert torch.equal(cautious.mask_cautiously(tiny, tiny), tiny)
    assert torch.equal(cautious.mask_cautiously(d, torch.zeros_like(g)), torch.zeros_like(d))


# stage 7


def test_effective_rate_is_the_schedule_times_a_clamped_rate_times_the_multiplier():
    rate = self_tuning.effective_lr
    assert rate(1e-4, 0.0, 0.5, 1.0, 1e-7, 1e-3) == 0.5e-4
    assert rate(1e-4, 9.0, 0.5, 1.0, 1e-7, 1e-3) == 0.5e-3
    assert rate(1e-4, -20.0, 1.0, 1.0, 1e-7, 1e-3) == 1e-7
    assert rate(1e-4, 9.0, 1.0, 2.0, 1e-7, 1e-3) == 1e-3
    assert rate(1e-4, 9.0, 1.0, 0.5, 1e-7, 1e-3) == 0.5e-3
    assert rate(1e-4, 9.0, 0.0, 2.0, 1e-7, 1e-3) == 0.0


def test_pooled_cosine_weighs_tensors_by_their_size():
    u, m = noise(8, 9), noise(8, 9, seed=1)
    joined = (
        (torch.cat([u, -3 * u]) * torch.cat([m, u])).sum() / torch.cat([u, -3 * u]).norm() / torch.cat([m, u]).norm()
    )
    assert self_tuning.pooled_cosine([(u, m), (-3 * u, u)]) == pytest.approx(joined.item(), abs=1e-12)
    assert self_tuning.pooled_cosine([(u, torch.zeros_like(u))]) == 0.0


@pytest.mark.parametrize(("cosine", "change"), [(1.0, 0.1), (-1.0, -0.1), (0.0, 0.0), (0.04, 0.01)])
def test_log_rate_moves_at_most_kappa(cosine, change):
    """0.04 * sqrt(800 / 8) / 4 = 0.1 of a full step."""
    assert self_tuning.advance_log_rate(0.3, cosine, 800, 0.1, -9, 9) == pytest.approx(0.3 + change)
    assert self_tuning.advance_log_rate(0.3, cosine, 800, 0.1, -9, 0.2) <= 0.2


def walk_mask(snr: float, steps: int = 300, beta1: float = 0.9) -> Tensor:
    """Mean k of a mask under gradients of the given signal-to-noise, without recentring."""
    limit = self_tuning.mask_limit(4.0)
    m, codes = torch.zeros(40, 50, dtype=torch.float64), torch.full((40, 50), 128, dtype=torch.uint8)
    for step in range(steps):
        u = (snr + noise(40, 50, seed=step)) / math.sqrt(1 + snr**2)
        codes = self_tuning.advance_mask(codes, self_tuning.vote(u, m, beta1), limit)
        m = came.ema(m, u, beta1)
    return codes.double() - 128


def test_element_mask_does_not_drift_under_noise_and_climbs_with_signal():
    k = walk_mask(snr=0.0)
    assert k.mean().abs() < 4 * k.std() / math.sqrt(k.numel())
    assert walk_mask(snr=0.3).mean().item() == pytest.approx(15, abs=3)


def test_element_mask_stays_in_its_band_and_recentres():
    assert self_tuning.mask_limit(4.0) == 38
    codes = torch.full((4, 5), 128 + 37, dtype=torch.uint8)
    for _ in range(3):
        codes = self_tuning.advance_mask(codes, torch.ones(4, 5, dtype=torch.float64), 38)
    assert (codes == 128 + 38).all()
    assert self_tuning.mask_factor(codes).max() <= 4.0
    codes[0] = 128
    assert (self_tuning.recentre_mask(codes, 38).double() - 128).mean().abs() <= 0.5


# stage 9


def test_decay_modes_differ_only_where_they_should():
    weight, d = torch.tensor([2.0, 2.0, -2.0, 2.0]), torch.tensor([1.0, -1.0, -1.0, 0.0])
    assert decay.decay(weight, 0.1, 0.5).tolist() == pytest.approx([1.9, 1.9, -1.9, 1.9])
    assert decay.decay_cautiously(weight, d, 0.1, 0.5).tolist() == pytest.approx([1.9, 2.0, -1.9, 1.9])


def test_selective_decay_pulls_back_only_against_the_gradient():
    """From W0 = 0 at W = 2, a step of -1 leads to 3; the ratio is (3 - 2) / 3."""
    weight, change, origin = torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([0.0])
    assert decay.write_selectively(weight, change, torch.tensor([-1.0]), origin, 0.6).item() == 3.0
    pulled = decay.write_selectively(weight, change, torch.tensor([1.0]), origin, 0.6)
    assert pulled.item() == pytest.approx(3 - 0.6 / 3 * 3)
    toward = decay.write_selectively(weight, -change, torch.tensor([1.0]), origin, 0.6)
    assert toward.item() == 1.0
