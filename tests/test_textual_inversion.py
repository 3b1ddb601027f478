"""Textual inversion by itself: every form of file, placeholders in prompts, and a model that knows them beside one without."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import nn

import ldm
import weights_convert
from ldm.adapters.textual_inversion import attach
from ldm.models.clip import pool
from ldm.output.receipt import fingerprint
from ldm.text import encoding
from ldm.text.prompt import Fragment
from ldm.text.tokenizer import START, Tokenizer
from ldm.text.windows import lay
from tests import seeded
from tests.refusal import CONTAINERS, one_line, refused_cheaply
from tests.test_bad_pickles import contained, number, programs, text
from tests.test_tokenizer import TEXTS
from weights_convert import CheckpointError
from weights_convert.embedding import Embedding, read_embedding

WIDTH = 32  # of the tiny model
VECTORS = {n: seeded.tensor(f"{n} vectors", n, WIDTH) for n in (1, 2, 3, 80)}
PLACEHOLDERS = {"<cat-toy>": (50001,), "midjourney-style": (50002, 50003, 50004), "art": (50005, 50006)}


def automatic1111(vectors, **others):
    """What its training writes."""
    origin = {"sd_checkpoint": "81761151", "sd_checkpoint_name": "v1-5"}
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "x", "step": 500, **origin, **others}


def authors(vectors):
    """What the code of the paper's authors writes: the token as a tensor, the vectors in a module."""
    held = nn.ParameterDict({"*": nn.Parameter(vectors)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}


FORMS = {
    "AUTOMATIC1111": automatic1111,
    "AUTOMATIC1111, a parameter": lambda v: automatic1111(nn.Parameter(v)),
    "the authors": authors,
    "diffusers": lambda v: {"<cat-toy>": v},
    "kohya": lambda v: {"emb_params": v},
}
FILES = [(form, container) for form in FORMS for container in CONTAINERS if container != "safetensors"]
FILES += [("diffusers", "safetensors"), ("kohya", "safetensors")]


def write(path, content, container="zip"):
    save_file(content, path) if container == "safetensors" else torch.save(content, path, **CONTAINERS[container])
    return path


def embedding(name, n=2, width=WIDTH):
    return Embedding(name, VECTORS[n][:, :width], f"{name}.pt", "")


# -- Files


@pytest.mark.parametrize(("form", "container"), FILES)
def test_every_form_of_file_reads_as_the_same_vectors(tmp_path, form, container):
    path = write(tmp_path / "Charturner.v2.pt", FORMS[form](VECTORS[3]), container)
    found = read_embedding(path)
    assert torch.equal(found.vectors, VECTORS[3]) and found.vectors.dtype == torch.float32
    assert found.name == ("<cat-toy>" if form == "diffusers" else "Charturner.v2")
    assert (found.path, found.sha256) == (path, hashlib.sha256(path.read_bytes()).hexdigest())


def storage(name, length):
    return b"(" + text("storage") + b"ctorch\n" + name + b"\n" + text("0") + text("cuda:0") + number(length) + b"tQ"


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("pairs", [True, False], ids=["Python 2", "Python 3"])
def test_parameters_as_torch_1_wrote_them_are_read(tmp_path, container, pairs):
    """A module's state, in which the parameters are an OrderedDict, beside hooks that are more of them."""
    sides = b"(" + number(2) + number(WIDTH) + b"t(" + number(WIDTH) + number(1) + b"t"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(b"FloatStorage", 64) + number(0) + sides + b"\x89N" + b"tR"
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + tensor + b"\x88ccollections\nOrderedDict\n)RtR"
    of_pairs, of_items = b"(]](" + text("*") + parameter + b"eatR", b")R" + text("*") + parameter + b"s"
    held = b"ccollections\nOrderedDict\n" + (of_pairs if pairs else of_items)
    hooks = text("_forward_hooks") + b"ccollections\nOrderedDict\n)R" + text("_keys") + b"c__builtin__\nset\n(]tR"
    state = b"}(" + text("training") + b"\x88" + text("_parameters") + held + hooks + b"u"
    module = b"ctorch.nn.modules.container\nParameterDict\n)\x81" + state + b"b"
    program = b"\x80\x02}" + text("string_to_param") + module + b"s."
    path = contained(tmp_path / "old.pt", container, program, (VECTORS[2].numpy().tobytes(),))
    found = read_embedding(path)
    assert torch.equal(found.vectors, VECTORS[2]) and found.name == "old"


def test_a_single_vector_and_half_precision_are_read_as_rows_of_float32(tmp_path):
    found = read_embedding(write(tmp_path / "a.bin", {"<toy>": VECTORS[1][0].half()}))
    assert torch.equal(found.vectors, VECTORS[1].half().float())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, "holds no tensors; its keys are none"),
        ({"name": "x", "step": 3}, "holds no tensors; its keys are name, step"),
        (automatic1111(3), "holds no tensors; its keys are *"),
        ({"<a>": VECTORS[1], "<b>": VECTORS[1]}, "holds 2 tensors (<a>, <b>); expected one embedding a file"),
        (
            {f"{i}.weight": VECTORS[1] for i in range(9)},
            "holds 9 tensors (0.weight, 1.weight, 2.weight, 3.weight, 4.weight, ...)",
        ),
        ({"clip_g": VECTORS[1], "clip_l": VECTORS[1]}, "made for SDXL (clip_g, clip_l); expected one made for"),
        ({"<a>": VECTORS[1][0, 0]}, "<a> has shape []; expected vectors, [width] or [count, width]"),
        ({"<a>": VECTORS[2][None]}, "<a> has shape [1, 2, 32]; expected vectors, [width] or [count, width]"),
        ({"<a>": VECTORS[2][:0]}, "<a> has shape [0, 32]; expected vectors"),
        ({"<a>": VECTORS[2].int()}, "<a> is of type int32; expected one of float64, float32, float16, bfloat16"),
        ({"<a>": VECTORS[2].clone().index_fill_(0, torch.tensor([1]), torch.nan)}, "vector 1 of <a> holds NaN or infinite"),
        ({"<a>": torch.full((4,), 1e300, dtype=torch.float64)}, "vector 0 of <a> holds NaN or infinite values"),
        (VECTORS[1], "expected a dictionary of tensors"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, expected):
    refused(write(tmp_path / "a.pt", content), expected)


