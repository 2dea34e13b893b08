"""Laws of the spectral steps: which directions a merged matrix has, and how exact they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from merganser.steps import spectrum
from merganser.steps.combine.dc import dc
from merganser.steps.combine.esm import esm, passes
from merganser.steps.combine.iso_c import iso_c
from merganser.steps.combine.iso_cts import iso_cts
from merganser.steps.combine.tsv import tsv
from merganser.steps.combine.wudi import wudi
from merganser.steps.spectrum import leading, polar, polar_parts


def with_inputs(deltas: Tensor, **given: object) -> Tensor:
    """Merge by esm with inputs of many tokens."""
    return esm(deltas, inputs=normal(7, len(deltas), 40, deltas.shape[2]), **given)


BY_NAME = {"tsv": tsv, "iso_c": iso_c, "iso_cts": iso_cts, "dc": dc, "wudi": wudi, "esm": with_inputs}
every = pytest.mark.parametrize("name", BY_NAME)
fast = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> Tensor:
    return 0.01 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@given(seed=seeds, n=st.integers(1, 12))
@fast
def test_eigenpairs_found_in_place_are_those_of_the_matrix(seed: int, n: int) -> None:
    x = normal(seed, n + 1, n).double()
    gram = x.mT @ x
    kept, place = gram.clone(), gram.data_ptr()
    values, vectors = spectrum.eigh(gram)
    assert vectors.data_ptr() == place
    torch.testing.assert_close(values, torch.linalg.eigvalsh(kept))
    torch.testing.assert_close(kept @ vectors, vectors * values)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(n, dtype=torch.float64))


def by_svd(name: str, deltas: Tensor) -> Tensor:
    """Return what the papers write, by plain SVDs in float64."""
    deltas = deltas.double()
    r, count = min(deltas.shape[1:]), len(deltas)

    def nearest(x: Tensor) -> Tensor:
        p, _, q = torch.linalg.svd(x, full_matrices=False)
        return p @ q

    def merged(triplets: list[tuple[Tensor, Tensor, Tensor]], flat: bool) -> Tensor:
        u, s, v = (torch.cat(x, dim=d) for x, d in zip(zip(*triplets, strict=True), (1, 0, 0), strict=True))
        return nearest(u) * (s.sum() / r if flat else s) @ nearest(v)

    def top(x: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        return u[:, :k], s[:k], v[:k]

    if name == "tsv":
        return merged([top(delta, r // count) for delta in deltas], flat=False)
    own = 0 if name == "iso_c" else round((r - int(r * 0.8)) / count)
    common = top(deltas.sum(0), r - own * count)
    rest = [top(delta - common[0] @ (common[0].mT @ delta), own) for delta in deltas] if own else []
    return merged([*rest, common], flat=True)


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts"])
@pytest.mark.parametrize(("experts", "rows", "columns"), [(3, 40, 30), (2, 30, 50), (8, 300, 280), (12, 260, 300)])
def test_equal_to_the_plain_svd_in_float64(name: str, experts: int, rows: int, columns: int) -> None:
    deltas = normal(1, experts, rows, columns) + 0.5 * normal(2, rows, columns)
    expected = by_svd(name, deltas)
    assert (BY_NAME[name](deltas) - expected).norm() <= 1e-5 * expected.norm()
    assert (BY_NAME[name](deltas.double()) - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize(("rows", "columns"), [(64, 64), (96, 48), (48, 96)])
def test_iso_cts_is_exact_where_experts_are_nearly_alike(rows: int, columns: int) -> None:
    """What the shared directions leave is then small, and fp32 between the two would be felt: 1e-4 and more."""
    deltas = 1e-3 * normal(1, 8, rows, columns) + normal(2, rows, columns)
    expected = by_svd("iso_cts", deltas)
    assert (iso_cts(deltas) - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize(("apart", "error"), [(1.0, 1e-6), (1e-1, 1e-5), (1e-2, 1e-5), (1e-3, 1e-4)])
def test_tsv_is_exact_however_alike_the_experts_are(apart: float, error: float, turn: bool) -> None:
    """Where they are far apart its last product is fp32; where they are alike that would be felt."""
    deltas = normal(2, 600, 300) + apart * normal(1, 8, 600, 300)
    deltas = deltas.mT if turn else deltas
    expected = by_svd("tsv", deltas)
    assert (tsv(deltas) - expected).norm() <= error * expected.norm()


SPECTRA = {
    "even": torch.linspace(1, 0.5, 300),
    "falling": torch.arange(1, 301) ** -1.0,
    "steep": torch.logspace(0, -5, 300),
    "few large ones": torch.cat([torch.logspace(2, 0, 20), torch.linspace(0.9, 0.01, 280)]),
    "low rank": torch.cat([torch.linspace(2, 1, 20), torch.zeros(280)]),
}


def matrix(s: Tensor, rows: int = 400) -> Tensor:
    u, v = (
        torch.linalg.qr(100 * normal(0, rows, len(s)).double()).Q,
        torch.linalg.qr(100 * normal(1, 300, 300).double()).Q,
    )
    return u * s.double() @ v.mT


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("turn", [False, True])
def test_leading_triplets_are_those_of_the_svd(name: str, turn: bool) -> None:
    x, k = matrix(SPECTRA[name]), 30
    rank = min(k, int((SPECTRA[name] > 0).sum()))
    u, s, v = leading(x.mT, k) if turn else leading(x, k)
    torch.testing.assert_close(s, SPECTRA[name][:rank].double(), rtol=1e-7, atol=0)
    p, t, q = torch.linalg.svd(x.mT if turn else x, full_matrices=False)
    expected = p[:, :rank] * t[:rank] @ q[:rank]
    torch.testing.assert_close(u * s @ v.mT, expected, rtol=0, atol=1e-6 * float(t[0]))
    torch.testing.assert_close(u @ v.mT, p[:, :rank] @ q[:rank], rtol=0, atol=1e-5)


def test_the_fast_way_is_taken_where_few_vectors_are_asked_for_and_left_where_it_would_err() -> None:
    def pairs(name: str, k: int) -> tuple | None:
        x = matrix(SPECTRA[name])
        return spectrum._few(x.mT @ x, k)

    found = pairs("even", 30)
    assert found is not None
    x = matrix(SPECTRA["even"])
    torch.testing.assert_close(x.mT @ x @ found[1], found[1] * found[0], rtol=0, atol=1e-8)
    assert pairs("even", 100) is None
    close_by = torch.cat([torch.tensor([1e4]), torch.ones(299) - 1e-9 * torch.arange(299)])
    hard = matrix(close_by)
    assert spectrum._few(hard.mT @ hard, 30) is None
    torch.testing.assert_close(leading(hard, 30)[1], close_by[:30].double(), rtol=1e-6, atol=0)


@given(seed=seeds, shape=st.sampled_from([(5, 3), (3, 5), (6, 6), (1, 4)]))
@fast
def test_the_polar_factor_is_the_nearest_matrix_with_orthonormal_columns(seed: int, shape: tuple) -> None:
    x = normal(seed, *shape).double()
    p, _, q = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(polar(x), p @ q)
    left, right, s = polar_parts(x)
    torch.testing.assert_close(left * s @ right.mT, x)


@given(seed=seeds, shape=st.sampled_from([(5, 3), (3, 5), (6, 6), (12, 10), (20, 24)]), experts=st.integers(1, 6))
@pytest.mark.parametrize("common", [0, 0.5, 0.8, 1])
@fast
def test_iso_cts_has_a_flat_spectrum_and_keeps_the_common_columns(
    common: float, seed: int, shape: tuple, experts: int
) -> None:
    deltas = normal(seed, experts, *shape)
    merged = iso_cts(deltas, common=common)
    s = torch.linalg.svdvals(merged)
    close(s, s.mean().expand_as(s))
    if round((min(shape) - int(min(shape) * common)) / experts) == 0:
        close(merged, iso_c(deltas))


@every
@pytest.mark.parametrize("turn", [False, True])
def test_low_rank_experts_give_nothing_outside_their_rows_and_columns(name: str, turn: bool) -> None:
    """And, where the step treats both sides alike, the transposed matrices give the transposed result."""
    if name == "wudi":
        return  # Adam moves every entry; see its own law
    left, right = normal(1, 3, 12, 2), normal(2, 3, 2, 9)
    deltas = right.mT @ left.mT if turn else left @ right
    if name == "esm" and not turn:
        return  # its columns get powers of their norms, which does not keep to the span of the rows
    merged = BY_NAME[name](deltas)
    columns, rows = (torch.linalg.qr(torch.cat(list(x), dim=1)).Q for x in (left, right.mT))
    columns, rows = (rows, columns) if turn else (columns, rows)
    if name == "esm":
        rows = torch.eye(12)
    torch.testing.assert_close(columns @ (columns.mT @ merged @ rows) @ rows.mT, merged, rtol=1e-4, atol=1e-8)
    if name in ("tsv", "iso_c", "dc"):
        close(BY_NAME[name](deltas.mT).mT, merged)


@every
def test_text_projection_is_averaged_and_a_flag_decides_on_convolutions(name: str) -> None:
    deltas, conv = normal(0, 3, 4, 5), normal(0, 3, 4, 2, 3, 3)
    assert torch.equal(BY_NAME[name](deltas, name="model.text_projection.weight"), deltas.mean(0))
    assert not torch.allclose(BY_NAME[name](deltas, name="model.visual.proj"), deltas.mean(0))
    if name != "esm":
        assert torch.equal(BY_NAME[name](conv, conv="mean"), conv.mean(0))
        close(BY_NAME[name](conv), BY_NAME[name](conv.flatten(2)).reshape(conv.shape[1:]))
    for shape in [(), (7,), (2, 3, 4)]:
        other = normal(0, 3, *shape)
        assert torch.equal(esm(other, inputs=None) if name == "esm" else BY_NAME[name](other), other.mean(0))


@given(seed=seeds, shape=st.sampled_from([(6, 5), (5, 6), (8, 8)]))
@pytest.mark.parametrize("smoothing", [None, "linear"])
@fast
def test_dc_does_not_depend_on_the_sign_of_a_singular_vector(smoothing: str | None, seed: int, shape: tuple) -> None:
    """Turning signs of rows and columns turns singular vectors, and nothing else, whatever the decomposition returns."""
    deltas, (m, n) = normal(seed, 3, *shape), shape
    signs = (torch.randint(0, 2, (m, 1)) * 2 - 1) * (torch.randint(0, 2, (n,)) * 2 - 1)
    close(dc(deltas * signs, density=0.3, smoothing=smoothing) * signs, dc(deltas, density=0.3, smoothing=smoothing))


def test_dc_of_one_expert_keeps_its_largest_triplets_and_smooths_them() -> None:
    delta = normal(0, 1, 9, 6)
    s = torch.linalg.svdvals(delta[0])
    close(dc(delta, density=1), delta[0])
    close(torch.linalg.svdvals(dc(delta)), s[0] * torch.eye(6)[0])  # one entry of the core
    close(torch.linalg.svdvals(dc(delta, density=1, smoothing="mean")), s.mean().expand(6))
    line = torch.linspace(min(5.0, float(s[0] / s[-1])), 1, 6)
    close(torch.linalg.svdvals(dc(delta, density=1, smoothing="linear")), s.sum() * line / line.sum())
    steeper = torch.linalg.svdvals(dc(delta, density=1, smoothing="linear", rho=1))
    close(steeper, s.mean().expand(6))


@given(seed=seeds, experts=st.integers(1, 5), steps=st.integers(0, 20))
@fast
def test_wudi_starts_at_the_sum_and_moves_at_most_lr_a_step(seed: int, experts: int, steps: int) -> None:
    deltas = normal(seed, experts, 6, 5)
    moved = (wudi(deltas, steps=steps, lr=1e-4) - deltas.sum(0)).abs().max()
    assert moved <= 1.1e-4 * steps + 1e-7
    if experts > 1 and steps:
        assert moved > 0.5e-4


def test_wudi_is_torch_adam_on_the_published_loss() -> None:
    deltas = normal(0, 3, 6, 9).double()
    x = deltas.sum(0).clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=1e-3)
    for _ in range(30):
        adam.zero_grad()
        sum(((x - d) @ d.mT).square().sum() / d.square().sum() for d in deltas).backward()
        adam.step()
    torch.testing.assert_close(wudi(deltas, steps=30, lr=1e-3), x.detach(), rtol=1e-6, atol=1e-9)


def test_wudi_exact_solves_the_normal_equations_and_stays_in_the_rows() -> None:
    deltas = (normal(1, 3, 12, 2) @ normal(2, 3, 2, 9)).double()
    x = wudi(deltas, solve="exact")
    gradient = sum((x - d) @ d.mT @ d / d.square().sum() for d in deltas)
    assert gradient.norm() <= 1e-9 * x.norm()
    rows = torch.linalg.qr(torch.cat(list(normal(2, 3, 2, 9).mT), dim=1).double()).Q
    close(x @ rows @ rows.mT, x)
    assert torch.equal(wudi(torch.cat([deltas, torch.zeros(1, 12, 9)]), solve="exact"), x)  # an expert that stayed


def test_esm_does_not_see_the_size_of_inputs_and_without_them_is_tsv() -> None:
    deltas, x = normal(0, 3, 9, 5), normal(1, 3, 20, 5)
    close(esm(deltas, inputs=1000 * x), esm(deltas, inputs=x))
    assert torch.equal(esm(deltas, inputs=None), tsv(deltas))
    assert not torch.allclose(esm(deltas, inputs=x), tsv(deltas), rtol=0.1)
    assert not esm(deltas, inputs=torch.zeros(3, 20, 5)).any()
    for wrong in (normal(1, 3, 20, 4), normal(1, 2, 20, 5), normal(1, 3, 5)):
        with pytest.raises(ValueError, match="inputs must be"):
            esm(deltas, inputs=wrong)


def test_esm_keeps_no_more_directions_than_inputs_show() -> None:
    """With two tokens a layer of 12 outputs has two directions an expert, though k = 12 // 2 = 6."""
    merged = esm(normal(0, 2, 12, 8), inputs=normal(1, 2, 2, 8))
    assert int(torch.linalg.matrix_rank(merged, rtol=1e-4)) == 4


def test_esm_compares_layers_of_a_kind() -> None:
    layers = {f"h.{k}.fc.weight": (1 + k) * normal(k, 3, 6, 5) for k in range(3)}
    layers |= {"head.weight": normal(9, 3, 6, 5), "h.0.bias": normal(8, 3, 6)}
    (look,) = passes()
    seen = [look(deltas, [], name=name) for name, deltas in layers.items()]
    survey = [seen[0] + seen[1] + seen[2] + seen[3] + seen[4]]
    alone = {name: esm(deltas, inputs=None, name=name) for name, deltas in layers.items()}
    mean = sum(alone[f"h.{k}.fc.weight"].norm() for k in range(3)) / 3
    for name, deltas in layers.items():
        factor = (alone[name].norm() / mean) ** 2 if ".fc." in name else 1
        close(esm(deltas, inputs=None, name=name, survey=survey), alone[name] * factor)
