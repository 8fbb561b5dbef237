"""A real browser for the pages: without one on this machine their tests are skipped."""

import shutil

import pytest

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(names)} is installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """A function: a page's path, and a browser context's options, to the open page. What went wrong in the page, a
    message on its console, an error, a request for anything but the file itself, fails the test at its end."""
    contexts, wrong = [], []

    def open_one(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: None if _is_local(request.url) else wrong.append(f"request: {request.url}"))
        page.goto(path if str(path).startswith("about:") else path.resolve().as_uri())
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not wrong


def _is_local(url):
    return url.startswith(("file:", "data:", "blob:", "about:"))
