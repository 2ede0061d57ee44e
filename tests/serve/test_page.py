"""The page in a real browser: what a user does, what they see, and what must not happen. Skipped without Chromium."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import pytest
import soundfile

from asit.model.audio_model import AudioModel
from asit.search import Index, build
from asit.serve.analysis import Analyser
from asit.serve.app import application
from asit.serve.guard import Guard
from asit.serve.request_queue import RequestLimits

NASTY = "<img src=x onerror='window.hit=1'>.wav"
SHOWN = "!document.querySelector('#result').hidden && document.querySelector('#main').ariaBusy === 'false'"
CHOOSE = "{ const e = document.querySelector('%s'); e.value = '%s'; e.dispatchEvent(new Event('change')); }"
DRAWN = """(canvas => {
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  return new Set(new Uint32Array(data.buffer)).size;
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, wav: Callable[..., bytes]) -> Path:
    """A folder of recordings, one of an evil name."""
    folder = tmp_path_factory.mktemp("recordings")
    (folder / NASTY).write_bytes(wav(2.0))
    (folder / "short.flac").write_bytes(wav(0.7, kind="FLAC"))
    (folder / "عصفور.wav").write_bytes(wav(0.6, rate=8000))
    (folder / "notes.txt").write_text("no audio")
    return folder


@pytest.fixture(scope="module")
def index(folder: Path, tagger: AudioModel, tmp_path_factory: pytest.TempPathFactory) -> Index:
    out = tmp_path_factory.mktemp("index") / "index"
    build(tagger, [str(path) for path in sorted(folder.iterdir()) if path.suffix != ".txt"], out)
    return Index.read(out)


@pytest.fixture(scope="module")
def address(tagger: AudioModel, index: Index, served: Callable[[Guard], Any]) -> Iterator[str]:
    with served(application(Analyser(tagger, "tiny", index, "float32"), RequestLimits(megabytes=1.0))) as found:
        yield found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, chromium: Any) -> Iterator[Any]:
    if chromium.found() is None:
        pytest.skip("no Chromium")
    opened = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def text(browser: Any, selector: str) -> str:
    found: str = browser.run(f"document.querySelector({json.dumps(selector)}).textContent")
    return found


def test_a_recording_is_looked_at(browser: Any, address: str, folder: Path, tagger: AudioModel, tmp_path: Path) -> None:
    browser.open(address)
    assert "5 labels" in text(browser, "#model")
    browser.choose(folder / NASTY)
    browser.until(SHOWN)
    assert text(browser, "#title") == NASTY
    assert text(browser, "#facts").startswith("2.00 s \u00b7 16 kHz \u00b7 mono")
    rows = browser.run("[...document.querySelectorAll('#rows tr')].map(row => row.cells[0].textContent)")
    assert set(rows) == set(tagger.classes or ())
    # Names of files and labels are text: nothing was made of them, and nothing ran.
    assert browser.run("document.querySelectorAll('img, #result script').length") == 0
    assert browser.run("window.hit") is None
    labels = "[...document.querySelectorAll('.track .label')].map(e => [e.textContent, e.matches(':dir(rtl)')])"
    assert dict(browser.run(labels)) == {name: name in ("صفر", "نعم") for name in tagger.classes or ()}
    assert browser.run(f"{DRAWN}(document.querySelector('#spectrogram'))") > 50
    assert browser.run(f"{DRAWN}(document.querySelector('#colours'))") > 3
    # Label and score under the pointer: of a track its own, elsewhere what scores half and more.
    label = browser.run("document.querySelector('.track canvas').ariaLabel")
    browser.hover(".track .plot", 0.99)
    browser.until("/^1\\.98 s · /.test(document.querySelector('#tip').textContent)")
    assert text(browser, "#tip").startswith(f"1.98 s · {label.split(':')[0]} ")
    browser.hover("h1")
    browser.until("document.querySelector('#hair').hidden")
    # A click on the spectrogram plays from there, keys move.
    browser.until("document.querySelector('#audio').readyState > 0")
    browser.click("#seek", 0.5)
    browser.until("document.querySelector('#audio').currentTime >= 0.99 && !document.querySelector('#audio').paused")
    browser.until("document.querySelector('#play').ariaLabel === 'Pause'")
    browser.click("#play")
    browser.until("document.querySelector('#audio').paused")
    browser.run("document.querySelector('#seek').focus()")
    browser.key("Home", 36)
    browser.until("document.querySelector('#seek').ariaValueNow === '0.00'")
    browser.key("ArrowRight", 39)
    browser.until("document.querySelector('#seek').ariaValueNow === '0.10'")
    assert browser.run("document.querySelector('.playhead').style.left") == "5%"
    # Attention is drawn over it, one head after the other.
    browser.click("#attend")
    browser.until("/mean of 2 heads/.test(document.querySelector('#attended').textContent)")
    assert not browser.run("document.querySelector('#overlay').hidden")
    mean = browser.run("document.querySelector('#overlay').toDataURL()")
    browser.run(CHOOSE % ("#head", "1"))
    browser.until("/head 2 of 2/.test(document.querySelector('#attended').textContent)")
    assert browser.run("document.querySelector('#overlay').toDataURL()") != mean
    # Twice as many windows.
    before = browser.run("document.querySelectorAll('.track canvas')[0].toDataURL()")
    browser.run(CHOOSE % ("#detail", "2"))
    overlay = "!document.querySelector('#overlay').hidden"
    browser.until(f"document.querySelectorAll('.track canvas')[0].toDataURL() !== {json.dumps(before)}")
    browser.until(overlay)
    # What is downloaded is what was answered.
    browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.click("#download")
    deadline = time.monotonic() + 10
    while not (found := [path for path in tmp_path.iterdir() if path.suffix == ".json"]):
        assert time.monotonic() < deadline
        time.sleep(0.03)
    held = json.loads(found[0].read_text("utf-8"))
    assert held["name"] == NASTY
    assert len(held["labels"]["starts"]) > 4
    assert not browser.problems


