"""Scenes: what is drawn is what is said, nothing is hidden, and the renderer's rays end where the solids are."""

import itertools
import math

import numpy as np
import pytest
import torch

from ldm.scenes import render, world
from ldm.scenes.captions import RELATIONS, Statement, confused, grammar_words, holds, opposite, plain, state, words
from ldm.scenes.judge import labels, verdicts
from ldm.scenes.world import COLOURS, LAYOUTS, ROLES, SHAPES, SIZES, Scene, Solid, draw, is_held_out, neighbours

SCENES = [draw(5, i) for i in range(300)]


# -- The world -----------------------------------------------------------------------------------------------------------


def test_a_scene_is_a_function_of_seed_and_index():
    assert draw(3, 17) == draw(3, 17)
    assert len({draw(3, i) for i in range(50)} | {draw(4, i) for i in range(50)}) == 100


def test_every_layout_colour_shape_and_size_is_drawn():
    assert {scene.layout for scene in SCENES} == set(LAYOUTS)
    solids = [solid for scene in SCENES for solid in scene.solids]
    for field, known in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES)):
        assert {getattr(solid, field) for solid in solids} == set(known)


def test_no_scene_to_train_on_is_held_out_and_every_held_out_one_is():
    def contents(scene):
        return tuple(noun[1:] for noun in scene.nouns)

    assert not any(is_held_out(scene.layout, contents(scene)) for scene in SCENES)
    held_out = [draw(5, i, split="held_out") for i in range(100)]
    assert all(is_held_out(scene.layout, contents(scene)) for scene in held_out)
    both = [is_held_out(scene.layout, contents(scene)) for scene in (draw(5, i, split="any") for i in range(300))]
    assert 0 < sum(both) < 300


