import json
import shutil

import pytest
from PIL import Image

from tests.support.emoji_sources import SUBJECTS, write_sources
from tokenshuffle_core.data.emoji.build import POPULAR, build, read_manifest


@pytest.fixture
def folder(tmp_path):
    write_sources(tmp_path)
    return tmp_path


def test_every_pair_has_a_picture_of_the_right_size(data):
    records = read_manifest(data)
    assert len(records) == len(SUBJECTS) * 3
    for record in records:
        picture = Image.open(data / record["image"])
        assert (picture.mode, picture.size) == ("RGBA", (32, 32))
        assert picture.getchannel("A").getextrema() == (0, 255)
        assert picture.getpixel((0, 0))[3] == 0


def test_colours_come_from_the_right_source(data):
    for record in read_manifest(data):
        centre = Image.open(data / record["image"]).getpixel((16, 16))[:3]
        if record["style"] == "flat" and record["codepoints"] != "2b50":
            assert centre == (255, 0, 0)
        if record["style"] == "3d" and record["codepoints"] == "1f436":
            assert centre == (40, 255, 0)


def test_an_oblong_icon_keeps_its_proportions(data):
    """A circle of 20 in a box of 32 is 20 pixels wide; in a box of 32 x 64 it is 10 by 10."""
    boxes = {
        r["codepoints"]: Image.open(data / r["image"]).getbbox()
        for r in read_manifest(data)
        if r["style"] == "flat"
    }
    assert boxes["1f34e"] == (6, 6, 26, 26)
    assert boxes["2b50"] == (11, 3, 21, 13)


def test_names_are_unambiguous(data):
    record = next(r for r in read_manifest(data) if r["codepoints"] == "1f436")
    assert record["names"]["zh"] == ["狗", "小狗", "狗脸", "tag1f436"]
    assert record["names"]["de"] == ["hund", "hundegesicht", "tag1f436"]  # not "common"
    assert record["names"]["en"] == ["dog face", "🐶"]


def test_a_name_in_the_list_is_no_keyword_of_another_subject(folder):
    path = folder / "sources" / "emojibase-data" / "de" / "data.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    tags = ["apfel", "nacht", "blaue", "n"]  # another's name, a word, a colour, a letter
    next(e for e in entries if e["hexcode"] == "2B50")["tags"] = tags
    path.write_text(json.dumps(entries), encoding="utf-8")
    subjects = folder / "s.txt"
    subjects.write_text("1F34E red apple, apple\n2B50 star\n")
    build(folder, size=32, subjects=str(subjects), styles=("3d",), held_out=0)
    names = {r["subject"]: r["names"] for r in read_manifest(folder)}
    assert names["red apple"]["en"] == ["red apple", "apple", "🍎"]
    assert names["star"]["en"] == ["star", "⭐"]
    assert names["star"]["de"] == ["stern", "nacht"]


def test_ten_languages_name_each_subject(data):
    record = next(r for r in read_manifest(data) if r["codepoints"] == "1f34e")
    assert list(record["names"]) == ["en", "zh", "ja", "ko", "de", "fr", "es", "pt", "it", "ru"]
    assert record["names"]["ru"][:2] == ["яблоко", "красное яблоко"]
    assert "ja" in json.loads((data / "dataset.json").read_text())["languages"]


def test_held_out_pairs_leave_other_styles_of_the_subject(data):
    held_out = [r for r in read_manifest(data) if r["split"] == "held-out"]
    assert len(held_out) == 1
    assert held_out[0]["subject"] != "red apple"


def test_a_second_build_renders_nothing_and_writes_the_same(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "images" / "3d" / "star.png").unlink()
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("images/*/*.png")}
    manifest = (copy / "manifest.jsonl").read_bytes()
    build(copy, size=32, subjects=str(copy / "subjects.txt"), held_out=0.1)
    assert (copy / "images" / "3d" / "star.png").exists()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert (copy / "manifest.jsonl").read_bytes() == manifest


