"""Editing: what stays, where ways end, and that filling a hole samples the conditional distribution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldgan.diffusion.process import Denoised, Diffusion, betas_of, geometric_betas, linear_betas, vp_betas
from ldgan.diffusion.samplers import Process, SamplerConfig, ancestral, ddim
from ldgan.engine.cli import UserError
from ldgan.engine.images import to_uint8
from ldgan.engine.philox import RandomRows
from ldgan.inference.editing import (
    edit,
    encode_images,
    grown,
    inpaint,
    interpolate,
    latent_mask,
    mix_styles,
    outpaint,
    repaint,
    slerp,
    step_of_strength,
    windows,
)
from ldgan.inference.trained_model import TrainedModel, build_unet
from ldgan.models.unet import UNetConfig

SIDE = 8


def model_of(diffusion: Diffusion, *, z_dim: int = 3, num_classes: int = 0, autoencoder=None) -> TrainedModel:
    """A random model of images of 8 x 8 pixels; weights at which every input counts."""
    shape = (3, SIDE, SIDE) if autoencoder is None else autoencoder.latent_shape(SIDE)
    config = UNetConfig(base_channels=8, channel_multipliers=[1], num_res_blocks=1, z_dim=z_dim, embedding_dim=8)
    network, random = build_unet(config, shape, num_classes), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=random)
    names = [str(label) for label in range(num_classes)] or None
    return TrainedModel(network.eval(), diffusion, autoencoder, shape, SIDE, class_names=names)


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    """A diffusion GAN on pixels, T = 4."""
    return model_of(Diffusion(vp_betas(4)))


@pytest.fixture(params=["pixels", "latents"])
def either(request: pytest.FixtureRequest, model: TrainedModel, tiny_autoencoder) -> TrainedModel:
    """The same, or one on latents half as wide and high."""
    return model if request.param == "pixels" else model_of(model.diffusion, autoencoder=tiny_autoencoder().eval())


def random_images(num_images: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(256, (num_images, 3, height, width), generator=random, dtype=torch.uint8)


def hole(num_images: int) -> Tensor:
    masks = torch.zeros(num_images, 1, SIDE, SIDE, dtype=torch.bool)
    masks[..., 2:5, 3:] = True
    return masks


def difference(a: Tensor, b: Tensor) -> int:
    """The largest, in grey levels: 1 may come from another order of sums."""
    return int((a.int() - b.int()).abs().max())


def samples(model: TrainedModel, seeds: list[int], **conditions) -> Tensor:
    return model.decode(model.sample(seeds, **conditions))


@pytest.mark.parametrize(
    ("strength", "num_steps", "step"),
    [(1, 4, 4), (0.5, 4, 2), (0.51, 4, 3), (0.01, 4, 1), (0.7, 10, 7), (0.3, 1000, 300)],
)
def test_a_strength_is_a_share_of_the_steps(strength: float, num_steps: int, step: int) -> None:
    assert step_of_strength(strength, num_steps) == step


@pytest.mark.parametrize("strength", [0, -0.1, 1.1, float("nan")])
def test_no_other_strength_is_taken(strength: float) -> None:
    with pytest.raises(UserError, match="choose more than 0"):
        step_of_strength(strength, 4)


def test_images_are_encoded_at_their_means(either: TrainedModel) -> None:
    images = random_images(2)
    x_0 = encode_images(either, images)
    if either.autoencoder is None:
        assert torch.equal(to_uint8(x_0), images)
    else:
        assert torch.equal(x_0, either.autoencoder.encode(images.float() / 127.5 - 1).mean)
    assert not x_0.requires_grad


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_an_edit_from_pure_noise_is_the_sample_of_the_seed(method: str) -> None:
    # abar_T = 0 to within 1e-12: nothing is left of the image.
    noise_free = torch.tensor([0.9, 0.5, 1e-12], dtype=torch.float64)
    model, sampler = model_of(Diffusion(betas_of(noise_free))), SamplerConfig(method)
    assert (
        difference(
            edit(model, random_images(2), [3, 4], step=3, sampler=sampler), samples(model, [3, 4], sampler=sampler)
        )
        <= 1
    )
    assert (
        difference(
            edit(model, random_images(2), [3, 4], step=2, sampler=sampler), samples(model, [3, 4], sampler=sampler)
        )
        > 1
    )


def test_an_edit_noises_and_denoises_by_the_posterior(model: TrainedModel) -> None:
    # Step 1 by hand: x_1 ~ q(x_1 | x_0), then the network's x_0 itself.
    images, noise = random_images(1), RandomRows([5], "sample", "cpu").normal
    bar = model.diffusion.alphas_bar[1].item()
    x_1 = bar**0.5 * encode_images(model, images) + (1 - bar) ** 0.5 * noise(model.data_shape)
    expected = to_uint8(model.network(x_1, noise((3,)), torch.tensor([1])))
    assert difference(edit(model, images, [5], step=1), expected) <= 1


@pytest.mark.parametrize("step", [0, 5])
def test_a_step_that_is_not_sampled_is_refused(model: TrainedModel, step: int) -> None:
    with pytest.raises(UserError, match=f"step {step}: the model is sampled in 4"):
        edit(model, random_images(1), [0], step=step)
    with pytest.raises(UserError, match="sampled in 2"):
        edit(model, random_images(1), [0], step=3, sampler=SamplerConfig(num_steps=2))


def test_known_pixels_come_back_and_hidden_ones_have_no_influence(either: TrainedModel) -> None:
    images, masks = random_images(2), hole(2)
    filled = inpaint(either, images, masks, [1, 2], num_resamples=2)
    assert torch.equal(torch.where(masks, 0, filled), torch.where(masks, 0, images))
    assert difference(filled, images) > 1
    others = torch.where(masks, 255 - images, images)
    assert torch.equal(inpaint(either, others, masks, [1, 2], num_resamples=2), filled)
    beside = torch.where(masks, images, 255 - images)
    assert (
        difference(
            torch.where(masks, inpaint(either, beside, masks, [1, 2], num_resamples=2), 0),
            torch.where(masks, filled, 0),
        )
        > 1
    )


def test_a_result_depends_on_its_image_and_seed_alone(either: TrainedModel) -> None:
    images, masks, seeds = random_images(3), hole(3), [7, 8, 9]
    batch = inpaint(either, images, masks, seeds, num_resamples=2), edit(either, images, seeds, step=2)
    for row in range(3):
        one = slice(row, row + 1)
        alone = (
            inpaint(either, images[one], masks[one], seeds[one], num_resamples=2),
            edit(either, images[one], seeds[one], step=2),
        )
        assert max(difference(all_rows[one], single) for all_rows, single in zip(batch, alone)) <= 1


@pytest.mark.parametrize("sampler", [SamplerConfig(), SamplerConfig("ddim")])
def test_with_nothing_known_inpainting_is_sampling(sampler: SamplerConfig) -> None:
    model = model_of(Diffusion(linear_betas(10)), z_dim=0)  # without z no other noise comes between
    everything = torch.ones(2, 1, SIDE, SIDE, dtype=torch.bool)
    filled = inpaint(model, random_images(2), everything, [1, 2], num_resamples=1, sampler=sampler)
    assert difference(filled, samples(model, [1, 2], sampler=sampler)) <= 1


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_samplers_steps_are_those_of_its_loop(eta: float) -> None:
    diffusion, gradient = Diffusion(linear_betas(10)), torch.randn(2, 4)
    process = Process(lambda x_t, t: diffusion.denoised(0.9 * x_t, x_t, t), diffusion, lambda x_t, t: gradient)
    for sampler, expected in (
        (SamplerConfig(), ancestral(process.denoiser, diffusion, noises(), (4,), guidance=process.guidance)),
        (
            SamplerConfig("ddim", eta=eta),
            ddim(process.denoiser, diffusion, noises(), (4,), eta=eta, guidance=process.guidance),
        ),
    ):
        torch.testing.assert_close(ancestral(process.steps(sampler), diffusion, noises(), (4,)), expected)


def noises():
    return RandomRows([1, 2], "test", "cpu").normal


CORRELATION, KNOWN = 0.9, 1.5  # of two standard normal variables, and the value of the first


def conditional(diffusion: Diffusion, num_resamples: int) -> tuple[float, float]:
    """Mean and variance of the second variable, filled in beside the first by an ideal denoiser.

    p(x_0 | x_t) is a Gaussian in closed form, and the denoiser draws from it as a perfect diffusion GAN would.
    """
    num_samples, random = 5_000, torch.Generator().manual_seed(0)
    covariance = torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)

    def noise(shape) -> Tensor:
        return torch.randn(num_samples, *shape, generator=random, dtype=torch.float64)

    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        bar = diffusion.alphas_bar[t[0]]
        gain = bar.sqrt() * covariance @ torch.linalg.inv(bar * covariance + (1 - bar) * torch.eye(2))
        root = torch.linalg.cholesky(covariance - bar.sqrt() * gain @ covariance)
        return diffusion.posterior(x_t @ gain.T + noise((2,)) @ root.T, x_t, t)

    known, mask = torch.full((num_samples, 2), KNOWN, dtype=torch.float64), torch.tensor([[False, True]])
    filled = ancestral(repaint(denoise, diffusion, known, mask, noise, num_resamples), diffusion, noise, (2,))
    assert torch.equal(filled[:, 0], known[:, 0])
    return filled[:, 1].mean().item(), filled[:, 1].var().item()


def test_resampling_leads_to_the_conditional_distribution() -> None:
    diffusion = Diffusion(geometric_betas(32))
    mean, variance = CORRELATION * KNOWN, 1 - CORRELATION**2
    assert conditional(diffusion, num_resamples=20) == pytest.approx((mean, variance), abs=0.04)
    once = conditional(diffusion, num_resamples=1)
    assert abs(once[0] - mean) > 0.3
    assert abs(once[1] - variance) > 0.1


def test_few_steps_see_the_known_part_through_the_noise_of_the_last() -> None:
    # The chain at t = 1 is linear: with n = (1 - abar_1) / abar_1 its mean is c x / (1 + n) = abar_1 c x.
    diffusion = Diffusion(vp_betas(4))
    mean, _ = conditional(diffusion, num_resamples=20)
    assert mean == pytest.approx(diffusion.alphas_bar[1].item() * CORRELATION * KNOWN, abs=0.03)


def test_a_latent_pixel_with_any_masked_pixel_is_made_anew() -> None:
    masks = torch.zeros(1, 1, 4, 8, dtype=torch.bool)
    masks[0, 0, 1, 5] = True
    assert latent_mask(masks, 2).nonzero().tolist() == [[0, 0, 0, 2]]
    assert torch.equal(latent_mask(masks, 1), masks)


def test_known_pixels_grow_over_the_others() -> None:
    images, known = random_images(2), torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    known[0, ..., 2] = True
    full = grown(images, known)
    assert torch.equal(full[0, :, :, 2], images[0, :, :, 2])
    # Beside a single row of pixels, each is the mean of its three neighbours, at the edge of two.
    rows = grown(images[:1], known[:1].transpose(2, 3))[0].float()
    source = torch.nn.functional.pad(images[0, :, 2].float(), (1, 1))
    mean = source.unfold(1, 3, 1).sum(-1) / torch.tensor([2, *[3] * (SIDE - 2), 2])
    assert (rows[:, 1] - mean).abs().max() <= 0.5
    assert torch.equal(full[1], torch.full_like(full[1], 127))


@pytest.mark.parametrize(
    ("columns", "rows", "width", "height"),
    [((0, 8), (0, 8), 9, 8), ((3, 11), (0, 8), 30, 8), ((5, 13), (7, 15), 20, 23), ((4, 25), (1, 14), 30, 15)],
)
def test_windows_fill_the_canvas_and_know_half_of_themselves(columns, rows, width: int, height: int) -> None:
    known = torch.zeros(height, width, dtype=torch.bool)
    known[slice(*rows), slice(*columns)] = True
    for y, x in windows(columns, rows, width, height, SIDE):
        window = known[y : y + SIDE, x : x + SIDE]
        assert window.shape == (SIDE, SIDE)
        assert window.float().mean() >= 0.5
        window[...] = True
    assert known.all()


def test_outpainting_adds_margins_and_leaves_the_image(either: TrainedModel) -> None:
    images, margins = random_images(2), {"left": 5, "right": 2, "top": 1, "bottom": 6}
    wide = outpaint(either, images, [1, 2], num_resamples=1, **margins)
    assert wide.shape == (2, 3, 1 + SIDE + 6, 5 + SIDE + 2)
    assert torch.equal(wide[..., 1 : 1 + SIDE, 5 : 5 + SIDE], images)
    assert difference(outpaint(either, images[1:], [2], num_resamples=1, **margins), wide[1:]) <= 1
    wider = outpaint(either, wide, [1, 2], num_resamples=1, right=3)  # images may be larger than the model's
    assert torch.equal(wider[..., :-3], wide)


def test_slerp_keeps_length_and_ends_exactly() -> None:
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 4000, generator=random)
    fractions = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
    between = slerp(a, b, fractions)
    assert torch.equal(between[0], a[0])
    assert torch.equal(between[-1], b[-1])
    # Of independent noise the variance stays 1; a straight line would have 1/2 in the middle.
    torch.testing.assert_close(between.var(dim=1), torch.ones(5), rtol=0, atol=5 * (2 / 4000) ** 0.5)
    unit_a, unit_b = (torch.nn.functional.normalize(each, dim=1).double() for each in (a, b))
    on_sphere = slerp(unit_a, unit_b, fractions)
    torch.testing.assert_close(on_sphere.norm(dim=1), torch.ones(5, dtype=torch.float64))
    angle = (unit_a * unit_b).sum(dim=1).acos()
    torch.testing.assert_close((unit_a * on_sphere).sum(dim=1).acos()[1:], (fractions * angle)[1:])
    torch.testing.assert_close(slerp(a, a, fractions), a)


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_a_way_between_two_seeds_ends_in_their_samples(either: TrainedModel, method: str) -> None:
    sampler = SamplerConfig(method)
    frames = interpolate(either, 3, 4, 5, along="both", sampler=sampler)
    first, last = samples(either, [3, 4], sampler=sampler)
    assert difference(frames[0], first) <= 1
    assert difference(frames[-1], last) <= 1
    assert min(difference(frames[2], end) for end in (first, last)) > 1
    for along in ("z", "x_T"):
        part = interpolate(either, 3, 4, 3, along=along, sampler=sampler)
        assert difference(part[0], first) <= 1
        assert min(difference(part[-1], end) for end in (first, last)) > 1


def test_the_ends_along_z_and_along_x_are_mixed_samples(model: TrainedModel) -> None:
    # All z of another seed: the end of the way along z. x of another seed: that along x_T.
    along_z, along_x = (interpolate(model, 3, 4, 2, along=along)[-1:] for along in ("z", "x_T"))
    assert difference(along_z, mix_styles(model, [3], [4], switch_step=4)) <= 1
    assert difference(along_x, mix_styles(model, [4], [3], switch_step=4)) <= 1


def test_styles_take_over_at_the_switch(model: TrainedModel) -> None:
    own = samples(model, [1, 2])
    assert difference(mix_styles(model, [1, 2], [8, 9], switch_step=0), own) <= 1
    assert difference(mix_styles(model, [1, 2], [1, 2], switch_step=2), own) <= 1
    assert difference(mix_styles(model, [1, 2], [8, 9], switch_step=4), own) > 1
    drawn: list[Tensor] = []
    model.network.register_forward_pre_hook(lambda module, inputs: drawn.append(inputs[1].clone()))
    model.sample([1, 2]), model.sample([8, 9]), mix_styles(model, [1, 2], [8, 9], switch_step=3)
    model.network._forward_pre_hooks.clear()
    assert torch.equal(drawn[8], drawn[0])  # t = 4
    assert all(torch.equal(mixed, style) for mixed, style in zip(drawn[9:], drawn[5:8]))


def test_labels_reach_edits_and_are_drawn_as_in_sampling() -> None:
    model = model_of(Diffusion(vp_betas(2)), num_classes=3)
    images, masks = random_images(1), hole(1)
    drawn = model.labels([6], None).tolist()
    for make in (
        lambda **labels: edit(model, images, [6], step=2, **labels),
        lambda **labels: inpaint(model, images, masks, [6], num_resamples=1, **labels),
        lambda **labels: outpaint(model, images, [6], right=2, num_resamples=1, **labels),
        lambda **labels: mix_styles(model, [6], [7], switch_step=1, **labels),
    ):
        assert torch.equal(make(), make(labels=drawn))
        assert difference(make(), make(labels=[(drawn[0] + 1) % 3])) > 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: edit(m, random_images(1, 8, 9), [0], step=1), "images of 9 x 8 pixels; the model works on 8 x 8"),
        (
            lambda m: inpaint(m, random_images(1), torch.ones(1, 1, 4, 6, dtype=torch.bool), [0], num_resamples=1),
            "a mask of 6 x 4 pixels for images of 8 x 8; make them the same size",
        ),
        (lambda m: inpaint(m, random_images(1), hole(1), [0], num_resamples=0), "0 resamples; choose 1"),
        (lambda m: outpaint(m, random_images(1), [0], num_resamples=1), "add some"),
        (lambda m: outpaint(m, random_images(1), [0], left=-1, right=3, num_resamples=1), "none below 0"),
        (lambda m: outpaint(m, random_images(1, 7, 9), [0], left=1, num_resamples=1), "needs 8 x 8 or more"),
        (lambda m: interpolate(m, 0, 1, 1, along="z"), "1 frames"),
        (lambda m: mix_styles(m, [0], [1], switch_step=5), "switch_step 5: the model is sampled in 4 steps"),
    ],
)
def test_what_cannot_be_is_said(model: TrainedModel, call, message: str) -> None:
    with pytest.raises(UserError) as error:
        call(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_z_there_is_no_way_along_it() -> None:
    model = model_of(Diffusion(vp_betas(2)), z_dim=0)
    with pytest.raises(UserError, match="the model has no z"):
        interpolate(model, 0, 1, 3, along="z")
    with pytest.raises(UserError, match="the model has no z"):
        mix_styles(model, [0], [1], switch_step=1)
    first, last = samples(model, [0, 1])
    frames = interpolate(model, 0, 1, 3, along="x_T")
    assert difference(frames[0], first) <= 1
    assert difference(frames[-1], last) <= 1
