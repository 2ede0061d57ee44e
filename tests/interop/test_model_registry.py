"""The registry of public models: the form of its facts, the verb that lists it, and downloads by a direct link."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from hub_server import hub

import asit
from asit import cli
from asit.config import EncoderSettings
from asit.data.download import http
from asit.data.download.http import DownloadError
from asit.interop import model_registry
from asit.interop.convert import KINDS
from asit.interop.model_registry import RegisteredModel
from asit.model.vit import Encoder

MODELS = asit.list_models()


def is_page(text: str) -> bool:
    parts = urlsplit(text)
    return parts.scheme == "https" and "." in parts.netloc and parts.username is None


@pytest.mark.parametrize("one", MODELS, ids=lambda one: one.name)
def test_the_form_of_the_facts(one: RegisteredModel) -> None:
    assert re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", one.name)
    assert one.kind in KINDS or one.folder
    assert one.family
    assert one.title
    facts = [one.size, one.input, one.data, *([one.license] if one.license else [])]
    for fact in facts:
        assert fact.value.strip() == fact.value != ""
        assert is_page(fact.source) or fact.source == f"asit/models/{one.folder}/README.md"
    assert re.search(r"\d+ mel bins, ([\d,]+ frames \(\d+\.\d\d s\)|any length)$", one.input.value)
    if one.license:
        assert one.license.value in ("bsd-3-clause", "mit", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "apache-2.0")
    for score in one.scores:
        assert is_page(score.source) or score.source == one.page
        assert score.task
        assert score.of
        assert score.metric in ("mAP", "mAP in %", "accuracy", "accuracy in %", "PSDS1 in %", "score in %")
        assert 0 < score.value < (1 if score.metric in ("mAP", "accuracy") else 100)
    assert is_page(one.page) or one.folder
    assert sum(where is not None for where in (one.folder, one.repository, one.url, one.by_hand)) == 1
    if one.repository:
        assert re.fullmatch(r"[\w.\-]+/[\w.\-]+", one.repository)
        assert one.page == f"https://huggingface.co/{one.repository}"
    if one.url:
        assert is_page(one.url)
        assert one.bytes
        assert one.file is not None
        assert one.file in one.url


def test_names_are_no_paths_or_repositories() -> None:
    assert len({one.name for one in MODELS}) == len(MODELS) > 10
    assert model_registry.MODELS["ast"].repository == "MIT/ast-finetuned-audioset-10-10-0.4593"


def test_the_verb_lists_all_facts_with_their_sources(capsys: Any) -> None:
    assert cli.main(["models"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for one in MODELS:
        assert f"{one.name}: {one.title}" in printed
        assert any(where in printed for where in (one.url, one.repository, one.page) if where)
        assert all(fact.source in printed for fact in (one.size, one.input, one.data))
    assert "MIT/ast-finetuned-audioset-10-10-0.4593 of the Hugging Face hub, automatically" in printed
    assert "by hand: its authors' page links to a folder of Google Drive" in printed
    assert cli.main(["models", "ssast-base-frame", "--json"]) == 0
    (facts,) = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["automatic"], facts["scores"][1]["value"]) == ("ssast-base-frame", True, 84.0)
    assert cli.main(["models", "ssast-base-fram"]) == 2
    assert "there is no model ssast-base-fram, did you mean ssast-base-frame?" in capsys.readouterr().err


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server with a file of weights, and a registered model that is downloaded from there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(http, "POLICY", dataclasses.replace(http.POLICY, first_wait=0.0, longest_wait=0.0))
    encoder = Encoder(EncoderSettings(size="custom", width=64, depth=1, heads=1), 32, 128)
    encoder.init_weights(torch.Generator().manual_seed(3))
    file = tmp_path / "files" / "someone" / "there" / "ASIT_weak.pt"
    file.parent.mkdir(parents=True)
    torch.save({f"model.asit.{name}": value for name, value in encoder.state_dict().items()}, file)
    with hub(tmp_path / "files") as server:

        def register(**over: Any) -> str:
            url = f"{server.url}/someone/there/resolve/main/ASIT_weak.pt"
            facts = {"url": url, "bytes": file.stat().st_size, **over}
            known = model_registry.MODELS["asit-weak"].model_copy(update=facts)
            monkeypatch.setitem(model_registry.MODELS, "asit-weak", known)
            return url

        yield server, register, file, encoder


def test_a_direct_link_is_downloaded_resumed_and_converted_once(served: Any) -> None:
    server, register, file, encoder = served
    url = register(sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    server.cut.add("/" + url.split("/", 3)[3])
    model = asit.load("asit-weak")
    assert torch.equal(model.encoder.pos_embed, encoder.pos_embed)
    source = model.training["source"]
    assert (source["registry"], source["url"], source["file"]) == ("asit-weak", url, "ASIT_weak.pt")
    assert model.training["license"] == "mit"
    assert [line.split()[0] for line in server.asked] == ["GET", "GET"]  # the second for the rest
    server.stop()
    assert torch.equal(asit.load("asit-weak").encoder.pos_embed, encoder.pos_embed)


def test_another_content_than_the_published_checksum_is_refused(served: Any) -> None:
    _, register, _, _ = served
    register(sha256="0" * 64)
    with pytest.raises(DownloadError, match="as published"):
        asit.load("asit-weak")


def test_without_a_network(served: Any) -> None:
    server, register, _, _ = served
    register(url="http://127.0.0.1:9/nothing.pt")
    with pytest.raises(DownloadError, match="no connection"):
        asit.load("asit-weak")
    assert server.asked == []
