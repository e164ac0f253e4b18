"""The header table: its image, reading it, and changing it under T.

A :class:`Table` looks at any buffer. Reading without T goes through os.pread, into
a private copy, never through a mapping: whoever may write the table may truncate
it, a mapped load is then SIGBUS, which Python cannot catch, and pread is a short
read. (A copy made by pread can tear within a word. That is harmless: a word that
was never written names a generation that does not exist or is another key's, and
every reader looks at the word again before it believes anything.)

Only while T is held is the table mapped, writable, because a change must be one
aligned 8-byte store: memoryview.cast("Q") stores so, os.pwrite and struct do not
promise it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import xxhash

from . import _layout as L
from ._names import is_control, quote
from .errors import Corrupt, VersionMismatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NamedTuple
else:
    from ._tuples import NamedTuple

_WORDS = L.SLOT_SIZE // 8
_GEN_MASK = L.MAX_GEN
_KEY = L.SLOT_KEY // 8
_KEY_WORDS = (L.MAX_KEY + 1) // 8

# Hints and counters by the index of their word.
BYTES, TTL, PIN = L.SLOT_BYTES // 8, L.SLOT_TTL // 8, L.SLOT_PIN // 8
LAST_ATTACH, LAST_RELEASE, IDLE_SINCE = L.SLOT_LAST_ATTACH // 8, L.SLOT_LAST_RELEASE // 8, L.SLOT_IDLE_SINCE // 8
RESERVED, DEATHS, RETRY_AFTER = L.SLOT_RESERVED // 8, L.SLOT_DEATHS // 8, L.SLOT_RETRY_AFTER // 8
ATTACHES, LOADER_PID = L.SLOT_ATTACHES // 8, L.SLOT_LOADER_PID // 8
LOAD_START, PREVIOUS, PROMISED = L.SLOT_LOAD_START // 8, L.SLOT_PREVIOUS // 8, L.SLOT_PROMISED // 8

STATES = ("free", "loading", "ready", "evicting")

# All changes of a word that any program may make: from, to, new generation.
_ALLOWED = {
    (L.FREE, L.LOADING, True), (L.LOADING, L.READY, False), (L.LOADING, L.FREE, False),
    (L.READY, L.READY, True), (L.FREE, L.READY, True), (L.READY, L.EVICTING, False),
    (L.EVICTING, L.FREE, False), (L.EVICTING, L.READY, False), (L.READY, L.FREE, False),
}  # fmt: skip


def make_word(state: int, gen: int) -> int:
    """A slot's word: state and generation, changed together or not at all."""
    return state << 56 | gen & _GEN_MASK


def state_of(word: int) -> int:
    """May be no state at all when the bytes are hostile."""
    return word >> 56


def gen_of(word: int) -> int:
    return word & _GEN_MASK


def hash_key(key: bytes) -> int:
    """Places a key in the index and on the load locks."""
    return xxhash.xxh64_intdigest(key)


def stripe(key: str) -> int:
    """Number of a key's load lock."""
    return (hash_key(key.encode()) >> 32) % L.STRIPES


def index_entries(slots: int) -> int:
    n = 1
    while n < 4 * slots:
        n *= 2
    return n


def slots_offset(slots: int) -> int:
    n = L.HEADER_SIZE + 4 * index_entries(slots)
    return (n + 4095) // 4096 * 4096


def table_size(slots: int) -> int:
    """Bytes of the file of a table."""
    return slots_offset(slots) + slots * L.SLOT_SIZE


class Identity(NamedTuple):
    """What the checksummed part of the header says."""

    epoch: int
    boot_id: bytes
    slots: int
    created: int


