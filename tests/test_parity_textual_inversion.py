"""Textual inversion against diffusers: the same file through both, for the ids of prompts and the states of the text encoder.

diffusers turns a placeholder of several vectors into as many words, but only where it is in lower case, in the file and in the
prompt; so here it is, but where there is one vector.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import ldm
from ldm.adapters.textual_inversion import attach
from tests import openai_tokenizer, seeded
from tests.measure import relative_error
from weights_convert.embedding import read_embedding

pytestmark = pytest.mark.reference

TOLERANCE = 1e-6  # both compute in float32
WIDTH = 32
PROMPTS = [
    "{}",
    "{} on a table",
    "a photo of {}, sharp, 4k",
    "a photo of {}",
    "{} {} and {}, {}",
    "({}), [{}]: \"{}\"; it's {}'s hat",
    "a {}.",
    "Café ﬁn, {} 日本",
    "word " * 73 + "{} and more",
    "word " * 74 + "{}",
    "word " * 80 + "{}",
    "a red cube",
    "",
]
COUNTS = {"<cat-toy>": 1, "<dog-toy>": 4, "midjourney-style": 4, "sks_3": 1}  # placeholders, and how many vectors each has
GLUED = ["a{}b", "3{}4", "{}{}s", "<{}>"]  # for placeholders that begin and end with no letter
# How each tool writes a file: its ending, and what it saves for a placeholder and its vectors.
WRITTEN = {
    "diffusers": ("bin", lambda name, v: {name: v}),
    "diffusers, one vector alone": ("bin", lambda name, v: {name: v[0]}),
    "diffusers, safetensors": ("safetensors", lambda name, v: {name: v}),
    "AUTOMATIC1111": (
        "pt",
        lambda name, v: {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": v.requires_grad_()},
            "name": name,
            "step": 500,
            "sd_checkpoint": "81761151",
            "sd_checkpoint_name": "v1-5-pruned-emaonly",
        },
    ),
    "kohya": ("safetensors", lambda name, v: {"emb_params": v}),
    "kohya, pickled": ("pt", lambda name, v: {"emb_params": v}),
}


@pytest.fixture(scope="module")
def ours(tiny_diffusers):
    return ldm.load(tiny_diffusers)


def write(folder, tool, name, count):
    """The file that `tool` writes for a word of `count` vectors."""
    ending, content = WRITTEN[tool]
    path, content = folder / f"{name}.{ending}", content(name, seeded.tensor(f"{name} {count}", count, WIDTH) * 0.5)
    if ending == "safetensors":
        save_file(content, path, metadata={"format": "pt"})
    else:
        torch.save(content, path)
    return path


def load_theirs(folder, path, token=None):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.load_textual_inversion(path, token=token)
    return pipeline


def their_ids(pipeline, prompts):
    prompts = pipeline.maybe_convert_prompt(list(prompts), pipeline.tokenizer)
    return pipeline.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def their_states(pipeline, prompts):
    return pipeline.encode_prompt(list(prompts), "cpu", 1, False)[0]


@pytest.mark.parametrize("tool", WRITTEN)
def test_ids_and_states_are_those_of_diffusers(ours, tiny_diffusers, tmp_path, tool):
    counts = {name: n for name, n in COUNTS.items() if n == 1 or tool != "diffusers, one vector alone"}
    paths = [write(tmp_path, tool, name, count) for name, count in counts.items()]
    theirs, model = load_theirs(tiny_diffusers, paths, list(counts)), attach(ours, [read_embedding(path) for path in paths])
    for name, count in counts.items():
        prompts = [text.replace("{}", name) for text in PROMPTS + GLUED * name.startswith("<")]
        ids = model.tokenizer(prompts).ids
        assert torch.equal(ids, their_ids(theirs, prompts)), name
        error = relative_error(model.text_encoder(ids), their_states(theirs, prompts))
        print(f"{tool}, {count} x {name}: states {error:.1e} (tolerance {TOLERANCE:.0e})")
        assert error < TOLERANCE


def test_the_key_in_a_diffusers_file_or_the_name_given_is_the_placeholder_as_it_is_to_diffusers(ours, tiny_diffusers, tmp_path):
    path = write(tmp_path, "diffusers", "<cat-toy>", 2)
    for token, word in ((None, "<cat-toy>"), ("sks", "sks")):
        theirs, model = load_theirs(tiny_diffusers, path, token), attach(ours, [(read_embedding(path), token)])
        prompts = [f"a photo of {word}, old"]
        assert (model.tokenizer(prompts).ids >= 49408).sum() == 2
        assert torch.equal(model.tokenizer(prompts).ids, their_ids(theirs, prompts))


def test_two_embeddings_have_the_ids_and_states_that_diffusers_gives_them(ours, tiny_diffusers, tmp_path):
    paths = [write(tmp_path, "diffusers", "<cat-toy>", 3), write(tmp_path, "AUTOMATIC1111", "<cat>", 1)]
    theirs = load_theirs(tiny_diffusers, paths, ["<cat-toy>", "<cat>"])
    model = attach(ours, [read_embedding(path) for path in paths])
    prompts = ["<cat> and <cat-toy>", "a <cat-toy>, <cat>", "<cat><cat-toy>"]
    ids = model.tokenizer(prompts).ids
    assert torch.equal(ids, their_ids(theirs, prompts))
    assert relative_error(model.text_encoder(ids), their_states(theirs, prompts)) < TOLERANCE


@pytest.mark.parametrize("count", [1, 3])
def test_ids_are_those_of_diffusers_on_arbitrary_unicode(ours, tiny_diffusers, tmp_path, count):
    path = write(tmp_path, "diffusers", "<cat-toy>", count)
    theirs, model = load_theirs(tiny_diffusers, path), attach(ours, [read_embedding(path)])
    pieces = [*openai_tokenizer.PIECES, "<cat-toy", "cat-toy>", *(["<Cat-TOY>"] if count == 1 else [])]
    of_text = st.one_of(st.just("<cat-toy>"), st.sampled_from(pieces), st.text(max_size=4))

    @settings(max_examples=600, deadline=None)
    @given(st.lists(of_text, max_size=12).map("".join))
    def check(text):
        assert torch.equal(model.tokenizer(text).ids, their_ids(theirs, [text])), text

    check()


def test_where_a_word_only_ends_like_a_placeholder_diffusers_takes_it_for_one_and_we_do_not(ours, tiny_diffusers, tmp_path):
    path = write(tmp_path, "diffusers", "gta5", 1)
    theirs, model = load_theirs(tiny_diffusers, path), attach(ours, [read_embedding(path)])
    assert 49408 in their_ids(theirs, ["a xgta5"]) and 49408 not in model.tokenizer("a xgta5").ids
    assert torch.equal(model.tokenizer("a xgta5").ids, ours.tokenizer("a xgta5").ids)


@pytest.mark.parametrize(("name", "prompt"), [("<cat-toy>", "<CAT-toy>"), ("<Cat-Toy>", "<Cat-Toy>")])
def test_in_capitals_diffusers_uses_only_the_first_of_several_vectors_and_we_use_all(
    ours, tiny_diffusers, tmp_path, name, prompt
):
    path = write(tmp_path, "diffusers", name, 2)
    theirs, model = load_theirs(tiny_diffusers, path), attach(ours, [read_embedding(path)])
    assert their_ids(theirs, [prompt])[0, 1:4].tolist() == [49408, 49407, 49407]
    assert model.tokenizer(prompt).ids[0, 1:4].tolist() == [49408, 49409, 49407]
