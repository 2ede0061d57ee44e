"""The calls of examples/web/index.html, made of a running server, and the fields that it shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx

from asit.model.audio_model import AudioModel
from asit.serve.analysis import Analyser
from asit.serve.app import application
from asit.serve.request_queue import RequestLimits


def test_the_web_example_s_calls_have_what_it_shows(tagger: AudioModel, wav: Any, served: Any) -> None:
    page = (Path(__file__).parents[2] / "examples" / "web" / "index.html").read_text("utf-8")
    assert len(page.splitlines()) <= 40
    posted, asked = re.findall(r'ask\("([^"]+)"', page)
    with served(application(Analyser(tagger, "tagger"), RequestLimits())) as address:
        assert httpx.get(address + asked, trust_env=False).json()["status"] == "ok"
        answer = httpx.post(address + posted, content=wav(2.0), trust_env=False).json()
        refused = httpx.post(address + posted, content=b"no sound", trust_env=False)
    assert len(answer["tags"]) == 3
    values = {"answer": answer, "found": answer["tags"][0], "error": refused.json()}
    assert refused.status_code == 400
    for owner, field in set(re.findall(r"\b(answer|found)\.(\w+)", page)):
        known = {**answer["tags"][0], **refused.json()} if owner == "found" else {**answer, **refused.json()}
        assert field in known, values
