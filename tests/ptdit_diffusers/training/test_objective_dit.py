"""The loss of DiT against the official code, term by term."""

import pytest
import torch

from ptdit_diffusers.core.diffusion import respaced_timesteps
from ptdit_diffusers.training.objective_dit import NoiseProcess, binned_log_likelihood, diffusion_loss, normal_kl
from tests.ptdit_diffusers import dit_goldens


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    assert left.shape == right.shape
    return (left - right).abs().max().item()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return dit_goldens.load("dit_loss")


def test_the_process_and_its_posterior_equal_the_golden(golden):
    process, index = NoiseProcess(), golden["in.t"]
    clean, noise = golden["in.x_start"], golden["in.noise"]
    noisy = process.add_noise(clean, noise, index)
    assert difference(noisy, golden["x_t"]) < 1e-6
    mean, log_variance = process.posterior(clean, noisy, index)
    assert difference(mean, golden["true_posterior_mean"]) < 1e-5
    assert difference(log_variance[:, 0, 0, 0], golden["true_posterior_log_variance_clipped"]) < 1e-5
    predicted_noise, value = golden["model_output"].chunk(2, dim=1)
    other_mean, other_log_variance = process.predicted(predicted_noise, value, noisy, index)
    assert difference(other_mean, golden["model_mean"]) < 1e-4
    assert difference(other_log_variance, golden["model_log_variance"]) < 1e-4
    kl = normal_kl(mean, log_variance, other_mean, other_log_variance).flatten(1).mean(1) / torch.tensor(2.0).log()
    assert difference(kl[1:] / golden["kl_bits"][1:], torch.ones(4)) < 1e-4
    nll = -binned_log_likelihood(clean, other_mean, 0.5 * other_log_variance)
    assert difference(nll[0], golden["decoder_nll_nats_sample0"]) < 1e-3


def test_terms_of_a_random_model_equal_the_golden(golden):
    process, index = NoiseProcess(), golden["in.t"]
    given = golden["in.noise"], golden["in.x_start"], golden["x_t"], index
    terms = diffusion_loss(process, golden["model_output"], *given)
    assert difference(terms["mse"], golden["mse"]) < 1e-4
    assert difference(terms["vb"][1:], golden["vb"][1:]) < 1e-4
    assert difference(terms["loss"][1:], golden["loss"][1:]) < 1e-4
    assert difference(terms["vb"][:1], golden["vb"][:1]) < 5e-2  # saturated tails at t = 0
    assert difference(1000 * terms["vb"][1:], golden["use_kl.loss"][1:]) < 0.1


@pytest.mark.parametrize("run", ["trained", "respaced50"])
@torch.no_grad()
def test_terms_of_a_trained_model_equal_the_golden(golden, run):
    transformer = dit_goldens.model("dit_sampler")
    respaced = run == "respaced50"
    process = NoiseProcess(respaced_timesteps(50) if respaced else None)
    index = golden["respaced50.in.t_index" if respaced else "trained.in.t"]
    clean, noise = golden["trained.in.x_start"], golden["trained.in.noise"]
    if respaced:
        assert process.timesteps[index].tolist() == [0, 20, 41, 204, 510, 999]
    noisy = process.add_noise(clean, noise, index)
    predicted = transformer(noisy, process.timesteps[index], golden["trained.in.y"]).sample
    terms = diffusion_loss(process, predicted, noise, clean, noisy, index)
    for name in ("mse", "vb"):
        assert difference(terms[name], golden[f"{run}.{name}"]) < 5e-5


def test_without_learned_variance_the_loss_is_the_error_of_the_noise(golden):
    transformer, process, index = dit_goldens.model("dit_p4"), NoiseProcess(), golden["in.t"]
    clean, noise = golden["in.x_start"], golden["in.noise"]
    noisy = process.add_noise(clean, noise, index)
    terms = diffusion_loss(process, transformer(noisy, index, golden["in.y"]).sample, noise, clean, noisy, index)
    assert set(terms) == {"mse", "loss"}
    assert difference(terms["loss"], golden["no_sigma.mse_p4"]) < 1e-4
    with pytest.raises(ValueError, match="predicts 6 channels of 4; it must be 4, or with learned variance 8"):
        diffusion_loss(process, torch.zeros(5, 6, 16, 16), noise, clean, noisy, index)


def test_gradients_equal_the_golden_and_the_bound_trains_the_variance_alone(golden):
    transformer, process, index = dit_goldens.model("dit_p2"), NoiseProcess(), golden["in.t"]
    clean, noise = golden["in.x_start"], golden["in.noise"]
    noisy = process.add_noise(clean, noise, index)

    def gradient(term):
        transformer.zero_grad()
        predicted = transformer(noisy, index, golden["in.y"]).sample
        diffusion_loss(process, predicted, noise, clean, noisy, index)[term].mean().backward()
        return {name: parameter.grad for name, parameter in transformer.named_parameters()}

    bound = gradient("vb")["final_layer.linear.bias"].clone()
    expected = golden["grad_of_mean_vb.final_layer.linear.bias"]
    assert bound.view(2, 2, 8)[..., :4].abs().max() == 0
    assert (bound - expected).abs().max() < 1e-3 * expected.abs().max()
    whole = gradient("loss")
    for name in ("final_layer.linear.bias", "blocks.0.adaLN_modulation.1.bias"):
        expected = golden[f"grad_of_mean_loss.{name}"]
        assert (whole[name] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_a_larger_weight_makes_the_error_of_the_noise_that_of_the_velocity():
    process, generator = NoiseProcess(), torch.Generator().manual_seed(0)
    clean, noise, predicted = torch.randn(3, 4, 2, 8, 8, generator=generator).unbind()
    index = torch.tensor([0, 300, 600, 900])
    terms = diffusion_loss(process, predicted, noise, clean, process.add_noise(clean, noise, index), index, 1e9)
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[index].view(-1, 1, 1, 1)

    def velocity(guess):  # alpha * noise - sigma * clean, with the clean latents that the guess stands for
        noisy = kept.sqrt() * clean + (1 - kept).sqrt() * noise
        return kept.sqrt() * guess - (1 - kept).sqrt() * (noisy - (1 - kept).sqrt() * guess) / kept.sqrt()

    error = (velocity(predicted) - velocity(noise)).square().flatten(1).mean(1)
    torch.testing.assert_close(terms["mse"].double(), error, rtol=1e-4, atol=0)
