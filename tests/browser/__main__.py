"""Pictures of pages, for the eye: python -m tests.browser FOLDER PAGE.html ...

FOLDER/NAME-WIDTH.png of each (NAME: the last parts of its path) at three widths, -dark.png in dark colours, and .pdf as printed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from browser import CHROMIUM, WIDTHS, chromium, opened


def main(folder: str, *pages: str) -> int:
    if not CHROMIUM or not pages:
        print("python -m tests.browser FOLDER PAGE.html ...: expected pages, and Chromium in PATH", file=sys.stderr)
        return 2
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for path in map(Path, pages):
            name = "-".join(path.resolve().with_suffix("").parts[-3:])
            for width in WIDTHS:
                with opened(browser, path, width) as tab:
                    tab.page.screenshot(path=out / f"{name}-{width}.png", full_page=True)
            with opened(browser, path, WIDTHS[-1], dark=True) as tab:
                tab.page.screenshot(path=out / f"{name}-dark.png", full_page=True)
            with opened(browser, path, WIDTHS[-1]) as tab:
                tab.page.pdf(path=out / f"{name}.pdf", prefer_css_page_size=True)
            print(out / name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
