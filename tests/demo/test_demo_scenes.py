"""The demo's scenes, its questions, and its checkpoints."""

import json
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from reccomp_hf import demo
from reccomp_hf.demo import Scene, SceneObject, checkpoint_folder, draw_scene, questions
from reccomp_hf.demo.scene_questions import every_question, read_question
from reccomp_hf.demo.scenes import CLOSE_UP_SIZE, draw_close_up
from reccomp_hf.demo.stencils import letter_opacity

PINNED_OBJECTS = (
    SceneObject("red", "sign", (11, 0, 26), "Z"),
    SceneObject("yellow", "square", (34, 61, 22)),
)
PINNED_MEAN = (96.03, 89.22, 83.17)  # red, green, blue over all pixels


@pytest.fixture(scope="module")
def scenes() -> dict[int, Scene]:
    return {seed: draw_scene(seed) for seed in demo.EVALUATION_SEEDS[:200]}


# ---- scenes --------------------------------------------------------------------------------------------------------


def test_scene_zero_never_changes():
    scene = draw_scene(0)
    assert scene.objects == PINNED_OBJECTS
    # Pillow's rasteriser and resampler may differ by a grey level between releases, so the pixels are not hashed.
    np.testing.assert_allclose(np.asarray(scene.image).mean(axis=(0, 1)), PINNED_MEAN, atol=0.5)


def test_scene_depends_on_its_seed_alone():
    first = draw_scene(7)
    other = draw_scene(8)
    again = draw_scene(7)
    assert again.objects == first.objects != other.objects
    assert again.image.tobytes() == first.image.tobytes() != other.image.tobytes()


def test_seeds_for_training_evaluation_and_validation_are_disjoint():
    ranges = (demo.TRAIN_SEEDS, demo.EVALUATION_SEEDS, demo.VALIDATION_SEEDS)
    assert all(seeds.step == 1 and len(seeds) > 0 for seeds in ranges)
    for one, other in combinations(ranges, 2):
        assert one.stop <= other.start or other.stop <= one.start


def test_objects_are_distinct_and_inside_the_picture(scenes: dict[int, Scene]):
    for scene in scenes.values():
        plain = [item for item in scene.objects if item.shape != demo.SIGN]
        assert (scene.image.mode, scene.image.size) == ("RGB", (96, 96))
        assert 2 <= len(scene.objects) <= 5
        assert 1 <= len(plain) >= len(scene.objects) - 2
        assert len({item.color for item in scene.objects}) == len(scene.objects)
        assert len({item.shape for item in plain}) == len(plain)
        for item in scene.objects:
            x, y, size = item.box
            assert item.color in demo.COLORS
            assert item.shape in demo.SHAPES
            assert size in ((26, 28, 30) if item.shape == demo.SIGN else (22, 24, 26, 28, 30))
            assert 0 <= x <= 96 - size
            assert 0 <= y <= 96 - size


def test_signs_and_nothing_else_have_letters(scenes: dict[int, Scene]):
    for scene in scenes.values():
        for item in scene.objects:
            assert (item.letter in demo.LETTERS) if item.shape == demo.SIGN else (item.letter is None)


def test_boxes_do_not_overlap(scenes: dict[int, Scene]):
    for scene in scenes.values():
        for one, other in combinations(scene.objects, 2):
            assert not _pixels(one) & _pixels(other)


def test_every_count_color_shape_and_size_occurs(scenes: dict[int, Scene]):
    objects = [item for scene in scenes.values() for item in scene.objects]
    assert {len(scene.objects) for scene in scenes.values()} == {2, 3, 4, 5}
    assert {item.color for item in objects} == set(demo.COLORS)
    assert {item.shape for item in objects} == set(demo.SHAPES)
    assert {item.box[2] for item in objects} == {22, 24, 26, 28, 30}
    assert {item.letter for item in objects} == {None, *demo.LETTERS}
    assert {sum(item.shape == demo.SIGN for item in scene.objects) for scene in scenes.values()} == {0, 1, 2}


