"""The page in a real browser against a real service: from the chosen file to the downloaded one."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Error, Page, Playwright, Route, expect, sync_playwright

from tests.contract.http_kit import JFK, SILENCE, Process, long_speech, until, waveform
from whisper_worker.languages import LANGUAGES, UNSPACED
from whisper_worker.types import SAMPLE_RATE

ROOT = Path(__file__).parents[2]
WEB = ROOT / "whisper_worker" / "web"
SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FIRST_WORDS_SECONDS = 3
"""Of JFK: "And so my fellow Americans"."""
KEY = "open sesame"

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module")
def playwright_() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright_: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, playwright's own or the system's, that hears speech in its microphone."""
    microphone = write_48k(tmp_path_factory.mktemp("microphone") / "speech.wav")
    arguments = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    failures = []
    for executable in (None, *filter(None, map(shutil.which, SYSTEM_BROWSERS))):
        try:
            started = playwright_.chromium.launch(executable_path=executable, args=arguments)
        except Error as error:
            failures.append(error.message.splitlines()[0])
            continue
        yield started
        started.close()
        return
    pytest.skip("NO BROWSER, the web page is untested: " + "; ".join(failures))


def write_48k(path: Path) -> Path:
    """For the fake microphone: 48 kHz, the words between a second of silence and another."""
    samples = waveform(JFK)[: FIRST_WORDS_SECONDS * SAMPLE_RATE]
    places = np.arange(3 * len(samples)) / 3
    words = np.interp(places, np.arange(len(samples)), samples).astype(np.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(3 * SAMPLE_RATE)
        silence = np.zeros(3 * SAMPLE_RATE, np.int16)
        file.writeframes(np.concatenate([silence, words, silence]).tobytes())
    return path


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Windows are decoded one by one, so that there is something to watch."""
    directory = tmp_path_factory.mktemp("service")
    with Process(directory, MODEL_BATCH_SIZE="1", WHISPER_API_KEYS=KEY) as process, process.client() as client:
        client.headers["Authorization"] = f"Bearer {KEY}"
        until(lambda: client.get("/ready").status_code == 200)
        yield client


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return long_speech(tmp_path_factory.mktemp("speech") / "three sentences.wav", 1.0)


@pytest.fixture
def page(browser: Browser, service: httpx.Client) -> Iterator[Page]:
    """The page, freshly opened; it must have said nothing to the console and asked nobody else for anything."""
    context = browser.new_context(base_url=str(service.base_url), accept_downloads=True)
    context.add_init_script(f"sessionStorage.setItem('key', '{KEY}')")
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    strangers: list[str] = []
    page.on("request", lambda request: strangers.append(request.url))
    page.goto("/")
    expect(page.locator("#model")).to_contain_text("tiny.en")
    yield page
    context.close()
    own = (str(service.base_url), f"blob:{service.base_url}".rstrip("/"))
    assert not [url for url in strangers if not url.startswith(own)]
    assert complaints == []


def transcribe(page: Page, recording: Path) -> None:
    page.set_input_files("#file", recording)
    page.get_by_role("button", name="Transcribe").click()


def finished(page: Page) -> None:
    expect(page.locator("#summary")).to_contain_text("Done:", timeout=60_000)


def download(page: Page, form: str) -> tuple[str, str]:
    """Name and text of a downloaded file."""
    with page.expect_download() as begun:
        page.get_by_role("button", name=form, exact=True).click()
    return begun.value.suggested_filename, Path(begun.value.path()).read_text(encoding="utf-8")


WATCH = """() => {
  window.seen = [];
  const look = () => {
    const bar = document.getElementById("bar");
    if (document.getElementById("progress").hidden) return;
    window.seen.push({
      phase: document.getElementById("phase").textContent.split(",")[0],
      share: bar.hasAttribute("value") ? bar.value : null,
      lines: document.querySelectorAll(".line").length,
    });
  };
  new MutationObserver(look).observe(document.body, { attributes: true, childList: true, subtree: true });
}"""


def test_from_the_recording_to_the_files(page: Page, service: httpx.Client, speech: Path) -> None:
    """What the page shows while it works is true, and untouched downloads are what the service writes."""
    page.evaluate(WATCH)
    transcribe(page, speech)
    finished(page)
    seen = page.evaluate("window.seen")
    assert [one["share"] for one in seen if one["phase"] == "Uploading"][-1] == 1
    shares = [one["share"] for one in seen if one["phase"] == "Transcribing"]
    assert shares == sorted(shares) and 0 < shares[0] < 1
    lines = [one["lines"] for one in seen]
    assert any(0 < count < lines[-1] for count in lines), "lines come while the job runs"

    with speech.open("rb") as file:
        fields = {"word_timestamps": "true", "formats": "srt,vtt,txt,json"}
        answer = service.post("/transcribe", files={"audio": file}, data=fields).json()
    for form in ("srt", "vtt", "txt"):
        assert download(page, form) == (f"three sentences.{form}", answer["formats"][form])
    written = json.loads(download(page, "json")[1])
    theirs = json.loads(answer["formats"]["json"])
    assert {key: written[key] for key in ("text", "language")} == {key: theirs[key] for key in ("text", "language")}
    assert written["segments"] == answer["segments"]
    assert page.locator(".line").count() == len(answer["segments"])


def test_words_are_played_found_and_edited(page: Page) -> None:
    transcribe(page, JFK)
    finished(page)
    audio = page.locator("#audio")
    page.locator("#lines .word", has_text="country").first.click()
    until(lambda: not audio.evaluate("audio => audio.paused") and audio.evaluate("audio => audio.currentTime > 2"), 10)
    # The word that is marked is the one that is heard.
    expect(page.locator(".word.current")).to_have_text(re.compile("country|can|do"), timeout=5000)
    assert page.locator(".line.current").get_attribute("aria-current") == "true"
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    until(lambda: audio.evaluate("audio => audio.paused"), 5)

    page.keyboard.press("/")
    page.keyboard.type("YOUR country")
    expect(page.locator("#matches")).to_have_text("2 places")
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#matches")).to_have_text("2 of 2 places")
    assert page.evaluate("[...CSS.highlights.get('found')].join()").lower() == "your country"
    page.locator("#search").fill("(no [such* thing")
    expect(page.locator("#matches")).to_have_text("0 places")

    before = json.loads(download(page, "json")[1])["segments"][-1]
    page.locator(".line .time").last.focus()
    page.keyboard.press("e")
    area = page.locator("textarea")
    expect(area).to_be_focused()
    text = area.input_value()
    area.fill("never kept")
    page.keyboard.press("Escape")
    expect(page.locator(".line").last).to_contain_text(text)
    page.keyboard.press("e")
    markup = "<img src=x onerror=alert(1)> & so on --> thing"
    area.fill(f"{text} {markup}")
    page.keyboard.press("Enter")
    expect(page.locator(".line").last).to_contain_text(f"{text} {markup}")
    assert page.locator("#transcript img").count() == 0
    after = json.loads(download(page, "json")[1])
    changed = after["segments"][-1]
    assert changed["edited"] and changed["text"] == f"{before['text']} {markup}" and after["text"].endswith(markup)
    n_words = len(before["words"])
    assert changed["words"][:n_words] == before["words"], "words that stay keep their times"
    assert "".join(word["word"] for word in changed["words"]) == changed["text"]
    times = [time for word in changed["words"] for time in (word["start"], word["end"])]
    assert times == sorted(times) and times[-1] <= changed["end"]
    assert download(page, "srt")[1].strip().endswith(f"{text} {markup.replace('-->', '->')}")
    escaped = markup.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert escaped in download(page, "vtt")[1]
    page.get_by_role("button", name="Undo the edit").click()
    assert json.loads(download(page, "json")[1])["segments"][-1] == before


def test_the_transcript_by_keyboard(page: Page) -> None:
    transcribe(page, JFK)
    finished(page)
    page.locator(".line .time").first.focus()
    focused = page.locator(":focus")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(focused).to_have_text(page.locator("#lines .word").nth(1).inner_text())
    assert focused.get_attribute("role") == "button"
    page.keyboard.press("Enter")
    until(lambda: not page.locator("#audio").evaluate("audio => audio.paused"), 5)
    page.keyboard.press("End")
    expect(focused).to_have_attribute("aria-label", page.locator(".time").last.get_attribute("aria-label") or "")
    assert page.locator(".word[role]").count() == 0
    # However long the transcript, two stops of the tabulator lead through it.
    assert page.locator("#lines [tabindex='0']").count() == 2
    page.locator("#single-keys").evaluate("box => box.closest('details').open = true")
    page.locator("#single-keys").uncheck()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert not page.locator("#search").evaluate("input => input === document.activeElement")


def test_the_microphone(page: Page) -> None:
    page.get_by_role("button", name="Record").click()
    until(lambda: page.locator("#level").evaluate("meter => meter.value > 0.05"), 10)
    expect(page.locator("#chosen")).to_contain_text(f"0:0{FIRST_WORDS_SECONDS + 1}", timeout=15_000)
    page.get_by_role("button", name="Stop recording").click()
    expect(page.locator("#chosen")).to_contain_text("recording.webm")
    page.get_by_role("button", name="Transcribe").click()
    finished(page)
    assert "america" in page.locator("#lines").inner_text().lower()
    # What a recorder writes has no length in front; the page finds it all the same.
    assert FIRST_WORDS_SECONDS - 1 < page.locator("#audio").evaluate("audio => audio.duration") < 30


def test_cancelling_withdraws_the_job(page: Page, service: httpx.Client, tmp_path: Path) -> None:
    with page.expect_response(lambda response: response.url.endswith("/jobs")) as handed:
        transcribe(page, long_speech(tmp_path / "long.wav", 10))
    job_id = handed.value.json()["id"]
    expect(page.locator(".line").first).to_be_visible(timeout=30_000)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Transcribe")).to_be_focused()
    until(lambda: service.get(f"/jobs/{job_id}").status_code == 404, 10)
    expect(page.locator("#announcer")).to_have_text("Cancelled.")
    expect(page.locator("#summary")).to_contain_text("Not all of the recording")
    assert download(page, "txt")[1].strip()
    until(lambda: service.get("/status").json()["queue"]["jobs_running"] == 0)


def test_what_goes_wrong_is_said_in_the_services_words(page: Page, service: httpx.Client, tmp_path: Path) -> None:
    paper = tmp_path / "paper.pdf"
    paper.write_bytes(b"%PDF-1.7")
    dropped = page.evaluate_handle(
        "() => { const d = new DataTransfer(); d.items.add(new File(['%PDF-1.7'], 'paper.pdf')); return d; }"
    )
    page.dispatch_event("h1", "drop", {"dataTransfer": dropped})
    expect(page.locator("#chosen")).to_contain_text("paper.pdf")
    page.get_by_role("button", name="Transcribe").click()
    alert = page.get_by_role("alert")
    expect(alert).to_be_visible(timeout=20_000)
    job = service.post("/jobs", files={"audio": paper.read_bytes()}).json()["id"]
    until(lambda: service.get(f"/jobs/{job}").json()["error"])
    expect(alert).to_have_text(service.get(f"/jobs/{job}").json()["error"]["message"])
    expect(page.locator("#waveform-note")).to_contain_text("cannot play")
    transcribe(page, SILENCE)
    expect(page.locator("#summary")).to_contain_text("There is no speech", timeout=20_000)
    expect(alert).to_be_hidden()


def test_a_key_is_asked_for(browser: Browser, service: httpx.Client) -> None:
    page = browser.new_page(base_url=str(service.base_url))
    page.goto("/")
    field = page.get_by_label("Key", exact=True)
    expect(field).to_be_focused()
    expect(page.get_by_role("alert")).to_be_hidden()
    field.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The service does not take this key.")
    field.fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("tiny.en")
    expect(field).to_be_hidden()
    transcribe(page, JFK)
    finished(page)
    page.close()


# -- a scripted stream: what no small recording brings about -------------------------------


def scripted(page: Page, *streams: list[tuple[str, Any]]) -> None:
    """Have the page hear these events of whatever it hands in, one stream for each time that it asks."""
    asked = iter(streams)
    numbers = itertools.count(1)

    def answer(route: Route) -> None:
        events = "".join(
            f"id: {next(numbers)}\nevent: {name}\ndata: {json.dumps(data)}\n\n" for name, data in next(asked)
        )
        route.fulfill(content_type="text/event-stream", body=": still here\n\n" + events)

    page.route("**/jobs/*/events", answer)


def segment(number: int, text: str, avg_logprob: float = -0.1, **more: Any) -> dict[str, Any]:
    whole = {"id": number, "start": number * 2.0, "end": number * 2.0 + 2, "text": text, "avg_logprob": avg_logprob}
    return (
        whole | {"no_speech_prob": 0.0, "compression_ratio": 1.0, "temperature": 0.0, "tokens": [1], "seek": 0} | more
    )


DOUBTED = [
    segment(0, " All is well."),
    segment(1, " Hardly heard.", -0.8),
    segment(2, " Again and again and again.", flags=["loop", "low_logprob"]),
    segment(3, " <b>Bold</b> <script>alert(1)</script>", flags=["fallback"], words=[
        {"word": " <b>Bold</b>", "start": 6.0, "end": 7.0, "probability": 0.4},
        {"word": " <script>alert(1)</script>", "start": 7.0, "end": 8.0, "probability": 0.1},
    ]),
]  # fmt: skip


def show_doubted(page: Page, **more: Any) -> None:
    result = {"text": "", "language": "en", "language_probability": 0.9, "duration": 8.0, "segments": DOUBTED}
    result |= {"warnings": ["An option was ignored."], "receipt": {"stages": {"total": 1.0}, "gaps": [[9, 11.5]]}}
    scripted(page, [("status", {"status": "running", "attempt": 1}), ("done", result | more)])
    transcribe(page, JFK)
    finished(page)


def test_doubts_are_shown_and_told(page: Page) -> None:
    show_doubted(page)
    lines = page.locator(".line")
    assert [line.get_attribute("data-doubt") for line in lines.all()] == ["0", "1", "2", "1"]
    colours = [line.evaluate("line => getComputedStyle(line).backgroundColor") for line in lines.all()]
    assert len(set(colours)) == 3 and colours[1] == colours[3]
    expect(lines.nth(1)).to_contain_text("Unsure: mean confidence 45 %")
    expect(lines.nth(2)).to_contain_text("Doubted: the text repeats itself, the model was unsure of it")
    expect(lines.nth(3)).to_contain_text("Uncertain words: <b>Bold</b>, <script>alert(1)</script>.")
    assert page.locator("#transcript b, #transcript script").count() == 0
    expect(page.locator("#summary")).to_contain_text("4 lines, 3 of them doubted")
    expect(page.locator("#notes")).to_contain_text("An option was ignored.")
    expect(page.locator("#notes")).to_contain_text("from 0:09 to 0:11")
    page.evaluate("document.activeElement.blur()")
    for label in ("0:02", "0:04", "0:06", "0:02"):
        page.keyboard.press("n")
        expect(page.locator(":focus")).to_have_attribute("aria-label", f"Play from {label}")


def test_a_broken_stream_is_taken_up_again(page: Page) -> None:
    """The first breaks off, the second tells of a restart: lines begin anew, none is shown twice."""
    running = ("status", {"status": "running", "attempt": 1})
    result = {"text": "One.", "language": "en", "language_probability": 1, "duration": 11.0, "warnings": []}
    done = ("done", result | {"segments": [segment(0, " One.")], "receipt": None})
    scripted(
        page,
        [running, ("segment", segment(0, " One."))],
        [],
        [("status", {"status": "running", "attempt": 2}), ("segment", segment(0, " One."))],
        [done],
    )
    with page.expect_request(lambda request: request.headers.get("last-event-id") == "2"):
        transcribe(page, JFK)
    finished(page)
    assert page.locator(".line").count() == 1


# -- who it is for -------------------------------------------------------------------------

NAMELESS = """() => {
  const named = (one) => one.labels?.length || one.getAttribute("aria-label") || one.textContent.trim();
  return [...document.querySelectorAll("button, input, select, textarea, audio, meter, progress, summary")]
    .filter((one) => !named(one) && one.checkVisibility()).map((one) => one.outerHTML);
}"""

# Text is held against the nearest background behind it that is not transparent.
CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => numbers(colour).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
  };
  const ratio = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const texts = [...document.querySelectorAll("body *")].filter((one) =>
    one.checkVisibility() && !one.closest(":disabled, noscript")
    && [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));
  return texts.map((one) => [ratio(getComputedStyle(one).color, behind(one)), one.outerHTML.slice(0, 80)])
    .concat([...document.querySelectorAll("button, select, input[type=search]")]
      .filter((one) => one.checkVisibility() && !one.disabled)
      .map((one) => [
        // An edge needs 3 where a text needs 4.5.
        ratio(getComputedStyle(one).borderTopColor, behind(one.parentElement)) * 1.5,
        one.outerHTML.slice(0, 80),
      ]));
}"""


def test_everybody_can_use_it(page: Page) -> None:
    """Names, one outline, colours that can be told apart, a focus that is seen, a way in and out by Tab."""
    show_doubted(page)
    page.locator("details").evaluate("details => details.open = true")
    page.locator("#lines .word").first.hover()
    assert page.evaluate(NAMELESS) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids))
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].filter(h => h.checkVisibility()).map(h => h.tagName)"
    )
    assert levels[0] == "H1" and set(levels[1:]) == {"H2"}
    assert page.evaluate("document.documentElement.lang") == "en"
    backgrounds = set()
    for theme in ("light", "dark"):
        page.get_by_label("Colours").select_option(theme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 40
        assert [one for one in contrasts if one[0] < 4.5] == []
    assert len(backgrounds) == 2
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark", "it is remembered"
    page.get_by_label("Colours").select_option("")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") in backgrounds


def test_tab_leads_through_the_page(page: Page) -> None:
    show_doubted(page)
    page.focus(".skip")
    page.keyboard.press("Shift+Tab")
    place = page.locator("#record").bounding_box()
    visited: list[str] = []
    for _ in range(60):
        page.keyboard.press("Tab")
        where = page.evaluate(
            """() => {
              const one = document.activeElement;
              const style = getComputedStyle(one.id === "file" ? document.querySelector("label[for=file]") : one);
              const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
              return [one.id || one.className || one.tagName, outlined];
            }"""
        )
        if visited and where[0] in ("BODY", visited[0]):
            break
        visited.append(where[0])
        if where[0] == "file":
            # It once appeared, and pushed the next button from under the mouse.
            assert page.locator("#record").bounding_box() == place
        assert where[1] or where[0] == "audio", f"the focus on {where[0]} is not seen"
    else:
        pytest.fail("the way by Tab does not end")
    order = ["skip", "theme", "file", "record", "start", "follow", "search", "time", "edit", "SUMMARY"]
    assert [name for name in visited if name in order] == order
    assert {"audio", "next", "previous", "next-doubt"} <= set(visited)


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_sticks_out(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 700})
    show_doubted(page)
    page.locator("details").evaluate("details => details.open = true")
    page.locator(".edit").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_an_update_meets_no_half_of_the_old_page(service: httpx.Client) -> None:
    for path in ("/", "/static/main.js"):
        answer = service.get(path)
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-security-policy"] == "frame-ancestors 'self'"
        unchanged = service.get(path, headers={"If-None-Match": answer.headers["etag"]})
        # The one file at the root is small; the framework compares the others.
        assert unchanged.status_code == (200 if path == "/" else 304)
        assert unchanged.headers["cache-control"] == "no-cache"


# -- without a browser ---------------------------------------------------------------------


def test_languages_are_the_workers_own() -> None:
    script = (WEB / "languages.js").read_text(encoding="utf-8")
    codes, unspaced = script.split("UNSPACED")
    assert " ".join(re.findall(r'"([a-z ]+)"', codes)).split() == list(LANGUAGES)
    assert set(re.findall(r'"([a-z]+)"', unspaced.split(";")[0])) == UNSPACED


def test_the_page_needs_nobody_else_and_stays_small() -> None:
    files = [path for path in WEB.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|\bstyle=", text), path.name
