"""Archives as nobody should make them, and layers as the specification has them, unpacked."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import hashlib
import lzma
import os
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import zstandard

from banger.base.errors import PreconditionFailed
from banger.images.depersonaliser import depersonalised
from banger.images.unpack import BadArchive, Layer, Limits, Node, Owner, Unpacked, unpack
from banger.images.userns import contained, remove_tree, temporary_tree
from oci_layouts import Member, directory, hard_link, symlink, tar

_LIMITS = Limits(content_bytes=8 << 20, entries=1000)


class Tree:
    """A directory that archives are unpacked into."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "tree"
        self._directory = directory

    def unpack(self, *layers: bytes, whiteouts: bool = True, complete: bool = False) -> Unpacked:
        self.path.mkdir()
        with ExitStack() as files:
            opened = []
            for number, layer in enumerate(layers):
                file = self._directory / f"{number}.tar"
                file.write_bytes(layer)
                descriptor = os.open(file, os.O_RDONLY)
                files.callback(os.close, descriptor)
                name = f"layer {number}"
                opened.append(Layer(name, descriptor, whiteouts=whiteouts, complete=complete))
            return asyncio.run(unpack(opened, self.path, limits=_LIMITS))

    def refuses(self, *layers: bytes, whiteouts: bool = True, complete: bool = False) -> str:
        """Why the archives are not unpacked."""
        with pytest.raises(BadArchive) as refused:
            self.unpack(*layers, whiteouts=whiteouts, complete=complete)
        return refused.value.message

    def names(self) -> list[str]:
        return sorted(str(each.relative_to(self.path)) for each in self.path.rglob("*"))


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


FILE = Member("file", b"content")


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([Member("../file")], "../file leads out of the image"),
        ([Member("a/../../file")], "a/../../file leads out of the image"),
        ([Member("a/../file")], "a/../file leads out of the image"),
        ([Member("/etc/file")], "/etc/file is an absolute path"),
        ([hard_link("file", "../../etc/passwd")], "../../etc/passwd leads out of the image"),
        ([hard_link("file", "/etc/passwd")], "file is a hard link to what is not there"),
        ([hard_link("file", "/../etc/passwd")], "../etc/passwd leads out of the image"),
        ([hard_link("file", "etc/passwd")], "file is a hard link to what is not there"),
        ([directory("a"), hard_link("file", "a")], "file is a hard link to a directory"),
        ([symlink("a", "../.."), Member("a/file")], "a is a link that leads out of the image"),
        ([symlink("a", "/../b"), Member("a/file")], "a is a link that leads out of the image"),
        ([symlink("a", "/nowhere"), Member("a/file")], "a leads to no directory"),
        (
            [symlink("a", "b"), symlink("b", "a"), Member("a/file")],
            "a is a link that leads nowhere",
        ),
        ([FILE, Member("file/below")], "file is not a directory"),
        ([FILE, FILE], "file is in it twice"),
        ([FILE, Member("./file")], "file is in it twice"),
        ([directory("a"), Member("a")], "a is in it twice"),
        ([Member("./")], "its root is not a directory"),
        ([Member("n" * 256)], "cannot be the name of a file"),
        ([Member("a/.wh...")], "hides nothing that can be"),
        ([Member("a/.wh.")], "hides nothing that can be"),
        ([Member("file", kind=b"Q")], "of no known type"),
        ([Member("file", b"x" * (9 << 20))], "larger together than an image may be"),
        ([Member(f"f{number}") for number in range(1001)], "more files than any image"),
        ([Member("file", xattrs={"user.x": b"x" * 70_000})], "cannot have the attribute user.x"),
        ([Member('de"v', kind=tarfile.CHRTYPE)], "no name for a device node"),
        (
            [Member("dev", kind=tarfile.CHRTYPE), hard_link('x"\n!id >pwned\n#', "dev")],
            "no name for a device node",
        ),
        ([Member("a/" * 300 + "file")], "deeper than any image needs"),
        (
            [
                directory("a" * 200),
                directory("b"),
                symlink("b/l", "/" + "a" * 200),
                Member("b/l/" + "c" * 200 + "/" + "d" * 200 + "/" + "e" * 200 + "/" + "f" * 255),
            ],
            "deeper than any image needs",
        ),
        ([Member("file", uid=-5)], "the owner of file is damaged"),
    ],
)
def test_what_is_refused(tree: Tree, members: Sequence[Member], why: str) -> None:
    assert why in tree.refuses(tar(*members))


def test_nothing_outside_is_touched(tree: Tree, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    tree.refuses(tar(symlink("a", str(outside)), Member("a/file", b"bad")))
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress,
                                      zstandard.compress])  # fmt: skip
