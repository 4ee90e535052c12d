"""README.md from nbs/index.ipynb, without Quarto: `python tools/readme.py`, or `--check` to only compare.

Cells keep their order; `#| hide` and `#| echo: false` mean what they mean on the site. Links to notebooks become links
to the published pages, images keep pointing at nbs/images.
"""
import argparse, re, sys
from pathlib import Path

from fastcore.nbio import read_nb
from nbdev.config import get_config
from nbdev.readme_filter import doc_link

LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)')
DIRECTIVE = re.compile(r'^#\s*\|\s*([\w-]+)\s*:?\s*(.*)$')

def split_directives(source):
    "The `#|` lines of a cell as a dict, and its other lines"
    lines = source.splitlines()
    found = [DIRECTIVE.match(line) for line in lines]
    return {m[1]: m[2].strip() for m in found if m}, '\n'.join(line for line, m in zip(lines, found) if not m).strip()

def link(match, cfg):
    image, text, target = match.groups()
    if image: return f'![{text}]({target if "://" in target else f"{cfg.nbs_path.name}/{target}"})'
    return f'[{text}]({doc_link(target, cfg.doc_url)})'

def prose(source, cfg):
    "Markdown with its links made absolute, fenced code left alone"
    parts = re.split(r'(^```.*?^```$)', source, flags=re.M|re.S)
    return ''.join(p if p.startswith('```') else LINK.sub(lambda m: link(m, cfg), p) for p in parts)

def output(out):
    "One output of a code cell as Markdown; an output with no text form is left to the site"
    data = out.get('data', {})
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    text = ''.join(data.get('text/plain', out.get('text', ''))).rstrip()
    return '\n'.join('    '+line for line in text.splitlines())

def code(cell):
    directives, source = split_directives(cell.source)
    if 'hide' in directives or directives.get('include') == 'false': return ''
    parts = [f'```python\n{source}\n```'] if source and directives.get('echo') != 'false' else []
    if directives.get('output') != 'false': parts += [output(o) for o in cell.get('outputs', [])]
    return '\n\n'.join(p for p in parts if p)

def readme(cfg):
    cells = read_nb(cfg.nbs_path/cfg.readme_nb).cells
    parts = [prose(c.source, cfg) if c.cell_type == 'markdown' else code(c) if c.cell_type == 'code' else ''
             for c in cells]
    note = f'<!-- Made from {cfg.nbs_path.name}/{cfg.readme_nb} by tools/readme.py: edit the notebook. -->'
    return '\n\n'.join(p for p in [note, *parts] if p.strip()) + '\n'

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true', help='exit 1 if README.md is out of date')
    check, cfg = parser.parse_args().check, get_config(Path(__file__).parent)
    path, text = cfg.config_path/'README.md', readme(cfg)
    if not check: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text:
        sys.exit(f'{path.name} does not match {cfg.nbs_path.name}/{cfg.readme_nb}: run `python tools/readme.py`')
