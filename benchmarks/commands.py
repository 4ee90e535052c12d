"""How long the README's two commands take, and what else must hold before a change lands.

bash .ci/run | tee ci.log; python benchmarks/commands.py ci.log [--json benchmarks/commands.json]

`.ci/run` says before each step how many seconds it has run. Run it in a fresh clone, on a machine that does nothing
else. The first command includes the installation of all requirements, from a cache of packages if there is one."""
import argparse, os, platform, re
from pathlib import Path
from libmoe_nb.core.files import write_json


def steps(text):
    "(step, seconds) of each but the last, which says that all is good"
    found = [(int(s), name) for s, name in re.findall(r'^== \[(\d+) s\] (.+)$', text, re.M)]
    return [dict(step=name, seconds=end - begin) for (begin, name), (end, _) in zip(found, found[1:])]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('log', type=Path, help='what `.ci/run` printed'); p.add_argument('--json')
    a = p.parse_args()
    text = a.log.read_text(encoding='utf-8')
    if '] All good' not in text: p.error(f'{a.log}: expected the output of a run that ended with "All good"')
    rows = steps(text)
    passed = sum(int(n) for n in re.findall(r'^[= ]*(\d+) passed', text.split('] All good')[1], re.M))
    for r in rows: print(f"{r['seconds']:6} s  {r['step']}")
    about = dict(cores=os.cpu_count(), python=platform.python_version(), tests=passed,
                 seconds=sum(r['seconds'] for r in rows))
    print(about)
    if a.json: write_json(a.json, dict(about=about, rows=rows))


if __name__ == '__main__': main()
