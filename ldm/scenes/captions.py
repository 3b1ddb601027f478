"""Captions of scenes, from a small grammar, and whether a caption is true of a scene.

    caption   = [lead] noun | [lead] noun relation noun [", and " noun relation "the " noun] | [lead] noun " and " noun
    noun      = article [size] colour shape
    relation  = "on top of" | "under" | "left of" | "right of" | "in front of" | "behind" | "next to"

with synonyms for every word. What a caption says is a `Statement`; `words` puts it into words, `holds` checks it, and
`confused` makes one that is almost true: the hard negative that a text encoder must learn to tell from the true one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations

import numpy as np

from ldm.scenes.world import COLOURS, SHAPES, SIZES, Noun, Scene, is_held_out, neighbours

Relation = tuple[int, str, int]  # the nouns at these places stand in this relation

# What the first of a pair is to the second, by axis: at the lower coordinate, at the higher one.
RELATIONS = (("left of", "right of"), ("under", "on top of"), ("behind", "in front of"))
BESIDE = "next to"
SYNONYMS = {
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
    "sphere": ("sphere", "sphere", "sphere", "ball"),
    "cube": ("cube", "cube", "cube", "box"),
    "cylinder": ("cylinder",),
    "cone": ("cone",),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "under": ("under", "below", "underneath"),
    "on top of": ("on top of", "on top of", "on"),
    "behind": ("behind",),
    "in front of": ("in front of",),
    BESIDE: ("next to", "beside"),
}
LEADS = ("", "", "", "", "a picture of ", "a photo of ", "an image of ")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a caption says: there are these, and no others, in these relations. `relations` may be empty."""

    nouns: tuple[Noun, ...]
    relations: tuple[Relation, ...]


def state(scene: Scene, rng: np.random.Generator) -> Statement:
    """Something true of the scene: all its solids, in a random order, some sizes, and how each is placed."""
    says_size = [s.size != "medium" and rng.random() < 0.6 for s in scene.solids]
    nouns = [(s.size if says else None, s.colour, s.shape) for s, says in zip(scene.solids, says_size, strict=True)]
    pairs = neighbours(scene.layout)
    if not pairs:
        return Statement(nouns=tuple(nouns), relations=())
    pairs = [pairs[k] for k in rng.permutation(len(pairs))]
    relations = [_relation(*pair, turned=rng.random() < 0.5, beside=rng.random() < 0.2) for pair in pairs]
    if len(pairs) == 2:  # the second relation is told from its own solid to the one both have in common
        (hub,) = {*pairs[0][:2]} & {*pairs[1][:2]}
        relations[1] = _relation(*pairs[1], turned=pairs[1][0] == hub, beside=relations[1][1] == BESIDE)
    order = list(dict.fromkeys(k for i, _, j in relations for k in (i, j)))
    if len(pairs) == 1 and rng.random() < 0.06:
        return Statement(nouns=tuple(nouns[k] for k in order), relations=())
    place = {k: n for n, k in enumerate(order)}
    return Statement(
        nouns=tuple(nouns[k] for k in order), relations=tuple((place[i], name, place[j]) for i, name, j in relations)
    )


def plain(scene: Scene, rng: np.random.Generator) -> Statement:
    """The scene's solids without sizes; of two, how the one is to the other, from either side, never just "next to"."""
    nouns = tuple((None, colour, shape) for _, colour, shape in scene.nouns)
    if len(nouns) == 1:
        return Statement(nouns=nouns, relations=())
    ((i, j, axis),) = neighbours(scene.layout)
    turned = rng.random() < 0.5
    first, second = (j, i) if turned else (i, j)
    return Statement(nouns=(nouns[first], nouns[second]), relations=((0, RELATIONS[axis][turned], 1),))


def _relation(i: int, j: int, axis: int, *, turned: bool, beside: bool) -> Relation:
    name = BESIDE if beside and axis == 0 else RELATIONS[axis][turned]
    return (j, name, i) if turned else (i, name, j)


def words(statement: Statement, rng: np.random.Generator | None = None) -> str:
    """The statement as a caption: with synonyms drawn from `rng`, or without in the plainest words."""
    say = lambda word: word if rng is None else SYNONYMS[word][rng.integers(len(SYNONYMS[word]))]  # noqa: E731

    def name(noun: Noun, article: str | None = None) -> str:
        size, colour, shape = noun
        parts = [say(size)] if size else []
        parts += [say(colour) if colour in SYNONYMS else colour, say(shape)]
        return " ".join([article or ("an" if parts[0][0] in "aeiou" else "a"), *parts])

    lead = "" if rng is None else LEADS[rng.integers(len(LEADS))]
    if not statement.relations:
        return lead + " and ".join(map(name, statement.nouns))
    (i, relation, j), *more = statement.relations
    text = f"{name(statement.nouns[i])} {say(relation)} {name(statement.nouns[j])}"
    for i, relation, j in more:
        text += f", and {name(statement.nouns[i])} {say(relation)} {name(statement.nouns[j], 'the')}"
    return lead + text


