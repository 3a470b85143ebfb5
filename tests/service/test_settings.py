"""Settings on the command line: by name, refused by name, shown as a page that is never out of date."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_core.errors import ConfigError
from service.cli import main
from service.settings import ROLES, load_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DVE_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def logging_as_it_was() -> Iterator[None]:
    """A server that is started configures it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_set_gives_a_setting_by_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("DVE_MAX_NUM_SEQS", "3")
    argv = [
        "serve",
        "--set",
        "max_num_seqs=4",
        "--set",
        "max-waiting=5",
        "--set",
        "allowed_media_domains=*",
        "--print-config",
    ]
    assert main(argv) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["max_num_seqs"], shown["max_waiting"], shown["allowed_media_domains"]) == (4, 5, "*")


@pytest.mark.parametrize(
    ("assignments", "flags", "told"),
    [
        (["prot=1"], {}, ("prot", "Perhaps port")),
        (["port"], {}, ("port",)),
        (["=1"], {}, ("allowed",)),
        (["port=x"], {}, ("port", "'x'")),
        (["port=1", "port=2"], {}, ("twice", "'1'", "'2'")),
        (["port=1"], {"port": "2"}, ("twice", "'1'", "'2'")),
        (["model=a", "qwen_model_name=q"], {}, ("'a'", "'q'")),
        (["public_paths=/v1/models"], {}, ("public_paths", "/v1/models")),
        (["data_dir="], {}, ("data_dir",)),
        (["key_max_concurrent=-1"], {}, ("key_max_concurrent", "-1")),
    ],
)
def test_a_wrong_assignment_is_named(assignments: list[str], flags: dict, told: tuple[str, ...]):
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, assignments)
    assert all(part.lower() in str(caught.value).lower() for part in told), str(caught.value)


def test_a_key_where_its_hash_belongs_is_not_shown(logging_as_it_was, capsys: pytest.CaptureFixture[str]):
    for argv in (["--api_keys", "sk-secret"], ["--set", "api_keys=sk-secret"]):
        assert main(["serve", *argv, "--port", "0"]) == 2
        assert main(["serve", *argv, "--print-config"]) == 0
        assert main(["serve", *argv, "--set", "api_keys=sk-secret-too"]) == 2
    captured = capsys.readouterr()
    assert "sk-secret" not in captured.out + captured.err
    assert "dve keys create" in captured.err


def test_the_page_of_settings_is_the_class(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--print-config", "--format", "table"]) == 0
    shown = capsys.readouterr().out
    assert (ROOT / "SETTINGS.md").read_text() == shown, "dve serve --print-config --format table > SETTINGS.md"
    rows = [line for line in shown.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [name for role in ROLES for name in role.model_fields]
    assert all(len(row.split(" | ")) == 4 and "|  |" not in row for row in rows)


def test_that_page_shows_what_holds(capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "--port", "81", "--print-config", "--format", "table"]) == 0
    assert "| `port` | `81` | 0 to 65535 |" in capsys.readouterr().out


def test_a_databases_url_may_stand_in_a_file(tmp_path: Path) -> None:
    """Compose and Kubernetes hand secrets over as files; what is wrong is told without what is in them."""
    secret = tmp_path / "url"
    secret.write_text("postgresql://me:hush@there/jobs\n")
    url = load_settings({"database_url": f"@{secret}"})[1].database_url
    assert url is not None and url.get_secret_value() == "postgresql://me:hush@there/jobs"
    secret.write_text(" \n")
    with pytest.raises(ConfigError, match="is empty"):
        load_settings({"database_url": f"@{secret}"})
    with pytest.raises(ConfigError, match="can't be read"):
        load_settings({"database_url": f"@{tmp_path}/nowhere"})
