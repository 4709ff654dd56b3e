"""The chat page in a real browser: streaming, stop, edit, retry, fork; by keyboard; at a phone's width; light and dark."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import httpx
import pytest

selenium = pytest.importorskip("selenium", reason="selenium, which drives the browser, is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from serving import server  # noqa: E402

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
SHOTS = os.environ.get("RETNET_SCREENSHOTS")
"""A folder for pictures, to look at."""


@pytest.fixture(scope="module")
def running(writer):
    with server(writer, slots=2) as (address, service):
        yield address, service


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1200,800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


class Page:
    """What a person sees and does."""

    def __init__(self, browser, address) -> None:
        self.browser = browser
        browser.get(address)
        browser.execute_script("localStorage.clear()")
        browser.get(address)
        self.until(lambda: self.find("#model").text == "classics")
        self.options(temperature="0", max_tokens="12")

    def find(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def until(self, true, seconds=30.0):
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, self.browser.get_log("browser")
            time.sleep(0.02)

    def options(self, **values):
        self.find("#options").click()
        for name, value in values.items():
            field = self.find(f"#{name}")
            field.clear()
            field.send_keys(value)
        self.find("#options").click()

    def say(self, text):
        self.find("#message").send_keys(text, Keys.ENTER)

    def done(self):
        self.until(lambda: self.find("#send").is_displayed() and self.texts()[-1:] != [""])

    def texts(self):
        return [each.text for each in self.all("article > p")]

    def tool(self, article, name):
        next(each for each in self.all("article")[article].find_elements(By.TAG_NAME, "button") if each.text == name).click()

    def shot(self, name):
        if SHOTS:
            self.browser.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


@pytest.fixture
def page(browser, running):
    page = Page(browser, running[0])
    yield page
    # The policy lets the page run its own script only, and nothing of it failed.
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def reply_to(address, *messages, **options) -> str:
    roles = ["user", "assistant"] * len(messages)
    body = {"messages": [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]}
    given = {"temperature": 0, "max_tokens": 12, "top_p": 0.95} | options
    return httpx.post(f"{address}/v1/chat/completions", json=body | given).json()["choices"][0]["message"]["content"]


def test_a_message_is_answered_edited_tried_again_and_forked(page, running):
    address, _ = running
    first = reply_to(address, "In the beginning")
    page.say("In the beginning")
    page.done()
    assert page.texts() == ["In the beginning", first.strip()]
    assert "tokens/s" in page.find("#speed").text
    page.say("And then?")
    page.done()
    second = reply_to(address, "In the beginning", first, "And then?")
    assert page.texts()[2:] == ["And then?", second.strip()]
    assert int(page.find("#speed").get_attribute("title").split(" were known")[0].rsplit(" ", 1)[1]) > 4
    page.shot("desktop-light")

    page.tool(1, "Fork")
    assert page.texts() == ["In the beginning", first.strip()]
    assert [each.text for each in page.all("nav button")] == ["1", "2"]
    page.say("What else?")
    page.done()
    assert page.texts()[2] == "What else?"
    page.all("nav button")[0].click()
    assert page.texts()[2] == "And then?"

    page.tool(2, "Edit")
    assert page.find("#message").get_attribute("value") == "And then?"
    assert page.texts() == ["In the beginning", first.strip()]
    page.find("#message").clear()
    page.options(temperature="1.2", seed="5")
    page.tool(1, "Retry")
    page.done()
    assert page.texts() == ["In the beginning", reply_to(address, "In the beginning", temperature=1.2, seed=5).strip()]


def test_escape_stops_a_reply_and_frees_the_slot(page, running):
    _, service = running
    page.options(max_tokens="4000", temperature="1")
    page.say("On and on")
    page.until(lambda: len(page.texts()) == 2 and len(page.texts()[1]) > 20)
    assert page.find("#stop_reply").is_displayed()
    page.find("body").send_keys(Keys.ESCAPE)
    page.done()
    kept = page.texts()[1]
    page.until(lambda: service.scheduler.load.generating == 0, 5)
    time.sleep(0.2)
    assert page.texts()[1] == kept


def test_what_the_server_refuses_is_shown(page):
    page.options(max_tokens="99999")
    page.say("Hello")
    page.until(lambda: len(page.all(".fault")) == 1 and page.find("#send").is_displayed())
    assert "this server generates at most 4096" in page.find(".fault").text
    page.browser.get_log("browser")  # the browser notes the status itself


def test_all_of_it_can_be_reached_by_keyboard(page):
    page.say("Hello")
    page.done()
    reached, active = [], page.browser.switch_to
    for _ in range(12):
        element = active.active_element
        reached.append(element.get_attribute("id") or element.text)
        element.send_keys(Keys.TAB)
    assert {"message", "send", "new", "options", "Edit", "Fork", "Retry"} <= set(reached)
    page.find("#message").send_keys(Keys.ALT, "o")
    assert page.find("#settings").is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_and_is_legible_at_a_phones_width_and_in_both_schemes(page, width, scheme):
    browser = page.browser
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    try:
        page.say("Tell me of averyveryverylongwordthatdoesnotfitintoalineofaphonesscreenwhateveritdoes and of the sea")
        page.done()
        page.shot(f"{width}-{scheme}")
        page.find("#options").click()
        page.shot(f"{width}-{scheme}-options")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        for element in page.all("button, input, textarea"):
            if element.is_displayed():
                box = element.rect
                assert box["x"] >= 0
                assert box["x"] + box["width"] <= width + 1
                assert box["height"] >= 24  # a finger's
        for element in page.all("article > p, .tools button, #settings label, header h1, #send"):
            assert contrast(browser, element) >= 4.5, element.text
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(browser, element) -> float:
    """WCAG's ratio of an element's text to what is behind it."""
    front, back = browser.execute_script(
        """
        const own = getComputedStyle(arguments[0]).color;
        let behind = arguments[0];
        while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [own, getComputedStyle(behind).backgroundColor].map(each => each.match(/[0-9.]+/g).slice(0, 3).map(Number));
        """,
        element,
    )

    def luminance(color):
        parts = [part / 255 / 12.92 if part / 255 <= 0.04045 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in color]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(front), luminance(back)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
