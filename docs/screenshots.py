"""Take pictures of every page of the built site in a headless browser, and check the pages.

`python docs/screenshots.py HTML_FOLDER OUTPUT_FOLDER` serves the folder on 127.0.0.1 and opens each page
at the widths of a desk and of a phone, light and dark. It fails with a list where a page is
wider than its window, a picture or a formula is missing, the console shows an error, a link between
pages is dead, or the search finds nothing. It uses the system's Chromium, or that of `--browser`.
"""

import argparse
import functools
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urlsplit

from playwright.sync_api import Page, TimeoutError, sync_playwright
from tqdm import tqdm

VIEWS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}},
    "phone-dark": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
SEARCHES = ("PixelQueue", "temperature")
TIMEOUT = 120_000  # milliseconds: a busy machine is not a fault of a page
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Facts about a page. A formula that is no picture is bare text.
LOOK = """() => ({
    excess: document.documentElement.scrollWidth - window.innerWidth,
    beyond: [...document.querySelectorAll("main *, article *")]
        .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1)
        .slice(0, 3).map(e => `${e.tagName.toLowerCase()} ${e.textContent.trim().slice(0, 40)}`),
    missing: [...document.images].filter(i => i.naturalWidth === 0).map(i => i.src),
    formulas: [...document.querySelectorAll(".math")]
        .filter(e => !e.querySelector("svg"))
        .map(e => e.textContent.trim().slice(0, 40)),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
})"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the page that asks for a missing file reports it."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of the folder on this machine."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def look(page: Page, address: str, picture: Path) -> tuple[list[str], dict[str, Any]]:
    """Write the picture of a page; return its problems, and its links and anchors."""
    problems: list[str] = []

    def on_console(message: Any) -> None:
        source = message.location.get("url", "")
        if message.type == "error" and not source.endswith("/favicon.ico"):  # no page asks for it
            problems.append(f"console: {message.text} {source}")

    def on_error(error: Any) -> None:
        problems.append(f"error: {error}")

    page.on("console", on_console)
    page.on("pageerror", on_error)
    page.goto(address)
    page.wait_for_load_state("networkidle")
    seen = page.evaluate(LOOK)
    page.screenshot(path=picture, full_page=True, animations="disabled")
    page.remove_listener("console", on_console)
    page.remove_listener("pageerror", on_error)
    if seen["excess"] > 0:
        problems.append(f"{seen['excess']} px wider than the window, near {seen['beyond']}")
    problems += [f"no picture: {source}" for source in seen["missing"]]
    if seen["formulas"]:
        problems.append(f"{len(seen['formulas'])} formulas not set, first {seen['formulas'][0]}")
    return problems, seen


def dead_links(root: str, folder: Path, seen: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Links from page to page whose file or anchor does not exist."""
    for name, page in seen.items():
        for link in sorted({link for link in page["links"] if link.startswith(root)}):
            address, anchor = urldefrag(link)
            target = unquote(urlsplit(address).path).lstrip("/") or "index.html"
            if not (folder / target).is_file():
                yield f"{name}: no file for {target}"
            elif anchor and target in seen and unquote(anchor) not in seen[target]["ids"]:
                yield f"{name}: no anchor for {target}#{anchor}"


def empty_searches(page: Page, root: str, words: Sequence[str]) -> Iterator[str]:
    """Words that the site's search does not find."""
    for word in words:
        page.goto(f"{root}search.html?q={quote(word)}")
        try:
            page.wait_for_selector("#search-results li")
        except TimeoutError:
            yield f"search: nothing for {word!r}"


def survey(folder: Path, output: Path, browser: str) -> list[str]:
    """All problems of the site; pictures go to one folder per view in `output`."""
    pages = [*folder.glob("*.html"), *folder.glob("generated/*.html")]
    names = sorted(path.relative_to(folder).as_posix() for path in pages)
    problems: list[str] = []
    with served(folder) as root, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        bar = tqdm(total=len(VIEWS) * len(names), unit="page", disable=None)
        for view, options in VIEWS.items():
            (output / view).mkdir(parents=True, exist_ok=True)
            page = chromium.new_page(**options)
            page.set_default_timeout(TIMEOUT)
            seen = {}
            for name in names:
                picture = output / view / f"{Path(name).stem}.png"
                found, seen[name] = look(page, root + name, picture)
                problems += [f"{name}, {view}: {problem}" for problem in found]
                bar.update()
            if view == "desktop":
                problems += dead_links(root, folder, seen)
                if "search.html" in names:
                    problems += empty_searches(page, root, SEARCHES)
            page.close()
        bar.close()
        chromium.close()
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """Check the site; the exit status is 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("html", type=Path, help="folder that Sphinx wrote")
    parser.add_argument("output", type=Path, help="folder for the pictures")
    parser.add_argument("--browser", help=f"default: one of {', '.join(BROWSERS)}")
    arguments = parser.parse_args(argv)
    if not (arguments.html / "index.html").is_file():
        parser.error(f"{arguments.html} holds no index.html; build the site first")
    browser = arguments.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        parser.error("no browser found; install Chromium, or give --browser")
    problems = survey(arguments.html, arguments.output, browser)
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems; pictures are in {arguments.output}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
