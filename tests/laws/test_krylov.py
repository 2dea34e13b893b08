"""The few leading singular triplets by a Krylov space: those of a float64 decomposition, or the exact way is taken."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from merganser.steps import krylov, spectrum

SHAPES = [(640, 700), (700, 640), (400, 1300)]


def with_values(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    k = len(values)
    u, v = (torch.linalg.qr(torch.randn(n, k, generator=rng, dtype=torch.float64)).Q for n in shape)
    return ((u * values) @ v.mT).float()


def spectra(n: int) -> dict[str, Tensor]:
    noise = torch.linspace(0.25, 0.01, n)
    return {
        "adapters in noise": torch.cat([torch.linspace(1, 0.5, 64), noise[64:]]),
        "steep": torch.logspace(0, -6, n),
        "pairs": torch.linspace(1, 0.05, n // 2).repeat_interleave(2),
        "flat": torch.linspace(1, 0.9, n),
        "low rank": torch.linspace(1, 0.5, 40),
        "lower rank than asked for": torch.linspace(1, 0.5, 8),
        "one value": torch.ones(30),
    }


def best(matrix: Tensor, k: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    k = min(k, int((s > 1e-6 * s[0]).sum()))
    return u[:, :k] * s[:k] @ vh[:k]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", spectra(9))
def test_it_is_the_best_of_its_rank(kind: str, shape: tuple[int, int]) -> None:
    values = spectra(min(shape))[kind]
    k = 8 if kind == "one value" else 9 if kind == "pairs" else 12
    matrix = with_values(shape, values.double())
    u, s, v = krylov.leading(matrix, k)
    found = u * s @ v.mT
    if kind in ("one value", "pairs"):  # of equal values which one is taken is open: only how much is left out is not
        wanted = float(matrix.double().square().sum() - values[:k].double().square().sum())
        assert float((matrix.double() - found).square().sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    else:
        wanted = best(matrix, k)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    for basis in (u, v):
        torch.testing.assert_close(basis.mT @ basis, torch.eye(len(s), dtype=torch.float64), rtol=0, atol=1e-5)
    assert bool((s[:-1] >= s[1:]).all())


@pytest.mark.parametrize("shape", [(640, 700), (700, 640), (640, 1300)])
def test_where_values_fall_no_decomposition_is_made(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(krylov, "spectrum", None)
    for kind in ("adapters in noise", "steep"):
        krylov.leading(with_values(shape, spectra(min(shape))[kind].double()), 12)


def test_what_cannot_be_vouched_for_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    exact = SimpleNamespace(leading=lambda m, k: taken.append(k) or spectrum.leading(m, k))
    monkeypatch.setattr(krylov, "spectrum", exact)
    flat = with_values((640, 700), spectra(640)["flat"].double())
    krylov.leading(flat, 12)
    krylov.leading(flat.double(), 12)
    krylov.leading(flat[:100], 12)
    krylov.leading(torch.zeros(640, 700), 12)
    assert taken == [12] * 4


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_any_size_and_the_same_each_time(size: float) -> None:
    matrix = with_values((700, 640), spectra(640)["adapters in noise"].double()) * size
    once, again = (krylov.leading(matrix, 12) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    u, s, v = once
    wanted = best(matrix, 12)
    assert float((u * (s / size) @ v.mT - wanted / size).norm() / (wanted / size).norm()) < 1e-5
