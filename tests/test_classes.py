"""What a label may be, which class a word names, and which class of one side is which of another."""

import numpy as np
import pytest
import torch

from sit_atconv.classes import MAX_LABEL, Classes, read_labels
from sit_atconv.errors import InputError

ANIMALS = Classes(3, ["ant", "bee", "cat"])
TENS = Classes(3, ["1", "10", "2"])  # sorted as folders are: class 1 is named "10", class 2 is named "2"


@pytest.mark.parametrize(
    ("values", "numbers", "names"),
    [
        ([2, 0, 1], [2, 0, 1], None),
        ([np.int8(2), torch.tensor(0), 1.0], [2, 0, 1], None),
        (np.array([2, 0, 1], np.uint16), [2, 0, 1], None),
        (np.array([[2], [0], [1]]), [2, 0, 1], None),
        (np.eye(3, dtype=np.uint8)[[2, 0, 1]], [2, 0, 1], None),
        (np.eye(3)[[2, 0, 1]], [2, 0, 1], None),
        (["cat", "ant", "bee"], [2, 0, 1], ["ant", "bee", "cat"]),
        (np.array(["cat", "ant", "bee"]), [2, 0, 1], ["ant", "bee", "cat"]),
        (np.array([b"cat", b"ant", b"bee"]), [2, 0, 1], ["ant", "bee", "cat"]),
        (["10", "2", "10"], [0, 1, 0], ["10", "2"]),
        ([], [], None),
    ],
)
def test_labels_are_whole_numbers_or_names(values, numbers, names) -> None:
    found, found_names = read_labels(values, "x")
    assert (found.tolist(), found_names, found.dtype) == (numbers, names, np.int64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 1.7], "row 1 is 1.7"),
        ([0, -1], "row 1 is -1"),
        (np.array([0, -1]), "row 1 is -1"),
        ([0, MAX_LABEL + 1], f"row 1 is {MAX_LABEL + 1}"),
        ([0, 10**30], "row 1 is 1000"),
        ([0, None], "row 1 is missing"),
        ([0, float("nan")], "row 1 is nan"),
        ([0, [1]], r"row 1 is \[1\]"),
        ([0, {"id": 1}], "row 1 is {'id'"),
        ([0, True], "row 1 is True"),
        ([0, "cat"], "row 1 is 'cat'"),
        (["cat", ""], "row 1 is ''"),
        (["cat", None], "row 1 is missing"),
        (np.array([[1, 1], [0, 1]]), "row 0 is no one-hot label"),
        (np.zeros((2, 2, 2)), "has shape"),
        (np.array([True, False]), "row 0 is True"),
    ],
)
def test_anything_else_is_refused_with_its_row(values, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_labels(values, "x")
    assert "--unconditional" in str(error.value)


def test_listed_names_number_the_classes() -> None:
    assert read_labels(["b", "a"], "x", ["b", "a", "c"])[0].tolist() == [0, 1]
    with pytest.raises(InputError, match="only 2 classes are named"):
        read_labels([0, 2], "x", ["a", "b"])
    with pytest.raises(InputError, match="row 1 is 'd', which is no class"):
        read_labels(["a", "d"], "x", ["a", "b"])


@pytest.mark.parametrize(
    ("classes", "label", "number"),
    [
        (ANIMALS, "bee", 1),
        (ANIMALS, "1", 1),
        (ANIMALS, 1, 1),
        (ANIMALS, np.int64(1), 1),
        (ANIMALS, torch.tensor(1), 1),
        (ANIMALS, "name:bee", 1),
        (ANIMALS, "number:1", 1),
        (TENS, "10", 1),  # no class has the number 10
        (TENS, "2", 2),  # the class named 2 has the number 2
        (TENS, "0", 0),  # no class has the name 0
        (TENS, "name:1", 0),
        (TENS, "number:1", 1),
        (TENS, 1, 1),  # a number is never a name
        (Classes(2, ["name:a", "b"]), "name:a", 0),
        (Classes(20, ["a"]), "7", 7),
    ],
)
def test_a_class_is_found_by_name_or_number(classes: Classes, label, number: int) -> None:
    assert classes.find(label) == number


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (TENS, "1", "Which is meant. Write name:1 or number:1"),
        (ANIMALS, "dog", "Unknown label 'dog'"),
        (ANIMALS, "3", "Unknown label '3'"),
        (ANIMALS, 3, "Unknown label '3'"),
        (ANIMALS, -1, "Unknown label '-1'"),
        (ANIMALS, True, "Unknown label 'True'"),
        (ANIMALS, 1.5, "Unknown label '1.5'"),
        (ANIMALS, "name:1", "Unknown label"),
        (ANIMALS, "", "Unknown label ''"),
        (ANIMALS, "²", "Unknown label"),
        (ANIMALS, "9" * 5000, "Unknown label '999"),
        (Classes(3, ["ant", "bee"], empty=[2]), "2", "Class 2 had no picture in training.*Learned are ant, bee"),
    ],
)
def test_a_class_that_is_unknown_or_unclear_is_refused(classes: Classes, label, message: str) -> None:
    with pytest.raises(InputError, match=message):
        classes.find(label)


def test_lists_of_classes_are_read_as_csv() -> None:
    fish = Classes(3, ["tench, Tinca tinca", "dog", "a,b"])
    assert fish.find_all('dog, "tench, Tinca tinca",number:0') == [1, 0, 0]
    assert fish.find_all("tench, Tinca tinca") == [0]
    for words in ("tench, dog", "1,,2", "", '"dog', "dog\n1"):
        with pytest.raises(InputError, match="label"):
            fish.find_all(words)
    with pytest.raises(InputError, match="Which is meant"):
        Classes(3, ["a", "b", "a,b"]).find_all("a,b")


def test_classes_are_compared_by_name_where_both_have_names_and_else_by_number() -> None:
    assert ANIMALS.numbers_in(Classes(2, ["cat", "ant"])) == [1, None, 0]
    assert ANIMALS.numbers_in(Classes(2)) == [0, 1, None]
    assert Classes(4, ["ant"]).numbers_in(ANIMALS) == [0, None, None, None]  # room for classes to come


def test_titles() -> None:
    room = Classes(12, ["ant"], empty=[11])
    assert room.titles(range(12)) == "ant, 1, 2, 3, 4, 5, 6, 7 and 4 more"
    assert room.learned == list(range(11))
