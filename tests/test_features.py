"""What is computed once and kept equals what is computed anew: the tower's features and the teacher's answers."""

import pytest
import torch

from distill.features import TowerFeatures
from distill.merge import project
from distill.probe import find_positions
from distill.teacher.live import Teacher
from distill.teacher.signals import Batch
from tests.tiny import random_model
from vlm.data.records import load_image
from vlm.manifest import Preprocessing
from vlm.preprocess import pixel_values

IMAGE = 299
RED, BLUE, GREEN = "scenes:1", "scenes:2", "scenes:3"


def test_kept_features_equal_fresh_ones_in_any_order() -> None:
    model = random_model(300, IMAGE)
    kept, fresh = (TowerFeatures(model, Preprocessing(size=96), keep) for keep in (2, 0))
    kept([RED, BLUE])
    kept([GREEN])
    assert set(kept.kept) == {RED, BLUE} and not fresh.kept
    wanted = [BLUE, GREEN, RED, BLUE]
    torch.testing.assert_close(kept(wanted), torch.cat([fresh([image]) for image in wanted]), rtol=1e-3, atol=1e-3)


def test_features_are_those_of_the_layer_the_projector_reads_without_cls() -> None:
    model = random_model(300, IMAGE)
    features = TowerFeatures(model, Preprocessing(size=96), 0)
    assert features([]).shape == (0, 576, 32) and features([]).device == model.device
    pixels = torch.from_numpy(pixel_values(load_image(RED), features.preprocessing))  # [1, 3, 96, 96]
    with torch.no_grad():
        found = model.model.multi_modal_projector(features([RED]))  # [1, V, D]
        expected = model.model.get_image_features(pixels, vision_feature_layer=model.config.vision_feature_layer)
    torch.testing.assert_close(found[0], expected.pooler_output[0], rtol=1e-2, atol=1e-2)


def test_another_type_is_computed_in_by_a_copy() -> None:
    model = random_model(300, IMAGE)
    features = TowerFeatures(model, Preprocessing(size=96), 0)
    expected, own = features([RED]), features.tower
    with features.computing(torch.device("cpu"), torch.bfloat16):
        assert features.tower.dtype == torch.bfloat16 and own.dtype == torch.float32
        found = features([RED])
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    with features.computing(torch.device("cpu"), torch.float32):
        assert features.tower is own
    assert features.tower is own is model.model.vision_tower


def test_the_teacher_projects_the_images_of_a_batch_once() -> None:
    teacher = Teacher(random_model(300, IMAGE), 0)
    calls: list[int] = []
    teacher.model.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.full((1, 150), IMAGE)
    ids[0, 144:] = 5
    shape = torch.arange(150)[None], torch.ones(1, 150, dtype=torch.long)
    for image in (RED, BLUE):
        features = TowerFeatures(teacher.model, Preprocessing(size=96), 0)([image])
        batch = Batch(ids, *shape, None, [image], features, [("s", 0)])
        tokens = teacher.vision_tokens(batch)
        teacher.attention(batch, [0], find_positions(ids, shape[1], None, IMAGE))
        teacher.answers(batch, ids != IMAGE)
        assert torch.equal(tokens, project(teacher.model, features))
    assert len(calls) == 2 + 2  # and the two of the line above


@pytest.mark.parametrize("keep", [0, 2, 10])
def test_kept_answers_equal_fresh_ones_also_when_only_some_are_known(
    keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.randint(0, IMAGE, (3, 9), generator=torch.Generator().manual_seed(0))
    answers = torch.zeros(3, 9, dtype=torch.bool)
    for sample, (start, end) in enumerate([(2, 5), (4, 9), (1, 2)]):
        answers[sample, start:end] = True
    teacher = Teacher(random_model(300, IMAGE), keep)
    calls = []
    plain = Teacher._states
    monkeypatch.setattr(Teacher, "_states", lambda self, batch: calls.append(batch) or plain(self, batch))

    def read(*samples: int, stage: str = "s") -> torch.Tensor:
        chosen = list(samples)
        positions, segments = torch.arange(9).expand(len(chosen), 9), torch.ones(len(chosen), 9, dtype=torch.long)
        keys = [(stage, i) for i in samples]
        batch = Batch(ids[chosen], positions, segments, None, [], torch.zeros(0, 576, 32), keys)
        hidden = teacher.answers(batch, answers[chosen])
        return hidden.head(hidden.states)

    with torch.no_grad():
        fresh = teacher.model(input_ids=ids, use_cache=False).logits  # [3, 9, vocabulary]
    for samples in ((0, 1), (1, 2), (2, 0), (1, 0)):
        expected = torch.cat([fresh[i][answers[i]] for i in samples])
        torch.testing.assert_close(read(*samples), expected, rtol=1e-2, atol=1e-2)
        assert len(teacher.kept) <= keep
    assert len(calls) == {0: 4, 2: 3, 10: 2}[keep]  # with 2 kept, (1, 0) needs nothing; with 10, (2, 0) neither
    before = len(calls)
    read(0, stage="another")
    assert len(calls) == before + 1  # the same index of another stage is another record
