"""Weighted prompts: what each syntax says, where an error stands, and what weights, windows and clip skip do to the states."""

import math

import pytest
import torch

import ldm
from ldm.text import encoding
from ldm.text.encoding import encode, parse
from ldm.text.prompt import Blend, Fragment, Passage, PromptError, Swap
from ldm.text.tokenizer import Tokenizer
from ldm.text.windows import lay
from tests.measure import relative_error

PROMPT = "a red cube on top of a blue sphere"


@pytest.fixture(scope="module")
def model(tiny):
    return tiny


def said(text, syntax):
    """Parts as lists of (text, weight)."""
    prompt = parse(text, syntax)
    return [[(f.text, pytest.approx(f.weight)) for f in part.fragments] for part in prompt.parts]


def states(model, text, syntax="compel", **options):
    return encode([parse(text, syntax)], model.tokenizer, model.text_encoder, syntax=syntax, **options).states


# -- What is said ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a red++ cat--", [("a", 1), ("red", 1.21), ("cat", 0.81)]),
        ("(a red cat)1.3", [("a red cat", 1.3)]),
        ("(a (red)1.2 cat)1.5", [("a", 1.5), ("red", 1.8), ("cat", 1.5)]),
        ('a "quoted phrase"- here', [("a", 1), ("quoted phrase", 0.9), ("here", 1)]),
        ("red-haired, 5.5 - c\\+ a.b", [("red-haired, 5.5 - c\\+ a.b", 1)]),
        ("\\(not weighted\\)1.3", [("(not weighted)1.3", 1)]),
        ("(cat) 1.3", [("cat 1.3", 1)]),
        ("hello.attend(1.5) x", [("hello", 1.5), ("x", 1)]),
        ("(cat).5", [("cat", 0.5)]),
        ("[x] {y}", [("[x] {y}", 1)]),
    ],
)
def test_compels_syntax(text, expected):
    assert said(text, "compel") == [expected]


def test_compels_blends_conjunctions_and_swaps():
    (blend,) = parse('("a red+ cat", "dog").blend(0.7, 0.3, no_normalize)', "compel").parts
    cat = Passage((Fragment("a"), Fragment("red", 1.1), Fragment("cat")))
    assert blend == Blend((cat, Passage((Fragment("dog"),))), (0.7, 0.3), normalise=False)
    both = parse('("a cat", dog).and(1, 0.5)', "compel")
    assert both.parts == (Passage((Fragment("a cat"),)), Passage((Fragment("dog"),))) and both.weights == (1.0, 0.5)
    (passage,) = parse("a (black cat).swap(dog, s_start=0.1) sits", "compel").parts
    swap = Swap((Fragment("black cat"),), (Fragment("dog"),), {"s_start": 0.1})
    assert passage.fragments == (Fragment("a"), swap, Fragment("sits"))
    assert [f.text for f in passage.original] == ["a", "black cat", "sits"]
    assert [f.text for f in passage.edited] == ["a", "dog", "sits"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (red) cat", [[("a ", 1), ("red", 1.1), (" cat", 1)]]),
        ("a ((red)) [cat]", [[("a ", 1), ("red", 1.21), (" ", 1), ("cat", 1 / 1.1)]]),
        ("(a (big:2) cat:1.5)!", [[("a ", 1.5), ("big", 3), (" cat", 1.5), ("!", 1)]]),
        ("(x:-0.5) y: z", [[("x", -0.5), (" y: z", 1)]]),
        ("a \\(b\\) \\[c\\] \\\\", [[("a (b) [c] \\", 1)]]),
        ("a  BREAK (b BREAK c:1.2)", [[("a", 1)], [("b", 1.2)], [("c", 1.2)]]),
        ("a BREAK", [[("a", 1)]]),
        ("BREAKFAST and AND1", [[("BREAKFAST and AND1", 1)]]),
        ("", [[("", 1)]]),
    ],
)
def test_a1111s_syntax(text, expected):
    assert said(text, "a1111") == expected


@pytest.mark.parametrize("syntax", encoding.SYNTAXES)
def test_tags_name_loras_in_every_syntax(syntax):
    prompt = parse("a <lora:one:0.8>cat<lora:two> sits <LoRA:a b:-1>", syntax)
    assert prompt.loras == (("one", 0.8), ("two", 1.0), ("a b", -1.0))
    (passage,) = prompt.parts
    assert " ".join(passage.fragments[0].text.split()) == "a cat sits"