def test_an_archive_that_was_cut_off(tree: Tree, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(tar(FILE, Member("more", os.urandom(100_000))))
    assert "cut off" in tree.refuses(whole[:-50_000], complete=True)


def test_an_archive_without_its_end(tree: Tree) -> None:
    end = tar(FILE).rindex(b"content") + 512
    assert "cut off" in tree.refuses(tar(FILE)[:end], complete=True)


def test_the_end_may_be_missing_where_a_digest_tells(tree: Tree) -> None:
    end = tar(FILE).rindex(b"content") // 512 * 512 + 512
    tree.unpack(tar(FILE)[:end])
    assert tree.names() == ["file"]


@pytest.mark.parametrize(
    "data", [b"", b"no archive", bytes(100), os.urandom(4096), b"\x1f\x8b" + os.urandom(4096)]
)
def test_what_is_no_archive(tree: Tree, data: bytes) -> None:
    assert "cannot unpack layer 0: it is" in tree.refuses(data, complete=True)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, zstandard.compress])
def test_a_bomb_ends_at_the_limit(tree: Tree, compress: Callable[[bytes], bytes]) -> None:
    """Zeros after the end of the archive: no file is too large, but there is no end of them."""
    zeros = compress(bytes(64 << 20)) * 40
    assert "it holds more than" in tree.refuses(compress(tar(FILE)) + zeros)


def test_a_header_that_wants_all_memory(tree: Tree) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 6 << 30
    header = info.tobuf(tarfile.GNU_FORMAT)
    assert "a header of" in tree.refuses(header + bytes(1024), complete=True)


@pytest.mark.parametrize("mtime", [b"nan", b"inf", b"1e400", b"-inf"])
def test_a_header_that_python_stumbles_over(tree: Tree, tmp_path: Path, mtime: bytes) -> None:
    """Nothing of the archive is loaded meanwhile: neither modules nor libraries."""
    record = b" mtime=" + mtime + b"\n"
    record = b"%d%s" % (len(record) + 2, record)
    planted = ("lib/x86_64-linux-gnu/libgcc_s.so.1", "encodings/idna.py", "traceback.py")
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    header = info.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")
    whole = tar(*(Member(name, b"no library") for name in planted))
    bad = whole[: len(planted) * 1024] + header + tarfile.TarInfo("file").tobuf()
    assert "a time in it is no number" in tree.refuses(bz2.compress(bad + bytes(1024)))


@pytest.mark.parametrize("member", [symlink("l", "é\0b"), Member("f", xattrs={"user.a\0b": b"x"})])
def test_a_name_with_a_nul(tree: Tree, member: Member) -> None:
    assert "cannot unpack layer 0" in tree.refuses(tar(member))


def test_an_owner_is_that_of_the_last_layer(tree: Tree) -> None:
    content = tree.unpack(
        tar(directory("a", uid=200_000), Member("b", uid=200_000), hard_link("c", "b")),
        tar(directory("a"), Member(".wh.b")),
    )
    owners = {bytes.fromhex(each.place): each.uid for each in content.owners}
    if os.geteuid() == 0:
        assert owners == {}
        assert (tree.path / "c").stat().st_uid == 200_000
        assert (tree.path / "a").stat().st_uid == 0
    else:
        assert owners == {b"c": 200_000}


def test_a_link_within_the_image_is_followed(tree: Tree) -> None:
    tree.unpack(
        tar(directory("usr/lib"), symlink("lib", "usr/lib"), symlink("run", "/usr/lib")),
        tar(Member("lib/a"), Member("run/b")),
    )
    assert tree.names() == ["lib", "run", "usr", "usr/lib", "usr/lib/a", "usr/lib/b"]


def test_whiteouts_take_away_what_is_below_them(tree: Tree) -> None:
    tree.unpack(
        tar(Member("a/one"), Member("a/two"), directory("b/deep"), Member("b/deep/file"), FILE),
        tar(Member("a/.wh.one"), Member(".wh.b"), Member(".wh.not-there"), Member("x/.wh.y")),
    )
    assert tree.names() == ["a", "a/two", "file"]


@pytest.mark.parametrize("first", [True, False])
def test_an_opaque_directory_keeps_what_its_own_layer_has(tree: Tree, first: bool) -> None:
    new = [Member("a/sub/new"), Member("a/kept", b"new")]
    opaque = Member("a/.wh..wh..opq")
    tree.unpack(
        tar(Member("a/old"), Member("a/sub/old"), Member("a/kept", b"old")),
        tar(opaque, *new) if first else tar(*new, opaque),
    )
    assert tree.names() == ["a", "a/kept", "a/sub", "a/sub/new"]
    assert (tree.path / "a/kept").read_bytes() == b"new"


def test_a_whiteout_leaves_its_own_layer_alone(tree: Tree) -> None:
    tree.unpack(
        tar(Member("a/old"), Member("b", b"old")),
        tar(Member("a/new"), Member(".wh.a"), Member("b", b"new"), Member(".wh.b")),
    )
    assert tree.names() == ["a", "a/new", "b"]