def test_an_object_shows_its_color(scenes: dict[int, Scene]):
    """The median over the centres of many objects (a ring has none, a sign a letter) is the named color."""
    seen: dict[str, list[np.ndarray]] = {color: [] for color in demo.COLORS}
    for scene in scenes.values():
        pixels = np.asarray(scene.image, dtype=float)
        for item in scene.objects:
            if item.shape not in ("ring", demo.SIGN):
                x, y, size = item.box
                seen[item.color].append(pixels[y + size // 2, x + size // 2])
    for color, values in seen.items():
        np.testing.assert_allclose(np.median(values, axis=0), demo.COLORS[color], atol=12, err_msg=color)


def test_a_letter_can_be_read_off_the_pixels(scenes: dict[int, Scene]):
    """Of all letters' masks, the one that tells ink from board best is the letter's: nothing covers or blurs it."""
    for scene in scenes.values():
        grey = np.asarray(scene.image.convert("L"), dtype=float)
        for item in scene.objects:
            if item.letter is not None:
                x, y, size = item.box
                board = grey[y : y + size, x : x + size]
                masks = {letter: letter_opacity(letter, size) for letter in demo.LETTERS}
                fits = {name: abs(np.corrcoef(board.ravel(), mask.ravel())[0, 1]) for name, mask in masks.items()}
                assert max(fits, key=fits.__getitem__) == item.letter
                assert fits[item.letter] > 0.8


def test_letters_differ_and_are_large():
    masks = {letter: letter_opacity(letter, 28) > 0.5 for letter in demo.LETTERS}
    for mask in masks.values():
        rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        assert rows[-1] - rows[0] + 1 >= 20
        assert columns[-1] - columns[0] + 1 >= 14
    for one, other in combinations(masks.values(), 2):
        assert (one != other).sum() >= 70


def test_a_close_up_shows_one_object():
    drawn = [draw_close_up(seed) for seed in range(200)]
    assert draw_close_up(3) == drawn[3]
    for scene in drawn:
        (item,) = scene.objects
        x, y, size = item.box
        assert scene.image.size == (CLOSE_UP_SIZE, CLOSE_UP_SIZE)
        assert x >= 0 <= y
        assert max(x, y) + size <= CLOSE_UP_SIZE
        assert (item.letter is not None) == (item.shape == demo.SIGN)
    shapes = Counter(scene.objects[0].shape for scene in drawn)
    assert shapes.keys() == set(demo.SHAPES)
    assert 70 < shapes[demo.SIGN] < 130
    assert {scene.objects[0].color for scene in drawn} == demo.COLORS.keys()


def test_negative_seed_is_refused():
    with pytest.raises(ValueError, match="A seed must be 0 or more, got -1"):
        draw_scene(-1)


# ---- questions -----------------------------------------------------------------------------------------------------


def test_questions_depend_on_scene_and_seed_alone():
    scene = draw_scene(3)
    assert questions(scene, 5) == questions(scene, 5)
    assert len({tuple(questions(scene, seed)) for seed in range(20)}) > 1


def test_every_kind_is_asked_with_every_answer(scenes: dict[int, Scene]):
    answers: dict[str, set[str]] = {kind: set() for kind in demo.QUESTION_KINDS}
    for seed, scene in scenes.items():
        for question in questions(scene, seed):
            answers[question.kind].add(question.answer)
    assert answers == {
        "color": set(demo.COLORS),
        "shape": set(demo.SHAPES),
        "exist": {"yes", "no"},
        "count": {"two", "three", "four", "five"},
        "read": set(demo.LETTERS),
    }


def test_questions_are_worded_and_answered_from_the_objects(scenes: dict[int, Scene]):
    for seed, scene in scenes.items():
        for question in questions(scene, seed):
            expected = {
                "How many objects are there?": ["zero", "one", "two", "three", "four", "five"][len(scene.objects)]
            }
            signs = [item for item in scene.objects if item.shape == demo.SIGN]
            for item in scene.objects:
                if item.shape != demo.SIGN or len(signs) == 1:
                    expected[f"What color is the {item.shape}?"] = item.color
                expected[f"What shape is the {item.color} object?"] = item.shape
            for color in demo.COLORS:
                for shape in demo.SHAPES:
                    found = any((item.color, item.shape) == (color, shape) for item in scene.objects)
                    article = "an" if color == "orange" else "a"
                    expected[f"Is there {article} {color} {shape}?"] = "yes" if found else "no"
            for item in signs:
                expected[f"What letter is on the {item.color} sign?"] = item.letter
            assert question.answer == expected[question.text]
        assert [question.kind for question in questions(scene, seed)] == [
            "color", "shape", "exist", "exist", "count", *(["read"] if signs else []),
        ]  # fmt: skip


def test_every_question_is_asked_once_and_true(scenes: dict[int, Scene]):
    for seed, scene in scenes.items():
        asked = every_question(scene.objects, np.random.default_rng(seed))
        signs = sum(item.shape == demo.SIGN for item in scene.objects)
        alone = len(scene.objects) - (2 if signs == 2 else 0)
        kinds = Counter((question.kind, question.answer == "no") for question in asked)
        count = len(scene.objects)
        assert kinds == +Counter(
            {
                ("color", False): alone,
                ("shape", False): count,
                ("exist", False): count,
                ("exist", True): count,
                ("count", False): 1,
                ("read", False): signs,
            }
        )
        wanted = [item for item in asked if item.answer != "no"]
        assert len({item.text for item in wanted}) == len(wanted)
        for question in wanted:
            if question.object_index is not None:
                item = scene.objects[question.object_index]
                assert question.answer in ("yes", item.color, item.shape, item.letter)


def test_only_a_sign_is_read():
    with pytest.raises(ValueError, match="Only a sign has a letter, but object 1 is a square"):
        read_question(PINNED_OBJECTS, 1)


def test_object_index_names_the_object_asked_about(scenes: dict[int, Scene]):
    for seed, scene in scenes.items():
        for question in questions(scene, seed):
            if question.kind == "count" or question.answer == "no":
                assert question.object_index is None
            else:
                item = scene.objects[question.object_index]
                words = question.text.rstrip("?").split()
                assert item.color in (question.answer, *words)
                assert item.shape in (question.answer, *words)
                assert question.kind != "read" or question.answer == item.letter


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_unknown_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"no demo checkpoint 'lava'. Choose one of: demo, demo-global"):
        checkpoint_folder("lava")


@pytest.mark.parametrize("name", demo.CHECKPOINTS)
def test_checkpoint_loads_completely(name: str):
    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint_folder(name), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.token_recovery is not None
    facts = json.loads((checkpoint_folder(name) / "training.json").read_text())
    start, stop = facts["train_seeds"]
    assert demo.TRAIN_SEEDS.start <= start < stop <= demo.TRAIN_SEEDS.stop
    assert facts["box_supervision"] == (name == "demo")


def _pixels(item: SceneObject) -> set[tuple[int, int]]:
    x, y, size = item.box
    return {(column, row) for column in range(x, x + size) for row in range(y, y + size)}
