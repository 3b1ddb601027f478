"""Files of captions: a line each, or COCO's JSON."""

import json

import pytest

from ldm.evaluation import caption_file
from tests.refusal import one_line


def test_a_text_file_has_a_caption_a_line(tmp_path):
    (tmp_path / "captions.txt").write_bytes(b"\xef\xbb\xbfa cube\r\n\r\n  a sphere \n")
    read = caption_file.read(tmp_path / "captions.txt")
    assert (read.texts, read.name) == (["a cube", "  a sphere "], "captions.txt")
    assert caption_file.read(tmp_path / "captions.txt", 1).texts == ["a cube"]


def test_of_cocos_captions_each_picture_gives_its_first(tmp_path):
    told = [(9, 4, "nine, later"), (2, 7, "two "), (9, 3, "nine\n"), (30, 1, "thirty"), (2, 8, "two, later")]
    annotations = [{"image_id": image, "id": number, "caption": text} for image, number, text in told]
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    assert caption_file.read(tmp_path / "captions.json").texts == ["two", "nine", "thirty"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"\n \n", "holds no caption; expected one a line"),
        ("a.txt", b"a cube\n", "holds 1 captions; 2 were asked for"),
        ("a.txt", b"caf\xe9", "is not UTF-8 text at byte 3"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b"[" * 100_000, "is not JSON"),
        ("a.json", b"[]", "has no list of annotations"),
        ("a.json", b'{"annotations": {}}', "has no list of annotations"),
        ("a.json", b'{"annotations": []}', "holds no caption"),
        ("a.json", b'{"annotations": [{"image_id": 1, "id": true, "caption": ""}]}', "annotation 0 has no id"),
        ("a.json", b'{"annotations": [{"image_id": 1, "id": 2}]}', "annotation 0 has no caption"),
        ("a.json", b'{"annotations": [3]}', "annotation 0 has no image_id"),
        ("missing/a.txt", None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_without_captions_is_refused_in_one_line(tmp_path, name, content, expected):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as refusal:
        caption_file.read(tmp_path / name, 2)
    assert one_line(refusal.value).startswith(f"{tmp_path / name}: {expected}")