def test_notes_of_other_tools_are_passed_over(tree: Tree) -> None:
    tree.unpack(tar(FILE, Member(".wh..wh.plnk"), Member(".wh..wh.aufs")))
    assert tree.names() == ["file"]


def test_in_an_archive_of_no_image_whiteouts_are_files(tree: Tree) -> None:
    tree.unpack(tar(FILE, Member(".wh.file")), whiteouts=False)
    assert tree.names() == [".wh.file", "file"]


def test_one_kind_of_file_replaces_another(tree: Tree) -> None:
    tree.unpack(
        tar(directory("a"), Member("a/file"), Member("b"), symlink("c", "a"), directory("d")),
        tar(Member("a", b"a"), directory("b"), directory("c"), symlink("d", "b"), Member("c/x")),
    )
    assert tree.names() == ["a", "b", "c", "c/x", "d"]
    assert (tree.path / "a").is_file()
    assert (tree.path / "d").is_symlink()


def test_a_directory_that_comes_again_keeps_what_is_in_it(tree: Tree) -> None:
    tree.unpack(tar(directory("a", 0o700), Member("a/file")), tar(directory("a", 0o1777)))
    assert tree.names() == ["a", "a/file"]
    assert (tree.path / "a").stat().st_mode & 0o7777 == 0o1777


def test_modes_owners_times_links_and_attributes(tree: Tree) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    setuid = Member(
        "setuid",
        b"x",
        mode=0o6755,
        uid=12,
        gid=34,
        mtime=86400,
        xattrs={"security.capability": capability, "user.binary": b"\xff\x00="},
    )
    tree.unpack(
        tar(directory("a", 0o750), setuid, hard_link("a/same", "setuid"),
            Member("pipe", kind=tarfile.FIFOTYPE, mode=0o600))
    )  # fmt: skip
    info = (tree.path / "setuid").stat()
    assert (info.st_mode & 0o7777, info.st_mtime, info.st_nlink) == (0o6755, 86400, 2)
    if os.geteuid() == 0:
        assert (info.st_uid, info.st_gid) == (12, 34)
        assert os.getxattr(tree.path / "setuid", "security.capability") == capability
    assert os.getxattr(tree.path / "setuid", "user.binary") == b"\xff\x00="
    assert (tree.path / "a/same").samefile(tree.path / "setuid")
    assert (tree.path / "pipe").is_fifo()


def test_a_hard_link_may_say_where_its_target_is_in_the_image(tree: Tree) -> None:
    """As kaniko writes them."""
    tree.unpack(tar(FILE), tar(hard_link("same", "/file")))
    assert (tree.path / "same").samefile(tree.path / "file")


def test_what_replaces_a_directory_has_its_own_time(tree: Tree) -> None:
    tree.unpack(tar(directory("a")), tar(Member(".wh.a")), tar(Member("a", mtime=86400)))
    assert (tree.path / "a").stat().st_mtime == 86400


def test_a_header_of_digits_keeps_nobody_busy(tree: Tree) -> None:
    """`tarfile` takes hours for it (CVE-2024-6232)."""
    header = tarfile.TarInfo("././@PaxHeader")
    header.type, header.size = tarfile.XHDTYPE, 4_000_000
    began = time.monotonic()
    assert "a header of it is damaged" in tree.refuses(header.tobuf() + b"1" * header.size)
    assert time.monotonic() - began < 20


def test_a_tree_has_nothing_of_the_acl_above_it(tmp_path: Path) -> None:
    default = _acl((1, 7, 0xFFFFFFFF), (2, 7, 1000), (4, 5, 0xFFFFFFFF), (16, 7, 0xFFFFFFFF),
                   (32, 0, 0xFFFFFFFF))  # fmt: skip
    os.setxattr(tmp_path, "system.posix_acl_default", default)

    async def inside() -> list[str]:
        async with temporary_tree(tmp_path / "scratch") as scratch:
            (scratch / "tree").mkdir()
            return os.listxattr(scratch) + os.listxattr(scratch / "tree")

    assert asyncio.run(inside()) == []


def test_what_is_cleaned_away_gets_no_owner(tree: Tree) -> None:
    """Of a file whose owner is to be set later nothing may be left to be set."""
    content = tree.unpack(tar(Member("var/log/app.log", b"x"), Member("kept"), directory("dev"),
                              Member("run/x")))  # fmt: skip
    log, kept, device, gone = (
        name.encode().hex() for name in ("var/log/app.log", "kept", "dev/null", "run/x/null")
    )
    content = msgspec.structs.replace(
        content,
        owners=tuple(Owner(each, 100_000, 0) for each in (log, kept)),
        devices=tuple(Node(each, "c", 1, 3, 0o666, 0, 0, 0) for each in (device, gone)),
    )
    left, packages = asyncio.run(depersonalised(tree.path, content))
    assert [each.place for each in left.owners] == [kept]
    assert [each.place for each in left.devices] == [device]
    assert packages == ()


