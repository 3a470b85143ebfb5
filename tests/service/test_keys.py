"""Keys as they are kept: hashed, parsed strictly, made once for one folder, and never shown by an error or a log."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import threading
from pathlib import Path

import pytest

from model_core.errors import ConfigError
from service import keys as module
from service.cli import main
from service.errors import InsufficientPermissionsError
from service.keys import KeyRing, hashed_line, is_loopback, load_keys, new_key, parse_keys, read_keys
from service.settings import Settings

KEY, OTHER = "sk-dve-one", "sk-dve-two"


def settings(tmp_path: Path, **more) -> Settings:
    return Settings(**{"host": "0.0.0.0", "data_dir": tmp_path / "data", **more})


def plain_keys(folder: Path) -> dict[str, str]:
    lines = (folder / "plain").read_text().splitlines()
    return dict(line.split(": ") for line in lines if not line.startswith("#"))


def test_a_new_key_is_long_random_and_fits_a_header() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(re.fullmatch(r"sk-dve-[A-Za-z0-9_-]{43}", key) for key in keys)


def test_a_ring_knows_keys_by_their_hashes() -> None:
    ring = parse_keys(f"{hashed_line(KEY, 'inference')}, {hashed_line(OTHER, 'training')}", "here")
    assert len(ring) == 2 and not ring.is_open
    caller = ring.find(KEY.encode())
    assert (caller.key_id, caller.scope) == (hashlib.sha256(KEY.encode()).hexdigest()[:12], "inference")
    assert ring.find(OTHER.encode()).scope == "training"
    for wrong in (b"", b"sk-dve-one ", b"SK-DVE-ONE", hashlib.sha256(KEY.encode()).hexdigest().encode(), b"\xff" * 99):
        assert ring.find(wrong) is None
    with pytest.raises(InsufficientPermissionsError):
        caller.require("training")
    caller.require("inference")
    ring.find(OTHER.encode()).require("inference")


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    ring, compared = parse_keys("\n".join(hashed_line(f"k{i}", "inference") for i in range(5)), "here"), []
    original = hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append(a) or original(a, b))
    for key in (b"k0", b"k4", b"none"):
        compared.clear()
        ring.find(key)
        assert len(compared) == 5


def test_a_file_may_have_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\n{hashed_line(KEY, 'inference').upper().replace('INFERENCE', 'inference')}  # Ada\n")
    assert read_keys(path).find(KEY.encode()).scope == "inference"


@pytest.mark.parametrize(
    "text",
    ["", "# nothing", "secret-key", f"admin:{'0' * 64}", f"inference:{'0' * 63}", f"inference:{'g' * 64}", "inference:",
     f"inference:{'0' * 64}\ntraining:{'0' * 64}", "\n".join(f"inference:{i:064x}" for i in range(1001))],
)  # fmt: skip
def test_keys_that_are_not_right_end_the_start_without_being_shown(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(text, "here")
    assert "here" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "0" * 60 not in str(caught.value)


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "keys"
    path.write_text(hashed_line(KEY, "inference"))
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode {mode:o}.*chmod go-w"):
        read_keys(path)
    path.chmod(0o644)
    assert len(read_keys(path)) == 1


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    with pytest.raises(ConfigError, match="keys"):
        load_keys(settings(tmp_path, api_keys=f"@{tmp_path}/keys"))


def test_configured_keys_come_first(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(hashed_line(OTHER, "training"))
    assert load_keys(settings(tmp_path, api_keys=hashed_line(KEY, "inference"))).find(KEY.encode())
    assert load_keys(settings(tmp_path, api_keys=f"@{tmp_path}/keys")).find(OTHER.encode())
    assert not (tmp_path / "data").exists(), "where keys are configured none are made"
    with pytest.raises(ConfigError, match="0 in api_keys"):
        load_keys(settings(tmp_path, api_keys="", host="127.0.0.1"))


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("::ffff:10.0.0.1", False), ("no-such-name.invalid", False)],
)  # fmt: skip
def test_what_counts_as_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_on_loopback_a_server_without_keys_is_open_and_says_so(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, "dve"):
        assert load_keys(settings(tmp_path, host="127.0.0.1")).is_open
    assert "open" in caplog.text
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_elsewhere_one_key_a_scope_is_made_once(tmp_path: Path, caplog, host: str) -> None:
    with caplog.at_level(logging.DEBUG, "dve"):
        ring = load_keys(settings(tmp_path, host=host))
    folder = tmp_path / "data" / "keys"
    keys = plain_keys(folder)
    assert set(keys) == {"inference", "training"}
    assert {scope: ring.find(key.encode()).scope for scope, key in keys.items()} == {s: s for s in keys}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {"hashed": 0o600, "plain": 0o600}
    assert str(folder / "plain") in caplog.text
    for key in keys.values():
        assert key not in caplog.text
        assert key not in (folder / "hashed").read_text()
    # Once: the next start takes the same, on loopback too, and does without the plain ones.
    (folder / "plain").unlink()
    for again in (host, "127.0.0.1"):
        assert load_keys(settings(tmp_path, host=again)).find(keys["training"].encode()).scope == "training"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["keys"]


def test_servers_that_start_at_once_on_one_folder_have_the_same_keys(tmp_path: Path) -> None:
    barrier, rings = threading.Barrier(8), []

    def begin() -> None:
        barrier.wait()
        rings.append(load_keys(settings(tmp_path)))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    keys = plain_keys(tmp_path / "data" / "keys")
    assert len(rings) == 8
    assert all(ring.find(key.encode()).scope == scope for ring in rings for scope, key in keys.items())
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["keys"]


def test_a_folder_that_can_not_be_written_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ConfigError, match="not loopback") as caught:
        load_keys(settings(tmp_path))
    assert "api_keys" in str(caught.value)


def test_a_folder_without_its_hashes_is_not_taken_for_one_with_keys(tmp_path: Path) -> None:
    load_keys(settings(tmp_path))
    (tmp_path / "data" / "keys" / "hashed").unlink()
    with pytest.raises(ConfigError, match="keys"):
        load_keys(settings(tmp_path))


# The command


@pytest.mark.parametrize("scope", ["inference", "training"])
def test_the_command_makes_a_key_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], scope: str) -> None:
    path = tmp_path / "keys"
    made = {}
    for _ in range(2):
        assert main(["keys", "create", "--scope", scope, "--out", str(path)]) == 0
        key, line = capsys.readouterr().out.splitlines()
        made[key] = line
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().splitlines() == list(made.values())
    assert all(read_keys(path).find(key.encode()).scope == scope for key in made)


def test_a_line_is_added_below_one_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(hashed_line(KEY, "inference"))
    assert main(["keys", "create", "--scope", "training", "--out", str(path)]) == 0
    assert len(read_keys(path)) == 2


def test_nothing_is_added_to_another_kind_of_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes"
    path.write_text("remember the milk\n")
    assert main(["keys", "create", "--scope", "inference", "--out", str(path)]) == 2
    assert main(["keys", "create", "--scope", "inference", "--out", str(tmp_path / "gone" / "x")]) == 2
    assert path.read_text() == "remember the milk\n"
    captured = capsys.readouterr()
    assert captured.out == "", "a key that was not added is not shown"
    assert all(re.fullmatch(r"dve keys: error: .+", line) for line in captured.err.splitlines())


@pytest.mark.parametrize(
    "argv", [["keys"], ["keys", "create"], ["keys", "create", "--scope", "root"], ["keys", "list"]]
)
def test_a_wrong_call_is_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_empty_ring_is_open() -> None:
    assert KeyRing({}).is_open
    assert KeyRing({}).find(b"") is None