def test_documents_name_sources_and_licences(data):
    summary = json.loads((data / "dataset.json").read_text())
    assert (summary["subjects"], summary["pictures"], summary["held_out"]) == (3, 9, 1)
    text = (data / "LICENSES.md").read_text()
    assert "Apache-2.0" in text
    assert "Microsoft" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 8}, "size must be from 16"),
        ({"styles": ("oil",)}, "style 'oil' is not one of"),
        ({"held_out": 0.5}, "held_out must be"),
        ({"languages": ("xx",)}, "language 'xx' is not one of en, zh"),
        ({"subjects": "favourites"}, "subjects must be"),
    ],
)
def test_bad_settings_are_refused(folder, settings, message):
    subjects = folder / "s.txt"
    subjects.write_text("1F34E red apple\n")
    with pytest.raises(ValueError, match=message):
        build(folder, **{"subjects": str(subjects)} | settings)


def test_a_bad_subjects_file_names_its_line(folder):
    subjects = folder / "s.txt"
    subjects.write_text("# mine\n1F34E red apple\nbanana\n")
    with pytest.raises(ValueError, match=r"s\.txt, line 3: expected code points"):
        build(folder, subjects=str(subjects))


def test_subjects_never_share_a_picture_file(folder):
    subjects = folder / "s.txt"
    subjects.write_text("1F34E fruit\n2B50 fruit\n")
    with pytest.raises(ValueError, match=r"1f34e and 2b50 would both be saved as .*fruit\.png"):
        build(folder, size=32, subjects=str(subjects))
    subjects.write_text("1F34E 苹果\n2B50 星星\n", encoding="utf-8")
    build(folder, size=32, subjects=str(subjects), styles=("3d",), held_out=0)
    images = [record["image"] for record in read_manifest(folder)]
    assert images == ["images/3d/1f34e.png", "images/3d/2b50.png"]


def test_a_subjects_file_without_subjects_is_refused(folder):
    (folder / "s.txt").write_text("# nothing yet\n")
    with pytest.raises(ValueError, match=r"s\.txt names no subject"):
        build(folder, subjects=str(folder / "s.txt"))


def test_a_short_name_gives_way_to_another_subjects_label(folder):
    path = folder / "sources" / "emojibase-data" / "zh" / "data.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    next(e for e in entries if e["hexcode"] == "2B50")["label"] = "狗"
    path.write_text(json.dumps(entries), encoding="utf-8")
    build(folder, size=32, subjects="all", styles=("3d",), held_out=0)
    names = {r["codepoints"]: r["names"]["zh"] for r in read_manifest(folder)}
    assert names["2b50"][0] == "狗"
    assert names["1f436"][0] == "狗脸"
    assert "狗" not in names["1f436"]


def test_modern_takes_its_code_points_from_flat(folder):
    flat = folder / "sources" / "@iconify-json+fluent-emoji-flat"
    modern = shutil.copytree(flat, flat.with_name("@iconify-json+fluent-emoji"))
    (modern / "chars.json").write_text("{}")  # as version 1.2.7 ships it
    icons = (modern / "icons.json").read_text().replace("#ff0000", "#00ff00")
    (modern / "icons.json").write_text(icons)
    build(folder, size=32, subjects="all", styles=("modern",), held_out=0)
    picture = Image.open(folder / "images" / "modern" / "red-apple.png")
    assert picture.getpixel((16, 16)) == (0, 255, 0, 255)


def test_without_npm_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"npm is needed .* install Node\.js"):
        build(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenshuffle data emoji"):
        read_manifest(tmp_path)


def test_the_curated_list_has_what_people_ask_for_first():
    lines = [line for line in POPULAR.read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    names = {name.strip() for line in lines for name in line.partition(" ")[2].split(",")}
    assert len(lines) >= 300
    assert {"red apple", "cat", "dog", "rocket", "pizza", "car", "tree", "sun"} <= names