def test_who_is_shut_in_gets_nothing_back(tmp_path: Path) -> None:
    """What it executed would have all rights again, root as it is."""
    look = (
        "import sys; from banger.images.shut_in import shut_in;"
        " status = open('/proc/self/status'); shut_in(sys.argv[1]); sys.stdout.write(status.read())"
    )
    argv = contained([sys.executable, "-c", look, str(tmp_path)])
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    status = dict(line.split(":\t", 1) for line in said.splitlines())
    assert status["NoNewPrivs"] == "1"
    assert status["CapEff"] == "000000008000001b"


def _acl(*entries: tuple[int, int, int]) -> bytes:
    """As the kernel has ACLs in extended attributes: (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries)


def test_nothing_inherits_the_attributes_of_what_is_above_or_below(tree: Tree) -> None:
    nobody = 0xFFFFFFFF
    default = _acl((1, 7, nobody), (2, 7, 1000), (4, 5, nobody), (16, 7, nobody), (32, 0, nobody))
    above = Member("a", mode=0o750, kind=tarfile.DIRTYPE,
                   xattrs={"system.posix_acl_default": default, "user.note": b"1"})  # fmt: skip
    below = Member("b", kind=tarfile.DIRTYPE, xattrs={"user.note": b"1", "user.gone": b"1"})
    inside = (Member("a/file", mode=0o644), directory("a/made", 0o711), Member("a/missing/file"),
              Member("a/pipe", kind=tarfile.FIFOTYPE, mode=0o604))  # fmt: skip
    again = Member("b", kind=tarfile.DIRTYPE, xattrs={"user.note": b"2"})
    tree.unpack(tar(above, *inside, below), tar(again))
    modes = {"file": 0o644, "made": 0o711, "missing": 0o755, "missing/file": 0o644, "pipe": 0o604}
    for name, mode in modes.items():
        path = tree.path / "a" / name
        assert (path.stat().st_mode & 0o7777, os.listxattr(path)) == (mode, []), name
    assert set(os.listxattr(tree.path / "a")) == {"system.posix_acl_default", "user.note"}
    assert os.listxattr(tree.path / "b") == ["user.note"]
    assert os.getxattr(tree.path / "b", "user.note") == b"2"


def test_names_that_are_no_text(tree: Tree) -> None:
    tree.unpack(tar(Member("caf\udce9"), Member("new\nline"), Member("ü" * 120)))
    assert tree.names() == ["caf\udce9", "new\nline", "ü" * 120]


def test_device_nodes_are_noted_and_go_as_files_do(tree: Tree) -> None:
    def node(name: str) -> Member:
        return Member(name, kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666, gid=5)

    content = tree.unpack(
        tar(node("dev/null"), node("dev/gone"), node("dev/file"), node("old/x"),
            hard_link("dev/same", "dev/null")),
        tar(Member("dev/.wh.gone"), Member("dev/file"), Member(".wh.old")),
    )  # fmt: skip
    assert tree.names() == ["dev", "dev/file"]
    assert {bytes.fromhex(each.place) for each in content.devices} == {b"dev/null", b"dev/same"}
    assert (content.devices[0].major, content.devices[0].minor) == (1, 3)


def test_a_sparse_file_stays_one(tree: Tree, tmp_path: Path) -> None:
    sparse = tmp_path / "sparse"
    with sparse.open("wb") as file:
        file.write(b"begin")
        file.seek(6 << 20)
        file.write(b"end")
        file.truncate(7 << 20)
    for form in ("gnu", "pax"):
        archive = tmp_path / f"{form}.tar"
        subprocess.run(
            ["tar", "--sparse", f"--format={form}", "-cf", archive, "-C", tmp_path, "sparse"],
            check=True,
        )
        tree.unpack(archive.read_bytes(), complete=True)
        made = tree.path / "sparse"
        assert made.read_bytes() == sparse.read_bytes()
        assert made.stat().st_blocks * 512 < 1 << 20
        asyncio.run(remove_tree(tree.path))


def test_the_digests_are_of_what_was_read(tree: Tree) -> None:
    layer = tar(FILE) + b"after the end"
    content = tree.unpack(gzip.compress(layer))
    assert content.digests == (hashlib.sha256(layer).hexdigest(),)


def test_a_full_disk_is_told_as_what_it_is(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], check=True)
    try:
        with pytest.raises(PreconditionFailed, match="No space left") as full:
            Tree(small).unpack(gzip.compress(tar(Member("file", bytes(4 << 20)))))
        assert "free some space" in full.value.hint
    finally:
        subprocess.run(["umount", small], check=True)
