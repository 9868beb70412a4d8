"""The report page in a headless browser, on a phone's screen and on a desk's: what people see, not what was meant.

Without a browser (scripts/browser.sh) these tests are skipped, but never where CI=true.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from run_folders import SESSION, recipe_of, record, write_run

from localmim.analysis.report import write_report

FIND = Path(__file__).parents[2] / "scripts" / "browser.sh"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SCREENS = {"phone": (360, 740), "desk": (1280, 800)}
LONG = "a_run_of_a_name_that_is_much_longer_than_a_phone_is_wide_and_then_some"

# Elements whose text is cut or covered, and text that is too small to read; each as a line of words.
UNREADABLE = """() => {
  const found = [];
  for (const e of document.querySelectorAll('body, body *:not(svg *)')) {
    const style = getComputedStyle(e), name = `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`;
    const hides = [style.overflowX, style.overflowY].some(x => x == 'hidden' || x == 'clip');
    if (hides && (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 1)) found.push('cut: ' + name);
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    if (own && parseFloat(style.fontSize) < 14) found.push('small: ' + name);
    const box = e.getBoundingClientRect();
    const scrolls = e.closest('.strip, .scroll');
    if (own && box.width && !scrolls && box.right > innerWidth + 1) found.push('outside: ' + name);
    if (own && box.width && e.scrollWidth > e.clientWidth + 1 && style.display != 'inline') found.push('wide: ' + name);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    """Chromium, without its own traffic."""
    found = subprocess.run(["bash", str(FIND)], capture_output=True, text=True)
    if found.returncode:
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse(found.stderr.strip())
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found.stdout.strip(), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, the page of two of which one is damaged, and the page of one that recorded little."""
    root = tmp_path_factory.mktemp("runs")
    lines = [record(s, knn_top1=s / 2, grad_norm=1.0 + s % 3) for s in range(1, 41)]
    first = write_run(root / LONG, lines, snapshots=(10, 20, 40))
    (first / "environment.json").write_text(json.dumps([SESSION, SESSION | {"step": 20, "mindcv": "9"}]))
    (first / "eval_step_00000040.json").write_text('{"top1": 35.0, "top5": 80.1, "step": 40, "task": "pretrain"}')
    second = write_run(root / "b & <b>", lines[:20], recipe_of(seed=1, init="outputs/" + LONG), snapshots=(10, 20))
    with open(second / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')
    bare = write_run(root / "bare", [{"step": 1, "loss": "nan"}], {})
    return {"one": write_report([first]), "two": write_report([first, second]), "bare": write_report([bare])}


@pytest.fixture(params=SCREENS)
def open_page(request, browser, pages):
    """A function that opens a page by its name, with no network, and what went wrong meanwhile."""
    width, height = SCREENS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=request.param == "phone")
    context.set_offline(True)
    wrong: list[str] = []

    def open_page(name: str):
        page = context.new_page()
        page.on("console", lambda message: wrong.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
        page.on("requestfailed", lambda request: wrong.append(request.url[:80]))
        page.goto(pages[name].as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        return page

    yield open_page, wrong
    context.close()


@pytest.mark.parametrize("name", ["one", "two", "bare"])
def test_page_is_whole_and_readable(open_page, name):
    """Pictures and curves are there, nothing is cut, too small or wider than the screen, nothing is fetched."""
    open_page, wrong = open_page
    page = open_page(name)
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.clientWidth > 100)")
    assert len(pictures) == {"one": 6, "two": 10, "bare": 0}[name] and all(pictures)
    drawn = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.clientWidth > 250 && s.clientHeight > 150)")
    assert len(drawn) >= {"one": 9, "two": 10, "bare": 0}[name] and all(drawn)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    letters = page.evaluate(  # height of a digit of an axis, in pixels of the screen
        "[...document.querySelectorAll('svg [id*=text_] use')].map(u => u.getBoundingClientRect().height)"
    )
    assert not letters or max(letters) > 7
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    assert page.evaluate(UNREADABLE) == []
    assert wrong == []


def test_a_picture_grows_at_a_touch(open_page):
    """On a phone a picture of many panels is small: its own size is a tap away, inside its strip."""
    open_page, _ = open_page
    page = open_page("one")
    figure = page.locator(".strip > figure").first
    width = "i => i.clientWidth"
    assert figure.locator("img").evaluate(width) < 500
    figure.click()
    assert figure.locator("img").evaluate(width) == 960
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]


def test_script_finds_or_gets_a_browser(tmp_path):
    """The suite installs a browser where it can, and says in one line why it cannot."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "timeout", "chmod", "cp"):
        (tools / name).symlink_to(shutil.which(name))

    def script(name: str, text: str) -> None:
        (tools / name).write_text(f"#!{tools}/bash\n{text}\n")
        (tools / name).chmod(0o755)

    def run(*arguments: str) -> tuple[int, str, str]:
        command = [tools / "bash", FIND, *arguments]
        done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
        return done.returncode, done.stdout.strip(), done.stderr.strip().split("\n")[-1]

    assert run() == (1, "", "found no Chromium or Chrome")
    assert run("--install") == (1, "", "found no Chromium or Chrome, and no apt-get to install one")
    script("apt-get", "exit 100")
    script("id", "echo 1000")
    assert run("--install") == (1, "", "found no Chromium or Chrome, and only root can install one")
    script("id", "echo 0")
    assert run("--install")[2].endswith("apt-get could not install the package chromium")
    script("chromium-browser", "exit 1")  # the stub of a snap
    script("apt-get", f'[ "$1" = update ] || cp {tools}/apt-get {tools}/chromium')
    assert run("--install")[:2] == (0, str(tools / "chromium"))