def test_the_nearest_recordings_are_played(browser: Any, address: str, folder: Path, tmp_path: Path) -> None:
    browser.open(address)
    browser.choose(folder / NASTY)
    browser.until(SHOWN)
    names = browser.run("[...document.querySelectorAll('#neighbours .path')].map(e => e.textContent)")
    assert len(names) == 2  # the recording itself is no finding
    assert not any(name.endswith(NASTY) for name in names)
    assert NASTY in text(browser, "#ranking")
    (tmp_path / "another name.wav").write_bytes((folder / NASTY).read_bytes())
    browser.choose(tmp_path / "another name.wav")
    browser.until(f"{SHOWN} && document.querySelector('#title').textContent === 'another name.wav'")
    names = browser.run("[...document.querySelectorAll('#neighbours .path')].map(e => e.textContent)")
    assert any(name.endswith(NASTY) for name in names)
    assert any("عصفور" in name for name in names)
    assert browser.run("window.hit") is None
    assert len(names) == len(set(names)) == 3  # a row for each recording, with further clips of the longer one
    assert browser.run("document.querySelectorAll('#neighbours .spans .clip').length") > 1
    browser.click("#neighbours li:last-child > .clip")
    browser.until("document.querySelector('#other').currentTime > 0")
    assert browser.run("document.querySelector('#neighbours li:last-child > .clip').ariaPressed") == "true"
    browser.click("#neighbours .spans .clip")  # another one: one sounds at a time
    browser.until("document.querySelector('#neighbours .spans .clip').ariaPressed === 'true'")
    assert browser.run("document.querySelectorAll('.clip[aria-pressed=true]').length") == 1
    # Of two clicks the later one counts, though its clip comes first.
    browser.run(
        "window.real = fetch; window.count = 0; window.fetch = async (...of) => {"
        " if (!window.count++) await new Promise((go) => setTimeout(go, 200)); return real(...of); };"
        " document.querySelector('#neighbours li:first-child > .clip').click();"
        " document.querySelector('#neighbours li:last-child > .clip').click(); 1"
    )
    last = "document.querySelector('#neighbours li:last-child > .clip')"
    browser.until(f"{last}.ariaPressed === 'true'")
    time.sleep(0.3)
    assert browser.run("document.querySelectorAll('#neighbours li:first-child > [aria-pressed=true]').length") == 0
    browser.run("window.fetch = window.real; 1")
    browser.click("#neighbours .spans .clip")
    browser.until("document.querySelector('#neighbours .spans .clip').ariaPressed === 'true'")
    browser.run("document.querySelector('#other').loop = true")
    browser.click("#neighbours .spans .clip")
    browser.until("document.querySelector('#other').paused && !document.querySelector('.clip[aria-pressed=true]')")
    browser.run("document.querySelector('#other').loop = false")
    assert browser.run("document.querySelector('#whole').hidden")
    browser.click("#seek", 0.5)
    browser.click("#play")
    browser.click("#here")
    browser.until("/^To [.0-9]+\u2013[.0-9]+ s:$/.test(document.querySelector('#nearestto').textContent)")
    assert browser.run("document.querySelectorAll('#neighbours li').length") == len(names)
    browser.click("#whole")
    browser.until("document.querySelector('#nearestto').textContent === 'To the whole recording:'")
    again = browser.run("[...document.querySelectorAll('#neighbours .path')].map(e => e.textContent)")
    assert again == names
    assert not browser.problems