def refused(path, expected):
    with pytest.raises(CheckpointError) as caught:
        read_embedding(path)
    assert str(path) in one_line(caught.value) and expected in str(caught.value)


def test_a_file_that_is_not_there_empty_or_of_another_kind_is_refused(tmp_path):
    refused(tmp_path / "none.pt", "cannot be read (No such file or directory)")
    refused(tmp_path, "expected a file, found a folder")
    (tmp_path / "a.pt").write_bytes(b"")
    refused(tmp_path / "a.pt", "the file is empty")
    (tmp_path / "a.pt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    refused(tmp_path / "a.pt", "neither a safetensors file nor one that torch.save wrote")
    refused(write(tmp_path / "b.safetensors", {}, "safetensors"), "holds no tensors; expected one embedding a file")


@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path, container):
    sentinel = tmp_path / "was run"
    for name, program in programs(sentinel).items():
        refused(contained(tmp_path / f"{name}.pt", container, program), "refused, nothing was run")
    assert not sentinel.exists()


DICTIONARY = b"ctorch.nn.modules.container\nParameterDict\n"
LARGE = b"}" + text("_parameters") + b"}(" + b"".join(number(i) + b"N" for i in range(9_000)) + b"usq\x00"
HASHES = b"](" + b"".join(b"(" + number(k * (2**61 - 1)) + b"Nt" for k in range(9_000)) + b"e"


def test_parameters_given_to_a_module_take_no_more_time_or_memory_than_any_pickle(tmp_path):
    hostile = {
        "given again and again": b"\x80\x02" + LARGE + b"0" + DICTIONARY + b")\x81" + b"h\x00b" * 100_000 + b".",
        "given to many": b"\x80\x02" + LARGE + b"0" + (DICTIONARY + b")\x81h\x00b") * 10_000 + b".",
        "themselves": b"\x80\x02" + DICTIONARY + b")\x81q\x00}" + text("_parameters") + b"h\x00sb.",
        "arguments": b"\x80\x02" + DICTIONARY + HASHES + b"\x85R.",
        "to nothing": b"\x80\x02}b.",
    }
    refused_cheaply([contained(tmp_path / f"{name}.ckpt", "zip", program) for name, program in hostile.items()])


def test_a_file_of_textual_inversion_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        weights_convert.read(write(tmp_path / "a.pt", authors(VECTORS[2])))
    assert str(tmp_path / "a.pt") in one_line(caught.value)


# -- Prompts


