"""The page of a denoising in a headless Chromium: what it shows at each step, how it plays, that text stays text."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dlm.generation.trace import Recorder, Trace
from megatron_dlm.generation.trace_page import write
from megatron_dlm.shipped.sampler import Step
from megatron_dlm.shipped.sampler_plan import Vocabulary

_PATIENCE_SECONDS = 300.0
# Becomes the browser, which takes commands on descriptor 3 and answers on 4.
_WITH_PIPE = """if True:
    import fcntl, os, sys
    ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
    os.dup2(ends[0], 3), os.dup2(ends[1], 4)
    os.execv(sys.argv[3], sys.argv[3:])
"""
MASK, END = 1, 0
HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "\"'&amp;<!--\u2028\u202e\x1b[31m\x00",
    "@TRACE@" * 20,
]
WORDS = ["", "", "def", " add", "(a, b):", "\n    ", "return", " a + b", "\n", " \u4e16\u754c", *HOSTILE]


class Browser:
    """A Chromium, driven over its debugging pipe."""

    def __init__(self, binary: str, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [binary, *options, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WITH_PIPE, str(to_browser), str(from_browser), *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.complaints: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        (page,) = [target["targetId"] for target in targets if target["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command; collects what the page complains about on the way."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._read], [], [], _PATIENCE_SECONDS)[0], "the browser does not answer"
            received = os.read(self._read, 1 << 16)
            assert received, "the browser has gone"
            self._buffer += received
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, details = event.get("method"), event.get("params", {})
        if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(json.dumps(details))
        if method == "Network.requestWillBeSent" and not details["request"]["url"].startswith(("file:", "data:")):
            self.complaints.append(f"asks for {details['request']['url']}")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path, fragment: str = "") -> None:
        """Load the file anew, and wait until its script has run."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{path.as_uri()}#{fragment}")
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self.run("location.protocol + document.readyState") != "file:complete":
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """A key of the keyboard, down and up."""
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def screen(self, width: int, height: int, **features: str) -> None:
        """Size in CSS pixels, and media features such as prefers_color_scheme="dark"."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", features=media)

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._session = None
            self.call("Browser.close")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        binary = shutil.which(name)
        if binary and subprocess.run([binary, "--version"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("needs Chromium on PATH: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")
    browser = Browser(binary, profile)
    yield browser
    browser.close()
    shutil.rmtree(profile, ignore_errors=True)  # some tens of megabytes


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Browser]:
    """The page at its start, on a desktop; whatever a test does, the page has nothing to complain about."""
    browser.complaints.clear()
    browser.screen(1200, 800)
    browser.open(path)
    yield browser
    browser.run("1")  # what was still to be reported has come when this has
    assert browser.complaints == []


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


def trace() -> Trace:
    """Code that is filled in from its end and has an end-of-document, and a prompt with hostile text behind it."""
    recorder = Recorder(decode, Vocabulary(MASK, END))
    code = [2, 3, 4, 5, 6, 7, 8, END, 8]
    hostile = [9, *range(10, len(WORDS))]
    rows = [code, hostile]
    tokens = torch.full((2, len(code)), MASK)
    tokens[0, 0], tokens[1, 0] = code[0], hostile[0]
    nothing = torch.zeros(tokens.shape)
    recorder(Step(0, tokens.clone(), [len(row) for row in rows], nothing > 0, nothing))
    for number in range(1, len(code)):
        confidence = nothing.clone()
        for row, ids in enumerate(rows):
            position = len(code) - number if row == 0 else number
            if position < len(ids):
                tokens[row, position] = ids[position]
                confidence[row, position] = number / 10
        recorder(Step(number, tokens.clone(), [len(row) for row in rows], confidence > 0, confidence))
    return recorder.trace("A page <b>of</b> \u4e16", {"steps": "8", "seed <i>": "</dd>\u202e0"})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write(trace(), path)
    return path


# What can be read, with a box for each token that cannot.
READABLE = """Array.from(document.querySelectorAll("#text > span"), (span) =>
    getComputedStyle(span).color === "rgba(0, 0, 0, 0)" ? "\\u25a1" : span.textContent).join("|")"""
STATUS = 'document.querySelector("#status").textContent'


def settled(page: Browser) -> str:
    """What can be read once nothing is fading any more."""
    page.run("Promise.all(document.getAnimations().map((animation) => animation.finished)).then(() => 0)")
    return page.run(READABLE)


def test_steps_fill_the_boxes(page: Browser) -> None:
    box = "\u25a1"
    assert settled(page) == "|".join(["def", *[box] * 8])
    assert page.run(STATUS).startswith("Step 0 of 8 \u00b7 0 of 7 tokens")
    for _ in range(3):
        page.press("ArrowRight")
    assert settled(page) == "|".join(["def", *[box] * 5, "\n", "\u25ca", "\n"])
    assert page.run(STATUS) == "Step 3 of 8 \u00b7 2 of 7 tokens \u00b7 1 new, mean confidence 0.30"
    assert page.run('document.querySelectorAll(".fresh").length') == 1
    page.press("ArrowLeft")
    assert page.run(STATUS).startswith("Step 2 of 8")
    page.press("End")
    assert settled(page) == "def| add|(a, b):|\n    |return| a + b|\n|\u25ca|\n"
    assert page.run('document.querySelectorAll(".behind").length') == 1
    page.press("Home")
    assert settled(page).count(box) == 8


def test_lines_stay_where_they_are(page: Browser) -> None:
    places = (
        'JSON.stringify(Array.from(document.querySelectorAll("#text > span"), (span) => span.getBoundingClientRect()))'
    )
    start = page.run(places)
    for _ in range(8):
        page.press("ArrowRight")
        assert page.run(places) == start


def test_it_plays_to_the_end_and_again(page: Browser, path: Path) -> None:
    page.open(path, "speed=8")
    ended = """new Promise((done) => { const look = () => document.body.dataset.playing === "false"
        ? done(document.body.dataset.step) : setTimeout(look, 20); look(); })"""
    for _ in range(2):
        page.press(" ")
        assert page.run('get("play").getAttribute("aria-label")') == "Pause"
        assert page.run(ended) == "8"
        assert page.run('get("play").getAttribute("aria-label")') == "Play"
    page.open(path, "play=1&speed=8")
    assert page.run(ended) == "8"
    page.open(path, "play=1&speed=0.25")
    page.press(" ")
    assert page.run("document.body.dataset.playing") == "false", "space pauses"
    assert int(page.run("document.body.dataset.step")) < 8


def test_buttons_and_slider(page: Browser) -> None:
    for name, wanted in (("forward", 1), ("forward", 2), ("back", 1), ("last", 8), ("first", 0)):
        page.run(f'get("{name}").click()')
        assert page.run("document.body.dataset.step") == str(wanted)
    page.run('get("slider").value = 5; get("slider").dispatchEvent(new Event("input"))')
    assert page.run("document.body.dataset.step") == "5"
    assert page.run('get("first").disabled || get("last").disabled') is False
    page.run('get("slider").focus()')
    page.press("ArrowRight")
    assert page.run("document.body.dataset.step") == "6", "once, though the slider has keys of its own"


def test_everything_that_can_be_used_has_a_name(page: Browser) -> None:
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    names: dict[str, list[str]] = {}
    for node in nodes:
        names.setdefault(node.get("role", {}).get("value", ""), []).append(node.get("name", {}).get("value", ""))
    assert sorted(names["button"]) == ["First step", "Last step", "Play", "Step back", "Step forward"]
    assert (names["slider"], names["radio"]) == (["Step"], ["step", "confidence"])
    assert names["heading"] == ["A page <b>of</b> \u4e16"]
    assert all(name for role in ("combobox", "region", "group") for name in names[role])
    assert not any("return" in name for name in names["StaticText"]), "a box is not read out"


def test_tokens_are_coloured_by_step_or_by_confidence(page: Browser, path: Path) -> None:
    colours = (
        """Array.from(document.querySelectorAll("#text > .on"), (span) => getComputedStyle(span).backgroundColor)"""
    )
    page.open(path, "step=8")
    settled(page)
    by_step = page.run(colours)
    assert len(set(by_step)) == len(by_step) == 8
    page.press("c")
    settled(page)
    by_confidence = page.run(colours)
    assert len(set(by_confidence)) == 8 and not set(by_confidence) & set(by_step)
    assert page.run('get("low").textContent') == "unsure"
    page.run("""document.querySelector("input[value=step]").click()""")
    settled(page)
    assert page.run(colours) == by_step


def test_a_tooltip_tells_how_a_token_came(page: Browser, path: Path) -> None:
    page.open(path, "step=7")
    hover = """(() => {
        const place = document.querySelectorAll("#text > span")[%d].getBoundingClientRect();
        return [place.x + 3, place.y + place.height / 2]; })()"""
    seen = []
    for index in (0, 1, 2, 7, 8):
        x, y = page.run(hover % index)
        page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        seen.append(
            page.run('get("tip").hidden ? "" : Array.from(get("tip").children, (c) => c.textContent).join(", ")')
        )
    assert seen == [
        '"def", given \u00b7 token 2',
        "not filled in yet",
        '"(a, b):", step 7 \u00b7 confidence 0.700 \u00b7 token 4',
        "control token, step 2 \u00b7 confidence 0.200 \u00b7 token 0",
        '"\\n", step 1 \u00b7 confidence 0.100 \u00b7 token 8, behind the end of the document',
    ]
    page.press("Escape")
    assert page.run('get("tip").hidden') is True


def test_hostile_text_stays_text(page: Browser, path: Path) -> None:
    page.open(path, "row=2&step=8")
    shown = [text.replace("\u2028\u202e\x1b", "\ufffd\ufffd\u241b").replace("\x00", "\u2400") for text in HOSTILE]
    assert settled(page) == "|".join([" \u4e16\u754c", *shown])
    assert page.run("document.title") == "A page <b>of</b> \u4e16"
    assert page.run('document.querySelector("h1").textContent') == "A page <b>of</b> \u4e16"
    assert page.run('get("details").textContent') == "steps8seed <i></dd>\ufffd0"
    assert page.run('document.querySelectorAll("img, b:not(#status b), dd dd, #text script").length') == 0
    assert page.run('document.querySelectorAll("script").length') == 2


def test_samples_can_be_chosen(page: Browser) -> None:
    assert page.run('get("summary").textContent') == "8 forwards \u00b7 7 tokens \u00b7 0.9 tokens per forward"
    assert page.run('Array.from(get("row").options, (o) => o.textContent).join()') == "1 of 2: def,2 of 2: \u4e16\u754c"
    page.run('get("row").value = 1; get("row").dispatchEvent(new Event("change"))')
    assert page.run('get("summary").textContent') == "4 forwards \u00b7 4 tokens \u00b7 1.0 tokens per forward"
    assert page.run('get("slider").max') == "4"


def test_it_fits_a_phone_in_the_dark_and_stands_still_where_that_is_wanted(page: Browser, path: Path) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.run(background)
    page.screen(360, 640, prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    for fragment in ("step=8", "row=2&step=8"):
        page.open(path, fragment)
        assert page.run("document.documentElement.scrollWidth") <= 360
        sizes = page.run(
            'Array.from(document.querySelectorAll("button"), (b) => Math.min(b.offsetWidth, b.offsetHeight))'
        )
        assert min(sizes) >= 44
    assert page.run(background) != light
    page.press("ArrowLeft")
    assert page.run("document.getAnimations().length") == 0


def test_a_single_sample_needs_no_choice(page: Browser, tmp_path: Path) -> None:
    assert page.run('get("rows").offsetHeight') > 0
    both = trace()
    write(Trace(both.title, both.details, both.rows[:1]), tmp_path / "one.html")
    page.open(tmp_path / "one.html")
    assert page.run('get("rows").offsetHeight') == 0


def test_a_trace_of_nothing(page: Browser, tmp_path: Path) -> None:
    write(Trace("empty", {}, ()), tmp_path / "empty.html")
    page.open(tmp_path / "empty.html", "step=3&row=2&play=1")
    page.press(" ")
    assert page.run(STATUS).startswith("Step 0 of 0")
    assert page.run("document.body.dataset.playing") == "false"
