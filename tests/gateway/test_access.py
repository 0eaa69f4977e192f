from __future__ import annotations

import hashlib
import hmac
import re

import pytest

from forebay.access import Access, hash_of, new_key
from forebay.api import Identity, Unauthorized
from forebay.config import Key

KEYS = {
    "ops": Key(hash=hash_of("fb-ops"), tenant="platform"),
    "ci": Key(hash=hash_of("fb-ci").replace("sha256:", "").upper().join(["sha256:", ""])),
}


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer fb-ops"}, "ops"),
        ({"authorization": "bearer   fb-ops "}, "ops"),
        ({"x-api-key": "fb-ci"}, "ci"),
        ({"authorization": "Basic abc", "x-api-key": "fb-ci"}, "ci"),
        ({"authorization": "Bearer ", "x-api-key": "fb-ci"}, "ci"),
        ({"authorization": "Bearer fb-ops", "x-api-key": "wrong"}, "ops"),
    ],
)
def test_a_known_key_is_its_owner(headers: dict[str, str], name: str) -> None:
    assert Access(KEYS).identify(headers) == Identity(key=name, tenant=KEYS[name].tenant)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "fb-ops"},
        {"authorization": "Basic fb-ops"},
        {"authorization": "Bearer"},
        {"x-api-key": " "},
    ],
)
def test_without_a_key_the_answer_says_how_to_send_one(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthorized, match="Authorization: Bearer KEY") as caught:
        Access(KEYS).identify(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


@pytest.mark.parametrize("key", ["fb-op", "fb-ops2", "FB-OPS", "\udcff\xff", hash_of("fb-ops")])
def test_a_wrong_key_is_refused_and_never_repeated(key: str) -> None:
    with pytest.raises(Unauthorized) as caught:
        Access(KEYS).identify({"x-api-key": key})
    assert key not in caught.value.message


def test_a_wrong_bearer_key_is_not_rescued_by_another_header() -> None:
    with pytest.raises(Unauthorized):
        Access(KEYS).identify({"authorization": "Bearer wrong", "x-api-key": "fb-ops"})


def test_without_keys_everyone_is_anonymous() -> None:
    assert Access({}).identify({"authorization": "Bearer anything"}) == Identity()


def test_every_hash_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    original = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(a)
        return original(a, b)

    monkeypatch.setattr("forebay.access.hmac.compare_digest", counting)
    Access(KEYS).identify({"x-api-key": "fb-ops"})
    assert compared == [hashlib.sha256(key).digest() for key in (b"fb-ops", b"fb-ci")]


def test_new_keys_are_long_and_differ() -> None:
    first, second = new_key(), new_key()
    assert re.fullmatch(r"fb-[A-Za-z0-9_-]{43}", first)
    assert first != second
    assert hash_of(first) == f"sha256:{hashlib.sha256(first.encode()).hexdigest()}"