@pytest.fixture(scope="module", params=["hf", "openai"])
def tokenizers(request):
    plain = Tokenizer.clip(style=request.param)
    return plain, plain.with_placeholders(PLACEHOLDERS)


@pytest.mark.parametrize(
    "parts",
    [
        ["<cat-toy>"],
        ["a photo of ", "<cat-toy>", ", sharp"],
        ["<cat-toy>", "<cat-toy>", " and", "<cat-toy>", "s"],
        ["(", "midjourney-style", ":1.2), in ", "Midjourney-STYLE", "."],
        ["midjourney-style", "-", "art", " smart cart art3 articles 3art"],
        ["it's the ", "<CAT-toy>", "'s hat", "<cat-toy>"],
    ],
)
def test_a_placeholders_ids_come_out_where_it_stands_and_all_else_is_split_as_if_alone(tokenizers, parts):
    plain, knowing = tokenizers
    expected, start = [], 0
    for part in parts:
        ids = PLACEHOLDERS.get(part.lower())
        stripped = len(part) - len(part.lstrip()) if plain.style == "openai" else 0
        expected += [(i, start) for i in ids] if ids else [(i, start + stripped + at) for i, at in plain.tokens(part)[1]]
        start += len(part)
    text, tokens = knowing.tokens("".join(parts))
    assert [tuple(token) for token in tokens] == expected
    assert text == ("".join(parts) if knowing.style == "hf" else "".join(parts).lower())


def test_a_prompt_without_placeholders_is_split_as_before(tokenizers):
    plain, knowing = tokenizers

    @settings(max_examples=300, deadline=None)
    @given(TEXTS)
    def check(text):
        assert knowing.tokens(text) == plain.tokens(text)

    check()


def test_the_longest_placeholder_wins_and_a_word_of_the_vocabulary_may_be_one(tokenizers):
    knowing = tokenizers[0].with_placeholders(
        {"<toy": (1,), "<toy>": (2,), "cat": (3,), "cat-toy": (4,), "*": (5,), ".*": (6,)}
    )
    found = [token.id for token in knowing.tokens("<toy> <toy. cat-toy cat-toys * .*.*")[1]]
    dot, dash, toys = (knowing.vocabulary[word] for word in (".</w>", "-</w>", "toys</w>"))
    assert found == [2, 1, dot, 4, 3, dash, toys, 5, 6, 6]


def test_a_placeholder_is_found_however_its_accents_are_written(tokenizers):
    knowing = tokenizers[0].with_placeholders({"Caf\u00e9-x": (7,)})
    assert [i for i, _ in knowing.tokens("cafe\u0301-x CAF\u00c9-X")[1]] == [7, 7]


def test_a_placeholder_that_does_not_fit_whole_is_cut_between_its_vectors_and_reported(tokenizers):
    found = tokenizers[1](["a " * 73 + "MidJourney-style, old", "a " * 72 + "midjourney-style", "<cat-toy>" * 76])
    assert found.ids[0, 73:].tolist() == [320, 50002, 50003, 49407]
    assert found.ids[1, 73:].tolist() == [50002, 50003, 50004, 49407]
    assert found.ids[2, 1:].tolist() == [50001] * 75 + [49407]
    written = "MidJourney-style, old" if tokenizers[1].style == "hf" else "midjourney-style, old"
    assert found.cut_off == (written, "", "<cat-toy>")


def test_a_tokenizer_stays_as_it_is_when_another_learns_placeholders(tokenizers):
    plain, knowing = tokenizers
    more = knowing.with_placeholders({"Sks": (9,)})
    assert (plain.placeholders, knowing.placeholders) == ({}, PLACEHOLDERS)
    assert more.placeholders == {**PLACEHOLDERS, "sks": (9,)}
    assert len(more.vocabulary) == len(plain.vocabulary) == 49408
    assert 9 not in knowing("a sks").ids and 9 in more("a sks").ids


