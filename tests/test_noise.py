"""The optimizers' noise: the published generator, the normal distribution, no correlation, each number from its key alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from instruction_sets import needs
from scipy import stats
from torch import Tensor

from hardy.optim import compiled, noise
from hardy.optim.noise import KeyedNormal, standard_normal
from hardy.optim.transforms import Step, TensorOptions
from hardy.optim.upgd import upgd
from hardy.population import MemberGenerators
from hardy.splitmix import split_mix

N = 400_000
Source = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def by_library(level: int) -> Source:
    """What the compiled step adds to weights of 0: without gradient, with lr −1 and sigma 1, that is the noise itself."""

    def source(keys: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        weights = [torch.zeros_like(tensor) for tensor in tensors]
        numbers = {"lr": -1.0, "sigma": 1.0, "beta_utility": 0.0, "step_factor": 1.0}
        hyper = {name: torch.full((1, 1), value, dtype=torch.float64) for name, value in numbers.items()}
        options = [TensorOptions("none", False, False)] * len(weights)
        names = [str(k) for k in range(len(weights))]
        step = Step(names, weights, [torch.zeros_like(w) for w in weights], hyper, options, KeyedNormal(lambda: keys))
        state = upgd("UPGDW").init(dict(zip(names, weights, strict=True)))
        assert compiled.supports(step, state)
        compiled.Call(step, state, "UPGDW", level=level)(step.gradients)
        return weights

    return source


SOURCES = [pytest.param(standard_normal, id="torch")]
if compiled.available():
    SOURCES += [pytest.param(by_library(level), id=f"compiled {level}", marks=needs(level)) for level in (0, 1, 2)]
every_source = pytest.mark.parametrize("source", SOURCES)


def drawn(source: Source, count: int, key: int = 1234567890123456789) -> np.ndarray:
    return source(torch.tensor([key]), [torch.empty(1, count)])[0][0].double().numpy()


@pytest.mark.parametrize(
    ("key", "expected"),
    [  # known answers published with the generator's implementations
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]),
        (1234567, [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]),
    ],
)
def test_the_generator_is_the_published_one(key: int, expected: list[int]) -> None:
    assert [bits % 2**64 for bits in split_mix(torch.arange(4), key).tolist()] == expected


@every_source
def test_every_source_draws_the_same_numbers(source: Source) -> None:
    keys = torch.tensor([3, 2**62 + 12345, 2**63 - 1])
    shapes = [(1,), (63,), (64,), (65,), (5, 13), (4099,), (3, 4096), ()]
    tensors = [torch.empty(3, *shape) for shape in shapes]
    for found, expected in zip(source(keys, tensors), standard_normal(keys, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@every_source
def test_the_distribution_is_normal(source: Source) -> None:
    x = drawn(source, N)
    # Standard errors of the first four moments of N normal numbers: √(1/N), √(2/N), √(15/N), √(96/N).
    for power, (expected, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert (x**power).mean() == pytest.approx(expected, abs=4 * (variance / N) ** 0.5)
    assert stats.kstest(x, "norm").pvalue > 0.01
    for bound in (2.0, 3.0, 4.0):
        beyond = int((np.abs(x) > bound).sum())
        assert stats.binomtest(beyond, N, 2 * stats.norm.sf(bound)).pvalue > 0.01


@every_source
def test_the_distribution_is_normal_step_by_step(source: Source) -> None:
    """Small draws of many keys: the p-values of honest tests are uniform."""
    keys = MemberGenerators([5], "noise")
    values = [stats.kstest(source(keys.keys(), [torch.empty(1, 500)])[0][0].numpy(), "norm").pvalue for _ in range(300)]
    assert stats.kstest(values, "uniform").pvalue > 0.01


@every_source
def test_places_are_not_correlated(source: Source) -> None:
    x = drawn(source, N)
    for values in (x, x**2 - 1, np.abs(x) - np.abs(x).mean()):
        scale = (values**2).mean()
        # The lags within and between the groups of 32 numbers that are drawn together are among them.
        for lag in (*range(1, 130), 1000, 4096):
            assert abs((values[lag:] * values[:-lag]).mean() / scale) < 4.5 / N**0.5, lag


@every_source
def test_the_two_numbers_of_a_pair_lie_in_every_direction_alike(source: Source) -> None:
    rows = drawn(source, N // 64 * 64).reshape(-1, 4, 16)
    # Cosine and sine of one pair; then numbers of two pairs side by side, and of two neighbouring lanes.
    for one, other in ((rows[:, 0], rows[:, 1]), (rows[:, 0], rows[:, 2]), (rows[:, :, ::2], rows[:, :, 1::2])):
        angle = np.arctan2(other, one).ravel()
        assert stats.kstest(angle, "uniform", (-np.pi, 2 * np.pi)).pvalue > 0.01
        assert stats.kstest((one**2 + other**2).ravel(), "chi2", (2,)).pvalue > 0.01


@every_source
def test_steps_tensors_and_members_are_not_correlated(source: Source) -> None:
    generators = MemberGenerators([0, 1, 2], "noise")
    tensors = [torch.empty(3, 5000), torch.empty(3, 50, 100)]
    steps = [torch.stack([t.flatten(1) for t in source(generators.keys(), tensors)]) for _ in range(8)]
    streams = torch.stack(steps).flatten(0, 2).double()  # 8 steps × 2 tensors × 3 members
    # Successive keys by one, too: a generator whose keys must be chosen with care would show it.
    near = [source(torch.tensor([key]), [torch.empty(1, 5000)])[0].double() for key in (1, 2, 3, 2**32, 2**32 + 1)]
    correlation = torch.corrcoef(torch.cat([streams, *near])).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 5 / 5000**0.5
    # One place over time is as good a sample as many places at once.
    over_time = torch.cat([source(generators.keys(), [torch.empty(3, 4)])[0].double() for _ in range(400)])
    assert stats.kstest(over_time.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(float((over_time[3:] * over_time[:-3]).mean())) < 4 / over_time.numel() ** 0.5


@every_source
def test_a_number_follows_from_key_tensor_and_place_alone(source: Source) -> None:
    keys = torch.tensor([11, 12, 13])
    together = source(keys, [torch.empty(3, 700), torch.empty(3, 7, 130)])
    alone = source(keys[1:2], [torch.empty(1, 130), torch.empty(1, 200)])
    assert torch.equal(together[0][1, :130], alone[0][0])
    assert torch.equal(together[1][1].flatten()[:200], alone[1][0])


def test_slices_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawn(standard_normal, 1000)
    monkeypatch.setattr(noise, "_SLICE", 48)
    assert (drawn(standard_normal, 1000) == whole).all()


def test_dtypes() -> None:
    key = torch.tensor([17])
    single = standard_normal(key, [torch.empty(1, 100)])[0]
    half, mixed = (standard_normal(key, [torch.empty(1, 100, dtype=dtype)])[0] for dtype in (torch.bfloat16, torch.float64))
    assert half.dtype is torch.bfloat16 and torch.equal(half, single.bfloat16())
    assert mixed.dtype is torch.float64
    torch.testing.assert_close(mixed, single.double(), rtol=2e-6, atol=2e-6)
    assert (mixed != single.double()).any(), "computed in double precision"


def test_the_largest_number_is_finite() -> None:
    for dtype in (torch.float32, torch.float64):
        found = torch.empty(2, 4, dtype=dtype)
        noise.box_muller(torch.tensor([0, 1, 2**31, 2**32 - 1]), found)
        assert found[0].isfinite().all() and found[1].eq(0).all()
        assert float(found[0, 0]) == pytest.approx((2 * 32 * np.log(2)) ** 0.5, rel=1e-6)
