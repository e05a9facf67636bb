"""What every object store must do. A store's tests inherit ``ObjectsContract`` and give a ``store``
fixture of an empty store."""

import asyncio
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memcube.errors import BadRequest, Conflict, MemCubeError, NotFound
from memcube.objects import ObjectStore

ODD_NAMES = [
    *("a", "A", "aa", "aA", "AA", "a.b", "a=b", "a+b", "a b", " a", "a ", "a&b", "a%2fb", "a%2Fb"),
    *("=61", "=41", "%61", ".a", "..a", "a.", "...", ".tmp", ".tmp x", "~", "?a=1", "#a", "*", "|"),
    *("e\u0301", "\u00e9", "\u212b", "\u00c5", "\u0130", "\u0131", "ss", "\u00df", "🦜", "\ufffe"),
    *("a\\b", '"', "'", "<a>", ":", "x" * 200, "X" * 200, "é" * 100, "X" * 199 + "x"),
    *("con", "nul", "index.html", "p/q/r", "B/b", "B/B", "b/b", "éé/é", "éé/e\u0301"),
]
BAD_NAMES = [
    *("", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a/../b", "\x00", "a\x00b"),
    *(
        "a\nb",
        "a\x7f",
        "\ud800",
        "a/\udfff",
        "x" * 201,
        "é" * 101,
        "/".join("x" * 100 for _ in range(8)),
    ),
]
_PART = st.text(
    st.one_of(
        st.sampled_from("aAbB01.=+-_% /é\u0301\u0130ſ🦜"),
        st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]),
    ),
    min_size=1,
    max_size=20,
)


def body(name: str, *, seed: int = 0) -> bytes:
    """Bytes that tell what they belong to, between 0 and 100 kB of them: a torn one shows."""
    generator = random.Random(f"{seed} {name!a}")
    filling = generator.randbytes(generator.choice([0, 10, 4_000, 100_000]))
    return f"{seed} {name!a} {len(filling)} ".encode() + filling


async def names_in(store: ObjectStore, prefix: str = "") -> dict[str, int]:
    return {found.name: found.num_bytes async for found in store.list(prefix)}