@pytest.mark.parametrize(
    ("placeholder", "expected"),
    [
        ("", "placeholder ''; expected a word without white space, .*; give it another name"),
        ("my style", "placeholder 'my style'; expected a word without white space"),
        ("a\u00a0b", "expected a word without white space"),
        (START.upper(), "expected a word without white space"),
        ("ART", "placeholder 'ART' is taken; give one of the two another name"),
        ("x\udcff", "holds half a character \\(a lone surrogate\\) at position 1"),
    ],
)
def test_what_cannot_be_a_placeholder_is_refused(tokenizers, placeholder, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        tokenizers[1].with_placeholders({placeholder: (1,)})
    one_line(caught.value)


# -- Models

PROMPTS = ["a photo of <cat-toy>, sharp", "Sks <cat-toy>", "a " * 73 + "<cat-toy>", "a red cube"]


@pytest.fixture(scope="module")
def attached(tiny):
    return attach(tiny, [embedding("<cat-toy>", 3), (embedding("x", 1), "sks")])


def test_states_are_those_of_the_vectors_put_in_by_hand(tiny, attached):
    """Into an ordinary table, in the place of words that no prompt holds."""
    ids = attached.tokenizer(PROMPTS).ids
    assert ids[0, :9].tolist() == [49406, 320, 1125, 539, 49408, 49409, 49410, 267, 8157]
    assert ids[1, :6].tolist() == [49406, 49411, 49408, 49409, 49410, 49407]
    by_hand = ldm.build("tiny", seed=0, dtype=torch.float64).text_encoder
    by_hand.load_state_dict(tiny.text_encoder.state_dict())
    table = by_hand.token_embedding.weight
    with torch.no_grad():
        table[1000:1004] = torch.cat([VECTORS[3], VECTORS[1]]).to(table)
    expected = by_hand(torch.where(ids >= 49408, ids - 48408, ids))
    assert torch.equal(attached.text_encoder(ids), expected)
    assert torch.equal(attached.text_encoder(ids[3:]), tiny.text_encoder(ids[3:]))


def test_the_pooled_state_is_still_that_of_the_end_mark(attached):
    ids = attached.tokenizer(PROMPTS).ids
    hidden = attached.text_encoder(ids)
    ends = [row.index(49407) for row in ids.tolist()]
    assert torch.equal(
        pool(hidden, ids, attached.tokenizer.end), torch.stack([h[e] for h, e in zip(hidden, ends, strict=True)])
    )


def test_the_model_given_stays_as_it_is_and_shares_every_weight_with_the_new_one(tiny):
    before = {name: value.clone() for name, value in tiny.text_encoder.state_dict().items()}
    new = attach(tiny, [embedding("<cat-toy>")])
    assert "<cat-toy>" not in tiny.tokenizer.placeholders and type(tiny.text_encoder.token_embedding) is nn.Embedding
    ours, theirs = (dict(one.text_encoder.named_parameters()) for one in (new, tiny))
    assert list(ours) == list(theirs) and all(ours[name] is theirs[name] for name in ours)
    assert (new.unet, new.autoencoder, new.schedule, new.name) == (tiny.unet, tiny.autoencoder, tiny.schedule, tiny.name)
    new.text_encoder.register_forward_hook(lambda *_: 1 / 0)
    tiny.text_encoder(tiny.tokenizer("a").ids)
    assert all(torch.equal(value, before[name]) for name, value in tiny.text_encoder.state_dict().items())


def test_a_model_is_saved_loaded_and_known_by_its_fingerprint_as_without_embeddings(tiny, attached):
    assert fingerprint({"t": attached.text_encoder}) == fingerprint({"t": tiny.text_encoder})
    state = attached.text_encoder.state_dict()
    assert list(state) == list(tiny.text_encoder.state_dict())
    ldm.build("tiny", seed=1).text_encoder.load_state_dict(state, strict=True)


def test_embeddings_attached_one_after_another_are_those_attached_at_once(tiny):
    ones = [embedding("<cat-toy>", 3), embedding("sks", 1), embedding("art", 2)]
    at_once, in_turn = attach(tiny, ones), tiny
    for one in ones:
        in_turn = attach(in_turn, [one])
    ids = at_once.tokenizer("<cat-toy> sks art").ids
    assert torch.equal(in_turn.tokenizer("<cat-toy> sks art").ids, ids)
    assert torch.equal(in_turn.text_encoder(ids), at_once.text_encoder(ids))
    assert attach(tiny, []) is tiny


@pytest.mark.parametrize("long_prompt", ["windows", "sentences", "commas"])
def test_an_embedding_longer_than_a_window_goes_on_in_the_next(tiny, long_prompt):
    model = attach(tiny, [embedding("sks", 80)])
    prompt = encoding.parse("sks, a cat", "compel")
    states = encoding.encode([prompt], model.tokenizer, model.text_encoder, long_prompt=long_prompt).states[0]
    *_, comma, a, cat = (token.id for token in model.tokenizer.tokens("sks, a cat")[1])
    rows = [[49406, *range(49408, 49483), 49407], [49406, *range(49483, 49488), comma, a, cat, *[49407] * 68]]
    assert torch.equal(states, model.text_encoder(torch.tensor(rows)).flatten(0, 1))


@pytest.mark.parametrize("before", [72, 73, 75, 150])
def test_where_windows_are_divided_at_commas_an_embedding_goes_whole_into_the_next(tiny, before):
    """As AUTOMATIC1111 has it; three vectors do not fit behind 73 tokens, and nothing is moved for a comma before them."""
    tokenizer = attach(tiny, [embedding("sks", 3)]).tokenizer
    fragments = [Fragment("a, " + "cat " * (before - 2) + "sks dog")]
    ids = lay(tokenizer, fragments, "commas").ids
    at = before + 1 if before == 72 else (-(-before // 75)) * 77 + 1
    assert ids.count(49408) == 1 and ids[at : at + 3] == (49408, 49409, 49410)
    divided = lay(tokenizer, fragments, "windows").ids
    assert (divided == ids) == (before != 73)


@pytest.mark.parametrize(
    ("syntax", "prompt"),
    [("compel", "a cat-toy+"), ("compel", "a (cat-toy+)1.2"), ("compel", '("a cat-toy+", "b").and()'), ("a1111", "a [x]")],
)
def test_a_placeholder_that_the_syntax_takes_apart_is_refused(tiny, syntax, prompt):
    model = attach(tiny, [embedding("cat-toy+"), embedding("[x]", 1)])
    fields = {"steps": 1, "width": 32, "height": 32, "seed": 0, "decode": False}
    with pytest.raises(ValueError) as caught:
        ldm.txt2img(model, "a good one", negative_prompt=prompt, prompt_syntax=syntax, **fields)
    rule = f"which the {syntax} syntax reads as something else than a word; give it another name"
    assert rule in one_line(caught.value)
    ldm.txt2img(model, prompt, **fields)  # plain
    ldm.txt2img(model, prompt.replace("cat-toy+", "cat-toy").replace("[x]", "x"), prompt_syntax=syntax, **fields)


def test_rows_go_where_the_model_goes(tiny):
    encoder = attach(ldm.build("tiny", seed=0), [embedding("<cat-toy>")]).text_encoder.to(torch.bfloat16)
    assert encoder(torch.tensor([[49408, 49409]])).dtype == torch.bfloat16
    with pytest.raises(IndexError):
        encoder(torch.tensor([[49410]]))


def test_a_picture_is_made_with_the_embedding_and_not_with_its_name(tiny):
    fields = {"steps": 1, "width": 32, "height": 32, "seed": 0, "decode": False}
    known, unknown = (
        ldm.txt2img(one, "a <cat-toy>", **fields).latents for one in (attach(tiny, [embedding("<cat-toy>")]), tiny)
    )
    assert not torch.equal(known, unknown)
    own = attach(tiny, [(Embedding("x", tiny.text_encoder.token_embedding.weight[[2368]], "x.pt", ""), "sks")])
    expected = ldm.txt2img(tiny, "a cat", **fields).latents
    assert torch.equal(ldm.txt2img(own, "a sks", **fields).latents, expected)


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        ([embedding("a", width=16)], "a.pt: its vectors are 16 wide, the text encoder's 32; it was made for another model"),
        (
            [Embedding("a", torch.zeros(1, 1024), "a.pt", "")],
            "1024 wide, the text encoder's 32; it was made for Stable Diffusion v2",
        ),
        ([Embedding("a", torch.zeros(1, 1280), "a.pt", "")], "it was made for SDXL; use one made for this model"),
        ([embedding("a"), embedding("a")], "a.pt: placeholder 'a' is taken; give one of the two another name"),
        ([embedding("a"), (embedding("b"), "A")], "placeholder 'A' is taken"),
        ([(embedding("a"), " ")], "placeholder ' '; expected a word without white space"),
        ([(embedding("a"), "")], "placeholder ''; expected a word"),
    ],
)
def test_an_embedding_that_cannot_be_attached_is_refused(tiny, embeddings, expected):
    with pytest.raises(ValueError) as caught:
        attach(tiny, embeddings)
    assert expected in one_line(caught.value)
    with pytest.raises(ValueError, match="placeholder 'a' is taken"):
        attach(attach(tiny, [embedding("a")]), [embedding("a")])
