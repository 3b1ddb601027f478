"""Weighted prompts against the compel package: the same tree of the same prompt, the same states from the same weights."""

from types import SimpleNamespace

import pytest

import ldm
from ldm.text.encoding import encode, parse
from ldm.text.prompt import Blend, PromptError, Swap
from tests.measure import relative_error
from tests.prompts import compel_prompt

pytestmark = pytest.mark.reference
TOLERANCE = 1e-5  # of states whose largest is about 5; rounding leaves about 4e-7
WRITTEN = [
    "",
    "a red cube on top of a blue sphere",
    "a red++ cube on top of a blue-- sphere",
    "a (red cube)1.5 on (top of (a blue sphere)0.7)1.2",
    "a (red)0.3 (cube)0.6 on a sphere, (blurry)0",
    '("a red cube", "a blue sphere").blend(0.7, 0.3)',
    '("a red+ cube", "a (blue)0.4 sphere", "noise").blend(0.7, -0.3, 1, no_normalize)',
    '("a red cube", "a blue- sphere").and(1, 0.5)',
    "a cube.swap(sphere) sitting",
    "a (red)-",
]
# compel's own faults: an empty fragment below 1 is added to None, an empty conjunction has no first prompt.
FAULTS = (TypeError, IndexError)


@pytest.fixture(scope="module")
def ours(tiny_diffusers):
    return ldm.load(tiny_diffusers)


@pytest.fixture(scope="module")
def theirs(tiny_diffusers):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(tiny_diffusers, safety_checker=None)


def compel(pipeline, long_prompt="cut", clip_skip=1):
    from compel import Compel
    from compel.embeddings_provider import ReturnedEmbeddingsType, SplitLongTextMode

    layer = {1: "LAST_HIDDEN_STATES_NORMALIZED", 2: "PENULTIMATE_HIDDEN_STATES_NORMALIZED"}[clip_skip]
    encoder = pipeline.text_encoder
    encoder.text_model = SimpleNamespace(final_layer_norm=encoder.final_layer_norm)  # where transformers 4 had it
    return Compel(
        tokenizer=pipeline.tokenizer,
        text_encoder=encoder,
        truncate_long_prompts=long_prompt == "cut",
        split_long_text_mode=SplitLongTextMode.BRUTAL if long_prompt == "windows" else SplitLongTextMode.SENTENCES,
        returned_embeddings_type=ReturnedEmbeddingsType[layer],
    )


def error(ours, peer, text, **options):
    states = encode([parse(text, "compel")], ours.tokenizer, ours.text_encoder, syntax="compel", **options).states
    return relative_error(states, peer(text))


@pytest.mark.parametrize("clip_skip", [1, 2])
@pytest.mark.parametrize("text", WRITTEN)
def test_written_prompts(ours, theirs, text, clip_skip):
    assert error(ours, compel(theirs, clip_skip=clip_skip), text, clip_skip=clip_skip) < TOLERANCE


@pytest.mark.parametrize("long_prompt", ["cut", "windows", "sentences"])
@pytest.mark.parametrize("length", [6, 40])
def test_generated_prompts(ours, theirs, long_prompt, length):
    """Of 40 parts a prompt has two or three windows."""
    peer, errors = compel(theirs, long_prompt), {}
    for seed in range(40):
        text = compel_prompt(1000 * length + seed, length)
        try:
            expected = peer(text)
        except FAULTS:
            continue
        states = encode([parse(text, "compel")], ours.tokenizer, ours.text_encoder, syntax="compel", long_prompt=long_prompt)
        errors[text] = relative_error(states.states, expected)
    worst = max(errors, key=errors.get)
    print(f"{long_prompt}, {length} parts, {len(errors)} prompts: states {errors[worst]:.1e} (tolerance {TOLERANCE:.0e})")
    assert len(errors) > 30 and errors[worst] < TOLERANCE, worst


def test_prompts_together_are_filled_up_alike(ours, theirs):
    texts = ['("a red cube", "a blue sphere").and()', "a (cone)1.2", "word " * 100]
    found = encode(
        [parse(t, "compel") for t in texts], ours.tokenizer, ours.text_encoder, syntax="compel", long_prompt="windows"
    )
    assert relative_error(found.states, compel(theirs, "windows")(texts)) < TOLERANCE


def test_the_trees_of_generated_prompts_are_compels():
    from compel.prompt_parser import PromptParser

    parser, same = PromptParser(), 0
    for seed in range(1500):
        text = compel_prompt(seed)
        expected = tree_of_compel(parser.parse_conjunction(text))
        if expected[0]:
            assert tree(parse(text, "compel")) == expected, text
            same += 1
    assert same > 1400


@pytest.mark.parametrize("text", ["a (cat", "a cat)", 'a "cat', "cat(1)", "(a = b)1.2", '("a", "b").foo(1)', "(a b, c).and()"])
def test_what_compel_takes_for_plain_text_and_we_refuse(text):
    """It weights nothing there, without a word."""
    from compel.prompt_parser import PromptParser

    (flat,) = PromptParser().parse_conjunction(text).prompts
    assert {fragment.weight for fragment in flat.children} == {1.0}
    with pytest.raises(PromptError, match="position"):
        parse(text, "compel")


def tree(prompt):
    def leaf(f):
        return (list(map(leaf, f.original)), list(map(leaf, f.edited))) if isinstance(f, Swap) else (f.text, f.weight)

    def part(p):
        if isinstance(p, Blend):
            return [part(passage) for passage in p.passages], list(p.weights), p.normalise
        return [leaf(f) for f in p.fragments]

    return [part(p) for p in prompt.parts], list(prompt.weights), list(prompt.loras)


def tree_of_compel(conjunction):
    from compel.prompt_parser import Blend, CrossAttentionControlSubstitute

    def leaf(f):
        if isinstance(f, CrossAttentionControlSubstitute):
            return list(map(leaf, f.original)), list(map(leaf, f.edited))
        return f.text, f.weight

    def part(p):
        if isinstance(p, Blend):
            return [part(passage) for passage in p.prompts], list(p.weights), p.normalize_weights
        return [leaf(f) for f in p.children]

    loras = [(lora.model, lora.weight) for lora in conjunction.lora_weights]
    return [part(p) for p in conjunction.prompts], list(conjunction.weights), loras
