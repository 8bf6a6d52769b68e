"""Tables of captions: every row is read right, or refused with file and line."""

import pytest

from ptdit_diffusers.training.data.tables import Facts, find_table, read_table


def rows(tmp_path, name, text, column=""):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(row.name, row.facts.caption, row.line) for row in read_table(tmp_path / name, column)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ('file_name,text\na.png,"one, two"\n', [("a.png", "one, two", 2)]),
        (
            'file_name,text\r\na.png,"one\r\ntwo"\r\nb.png,three\r\n',
            [("a.png", "one\r\ntwo", 2), ("b.png", "three", 4)],
        ),
        ("\ufeff File_Name , Text \n\na.png, one\n", [("a.png", "one", 3)]),
        ("image;caption\na.png;one, two\n", [("a.png", "one, two", 2)]),
        ("filename\tid\tdescription\na.png\t7\tone\n", [("a.png", "one", 2)]),
        ("file_name,text\na.png,one\u2028two\x0bthree\n", [("a.png", "one\u2028two\x0bthree", 2)]),
        ("file_name,text,caption\na.png,,two\nb.png,,\n", [("a.png", "two", 2), ("b.png", "", 3)]),
        ('file_name,text\na.png,a 5" disk\n', [("a.png", 'a 5" disk', 2)]),
    ],
)
def test_csv_is_read_as_spreadsheets_write_it(tmp_path, text, expected):
    assert rows(tmp_path, "metadata.csv", text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "file_name,text\na.png,1girl, red hair\n",
            r"metadata.csv, line 2: 3 fields, the first line has 2 \(file_name, ",
        ),
        ("file_name,text\na.png\n", "line 2: 1 fields, the first line has 2"),
        (
            "file_name,tags\na.png,one\n",
            "line 1: no column of captions among 'file_name', 'tags'; it is called text or",
        ),
        ("name,text\na.png,one\n", "line 1: no column of file names among 'name', 'text'; it is called file_name or"),
        ("a.png,a red square\n", "line 1: no column of file names"),
        ("file_name,text,Text\na.png,one,two\n", "line 1: two columns are called 'text'"),
        ('file_name,text\na.png,"one" two\n', "line 2: this is not CSV"),
        ('file_name,text\na.png,"one\nb.png,two\n', "line 3: this is not CSV: unexpected end of data"),
        ("file_name,text\n,one\n", "line 2: no file name; give one of file_name"),
        (b"file_name,text\na.png,one\nb.png,caf\xe9\n", "line 3: byte 0xe9 is not UTF-8; save the file as UTF-8"),
        ("file_name,text\na.png,one\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    ],
)
def test_a_csv_that_could_be_read_in_two_ways_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, "metadata.csv", text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"file_name": "a.png", "text": "one\u2028two"}\r\n\n{"Image": "b.png", " Caption ": "x"}',
         [("a.png", "one\u2028two", 1), ("b.png", "x", 3)]),
        ('{"file_name": "a.png", "text": 7}\n{"file_name": "b.png"}\n{"file_name": "c.png", "text": null}',
         [("a.png", "7", 1), ("b.png", "", 2), ("c.png", "", 3)]),
    ],
)  # fmt: skip
def test_json_lines_are_split_at_line_feeds_alone(tmp_path, text, expected):
    assert rows(tmp_path, "metadata.jsonl", text) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ('["a.png", "one"]', "line 1: it is a list, not an object with names"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": ', "line 2: this is not JSON"),
        ('{"file_name": "a.png", "tags": "x"}', "line 1: no caption among 'file_name', 'tags'"),
        ('{"file_name": "a.png", "text": ["x", ["y"]]}', r'line 1: the row has a caption that is no text \(\["x", '),
        ('{"file_name": "a.png", "text": ["x", "y"], "weights": [1]}', "the row has 1 weights for 2 captions, or"),
        ('{"file_name": "a.png", "text": "x", "weights": [-1]}', "1 weights for 1 captions, or negative ones"),
        ('{"file_name": "a.png", "text": "x", "quality": "good"}', "weights or a quality that are no numbers"),
        ('{"file_name": {"path": "a.png"}, "text": "x"}', "line 1: no file name"),
    ],
)
def test_a_json_row_that_is_not_a_file_with_a_caption_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        rows(tmp_path, "metadata.jsonl", text)


def test_a_row_has_several_captions_with_weights_a_quality_a_licence_and_a_group(tmp_path):
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": ["a tabby", "", "cat"], "weights": [3, 1], "quality": 5, "Licence": "CC0"}\n'
        '{"file_name": "b.png", "text": "one", "Cat": 0}\n'
    )
    one, two = (row.facts for row in read_table(tmp_path / "metadata.jsonl", "", "licence", "cat"))
    assert one == Facts(("a tabby", "cat"), (3.0, 1.0), 5.0, "CC0")
    assert two == Facts(("one",), (1.0,), group="0") and read_table(tmp_path / "metadata.jsonl")[1].facts.group == ""
    (tmp_path / "metadata.csv").write_text("file_name,text,quality\na.png,one,5.5\nb.png,two,\n")
    assert [row.facts.quality for row in read_table(tmp_path / "metadata.csv")] == [5.5, None]


def test_another_column_can_be_named(tmp_path):
    text = "file_name,text,tags\na.png,one,two\n"
    assert rows(tmp_path, "metadata.csv", text, "Tags") == [("a.png", "two", 2)]
    with pytest.raises(ValueError, match="no column of captions among .*; it is called label"):
        rows(tmp_path, "metadata.csv", text, "label")


@pytest.mark.parametrize(
    "names, message",
    [
        ({"metadata.csv", "metadata.jsonl"}, "holds metadata.jsonl and metadata.csv; keep one of them"),
        ({"metadata.parquet"}, "metadata.parquet is not read; save it as metadata.jsonl or metadata.csv"),
    ],
)
def test_a_table_is_never_chosen_or_passed_over_in_silence(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        find_table(names, tmp_path)
