"""The tokenizer: exact ids in both styles, and what it says about what it cut off."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.text.tokenizer import Tokenizer
from tests import openai_tokenizer

# Texts on which cleaning, splitting or merging are known to go wrong, mixed into otherwise arbitrary unicode.
TEXTS = st.lists(st.one_of(st.sampled_from(openai_tokenizer.PIECES), st.text(max_size=6)), max_size=40).map("".join)
THOUSANDS = settings(max_examples=3000, deadline=None)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.clip()


def padded(ids: list[int]) -> list[int]:
    """Between the marks, cut to 75 and padded with end marks, as Stable Diffusion does."""
    row = [49406, *ids[:75], 49407]
    return row + [49407] * (77 - len(row))


# -- Against the originals


@pytest.mark.reference
def test_ids_are_those_of_transformers_on_arbitrary_unicode(tokenizer, vocabulary_folder):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(vocabulary_folder, model_max_length=77)

    @THOUSANDS
    @given(TEXTS)
    def check(text):
        expected = theirs(text, padding="max_length", truncation=True).input_ids
        assert tokenizer(text).ids[0].tolist() == expected

    check()


@pytest.mark.reference
def test_ids_are_those_of_openai_on_arbitrary_unicode():
    theirs, ours = openai_tokenizer.load(), Tokenizer.clip(style="openai")
    if theirs is None:
        pytest.skip("needs OpenAI's code: pip install --no-deps clip-anytorch")

    @THOUSANDS
    @given(TEXTS)
    def check(text):
        assert ours(text).ids[0].tolist() == padded(theirs.encode(text))

    check()


# -- By itself


def test_a_prompt_becomes_the_published_ids(tokenizer):
    ids = tokenizer("a photograph of an astronaut riding a horse").ids
    assert ids.shape == (1, 77) and ids.dtype == torch.int64
    assert ids[0].tolist() == padded([320, 8853, 539, 550, 18376, 6765, 320, 4558])


def test_the_empty_prompt_is_two_marks_and_padding(tokenizer):
    assert tokenizer("").ids[0].tolist() == padded([])
    assert tokenizer([]).ids.shape == (0, 77)


def test_what_does_not_fit_is_cut_off_and_reported_as_it_was_written(tokenizer):
    text = "Word " * 75 + "Tail, in ITS own spelling"
    tokens = tokenizer([text, "short"])
    assert tokens.cut_off == ("Tail, in ITS own spelling", "")
    assert tokens.ids[0, -1] == 49407 and tokens.ids[0, -2] != 49407
    assert tokenizer("word " * 75).cut_off == ("",)


def test_a_cut_within_a_word_reports_the_rest_of_the_word():
    for style in ("hf", "openai"):
        text = "a " * 74 + "antidisestablishmentarianism"
        cut = Tokenizer.clip(style=style)(text).cut_off[0]
        assert cut and "antidisestablishmentarianism".endswith(cut) and cut != "antidisestablishmentarianism"


def test_the_two_styles_differ_where_they_are_known_to(tokenizer):
    openai = Tokenizer.clip(style="openai")
    for text in ("don’t", "&lt;b&gt;", "schÃ¶n", "ﬁsh", "ＡＢＣ", "ὀδυσσεύσ ΟΔΥΣΣΕΥΣ"):
        assert not torch.equal(tokenizer(text).ids, openai(text).ids), text
    for text in ("a red cube", "it's 3 o'clock", "naïve café"):
        assert torch.equal(tokenizer(text).ids, openai(text).ids), text


def test_another_length_and_another_vocabulary():
    assert Tokenizer.clip(length=16)("a b c").ids.shape == (1, 16)
    vocabulary = {"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}
    small = Tokenizer(vocabulary, ["a b</w>"], length=5)
    assert small("ab").ids[0].tolist() == [3, 2, 4, 4, 4]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="style 'gpt'; expected one of hf, openai"):
        Tokenizer.clip(style="gpt")
    with pytest.raises(ValueError, match="lone surrogate\\) at position 2"):
        Tokenizer.clip()("ab\ud800")
