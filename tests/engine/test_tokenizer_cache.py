"""The quicker form of a large tokenizer.json is the same tokenizer, and is made once."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from forebay_engine import tokenizer_cache
from forebay_engine.tokenizer import Tokenizer

TEXTS = ["", "hello", "lo he\n\nllo", "<end>hel<end>", "\N{SNOWMAN} hé", "zz" * 40]


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tokenizer_cache, "_WORTH", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "forebay" / "tokenizers"


def backend(*more: tuple[str, str]) -> Backend:
    merges = [("l", "o"), ("h", "e"), ("\n", "\n"), ("z", "z"), ("zz", "zz"), *more]
    letters = [*"zyohle\n \N{SNOWMAN}é", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    found = Backend(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.NFC()
    found.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    found.add_special_tokens([AddedToken("<end>", special=True)])
    return found


def saved(found: Backend, folder: Path) -> Path:
    path = folder / "tokenizer.json"
    found.save(str(path))
    return path


def same(one: Backend, other: Backend) -> bool:
    ids = [[part.encode(text).ids for text in TEXTS] for part in (one, other)]
    assert [one.decode(each) for each in ids[0]] == [other.decode(each) for each in ids[1]]
    return ids[0] == ids[1] and one.to_str() == other.to_str()


def test_it_is_written_in_another_form_and_read_as_the_same(
    tmp_path: Path, small_ones_too: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = backend()
    path = saved(original, tmp_path)
    assert same(tokenizer_cache.read(path), original)
    (cached,) = small_ones_too.iterdir()
    model = json.loads(cached.read_text())["model"]
    assert model["merges"][:3] == ["l o", "h e", "\n \n"]
    assert list(model["vocab"]) == sorted(model["vocab"])
    # From now on it is what is read.
    read: list[str] = []
    from_file = Backend.from_file
    monkeypatch.setattr(
        tokenizer_cache,
        "Backend",
        type("Spy", (), {"from_file": lambda name: read.append(name) or from_file(name)}),  # type: ignore[func-returns-value]
    )
    assert same(tokenizer_cache.read(path), original)
    assert read == [str(cached)]


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path, small_ones_too: Path) -> None:
    path = saved(backend(), tmp_path)
    tokenizer_cache.read(path)
    other = backend(("he", "lo"))
    saved(other, tmp_path)
    assert same(tokenizer_cache.read(path), other)
    assert len(list(small_ones_too.iterdir())) == 2


def test_tokens_with_blanks_can_not_be_written_so(tmp_path: Path, small_ones_too: Path) -> None:
    original = backend((" ", "h"))
    path = saved(original, tmp_path)
    assert same(tokenizer_cache.read(path), original)
    (cached,) = small_ones_too.iterdir()
    assert cached.read_bytes() == path.read_bytes()
    assert same(tokenizer_cache.read(path), original)


def test_other_models_stay_as_they_are(tmp_path: Path, small_ones_too: Path) -> None:
    path = saved(Backend(models.WordLevel({"hello": 0, "a": 1}, unk_token="a")), tmp_path)
    assert tokenizer_cache.read(path).encode("hello").ids == [0]
    (cached,) = small_ones_too.iterdir()
    assert cached.read_bytes() == path.read_bytes()


def test_what_would_be_another_tokenizer_is_not_used(
    tmp_path: Path, small_ones_too: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(backend(), tmp_path)
    wrong = backend(("he", "lo")).to_str().encode()
    monkeypatch.setattr(tokenizer_cache, "rewritten", lambda text: wrong)
    assert same(tokenizer_cache.read(path), backend())
    assert same(tokenizer_cache.read(path), backend())


def test_without_a_cache_each_start_reads_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    path = saved(backend(), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert same(tokenizer_cache.read(path), backend())
    assert "there is no cache" in caplog.text


def test_small_files_need_none(
    tmp_path: Path, small_ones_too: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_cache, "_WORTH", 1 << 20)
    assert Tokenizer.from_file(saved(backend(), tmp_path)).encode("hello", special=False)
    assert not small_ones_too.exists()


def test_the_demo_models_is_the_same(demo_model: Path) -> None:
    text = (demo_model / "tokenizer.json").read_bytes()
    quicker = tokenizer_cache.rewritten(text)
    assert len(quicker) < len(text) / 2
    original, found = Backend.from_buffer(text), Backend.from_buffer(quicker)
    prose = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()
    ids = original.encode(prose).ids
    assert found.encode(prose).ids == ids
    assert found.decode(ids) == original.decode(ids)
    assert found.to_str() == original.to_str()
