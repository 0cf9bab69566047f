"""The page in a browser: it follows a run, and text of other parties stays text."""

import pytest
from run_folders import HOSTILE, RunFolder, line

from fedlearn.web.sources import FolderSource, NodeView, Snapshot

pytestmark = pytest.mark.process


def test_a_run_appears_and_grows_while_the_page_is_open(tmp_path, served, page):
    page.open(served(FolderSource(tmp_path)))
    page.wait("document.getElementById('no-runs').offsetHeight > 0")
    folder = RunFolder(tmp_path / "digits/run 1").add(line(1, value=0.25))
    page.wait("document.querySelector('.run-name b').textContent === 'digits · fedavg'")
    assert "25.0 %" in page.text()
    page.run("document.querySelector('#run-rows a').click()")
    page.wait("document.querySelectorAll('#charts figure').length > 3")
    folder.add(line(2, value=0.5, reason=HOSTILE))
    page.wait("document.getElementById('run-numbers').innerText.includes('2 of 10')")
    assert page.run("document.querySelectorAll('#charts .curve-1')[0].getAttribute('d').split('L').length") == 2
    assert HOSTILE in page.text()
    (folder.path / "report.html").write_text("<p>the report</p><script>document.title = 'script'</script>")
    folder.end()
    page.wait("document.querySelector('#run-report').offsetHeight > 0")
    page.open(page.run("document.getElementById('report-link').href"))
    assert page.text() == "the report"
    assert page.run("document.title") == ""
    assert not [text for text in page.messages if "script" not in text]  # the report's script was blocked
    page.messages.clear()


class Hostile:
    """A source in which each text is an attack."""

    def __init__(self, folder):
        self.folder = FolderSource(folder)

    def snapshot(self):
        runs = self.folder.snapshot().runs
        node = NodeView(name=HOSTILE, state=HOSTILE, since=HOSTILE, version=HOSTILE, framework=HOSTILE, problem=HOSTILE)
        return Snapshot(title=HOSTILE, runs=runs, num_runs=1, nodes=[node], problem=HOSTILE)

    def detail(self, key):
        return self.folder.detail(key)

    def report(self, key):
        return b""


@pytest.mark.slow
@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_no_text_of_nodes_and_submitters_becomes_code_and_no_width_scrolls(tmp_path, served, page, width, dark):
    name = HOSTILE.replace("/", "∕")
    folder = RunFolder(tmp_path / name, scenario=HOSTILE, strategy=HOSTILE)
    folder.add(*(line(number, metric=HOSTILE, reason=HOSTILE) for number in (1, 2, 3)))
    folder.end(HOSTILE, scenario=HOSTILE, strategy=HOSTILE, metric=HOSTILE, reason=HOSTILE)
    page.resize(width, dark=dark)
    page.open(served(Hostile(tmp_path)))
    page.wait("document.querySelectorAll('#run-rows li, #node-rows li').length === 2")
    assert page.text().count(HOSTILE) >= 6
    page.run("document.querySelector('#run-rows a').click()")
    page.wait("document.querySelectorAll('#charts figure').length > 3")
    page.wait(f"document.getElementById('failure-rows').innerText.includes({HOSTILE!r})")
    assert page.run("window.attacked") is None
    assert page.run("document.querySelectorAll('img, svg[onload], [onerror]').length") == 0
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.messages == []


@pytest.mark.slow
def test_the_page_asks_no_other_server(tmp_path, served, page):
    address = served(FolderSource(tmp_path))
    page.open(address)
    page.wait("document.getElementById('connection').textContent === 'live'")
    loaded = page.run("performance.getEntriesByType('resource').map(entry => entry.name).join(' ')").split()
    assert len(loaded) >= 2
    assert all(name.startswith(address) for name in loaded)
