"""The program around the app: settings, flags, exit codes, signals, the error table, what may be imported."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from model_core import errors as core
from model_core.errors import ConfigError
from service import errors
from service.cli import main, serve_parser
from service.logs import configure_logs, log_failure, log_fields, request_id_var
from service.main import open_socket
from service.settings import ROLES, SERVER_NAMES, WORKER_NAMES, Settings, load_settings, load_worker_settings
from service.worker_commands import build_parser
from tests.service.log_schema import read_log

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("DVE_")]:
        monkeypatch.delenv(name)


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True, timeout=60)


# Settings


def test_flags_override_the_environment_and_it_the_defaults(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVE_PORT", "1111")
    monkeypatch.setenv("DVE_MAX_WAITING", "3")
    settings, _ = load_settings({"port": "2222"})
    assert (settings.port, settings.max_waiting, settings.host) == (2222, 3, "127.0.0.1")


def test_a_models_flag_beats_an_environment_that_names_it_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVE_MODEL", "/a")
    settings, _ = load_settings({"qwen_model_name": "q", "dinov2_model_name": "d"})
    assert (settings.model, settings.qwen_model_name) == (None, "q")
    assert load_settings({"model": "/b"})[0].model == "/b"


@pytest.mark.parametrize(
    ("flags", "both"),
    [
        ({"model": "m", "qwen_model_name": "q", "dinov2_model_name": "d"}, ("'m'", "'q'")),
        ({"qwen_model_name": "q"}, ("'q'", "None")),
        ({"max_num_batched_tokens": "8", "max_num_seqs": "9"}, ("8", "9")),
        ({"log_content": "true", "log_level": "warning"}, ("True", "'warning'")),
    ],
)
def test_contradictions_show_both_values(flags: dict, both: tuple[str, str]):
    with pytest.raises(ConfigError) as caught:
        load_settings(flags)
    assert all(value in str(caught.value) for value in both)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "flags",
    [{"port": "x"}, {"port": "70000"}, {"device": "tpu"}, {"dtype": "int8"}, {"request_timeout_seconds": "nan"},
     {"max_num_seqs": "0"}, {"log_format": "xml"}, {"nonsense": "1"}],
)  # fmt: skip
def test_a_bad_setting_is_named(flags: dict):
    with pytest.raises(ConfigError, match=next(iter(flags))):
        load_settings(flags)


def test_a_typo_in_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DVE_PROT", "1")
    with pytest.raises(ConfigError, match="DVE_PORT"):
        load_settings()


def test_settings_are_few_and_frozen():
    assert len(Settings.model_fields) <= 31
    for settings in (*load_settings(), *load_worker_settings()):
        with pytest.raises(ValueError, match="frozen"):
            setattr(settings, next(iter(type(settings).model_fields)), "x")


def test_what_two_roles_share_is_one_variable(monkeypatch: pytest.MonkeyPatch):
    """Server and worker find one store by the same variables, and each role's table tells the same of them."""
    monkeypatch.setenv("DVE_DATA_DIR", "/d")
    monkeypatch.setenv("DVE_DATABASE_URL", "postgresql://u:p@h/d")
    monkeypatch.setenv("DVE_WORKER_NICE", "3")
    monkeypatch.setenv("DVE_MAX_NUM_SEQS", "4")
    (server, of_server), (worker, of_worker) = load_settings(), load_worker_settings()
    assert of_server == of_worker
    assert (server.data_dir, server.max_num_seqs, worker.worker_nice) == (of_worker.data_dir, 4, 3)
    shared: dict[str, set[str]] = {}
    for role in ROLES:
        for name, field in role.model_fields.items():
            shared.setdefault(name, set()).add(f"{field.default} {field.annotation} {field.description}")
    assert all(len(told) == 1 for told in shared.values()), shared


# The command


def test_every_setting_is_a_flag_in_both_spellings():
    pairs = [(serve_parser(), name) for name in SERVER_NAMES] + [(build_parser(), name) for name in WORKER_NAMES]
    for parser, name in pairs:
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            assert vars(parser.parse_args([flag, "7"]))[name] == "7"


