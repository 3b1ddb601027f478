"""docs/page.png: the page of `ldm serve`, filled in and looked at in Chromium.

pip install '.[web]' playwright && python -m benchmarks.screenshot [--chromium /usr/bin/chromium]
"""

import argparse
import socket
import threading
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

import ldm
from ldm.web import server

PROMPT = "a red cube on top of a blue sphere"
PICTURE = Path(__file__).parents[1] / "docs" / "page.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    running = server.server(ldm.load(), server.Options())
    threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not running.started:
        time.sleep(0.1)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=options.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1360, "height": 1000})
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}")
        page.locator("#prompt textarea").fill(PROMPT)
        page.locator("#seed textarea, #seed input").fill("1")
        for box in page.locator("#views input").all():
            box.check()
        page.locator("#start").click()
        expect(page.locator("#gallery figure")).to_have_count(1, timeout=60_000)
        page.get_by_role("tab", name="Attention").click()
        expect(page.locator("#attention figure")).to_have_count(len(PROMPT.split()))
        page.screenshot(path=PICTURE)
        browser.close()
    running.should_exit = True
    print(PICTURE)


if __name__ == "__main__":
    main()