def test_errors_are_shown(browser: Any, address: str, folder: Path, tmp_path: Path) -> None:
    browser.open(address)
    browser.choose(folder / "short.flac")
    browser.until(SHOWN)
    browser.choose(folder / "notes.txt")
    browser.until("!document.querySelector('#error').hidden")
    assert text(browser, "#found").startswith("notes.txt: ")
    assert browser.run("document.querySelector('#result').hidden")  # it was another recording's
    large = tmp_path / "large.wav"
    large.write_bytes(bytes(1_000_001))
    browser.choose(large)
    browser.until("/takes 1 MB/.test(document.querySelector('#found').textContent)")
    browser.choose(folder / "short.flac")
    browser.until(SHOWN)
    assert browser.run("document.querySelector('#error').hidden")
    browser.run("document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), bubbles: true}))")
    browser.until("/What was dropped is no file/.test(document.querySelector('#found').textContent)")
    browser.choose(folder)
    browser.until("/cannot be read/.test(document.querySelector('#found').textContent)")
    assert browser.run("document.querySelector('#again').hidden")
    # A server that does not answer for a while is tried again, without choosing the recording again.
    browser.run("window.real = fetch; window.fetch = async () => { throw new TypeError('away'); }; 1")
    browser.choose(folder / "short.flac")
    browser.until("/does not answer/.test(document.querySelector('#found').textContent)")
    assert text(browser, "#remedy") == "See whether asit serve still runs."
    browser.run("window.fetch = window.real; 1")
    browser.click("#again")
    browser.until(SHOWN)
    assert browser.run("document.querySelector('#error').hidden")
    # The complaints of the console are the refusal itself, and the folder that cannot be read.
    assert [problem for problem in browser.problems if "400" not in problem and "FILE_NOT_FOUND" not in problem] == []
    browser.problems.clear()


def test_dropped_and_recorded(browser: Any, address: str, folder: Path) -> None:
    browser.open(address)
    browser.run(
        "(async () => { const answer = await fetch('/api/clip/0'); const dropped = new DataTransfer();"
        " dropped.items.add(new File([await answer.blob()], 'dropped.wav'));"
        " document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: dropped, bubbles: true})); })()"
    )
    browser.until(f"{SHOWN} && document.querySelector('#title').textContent === 'dropped.wav'")
    browser.click("#record")  # the browser's made-up microphone beeps
    browser.until("/Recording, [1-9] s/.test(document.querySelector('#status').textContent)")
    assert browser.run("document.querySelector('#record').ariaPressed") == "true"
    browser.click("#record")
    browser.until(f"{SHOWN} && document.querySelector('#title').textContent === 'recording.wav'")
    assert re.match(r"[1-9]\.\d\d s · (44\.1|48) kHz · mono · WAV/PCM_16", text(browser, "#facts"))
    assert not browser.problems


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_it_fits_and_can_be_read_aloud(browser: Any, address: str, folder: Path, width: int, dark: bool) -> None:
    browser.size(width, 844, dark)
    browser.open(address)
    browser.choose(folder / NASTY)
    browser.until(SHOWN)
    assert browser.run("document.documentElement.scrollWidth") <= width
    nameless = browser.run(
        "[...document.querySelectorAll('button, input, select, canvas[role], meter:not([aria-hidden])')].filter(e =>"
        " !e.hidden && !e.ariaLabel && !e.labels?.length && !e.textContent.trim()).map(e => e.outerHTML)"
    )
    assert nameless == []
    # WCAG's contrast of text, 4.5 and more, of what has a background of its own or the page's.
    low = browser.run(CONTRAST)
    assert low == []
    browser.size(1200)


CONTRAST = """
(() => {
  const light = (colour) => {
    const parts = colour.match(/[\\d.]+/g).map(Number).slice(0, 3).map((v) => v / 255);
    const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/rgba\\(.*, 0\\)|transparent/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.querySelectorAll('body *')].filter((e) => e.offsetParent && [...e.childNodes].some((n) =>
    n.nodeType === 3 && n.textContent.trim())).map((e) => {
      const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
    }).filter(([ratio]) => ratio < 4.5);
})()
"""


def test_requests_go_to_the_server_alone(browser: Any, address: str) -> None:
    asked = [url for url in browser.requests if not url.startswith(("blob:", "data:", "about:"))]
    assert len(asked) > 10
    assert {url for url in asked if not url.startswith(f"{address}/")} == set()


