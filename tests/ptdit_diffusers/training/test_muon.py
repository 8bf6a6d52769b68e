"""Muon on devices without bfloat16 products."""

import pytest
import torch

from ptdit_diffusers.training.optimizers import make_optimizers

if not hasattr(torch.optim, "Muon"):
    pytest.skip("needs torch 2.9", allow_module_level=True)

from ptdit_diffusers.training.muon import Float32Muon, orthogonalized


def test_muon_is_the_same_but_for_rounding_on_a_cpu_that_does_not_multiply_bfloat16(monkeypatch) -> None:
    weights = []
    for able in (True, False):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda able=able: {"avx512_bf16": able})
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 24, bias=False), torch.nn.Embedding(2, 2))
        before = model[0].weight.detach().clone()
        _, muon = make_optimizers(dict(model.named_parameters()), lr=1e-3, weight_decay=0.01, muon="^0")
        assert type(muon) is (torch.optim.Muon if able else Float32Muon)
        model[0](torch.randn(40, 8)).pow(4).sum().backward()
        muon.step()
        weights.append(model[0].weight.detach() - before)
    assert not torch.equal(*weights)
    assert (weights[0] - weights[1]).norm() < 0.02 * weights[1].norm()


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_an_orthogonalized_matrix_has_singular_values_near_one(shape) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalized(matrix, (3.4445, -4.775, 2.0315), 5, 1e-7)
    values = torch.linalg.svdvals(result)
    assert result.shape == shape and values.min() > 0.6 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(result.flatten(), (left @ right).flatten(), dim=0) > 0.97


@pytest.mark.parametrize("smallest", [1.0, 1e-3])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_products_of_the_small_matrices_equal_the_iteration_of_the_paper(shape, smallest) -> None:
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    matrix = left @ torch.diag(torch.linspace(1, smallest, 16)) @ right
    a, b, c = 3.4445, -4.775, 2.0315
    expected = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = expected @ expected.T
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    assert torch.allclose(orthogonalized(matrix, (a, b, c), 5, 1e-7).double(), expected, atol=2e-5)


def test_no_iteration_only_normalizes() -> None:
    matrix = torch.eye(4) * 3
    assert torch.allclose(orthogonalized(matrix, (3.4445, -4.775, 2.0315), 0, 1e-7), matrix / 6)