def read_identity(header: bytes, length: int) -> Identity:
    """Validates the header of a table whose file has length bytes."""
    if length < L.HEADER_SIZE or len(header) < L.HEADER_CHECKSUM + 8:
        raise Corrupt(f"damaged: not a valid table: {length} bytes are less than a header")

    def get(off: int) -> int:
        return int.from_bytes(header[off : off + 8], "little")

    if get(L.HEADER_MAGIC) != L.MAGIC:
        raise Corrupt(f"damaged: not a valid table: magic {get(L.HEADER_MAGIC):#x}, want {L.MAGIC:#x}")
    if get(L.HEADER_VERSION) != L.VERSION:
        raise VersionMismatch(
            f"another layout version: version {get(L.HEADER_VERSION)}, this program knows {L.VERSION}"
        )
    order = struct.unpack_from("=Q", header, L.HEADER_BYTE_ORDER)[0]
    if order != L.BYTE_ORDER:
        raise VersionMismatch(f"another layout version: byte-order mark {order:#x}, want {L.BYTE_ORDER:#x}")
    if get(L.HEADER_CHECKSUM) != xxhash.xxh64_intdigest(header[: L.HEADER_CHECKSUM]):
        raise Corrupt(f"damaged: not a valid table: header checksum {get(L.HEADER_CHECKSUM):#x} does not match")
    n = get(L.HEADER_SLOTS)
    if not L.MIN_SLOTS <= n <= L.MAX_SLOTS:
        raise Corrupt(f"damaged: not a valid table: {n} slots, want {L.MIN_SLOTS} to {L.MAX_SLOTS}")
    if get(L.HEADER_EPOCH) == 0:
        raise Corrupt("damaged: not a valid table: epoch 0")
    if length != table_size(n):
        raise Corrupt(f"damaged: not a valid table: {length} bytes, but {n} slots need {table_size(n)}")
    shape = (get(L.HEADER_INDEX_ENTRIES), get(L.HEADER_STRIPES), get(L.HEADER_SLOT_SIZE))
    if shape != (index_entries(n), L.STRIPES, L.SLOT_SIZE):
        raise Corrupt(
            f"damaged: not a valid table: index {shape[0]}, stripes {shape[1]},"
            f" slot size {shape[2]} do not belong to version {L.VERSION}"
        )
    boot = header[L.HEADER_BOOT_ID : L.HEADER_BOOT_ID + 16]
    return Identity(get(L.HEADER_EPOCH), bytes(boot), n, get(L.HEADER_CREATED))


def new_image(ident: Identity, budget: int) -> bytes:
    """The bytes of a fresh table."""
    b = bytearray(table_size(ident.slots))
    for off, v in (
        (L.HEADER_MAGIC, L.MAGIC), (L.HEADER_VERSION, L.VERSION), (L.HEADER_BYTE_ORDER, L.BYTE_ORDER),
        (L.HEADER_EPOCH, ident.epoch), (L.HEADER_SLOTS, ident.slots),
        (L.HEADER_INDEX_ENTRIES, index_entries(ident.slots)), (L.HEADER_STRIPES, L.STRIPES),
        (L.HEADER_SLOT_SIZE, L.SLOT_SIZE), (L.HEADER_CREATED, ident.created), (L.HEADER_BUDGET, budget),
    ):  # fmt: skip
        struct.pack_into("<Q", b, off, v)
    b[L.HEADER_BOOT_ID : L.HEADER_BOOT_ID + 16] = ident.boot_id
    struct.pack_into("<Q", b, L.HEADER_CHECKSUM, xxhash.xxh64_intdigest(bytes(b[: L.HEADER_CHECKSUM])))
    return bytes(b)


class Found(NamedTuple):
    slot: int
    word: int


def valid_key_bytes(b: bytes) -> str | None:
    """The key's text, or None if the bytes are no key."""
    try:
        s = b.decode()
    except UnicodeDecodeError:
        return None
    return None if any(is_control(c) for c in s) else s


