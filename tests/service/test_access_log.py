"""One line a request: its key's id, its route, its status, its time; never the key, and no content but by a setting."""

from __future__ import annotations

import hashlib
import logging
import queue
from collections.abc import Iterator

import pytest

from service.logs import logger
from tests.service.conftest import ask
from tests.service.test_auth import INFERENCE, KEYS, bearer
from tests.service.test_bad_input import CHAT


class AccessLog(logging.Handler):
    """Everything that is logged; an access line may come after the answer, so it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.lines: queue.SimpleQueue[dict] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        if record.getMessage() == "request":
            self.lines.put(record.fields)

    def line(self) -> dict:
        return self.lines.get(timeout=20)

    @property
    def text(self) -> str:
        return str([vars(record) for record in self.records])


@pytest.fixture
def access_log() -> Iterator[AccessLog]:
    log, level = AccessLog(), logger.level
    logger.addHandler(log)
    logger.setLevel(logging.DEBUG)
    yield log
    logger.removeHandler(log)
    logger.setLevel(level)


def test_a_line_has_the_keys_id_and_neither_key_nor_content(start, access_log: AccessLog) -> None:
    live = start(api_keys=KEYS)
    body = ask("a secret question", images=1)
    answer = live.http.post(CHAT, json=body, headers=bearer(INFERENCE) | {"x-request-id": "rid-1"})
    line = access_log.line()
    assert (line["route"], line["status"], line["method"]) == (CHAT, 200, "POST")
    assert line["key_id"] == hashlib.sha256(INFERENCE.encode()).hexdigest()[:12]
    assert line["seconds"] > 0
    for untold in (INFERENCE, "secret", answer.json()["choices"][0]["message"]["content"], "iVBOR"):
        assert untold not in access_log.text
    assert live.http.post(CHAT, json=body, headers=bearer("sk-dve-wrong")).status_code == 401
    line = access_log.line()
    assert (line["route"], line["status"]) == (CHAT, 401)
    assert "key_id" not in line
    assert "sk-dve" not in access_log.text
    live.http.delete("/v1/models/fake/model:1", headers=bearer(INFERENCE))
    line = access_log.line()
    assert (line["route"], line["status"]) == ("/v1/models/{model_id:path}", 403)


def test_content_is_logged_where_a_setting_asks_for_it(start, access_log: AccessLog) -> None:
    live = start(log_content=True)
    for is_stream in (False, True):
        assert live.chat("what is it?", images=1, stream=is_stream, n=2).status_code == 200
        line = access_log.line()
        assert line["messages"] == [{"role": "user", "text": "<image_url>what is it?"}]
        assert line["answers"] == {0: "a red fox", 1: "a red fox"}
        assert line["key_id"] == "open"
