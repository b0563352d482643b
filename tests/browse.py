"""Opens a page in a real browser without a screen, moves over it, and prints what the page then says, as JSON.

    python browse.py page.html '[["stage", x, y], ...]' [screenshot.png]

The first line says that the browser runs; what comes before it is the machine's, not the page's fault.
"""

import json
import sys

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

MOVE = """
(() => {
  const stage = document.querySelectorAll(".stage")[%d], box = stage.getBoundingClientRect();
  stage.dispatchEvent(new PointerEvent("pointermove", {pointerType: "mouse", bubbles: true,
    clientX: box.left + %r * box.width, clientY: box.top + %r * box.height}));
})()
"""
READ = """
(() => {
  const said = (id) => document.getElementById(id).textContent;
  const entries = performance.getEntriesByType("resource").map((each) => each.name);
  return JSON.stringify({
    text: said("readout"), ...document.getElementById("readout").dataset, error: said("error"),
    names: [...document.querySelectorAll("figcaption")].map((each) => each.textContent),
    resources: entries.filter((name) => !name.startsWith("data:")), injected: typeof window.injected,
  });
})()
"""


class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        found["console"].append(f"{line}: {message}")


application = QApplication(["browse", "--no-sandbox"])
view = QWebEngineView()
found = {"console": [], "answers": []}
page = Page(view)
view.setPage(page)
view.resize(1200, 900)
moves = json.loads(sys.argv[2])
print("running", flush=True)


def finish():
    if len(sys.argv) > 3:
        view.grab().save(sys.argv[3])
    print(json.dumps(found), flush=True)
    application.quit()


def read(then):
    def keep(text):
        found["answers"].append(json.loads(text))
        then()

    page.runJavaScript(READ, keep)


def step(number):
    if number == len(moves):
        QTimer.singleShot(200, finish)
        return
    stage, x, y = moves[number]
    page.runJavaScript(MOVE % (stage, x, y))
    # The page answers with its next frame.
    QTimer.singleShot(300, lambda: read(lambda: step(number + 1)))


page.loadFinished.connect(lambda ok: read(lambda: step(0)))
url, _, fragment = sys.argv[1].partition("#")
address = QUrl.fromLocalFile(url)
if fragment:
    address.setFragment(fragment)
page.load(address)
view.show()
QTimer.singleShot(60_000, lambda: application.exit(3))
sys.exit(application.exec())
