"""Held-out scenes stay out of training data."""

from collections.abc import Callable

import pytest

from vlm.data.records import Records, scene_captions, scene_conversations
from vlm.data.scenes.scene import TEST_START, TOWER_START, VALIDATION_START
from vlm.errors import UserError


@pytest.mark.parametrize("make", [scene_captions, scene_conversations])
@pytest.mark.parametrize(
    ("start", "count"),
    [(0, VALIDATION_START + 1), (VALIDATION_START - 1, 2), (TEST_START, 1), (TOWER_START - 1, 5)],
)
def test_training_data_that_reaches_held_out_scenes_is_refused(
    make: Callable[[int, int], Records], start: int, count: int
) -> None:
    with pytest.raises(UserError, match=rf"training scenes {start} to {start + count - 1}.* held out.*Lower start"):
        make(start, count)


@pytest.mark.parametrize(("start", "count"), [(0, VALIDATION_START), (VALIDATION_START - 1, 1), (TOWER_START, 10**9)])
def test_training_data_may_reach_up_to_them_and_go_on_behind(start: int, count: int) -> None:
    assert len(scene_captions(start, count)) == count