class ObjectsContract:
    async def test_what_was_put_is_got_whole(self, store):
        for size in (0, 1, 65_536, 5_000_001):
            data = random.Random(size).randbytes(size)
            for given_as in (data, bytearray(data), memoryview(data)):
                await store.put("folder/x", given_as)
                assert await store.get("folder/x") == data

    async def test_a_put_replaces_what_was_there(self, store):
        await store.put("x", b"a long first one")
        await store.put("x", b"second")
        assert await store.get("x") == b"second"
        assert await names_in(store) == {"x": 6}

    @pytest.mark.parametrize("name", ["none", "folder", "folder/x/y", "none/x"])
    async def test_what_is_not_there_raises_not_found(self, store, name):
        await store.put("folder/x", b"a")
        with pytest.raises(NotFound, match="no object"):
            await store.get(name)
        for length in (0, 1):
            with pytest.raises(NotFound, match="no object"):
                await store.get_range(name, 0, length)

    @pytest.mark.parametrize("start", [0, 1, 99, 100, 101, 10**12])
    @pytest.mark.parametrize("length", [0, 1, 50, 100, 10**12])
    async def test_a_range_is_what_a_slice_is(self, store, start, length):
        data = bytes(range(100))
        await store.put("x", data)
        assert await store.get_range("x", start, length) == data[start : start + length]
        await store.put("empty", b"")
        assert await store.get_range("empty", start, length) == b""

    @pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1)])
    async def test_a_negative_range_is_refused(self, store, start, length):
        await store.put("x", b"abc")
        with pytest.raises(ValueError, match="negative"):
            await store.get_range("x", start, length)

    async def test_a_deleted_object_is_gone_and_deleting_again_is_no_error(self, store):
        await store.put("a/b/x", b"1")
        await store.put("a/y", b"2")
        for name in ("a/b/x", "a/b/x", "never/was", "a", "a/y/z"):
            await store.delete(name)
        assert await names_in(store) == {"a/y": 1}
        with pytest.raises(NotFound):
            await store.get("a/b/x")
        await store.put("a/b/x", b"again")
        assert await store.get("a/b/x") == b"again"

    async def test_a_listing_has_the_names_that_start_so_and_no_others(self, store):
        names = ["a/1", "a/2", "a/b/3", "a-4", "ab/5", "b", "A/6", "a.b/7", "é/8"]
        for number, name in enumerate(names):
            await store.put(name, b"x" * number)
        for prefix in ("", "a", "a/", "a/b", "a/b/", "a.", "ab", "é", "é/", "none", "a/1/", "a/1"):
            expected = {name: i for i, name in enumerate(names) if name.startswith(prefix)}
            assert await names_in(store, prefix) == expected, prefix

    async def test_a_long_listing_is_whole(self, store):
        names = {f"folder/{number:05}": 1 for number in range(1101)}
        at_once = asyncio.Semaphore(16)

        async def put(name: str) -> None:
            async with at_once:
                await store.put(name, b"x")

        await asyncio.gather(*map(put, names))
        assert await names_in(store, "folder/") == names

    async def test_a_conditional_put_creates_and_never_replaces(self, store):
        await store.put("x", b"first", if_absent=True)
        with pytest.raises(Conflict, match="exists already"):
            await store.put("x", b"second", if_absent=True)
        assert await store.get("x") == b"first"
        await store.delete("x")
        await store.put("x", b"third", if_absent=True)
        assert await store.get("x") == b"third"

    async def test_of_many_conditional_puts_one_wins(self, store):
        async def create(number: int) -> int | None:
            try:
                await store.put("a/claim", str(number).encode(), if_absent=True)
            except Conflict:
                return None
            return number

        won = [n for n in await asyncio.gather(*map(create, range(12))) if n is not None]
        assert [int(await store.get("a/claim"))] == won

    @pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
    async def test_what_is_no_name_is_refused(self, store, name):
        for call in (store.put(name, b"x"), store.get(name), store.delete(name)):
            with pytest.raises(BadRequest):
                await call
        if name and not name.endswith("/"):
            with pytest.raises(BadRequest):
                await names_in(store, name)
        assert await names_in(store) == {}

    async def test_odd_names_are_kept_apart(self, store):
        for name in ODD_NAMES:
            await store.put(f"n/{name}", body(name))
        for name in ODD_NAMES:
            assert await store.get(f"n/{name}") == body(name), name
        assert await names_in(store) == {f"n/{n}": len(body(n)) for n in ODD_NAMES}

    async def test_any_names_are_kept_apart(self, store):
        drawn: list[list[str]] = []

        @settings(max_examples=20, deadline=None, database=None, derandomize=True)
        @given(st.lists(st.lists(_PART, min_size=1, max_size=3).map("/".join), max_size=8))
        def draw(names: list[str]) -> None:
            drawn.append(names)

        draw()  # hypothesis runs no coroutines: the drawn cases are run after
        for number, names in enumerate(drawn):
            held: dict[str, bytes] = {}
            for name in (f"{number}/{name}" for name in names):
                clashes = any(_is_folder_of(n, name) or _is_folder_of(name, n) for n in held)
                if not clashes and _is_name(name):
                    held[name] = body(name)
                    await store.put(name, held[name])
            for name, data in held.items():
                assert await store.get(name) == data, ascii(name)
            assert await names_in(store, f"{number}/") == {n: len(d) for n, d in held.items()}

    @pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a/b/c", "a"), ("a", "a/b/c")])
    async def test_a_name_that_is_anothers_folder_never_harms_the_first(self, store, names):
        first, second = names
        await store.put(first, b"first")
        try:
            await store.put(second, b"second")
        except MemCubeError:
            assert await names_in(store) == {first: 5}
        else:
            assert await store.get(second) == b"second"
        assert await store.get(first) == b"first"

    async def test_a_reader_sees_the_old_bytes_or_the_new(self, store):
        versions = [bytes([letter]) * 300_000 for letter in b"abcd"]
        await store.put("x", versions[0])

        async def write() -> None:
            for number in range(24):
                await store.put("x", versions[number % 4])

        writing = asyncio.create_task(write())
        seen: set[bytes] = set()
        while not writing.done():
            seen.add(await store.get("x"))
        await writing
        assert seen <= set(versions)

    async def test_a_cancelled_put_leaves_old_or_new_and_the_store_in_use(self, store):
        await store.put("x", b"old")
        putting = asyncio.create_task(store.put("x", b"new" * 100_000))
        await asyncio.sleep(0)
        putting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await putting
        assert await store.get("x") in (b"old", b"new" * 100_000)
        await store.put("y", b"later")
        assert await store.get("y") == b"later"


def _is_folder_of(folder: str, name: str) -> bool:
    return name == folder or name.startswith(f"{folder}/")


def _is_name(name: str) -> bool:
    parts = name.split("/")
    return not {"", ".", ".."} & {*parts} and not any(
        unicodedata.category(character) == "Cc" for character in name
    )
