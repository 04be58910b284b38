import torch

from tokenshuffle_core.data.emoji.build import read_manifest
from tokenshuffle_core.data.emoji.pictures import composite, load_rgba
from tokenshuffle_core.evaluation.retrieval import (
    choose,
    features,
    nearest_first,
    reconstruction_psnr,
)


def test_a_picture_is_nearest_to_itself_and_to_its_noisy_copy():
    pictures = torch.rand(20, 3, 64, 64)
    noisy = (pictures + 0.1 * torch.randn_like(pictures)).clamp(0, 1)
    order = nearest_first(features(noisy), features(pictures))
    assert torch.equal(order[:, 0], torch.arange(20))
    assert all(sorted(row) == list(range(20)) for row in order.tolist())


def test_features_are_block_means():
    picture = torch.rand(1, 3, 128, 128)
    expected = picture.view(1, 3, 32, 4, 32, 4).mean((3, 5)).flatten(1)
    torch.testing.assert_close(features(picture), expected)


def test_choose_is_seeded_and_stays_in_its_split(data):
    records = read_manifest(data)
    assert len(choose(records, "train", None, 0)) == 8
    chosen = choose(records, "train", 5, 1)
    assert chosen == choose(records, "train", 5, 1) != choose(records, "train", 5, 2)
    assert {record["split"] for record in chosen} == {"train"}


def test_psnr_is_the_formula(pipeline, data):
    records = read_manifest(data)[:2]
    rgba = load_rgba(data, records)
    images = composite(rgba, torch.full((2, 3), 255, dtype=torch.uint8))
    decoded = pipeline.decode(pipeline.encode(images.movedim(1, -1))).movedim(-1, 1)
    expected = [
        10 * torch.log10(1 / (a - b).square().mean()) for a, b in zip(images, decoded, strict=True)
    ]
    found = reconstruction_psnr(pipeline, data, records)
    torch.testing.assert_close(torch.tensor(found), torch.stack(expected).mean())