def test_compels_own_way_to_name_loras():
    assert parse("withLora(one, 0.5) a cat useLora(two)", "compel").loras == (("one", 0.5), ("two", 1.0))
    assert parse('withLora(one) ("a", "b").and()', "compel").loras == (("one", 1.0),)
    assert parse("((a withLora(one) cat)1.2 b)+", "compel").loras == (("one", 1.0),)
    assert parse('("a withLora(one)", b)', "compel").loras == (("one", 1.0),)


def test_brackets_in_brackets_are_read_in_no_time_and_not_without_end():
    deep = 49
    assert said("(" * deep + "a" + ")" * deep, "compel") == [[("a", 1)]]
    assert said("(" * deep + "a" + ")1.0" * deep, "compel") == [[("a", 1)]]
    with pytest.raises(PromptError, match=r"position 5[12]: brackets stand more than 50 deep in one another"):
        parse("(" * 2000 + "a" + ")" * 2000, "compel")
    assert said("(" * 2000 + "a" + ":1)" * 2000, "a1111") == [[("a", 1)]]


# -- What is wrong, and where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("a (red cat", 3, r"the bracket is not closed; close it, or write \( for a bracket that is text"),
        ("a,b (red cat", 5, "the bracket is not closed"),
        ("a ((red)1.2 cat", 3, "the bracket is not closed"),
        ("a red) cat", 6, r"unexpected ) (no bracket is open); write \) where it is text"),
        ("a red(cat)", 6, "unexpected ( (it stands within a word)"),
        ('a "red cat', 3, "the quotation is not closed"),
        ("a (red = cat)1.2", 8, "'=' cannot stand alone in brackets"),
        ('("a", "b").blend(1, 1) c', 24, "there is text after .blend(...)"),
        ('("a", "b").blend(1)', 11, ".blend has 1 weights for 2 prompts; give each one, or none"),
        ('("a", "b").blend(1, -1)', 11, "the weights of .blend add up to 0"),
        ('("a", "b").blend(x, y)', 11, "'x' is no weight; expected a number"),
        ('("a", "b.swap(c)").blend(1, 1)', 19, ".swap cannot stand in a .blend"),
        ('("a", "b").and(1', 17, ".and is not closed"),
        ("cat.swap(dog, speed=2)", 1, ".swap has option speed; expected numbers for s_start"),
        ("a cat.attend(x)", 14, ".attend cannot be read"),
        ("a withLora(x", 3, "withLora cannot be read; expected withLora(name, coefficient)"),
        ("a <lora:x:much> cat", 3, "<lora:x:much> has coefficient 'much'; expected a number"),
    ],
)
def test_a_mistake_in_compels_syntax_is_named_by_its_position(text, position, expected):
    assert mistake(text, "compel").startswith(f"position {position}: {expected}")


