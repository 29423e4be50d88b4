"""The accuracy on test images without a sibling in training stands beside the accuracy on all."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cvnb.training.predict import accuracy_without_siblings


def rows(groups: list[str], name: str = "group") -> pd.DataFrame: return pd.DataFrame({name: groups})


@pytest.mark.parametrize("name", ["group", "suggested_group"])
def test_images_with_a_sibling_in_training_are_left_out(name):
    test = rows(["a"] * 20 + [f"new{i // 2}" for i in range(18)] + ["", ""], name)
    correct = pd.Series(np.arange(40) < 30)
    found, notes = accuracy_without_siblings(rows(["a", "b", ""], name), test, correct)
    assert (found.n, found.value, found.n_groups) == (20, 0.5, 11)
    kind = "suggested groups" if name == "suggested_group" else "groups"
    assert notes[0].startswith(f"accuracy on the 20 test images without a sibling in training ({kind}): 0.5000")
    assert notes[0].endswith("on the 20 with one: 1.0000")


def test_known_groups_come_before_suggested_ones():
    test = rows(["a", "b", "b"]).assign(suggested_group="s")
    train = rows(["a"]).assign(suggested_group="s")
    assert accuracy_without_siblings(train, test, pd.Series([True, True, False]))[0].n == 2
    empty = test.assign(group="")
    assert "suggested groups" in accuracy_without_siblings(train, empty, pd.Series([True] * 3))[1][0]


def test_without_groups_or_siblings_there_is_no_figure():
    correct = pd.Series([True, False])
    assert accuracy_without_siblings(rows(["a"]), rows(["b", "c"]), correct) == (None, [])
    assert accuracy_without_siblings(rows([""]), rows(["", ""]), correct) == (None, [])
    assert accuracy_without_siblings(pd.DataFrame(), pd.DataFrame(index=[0, 1]), correct) == (None, [])


def test_a_test_of_siblings_alone_is_said():
    found, notes = accuracy_without_siblings(rows(["a"]), rows(["a", "a"]), pd.Series([True, True]))
    assert found is None and notes == ["all 2 test images have a sibling in training (groups), so no accuracy is about "
                                       "images without one"]


def test_few_groups_have_no_interval():
    test = rows(["a", "b", "b", "c", "c"])
    found, notes = accuracy_without_siblings(rows(["a"]), test, pd.Series([True] * 5))
    assert found.n == 4 and np.isnan(found.low) and ": 1.0000 [no interval]; on the 1 with one" in notes[0]
