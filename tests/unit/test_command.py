"""What an image says of its programs goes under what was asked for, as with container engines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from banger.base.model import ImageConfig
from banger.guest.requests import Exec
from banger.services.command import environment, in_image, program

_BOTH = ImageConfig(entrypoint=("serve", "--on"), cmd=("80",))


@pytest.mark.parametrize(
    ("config", "words", "entrypoint", "argv"),
    [
        (ImageConfig(), (), None, ()),
        (ImageConfig(), ("ls", "-l"), None, ("ls", "-l")),
        (ImageConfig(cmd=("sh",)), (), None, ("sh",)),
        (ImageConfig(cmd=("sh",)), ("ls",), None, ("ls",)),
        (ImageConfig(entrypoint=("serve",)), (), None, ("serve",)),
        (_BOTH, (), None, ("serve", "--on", "80")),
        (_BOTH, ("90",), None, ("serve", "--on", "90")),
        (_BOTH, ("-l",), "ls", ("ls", "-l")),
        (_BOTH, (), "ls", ("ls",)),
        (_BOTH, ("ls", "-l"), "", ("ls", "-l")),
        (_BOTH, (), "", ()),
        (ImageConfig(), ("-l",), "ls", ("ls", "-l")),
    ],
)
def test_words_go_to_the_entrypoint(
    config: ImageConfig, words: tuple[str, ...], entrypoint: str | None, argv: tuple[str, ...]
) -> None:
    assert program(config, words, entrypoint) == argv


def test_what_was_asked_for_goes_over_what_the_image_says() -> None:
    config = ImageConfig(env=("PATH=/opt", "A=image"), user="app:staff", working_dir="/srv")
    bare = in_image(config, Exec(("true",), {"A": "given"}))
    assert bare == Exec(
        ("true",),
        {"PATH": "/opt", "A": "given"},
        directory="/srv",
        user="app:staff",
        make_directory=True,
    )
    asked = in_image(config, Exec(("true",), user="root", directory="/tmp", pty=True))
    assert (asked.user, asked.directory, asked.make_directory) == ("root", "/tmp", False)
    assert asked.pty


def test_an_image_that_says_nothing_changes_nothing() -> None:
    request = Exec((), {"A": "b"}, login=True, detached=True, rows=3)
    assert in_image(ImageConfig(), request) == request


def test_the_images_user_has_a_shell_also_when_nobody_may_log_in_as_him() -> None:
    config, login = ImageConfig(user="app"), Exec(login=True)
    assert in_image(config, login) == Exec(login=True, user="app", environment={}, any_login=True)
    for asked, its in ((Exec(login=True, user="app"), config), (login, ImageConfig())):
        assert not in_image(its, asked).any_login
    assert not in_image(config, Exec(("true",))).any_login


@pytest.mark.parametrize(
    ("given", "directory"), [("/", "/"), ("srv/app", "/srv/app"), ("/a/../b", "/a/../b")]
)
def test_a_working_directory_is_below_the_root(given: str, directory: str) -> None:
    assert in_image(ImageConfig(working_dir=given), Exec(("true",))).directory == directory


def test_of_a_variable_that_is_there_twice_the_last_holds() -> None:
    assert environment(ImageConfig(env=("A=1", "B=", "A=2=3"))) == {"A": "2=3", "B": ""}


@given(st.lists(st.text()))
def test_whatever_an_image_has_for_an_environment_the_agent_takes_it(entries: list[str]) -> None:
    found = environment(ImageConfig(env=tuple(entries)))
    kept = [each for each in entries if "\0" not in each and each.find("=") > 0]
    assert {f"{name}={value}" for name, value in found.items()} <= set(kept)
    assert found.keys() == {each.partition("=")[0] for each in kept}
