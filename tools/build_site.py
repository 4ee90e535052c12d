"""Builds the site into _proc/_docs and checks its links: `python tools/build_site.py [--renderer quarto]`.

nbdev prepares the notebooks (documentation, links to the source), smalldocs or Quarto renders them; nothing is executed
but the documentation cells. `--check FOLDER` only checks a site that is already built.
"""
import argparse, re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parents[1]
LINKS = {('a', 'href'), ('link', 'href'), ('img', 'src'), ('script', 'src'), ('source', 'src'), ('iframe', 'src')}

class Page(HTMLParser):
    "The anchors that a page has, the links it makes and the text of its title"
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.title, self.in_title = {'', 'top'}, [], '', False
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.in_title = tag == 'title'
        self.anchors |= {attrs[k] for k in ('id', 'name') if attrs.get(k)}
        self.links += [(self.getpos()[0], attrs[k]) for t, k in LINKS if t == tag and attrs.get(k)]

    def handle_data(self, data):
        if self.in_title: self.title += data

    def handle_endtag(self, tag): self.in_title = self.in_title and tag != 'title'

RENDER = dict(smalldocs=[sys.executable, '-c', 'import sys; from smalldocs.cli import main; sys.exit(main())',
                         'render', '_proc'],
              quarto=['quarto', 'render', '_proc', '--no-execute'])

def check_source(target, anchor, repo):
    "A link into the repository's source must name a file here and a line that it has"
    path = repo/target.split('/', 2)[2]
    if not path.exists(): return 'no such file in the repository'
    if anchor.startswith('L') and int(anchor[1:]) > len(path.read_text(encoding='utf-8').splitlines()):
        return 'no such line'

def check_site(site, url='', source_url='', repo=ROOT):
    "Every broken internal link, anchor, image, script or source link below `site`, one sentence each"
    site, broken = Path(site).resolve(), []
    pages = {p: Page(p) for p in sorted(site.rglob('*.html'))}
    for p, page in pages.items():
        if not page.title.strip(): broken.append(f'{p.relative_to(site)}: no title')
        for line, link in page.links:
            where = f'{p.relative_to(site)}:{line}: {link}: '
            if url and link.startswith(url): target, anchor = urldefrag('/' + link[len(url):].lstrip('/'))
            elif source_url and link.startswith((source_url+'/blob/', source_url+'/tree/')):
                reason = check_source(*urldefrag(link[len(source_url)+1:]), repo)
                if reason: broken.append(where + reason)
                continue
            elif urlsplit(link).scheme or link.startswith('//'): continue
            else: target, anchor = urldefrag(link)
            target = unquote(urlsplit(target).path)
            file = p if not target else site/target.lstrip('/') if target.startswith('/') else p.parent/target
            file = file.resolve()
            if file.is_dir(): file = file/'index.html'
            if not file.is_relative_to(site): broken.append(where + 'leaves the site')
            elif not file.exists(): broken.append(where + 'no such page or file')
            elif anchor and file in pages and unquote(anchor) not in pages[file].anchors:
                broken.append(where + 'no such anchor')
    return len(pages), broken

def unlink_undocumented(site, url):
    "nbdev links every name in backticks that the library defines, documented or not: keep the name only"
    site = Path(site).resolve()
    anchors = {p: Page(p).anchors for p in site.rglob('*.html')}
    link = re.compile(rf'<a href="{re.escape(url)}/([^"#]+)#([^"]+)"[^>]*>(<code[^>]*>[^<]*</code>)</a>')
    for page in anchors:
        text = page.read_text(encoding='utf-8')
        new = link.sub(lambda m: m[0] if unquote(m[2]) in anchors.get(site/m[1], ()) else m[3], text)
        if new != text: page.write_text(new, encoding='utf-8')

def build(renderer):
    "The rendered site's folder"
    from nbdev.config import get_config
    from nbdev.serve import proc_nbs
    cfg = get_config(ROOT)
    proc = ROOT/'_proc'
    sys.path.insert(0, str(ROOT))
    shutil.rmtree(proc, ignore_errors=True)
    proc_nbs(str(cfg.nbs_path), n_workers=0)
    for nb in proc.rglob('*.ipynb'):  # signatures name the classes of their own notebook `__main__.X`
        text = nb.read_text(encoding='utf-8')
        if '__main__.' in text: nb.write_text(text.replace('__main__.', ''), encoding='utf-8')
    command = RENDER[renderer]
    sys.stdout.flush()
    subprocess.run(command, cwd=ROOT, check=True)
    unlink_undocumented(proc/cfg.doc_path.name, cfg.doc_url.rstrip('/'))
    return proc/cfg.doc_path.name

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--renderer', choices=['smalldocs', 'quarto'], default='smalldocs')
    parser.add_argument('--check', metavar='FOLDER', help='check a built site instead of building one')
    args = parser.parse_args()
    site = Path(args.check) if args.check else build(args.renderer)
    from nbdev.config import get_config
    cfg = get_config(ROOT)
    count, broken = check_site(site, cfg.doc_url.rstrip('/'), cfg.git_url)
    print('\n'.join(broken))
    print(f'{site}: {count} pages, {len(broken)} broken links')
    return int(not count or bool(broken))

if __name__ == '__main__': sys.exit(main())