def test_the_worker_takes_its_own_settings_in_short_and_no_others():
    flags = vars(build_parser().parse_args(["--once", "--devices", "cpu", "--concurrency", "2"]))
    assert {name: flags[name] for name in ("once", "worker_devices", "worker_concurrency")} == {
        "once": True, "worker_devices": "cpu", "worker_concurrency": "2"
    }  # fmt: skip
    for foreign in ("--max-num-seqs", "--max-upload-bytes"):
        with pytest.raises(SystemExit):
            build_parser().parse_args([foreign, "7"])
    with pytest.raises(ConfigError, match="max_upload_bytes"):
        load_worker_settings({}, ["max_upload_bytes=7"])
    with pytest.raises(ConfigError, match="worker_nice"):
        load_settings({}, ["worker_nice=7"])


def test_print_config(capsys: pytest.CaptureFixture[str]):
    assert (
        main(["serve", "--port", "1234", "--qwen-model-name", "q", "--dinov2_model_name", "d", "--print-config"]) == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert (shown["port"], shown["qwen_model_name"], shown["dinov2_model_name"]) == (1234, "q", "d")
    assert tuple(shown) == SERVER_NAMES


def test_a_worker_prints_its_own(capsys: pytest.CaptureFixture[str]):
    assert main(["worker", "--nice", "4", "--set", "data_dir=/d", "--print-config"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert tuple(shown) == WORKER_NAMES
    assert (shown["worker_nice"], shown["data_dir"]) == (4, "/d")
    assert main(["worker", "--nice", "4", "--print-config", "--format", "table"]) == 0
    assert "| `worker_nice` | `4` | 0 to 19 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv", [["serve", "--port", "x"], ["serve", "--frobnicate"], ["frobnicate"], ["serve", "--model"], ["serve", "x"]]
)
def test_a_users_error_is_one_line_and_two(argv: list[str], capsys: pytest.CaptureFixture[str]):
    try:
        code = main(argv)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert re.fullmatch(r"dve.*error: .+\n", captured.err)


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(command in shown for command in ("serve", "infer", "demo"))


def test_connections_send_at_once():
    """Once the socket was made without its protocol, asyncio left Nagle on, and every answer took 45 ms."""
    with open_socket("127.0.0.1", 0) as opened:
        assert opened.proto == socket.IPPROTO_TCP


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run("import sys; from service.cli import main; sys.exit(main(sys.argv[1:]))", "serve", "--port", port)
    assert done.returncode == 2
    assert "can't listen" in done.stderr
    assert "Traceback" not in done.stderr


SERVE_FAKE = """
import sys
from service.main import serve
from service.settings import load_settings
from tests.service.fakes import FakeEngine
sys.exit(serve(*load_settings({"port": 0, "log_format": "json"}, sys.argv[1:]), FakeEngine))
"""

SERVE_BROKEN = """
import sys
from model_core.errors import CheckpointIncompleteError
from service.main import serve
from service.settings import load_settings
def load(): raise %s
sys.exit(serve(*load_settings({"port": 0}), load))
"""


def test_a_checkpoint_that_does_not_load_ends_the_program():
    done = run(SERVE_BROKEN % "CheckpointIncompleteError('a file is missing', value='x.safetensors')")
    assert done.returncode == 2
    assert "a file is missing. Got: x.safetensors." in done.stderr
    assert "Traceback" not in done.stderr
    assert run(SERVE_BROKEN % "RuntimeError('boom')").returncode == 1


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("broken", r"could not be loaded: .*Got: \S*broken\S*\. Allowed: a complete folder of safetensors"),
        ("nobody/nothing", r"could not be loaded: .*the hub did not give it\. Got: nobody/nothing\. Allowed: "),
    ],
)
def test_the_command_says_what_is_wrong_with_a_model_and_ends(model: str, told: str, tmp_path: Path):
    """A folder without its weights, and a hub that can't be reached."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "dual_vision"}')
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "DVE_DATA_DIR": str(tmp_path / "data")}
    command = [sys.executable, "-m", "service.cli", "serve", "--port", "0", "--model"]
    name = str(tmp_path / model) if model == "broken" else model
    done = subprocess.run(
        [*command, name], cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert re.search(told, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def running_program(*assignments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The program with a FakeEngine, once it is ready, and its address."""
    command = [sys.executable, "-c", SERVE_FAKE, *assignments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        while not any("ready: " in line["message"] for line in lines):
            lines.append(json.loads(process.stderr.readline()))
        url = next(re.search(r"http://\S+:\d+", line["message"])[0] for line in lines if "http://" in line["message"])
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_program_serves_until_a_signal_and_logs_json(tmp_path: Path):
    with running_program(f"data_dir={tmp_path}") as (process, url):
        traceparent = f"00-{'a' * 32}-{'b' * 16}-01"
        sent = {"x-request-id": "abc", "traceparent": traceparent}
        answer = httpx.get(f"{url}/v1/models", headers=sent, timeout=20)
        assert answer.status_code == 200
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=20)
        assert process.returncode == 0
    logged = read_log(rest)
    (request,) = [line for line in logged if line["message"] == "request"]
    assert (request["request_id"], request["route"], request["status"]) == ("abc", "/v1/models", 200)
    assert (request["trace_id"], request["process"]) == ("a" * 32, "server")


