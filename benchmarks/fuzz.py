"""Hostile and damaged input for everything that reads what others wrote, for as long as there is time.

python benchmarks/fuzz.py --minutes 60 [--targets trace,picture] [--seed 0] [--memory 8] --json benchmarks/fuzz.json

The targets, and what is fed to them, are those of `tests/hostile.py`, of which the tests try a few inputs each. They
take turns: a hundred inputs each, with a new seed each round. A fall is anything but a result or a `ValueError` of one
sentence: another exception, a traceback at the command line, an input that takes longer than 30 s, more memory than
`--memory` GB on top of what torch reserves. One entry a target: inputs, falls, the seed of the first round, and the
falls themselves, so that `tell` of the target makes each of them again. What the file has of other seeds stays."""
import argparse, faulthandler, json, resource, sys, time
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tests'))
from hostile import targets                                          # noqa: E402


def round_of(target, number, inputs, falls):
    "Feed a target with `inputs` inputs that a seed decides; how many it were"
    count = [0]
    @seed(number)
    @settings(max_examples=inputs, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(target.inputs)
    def feed(given):
        count[0] += 1
        if why := target.tell(given): falls.setdefault(why, [0, repr(given)[:300], number])[0] += 1
    feed()
    return count[0]


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--minutes', type=float, default=1); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--targets', help='names with commas; all of them by default')
    p.add_argument('--inputs', type=int, default=100, help='of each target in a round')
    p.add_argument('--memory', type=float, default=8, help='GB of address space on top of what is reserved now')
    p.add_argument('--json')
    a = p.parse_args()
    faulthandler.enable()                              # a fault in memory has no traceback of its own
    names = a.targets.split(',') if a.targets else list(targets)
    import torch, transformers                                       # noqa: F401  (what they reserve is no blow-up)
    reserved = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (int(reserved + a.memory * 2**30),) * 2)
    end, number = time.monotonic() + 60 * a.minutes, a.seed
    inputs, seconds, falls = Counter(), Counter(), {n: {} for n in names}
    while time.monotonic() < end:
        for n in names:
            if time.monotonic() > end: break
            start = time.monotonic()
            inputs[n] += round_of(targets[n], number, a.inputs, falls[n])
            seconds[n] += time.monotonic() - start
        number += 1
    rows = [dict(target=n, inputs=inputs[n], falls=sum(f[0] for f in falls[n].values()), seed=a.seed,
                 seconds=round(seconds[n], 1), inputs_a_round=a.inputs,
                 what=[dict(why=w, times=t, input=i, seed=s) for w, (t, i, s) in falls[n].items()]) for n in names]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"{'target':22}{'inputs':>9}{'falls':>8}{'seconds':>10}")
    for r in rows: print(f"{r['target']:22}{r['inputs']:9,}{r['falls']:8}{r['seconds']:10,.1f}")
    print(f'{sum(inputs.values()):,} inputs, {sum(r["falls"] for r in rows)} falls, seeds {a.seed} to {number - 1}, '
          f'at most {peak:,} MB')
    for r in rows:
        for w in r['what']: print(f"{r['target']}, seed {w['seed']}: {w['why']}")
    if a.json:
        old = json.loads(Path(a.json).read_text()) if Path(a.json).exists() else []
        rows = [r for r in old if (r['seed'], r['target']) not in {(a.seed, n) for n in names}] + rows
        with open(a.json, 'w', encoding='utf-8') as f: f.write('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')


if __name__ == '__main__': main()
