"""API keys: two scopes, known by their hashes alone.

In: hashed keys of a setting or a file, or a folder where the first ones may be made. Out: a `KeyRing` that tells
whose a presented key is. It refuses to keep, log or echo a key: one is shown once, to whoever has it made.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from model_core.errors import ConfigError
from service.errors import InsufficientPermissionsError
from service.logs import logger
from service.settings import Settings

#: `training` may also do what `inference` may.
KeyScope = Literal["inference", "training"]
SCOPES: tuple[KeyScope, ...] = get_args(KeyScope)

_ENTRY = re.compile(r"(inference|training):([0-9a-fA-F]{64})")
_ID_CHARACTERS = 12
#: Every key is compared with every request's.
_MAX_KEYS = 1000


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. `key_id` is the beginning of the key's hash: fit for logs, and the name of what the key owns."""

    key_id: str
    scope: KeyScope

    def require(self, scope: KeyScope) -> None:
        """Raises InsufficientPermissionsError."""
        if scope == "training" and self.scope != "training":
            raise InsufficientPermissionsError(
                "this key may not do this, or there is nothing at this path",
                value="a key of the scope inference",
                allowed="a key of the scope training",
                fix="Ask whoever runs the server for one, or see GET /openapi.json for the paths",
            )


#: Everybody, where no keys are configured.
OPEN_CALLER = Caller("open", "training")


class KeyRing:
    """The keys of one server, as hash -> scope. Without any it is open."""

    def __init__(self, scopes: Mapping[bytes, KeyScope]) -> None:
        self._callers = tuple(
            (digest, Caller(digest.hex()[:_ID_CHARACTERS], scope)) for digest, scope in scopes.items()
        )

    @property
    def is_open(self) -> bool:
        return not self._callers

    def __len__(self) -> int:
        return len(self._callers)

    def find(self, key: bytes) -> Caller | None:
        """Compares with every hash, each in constant time: how long it takes tells nothing."""
        presented, found = hashlib.sha256(key).digest(), None
        for hash_, caller in self._callers:
            if hmac.compare_digest(hash_, presented):
                found = caller
        return found


def new_key() -> str:
    """256 random bits: a plain hash of it can't be guessed back, so none of the slow ones is needed."""
    return f"sk-dve-{secrets.token_urlsafe(32)}"


def hashed_line(key: str, scope: KeyScope) -> str:
    return f"{scope}:{hashlib.sha256(key.encode()).hexdigest()}"


def parse_keys(text: str, source: str) -> KeyRing:
    """Entries in lines or between commas; `#` begins a comment. Raises ConfigError, which never shows an entry."""
    scopes: dict[bytes, KeyScope] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        for entry in line.partition("#")[0].replace(",", " ").split():
            found = _ENTRY.fullmatch(entry)
            if found is None:
                raise ConfigError(
                    "an API key is not in its hashed form",
                    value=f"{len(entry)} characters in line {number} of {source}",
                    allowed="inference:SHA256 or training:SHA256",
                    fix="`dve keys create --scope inference` makes a key and its hashed form",
                )
            digest = bytes.fromhex(found[2])
            if digest in scopes:
                raise ConfigError(
                    "an API key is listed twice",
                    value=f"line {number} of {source}",
                    allowed="once",
                    fix="Delete one of the two",
                )
            scopes[digest] = "training" if found[1] == "training" else "inference"
    if not 0 < len(scopes) <= _MAX_KEYS:
        raise ConfigError(
            "API keys are configured, but not in a number that works",
            value=f"{len(scopes)} in {source}",
            allowed=f"1 to {_MAX_KEYS}; without the setting a server on loopback is open",
            fix="Delete those that nobody uses" if scopes else "`dve keys create --scope inference` makes one",
        )
    return KeyRing(scopes)


def read_keys(path: Path) -> KeyRing:
    """Raises ConfigError, also for a file that others than its owner may write."""
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not text"
        raise ConfigError(
            f"the file of API keys can't be read: {reason}",
            value=path,
            allowed="a text file with one SCOPE:SHA256 a line",
            fix="`dve keys create --scope inference --out FILE` makes one",
        ) from None
    if mode & 0o022:
        raise ConfigError(
            "others may write the file of API keys",
            value=f"{path}, mode {mode & 0o777:o}",
            allowed="mode 600 or 644",
            fix=f"chmod go-w {path}",
        )
    return parse_keys(text, str(path))


def load_keys(settings: Settings) -> KeyRing:
    """The configured keys; else those of the data folder; else none on loopback, and fresh ones anywhere else.

    Says in the log which it is. Raises ConfigError.
    """
    given = settings.api_keys.get_secret_value().strip() if settings.api_keys is not None else None
    if given is not None:
        ring = read_keys(Path(given[1:])) if given.startswith("@") else parse_keys(given, "api_keys")
        logger.info("%d API keys, as api_keys says", len(ring))
        return ring
    folder = settings.data_dir / "keys"
    if not (folder / "hashed").exists():
        if is_loopback(settings.host):
            logger.info("no API keys are configured: this server is open to whoever is on this machine")
            return KeyRing({})
        _make_first_keys(folder)
    ring = read_keys(folder / "hashed")
    logger.info("%d API keys from %s", len(ring), folder / "hashed")
    return ring


def is_loopback(host: str) -> bool:
    """Whether an address, or every address of a name, is this machine's own."""
    try:
        addresses = [host] if _is_address(host) else [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    except OSError:
        return False  # listening there will fail, and say why
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _make_first_keys(folder: Path) -> None:
    """One key a scope: `hashed` is for the server, `plain` for the operator. Once: the folder is there whole or not."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".keys-", dir=folder.parent))  # for its owner alone
        keys = {scope: new_key() for scope in SCOPES}
        _write_private(fresh / "hashed", "".join(f"{hashed_line(key, scope)}\n" for scope, key in keys.items()))
        told = "# The server keeps only hashes of these. Hand them out, then delete this file.\n"
        _write_private(fresh / "plain", told + "".join(f"{scope}: {key}\n" for scope, key in keys.items()))
        try:
            fresh.rename(folder)
        except OSError:
            shutil.rmtree(fresh)
            if not (folder / "hashed").exists():
                raise
            return  # another server on the same folder was quicker
    except OSError as error:
        raise ConfigError(
            f"this address is not loopback, and the keys that it takes can't be written: {error.strerror or error}",
            value=folder,
            allowed="a data_dir that can be written, without a folder 'keys', or keys in api_keys",
            fix="Set one of them, or serve on loopback",
        ) from None
    logger.warning("made one API key for each scope: read them in %s, then delete that file", folder / "plain")


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def append_key(path: Path, line: str) -> None:
    """Add a hashed line to a file, which is made for its owner alone if need be. Raises ConfigError."""
    if path.exists() and path.stat().st_size:
        read_keys(path)  # nothing is added to a file that holds anything else
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "a+", encoding="utf-8") as file:
            file.seek(0)
            text = file.read()
            file.write(line + "\n" if text.endswith("\n") or not text else f"\n{line}\n")
    except OSError as error:
        raise ConfigError(
            f"the file can't be written: {error.strerror or error}",
            value=path,
            allowed="a file that this user may write, in a folder that is there",
            fix="Make its folder, or name another one with --out",
        ) from None
