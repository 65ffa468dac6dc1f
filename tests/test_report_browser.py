"""The report in a real browser, where one is installed: errors, requests, images, tables, theme, phone."""

import shutil

import pytest
from report_helpers import full_report

pytestmark = pytest.mark.long
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    program, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs a browser: chromium and chromedriver (Debian: chromium chromium-driver) in PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture
def page(browser):
    """The report, as wide as on a desktop and light."""
    resize(browser, 1280)
    prefer(browser, "light")
    browser.get(full_report().as_uri())
    return browser


def resize(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(browser, scheme):
    # A click must not come while the page still scrolls.
    wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    features = [{"name": name, "value": value} for name, value in wanted.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_report_opens_without_errors_and_requests_and_with_every_image(page):
    assert "run" in page.title
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []
    logged = [entry["message"] for entry in page.get_log("performance")]
    requested = [message for message in logged if "Network.requestWillBeSent" in message]
    assert requested and not any('"url":"http' in message for message in requested)
    resources = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith("data:") for name in resources)
    images = page.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width])"
    )
    assert len(images) >= 4
    assert all(complete and natural > 0 and shown > 50 for complete, natural, shown in images)
    sizes = page.execute_script(
        "return [...document.querySelectorAll('.plot svg')].map(s => {let r = s.getBoundingClientRect();"
        "return [r.width, r.height, s.querySelectorAll('path').length]})"
    )
    assert len(sizes) > 15
    assert all(width > 200 and height > 80 and paths > 3 for width, height, paths in sizes)


def test_a_table_sorts_by_a_click_and_by_a_key(page):
    from selenium.webdriver.common.keys import Keys

    section = page.find_element("css selector", "#scores .side-by-side > .scroll:last-child")
    name, _, head, *_ = section.find_elements("css selector", "th")

    def column(index):
        cells = section.find_elements("css selector", f"tbody td:nth-child({index + 1})")
        return [cell.text for cell in cells]

    head.find_element("css selector", "button").click()
    falling = [float(value) for value in column(2)]
    assert falling == sorted(falling, reverse=True) and len(set(falling)) > 1
    assert head.get_attribute("aria-sort") == "descending"
    head.find_element("css selector", "button").send_keys(Keys.ENTER)
    assert [float(value) for value in column(2)] == sorted(falling)
    assert head.get_attribute("aria-sort") == "ascending"
    name.find_element("css selector", "button").click()
    assert column(0) == sorted(column(0))
    assert (name.get_attribute("aria-sort"), head.get_attribute("aria-sort")) == ("ascending", "none")


def test_the_theme_is_the_systems_until_it_is_chosen(page):
    from selenium.webdriver.support.wait import WebDriverWait

    def ground():
        return page.execute_script("return getComputedStyle(document.body).backgroundColor")

    def ink():
        text = page.find_element("css selector", ".plot svg text")
        return page.execute_script("return getComputedStyle(arguments[0]).fill", text)

    light, light_ink = ground(), ink()
    prefer(page, "dark")
    WebDriverWait(page, 10).until(lambda _: ground() != light)
    dark = ground()
    # What is drawn has the colour of the text.
    assert ink() != light_ink
    toggle = page.find_element("id", "theme")
    toggle.click()
    assert ground() == light and "light" in toggle.text
    toggle.click()
    assert ground() == dark and "dark" in toggle.text
    page.refresh()
    # Where a file may keep it, it is kept.
    toggle = page.find_element("id", "theme")
    while "system" not in toggle.text:
        toggle.click()
    prefer(page, "light")
    WebDriverWait(page, 10).until(lambda _: ground() == light)


@pytest.mark.parametrize("width", [390, 700, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    resize(page, width)
    page.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.execute_script("return innerWidth") == width
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    # The links are reachable, and lead to their sections.
    links = page.execute_script("return [...document.querySelectorAll('nav a')].map(a => a.hash.slice(1))")
    assert len(links) > 10
    assert all(page.execute_script("return !!document.getElementById(arguments[0])", link) for link in links)


def test_image_is_enlarged_by_a_click(page):
    button = page.find_element("css selector", ".zoom")
    page.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    small = button.find_element("css selector", "img").size["width"]
    button.click()
    shown = page.find_elements("css selector", "dialog[open] img")
    assert len(shown) == 2 and shown[0].size["width"] > small
    page.find_element("css selector", "dialog button").click()
    assert not page.find_elements("css selector", "dialog[open]")
