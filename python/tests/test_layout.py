"""The format, against the images and vectors that the Go package wrote."""

from __future__ import annotations

import json
import pathlib
import random

import pytest

from conftest import ROOT
from onecopy import _layout as L
from onecopy import _manifest as M
from onecopy import _names as N
from onecopy import _table as T
from onecopy import errors

GOLDEN = ROOT / "testdata" / "layout" / "v1"


def table(b: bytes) -> T.Table:
    return T.Table(memoryview(bytearray(b)), T.read_identity(b, len(b)))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.bin")), ids=lambda p: p.stem)
def test_golden_tables(path: pathlib.Path) -> None:
    b, want = path.read_bytes(), json.loads(path.with_suffix(".json").read_text())
    if "error" in want:
        kind = errors.VersionMismatch if "version" in want["error"] else errors.Corrupt
        with pytest.raises(kind):
            table(b)
        return
    t = table(b)
    assert f"{t.ident.epoch:016x}" == want["identity"]["epoch"]
    assert t.generation == want.get("generation", 0)
    for name, v in want.get("counters", {}).items():
        assert t.q[getattr(L, "HEADER_COUNT_" + name.upper()) // 8] == v
    slots = {s["slot"]: s for s in want.get("slots", [])}
    for slot in range(t.slots):
        if slot not in slots:
            continue
        s = slots[slot]
        assert f"{t.word(slot):016x}" == s["word"]
        if "key" in s:
            assert (t.key(slot) or "") == s["key"]
        for name, v in s.get("hints", {}).items():
            assert t.hint(slot, getattr(L, "SLOT_" + name.upper()) // 8) == v
    assert [f"slot {slot}: {text}" for slot, text in t.problems()] == (want.get("problems") or [])
    for s in slots.values():
        if s["state"] in ("ready", "loading", "evicting") and not want.get("problems"):
            f = t.lookup(s["key"])
            assert f is not None and f.slot == s["slot"]


@pytest.mark.parametrize("path", sorted((GOLDEN / "manifests").glob("*.json")), ids=lambda p: p.stem)
def test_golden_manifests(path: pathlib.Path) -> None:
    b, kind = path.read_bytes(), path.stem.partition("-")[0]
    if kind == "ok":
        m = M.decode(b)
        assert M.decode(M.encode(m)) == m
    else:
        with pytest.raises(errors.VersionMismatch if kind == "version" else errors.Corrupt):
            M.decode(b)


def test_golden_keys() -> None:
    for k in json.loads((GOLDEN / "keys.json").read_text()):
        h = T.hash_key(k["key"].encode())
        assert f"{h:016x}" == k["xxh64"]
        assert f"{h >> 48:04x}" == k["tag"]
        assert h & 4095 == k["home_of_4096"]
        assert L.STRIPE_LOCK % T.stripe(k["key"]) == k["load_lock"]
        assert N.safe_name(k["key"]) == k["name"]


def test_golden_digests() -> None:
    m = M.decode((GOLDEN / "manifests" / "ok-example.json").read_bytes())
    b = (GOLDEN / "example.digests").read_bytes()
    try:
        sums = M.decode_digests(b, m)
    except errors.Corrupt:
        pytest.skip("the example digests belong to another manifest")
    assert M.encode_digests(m, b"".join(sums)) == b


def test_digests_are_validated() -> None:
    m = M.decode((GOLDEN / "manifests" / "ok-example.json").read_bytes())
    good = M.encode_digests(m, bytes(range(48)))
    assert b"".join(M.decode_digests(good, m)) == bytes(range(48))
    for i in range(len(good)):
        bad = bytearray(good)
        bad[i] ^= 1
        with pytest.raises((errors.Corrupt, errors.VersionMismatch)):
            M.decode_digests(bytes(bad), m)
    for n in (0, 63, len(good) - 1):
        with pytest.raises(errors.Corrupt):
            M.decode_digests(good[:n], m)


def test_fields_are_those_of_the_go_package() -> None:
    for line in (GOLDEN / "fields.tsv").read_text().splitlines()[1:]:
        struct, offset, _, name = line.split("\t")
        if name != "unused":
            assert getattr(L, f"{struct}_{name}".upper()) == int(offset)


@pytest.mark.parametrize(
    "json_text",
    [
        "",
        "[]",
        "{",
        '{"schema": NaN}',
        '{"schema": true}',
        '{"schema": 1, "key": 5}',
        "[" * 100_000,
        '{"schema":1,"key":"\\ud800"}',
    ],
)
def test_manifest_bad_bytes(json_text: str) -> None:
    with pytest.raises((errors.Corrupt, errors.VersionMismatch)):
        M.decode(json_text.encode())


def test_manifest_bad_members() -> None:
    good = json.loads((GOLDEN / "manifests" / "ok-example.json").read_text())
    for name, v in [
        ("fill", 3), ("fill", {"copied": "x"}), ("origin", []), ("origin", {"kind": "path", "environment": {"a": 1}}),
        ("loaded_at", "yesterday"), ("load_seconds", "x"), ("files", ["x"]), ("bytes", 1 << 70), ("name", 3),
    ]:  # fmt: skip
        with pytest.raises(errors.Corrupt):
            M.decode(json.dumps({**good, name: v}).encode())
    with pytest.raises(errors.Corrupt):
        M.decode(b" " * (L.MAX_MANIFEST + 1))


@pytest.mark.parametrize("key", ["", "x" * 256, "é" * 128, "a\nb", "a\x7fb", "a\x85", "\ud800", 5, None, b"k", ["k"]])
def test_bad_keys(key: object) -> None:
    with pytest.raises(errors.InvalidKey):
        N.check_key(key)


@pytest.mark.parametrize(
    "path", ["", "/a", "a//b", "../a", "a/..", ".", "a\\b", "a\0b", "x" * 1025, "a/" + "x" * 256, "a/", "\ud800"]
)
def test_bad_paths(path: str) -> None:
    with pytest.raises(errors.InvalidPath):
        N.check_path(path)


@pytest.mark.parametrize("paths", [["a", "a"], ["a", "a/b"], ["a/b", "a"], ["a/b/c", "a/b"]])
def test_bad_sets_of_paths(paths: list[str]) -> None:
    with pytest.raises(errors.InvalidPath):
        N.check_paths(paths)


@pytest.mark.parametrize(
    "name", ["", "x", "0123456789abcdef-", "0123456789abcdef-01", "0123456789ABCDEF-1", "0123456789abcdef-1.x",
             f"0123456789abcdef-{1 << 56}", "0123456789abcdef_1", "0123456789abcdef-١"],
)  # fmt: skip
def test_names_that_are_no_generation(name: str) -> None:
    assert N.parse_gen_name(name) is None


def test_generation_names() -> None:
    for ext in ("", ".manifest", ".digests"):
        assert N.parse_gen_name(N.gen_name(0xABC, 42) + ext) == (0xABC, 42, ext)


def editor(slots: int = 16) -> T.Editor:
    b = bytearray(T.new_image(T.Identity(7, bytes(16), slots, 0), 0))
    return T.Editor(memoryview(b), T.read_identity(bytes(b), len(b)))


def publish(e: T.Editor, slot: int, key: str) -> None:
    gen = e.next_generation()
    old = e.key(slot)
    if old is not None:
        e.index_delete(slot, old)
    e.set_key(slot, key)
    assert e.index_insert(slot, key)
    w = e.word(slot)
    assert e.change(slot, w, T.make_word(L.LOADING, gen))
    assert e.change(slot, T.make_word(L.LOADING, gen), T.make_word(L.READY, gen))


def drop(e: T.Editor, slot: int) -> None:
    w, key = e.word(slot), e.key(slot)
    assert key is not None and e.change(slot, w, T.make_word(L.FREE, T.gen_of(w)))
    e.index_delete(slot, key)


def test_editor_keeps_the_index_true() -> None:
    rng, e, here = random.Random(1), editor(), {}
    for i in range(2000):
        slot = rng.randrange(e.slots)
        if slot in here:
            drop(e, slot)
            del here[slot]
        else:
            here[slot] = f"key-{i % 200}-{slot}"
            publish(e, slot, here[slot])
        assert e.problems() == []
    for slot, key in here.items():
        f = e.lookup(key)
        assert f is not None and f.slot == slot
        assert e.scan(key) == f
    assert e.lookup("absent") is None and e.scan("absent") is None


def test_editor_refuses_what_is_no_transition() -> None:
    e = editor()
    assert not e.change(0, e.word(0), T.make_word(L.EVICTING, 1))
    assert not e.change(0, T.make_word(L.LOADING, 1), T.make_word(L.READY, 1))
    e.q[L.HEADER_GENERATION // 8] = L.MAX_GEN
    assert e.next_generation() == 0


def test_repair_index_after_hostile_bytes() -> None:
    for fill in (0, 0xFFFF, 0x12340003, 0xFFFFFFFF):
        e = editor()
        for slot in range(10):
            publish(e, slot, f"k{slot}")
        for pos in range(e.mask + 1):
            e.index[pos] = fill
        e.lookup("k3")  # ends
        assert e.repair_index() > 0
        assert e.problems() == []
        assert all(e.lookup(f"k{slot}") for slot in range(10))
    full = editor()
    for pos in range(full.mask + 1):
        full.index[pos] = 0x12340001
    assert not full.index_insert(0, "x")
    full.index_delete(0, "x")


def test_insane_slots_are_named_and_reset() -> None:
    e = editor()
    publish(e, 0, "a")
    for word in (9 << 56 | 1, T.make_word(L.READY, 99), T.make_word(L.READY, 0)):
        e.q[e._base] = word
        assert e.insane(0)
        assert e.problems()
    e.q[e._base] = T.make_word(L.READY, 1)
    e.q[e._base + L.SLOT_KEY_LEN // 8] = 300
    assert e.insane(0)
    e.reset(0)
    e.repair_index()
    assert e.problems() == []


def test_budget_defaults() -> None:
    e = editor()
    assert e.budget() == (0, L.DEFAULT_BUDGET_PPM)
    e.q[L.HEADER_BUDGET_PPM // 8] = 5_000_000
    assert e.budget()[1] == L.DEFAULT_BUDGET_PPM


def test_any_single_flip_of_the_header_is_found() -> None:
    b = (GOLDEN / "models-16.bin").read_bytes()
    for i in range(L.HEADER_CHECKSUM + 8):
        bad = bytearray(b)
        bad[i] ^= 0x40
        with pytest.raises((errors.Corrupt, errors.VersionMismatch)):
            T.read_identity(bytes(bad), len(bad))
