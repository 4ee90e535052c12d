"Pages of the paper: they name claims and figures that exist, are short, and survive whatever has not been run."
import ast, json, shutil
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from made_results import write_made_results

from libmoe_nb.paper.campaign import figure_names
from libmoe_nb.paper.pages import kept_results, verdicts_of
from libmoe_nb.paper.verdicts import claims, words

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT/'nbs'/'paper'/'figures').glob('*.ipynb'))
each_page = pytest.mark.parametrize('path', PAGES, ids=lambda p: p.stem)
LANGUAGE = {f'fig{n}' for n in (3, 8, 10, *range(13, 26))}

def code(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'code']

def asked(path):
    "Figures and claims whose verdicts a page shows"
    return [n for text in code(path) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
            and getattr(node.func, 'id', '') == 'verdicts_of' for n in figure_names(node.args[0].value)]

@pytest.fixture(scope='module')
def nothing(tmp_path_factory):
    write_made_results((root := tmp_path_factory.mktemp('nothing'))/'results'/'mini', lambda **who: False)
    return root

@pytest.fixture(scope='module')
def little(tmp_path_factory):
    "One seed of two algorithms, and a second one of one of them"
    write_made_results((root := tmp_path_factory.mktemp('little'))/'results'/'mini',
                       lambda recipe, seed, variant, **who: variant in ('base', 'init_0.02')
                       and seed < dict(smoe=2, xmoe=1).get(recipe, 0))
    return root

@each_page
def test_pages_name_figures_and_claims_that_exist(path):
    known = {*claims} | {n for c in claims.values() for n in figure_names(c.figure)}
    assert asked(path) and {*asked(path)} <= known

@each_page
def test_pages_are_short(path):
    lines = [l for text in code(path) for l in text.splitlines() if l.strip() and not l.startswith('#|')]
    assert len(lines) <= 40

def test_every_figure_of_language_has_a_page():
    there = {n for p in PAGES for n in asked(p)}
    mine = {n for c in claims.values() if c.regime == 'language' for n in figure_names(c.figure)} & LANGUAGE
    with_pages = {n for c in claims.values() for n in figure_names(c.figure)
                  if {c.name, *figure_names(c.figure)} & there}
    assert mine <= with_pages

@pytest.mark.parametrize('which', ['nothing', 'little'])
@each_page
def test_pages_survive_what_has_not_been_run(path, which, request, monkeypatch, capsys):
    root = request.getfixturevalue(which)
    place = root/'nbs'/'paper'/'figures'
    place.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT/'nbs'/'paper'/'data', root/'nbs'/'paper'/'data', dirs_exist_ok=True)
    shutil.copytree(ROOT/'benchmarks', root/'benchmarks', dirs_exist_ok=True)
    monkeypatch.chdir(place)
    matplotlib.use('agg')
    space = {}
    for text in code(path): exec(text, space)
    plt.close('all')

def test_verdicts_without_runs_are_not_run(nothing, little):
    for root, may in ((nothing, {'not run', 'not testable at this scale'}), (little, {*words} - {'reproduced'})):
        kept = kept_results('mini', root)
        box = verdicts_of(','.join(claims), kept)
        assert {*box.table.verdict} <= may and len(box.table) == len(claims)
        assert box._repr_html_().count('border-left') == len(claims) and len(str(box).splitlines()) > len(claims)
    assert any('no seed of' in t and 'of XMoE' in t for t in verdicts_of('fig14', kept).runs)
