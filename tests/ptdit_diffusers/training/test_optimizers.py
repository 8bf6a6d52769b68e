"""Which optimizer gets which parameters."""

import pytest
import torch

from ptdit_diffusers.training.optimizers import make_optimizers


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
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


def test_vectors_decay_unless_they_get_a_group_of_their_own() -> None:
    parameters = dict(torch.nn.Linear(4, 4).named_parameters())
    (together,) = make_optimizers(parameters, lr=1.0, weight_decay=0.1)
    (apart,) = make_optimizers(parameters, lr=1.0, weight_decay=0.1, decay_vectors=False)
    assert [group["weight_decay"] for group in together.param_groups] == [0.1]
    assert [group["weight_decay"] for group in apart.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_weights_in_bf16_move_by_less_than_their_precision_where_they_are_rounded_at_random(name):
    """Steps of 1e-4 from 1: the next bf16 value below is 0.0039 away."""
    pytest.importorskip("torchao", reason="torchao is optional")
    torch.manual_seed(0)
    for rounded in (True, False):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        (optimizer,) = make_optimizers({"a": weight}, name, lr=1e-4, weight_decay=0, round_bf16=rounded)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            with torch.compiler.set_stance("force_eager"):  # compiling takes many seconds
                optimizer.step()
        moved = 1 - weight.detach().float().mean().item()
        assert moved == (pytest.approx(0.01, rel=0.1) if rounded else 0)
