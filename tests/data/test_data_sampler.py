"""Training order is a pure function of (seed, position): whoever asks, and from wherever, sees the same samples."""

import itertools

import numpy as np
import pytest
import torch

from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.sampler import index_at, step_positions, training_loader
from sit_atconv.errors import InputError


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits:heldout@8", images=True)


def take(dataset, batches: int, **options) -> list[dict]:
    return list(itertools.islice(training_loader(dataset, **{"batch_size": 12, "seed": 1, **options}), batches))


@pytest.mark.parametrize("length", [1, 7, 100])
def test_every_sample_once_an_epoch_and_epochs_differ(length):
    epochs = [[index_at(p, length, 5) for p in range(e * length, (e + 1) * length)] for e in range(3)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length == 100:
        assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [index_at(p, length, 6) for p in range(length)]


def test_positions_of_all_processes_cover_a_step_once():
    for world_size, micro_batches in itertools.product((1, 2, 3), (1, 2)):
        for step in (0, 4):
            split = {"batch_size": 12, "micro_batches": micro_batches, "world_size": world_size}
            seen = [
                position
                for micro_batch in range(micro_batches)
                for rank in range(world_size)
                for position in step_positions(step, micro_batch, rank, **split)
            ]
            assert seen == list(range(12 * step, 12 * (step + 1)))


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3)])
def test_processes_together_see_what_one_sees(digits, world_size, micro_batches):
    """Over an epoch's end: 896 samples, 80 steps of 12."""
    steps = 80
    alone = torch.cat([batch["index"] for batch in take(digits, steps)])
    shares = [
        take(digits, steps * micro_batches, micro_batches=micro_batches, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [shares[rank][i]["index"] for i in range(steps * micro_batches) for rank in range(world_size)]
    assert torch.equal(torch.cat(together), alone)
    assert alone.tolist() == [index_at(position, len(digits), 1) for position in range(steps * 12)]
    assert sorted(alone[: len(digits)].tolist()) == list(range(len(digits)))


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_continues_bit_for_bit(digits, workers):
    options = {"flip": True, "images": True, "micro_batches": 2}
    whole = take(digits, 8, **options)
    resumed = take(digits, 4, start_step=2, workers=workers, **options)
    for expected, batch in zip(whole[4:], resumed, strict=True):
        assert expected.keys() == batch.keys() == {"position", "index", "moments", "label", "image"}
        assert all(torch.equal(expected[key], batch[key]) for key in batch)


def test_batches_hold_what_they_say(digits):
    (batch,) = take(digits, 1, images=True)
    assert batch["position"].tolist() == list(range(12))
    assert batch["moments"].shape == (12, 2, 8, 8) and batch["image"].shape == (12, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8 and batch["label"].dtype == torch.int64
    single = digits.read([int(batch["index"][5])], [False], images=True)
    assert all(torch.equal(single[key][0], batch[key][5]) for key in single)


def test_flips_belong_to_positions(digits):
    plain, mirrored = take(digits, 40, images=True), take(digits, 40, flip=True, images=True)
    rows = [(a["moments"][i], b["moments"][i]) for a, b in zip(plain, mirrored, strict=True) for i in range(12)]
    flipped = [torch.equal(a.flip(-1), b) and not torch.equal(a, b) for a, b in rows]
    assert all(torch.equal(b, a.flip(-1) if flip else a) for (a, b), flip in zip(rows, flipped, strict=True))
    assert 0.4 < np.mean(flipped) < 0.6
    halves = take(digits, 80, flip=True, images=True, batch_size=6)
    for whole, first, second in zip(mirrored, halves[::2], halves[1::2], strict=True):
        for key in whole:
            assert torch.equal(whole[key], torch.cat([first[key], second[key]]))


def test_image_and_latent_are_mirrored_together(digits):
    batch = digits.read([3, 3], [False, True], images=True)
    assert torch.equal(batch["image"][0].flip(-1), batch["image"][1])
    assert torch.equal(batch["moments"][0].flip(-1), batch["moments"][1])


def test_nothing_is_read_for_teachers_after_their_last_step(digits):
    batches = take(digits, 8, images=True, taught_steps=3, start_step=1, micro_batches=2)
    assert ["image" in batch for batch in batches] == [True] * 4 + [False] * 4


@pytest.mark.parametrize(("batch_size", "micro_batches", "world_size"), [(12, 5, 1), (12, 2, 4), (0, 1, 1)])
def test_batches_that_do_not_divide(digits, batch_size, micro_batches, world_size):
    with pytest.raises(InputError, match="choose a multiple of"):
        training_loader(digits, batch_size=batch_size, micro_batches=micro_batches, world_size=world_size, seed=0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_row_arrives_as_one_sentence(workers):
    damaged = open_dataset("digits:heldout@8")
    damaged._mean[:] = float("nan")
    with pytest.raises(InputError) as caught:
        take(damaged, 1, workers=workers)
    assert str(caught.value).endswith("the latent holds NaN or infinity.") and "Traceback" not in str(caught.value)
