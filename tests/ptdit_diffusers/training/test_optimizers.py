"""Which optimizer gets which parameters, and Muon on a CPU without bfloat16 products."""

import pytest
import torch

from ptdit_diffusers.training.muon import Float32Muon, orthogonalized
from ptdit_diffusers.training.optimizers import make_optimizers


def test_muon_takes_the_named_matrices_and_adamw_the_rest(monkeypatch) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": True})
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Embedding(4, 8))
    parameters = dict(model.named_parameters())
    options = {"lr": 1e-3, "weight_decay": 0.01, "decay_vectors": False}
    adamw, muon = make_optimizers(parameters, muon="^0", **options)
    assert [type(each) for each in (adamw, muon)] == [torch.optim.AdamW, torch.optim.Muon]
    assert [[tuple(p.shape) for p in group["params"]] for group in adamw.param_groups] == [[(4, 8)], [(8,)]]
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(8, 8)]
    assert [type(each) for each in make_optimizers(parameters, **options)] == [torch.optim.AdamW]
    with pytest.raises(ValueError, match="muon='attention' matches no matrix"):
        make_optimizers(parameters, muon="attention", **options)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="muon='.0' needs torch 2.9 or newer, this is 2"):
        make_optimizers(parameters, muon="^0", **options)


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


def test_vectors_decay_unless_they_get_a_group_of_their_own() -> None:
    parameters = dict(torch.nn.Linear(4, 4).named_parameters())
    (together,) = make_optimizers(parameters, lr=1.0, weight_decay=0.1)
    (apart,) = make_optimizers(parameters, lr=1.0, weight_decay=0.1, decay_vectors=False)
    assert [group["weight_decay"] for group in together.param_groups] == [0.1]
    assert [group["weight_decay"] for group in apart.param_groups] == [0.1, 0.0]
