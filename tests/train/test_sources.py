# SPDX-License-Identifier: Apache-2.0
"""Formats: what each says is what a sample holds, and what is wrong is named with its place."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from prereg_kernels.train.collator import open_image
from prereg_kernels.train.config import DataConfig
from prereg_kernels.train.sample import BadSampleError, Sample
from prereg_kernels.train.source import read_records
from prereg_kernels.train.sources import FORMATS, open_source
from tests.docs.pages import ROOT, read_page

LLAVA = [
    {
        "id": 7,
        "image": "a/1.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhät is <this>?"},
            {"from": "gpt", "value": "A cat, not <image>."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    {
        "id": "x",
        "image": ["1.jpg", "2.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nThe same?"},
            {"from": "gpt", "value": "No."},
        ],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(*parts: dict[str, str]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def assistant(value: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text(value)]}


PICTURE = {"type": "image"}
MESSAGES = [
    [user(PICTURE, text("Whät is <this>?")), assistant("A cat, not <image>."),
     user(text("Sure?")), assistant("Yes.")],
    [user(PICTURE, PICTURE, text("The same?")), assistant("No.")],
    [user(text("Hi")), assistant("Hello")],
]  # fmt: skip
PATHS: list[list[str]] = [["a/1.jpg"], ["1.jpg", "2.jpg"], []]


def write(path: Path, records: list[Any], layout: str) -> Path:
    """As a list on one line, as an indented one, or a record a line."""
    if layout == "lines":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path = path.with_suffix(".jsonl")
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        indent = 2 if layout == "indented" else None
        path.write_text(json.dumps(records, ensure_ascii=False, indent=indent), encoding="utf-8")
    return path


def plain(sample: Sample) -> tuple[list[Any], list[Any]]:
    return [dict(message) for message in sample.messages], list(sample.images)


@pytest.mark.parametrize("layout", ["list", "indented", "lines"])
def test_llava(tmp_path: Path, layout: str) -> None:
    source = open_source(DataConfig(str(write(tmp_path / "d.json", LLAVA, layout)), "llava"))
    assert [plain(source[i]) for i in range(len(source))] == list(zip(MESSAGES, PATHS, strict=True))
    assert source[0].root == tmp_path
    assert source.images.tolist() == [1, 2, 0]


@pytest.mark.parametrize("layout", ["list", "indented", "lines"])
def test_messages(tmp_path: Path, layout: str) -> None:
    records = [{"messages": m, "images": i} for m, i in zip(MESSAGES, PATHS, strict=True)]
    source = open_source(DataConfig(str(write(tmp_path / "d.json", records, layout))))
    assert [plain(source[i]) for i in range(len(source))] == list(zip(MESSAGES, PATHS, strict=True))
    assert source.images.tolist() == [1, 2, 0]
    assert source.lengths.tolist()[2] == len("HiHello")


@pytest.mark.parametrize("is_saved", [True, False])
def test_a_data_set_with_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_saved: bool
) -> None:
    """As `save_to_disk` writes it, and as files that `load_dataset` reads."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    colours = [[(255, 0, 0)], [(0, 255, 0), (0, 0, 255)], []]
    rows = datasets.Dataset.from_list(
        [
            {"messages": m, "images": [Image.new("RGB", (4, 4), c) for c in several]}
            for m, several in zip(MESSAGES, colours, strict=True)
        ],
        features=datasets.Features(
            messages=[{"role": datasets.Value("string"),
                       "content": [{"type": datasets.Value("string"),
                                    "text": datasets.Value("string")}]}],
            images=[datasets.Image()],
        ),
    )  # fmt: skip
    if is_saved:
        rows.save_to_disk(str(tmp_path / "saved"))
    else:
        (tmp_path / "saved").mkdir()
        rows.to_parquet(str(tmp_path / "saved" / "train.parquet"))
    source = open_source(DataConfig(str(tmp_path / "saved")))
    for number, (messages, several) in enumerate(zip(MESSAGES, colours, strict=True)):
        sample = source[number]
        assert list(sample.messages) == messages
        opened = [open_image(image, sample.root) for image in sample.images]
        assert [image.getpixel((0, 0)) for image in opened] == several
    assert source.where(1) == f"{tmp_path / 'saved'}[1]"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "glob", ["{here}/a/b/p-*.parquet", "./a/b/*.parquet", "a/b/p-[01].parquet",
             "file://{here}/a/b/p-?.parquet"],
)  # fmt: skip
def test_parquet_by_globs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, glob: str, streaming: bool
) -> None:
    """Also those of paths, and as URLs."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    asked = ["one", "two", "three"]
    for number, text in enumerate(asked):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        rows = datasets.Dataset.from_list([{"messages": turns}])
        rows.to_parquet(tmp_path / "a" / "b" / f"p-{number}.parquet")
    source = open_source(DataConfig(glob.format(here=tmp_path), streaming=streaming))
    if streaming:
        samples = [source.row_sample(row) for row in source.rows]
    else:
        samples = [source[number] for number in range(len(source))]
    found = [sample.messages[0]["content"][0]["text"] for sample in samples]
    assert found == (asked[:2] if "[01]" in glob else asked)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_glob_of_nothing(streaming: bool) -> None:
    """The error names it."""
    with pytest.raises(ValueError, match=r"^/nowhere/\*\.parquet: At least one valid data file"):
        open_source(DataConfig("/nowhere/*.parquet", streaming=streaming))


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for name, content in files.items():
                facts = tarfile.TarInfo(f"{key}.{name}")
                facts.size = len(content)
                tar.addfile(facts, io.BytesIO(content))


def png(colour: tuple[int, int, int]) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(content, "png")
    return content.getvalue()


@pytest.mark.parametrize("is_llava", [True, False])
def test_shards(tmp_path: Path, is_llava: bool) -> None:
    """Two .tar files; the images are the shards' own, in the order of their names."""
    colours = [[(255, 0, 0)], [(0, 255, 0), (0, 0, 255)], []]
    samples = {}
    for number, several in enumerate(colours):
        record = LLAVA[number] if is_llava else {"messages": MESSAGES[number]}
        files = {f"{place}.png": png(colour) for place, colour in enumerate(several)}
        samples[f"x/{number}"] = {"json": json.dumps(record).encode(), **files}
    write_shard(tmp_path / "a.tar", dict(list(samples.items())[:2]))
    write_shard(tmp_path / "b.tar", dict(list(samples.items())[2:]))
    source = open_source(DataConfig(str(tmp_path), "webdataset"))
    assert source.images.tolist() == [1, 2, 0]
    assert [source.where(i) for i in range(3)] == [
        f"{tmp_path}/a.tar: x/0", f"{tmp_path}/a.tar: x/1", f"{tmp_path}/b.tar: x/2",
    ]  # fmt: skip
    for number, (messages, several) in enumerate(zip(MESSAGES, colours, strict=True)):
        assert list(source[number].messages) == messages
        opened = [open_image(image, None) for image in source[number].images]
        assert [image.getpixel((0, 0)) for image in opened] == several