class Table:
    """A table in a buffer: a copy, or the mapping of a holder of T."""

    def __init__(self, buf: memoryview, ident: Identity) -> None:
        self.ident, self.slots = ident, ident.slots
        n = index_entries(ident.slots)
        self.mask = n - 1
        self.q = buf.cast("Q")
        self.index = buf[L.HEADER_SIZE : L.HEADER_SIZE + 4 * n].cast("I")
        self._base = slots_offset(ident.slots) // 8

    def release(self) -> None:
        """Ends the views, so that the buffer may go."""
        self.q.release()
        self.index.release()

    @property
    def generation(self) -> int:
        """The last generation given out."""
        return self.q[L.HEADER_GENERATION // 8]

    def budget(self) -> tuple[int, int]:
        """Bytes (0: not set), and the share of the tmpfs in millionths that counts then."""
        ppm = self.q[L.HEADER_BUDGET_PPM // 8]
        if not 0 < ppm <= 1_000_000:
            ppm = L.DEFAULT_BUDGET_PPM
        return self.q[L.HEADER_BUDGET // 8], ppm

    def word(self, slot: int) -> int:
        return self.q[self._base + slot * _WORDS]

    def words(self) -> list[int]:
        """The words of all slots."""
        return self.q[self._base :: _WORDS].tolist()

    def hint(self, slot: int, h: int) -> int:
        return self.q[self._base + slot * _WORDS + h]

    def hints(self, h: int) -> list[int]:
        """One hint of all slots."""
        return self.q[self._base + h :: _WORDS].tolist()

    def key_bytes(self, slot: int) -> bytes:
        at = self._base + slot * _WORDS
        n = self.q[at + L.SLOT_KEY_LEN // 8]
        if not 0 < n <= L.MAX_KEY:
            return b""
        return self.q[at + _KEY : at + _KEY + _KEY_WORDS].tobytes()[:n]

    def key(self, slot: int) -> str | None:
        """None when the bytes are no valid key, as in a slot never used."""
        b = self.key_bytes(slot)
        return valid_key_bytes(b) if b else None

    def key_is(self, slot: int, key: str) -> bool:
        """Whether the slot names key, in whatever state."""
        return self.key_bytes(slot) == key.encode()

    def lookup(self, key: str) -> Found | None:
        """The slot that names key and is not FREE, by the index."""
        kb = key.encode()
        h = hash_key(kb)
        tag, pos = h >> 48, h & self.mask
        for _ in range(self.mask + 1):
            e = self.index[pos]
            if e == 0:
                return None
            slot = (e & 0xFFFF) - 1
            if e >> 16 == tag and 0 <= slot < self.slots:
                w = self.word(slot)
                if state_of(w) != L.FREE and self.key_bytes(slot) == kb:
                    return Found(slot, w)
            pos = (pos + 1) & self.mask
        return None

    def scan(self, key: str) -> Found | None:
        """Lookup without the index; else the FREE slot that named key last."""
        kb, best = key.encode(), None
        for slot, n in enumerate(self.q[self._base + L.SLOT_KEY_LEN // 8 :: _WORDS].tolist()):
            if n != len(kb) or self.key_bytes(slot) != kb:
                continue
            w = self.word(slot)
            if state_of(w) != L.FREE:
                return Found(slot, w)
            if best is None or gen_of(w) > gen_of(best.word):
                best = Found(slot, w)
        return best

    def insane(self, slot: int) -> str | None:
        """Why a slot's bytes make no sense on their own, or None."""
        w = self.word(slot)
        state, gen = state_of(w), gen_of(w)
        if state > L.EVICTING:
            return f"state {state} is unknown"
        if gen > self.generation:
            return f"generation {gen} was never given out (last {self.generation})"
        if state == L.FREE:
            return None
        if gen == 0:
            return f"{STATES[state]} without a generation"
        if self.key(slot) is None:
            return f"{STATES[state]} without a valid key"
        return None

    def in_use(self) -> Iterator[tuple[int, int]]:
        """Slot and word of all slots that are not FREE."""
        for slot, w in enumerate(self.words()):
            if state_of(w) != L.FREE:
                yield slot, w

    def problems(self) -> list[tuple[int, str]]:
        """Everything wrong with the table: slot (-1: header or index) and text."""
        out: list[tuple[int, str]] = []
        keys: dict[str, int] = {}
        gens: dict[int, int] = {}
        for slot in range(self.slots):
            why = self.insane(slot)
            if why is not None:
                out.append((slot, why))
                continue
            w = self.word(slot)
            if state_of(w) == L.FREE:
                continue
            key = self.key(slot) or ""
            if key in keys:
                out.append((slot, f"key {quote(key)} is also in slot {keys[key]}"))
            if gen_of(w) in gens:
                out.append((slot, f"generation {gen_of(w)} is also in slot {gens[gen_of(w)]}"))
            keys[key], gens[gen_of(w)] = slot, slot
        stale, missing = self.audit_index()
        out += [(slot, "the index does not lead to it") for slot in missing]
        out += [(-1, f"index entry {p} ({self.index[p]:#010x}) leads to no slot in use") for p in stale]
        return out

    def audit_index(self) -> tuple[list[int], list[int]]:
        """Positions of entries by which no slot is found, and slots that no entry leads to."""
        hashes: dict[int, int] = {}
        for slot, _ in self.in_use():
            if self.key(slot) is not None:
                hashes[slot] = hash_key(self.key_bytes(slot))
        wanted = set(hashes)
        entries, stale = self.index.tolist(), []
        run = 0  # entries before pos, back to the next empty one
        while run <= self.mask and entries[self.mask - run] != 0:
            run += 1
        for pos, e in enumerate(entries):
            if e == 0:
                run = 0
                continue
            slot = (e & 0xFFFF) - 1
            if e != L.INDEX_DELETED:
                h = hashes.get(slot, 0)
                if slot not in wanted or e >> 16 != h >> 48 or (pos - h) & self.mask > run:
                    stale.append(pos)
                else:
                    wanted.discard(slot)
            run += 1
        return stale, sorted(wanted)


class Editor(Table):
    """Changes a table. It exists only while its owner holds T."""

    def next_generation(self) -> int:
        """A generation that was never used, or 0 when all are spent."""
        g = self.generation + 1
        if g > L.MAX_GEN:
            return 0
        self.q[L.HEADER_GENERATION // 8] = g
        return g

    def set_generation(self, g: int) -> None:
        """For who mends the counter: no generation above g may exist."""
        self.q[L.HEADER_GENERATION // 8] = g

    def change(self, slot: int, old: int, new: int) -> bool:
        """Stores a new word if the slot still has the old one. Under T nobody else does."""
        kind = (state_of(old), state_of(new), gen_of(old) != gen_of(new))
        at = self._base + slot * _WORDS
        if kind not in _ALLOWED or self.q[at] != old:
            return False
        self.q[at] = new
        return True

    def set_key(self, slot: int, key: str) -> None:
        """Names a FREE slot and clears its hints; the length last, for the case of death in between."""
        at = self._base + slot * _WORDS
        kb = key.encode()
        self.q[at + L.SLOT_KEY_LEN // 8] = 0
        padded = kb.ljust(8 * _KEY_WORDS, b"\0")
        for i in range(_KEY_WORDS):
            self.q[at + _KEY + i] = int.from_bytes(padded[8 * i : 8 * i + 8], "little")
        for h in range(BYTES, _WORDS):
            self.q[at + h] = 0
        self.q[at + L.SLOT_KEY_LEN // 8] = len(kb)

    def set_hint(self, slot: int, h: int, v: int) -> None:
        self.q[self._base + slot * _WORDS + h] = v

    def count(self, offset: int, n: int = 1) -> None:
        """Adds to a statistic of the header."""
        self.q[offset // 8] = (self.q[offset // 8] + n) & (1 << 64) - 1

    def index_insert(self, slot: int, key: str) -> bool:
        """Makes slot findable under key, before its word leaves FREE; False: the index is full."""
        h = hash_key(key.encode())
        want, pos, hole = h >> 48 << 16 | slot + 1, h & self.mask, -1
        for _ in range(self.mask + 1):
            e = self.index[pos]
            if e == want:
                return True
            if e == L.INDEX_DELETED:
                hole = pos if hole < 0 else hole
            elif e == 0:
                self.index[pos if hole < 0 else hole] = want
                return True
            pos = (pos + 1) & self.mask
        if hole >= 0:
            self.index[hole] = want
        return hole >= 0

    def index_delete(self, slot: int, key: str) -> None:
        """Undoes index_insert: a mark that ends no probe, or empty where no probe needs it."""
        h = hash_key(key.encode())
        want, pos = h >> 48 << 16 | slot + 1, h & self.mask
        for _ in range(self.mask + 1):
            e = self.index[pos]
            if e == 0:
                return
            if e == want:
                self.index[pos] = L.INDEX_DELETED
                for _ in range(self.mask + 1):  # to the end of the run
                    if self.index[pos] == 0:
                        self._drop_marks(pos)
                        return
                    pos = (pos + 1) & self.mask
                return
            pos = (pos + 1) & self.mask

    def _drop_marks(self, end: int) -> None:
        # Empties the marks of the run before the empty entry at end that the probe
        # of no entry passes over.
        passed, pos = 0, (end - 1) & self.mask
        while pos != end:
            e = self.index[pos]
            if e == 0:
                return
            if e != L.INDEX_DELETED:
                home = self._home(e)
                if home is not None:
                    passed = max(passed, ((pos - home) & self.mask) + 1)
            elif passed == 0:
                self.index[pos] = 0
            passed = max(passed - 1, 0)
            pos = (pos - 1) & self.mask

    def _home(self, entry: int) -> int | None:
        slot = (entry & 0xFFFF) - 1
        if not 0 <= slot < self.slots or self.key(slot) is None:
            return None
        h = hash_key(self.key_bytes(slot))
        return h & self.mask if entry >> 16 == h >> 48 else None

    def repair_index(self) -> int:
        """Makes the index say what the slots say; returns how many entries it changed."""
        stale, missing = self.audit_index()
        for pos in stale:
            self.index[pos] = L.INDEX_DELETED
        if stale or missing:
            empty = [p for p, e in enumerate(self.index.tolist()) if e == 0]
            for pos in empty:
                self._drop_marks(pos)
            if not empty:  # no correct writer does that; readers miss until it is repaired
                for pos in range(self.mask + 1):
                    self.index[pos] = 0
            for slot, _ in self.in_use():
                key = self.key(slot)
                if key is not None:
                    self.index_insert(slot, key)
        return len(stale) + len(missing)

    def reset(self, slot: int) -> None:
        """Empties a slot whose bytes make no sense."""
        at = self._base + slot * _WORDS
        self.q[at] = make_word(L.FREE, self.generation)
        self.q[at + L.SLOT_KEY_LEN // 8] = 0
