"""OpenSSH: `banger vm ssh`, `banger vm proxy`, `banger ssh-config`.

A machine is reached by way of its agent, so that neither an address nor a network is needed: ssh's
ProxyCommand is `banger vm proxy`, which also has the machine let the user in, and know its keys.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import stat
import sys
from pathlib import Path

import click

from banger.base.errors import Conflict, NotFound, PermissionDenied
from banger.base.files import write_atomically
from banger.base.model import Vm
from banger.base.paths import Paths, prepare_private_dir
from banger.base.ssh import SUFFIX, USER, SshAccess, SshFiles
from banger.cli.app import complete_vm, connect, note, vm_argument
from banger.cli.session import join_session

#: An sshd starts half a second after its machine, and an emulated one takes its time.
_GREETING_TIMEOUT_S = 30

_BEGIN = "# >>> banger >>> (banger ssh-config --uninstall takes this away)"
_END = "# <<< banger <<<"
#: What we write, and nothing that somebody else has put between the marks.
_BLOCK = re.compile(
    rb"^# >>> banger >>>[^\n]*\nInclude [^\n]*\n# <<< banger <<<\n\n?", re.MULTILINE
)
_MARKS = (b"# >>> banger >>>", b"# <<< banger <<<")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@vm_argument
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGS]...")
def ssh(*, vm_ref: str, arguments: tuple[str, ...]) -> None:
    """The system's OpenSSH client, on a running machine; ARGS are its own: options, a command."""
    with connect() as client:
        vm = client.call("vm.show", {"vm": vm_ref.removesuffix(SUFFIX)}, Vm)
        files = client.call("ssh.files", {}, SshFiles)
    from banger.base import proc  # brings asyncio: not for `proxy`, which each ssh waits for

    paths = Paths.from_environment()
    prepare_private_dir(paths.ssh_known_hosts.parent)
    config = paths.ssh_known_hosts.with_name("config")
    write_atomically(config, _for_one_call(files).encode(), durable=False)
    proc.replace(["ssh", "-F", config, f"{vm.name}{SUFFIX}", *arguments])


@click.command()
@click.argument("vm_ref", metavar="NAME", shell_complete=complete_vm)
@click.argument("port", type=click.IntRange(1, 65535))
@click.option("--ssh", "user", metavar="USER", help="First have it let your key in as USER.")
def proxy(*, vm_ref: str, port: int, user: str | None) -> int:
    """Join stdin and stdout to a TCP port of a running machine, which needs no network for it."""
    name = vm_ref.removesuffix(SUFFIX)
    with connect() as client:
        request = {"vm": name, "port": port}
        if user:
            access = client.call("vm.ssh", {"vm": name, "user": user}, SshAccess)
            if access.vm_name != name:  # whose keys ssh would look for in vain
                raise NotFound(
                    f'vm "{name}" not found',
                    hint=f"ssh wants a whole name: {access.vm_name}{SUFFIX}",
                )
            request["greeting_timeout_s"] = _GREETING_TIMEOUT_S
        client.call("vm.connect", request, dict)
        return join_session(client.session())


@click.command("ssh-config")
@click.option("--install", is_flag=True, help="Include it in ~/.ssh/config.")
@click.option("--uninstall", is_flag=True, help="Take away what --install has done.")
def ssh_config(*, install: bool, uninstall: bool) -> None:
    """Print what OpenSSH needs to know for `ssh NAME.vm`, or have it in ~/.ssh/config."""
    if install and uninstall:
        raise click.UsageError("--install and --uninstall exclude each other")
    paths = Paths.from_environment()
    users = Path(os.environ.get("HOME") or Path.home()) / ".ssh" / "config"
    if uninstall:
        _uninstall(paths.ssh_config, users)
        return
    with connect() as client:
        text = hosts(client.call("ssh.files", {}, SshFiles))
    if not install:
        click.echo(text, nl=False)
        return
    paths.config_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(paths.ssh_config, text.encode())
    _include(paths.ssh_config, users)
    usual = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".ssh" / "config"
    if users != usual:
        note(f"warning: ssh itself reads {usual}, whatever HOME is: ssh -F {users}")
    note(f"{users} includes {paths.ssh_config}: ssh NAME{SUFFIX} leads into machines")


def hosts(files: SshFiles) -> str:
    """The section of an ssh_config(5) for all machines."""
    command = shlex.join([*_ourselves(), "vm", "proxy", "--ssh"]).replace("%", "%%")
    return f"""\
# Written by: banger ssh-config
Host *{SUFFIX}
    ProxyCommand {command} %r %h %p
    User {USER}
    Port 22
    IdentityFile {_quoted(files.key)}
    IdentitiesOnly yes
    UserKnownHostsFile {_quoted(files.known_hosts)}
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    UpdateHostKeys no
    CheckHostIP no
    PreferredAuthentications publickey
    ForwardAgent no
    ForwardX11 no
"""


def _for_one_call(files: SshFiles) -> str:
    """A configuration of its own: what is here wins, and the user's and the system's follow."""
    return f"{hosts(files)}Match all\n    Include ~/.ssh/config\n    Include /etc/ssh/ssh_config\n"


def _ourselves() -> list[str]:
    """How whoever has another PATH, or none, runs this command."""
    beside = Path(sys.executable).with_name("banger")
    if beside.is_file():
        return [str(beside)]
    found = shutil.which("banger")
    return [found] if found else [sys.executable, "-m", "banger.cli.main"]


def _quoted(path: str) -> str:
    """A path as ssh_config(5) wants it, in which per cent signs begin tokens."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _include(included: Path, users: Path) -> None:
    """At the top of the user's file: further down it could belong to one of its hosts."""
    block = f'{_BEGIN}\nInclude "{included}"\n{_END}\n\n'
    _write(users, os.fsencode(block) + _without_block(users))


def _uninstall(included: Path, users: Path) -> None:
    rest = _without_block(users)
    if users.exists() and rest != users.read_bytes():
        if rest or users.is_symlink():
            _write(users, rest)
        else:
            users.unlink()
    included.unlink(missing_ok=True)


def _without_block(users: Path) -> bytes:
    """The user's file as it is without us. Conflict when it cannot be told what is ours."""
    try:
        content = users.read_bytes()
    except FileNotFoundError:
        return b""
    rest = _BLOCK.sub(b"", content)
    if any(line.startswith(_MARKS) for line in rest.split(b"\n")):
        raise Conflict(
            f"{users}: the lines of banger are not as banger wrote them",
            hint=f'remove by hand what is ours from "{_BEGIN}" to "{_END}"',
        )
    return rest


def _write(users: Path, content: bytes) -> None:
    target = users.resolve()  # people keep it elsewhere, behind a link
    mode = 0o600
    if target.exists():
        info = target.stat()
        if info.st_uid != os.geteuid():  # it would become ours, and of no use to its owner
            raise PermissionDenied(f"{target} belongs to another user")
        mode = stat.S_IMODE(info.st_mode)
    else:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(target, content, mode=mode)
