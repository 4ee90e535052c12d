"The page of a comparison: it fits everywhere, and says what it should."
import json, re, shutil, subprocess

import pytest

import odd_runs

@pytest.fixture
def lost(): return odd_runs.lost()

ASK = """<script>addEventListener('load', () => { const root = document.documentElement
const wide = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
document.title = JSON.stringify([wide.length, root.scrollWidth - root.clientWidth,
                                 document.querySelectorAll('.scroll').length]) })</script>"""

@pytest.mark.skipif(not shutil.which('chromium'), reason='needs a browser')
@pytest.mark.parametrize('width', [500, 800, 1100, 1400, 1600])
def test_no_table_is_wider_than_the_page(width, tmp_path):
    (tmp_path/'page.html').write_text(odd_runs.page().replace('</body>', ASK + '</body>'), encoding='utf-8')
    p = subprocess.run(['chromium', '--headless', '--no-sandbox', '--disable-gpu',
                        f'--user-data-dir={tmp_path/"profile"}', f'--window-size={width},900',
                        '--virtual-time-budget=3000', '--dump-dom', f'file://{tmp_path}/page.html'],
                       capture_output=True, text=True, timeout=120)
    wide, over, tables = json.loads(re.search('<title>(.*?)</title>', p.stdout)[1])
    assert (wide, over) == (0, 0) and tables >= 3

def test_each_table_has_a_rule_for_when_there_is_no_room():
    page = odd_runs.page()
    needed = re.findall(r'<table[^>]*class="[^"]*cards-(\d+)', page)
    # but for the table of facts, whose cells wrap
    assert len(needed) == page.count('<table') - 1 and all(f'(max-width: {int(n) - 1}px)' in page for n in needed)
    assert re.search(r'<td data-label="tokens / s">[\d,]+</td>', page) and '<td data-label="time">' in page

def test_one_is_no_plural(lost, tmp_path):
    page = lost[3].report()
    assert not re.search(r'(?<![\d.,])1 (neighbouring '
                         r'points|threads|layers|heads|documents|recipes|seeds|tasks|questions|experts)\b',
                         page) and '1 thread,' in page
    assert 'Training loss.' in page
