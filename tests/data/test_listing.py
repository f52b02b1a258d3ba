"""What an INPUT means: folders, single images, lists of paths, and their keys."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from dove_fast.data import list_inputs


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def keys(source):
    return [item.key for item in list_inputs(source)]


def test_a_folder_is_listed_recursively_sorted_by_key_and_by_known_endings(tmp_path):
    touch(tmp_path, "b.jpg", "a/z.PNG", "a/y.txt", "a.webp", "c/d/e.TiFF", "noending", "B.jpeg")
    assert keys(tmp_path) == ["B.jpeg", "a.webp", "a/z.PNG", "b.jpg", "c/d/e.TiFF"]


def test_paths_open_the_files_that_the_keys_name(tmp_path):
    touch(tmp_path, "a/x.jpg")
    (item,) = list_inputs(tmp_path)
    assert os.path.samefile(item.path, tmp_path / "a/x.jpg")
    assert item.source == (tmp_path / "a/x.jpg").as_posix()


def test_hidden_files_and_folders_are_skipped(tmp_path):
    touch(tmp_path, ".a.jpg", "._b.jpg", ".thumbs/c.jpg", "d.jpg")
    assert keys(tmp_path) == ["d.jpg"]


def test_links_are_followed_but_not_around_a_loop(tmp_path):
    touch(tmp_path, "in/a/x.jpg", "elsewhere/y.jpg")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert keys(tmp_path / "in") == ["a/x.jpg", "linked/y.jpg"]


def test_a_dangling_link_is_listed_so_that_it_is_set_aside_and_not_passed_over(tmp_path):
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert keys(tmp_path) == ["gone.jpg"]


def test_a_name_that_is_not_utf8_has_a_printable_key_and_still_opens(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.png"
    try:
        Image.new("RGB", (2, 2)).save(os.fsdecode(path))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (item,) = list_inputs(tmp_path)
    assert item.key == "caf\\xe9.png"
    assert os.path.exists(item.path)
    item.source.encode()


def test_one_image_has_its_name_as_key_whatever_its_ending(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "picture", format="PNG")
    Image.new("RGB", (2, 2)).save(tmp_path / "x.jpg")
    assert keys(tmp_path / "picture") == ["picture"]
    assert keys(tmp_path / "x.jpg") == ["x.jpg"]


def test_a_list_keeps_its_order_and_its_paths_are_relative_to_it(tmp_path):
    touch(tmp_path, "photos/a.jpg", "b.jpg", "photos/c.jpg")
    lines = "\ufeffphotos//a.jpg\r\n\n  # a comment\n./b.jpg  \n" + f"{tmp_path}/photos/c.jpg\n../up.jpg"
    (tmp_path / "list.txt").write_text(lines, encoding="utf-8")
    items = list_inputs(tmp_path / "list.txt")
    assert [item.key for item in items] == ["photos/a.jpg", "b.jpg", "photos/c.jpg", "../up.jpg"]
    for item, expected in zip(items, ["photos/a.jpg", "b.jpg", "photos/c.jpg"], strict=False):
        assert os.path.samefile(item.path, tmp_path / expected)


def test_repeated_keys_are_named(tmp_path):
    (tmp_path / "list.txt").write_text(f"a.jpg\nb.jpg\n{tmp_path}/x/../a.jpg\n")
    with pytest.raises(ValueError, match=r"keys must be unique, these come more than once: 'a.jpg'"):
        list_inputs(tmp_path / "list.txt")


def test_nothing_there_and_nothing_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such input: .*nowhere"):
        list_inputs(tmp_path / "nowhere")
    touch(tmp_path, "notes.txt")
    with pytest.raises(ValueError, match=r"no images in .*: no file below it has one of the endings \.apng"):
        list_inputs(tmp_path)
    with pytest.raises(ValueError, match=r"no paths in .*notes\.txt: it is empty but for comments"):
        list_inputs(tmp_path / "notes.txt")


def test_a_binary_file_is_not_taken_for_a_list(tmp_path):
    (tmp_path / "blob").write_bytes(b"a.jpg\n\0\1\2")
    with pytest.raises(ValueError, match="neither an image in a known format, nor a folder, nor a text file"):
        list_inputs(tmp_path / "blob")
