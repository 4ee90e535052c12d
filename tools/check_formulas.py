"""Renders every formula of the notebooks with KaTeX, as the site does.

    python tools/check_formulas.py [--katex FOLDER]

FOLDER holds `node_modules/katex`, as `npm install katex` makes it. A formula that KaTeX refuses is an error, and so is
a doubled backslash before a letter outside an environment of lines: KaTeX takes it for the end of a line and prints the
command's name.
"""
import argparse, json, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r'(?<![\\$])\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$\n]+?)(?<![\s\\])\$(?![\d$])', re.S)
CODE = re.compile(r'```.*?```|~~~.*?~~~|`[^`\n]+`', re.S)
LINES = re.compile(r'\\begin\{(\w+\*?)\}.*?\\end\{\1\}', re.S)
RENDER = """
const katex = require(process.argv[1]);
const rows = JSON.parse(require('fs').readFileSync(0, 'utf8'));
console.log(JSON.stringify(rows.map(([tex, display]) => {
  try { katex.renderToString(tex, {displayMode: display, throwOnError: true, strict: 'error'}); return ''; }
  catch (e) { return e.message; }
})));
"""

def formulas(text):
    "(TeX, whether it has lines of its own) of each formula in a text of markdown"
    for m in FORMULA.finditer(CODE.sub('', text)): yield (m[1] or m[2]).strip(), bool(m[1])

def doubled(tex):
    "The first command with two backslashes, or None"
    found = re.search(r'\\\\[A-Za-z]+', LINES.sub('', tex))
    return found and found[0]

def notebook_formulas(folder=ROOT/'nbs'):
    "(notebook, TeX, whether it has lines of its own) of every notebook"
    for path in sorted(Path(folder).rglob('*.ipynb')):
        if any(part.startswith(('.', '_')) for part in path.relative_to(folder).parts): continue
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] == 'markdown':
                for tex, display in formulas(''.join(cell['source'])): yield path.relative_to(folder), tex, display

def render(rows, katex):
    "KaTeX's complaint about each (TeX, display), or an empty text"
    module = str(Path(katex, 'node_modules', 'katex').resolve())
    done = subprocess.run(['node', '-e', RENDER, module], input=json.dumps(rows), capture_output=True, text=True)
    if done.returncode: raise SystemExit(f'node could not render with {module}: {done.stderr.strip()[-500:]}')
    return json.loads(done.stdout)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--katex', default=ROOT, metavar='FOLDER')
    found = list(notebook_formulas())
    said = render([(tex, display) for _, tex, display in found], parser.parse_args().katex)
    wrong = [(path, tex, f'{doubled(tex)} has a backslash too many' if doubled(tex) else error)
             for (path, tex, _), error in zip(found, said) if error or doubled(tex)]
    for path, tex, error in wrong: print(f'{path}: {error}: {tex}')
    print(f'{len(found)} formulas, {len(wrong)} broken')
    return int(not found or bool(wrong))

if __name__ == '__main__': sys.exit(main())
