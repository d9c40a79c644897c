"""Drives headless Chromium over pages on the disk, and looks for what a reader would stumble on.

Chromium is Debian's (or any in PATH), Playwright drives it, and axe-core comes with axe-playwright-python (the extra
`browser`). No page is asked for over the network.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
# A phone, a tablet, and a laptop.
WIDTHS = (390, 820, 1280)
HEIGHT = 900
# An A4 page between its margins.
PRINTED_WIDTH = 703
# The machine may be busy.
TIMEOUT_MS = 300_000
# axe's findings of this weight fail.
GRAVE = ("serious", "critical")
# Columns of a table that decide, its first among them: they are seen at once on a phone.
DECIDING_COLUMNS = 3

# Regions of tables that are seen without opening anything: [name, width of the content, of the region, tabindex].
REGIONS = """() => [...document.querySelectorAll('.scroll')]
    .filter(e => e.checkVisibility({contentVisibilityAuto: true}))
    .map(e => [e.getAttribute('aria-label') || '', e.scrollWidth, e.clientWidth, e.tabIndex])"""
# Tables whose first columns reach beyond their region: their captions.
HIDDEN_COLUMNS = """count => [...document.querySelectorAll('.scroll')]
    .filter(e => e.checkVisibility({contentVisibilityAuto: true}))
    .filter(e => [...e.querySelectorAll('thead th')].slice(0, count)
        .some(h => h.getBoundingClientRect().right > e.getBoundingClientRect().right + 1))
    .map(e => e.querySelector('caption')?.textContent || '')"""
PICTURES = """async () => {
    const all = [...document.images];
    all.forEach(i => { i.loading = 'eager'; });
    await Promise.all(all.map(i => i.decode().catch(() => 0)));
    return all.filter(i => !i.complete || !i.naturalWidth).map(i => i.getAttribute('src').slice(0, 80));
}"""
# Folded parts that are no higher than their summaries.
FOLDED_UNSEEN = """() => [...document.querySelectorAll('details:not([open])')]
    .filter(e => e.offsetHeight <= e.querySelector('summary').offsetHeight + 2).length"""


class Tab:
    """One page, open at a width.

    Attributes:
      page: Playwright's. asked: addresses that the page asked for.
    """

    def __init__(self, page, path: Path):
        self.page, self.path, self.asked = page, path, []
        page.on("request", lambda request: self.asked.append(request.url))
        page.set_default_timeout(TIMEOUT_MS)
        page.goto(path.resolve().as_uri())

    def sideways(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")

    def cut_off(self) -> list[str]:
        """Tables that are wider than their place."""
        return [name for name, content, place, _ in self.page.evaluate(REGIONS) if content > place + 1]

    def unreachable(self) -> list[str]:
        """Tables that scroll and that the keyboard does not reach."""
        return [name for name, content, place, tab in self.page.evaluate(REGIONS) if content > place + 1 and tab < 0]

    def hidden_columns(self) -> list[str]:
        """Tables whose deciding columns are not all seen at once."""
        return self.page.evaluate(HIDDEN_COLUMNS, DECIDING_COLUMNS)

    def missing_pictures(self) -> list[str]:
        return self.page.evaluate(PICTURES)

    def broken_links(self) -> list[str]:
        """Links to files that are not there, and to places that the page lacks."""
        links = self.page.evaluate("[...document.links].map(a => a.getAttribute('href'))")
        ids = set(self.page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        broken = []
        for link in links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            inside = not parts.path and unquote(parts.fragment) in ids
            if not inside and not (parts.path and (self.path.parent / unquote(parts.path)).is_file()):
                broken.append(link)
        return broken

    def foreign_requests(self) -> list[str]:
        """What the page asked for beside files in its own folder."""
        folder = self.path.resolve().parent.as_uri()
        return [url for url in self.asked if not url.startswith((folder, "data:"))]

    def findings(self) -> list[str]:
        """axe-core's serious and critical findings: rule, and the first place of each."""
        from axe_playwright_python.sync_playwright import Axe

        violations = Axe().run(self.page).response["violations"]
        return [
            f"{violation['id']} ({violation['impact']}, {len(violation['nodes'])}): {violation['nodes'][0]['html'][:120]}"
            for violation in violations
            if violation["impact"] in GRAVE
        ]

    def folded_when_printed(self) -> int:
        """Folded parts that a print would leave out."""
        self.page.emulate_media(media="print")
        number = self.page.evaluate(FOLDED_UNSEEN)
        self.page.emulate_media(media="screen")
        return number

    def cut_off_when_printed(self) -> list[str]:
        """Tables that are wider than a printed page."""
        self.page.set_viewport_size({"width": PRINTED_WIDTH, "height": HEIGHT})
        self.page.emulate_media(media="print")
        names = self.cut_off()
        self.page.emulate_media(media="screen")
        return names


@contextmanager
def chromium() -> Iterator:
    """Playwright's browser, for `opened`."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox, since containers run tests as root; the pages are our own.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=TIMEOUT_MS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(browser, path: Path, width: int, *, dark: bool = False, scripts: bool = False) -> Iterator[Tab]:
    """The page at `path`. scripts: whether the page could run any; axe itself needs them."""
    context = browser.new_context(
        viewport={"width": width, "height": HEIGHT},
        color_scheme="dark" if dark else "light",
        java_script_enabled=scripts,
    )
    try:
        yield Tab(context.new_page(), path)
    finally:
        context.close()