def mistake(text, syntax):
    with pytest.raises(PromptError) as raised:
        parse(text, syntax)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "position", "expected"),
    [
        ("a (red cat", 3, r"the ( is not closed; close it, or write \( for a bracket that is text"),
        ("a [(red) cat", 3, "the [ is not closed"),
        ("a red) cat", 6, r"unexpected ); no ( is open here; write \) where it is text"),
        ("a (red] cat", 7, "unexpected ]; no [ is open here"),
        ("red:1.3) cat", 8, "unexpected ); no ( is open here"),
        ("[red:1.3)", 9, "unexpected ); no ( is open here"),
        ("a [cat:dog:0.5]", 3, "prompts that change between steps"),
        ("a [cat|dog]", 3, "prompts that change between steps"),
        ("a cat AND a dog", 7, "AND, which adds pictures up, is not supported"),
    ],
)
def test_a_mistake_in_a1111s_syntax_is_named_by_its_position(text, position, expected):
    assert mistake(text, "a1111").startswith(f"position {position}: {expected}")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt_syntax": "compel"}, r"prompt 'a \(cat', position 3: the bracket is not closed"),
        ({"prompt_syntax": "A1111"}, r"prompt 'a \(cat', position 3: the \( is not closed"),
        ({"prompt_syntax": "compel", "negative_prompt": "b)"}, r"negative prompt 'b\)', position 2: unexpected \)"),
        ({"prompt_syntax": "wildcards"}, "prompt_syntax 'wildcards'; expected one of plain, compel, a1111"),
        ({"long_prompt": "all"}, "long_prompt 'all'; expected one of cut, windows, sentences, commas"),
        ({"clip_skip": 0}, "clip_skip 0; expected a whole number from 1 up"),
        ({"clip_skip": 3}, "clip_skip 3; the text encoder has 2 layers, so expected 1 to 2"),
        (
            {"prompt_syntax": "compel", "negative_prompt": "cat.swap(dog)"},
            "negative prompt .* has a .swap, which the pipelines",
        ),
    ],
)
def test_a_pipeline_names_the_prompt_and_the_position(model, fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        ldm.txt2img(model, "a (cat", steps=1, **fields)


# -- What becomes of the states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", encoding.SYNTAXES)
def test_a_prompt_without_weights_has_the_states_it_always_had(model, syntax):
    expected = model.text_encoder(model.tokenizer(PROMPT).ids)
    assert torch.equal(states(model, PROMPT, syntax), expected)


def test_a_weight_above_1_moves_the_states_away_from_the_empty_texts(model):
    plain, empty = states(model, PROMPT), states(model, "")
    weighted = states(model, "a red cube on top of a (blue)1.5 sphere")
    at = 1 + PROMPT.split().index("blue")
    expected = plain.clone()
    expected[:, at] = empty[:, at] + 1.5 * (plain[:, at] - empty[:, at])
    assert relative_error(weighted, expected) < 1e-12
    unweighted = [i for i in range(77) if i != at]
    assert relative_error(weighted[:, unweighted], plain[:, unweighted]) < 1e-14


def test_a_weight_below_1_blends_in_the_states_without_the_words(model):
    ids = model.tokenizer(PROMPT).ids
    empty, plain = states(model, ""), states(model, PROMPT)
    at = 1 + PROMPT.split().index("blue")
    mask = torch.ones(1, 77, dtype=torch.bool)
    mask[0, at] = False
    without = model.text_encoder(ids, mask)
    moved = [s.clone() for s in (plain, without)]
    for s in moved:
        s[:, at] = empty[:, at] + 0.8 * (s[:, at] - empty[:, at])
    share = math.tan(0.2 * math.pi / 2)
    assert (
        relative_error(states(model, "a red cube on top of a (blue)0.8 sphere"), (moved[0] + share * moved[1]) / (1 + share))
        < 1e-12
    )


def test_a_weight_of_0_leaves_nothing_of_the_word_but_its_place(model):
    gone, other = states(model, "a (red)0 cube"), states(model, "a (green)0 cube")
    assert relative_error(gone, other) < 1e-4
    assert relative_error(states(model, "a red cube"), states(model, "a green cube")) > 1e-2


def test_a_masked_word_is_seen_by_nobody(model):
    one, other = (model.tokenizer(text).ids for text in ("a red cube", "a green cube"))
    mask = torch.ones(1, 77, dtype=torch.bool)
    mask[0, 2] = False
    a, b = model.text_encoder(one, mask), model.text_encoder(other, mask)
    assert torch.equal(a[:, 3:], b[:, 3:]) and not torch.equal(a[:, 2], b[:, 2])
    assert relative_error(model.text_encoder(one, torch.ones(1, 77, dtype=torch.bool)), model.text_encoder(one)) < 1e-12


def test_a1111s_weights_multiply_the_states_and_keep_their_mean(model):
    plain = states(model, PROMPT, "a1111")
    scaled = plain.clone()
    scaled[:, 1 + PROMPT.split().index("blue")] *= 1.3
    expected = scaled * (plain.mean() / scaled.mean())
    assert relative_error(states(model, "a red cube on top of a (blue:1.3) sphere", "a1111"), expected) < 1e-12


def test_a_blend_is_the_weighted_sum(model):
    cat, dog = states(model, "a cat"), states(model, "a dog")
    assert relative_error(states(model, '("a cat", "a dog").blend(3, 1)'), 0.75 * cat + 0.25 * dog) < 1e-12
    assert relative_error(states(model, '("a cat", "a dog").blend(3, 1, no_normalize)'), 3 * cat + dog) < 1e-12


def test_a_conjunction_puts_contexts_one_after_another(model):
    empty, cat, dog = states(model, ""), states(model, "a cat"), states(model, "a dog")
    expected = torch.cat([cat, empty + 0.5 * (dog - empty)], dim=1)
    assert relative_error(states(model, '("a cat", "a dog").and(1, 0.5)'), expected) < 1e-12


def test_shorter_contexts_are_filled_with_windows_of_the_empty_text(model):
    made = encode(
        [parse(text, "compel") for text in ('("a", "b").and()', "c")], model.tokenizer, model.text_encoder, syntax="compel"
    )
    assert made.states.shape == (2, 154, 32)
    assert relative_error(made.states[1:], torch.cat([states(model, "c"), states(model, "")], dim=1)) < 1e-12


def test_clip_skip_stops_before_the_last_layers_and_norms_all_the_same(model):
    encoder, ids = model.text_encoder, model.tokenizer(PROMPT).ids
    x = encoder.token_embedding(ids) + encoder.position_embedding.weight
    expected = encoder.final_norm(encoder.layers[0](x, causal=True))
    assert torch.equal(states(model, PROMPT, "plain", clip_skip=2), expected)
    assert not torch.equal(states(model, PROMPT, "plain", clip_skip=1), expected)


def test_clip_skip_is_for_both_prompts(model):
    made = [ldm.txt2img(model, PROMPT, negative_prompt="dull", steps=1, seed=1, width=16, height=16, decode=False, **fields)
            for fields in ({}, {"clip_skip": 2}, {"clip_skip": 2, "guidance_scale": 0.0}, {"guidance_scale": 0.0})]  # fmt: skip
    latents = [result.latents for result in made]
    assert not torch.equal(latents[0], latents[1]) and not torch.equal(latents[2], latents[3])
    assert [result.receipts[0]["clip_skip"] for result in made] == [1, 2, 2, 1]


# -- Windows -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.clip()


def windows(tokenizer, text, long_prompt):
    """How many tokens each window holds."""
    laid = lay(tokenizer, [Fragment(text)], long_prompt)
    rows = torch.tensor(laid.ids).unflatten(0, (-1, 77))
    assert (rows[:, 0] == tokenizer.start).all() and (rows[:, -1] == tokenizer.end).all()
    return [(row != tokenizer.end).sum().item() - 1 for row in rows]


@pytest.mark.parametrize(
    ("text", "long_prompt", "expected"),
    [
        ("word " * 75, "windows", [75]),
        ("word " * 76, "windows", [75, 1]),
        ("word " * 160, "windows", [75, 75, 10]),
        ("word " * 160, "cut", [75]),
        ("word " * 40 + ". " + "word " * 40, "sentences", [41, 40]),
        ("word " * 40 + ", " + "word " * 40, "sentences", [41, 40]),
        ("word " * 40 + ". " + "word " * 20 + ", " + "word " * 20, "sentences", [41, 41]),
        ("word " * 80, "sentences", [75, 5]),
        ("word " * 74 + "incomprehensibilities " * 2, "sentences", [74, 10]),
        ("word " * 60 + ", " + "word " * 20, "commas", [61, 20]),
        ("word " * 50 + ", " + "word " * 40, "commas", [75, 16]),
        ("word " * 54 + ", " + "word " * 40, "commas", [75, 20]),
        ("word " * 55 + ", " + "word " * 40, "commas", [56, 40]),
        ("word " * 74 + ", " + "word " * 40, "commas", [75, 40]),
        ("word " * 75 + ", " + "word " * 40, "commas", [75, 41]),
        ("", "windows", [0]),
    ],
)
def test_long_texts_are_divided(tokenizer, text, long_prompt, expected):
    if "incompre" in text:
        syllables = len(tokenizer.tokens("incomprehensibilities")[1])
        expected = [74, 2 * syllables]
    assert windows(tokenizer, text, long_prompt) == expected


def test_windows_put_together_are_the_whole_text(tokenizer):
    text = "One two, three; four. " * 30
    ids = [token.id for token in tokenizer.tokens(text)[1]]
    for long_prompt in ("windows", "sentences", "commas"):
        laid = lay(tokenizer, [Fragment(text)], long_prompt)
        assert [i for i in laid.ids if i not in (tokenizer.start, tokenizer.end)] == ids and laid.cut_off == ""


def test_windows_are_encoded_each_by_itself(model):
    text = "word " * 75 + "a red cube"
    expected = torch.cat([states(model, "word " * 75), states(model, "a red cube")], dim=1)
    assert relative_error(states(model, text, "plain", long_prompt="windows"), expected) < 1e-12


def test_what_does_not_fit_is_told_over_all_fragments(model):
    made = encode(
        [parse("word " * 74 + "(red cube)1.2 on a sphere", "compel")], model.tokenizer, model.text_encoder, syntax="compel"
    )
    assert made.cut_off == ("cube on a sphere",) and made.states.shape[1] == 77


def test_a_long_prompt_makes_a_picture_of_all_of_it(model):
    long = "word " * 80 + "cube"
    settings = {"steps": 1, "seed": 1, "width": 16, "height": 16, "decode": False}
    cut, whole = (ldm.txt2img(model, long, long_prompt=how, **settings) for how in ("cut", "windows"))
    assert cut.receipts[0]["cut_off"] == "word word word word word cube" and whole.receipts[0]["cut_off"] == ""
    assert not torch.equal(cut.latents, whole.latents)
    again = ldm.txt2img(model, long, long_prompt="windows", **settings)
    assert torch.equal(again.latents, whole.latents)
