"""Whether samples are nearest to images of their own prompt: numbers in closed form, and by chance."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from data_prep.shards import ShardWriter
from ldgan.engine.cli import UserError
from ldgan.evaluation.collecting import FeatureSet
from ldgan.evaluation.text_metrics import agreement, prompts_of_captions, read_captions, text_results
from ldgan.metrics.frechet import FeatureStatistics


def feature_set(features: torch.Tensor, numbers: list[int]) -> FeatureSet:
    statistics = FeatureStatistics(features.shape[1])
    statistics.add(features)
    return FeatureSet(statistics.fit(), features, None, torch.tensor(numbers), len(features))


def test_ranks_of_points_on_a_line_are_counted_by_hand() -> None:
    images, captions = torch.tensor([[0.0], [1.0], [2.0], [4.0]]), torch.tensor([0, 1, 1, 2])
    points, wanted = torch.tensor([[0.25], [3.0], [1.5]]), torch.tensor([0, 0, 1])
    # Distances to captions 0, 1, 2: (0.25, 0.75, 3.75), (3, 1, 1), (1.5, 0.5, 2.5).
    result = agreement(points, wanted, images, captions, seed=0)
    shares = [1.0, 0.0, 1.0]
    assert result.mean_rank_share == pytest.approx(2 / 3)
    assert result.share == pytest.approx(2 / 3)  # whichever other caption is drawn
    std = math.sqrt(sum((share - 2 / 3) ** 2 for share in shares) / 2)
    assert result.share_std_error == result.mean_rank_share_std_error == pytest.approx(std / math.sqrt(3))
    assert result.num_points == 3
    tied = agreement(torch.tensor([[3.0]]), torch.tensor([2]), images, captions, seed=0)
    assert tied.mean_rank_share == pytest.approx((1 + 0.5) / 2)  # 0 is farther, 1 as far


def test_by_chance_it_is_a_half_and_images_themselves_are_all_right() -> None:
    random = torch.Generator().manual_seed(0)
    images, captions = torch.randn(40, 5, generator=random), torch.arange(40)
    points = torch.randn(3000, 5, generator=random)
    result = agreement(points, torch.randint(40, (3000,), generator=random), images, captions, seed=1)
    assert abs(result.share - 0.5) < 4 * result.share_std_error
    assert abs(result.mean_rank_share - 0.5) < 4 * result.mean_rank_share_std_error
    assert result.share_std_error == pytest.approx(0.5 / math.sqrt(3000), rel=0.01)
    assert result.mean_rank_share_std_error < 0.7 * result.share_std_error  # uniform ranks: 1 / sqrt(12) for 1 / 2
    assert agreement(images, captions, images, captions, seed=1).share == 1.0
    again = agreement(points[:300], torch.zeros(300, dtype=torch.int64), images, captions, seed=2)
    assert again == agreement(points[:300], torch.zeros(300, dtype=torch.int64), images, captions, seed=2)


def test_samples_have_prompts_in_turn_and_real_images_are_left_out_of_their_own_comparison() -> None:
    captions = ["cat", "", "dog", "cat", "eel"]
    assert prompts_of_captions(captions) == ["cat", "dog", "eel"]
    reference = feature_set(torch.tensor([[0.0], [9.0], [5.0], [2.0], [6.0]]), [0, 1, 2, 3, 4])
    samples = feature_set(torch.tensor([[0.1], [5.1], [5.9], [5.6]]), [0, 1, 2, 3])  # cat, dog, eel, cat
    result = text_results(captions, samples, reference, seed=0)
    assert result["samples"]["mean_rank_share"] == pytest.approx((1 + 1 + 1 + 0) / 4)
    # Both cats are 2 from the other one, and farther from dogs and eels.
    assert result["real_images"]["share"] == 1.0
    assert result["real_images"]["num_points"] == 2
    assert (result["num_prompts"], result["num_images"]) == (3, 4)
    alone = text_results(["cat", "dog", "eel"], samples, feature_set(torch.tensor([[0.0], [5.0], [6.0]]), [0, 1, 2]), 0)
    assert alone["real_images"] is None


def test_captions_come_from_image_shards(tmp_path: Path) -> None:
    def shards(name: str, captions: list[str], kind: str = "images") -> Path:
        with ShardWriter(tmp_path / name, kind) as writer:
            for caption in captions:
                writer.write({"png": b""} | ({"txt": caption.encode()} if caption else {}))
        return tmp_path / name

    assert read_captions(shards("a", ["cat", "", " dog\n"]), None) == ["cat", "", "dog"]
    with pytest.raises(UserError, match="compares images of different captions"):
        read_captions(tmp_path / "a", 2)
    with pytest.raises(UserError, match="--metrics text needs captions"):
        read_captions(shards("b", ["", ""]), None)
    with pytest.raises(UserError, match="--metrics text needs captions"):
        read_captions(shards("c", ["cat", "dog"], "latents"), None)
