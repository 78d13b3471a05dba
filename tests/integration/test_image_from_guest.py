"""`banger image build --from`: what a build makes of a real guest, and what it leaves behind."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import suite
from homes import Home
from product import IMAGE, Banger, finish, read_until, until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

_PACKAGES = "tree,attr acl,libcap2-bin"

_SETUP = r"""#!/bin/sh
set -e
echo "for $BANGER_IMAGE in $PWD as $(id -un)"
useradd --create-home --uid 4242 worker
mkdir -m 1750 /opt/mine
chown worker:worker /opt/mine
cd /opt/mine
install -m 4755 -o worker -g worker /bin/true setuid
cp /bin/true able
setcap cap_net_raw+ep able
echo note >noted
setfattr -n user.note -v 0x0001ff3d0a noted
setfacl -m u:worker:rw noted
ln noted hard
ln -s ../mine/noted soft
mknod -m 640 device c 1 3
mkfifo -m 600 fifo
truncate -s 3G sparse
printf end | dd of=sparse bs=1 seek=3G conv=notrunc status=none
echo odd >"$(printf 'odd \\ \n\377')"
mkdir -p "$(printf '%0200d/%0200d' 1 2)"
echo deep >"$(printf '%0200d/%0200d' 1 2)/file"
touch -d '2001-02-03 04:05:06 UTC' noted
echo home >/root/in-home
mkdir -m 700 /root/.private
chown worker /root/.private
# Of this machine, or not of any image.
mkdir -p /etc/ssh
echo secret >/etc/ssh/ssh_host_fake_key
echo rubbish >/tmp/rubbish
echo rubbish >/run/rubbish
echo rubbish >/var/log/rubbish.log
mount -t tmpfs none /mnt
echo rubbish >/mnt/rubbish
setsid sh -c 'echo $$ >/opt/mine/pid; trap "echo ended >/opt/mine/ended; exit" TERM
while :; do sleep 0.1; done' >/dev/null 2>&1 &
while ! [ -s pid ]; do sleep 0.1; done
"""

#: What of `_SETUP` is there, a line each.
_LOOK = r"""
cd /opt/mine
tree --version | cut -d' ' -f1
stat -c '%n %a %U %G' . setuid /home/worker /root/.private /root
getcap able
getfattr --only-values -n user.note noted | od -An -tx1
getfacl -cp noted | grep worker
stat -c '%h %Y' noted
stat -c '%i' noted hard | uniq | wc -l
readlink soft
stat -c '%F %a %t %T' device fifo
stat -c '%s' sparse
tail -c 3 sparse; echo
[ $(stat -c '%b' sparse) -lt 100 ] && echo sparse
cat odd*
cat 0*/*/file
cat /root/in-home ended
ls -A /mnt /tmp | grep rubbish
ls -A /etc/ssh
ls /run/rubbish /var/log/rubbish.log /var/lib/apt/lists/*Packages 2>/dev/null
test -e /usr/sbin/policy-rc.d || echo done
"""
_SEEN = r"""tree
. 1750 worker worker
setuid 4755 worker worker
/home/worker 755 worker worker
/root/.private 700 worker root
/root 700 root root
able cap_net_raw=ep
 00 01 ff 3d 0a
user:worker:rw-
2 981173106
1
../mine/noted
character special file 640 1 3
fifo 600 0 0
3221225475
end
sparse
odd
deep
home
ended
done
"""


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("scripts") / "setup.sh"
    script.write_text(_SETUP)
    return script


@pytest.fixture(scope="module")
def mine(banger: Banger, image: str, setup: Path) -> Iterator[subprocess.CompletedProcess[bytes]]:
    """The call that made the image ``mine``, which is gone after the tests of this module."""
    second = setup.with_name("second")  # no #!: it is the shell's
    second.write_text("echo and then $BANGER_IMAGE; test -d /opt/mine\n")
    done = banger.run(
        *("image", "build", "mine", "--from", image, "--packages", _PACKAGES, "--verbose"),
        *("--run", setup, "--run", second, "--memory", "768M"),
        timeout_s=600,
    )
    assert done.returncode == 0, done.stderr.decode()
    yield done
    banger.ok("image", "delete", "mine")


@suite.needs_outside
def test_an_image_of_ones_own_says_what_it_is_from(
    banger: Banger, image: str, mine: subprocess.CompletedProcess[bytes]
) -> None:
    record, base = banger.json("image", "show", "mine"), banger.json("image", "show", image)
    assert mine.stdout.startswith(b"mine (")
    assert record["source"] == f"built from {image}"
    assert [record[key] for key in ("kernel_id", "init", "config")] == [
        base[key] for key in ("kernel_id", "init", "config")
    ]
    assert {each.partition("=")[0] for each in record["packages"]} >= {"tree", "attr", "apt"}
    assert [vm for vm in banger.json("vm", "list") if vm["name"].startswith("build-")] == []


@suite.needs_outside
def test_what_packages_and_scripts_print_is_shown_as_it_comes(
    mine: subprocess.CompletedProcess[bytes],
) -> None:
    said = mine.stderr.decode().splitlines()
    at = [
        said.index(line)
        for line in (
            "== packages: tree attr acl libcap2-bin",
            "== script: setup.sh",
            "for mine in /root as root",
            "== script: second",
            "and then mine",
        )
    ]
    assert at == sorted(at)
    assert any(line.startswith("Setting up tree") for line in said)


@pytest.mark.usefixtures("mine")
@suite.needs_outside
def test_a_machine_of_it_has_all_of_that_and_nothing_of_the_builds(
    make_vm: Callable[..., str], banger: Banger
) -> None:
    vm = make_vm("--image", "mine")
    assert banger.guest(vm, _LOOK) == _SEEN


@pytest.mark.usefixtures("mine")
@suite.needs_outside
def test_nobody_shares_an_identity(make_vm: Callable[..., str], banger: Banger) -> None:
    vms = [make_vm("--image", "mine"), make_vm("--image", "mine", "--cold")]
    look = "cat /etc/machine-id /etc/hostname; cat /proc/sys/kernel/random/boot_id"
    assert len({line for vm in vms for line in banger.guest(vm, look).split()}) == 6
    rootfs = banger.json("image", "show", "mine")["rootfs_path"]
    requests = "".join(
        f'stat "/etc/{name}"\n' for name in ("machine-id", "resolv.conf", "ssh/ssh_host_fake_key")
    )
    debugfs = ["debugfs", "-f", "-", rootfs]
    found = subprocess.run(debugfs, input=requests.encode(), capture_output=True, check=True)
    assert found.stdout.count(b"Size: 0\nFile ACL") == 2
    assert b"/etc/ssh/ssh_host_fake_key: File not found" in found.stderr


@pytest.mark.usefixtures("mine")
@suite.needs_outside
def test_a_name_that_is_taken_is_refused_at_once(banger: Banger, image: str) -> None:
    said = banger.fails("image", "build", "mine", "--from", image, "--packages", "x", status=1)
    assert 'image "mine" already exists' in said


def _left(home: Home) -> list[str]:
    """What is there that an image alone does not have."""
    ids = {image["id"] for image in home.banger.json("image", "list")}
    left = [str(path) for path in (home.data / "images").iterdir() if path.name not in ids]
    left += [str(path) for path in (home.state / "vms").glob("*")]
    left += [each["name"] for each in home.banger.json("vm", "list")]
    return left + [each.command for each in home.machines()]


def _script(directory: Path, text: str) -> Path:
    path = directory / "script"
    path.write_text(text)
    return path


def test_a_script_that_fails_is_told_with_its_end_and_leaves_its_log_alone(
    home: Home, tmp_path: Path
) -> None:
    script = _script(tmp_path, "#!/bin/sh\necho first\necho last >&2\nexit 7\n")
    build = ("image", "build", "own", "--from", IMAGE, "-q", "--run", script)
    said = home.banger.fails(*build, status=1)
    assert 'script "script" failed (status 7)\nthe end of what was printed:\nfirst\nlast\n' in said
    (log,) = (home.state / "builds").iterdir()
    assert f"; inspect {log}" in said
    assert log.read_text() == "== script: script\nfirst\nlast\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert _left(home) == []
    said = home.banger.fails(*build[:-2], "--packages", "-y", status=1)
    assert '"-y" cannot be the name of a package' in said


def test_ctrl_c_in_a_script_takes_it_back(home: Home, tmp_path: Path) -> None:
    script = _script(tmp_path, "echo begun; exec sleep 1000")
    build = home.banger.start(
        *("image", "build", "own", "--from", IMAGE, "-v", "--run", script), process_group=0
    )
    assert build.stderr is not None
    read_until(build.stderr, b"begun\n", timeout_s=120)
    assert [vm["name"][:10] for vm in home.banger.json("vm", "list")] == ["build-own-"]
    build.send_signal(signal.SIGINT)
    status, out, said = finish(build)
    assert (status, out) == (130, b"")
    assert b"taking it back" in said
    assert _left(home) == []


@suite.needs_outside
def test_a_daemon_that_is_killed_leaves_nothing_and_the_next_try_works(
    home: Home, tmp_path: Path
) -> None:
    script = _script(tmp_path, "echo done >/opt/done")
    build = ("image", "build", "own", "--from", IMAGE, "-q", "--run", script)
    for stage in ("vm", "packages", "script", "pack", "filesystem", "finish"):
        home.banger.ok("daemon", "stop")
        faulty = Banger(home.banger.environment | {"BANGER_FAULT": f"SIGKILL@image.build:{stage}"})
        packages = ("--packages", "tree") if stage == "packages" else ()
        said = faulty.fails(*build, *packages, status=1)
        assert "connection to bangerd was lost" in said
        assert "own" not in [image["name"] for image in home.banger.json("image", "list")]
        until(lambda: _left(home) == [], f"nothing is left of {stage}")
        assert len(home.processes()) == 1, home.processes()
    assert home.banger.ok(*build).startswith("own (")
    assert home.banger.ok("vm", "run", "-q", "--rm", "--image", "own", "--", "cat",
                          "/opt/done") == "done\n"  # fmt: skip