def test_the_page_makes_no_html_of_text() -> None:
    page = resources.files("asit.serve").joinpath("page")
    for name in ("app.js", "draw.js", "lists.js", "server.js", "sound.js", "recorder.js"):
        script = page.joinpath(name).read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    html = page.joinpath("index.html").read_text("utf-8")
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=|javascript:|https?:", html)


def test_clips_come_by_number_alone(tagger: AudioModel, index: Index, folder: Path, served: Any) -> None:
    with (
        served(application(Analyser(tagger, "tiny", index, "float32"), RequestLimits())) as address,
        httpx.Client(base_url=address, trust_env=False) as ask,
    ):
        for row in range(len(index)):
            answer = ask.get(f"/api/clip/{row}")
            assert answer.headers["content-type"] == "audio/wav"
            wave, rate = soundfile.read(io.BytesIO(answer.content))
            clip = index.clip(row)
            assert (len(wave) / rate, rate) == (pytest.approx(clip.end - clip.start, abs=1e-3), 16000)
        near = ask.get("/api/neighbours/0?k=50").json()["neighbours"]
        assert sorted(one["number"] for one in near) == list(range(1, len(index)))
        for path in (
            f"/api/clip/{len(index)}",
            "/api/clip/-1",
            "/api/clip/0x0",
            "/api/clip/..%2f..%2fetc%2fpasswd",
            "/api/clip/%2e%2e/%2e%2e/etc/passwd",
            "/api/clip//etc/passwd",
            "/api/clip/0/../../../../etc/passwd",
            f"/api/clip/{folder / 'short.flac'}",
            "/api/clip/99999999999999999999999999",
        ):
            assert ask.get(path).status_code == 404, path
        assert ask.get(f"/api/clip/0?path={folder / 'notes.txt'}").status_code == 400
        # A file that has become something else is not read out.
        row = next(row for row in range(len(index)) if index.clip(row).path.endswith("short.flac"))
        held = (folder / "short.flac").read_bytes()
        (folder / "short.flac").write_text("root:x:0:0:a secret")
        try:
            answer = ask.get(f"/api/clip/{row}")
        finally:
            (folder / "short.flac").write_bytes(held)
        assert answer.status_code == 404
        assert "secret" not in answer.text
        assert ask.get(f"/api/clip/{row}").status_code == 200


def test_an_example_and_the_controls(browser: Any, address: str, tagger: AudioModel) -> None:
    browser.open(address)
    browser.until("document.querySelector('#takes')?.textContent")
    browser.click("#example")
    browser.until(SHOWN)
    assert text(browser, "#title") == "example.wav"
    rows = "[...document.querySelectorAll('#rows tr')].map(row => row.cells[3].textContent)"
    seconds = tagger.front_end.samples_for(tagger.frames) / tagger.rate
    assert float(browser.run("document.querySelector('#window').value")) == pytest.approx(seconds, abs=1e-3)
    # A threshold that no label reaches is said, in each row and below the table.
    browser.run(CHOOSE % ("#threshold", "95"))
    browser.until("/^No label reaches 95 %/.test(document.querySelector('#scoring').textContent)")
    assert set(browser.run(rows)) == {"below 95 %"}
    assert browser.run("document.querySelector('.least').style.bottom") == "95%"
    # A shorter window gives more windows; the height of a track is the score.
    before = browser.run("document.querySelectorAll('.track canvas')[0].toDataURL()")
    browser.run(CHOOSE % ("#window", "0.2"))
    browser.until(f"document.querySelectorAll('.track canvas')[0].toDataURL() !== {json.dumps(before)}")
    filled = """(() => {
      const canvas = document.querySelector('.track canvas'), context = canvas.getContext('2d');
      const column = context.getImageData(1, 0, 1, canvas.height).data;
      return column.filter((value, i) => i % 4 === 3 && value > 127).length / canvas.height;
    })()"""
    highest = browser.run("document.querySelector('.track canvas').ariaLabel")
    assert 0 < browser.run(filled) <= float(re.findall(r"highest ([\d.]+) %", highest)[0]) / 100 + 0.02
    assert not browser.problems


def test_the_map_of_the_index(browser: Any, address: str, index: Index) -> None:
    browser.open(address)
    browser.until("document.querySelector('#map')?.hidden === false")
    assert browser.run("document.querySelectorAll('#plane circle').length") == len(index)
    assert text(browser, "#mapped").startswith(f"{len(index)} clips on their two principal components")
    assert browser.run("document.querySelectorAll('#legend li').length") >= 1
    assert browser.run("window.hit") is None
    browser.run("document.querySelector('#plane circle').dispatchEvent(new MouseEvent('click'))")
    browser.until("document.querySelector('#plane circle').getAttribute('aria-pressed') === 'true'")
    assert not browser.problems
