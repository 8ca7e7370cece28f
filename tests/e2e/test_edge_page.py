"""The live page in a real browser: a microphone that plays speech, through Caddy with TLS, to the live service."""

from __future__ import annotations

import difflib
import itertools
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, Error, Page, Playwright, expect, sync_playwright

from tests.e2e.edge_kit import EDGE, Caddy, LiveService, get, running, until, waveform, words, write_wav
from whisper_worker.languages import LANGUAGES

SITE = EDGE / "site"
SYSTEM_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SPOKEN = (
    "and so my fellow americans ask not what your country can do for you ask what you can do for your country "
    "printing in the only sense with which we are at present concerned differs from most if not from all the arts and "
    "crafts represented in the exhibition"
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    with running(LiveService(tmp_path_factory.mktemp("live"))) as service:
        yield service


@pytest.fixture(scope="module")
def caddy(live: LiveService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caddy]:
    with running(Caddy(tmp_path_factory.mktemp("caddy"), live.url, live.health_url)) as process:
        yield process


@pytest.fixture(scope="module")
def playwright_() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright_: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, playwright's own or the system's, whose microphone says two sentences and is silent then."""
    gap = np.zeros(12800, dtype=np.int16)
    speech = np.concatenate([waveform("jfk.flac"), gap, waveform("LJ001-0001.flac"), gap.repeat(20)])
    # The fake microphone wants 48 kHz.
    microphone = write_wav(tmp_path_factory.mktemp("microphone") / "speech.wav", speech.repeat(3), 48000)
    arguments = [
        "--no-sandbox",
        "--use-fake-ui-for-media-stream",
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={microphone}%noloop",
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
    pytest.skip("NO BROWSER, the live page is untested: " + "; ".join(failures))


@pytest.fixture
def page(browser: Browser, caddy: Caddy, live: LiveService) -> Iterator[Page]:
    """The page, freshly opened; it must have asked nobody else for anything and broken no policy."""
    context = browser.new_context(base_url=caddy.url, ignore_https_errors=True, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(15_000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text))
    strangers: list[str] = []
    page.on("request", lambda request: strangers.append(request.url))
    page.goto("/")
    expect(page.locator("#service")).to_have_text("The service is ready.")
    yield page
    context.close()
    assert not [url for url in strangers if not re.match(rf"(blob:)?{re.escape(caddy.url)}/", url)]
    # A connection that a test broke is reported by the browser itself; nothing else may be.
    assert not [text for text in complaints if "WebSocket" not in text and "Failed to load resource" not in text]


def record(page: Page) -> None:
    page.get_by_role("button", name="Start recording").click()
    expect(page.locator("#state")).to_have_attribute("data-state", "live")


def shown(page: Page) -> list[str]:
    """All words on the page, finished or not."""
    return words(" ".join(page.locator("#lines span, #settled, #rest").all_inner_texts()))


def finished(page: Page) -> list[str]:
    return words(" ".join(page.locator("#lines span").all_inner_texts()))


def lost_or_doubled(text: list[str], spoken: list[str]) -> list[str]:
    """What one has and the other has not; a word or two heard as others are neither."""
    matcher = difflib.SequenceMatcher(None, text, spoken, autojunk=False)
    return [
        f"{' '.join(text[i:j])}/{' '.join(spoken[k:m])}"
        for kind, i, j, k, m in matcher.get_opcodes()
        if kind in ("insert", "delete") or abs((j - i) - (m - k)) > 1
    ]


def assert_opening(text: list[str]) -> None:
    """All of what was said first is there. On a busy machine the smallest model settles "am I" for "my"."""
    assert "americans" in text
    assert lost_or_doubled(text[: text.index("americans") + 1], SPOKEN.split()[:5]) == []


def download(page: Page, form: str) -> str:
    with page.expect_download() as begun:
        page.get_by_role("button", name=f"Download {form}").click()
    assert begun.value.suggested_filename == f"transcript.{form}"
    return Path(begun.value.path()).read_text(encoding="utf-8")


@pytest.fixture
def watched(page: Page) -> Callable[[], None]:
    """Finished lines are noted whenever the page changes; the function fails where one changed or went."""
    page.evaluate(
        """() => {
          window.history_ = [];
          const texts = () => [...document.querySelectorAll("#lines span")].map((one) => one.textContent);
          const watch = new MutationObserver(() => window.history_.push(texts()));
          watch.observe(document.getElementById("lines"), { childList: true, subtree: true });
        }"""
    )

    def check() -> None:
        seen = page.evaluate("window.history_")
        assert seen
        for before, after in itertools.pairwise(seen):
            assert after[: len(before)] == before

    return check


def test_broken_connections_lose_and_double_nothing(
    page: Page, caddy: Caddy, live: LiveService, watched: Callable[[], None]
) -> None:
    """Caddy is reloaded in one sentence; in the next the service is killed and comes back."""
    record(page)
    until(lambda: "americans" in shown(page))
    assert page.locator("#rest").inner_text() or page.locator("#settled").inner_text(), "partial text is shown apart"
    caddy.reload()
    expect(page.locator("#state")).to_have_attribute("data-state", "reconnecting")
    expect(page.locator("#state")).to_have_attribute("data-state", "live")
    until(lambda: "printing" in shown(page))
    live.end(signal.SIGKILL)
    expect(page.locator("#state")).to_have_attribute("data-state", "reconnecting")
    expect(page.locator("#service")).to_contain_text("GPU box behind it does not answer")
    live.start()
    live.wait()
    expect(page.locator("#state")).to_have_attribute("data-state", "live", timeout=30_000)
    until(lambda: "exhibition" in shown(page))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#state")).to_have_attribute("data-state", "done")
    text = finished(page)
    assert lost_or_doubled(text, SPOKEN.split()) == [], " ".join(text)
    assert words(download(page, "txt")) == text
    srt = download(page, "srt")
    stamps = re.findall(r"00:00:(\d\d),(\d{3})", srt)
    times = [int(seconds) + int(milliseconds) / 1000 for seconds, milliseconds in stamps]
    assert len(times) == 2 * page.locator("#lines li").count() and times == sorted(times) and 18 < times[-1] < 23
    watched()


@pytest.mark.long
@pytest.mark.parametrize("seconds", ["5", "600"])
def test_sessions_that_the_service_ends(browser: Browser, tmp_path: Path, seconds: str) -> None:
    """By its clock, again and again, or by stopping: it completes what it has, in the middle of a word or not."""
    with (
        running(LiveService(tmp_path, MAX_CONNECTION_TIME=seconds)) as service,
        running(Caddy(tmp_path, service.url, service.health_url)) as edge,
    ):
        context = browser.new_context(base_url=edge.url, ignore_https_errors=True)
        page = context.new_page()
        page.goto("/")
        record(page)
        if seconds == "600":
            for word in ("country", "printing"):
                until(lambda: word in shown(page))  # noqa: B023 - called at once
                service.end(signal.SIGTERM)
                service.start()
                service.wait()
        until(lambda: "exhibition" in shown(page), 60)
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#state")).to_have_attribute("data-state", "done", timeout=30_000)
        text = finished(page)
        context.close()
    assert lost_or_doubled(text, SPOKEN.split()) == [], " ".join(text)


def test_at_a_devices_own_rate(page: Page) -> None:
    """Firefox gives a page no other: the worklet converts. Then a language is chosen, and the key is shown."""
    page.evaluate(
        """() => {
          const Real = AudioContext;
          window.AudioContext = class extends Real {
            createMediaStreamSource(stream) {
              if (this.sampleRate === 16000) throw new DOMException("another rate", "NotSupportedError");
              window.rate = this.sampleRate;
              return super.createMediaStreamSource(stream);
            }
          };
        }"""
    )
    page.get_by_label("Language").select_option("en")
    page.get_by_label("Key").fill("a-key")
    with page.expect_websocket() as opened:
        record(page)
    sent = opened.value
    until(lambda: "americans" in shown(page))
    expect(page.locator("#latency")).to_have_text(re.compile(r"\d\.\d s"))
    assert page.locator("#level").evaluate("one => one.value") > -60
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#state")).to_have_attribute("data-state", "done")
    assert_opening(finished(page))
    assert page.evaluate("window.rate") in (44100, 48000)
    assert sent.url.endswith("/ws")
    expect(page.locator("#heard")).to_have_text("English")
    page.get_by_role("button", name="Clear").click()
    assert finished(page) == []


def test_stop_discards_nothing(page: Page) -> None:
    """Not after a change to a device that is gone, not by a double click, and no microphone is opened behind it."""
    page.evaluate(
        """() => {
          const { mediaDevices } = navigator;
          const open = mediaDevices.getUserMedia.bind(mediaDevices);
          window.streams = [];
          window.gone = false;
          mediaDevices.getUserMedia = async (wanted) => {
            if (window.gone) throw new DOMException("gone", "OverconstrainedError");
            if (window.streams.length) await new Promise((resolve) => setTimeout(resolve, 500));
            const stream = await open(wanted);
            window.streams.push(stream);
            return stream;
          };
        }"""
    )
    record(page)
    until(lambda: "americans" in shown(page))
    page.evaluate("window.gone = true")
    page.locator("#device").dispatch_event("change")
    expect(page.locator("#problem")).to_contain_text("is gone")
    page.evaluate("window.gone = false")
    page.locator("#device").dispatch_event("change")
    page.get_by_role("button", name="Stop").dblclick()
    expect(page.locator("#state")).to_have_attribute("data-state", "done")
    assert_opening(finished(page))
    page.wait_for_timeout(1000)
    live = "window.streams.flatMap((one) => one.getTracks()).filter((one) => one.readyState === 'live').length"
    assert page.evaluate("window.streams.length") == 2 and page.evaluate(live) == 0


def test_a_wrong_key_is_told(browser: Browser, tmp_path: Path) -> None:
    """The page tried again for ever, with a lost connection for a reason: browsers hide why one is refused."""
    with (
        running(LiveService(tmp_path, WHISPER_API_KEYS="sesame")) as service,
        running(Caddy(tmp_path, service.url, service.health_url)) as edge,
    ):
        context = browser.new_context(base_url=edge.url, ignore_https_errors=True)
        page = context.new_page()
        page.goto("/")
        page.get_by_label("Key").fill("open")
        page.get_by_role("button", name="Start recording").click()
        expect(page.locator("#service")).to_contain_text("is the key right?", timeout=15_000)
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Give up").click()
        page.get_by_label("Key").fill("sesame")
        record(page)
        expect(page.locator("#service")).to_have_text("The service is ready.")
        context.close()


SCRIPTED = """async (steps) => {
  const { Dictation } = await import("./live.js");
  const Real = WebSocket;
  const sockets = [];
  window.WebSocket = class {
    bufferedAmount = 0;
    constructor() { sockets.push(this); }
    send() {}
    close() {}
  };
  const lines = [];
  const one = new Dictation("ws://nowhere", {}, [], { onLine: ({ text }) => lines.push(text) });
  const hear = (message) => sockets.at(-1).onmessage({ data: JSON.stringify(message) });
  one.start();
  for (const [step, given] of steps) {
    if (step === "open") { sockets.at(-1).onopen(); hear({ message: "SERVER_READY" }); }
    else if (step === "close") sockets.at(-1).onclose({ code: given });
    else if (step === "again") one.retryNow();
    else if (step === "abandon") one.abandon();
    else hear({ segments: [{ start: "0.1", end: "0.9", text: given, completed: true }] });
  }
  one.abandon();
  window.WebSocket = Real;
  return lines;
}"""


@pytest.mark.parametrize(
    "steps",
    [
        [("open", 0), ("hear", " Said."), ("abandon", 0)],
        [("open", 0), ("hear", " Said."), ("close", 1003)],
        [("open", 0), ("hear", " Said."), ("close", 1006), ("abandon", 0)],
        [("open", 0), ("hear", " Said."), ("close", 1006), ("again", 0), ("close", 1006), ("abandon", 0)],
        [("open", 0), ("hear", " Sai"), ("close", 1006), ("again", 0), ("open", 0), ("hear", " Said.")],
    ],
)
def test_a_finished_line_outlives_the_end(page: Page, steps: list[tuple[str, object]]) -> None:
    """One that had come less than a second before went with whoever gave up, or was refused."""
    assert [line.strip() for line in page.evaluate(SCRIPTED, steps)] == ["Said."]


def test_the_test_page(page: Page, live: LiveService) -> None:
    page.get_by_role("link", name="Test page").click()
    page.get_by_role("button", name="Send the test recording").click()
    expect(page.locator("#verdict")).to_contain_text("fellow Americans", timeout=20_000)
    expect(page.locator("#messages")).to_contain_text("SERVER_READY")


def test_health_comes_through(caddy: Caddy, live: LiveService) -> None:
    assert get(f"{caddy.url}/health", caddy.ca)[0] == 200
    assert b"whisperlive_port" in get(f"{caddy.url}/ready", caddy.ca)[1]
    assert get(f"{caddy.url}/status", caddy.ca)[0] == 404, "what the GPU box says of itself stays inside"


# -- logic, without a service --------------------------------------------------------------

SEAMS: list[tuple[str, list[tuple[str, float]], list[tuple[str, float]], str]] = [
    ("nothing stood", [], [("one", 1)], "one"),
    ("the line again", [("he", 1), ("had", 2)], [("He", 1.1), ("had,", 2.1), ("said", 3)], "said"),
    ("a repeated word", [("he", 1), ("had", 1.5)], [("he", 1.1), ("had", 1.6), ("had", 1.9)], "had"),
    ("times that moved", [("a", 1), ("b", 2)], [("a", 1.5), ("b", 2.6), ("c", 2.9)], "c"),
    ("heard otherwise", [("cat", 1), ("sat", 2)], [("cat", 1), ("set", 1.9), ("on", 3)], "on"),
    ("only what stood", [("a", 1), ("b", 2)], [("a", 1)], ""),
    ("far behind", [("no", 1)], [("no", 3)], "no"),
]


def test_seams(page: Page) -> None:
    for name, stood, heard, expected in SEAMS:
        found = page.evaluate(
            """async ([stood, heard]) => {
              const { fresh } = await import("/seam.js");
              const timed = (words) => words.map(([word, end]) => ({ word, start: end - 0.4, end }));
              const seam = stood.length ? { at: stood.at(-1)[1], words: timed(stood) } : null;
              return fresh(timed(heard), seam).map((one) => one.word).join(" ");
            }""",
            [stood, heard],
        )
        assert found == expected, name


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 96000])
def test_the_resampler(page: Page, rate: int) -> None:
    """Speech passes unchanged, what would fold down into it is gone, and pieces make no difference."""
    passed, folded, count, difference = page.evaluate(
        """async (rate) => {
          const { Resampler } = await import("/resampler.js");
          const wave = (hertz) => (_, n) => Math.sin((2 * Math.PI * hertz * n) / rate);
          const tone = (hertz) => Float32Array.from({ length: 2 * rate }, wave(hertz));
          const whole = (sound) => new Resampler(rate, 16000).push(sound);
          const level = (sound) => {
            const middle = sound.slice(8000, 24000);
            return 10 * Math.log10(2 * middle.reduce((sum, one) => sum + one * one, 0) / middle.length + 1e-12);
          };
          const sound = tone(1000);
          const once = whole(sound);
          const pieces = new Resampler(rate, 16000);
          const joined = [];
          for (let n = 0; n < sound.length; n += 128) joined.push(...pieces.push(sound.slice(n, n + 128)));
          const difference = Math.max(...once.map((one, n) => Math.abs(one - joined[n])));
          return [level(once), rate > 17000 ? level(whole(tone(8300))) : -99, joined.length, difference];
        }""",
        rate,
    )
    assert abs(passed) < 0.05
    assert folded < -60
    assert 31_900 < count <= 32_000
    assert difference < 1e-6


def test_languages_are_the_services_own() -> None:
    listed = re.search(r"`([a-z\s]+)`", (SITE / "languages.js").read_text(encoding="utf-8"))
    assert listed is not None and sorted(listed[1].split()) == sorted(LANGUAGES)


def test_the_site_needs_nobody_else() -> None:
    for path in SITE.iterdir():
        if path.suffix == ".wav":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg| in front)", text), path.name
        assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|\bstyle=", text), path.name
