"""Guidance: gradients in closed form, and guided samplers that end where theory says they do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ldgan.diffusion.guidance import classifier_free, classifier_gradient
from ldgan.diffusion.process import Denoised, Diffusion, linear_betas, vp_betas
from ldgan.diffusion.samplers import Denoiser, Guidance, ancestral, ddim
from ldgan.engine.philox import RandomRows
from ldgan.models.conditions import Conditions

SHAPE = (2, 4, 4)
NULL_LABEL = 3


class LabelledNetwork(nn.Module):
    """Called like a U-Net with three classes; the output tells all its inputs apart, and calls are counted."""

    def __init__(self, out_channels: int = SHAPE[0]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NULL_LABEL + 1, 2 * SHAPE[0])
        self.out_channels = out_channels
        self.batch_sizes: list[int] = []

    def forward(self, x_t: Tensor, z: Tensor | None, t: Tensor, labels: Tensor) -> Tensor:
        self.batch_sizes.append(len(x_t))
        style = 0.0 if z is None else z.sum(dim=1)[:, None, None, None]
        label = self.embedding(labels)[:, : self.out_channels, None, None]
        x = torch.cat([x_t, x_t.square()], dim=1)[:, : self.out_channels]
        return x.sin() * label + style * label.square() + t[:, None, None, None] / 7


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_t, z, t and labels of five samples."""
    random = torch.Generator().manual_seed(0)
    x_t, z = torch.randn(5, *SHAPE, generator=random), torch.randn(5, 4, generator=random)
    return x_t, z, torch.tensor([1, 2, 3, 4, 4]), torch.tensor([0, 1, 2, 2, 0])


@pytest.fixture
def network() -> LabelledNetwork:
    torch.manual_seed(0)
    return LabelledNetwork().requires_grad_(False)


def guided(network: LabelledNetwork, inputs: tuple[Tensor, Tensor | None, Tensor, Tensor], scale: float) -> Tensor:
    x_t, z, t, labels = inputs
    return classifier_free(network, x_t, z, t, Conditions(labels), null_label=NULL_LABEL, scale=scale)


def test_classifier_free_guidance_is_conditional_at_1_and_unconditional_at_0(network, inputs):
    x_t, z, t, labels = inputs
    assert torch.equal(guided(network, inputs, 1.0), network(*inputs))
    assert torch.equal(guided(network, inputs, 0.0), network(x_t, z, t, torch.full_like(labels, NULL_LABEL)))