@pytest.mark.parametrize("is_streaming", [False, True])
def test_images_are_in_the_order_of_their_numbers(tmp_path: Path, is_streaming: bool) -> None:
    """Of more than ten, whatever their order in the shard and their suffixes are."""
    record = {
        "conversations": [
            {"from": "human", "value": "<image>\n" * 12 + "Which is red?"},
            {"from": "gpt", "value": "None."},
        ]
    }
    files = {f"{n}.{'png' if n % 3 else 'jpg'}": png((20 * n, 0, 0)) for n in (10, *range(10), 11)}
    content = {"json": json.dumps(record).encode(), **files}
    write_shard(tmp_path / "a.tar", {"x": content})
    source = open_source(DataConfig(str(tmp_path), "webdataset", streaming=is_streaming))
    sample = source.row_sample(next(iter(source.rows))) if is_streaming else source[0]
    opened = [open_image(image, None) for image in sample.images]
    assert [image.getpixel((0, 0)) for image in opened] == [(20 * n, 0, 0) for n in range(12)]


def write_files(path: Path, content: bytes, names: str) -> None:
    """All of one content, in this order."""
    with tarfile.open(path, "w") as tar:
        for name in names.split():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_a_file_that_is_twice_in_a_shard(tmp_path: Path) -> None:
    """Which of the two the sample has cannot be told; a stream goes on with the next sample."""
    record = json.dumps(LLAVA[2]).encode()
    write_files(tmp_path / "a.tar", record, "x.json x.jpg x.jpg y.json z.jpg")
    with pytest.raises(ValueError, match=r"a\.tar: x: expected one \.jpg file, got another one"):
        open_source(DataConfig(str(tmp_path), "webdataset"))
    source = open_source(DataConfig(str(tmp_path), "webdataset", streaming=True))
    x, y, z = source.rows
    with pytest.raises(BadSampleError, match=r"expected one \.jpg file, got another one"):
        source.row_sample(x)
    assert plain(source.row_sample(y)) == (MESSAGES[2], [])
    with pytest.raises(BadSampleError, match=r"expected a \.json file"):
        source.row_sample(z)
    assert [source.row_where(row) for row in (x, z)] == [f"{tmp_path}/a.tar: {n}" for n in "xz"]