# Logs


@pytest.fixture
def log_stream(tmp_path: Path):
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    with (tmp_path / "log").open("w+") as stream:
        yield stream
    root.handlers[:] = before
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.parametrize("log_format", ["json", "plain"])
def test_a_log_line_is_one_line_without_an_exceptions_text(log_stream, log_format):
    configure_logs(log_format, "info", log_stream)
    token = request_id_var.set("rid-1")
    try:
        log_fields(logging.INFO, "request", user="a\nERROR forged")
        try:
            raise KeyError("what the user wrote")
        except KeyError as error:
            log_failure("broke", error)
        log_failure("died", RuntimeError("CUDA out of memory"))
    finally:
        request_id_var.reset(token)
    log_stream.seek(0)
    lines = log_stream.read().splitlines()
    assert len(lines) == 3
    assert all("rid-1" in line for line in lines)
    assert "KeyError" in lines[1]
    assert "what the user wrote" not in lines[1]
    assert "CUDA out of memory" in lines[2]


# The error table


def tree(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind}.union(*(tree(child) for child in kind.__subclasses__()))


def test_every_error_has_its_own_row_with_its_own_code():
    kinds = {kind for kind in tree(core.DualVisionError) if kind.__module__ in (core.__name__, errors.__name__)}
    assert kinds == set(errors.TABLE)
    for kind, rule in errors.TABLE.items():
        assert rule.code == kind.code, kind
        # From 500 on the words are ours: what went wrong inside is not the client's to read.
        assert (rule.status < 500) or rule.message is not None, kind


def test_an_exception_from_outside_the_tree_is_a_plain_500():
    body = errors.error_body(ZeroDivisionError("secret"), "rid-1")["error"]
    assert (body["code"], body["param"]) == ("internal_error", None)
    assert "secret" not in body["message"]
    assert "rid-1" in body["message"]


# Architecture

ONE_THREAD = """
import threading
import torch
from service.main import use_one_torch_thread

torch.set_num_threads(2)
seen = {}

def work(name, then):
    use_one_torch_thread()
    seen[name] = torch.get_num_threads()
    then()

def note(name):
    thread = threading.Thread(target=lambda: seen.__setitem__(name, torch.get_num_threads()))
    thread.start()
    thread.join()

ready = threading.Barrier(2)
pool = [threading.Thread(target=work, args=(i, ready.wait)) for i in range(2)]
for thread in pool:
    thread.start()
for thread in pool:
    thread.join()
note("later")
seen["engine"] = torch.get_num_threads()
assert seen == {0: 1, 1: 1, "later": 2, "engine": 2}, seen
"""


def test_the_pool_computes_on_one_torch_thread_and_nobody_else():
    """torch.set_num_threads also sets the default of later threads, which once slowed whatever came after."""
    done = run(ONE_THREAD)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "service").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_says_what_it_is(path: Path):
    text = path.read_text()
    assert text.startswith('"""')
    assert len(text.splitlines()) <= 400
    assert text.isascii()
