"""The HTTP API for other pages and programs: OpenAPI, allowed origins, the map of an index, what people read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from asit.model.audio_model import AudioModel
from asit.search import Index, build
from asit.serve.analysis import Analyser
from asit.serve.app import application
from asit.serve.guard import Guard
from asit.serve.index_map import index_map
from asit.serve.request_queue import RequestLimits
from asit.serve.routes import ENDPOINTS, GETS

SITE = "https://example.org"


@pytest.fixture(scope="module")
def index(tagger: AudioModel, tmp_path_factory: pytest.TempPathFactory, wav: Callable[..., bytes]) -> Index:
    folder = tmp_path_factory.mktemp("index")
    paths = [folder / f"{name}.wav" for name in "ab"]
    for path, seconds in zip(paths, (2.0, 0.7), strict=True):
        path.write_bytes(wav(seconds))
    build(tagger, [str(path) for path in paths], folder / "index")
    return Index.read(folder / "index")


def client(tagger: AudioModel, index: Index | None, served: Callable[[Guard], Any], **options: Any) -> Any:
    return served(application(Analyser(tagger, "tiny", index, "float32"), RequestLimits(), **options))


@pytest.fixture(scope="module")
def ask(tagger: AudioModel, index: Index, served: Callable[[Guard], Any]) -> Iterator[httpx.Client]:
    with client(tagger, index, served, origins=[SITE]) as address, httpx.Client(base_url=address) as found:
        yield found


def test_openapi_lists_every_route_and_option(ask: httpx.Client) -> None:
    document = ask.get("/api/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    held = {(path, method): entry for path, methods in document["paths"].items() for method, entry in methods.items()}
    wanted = {(path, "get") for path in GETS} | {(f"/api/{name}", "post") for name in ENDPOINTS}
    assert held.keys() == wanted
    identifiers = [entry["operationId"] for entry in held.values()]
    assert len(set(identifiers)) == len(identifiers)
    for path, method in wanted:
        options = (ENDPOINTS[path.removeprefix("/api/")] if method == "post" else GETS[path])[1]
        queries = {one["name"]: one for one in held[path, method]["parameters"] if one["in"] == "query"}
        assert queries.keys() == options.keys()
        for name, option in options.items():
            assert queries[name]["schema"].get("default") == option.default
    # Each GET that it lists is answered, and what it says of a bad value holds.
    for path in GETS:
        assert ask.get(path.format(number=0)).status_code == 200, path
    assert ask.get("/api/neighbours/0", params={"k": 1001}).status_code == 400


def test_an_allowed_site_may_ask_and_others_may_not(ask: httpx.Client, wav: Callable[..., bytes]) -> None:
    asked = {"origin": SITE, "access-control-request-method": "POST", "sec-fetch-site": "cross-site"}
    before = ask.options("/api/tag", headers=asked)
    assert before.status_code == 204
    assert before.headers["access-control-allow-origin"] == SITE
    assert "POST" in before.headers["access-control-allow-methods"]
    answer = ask.post("/api/tag", content=wav(0.5), headers={"origin": SITE, "sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SITE
    assert answer.headers["vary"] == "origin"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    for other in ("https://example.org.evil.net", "http://example.org", "null"):
        refused = ask.post("/api/tag", content=wav(0.5), headers={"origin": other})
        assert refused.status_code == 403, other
        assert "access-control-allow-origin" not in refused.headers
        assert "--allow-origin" in refused.json()["remedy"]
        assert ask.options("/api/tag", headers={"origin": other}).status_code == 403
    # The page itself is shared with nobody, and a request without an origin is answered as before.
    assert "access-control-allow-origin" not in ask.get("/", headers={"origin": SITE}).headers
    assert "access-control-allow-origin" not in ask.get("/api/health").headers


def test_any_site_may_be_allowed(tagger: AudioModel, served: Callable[[Guard], Any]) -> None:
    with client(tagger, None, served, origins=["*"]) as address:
        answer = httpx.get(f"{address}/api/model", headers={"origin": "http://other.net"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "http://other.net"
        assert httpx.get(f"{address}/api/map").status_code == 404  # there is no index


def test_people_read_no_bytes(ask: httpx.Client) -> None:
    refused = ask.post("/api/tag", content=bytes(range(1, 100)))
    assert refused.status_code == 400
    assert "is not a sound file of a known kind" in refused.json()["found"]
    assert "01 02" not in refused.text


def test_the_map_against_numpy(ask: httpx.Client, index: Index) -> None:
    found = ask.get("/api/map").json()
    vectors = np.stack([index.vector(row) for row in range(len(index))]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values, axes = np.linalg.eigh(np.cov(vectors.T, bias=True))
    expected = (vectors - vectors.mean(0)) @ axes[:, ::-1][:, :2]
    points = np.array([[one["x"], one["y"]] for one in found["points"]])
    scale = np.abs(expected).max()
    for axis in range(2):  # up to the sign of a component
        off = min(np.abs(points[:, axis] * scale - sign * expected[:, axis]).max() for sign in (1, -1))
        assert off < 1e-4 * scale + 5e-5
    assert found["explained"] == pytest.approx(values[::-1][:2].sum() / values.sum(), abs=1e-3)
    assert found["total"] == len(index) == len(found["points"])


@pytest.mark.parametrize("rows", [1, 2, 5000])
def test_maps_of_any_size(rows: int) -> None:
    rng = np.random.default_rng(0)
    centres = 4 * rng.normal(size=(3, 6))
    vectors = np.concatenate([centres, rng.normal(size=(rows, 6)) + centres[np.arange(rows) % 3]])[-rows:]

    class Rows:
        def __init__(self) -> None:
            self.vectors = vectors

        def __len__(self) -> int:
            return rows

        def clip(self, row: int) -> SimpleNamespace:
            return SimpleNamespace(name=f"{Path('a') / str(row)}", start=0.0, end=1.0, label=None)

    stop, seen = threading.Event(), []
    found = index_map(Rows(), lambda: seen.append(stop.is_set()))  # type: ignore[arg-type]
    assert len(found["points"]) == min(rows, 2000)
    assert all(-1 <= point[axis] <= 1 for point in found["points"] for axis in "xy")
    assert len({point["group"] for point in found["points"]}) <= found["groups"] <= 8
    assert found["points"][-1]["number"] == rows - 1
    assert seen