def test_files_that_are_not_read_may_be_twice(tmp_path: Path) -> None:
    write_files(tmp_path / "a.tar", json.dumps(LLAVA[2]).encode(), "x.json x.txt x.txt x.TXT")
    indexed = open_source(DataConfig(str(tmp_path), "webdataset"))
    source = open_source(DataConfig(str(tmp_path), "webdataset", streaming=True))
    [row] = source.rows
    assert plain(indexed[0]) == plain(source.row_sample(row)) == (MESSAGES[2], [])


def test_a_sample_in_two_places_of_a_shard(tmp_path: Path) -> None:
    """A stream has it once: it cannot tell that more of it is to come."""
    write_files(tmp_path / "a.tar", json.dumps(LLAVA[2]).encode(), "x.json y.json x.json")
    with pytest.raises(ValueError, match=r"a\.tar: x: expected one \.json file, got another one"):
        open_source(DataConfig(str(tmp_path), "webdataset"))
    source = open_source(DataConfig(str(tmp_path), "webdataset", streaming=True))
    *good, again = source.rows
    assert [plain(source.row_sample(row)) for row in good] == [(MESSAGES[2], [])] * 2
    with pytest.raises(BadSampleError, match="next to each other, got more of it later in its sh"):
        source.row_sample(again)


