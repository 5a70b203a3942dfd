"""Held-out rows: exactly the share asked for, the same ones always, and read and named as in the whole data set."""

import pickle
from pathlib import Path

import pytest
import torch
from test_data_dataset import build

from sit_atconv.data.dataset import open_dataset
from sit_atconv.data.part import Part, hold_out
from sit_atconv.errors import InputError


def rows(part: Part) -> list[int]:
    return [part.row(index) for index in range(len(part))]


@pytest.mark.parametrize(("share", "count"), [(0.05, 45), (0.5, 450), (0.9, 811), (1e-6, 1)])
def test_a_share_of_the_rows_is_held_out_and_the_rest_is_left(share: float, count: int) -> None:
    whole = open_dataset("digits:train@8")  # 901 pictures
    rest, held = hold_out(whole, share)
    assert (len(held), len(rest)) == (count, 901 - count)
    assert sorted(rows(rest) + rows(held)) == list(range(901))
    assert rows(held) == sorted(rows(held)) == rows(hold_out(whole, share)[1])
    assert set(rows(held)) <= set(rows(hold_out(whole, 0.95)[1]))
    assert held.fingerprint() == hold_out(whole, share)[1].fingerprint()
    assert len({data.fingerprint() for data in (whole, rest, held)}) == 3


def test_a_part_reads_what_the_whole_reads(tmp_path: Path) -> None:
    whole = open_dataset(build(tmp_path), images=True)
    _, part = hold_out(whole, 0.6)
    assert len(part) == 4 and (part.has_flip, part.has_images, part.class_names) == (True, True, ["a", "b", "c"])
    indices, flips = [3, 0, 2], [True, False, True]
    for each in (part, pickle.loads(pickle.dumps(part))):
        found, expected = (
            data.read(numbers, flips, images=True)
            for data, numbers in ((each, indices), (whole, [part.row(index) for index in indices]))
        )
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert part.where(2) == whole.where(part.row(2))
    (tmp_path / whole.where(part.row(2)).split(" row")[0]).write_bytes(b"x")
    assert len(part.damaged()) == 1


def test_labels_of_many_shards_are_those_of_their_rows(tmp_path: Path) -> None:
    whole = open_dataset(build(tmp_path, counts=(3, 0, 4, 1, 5)))
    order = [12, 0, 7, 3, 2, 6, 3]
    assert whole.read(order, [False] * 7)["label"].tolist() == [index % 3 for index in order]
    with pytest.raises(IndexError):
        whole.read([13], [False])


def test_a_class_whose_pictures_are_all_held_out_is_not_learned(tmp_path: Path) -> None:
    whole = open_dataset(build(tmp_path, counts=(3,)))
    rest, held = hold_out(whole, 0.3)
    assert whole.empty_classes == [] or not list(whole.empty_classes)
    assert rest.empty_classes == rows(held)  # of three pictures each is of its own class
    assert held.empty_classes == rows(rest)


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"share of 0.9 takes 3 of 3 pictures and leaves none to train on"):
        hold_out(open_dataset(build(tmp_path, counts=(3,))), 0.9)