@pytest.mark.parametrize("role", range(len(ROLES)), ids=ROLES)
def test_one_colour_in_eight_is_held_out_for_every_shape_and_role(role):
    layout = ("side by side", "stacked", "in depth")[role // 2]
    for shape in SHAPES:
        alone = [is_held_out(layout, pair) for pair in pairs_with(role % 2, shape)]
        # Of each colour: held out with every partner or, because of the partner alone, with some.
        always = [all(alone[i : i + 32]) for i in range(0, len(alone), 32)]
        assert sum(always) == 1


def pairs_with(place, shape):
    """Every pair in which the solid at `place` has this shape: its colour is the slowest index."""
    partners = list(itertools.product(COLOURS, SHAPES))
    for colour in COLOURS:
        for partner in partners:
            yield ((colour, shape), partner) if place == 0 else (partner, (colour, shape))


def test_a_red_cube_on_a_blue_sphere_may_be_trained_on():
    assert not is_held_out("stacked", (("blue", "sphere"), ("red", "cube")))


def test_a_split_that_is_none_is_refused():
    with pytest.raises(ValueError, match="split 'test'; expected one of train, held_out, any"):
        draw(0, 0, split="test")


def test_solids_do_not_stand_in_one_another():
    for scene in SCENES:
        for i, j in itertools.combinations(range(len(scene.solids)), 2):
            a, b = scene.solids[i], scene.solids[j]
            apart = np.array(b.centre) - np.array(a.centre)
            heights = sum(solid.radius * SHAPES[solid.shape][1] for solid in (a, b))
            stacked = abs(apart[1]) >= heights - 0.15 * max(a.radius, b.radius)
            beside = math.hypot(apart[0], apart[2]) >= a.radius + b.radius
            assert stacked or beside, scene


def test_neighbours_are_where_their_layout_says():
    for scene in SCENES:
        for i, j, axis in neighbours(scene.layout):
            apart = np.array(scene.solids[j].centre) - np.array(scene.solids[i].centre)
            assert apart[axis] > 0 and apart[axis] == max(abs(apart)), scene


def test_every_solid_is_in_the_picture_and_mostly_seen():
    for scene in SCENES[:80]:
        whole = visible(scene)
        for k, solid in enumerate(scene.solids):
            alone = visible(with_solids(scene, [solid]))[0]
            share = whole[k] / alone
            assert share > 0.45, (scene, k, share)
            edge = borders(with_solids(scene, [solid]))
            assert edge < 0.02 * alone, (scene, k, edge, alone)


def with_solids(scene, solids):
    return Scene(**{**scene.__dict__, "solids": tuple(solids)})


def hits(scene, size=64):
    """Which solid each ray meets first, (size, size), -1 for none."""
    origin, direction = render._camera([scene], size, 1, torch.device("cpu"))
    nearest = []
    for solid in scene.solids:
        depth, _, _ = render._Solids([with_solids(scene, [solid])], torch.device("cpu")).first_hit(origin, direction)
        nearest.append(depth[0])
    depth, which = torch.stack(nearest).min(0)
    return torch.where(depth < render.FAR, which, -1).view(size, size)


def visible(scene):
    found = hits(scene)
    return [int((found == k).sum()) for k in range(len(scene.solids))]


def borders(scene):
    found = hits(scene) >= 0
    return int(found[0].sum() + found[-1].sum() + found[:, 0].sum() + found[:, -1].sum())


# -- The renderer --------------------------------------------------------------------------------------------------------


def distance(solid: Solid, point: torch.Tensor) -> torch.Tensor:
    """A bound on how far points (n, 3) are from a solid, 0 or less inside: for a search along the ray, independent of the
    renderer's formulas."""
    x, y, z = (point - torch.tensor(solid.centre, dtype=point.dtype)).T
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    x, z = c * x - s * z, s * x + c * z
    width, height = (solid.radius * part for part in SHAPES[solid.shape])
    if solid.shape == "sphere":
        return (x * x + y * y + z * z).sqrt() - width
    if solid.shape == "cube":
        return torch.stack([x.abs(), y.abs(), z.abs()]).amax(0) - width
    across = torch.hypot(x, z)
    if solid.shape == "cylinder":
        return torch.maximum(across - width, y.abs() - height)
    slope = width / (2 * height)  # cone: under the mantle and over the base
    return torch.maximum((across - slope * (height - y)) / math.hypot(1, slope), -height - y)


@pytest.mark.parametrize("shape", SHAPES)
def test_rays_end_where_a_search_along_them_finds_the_solid(shape):
    solid = Solid(colour="red", shape=shape, size="large", centre=(0.1, 0.5, -0.2), yaw=0.4)
    scene = Scene(
        layout="alone", solids=(solid,), target=(0.0, 0.4, 0.0), distance=4.0, turn=0.1, light=0.5, floor=(0.4, 0.4, 0.4)
    )
    origin, direction = render._camera([scene], 48, 1, torch.device("cpu"))
    near, normal, _ = render._Solids([scene], torch.device("cpu")).first_hit(origin, direction)
    start, rays = origin[:, 0, 0].double(), direction[:, 0].T.double()
    t = torch.zeros(len(rays), dtype=torch.float64)
    for _ in range(4000):
        t = t + distance(solid, start + t[:, None] * rays).clamp(min=0) * 0.7
    found = distance(solid, start + t[:, None] * rays) < 1e-6
    touching = near[0] < render.FAR
    assert (found != touching).float().mean() < 0.003  # a ray that grazes may be told either way
    both = found & touching
    assert both.sum() > 200
    assert (near[0][both].double() - t[both]).abs().max() < 1e-3

    # The normal is the direction in which the distance grows fastest.
    point = start + t[both][:, None] * rays[both]
    step = 1e-5
    slope = torch.stack(
        [distance(solid, point + step * axis) - distance(solid, point - step * axis) for axis in torch.eye(3)], 1
    )
    slope = slope / slope.norm(dim=1, keepdim=True)
    agreement = (slope * normal[:, 0].T[both].double()).sum(1)
    assert (agreement > 0.999).float().mean() > 0.97  # but for points on an edge


def test_a_batch_of_scenes_is_rendered_as_each_alone():
    together = render.render(SCENES[:20], 32)
    assert together.dtype == torch.uint8 and together.shape == (20, 3, 32, 32)
    for i in (0, 7, 19):
        assert torch.equal(render.render(SCENES[i : i + 1], 32)[0], together[i])


def test_colours_are_those_of_the_table():
    for colour, rgb in COLOURS.items():
        solid = Solid(colour=colour, shape="sphere", size="large", centre=(0.0, 0.63, 0.0))
        scene = Scene(
            layout="alone", solids=(solid,), target=(0.0, 0.63, 0.0), distance=4.0, turn=0.0, light=0.4, floor=(0.4, 0.4, 0.4)
        )
        middle = render.render([scene], 64)[0, :, 36:44, 26:38].float().mean((1, 2)) / 255
        brightness = middle.mean() / np.mean(rgb)
        assert 0.6 < brightness < 1.3
        assert (middle / middle.sum() - torch.tensor(rgb) / sum(rgb)).abs().max() < 0.06


def test_a_mirrored_scene_looks_like_the_flipped_picture():
    for scene in SCENES[:40]:
        turned = world.mirrored(scene)
        pair = render.render([scene, turned], 64).float()
        assert (pair[0].flip(-1) - pair[1]).abs().mean() < 1.0  # of 255: the lamp's points differ a little
        assert world.mirrored(turned) == scene


def test_the_shadow_falls_away_from_the_lamp():
    solid = Solid(colour="white", shape="sphere", size="medium", centre=(0.0, 0.5, 0.0))
    for light, dark_side in ((math.radians(60), "left"), (math.radians(-60), "right")):
        scene = Scene(
            layout="alone", solids=(solid,), target=(0.0, 0.5, 0.0), distance=5.0, turn=0.0, light=light, floor=(0.4, 0.4, 0.4)
        )
        image = render.render([scene], 64).float().mean(1)[0]
        left, right = image[30:46, 4:16].mean(), image[30:46, 48:60].mean()
        assert (left < right - 4) == (dark_side == "left")


# -- Captions ------------------------------------------------------------------------------------------------------------


def test_what_is_stated_holds_and_what_is_confused_does_not():
    rng = np.random.default_rng(0)
    for scene in SCENES:
        statement = state(scene, rng)
        assert holds(statement, scene.layout, scene.nouns)
        assert not holds(confused(statement, scene, rng), scene.layout, scene.nouns)


def test_the_opposite_is_false_and_its_opposite_is_the_statement_again():
    rng, found = np.random.default_rng(1), 0
    for scene in SCENES:
        statement = state(scene, rng)
        turned = opposite(statement)
        if turned is None:
            assert not statement.relations or "next to" in words(statement)
            continue
        found += 1
        assert not holds(turned, scene.layout, scene.nouns)
        assert turned.nouns == statement.nouns and opposite(turned) == statement
    assert found > len(SCENES) / 2


def test_a_third_of_what_is_confused_tells_left_from_right():
    """Nothing else in a batch does: of two solids beside each other, the rest is told by other pictures' captions."""
    rng, told, count = np.random.default_rng(4), 0, 0
    for scene in SCENES:
        if scene.layout == "side by side":
            statement = state(scene, rng)
            wrong = confused(statement, scene, rng)
            count += 1
            told += wrong.relations != statement.relations and {name for _, name, _ in wrong.relations} <= set(RELATIONS[0])
            told += wrong.nouns == statement.nouns[::-1]
    assert count > 20 and told > count / 3


def test_a_confused_statement_is_never_one_that_is_held_out():
    rng = np.random.default_rng(1)
    for scene in SCENES[:150]:
        wrong = confused(state(scene, rng), scene, rng)
        for i, name, j in wrong.relations:
            for axis, (lower, higher) in enumerate(RELATIONS):
                if name in (lower, higher):
                    low, high = (i, j) if name == lower else (j, i)
                    layout = ("side by side", "stacked", "in depth")[axis]
                    assert not is_held_out(layout, (wrong.nouns[low][1:], wrong.nouns[high][1:]))


def test_captions_are_made_of_the_grammars_words():
    rng, known = np.random.default_rng(2), set(grammar_words())
    for scene in SCENES:
        text = words(state(scene, rng), rng)
        assert set(text.replace(",", " ,").split()) <= known, text


def test_the_plainest_words_of_a_pair():
    cube_on_sphere = Statement(nouns=((None, "red", "cube"), (None, "blue", "sphere")), relations=((0, "on top of", 1),))
    assert words(cube_on_sphere) == "a red cube on top of a blue sphere"
    orange = Statement(nouns=((None, "orange", "cone"), ("small", "orange", "cone")), relations=((0, "behind", 1),))
    assert words(orange) == "an orange cone behind a small orange cone"


@pytest.mark.parametrize(("axis", "layout"), list(enumerate(("side by side", "stacked", "in depth"))))
def test_each_relation_holds_one_way_round_only(axis, layout):
    low, high = (None, "red", "cube"), (None, "blue", "sphere")
    lower, higher = RELATIONS[axis]
    said = {
        (first, name): holds(Statement(nouns=nouns, relations=((0, name, 1),)), layout, (low, high))
        for first, nouns in (("low", (low, high)), ("high", (high, low)))
        for pair in RELATIONS
        for name in pair
    }
    assert {key for key, true in said.items() if true} == {("low", lower), ("high", higher)}


def test_next_to_is_either_side():
    low, high = (None, "red", "cube"), (None, "blue", "sphere")
    for nouns in ((low, high), (high, low)):
        statement = Statement(nouns=nouns, relations=((0, "next to", 1),))
        assert holds(statement, "side by side", (low, high))
        assert not holds(statement, "stacked", (low, high))


def test_a_statement_says_all_that_is_there():
    cube = (None, "red", "cube")
    assert holds(Statement(nouns=(cube,), relations=()), "alone", (cube,))
    assert not holds(Statement(nouns=(cube,), relations=()), "stacked", (cube, cube))


def test_sizes_count_where_they_are_said():
    statement = Statement(nouns=(("small", "red", "cube"),), relations=())
    assert holds(statement, "alone", (("small", "red", "cube"),))
    assert not holds(statement, "alone", (("large", "red", "cube"),))


def test_a_plain_statement_names_the_pair_from_either_side():
    rng = np.random.default_rng(3)
    pairs = [draw(9, i, layouts=("stacked",)) for i in range(30)]
    found = {plain(scene, rng).relations[0][1] for scene in pairs}
    assert found == {"on top of", "under"}
    assert all(holds(plain(scene, rng), scene.layout, scene.nouns) for scene in pairs)


# -- The judge's terms ---------------------------------------------------------------------------------------------------


def test_verdicts_say_back_what_labels_wrote():
    scenes = SCENES[:60]
    layouts, colours, shapes = labels(scenes)

    def perfect(pictures):
        sure = [
            torch.nn.functional.one_hot(part.clamp(min=0), n).float() for part, n in ((layouts, 11), (colours, 8), (shapes, 4))
        ]
        return tuple(sure)

    said = verdicts(perfect, torch.zeros(60, 3, 64, 64))
    assert said == [(scene.layout, tuple((None, *noun[1:]) for noun in scene.nouns)) for scene in scenes]