def holds(statement: Statement, layout: str, nouns: tuple[Noun, ...]) -> bool:
    """Whether the statement is true of what stands in these places: its nouns are all that is there, in its relations."""
    return len(statement.nouns) == len(nouns) and any(
        all((chosen[i], name, chosen[j]) in facts(layout) for i, name, j in statement.relations)
        for chosen in permutations(range(len(nouns)))
        if all(_is(noun, nouns[k]) for noun, k in zip(statement.nouns, chosen, strict=True))
    )


def _is(noun: Noun, found: Noun) -> bool:
    return noun[1:] == found[1:] and noun[0] in (None, found[0])


@lru_cache
def facts(layout: str) -> frozenset[Relation]:
    """Every relation between the places of a layout."""
    found = set()
    for i, j, axis in neighbours(layout):
        lower, higher = RELATIONS[axis]
        found |= {(i, lower, j), (j, higher, i)} | ({(i, BESIDE, j), (j, BESIDE, i)} if axis == 0 else set())
    return frozenset(found)


def confused(statement: Statement, scene: Scene, rng: np.random.Generator) -> Statement:
    """A statement that is nearly the given one and not true of the scene: colours, shapes or places exchanged, the
    opposite relation or another, another colour or shape. Never one that is held out."""
    for _ in range(100):
        candidate = _changes(statement, rng)
        if not holds(candidate, scene.layout, scene.nouns) and not _says_held_out(candidate):
            return candidate
    raise AssertionError(f"nothing false was found near {words(statement)!r}")


def opposite(statement: Statement) -> Statement | None:
    """The statement with every relation turned round: false wherever it was true. None if it says "next to" or no relation."""
    if not statement.relations or any(name == BESIDE for _, name, _ in statement.relations):
        return None
    turned = {a: b for pair in RELATIONS for a, b in (pair, pair[::-1])}
    return replace(statement, relations=tuple((i, turned[name], j) for i, name, j in statement.relations))


# How often each way to make a statement false is tried. A batch holds few pictures of the same contents, so that these alone
# teach who stands where; most of them are about that.
CHANGES = {"colours": 0.12, "shapes": 0.08, "places": 0.25, "opposite": 0.3, "relation": 0.08, "colour": 0.1, "shape": 0.07}


def _changes(statement: Statement, rng: np.random.Generator) -> Statement:
    nouns = list(statement.nouns)
    k = int(rng.integers(len(nouns)))
    change = rng.choice(list(CHANGES), p=list(CHANGES.values()))
    size, colour, shape = nouns[k]
    if len(nouns) > 1 and change in ("colours", "shapes", "places"):
        other = int((k + rng.integers(1, len(nouns))) % len(nouns))
        other_size, other_colour, other_shape = nouns[other]
        nouns[k], nouns[other] = {
            "colours": ((size, other_colour, shape), (other_size, colour, other_shape)),
            "shapes": ((size, colour, other_shape), (other_size, other_colour, shape)),
            "places": (nouns[other], nouns[k]),
        }[change]
        return replace(statement, nouns=tuple(nouns))
    if change == "opposite" and (turned := opposite(statement)):
        return turned
    if statement.relations and change == "relation":
        r = int(rng.integers(len(statement.relations)))
        i, _, j = statement.relations[r]
        name = rng.choice([name for pair in RELATIONS for name in pair])
        relations = (*statement.relations[:r], (i, str(name), j), *statement.relations[r + 1 :])
        return replace(statement, relations=relations)
    if change == "shape":
        shape = str(rng.choice(list(SHAPES)))
    else:
        colour = str(rng.choice(list(COLOURS)))
    nouns[k] = (size, colour, shape)
    return replace(statement, nouns=tuple(nouns))


def _says_held_out(statement: Statement) -> bool:
    """Whether one of the relations, taken alone, is a pair that is held out."""
    for i, name, j in statement.relations:
        for axis, names in enumerate(RELATIONS):
            if name in names or (name == BESIDE and axis == 0):
                low, high = (j, i) if name == names[1] else (i, j)
                pair = (statement.nouns[low][1:], statement.nouns[high][1:])
                if is_held_out(("side by side", "stacked", "in depth")[axis], pair):
                    return True
    return False


def grammar_words() -> Sequence[str]:
    """Every word that a caption can hold, for a vocabulary cut to them."""
    sentences = [*COLOURS, *SHAPES, *SIZES, *LEADS, "a an the and ,", BESIDE, *(name for pair in RELATIONS for name in pair)]
    sentences += [word for synonyms in SYNONYMS.values() for word in synonyms]
    return sorted({word for sentence in sentences for word in sentence.split()})
