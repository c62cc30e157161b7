"""A DDPM's step against the equations in float64, its losses at known values, and a run that is stopped."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from data_prep.images import encode_image
from data_prep.shards import ShardWriter
from ldgan import train_ddpm
from ldgan.diffusion.process import Diffusion, cosine_betas, linear_betas
from ldgan.diffusion.samplers import SamplerConfig
from ldgan.engine.accumulation import Accumulation
from ldgan.engine.cli import UserError
from ldgan.engine.config import load_config
from ldgan.engine.ema import EMA
from ldgan.engine.philox import Random, key_of
from ldgan.inference.trained_model import build_unet, load_model
from ldgan.models.unet import UNetConfig
from ldgan.training.data import Pixels
from ldgan.training.ddpm import DDPMTrainer, Denoising
from ldgan.training.losses import simple_loss, variational_bound

SHAPE, BATCH_SIZE, SEED, NUM_STEPS = (2, 4, 4), 8, 7, 5
SOURCE = Pixels(None, SHAPE)  # the trainer reads no dataset, it is handed batches
TINY = UNetConfig(
    base_channels=8, channel_multipliers=[1], num_res_blocks=1, attention_resolutions=[], z_dim=0, embedding_dim=8
)


def trainer_of(network: nn.Module, diffusion: Diffusion | None = None, **settings: Any) -> DDPMTrainer:
    """A trainer by gradient descent with rate 1: a step moves weights by minus their gradient."""
    parameters = list(network.parameters()) or [torch.zeros(())]
    learner = Denoising(network, torch.optim.SGD(parameters, lr=1.0), EMA(network, 8, rampup_ratio=None))
    defaults = dict(predicts="noise", variance="posterior", vlb_weight=0.1, label_dropout=0.0, max_gradient_norm=0.0)
    accumulation = Accumulation(Accelerator(cpu=True), settings.pop("num_micro_batches", 1), BATCH_SIZE, SEED)
    diffusion = diffusion or Diffusion(cosine_betas(NUM_STEPS))
    return DDPMTrainer(accumulation, diffusion, learner, **defaults | settings)


def tiny_network(*, num_classes: int = 0, learned_variance: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return build_unet(TINY, SHAPE, num_classes, learned_variance=learned_variance)


def data(number: int = 0, batch_size: int = BATCH_SIZE) -> Tensor:
    return torch.randn(batch_size, *SHAPE, generator=torch.Generator().manual_seed(number))


def weights(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def gradients(network: nn.Module, loss: Tensor) -> Tensor:
    parameters = list(network.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def test_the_variational_bound_is_kullback_leibler_divergence_and_likelihood_in_bits() -> None:
    mean, std, posterior_mean, posterior_std, x_0 = torch.rand(5, 4, 2, 3, dtype=torch.float64).add(0.1)
    p, q = Normal(mean, std), Normal(posterior_mean, posterior_std)
    expected = kl_divergence(q, p).mean() / math.log(2)
    torch.testing.assert_close(variational_bound(posterior_mean, posterior_std, mean, std), expected)
    assert variational_bound(mean, std, mean, std).abs() < 1e-12

    posterior_std[0] = 0  # the first sample has t = 1, where the posterior is x_0
    posterior_mean[0] = x_0[0]
    terms = torch.cat([-p.log_prob(x_0)[:1], kl_divergence(q, p)[1:]])
    bound = variational_bound(posterior_mean, posterior_std, mean, std)
    torch.testing.assert_close(bound, terms.mean() / math.log(2))


def test_the_bounds_gradient_is_finite_where_the_posterior_has_no_width() -> None:
    std = torch.full((2, 3), 0.5, requires_grad=True)
    variational_bound(torch.zeros(2, 3), torch.tensor([[0.0], [0.1]]), torch.ones(2, 3), std).backward()
    # d/ds of log s + (1 + posterior_std^2) / (2 s^2), in bits, a sixth of it for each of six dimensions
    expected = (1 / 0.5 - torch.tensor([1.0, 1.01]) / 0.5**3) / math.log(2) / 6
    torch.testing.assert_close(std.grad, expected[:, None].expand(2, 3))


def test_the_simple_loss_is_the_mean_squared_error() -> None:
    assert simple_loss(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 2.0]])).item() == pytest.approx((1 + 16) / 2)


@pytest.mark.parametrize("variance", ["posterior", "learned"])
@pytest.mark.parametrize("predicts", ["noise", "x_0"])
def test_a_step_equals_the_equations_in_float64(predicts: str, variance: str) -> None:
    network, x_0 = tiny_network(learned_variance=variance == "learned"), data()
    exact, start = in_double(network), weights(network).double()
    terms = trainer_of(network, predicts=predicts, variance=variance).step(11, SOURCE, iter([{"image": x_0}]))

    random = Random(key_of(SEED, "network"), "cpu", step=11, part=0)  # the same t and noise again
    t = random.integers(1, NUM_STEPS + 1, (BATCH_SIZE,))
    assert set(t.tolist()) >= {1, NUM_STEPS}
    noise = random.normal(x_0.shape).double()
    x_0 = x_0.double()
    beta = cosine_betas(NUM_STEPS)[t - 1].reshape(-1, 1, 1, 1)
    alpha_bars = torch.cat([torch.ones(1), (1 - cosine_betas(NUM_STEPS)).cumprod(0)])
    bar, previous_bar = (alpha_bars[s].reshape(-1, 1, 1, 1) for s in (t, t - 1))

    # Ho et al., Algorithm 1, line 5.
    x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * noise
    output = exact(x_t, None, t)
    estimate, v = output.split(2, dim=1) if variance == "learned" else (output, None)
    loss = (estimate - {"noise": noise, "x_0": x_0}[predicts]).square().mean()
    assert terms["simple"].item() == pytest.approx(loss.item(), abs=1e-5)
    if v is not None:
        # Nichol and Dhariwal, eq. 15 and 16; the mean, by eq. 11 of Ho et al., takes no gradient.
        noise_estimate = estimate if predicts == "noise" else (x_t - bar.sqrt() * estimate) / (1 - bar).sqrt()
        mean = ((x_t - beta / (1 - bar).sqrt() * noise_estimate) / (1 - beta).sqrt()).detach()
        variances = beta * (1 - previous_bar) / (1 - bar)
        lower = torch.where(t.reshape(-1, 1, 1, 1) == 1, variance_of_t_2(alpha_bars), variances)
        p = Normal(mean, torch.exp(((v + 1) * beta.log() + (1 - v) * lower.log()) / 4))
        posterior_mean = previous_bar.sqrt() * beta / (1 - bar) * x_0
        posterior_mean = posterior_mean + (1 - beta).sqrt() * (1 - previous_bar) / (1 - bar) * x_t
        divergence = kl_divergence(Normal(posterior_mean, lower.sqrt()), p)
        bound = torch.where(t.reshape(-1, 1, 1, 1) == 1, -p.log_prob(x_0), divergence).mean() / math.log(2)
        assert terms["vlb"].item() == pytest.approx(NUM_STEPS * bound.item(), rel=1e-4)
        loss = loss + 0.1 * NUM_STEPS * bound
    torch.testing.assert_close(weights(network).double(), start - gradients(exact, loss), rtol=0, atol=2e-5)


def in_double(network: nn.Module) -> nn.Module:
    """A copy that computes in float64."""
    exact = copy.deepcopy(network).double()
    for layer in exact.modules():
        if isinstance(layer, nn.Linear):  # embeddings of t are made in fp32
            layer.register_forward_pre_hook(lambda layer, given: given[0].double())
    return exact


def variance_of_t_2(alpha_bars: Tensor) -> Tensor:
    """Variance of q(x_1 | x_2, x_0), which stands in for that of t = 1."""
    return (1 - alpha_bars[1]) / (1 - alpha_bars[2]) * (1 - alpha_bars[2] / alpha_bars[1])


def test_the_bound_teaches_the_variance_and_not_the_mean() -> None:
    network = tiny_network(learned_variance=True)
    losses = trainer_of(network, variance="learned").losses(data(), None, Random(key_of(0), "cpu"))
    (of_bound,) = torch.autograd.grad(losses["vlb"], network.conv_out.weight, retain_graph=True)
    (of_simple,) = torch.autograd.grad(losses["simple"], network.conv_out.weight)
    assert (of_bound[:2] == 0).all()
    assert (of_bound[2:] != 0).any(dim=(1, 2, 3)).all()
    assert (of_simple[:2] != 0).any(dim=(1, 2, 3)).all()
    assert (of_simple[2:] == 0).all()


class BestForGaussianData(nn.Module):
    """E[noise | x_t] for data N(0, std^2), and an interpolation that gives the true variance of x_{t-1}."""

    num_classes = 0

    def __init__(self, diffusion: Diffusion, std: float, error: float = 0.0) -> None:
        super().__init__()
        self.diffusion, self.std, self.error = diffusion, std, error

    def forward(self, x_t: Tensor, z: None, t: Tensor, labels: None) -> Tensor:
        index, process = t.reshape(-1, 1, 1, 1), self.diffusion
        bar, previous_bar, beta = process.alphas_bar[index], process.alphas_bar[index - 1], process.betas[index]
        noise = (1 - bar).sqrt() * x_t / (bar * self.std**2 + 1 - bar)
        true = 1 / (1 / (previous_bar * self.std**2 + 1 - previous_bar) + (1 - beta) / beta)
        lower = process.posterior_variance[index.clamp(min=2)]
        v = 2 * (true / lower).log() / (beta / lower).log() - 1
        return torch.cat([noise, (v + self.error).expand_as(noise)], dim=1)


@pytest.mark.parametrize(("num_steps", "std"), [(4, 1.0), (4, 0.3), (50, 0.3)])
def test_the_bound_of_the_true_reverse_process_is_the_datas_entropy(num_steps: int, std: float) -> None:
    # Then all of the bound but L_T is the entropy of x_0 given x_T, log2(2 pi e Var(x_0 | x_T)) / 2; a process with
    # another variance needs more bits. The noise error is that of the best estimate, Var(noise | x_t).
    diffusion, num_samples = Diffusion(cosine_betas(num_steps)), 200_000
    x_0 = std * torch.randn(num_samples, 1, 1, 1, dtype=torch.float64, generator=torch.manual_seed(0))

    def losses(error: float) -> dict[str, Tensor]:
        network = BestForGaussianData(diffusion, std, error)
        trainer = trainer_of(network, diffusion, variance="learned")
        return trainer.losses(x_0, None, Random(key_of(1), "cpu"))

    bar = diffusion.alphas_bar[1:]
    of_x_0_given_x_T = 1 / (std**-2 + bar[-1] / (1 - bar[-1]))
    best = losses(0.0)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * of_x_0_given_x_T)
    assert best["vlb"].item() == pytest.approx(entropy, abs=0.003 * num_steps)
    expected = (bar * std**2 / (bar * std**2 + 1 - bar)).mean().item()
    assert best["simple"].item() == pytest.approx(expected, abs=5 * 2**0.5 * num_samples**-0.5)
    assert losses(0.5)["vlb"] > best["vlb"]
    assert losses(-0.5)["vlb"] > best["vlb"]


def test_every_timestep_is_drawn_equally_often() -> None:
    network, seen = tiny_network(), []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    trainer_of(network).losses(data(batch_size=5000), None, Random(key_of(0), "cpu"))
    counts = torch.bincount(seen[0], minlength=NUM_STEPS + 1)
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:].float(), torch.full((5,), 1000.0), rtol=0, atol=5 * 800**0.5)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 1000)])
def test_labels_reach_the_network_but_for_the_share_that_is_dropped(share: float, expected: int) -> None:
    network, seen = tiny_network(num_classes=3), []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[3]))
    labels = torch.arange(4000) % 3
    trainer_of(network, label_dropout=share).losses(data(batch_size=4000), labels, Random(key_of(0), "cpu"))
    dropped = seen[0] == 3
    assert torch.equal(seen[0][~dropped], labels[~dropped])
    assert abs(int(dropped.sum()) - expected) <= 5 * (4000 * share * (1 - share)) ** 0.5


def test_a_step_of_a_conditional_network_takes_the_batch_s_labels() -> None:
    network, seen = tiny_network(num_classes=3), []
    network.register_forward_pre_hook(lambda module, given: seen.append(given[3]))
    labels = torch.tensor([2, 0, 1, 1, 0, 2, 2, 1])
    trainer_of(network).step(1, SOURCE, iter([{"image": data(), "label": labels}]))
    assert torch.equal(seen[0], labels)


def test_micro_batches_give_the_mean_of_their_gradients() -> None:
    network = tiny_network(learned_variance=True)
    trainer = trainer_of(network, variance="learned", num_micro_batches=2)
    start, batches, each = weights(network), [data(0, 4), data(1, 4)], []
    for number, x_0 in enumerate(batches):
        losses = trainer.losses(x_0, None, Random(key_of(SEED, "network"), "cpu", step=1, part=number))
        each.append(gradients(network, losses["simple"] + 0.1 * losses["vlb"]))
    for parameter in network.parameters():  # what an earlier step leaves behind
        parameter.grad = torch.ones_like(parameter)
    trainer.step(1, SOURCE, iter([{"image": x_0} for x_0 in batches]))
    torch.testing.assert_close(weights(network), start - (each[0] + each[1]) / 2)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_a_gradient_that_is_too_long_is_shortened_and_another_left_alone(ratio: float) -> None:
    updates = []
    for max_norm in (0.0, None):
        network = tiny_network()
        start = weights(network)
        max_norm = ratio * updates[0].norm().item() if max_norm is None else max_norm
        trainer_of(network, max_gradient_norm=max_norm).step(1, SOURCE, iter([{"image": data()}]))
        updates.append(start - weights(network))
    torch.testing.assert_close(updates[1], min(ratio, 1.0) * updates[0], rtol=1e-4, atol=1e-6)


def test_the_average_follows_the_weights() -> None:
    network = tiny_network()
    trainer = trainer_of(network)
    average, decay = weights(network), 0.5 ** (BATCH_SIZE / 8)
    for step in range(1, 4):
        trainer.step(step, SOURCE, iter([{"image": data(step)}]))
        average = decay * average + (1 - decay) * weights(network)
        torch.testing.assert_close(weights(trainer._learner.ema.model), average)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled images of 8 x 8 pixels, of two classes."""
    folder = tmp_path_factory.mktemp("data") / "images"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    with ShardWriter(folder, "images", details={"resolution": 8}, class_names=["even", "odd"]) as writer:
        for number, x in enumerate(pixels):
            image = encode_image(Image.fromarray(x), "png", quality=100)
            writer.write({"png": image, "cls": str(number % 2).encode()})
    return folder


