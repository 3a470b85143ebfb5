"""Which version of a published model counts, who may change that, and what is left of a deleted one. No weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from model_core.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from model_core.published import (
    STATE_NAME,
    folder_name,
    mark_deleted,
    model_id_of,
    models_in,
    promote,
    read_state,
    remove,
    roll_back,
)
from tests.model_core.versions import add_version

ROOT = Path(__file__).parents[2]


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Path, list[str]]:
    """A published model with two versions, none of them promoted."""
    out = tmp_path / folder_name("ft:tiny:acme:colours:ab12cd34")
    return out, [add_version(out, version) for version in ("one", "two")]


def test_promote_roll_back_delete(versions: tuple[Path, list[str]]) -> None:
    out, (first, second) = versions
    assert read_state(out) is None
    assert promote(out, first).current == first
    assert promote(out, second) == promote(out, second)
    assert read_state(out).previous == (first,)
    assert roll_back(out).current == first
    with pytest.raises(InvalidRequestError, match="no version to go back to"):
        roll_back(out)
    assert promote(out, second).previous == (first,)
    assert remove(out) is False, "nobody deleted it"
    assert mark_deleted(out, 7).deleted_unix == 7
    for change in (lambda: promote(out, first), lambda: roll_back(out), lambda: mark_deleted(out, 8)):
        with pytest.raises(ModelNotFoundError):
            change()
    assert remove(out) is True
    assert not out.exists()
    assert remove(out) is False


def test_a_version_that_is_not_there_is_not_promoted(versions: tuple[Path, list[str]]) -> None:
    out, (first, _) = versions
    with pytest.raises(CheckpointError):
        promote(out, "0123456789ab")
    (out / first / "variant.json").write_text("[]")
    with pytest.raises(CheckpointError):
        promote(out, first)
    assert read_state(out) is None


def test_old_versions_are_cleared_away(versions: tuple[Path, list[str]]) -> None:
    out, known = versions
    known += [add_version(out, version) for version in ("three", "four")]
    for version in known:
        promote(out, version)
    assert {folder.name for folder in models_in(out)} == set(known[1:])
    assert read_state(out).previous == (known[2], known[1])


def test_ids_hold_slashes_and_colons(tmp_path: Path) -> None:
    for model_id in ("ft:Qwen/Qwen2.5-VL:acme::ab12cd34:ckpt-step-3", "a%2Fb", "\u00e9"):
        assert model_id_of(tmp_path / folder_name(model_id)) == model_id
        assert "/" not in folder_name(model_id)
    for bad in ("", "..", ".x", "x" * 300):
        with pytest.raises(InvalidRequestError):
            folder_name(bad)


PROMOTE = """
import sys
from pathlib import Path
from model_core.published import promote
for _ in range(50):
    for version in sys.argv[2:]:
        promote(Path(sys.argv[1]), version)
"""


def test_two_processes_that_promote_leave_a_whole_state(versions: tuple[Path, list[str]]) -> None:
    out, known = versions
    commands = [[sys.executable, "-c", PROMOTE, str(out), *order] for order in (known, known[::-1])]
    processes = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    while any(process.poll() is None for process in processes):
        state = read_state(out)
        assert state is None or {state.current, *state.previous} <= {*known}
    assert [process.returncode for process in processes] == [0, 0]
    state = read_state(out)
    assert {state.current, *state.previous} == {*known}
    assert [file.name for file in out.iterdir() if file.name.endswith(".tmp")] == []


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"id": 3}', "\x00", "[" * 100_000])
def test_a_state_that_is_none_is_told(versions: tuple[Path, list[str]], text: str) -> None:
    out, (first, _) = versions
    promote(out, first)
    (out / STATE_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.json can't be read"):
        read_state(out)


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    assert list(models_in(tmp_path / "gone")) == []
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file").touch()
    assert list(models_in(tmp_path)) == []
    with pytest.raises(ModelNotFoundError):
        mark_deleted(tmp_path / "gone", 1)