def test_a_bucket_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec says which; it is an error of the settings, in one line."""
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3://bucket/a\.parquet: .*s3fs"):
        open_source(DataConfig("s3://bucket/a.parquet", "messages"))


def test_shards_that_are_none(tmp_path: Path) -> None:
    def refuse(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_source(DataConfig(str(tmp_path), "webdataset"))

    refuse(r"expected \.tar files, got none")
    write_shard(tmp_path / "a.tar", {"1": {"png": b"x"}})
    refuse(r"a\.tar: 1: expected a \.json file")
    (tmp_path / "a.tar").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    refuse(r"a\.tar: expected an uncompressed \.tar")
    write_shard(tmp_path / "a.tar", {"1": {"json": b"{"}, "2": {"json": b"[]"}})
    source = open_source(DataConfig(str(tmp_path), "webdataset"))
    for number, message in enumerate(("not valid JSON", "expected an object, got a list")):
        with pytest.raises(BadSampleError, match=message):
            source[number]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("no object", "expected an object, got a str"),
        ({}, "conversations: expected a list of turns"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\]: expected"),
        ({"conversations": [{"from": "human", "value": 3}]}, r"conversations\[0\]: expected"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "expected an answer"),
        ({**LLAVA[0], "image": ["1.jpg", "2.jpg"]}, "for each of 1 placeholders, got 2 images"),
        ({**LLAVA[1], "image": None}, "for each of 2 placeholders, got 0 images"),
        ({**LLAVA[0], "image": [3]}, "image: expected a path"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "d.json", [LLAVA[0], record], "lines")
    source = open_source(DataConfig(str(path), "llava"))
    with pytest.raises(BadSampleError, match=message):
        source[1]
    assert source.where(1) == f"{path}:2"
    assert plain(source[0]) == (MESSAGES[0], PATHS[0])


def test_the_page_s_samples(tmp_path: Path) -> None:
    page = read_page("training.md", (ROOT / "docs" / "training.md").read_text())
    llava, messages = (json.loads(x.text) for x in page.blocks if x.language == "json")
    found = []
    for name, record in (("llava", llava), ("messages", messages)):
        path = write(tmp_path / f"{name}.json", [record], "list")
        found.append(plain(open_source(DataConfig(str(path), name))[0]))
    question = user(PICTURE, text("What is it?"))
    assert found == [([question, assistant("A cat.")], ["cat.jpg"])] * 2


def test_a_bad_line_is_one_sample(tmp_path: Path) -> None:
    good = json.dumps(LLAVA[2])
    path = tmp_path / "d.jsonl"
    path.write_bytes(f"{good}\n{{bad\n\n{good}\n".encode() + b"\xff\xfe\n" + good.encode())
    source = open_source(DataConfig(str(path), "llava"))
    assert [source.where(i) for i in range(5)] == [f"{path}:{line}" for line in (1, 2, 4, 5, 6)]
    for number in (1, 3):
        with pytest.raises(BadSampleError, match="not valid JSON"):
            source[number]
    assert plain(source[4]) == (MESSAGES[2], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{}, {]", r"d\.json:1: not valid JSON"),
        ('[{},\n{"a": 1', r"d\.json:2: not valid JSON"),
        ("[{}\n", r"d\.json:2: expected \], got its end"),
        ("[" * 100_000, r"d\.json:1: nested too deeply"),
        (
            '{"data": [\n{},\n{}]}',
            r"d\.json: expected a list of .*; got an object over several lines",
        ),
        (
            '{"data": [{}, {}]}',
            r"d\.json:1\[0\]: expected a list .*one that cannot be used: conversa",
        ),
        ("3", "expected a list of samples"),
        ("[]", "expected samples, got none"),
        ("", "expected a list of samples"),
    ],
)
def test_a_bad_list_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(str(tmp_path / "d.json"), "llava"))


def test_lines_of_which_none_is_a_sample(tmp_path: Path) -> None:
    """As of an indented object in a .jsonl file."""
    (tmp_path / "d.jsonl").write_text(json.dumps({"data": LLAVA}, indent=1))
    with pytest.raises(ValueError, match=r"d\.jsonl: expected .*; no line is an object of JSON"):
        open_source(DataConfig(str(tmp_path / "d.jsonl"), "llava"))


def test_a_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record's bytes are those of the file, wherever a piece ends."""
    records = [{"n": n, "text": "ä€" * (n % 7), "more": [n, {"x": None}]} for n in range(60)]
    path = tmp_path / "d.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    content = path.read_bytes()
    for piece in (1, 2, 7, 64, 10_000):
        monkeypatch.setattr("prereg_kernels.train.source._PIECE", piece)
        found = list(read_records(path))
        assert [json.loads(content[a : a + n]) for _, a, n, _ in found] == records
        assert [line for line, *_ in found] == [
            1 + content[:a].count(b"\n") for _, a, _, _ in found
        ]


def test_a_folder_of_files(tmp_path: Path) -> None:
    write(tmp_path / "b.json", LLAVA[:1], "list")
    write(tmp_path / "a.json", LLAVA[1:], "lines")
    source = open_source(DataConfig(str(tmp_path), "llava"))
    assert [plain(source[i])[1] for i in range(3)] == [PATHS[1], PATHS[2], PATHS[0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "absent.json", "format": "llava"}, "absent.json: expected a file or a folder"),
        ({"path": ".", "format": "llava"}, r"expected \.json or \.jsonl files, got none"),
        ({"path": "d.json", "format": "coco"}, "format: expected one of .*llava.*; got coco"),
        ({"path": "d.json", "format": "llava", "images": "no"}, "images: expected a folder"),
    ],
)
def test_settings_that_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if settings["path"] == "d.json":
        write(tmp_path / "d.json", LLAVA, "list")
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(**settings))


def test_formats_are_the_modules() -> None:
    assert {"llava", "messages"} <= set(FORMATS)