SETTINGS = (
    *("run.num_steps=5", "run.batch_size=4", "run.num_micro_batches=2", "run.num_threads=1", "flips=true"),
    *("run.checkpoint_every_steps=2", "run.log_every_steps=1", "optimizer.warmup_steps=2", "schedule=cosine"),
    *("num_timesteps=6", "variance=learned", "class_conditional=true", "label_dropout=0.2"),
    *("network.base_channels=8", "network.num_res_blocks=1", "network.embedding_dim=8", "network.dropout=0.1"),
)


def run_training(monkeypatch: pytest.MonkeyPatch, data: Path, run: Path) -> None:
    monkeypatch.setattr("sys.argv", ["train_ddpm.py", f"data={data}", f"run.dir={run}", *SETTINGS])
    train_ddpm.main()


def last_state(run: Path) -> dict[str, np.ndarray]:
    """Every tensor of the last checkpoint, as file/name -> array."""
    files = sorted((run / "checkpoints" / "step_000000005").glob("*.safetensors"))
    return {f"{file.stem}/{name}": array for file in files for name, array in load_file(file).items()}


def test_a_run_that_was_stopped_ends_in_the_same_weights(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_training(monkeypatch, shards, tmp_path / "whole")
    step = DDPMTrainer.step

    def stop_at_four(trainer: DDPMTrainer, number: int, *given: Any) -> dict[str, Tensor]:
        if number == 4:
            raise KeyboardInterrupt
        return step(trainer, number, *given)

    with monkeypatch.context() as stopping:
        stopping.setattr(DDPMTrainer, "step", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            run_training(stopping, shards, tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "summary.json").exists()
    run_training(monkeypatch, shards, tmp_path / "stopped")

    whole, resumed = last_state(tmp_path / "whole"), last_state(tmp_path / "stopped")
    assert {name.split("/")[0] for name in whole} == {"network", "network_ema", "optimizer"}
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)

    # And what was trained is what is sampled: the averaged weights, in the process they were trained in.
    model = load_model(tmp_path / "whole")
    averaged = {name.removeprefix("network_ema/"): array for name, array in whole.items() if "_ema/" in name}
    for name, tensor in model.network.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), averaged[name], err_msg=name)
    assert (model.predicts, model.variance, model.class_names) == ("noise", "learned", ["even", "odd"])
    assert torch.equal(model.diffusion.betas[1:], cosine_betas(6))
    few = model.sample([0, 1], [1, 0], SamplerConfig(method="ddim", num_steps=2))
    assert few.shape == (2, 3, 8, 8)
    assert torch.isfinite(few).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["num_timesteps=0"], "num_timesteps is 0; choose 1 to 100,000"),
        (["num_timesteps=100000000000000000000"], "choose 1 to 100,000"),
        (["num_timesteps=100"], "leaves 36% of the data's variance in x_T (schedule=linear); choose more"),
        (["network.z_dim=8"], "network.z_dim is 8, but a DDPM draws no z"),
        (["vlb_weight=-1"], "vlb_weight is -1.0 and max_gradient_norm 1.0; choose 0 or more"),
        (["label_dropout=0.1"], "label_dropout needs labels"),
        (["latent=true"], "--latent needs an autoencoder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(train_ddpm.TrainConfig, None, ["data=data", "run.dir=run", *settings])
    assert message in str(error.value)


def test_linear_betas_leave_little_of_the_data_in_1000_steps() -> None:
    assert Diffusion(linear_betas(1000)).alphas_bar[-1] < 1e-4
    load_config(train_ddpm.TrainConfig, None, ["data=data", "run.dir=run"])