@pytest.mark.parametrize("with_z", [True, False])
@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
def test_classifier_free_guidance_extrapolates_from_one_call_of_both(network, inputs, scale, with_z):
    x_t, z, t, labels = inputs
    z = z if with_z else None
    conditional = network(x_t, z, t, labels).double()
    unconditional = network(x_t, z, t, torch.full_like(labels, NULL_LABEL)).double()
    network.batch_sizes.clear()
    output = guided(network, (x_t, z, t, labels), scale)
    assert network.batch_sizes == [2 * len(x_t)]
    expected = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(output.double(), expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(output.double(), conditional, atol=0.1)


def test_a_learned_variance_is_that_of_the_conditional_model(inputs):
    torch.manual_seed(1)
    network = LabelledNetwork(out_channels=2 * SHAPE[0]).requires_grad_(False)
    conditional, output = network(*inputs), guided(network, inputs, 4.0)
    assert torch.equal(output[:, SHAPE[0] :], conditional[:, SHAPE[0] :])
    assert not torch.allclose(output[:, : SHAPE[0]], conditional[:, : SHAPE[0]], atol=0.1)


def test_the_gradient_of_a_linear_classifier_has_a_closed_form() -> None:
    # log p(y | x) = w_y x - log sum_k exp(w_k x), whose gradient is w_y - sum_k p(k | x) w_k.
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_t = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels, t = torch.tensor([0, 1, 2, 1]), torch.tensor([1, 2, 3, 4])
    guidance = classifier_gradient(lambda x, t: x @ weights.T, Diffusion(vp_betas(4)), labels, scale=2.5)
    expected = 2.5 * (weights[labels] - (x_t @ weights.T).softmax(dim=1) @ weights)
    with torch.no_grad():  # as in a sampler
        # Logits of a classifier are taken to fp32 before the softmax.
        torch.testing.assert_close(guidance(x_t, t), expected, rtol=1e-6, atol=1e-6)


def test_a_classifier_is_told_the_timesteps_that_it_was_trained_on() -> None:
    told = []

    def classifier(x_t: Tensor, t: Tensor) -> Tensor:
        told.append(t.tolist())
        return x_t

    respaced = Diffusion(linear_betas(1000)).respaced(3)
    guidance = classifier_gradient(classifier, respaced, torch.tensor([0, 1]), scale=1.0)
    for step in (3, 1):
        guidance(torch.zeros(2, 2), torch.tensor([step, step]))
    assert told == [[1000, 1000], [1, 1]]


def test_scale_0_is_unguided_bit_for_bit() -> None:
    diffusion, noise = Diffusion(vp_betas(4)), (lambda: RandomRows([1, 2, 3], "sample", "cpu").normal)
    labels = torch.tensor([0, 1, 1])

    def denoiser(x_t: Tensor, t: Tensor) -> Denoised:
        return diffusion.denoised(0.7 * x_t, x_t, t)

    def samples(guidance: Guidance | None) -> list[Tensor]:
        return [sampler(denoiser, diffusion, noise(), (2,), guidance=guidance) for sampler in (ancestral, ddim)]

    unguided = samples(None)
    off, on = (samples(classifier_gradient(lambda x, t: 3 * x, diffusion, labels, scale=scale)) for scale in (0.0, 1.0))
    for plain, zero, one in zip(unguided, off, on, strict=True):
        assert torch.equal(plain, zero)
        assert (one - plain)[labels == 0, 0].gt(0.01).all()  # towards class 0 is along the first axis
        assert (one - plain)[labels == 1, 0].lt(-0.01).all()


def gaussian_denoiser(diffusion: Diffusion, mean: float, std: float) -> Denoiser:
    """The exact E[x_0 | x_t] of x_0 ~ N(mean, std^2) as a DDPM's estimate."""

    def denoiser(x_t: Tensor, t: Tensor) -> Denoised:
        bar = diffusion.alphas_bar[t[0]].item()
        gain = math.sqrt(bar) * std**2 / (bar * std**2 + 1 - bar)
        return diffusion.denoised(mean + gain * (x_t - math.sqrt(bar) * mean), x_t, t)

    return denoiser


def standard_normal(num_samples: int, seed: int) -> Callable[..., Tensor]:
    random = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(num_samples, *shape, generator=random)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", [ancestral, ddim])
def test_an_exponential_tilt_shifts_the_mean_by_scale_times_variance(sampler, scale: float) -> None:
    # For x_0 ~ N(0, s^2) and p(y | x_0) proportional to exp(k x_0), log p(y | x_t) is k E[x_0 | x_t] but for a
    # constant, and N(0, s^2) exp(scale k x_0) is N(scale k s^2, s^2): guidance of any scale is exact, and leaves the
    # variance alone.
    std, k, num_samples = 0.8, 0.5, 8_000
    diffusion = Diffusion(linear_betas(1000)).respaced(200)
    denoiser = gaussian_denoiser(diffusion, 0.0, std)

    def classifier(x_t: Tensor, t: Tensor) -> Tensor:
        # Among very many other classes that are far likelier, the softmax's normalisation does not matter.
        step = torch.searchsorted(diffusion.timesteps, t)
        log_likelihood = k * denoiser(x_t, step).x_0 - 30
        return torch.cat([log_likelihood, torch.zeros_like(log_likelihood)], dim=1)

    labels = torch.zeros(num_samples, dtype=torch.int64)
    guidance = classifier_gradient(classifier, diffusion, labels, scale)
    samples = sampler(denoiser, diffusion, standard_normal(num_samples, 0), (1,), guidance=guidance)
    standard_error = std / math.sqrt(num_samples)
    discretisation = 0.02 * scale * k * std**2
    assert samples.mean().item() == pytest.approx(scale * k * std**2, abs=5 * standard_error + discretisation)
    assert samples.std().item() == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("sampler", [ancestral, ddim])
def test_an_exact_classifier_turns_a_mixture_into_the_class_asked_for(sampler) -> None:
    # Two Gaussians N(-m, s^2) and N(m, s^2), equally likely. Guided by the exact p(y | x_t) at scale 1, a sampler of
    # the mixture is the sampler of class y: Bayes' rule for scores.
    m, std, num_samples = 1.0, 0.5, 8_000
    diffusion = Diffusion(linear_betas(1000)).respaced(200)
    denoisers = [gaussian_denoiser(diffusion, mean, std) for mean in (-m, m)]

    def classifier(x_t: Tensor, t: Tensor) -> Tensor:
        bar = diffusion.alphas_bar[torch.searchsorted(diffusion.timesteps, t)].float()[:, None]
        variance = bar * std**2 + 1 - bar
        return -(x_t - bar.sqrt() * torch.tensor([-m, m])).square() / (2 * variance)

    def mixture(x_t: Tensor, t: Tensor) -> Denoised:
        weights = classifier(x_t, diffusion.timesteps[t]).softmax(dim=1).split(1, dim=1)
        x_0 = sum(weight * denoiser(x_t, t).x_0 for weight, denoiser in zip(weights, denoisers, strict=True))
        return diffusion.denoised(x_0, x_t, t)

    unguided = sampler(mixture, diffusion, standard_normal(num_samples, 0), (1,))
    assert abs(unguided.mean().item()) < 0.05
    labels = torch.arange(num_samples) % 2
    guidance = classifier_gradient(classifier, diffusion, labels, scale=1.0)
    samples = sampler(mixture, diffusion, standard_normal(num_samples, 0), (1,), guidance=guidance)[:, 0]
    for label, mean in enumerate((-m, m)):
        of_class = samples[labels == label]
        assert of_class.mean().item() == pytest.approx(mean, abs=0.04)
        assert of_class.std().item() == pytest.approx(std, rel=0.05)
