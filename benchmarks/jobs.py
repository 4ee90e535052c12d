"""Several trainings at once, a thread each, against one after the other with all cores.

python benchmarks/jobs.py [--presets tiny,mini] [--recipe smoe] [--cores 2] [--steps 10] [--rounds 3]
                          [--whole STEPS] [--json benchmarks/jobs.json]

A process for each number of threads, and as many with one thread as there are cores. They take turns in each of the
`--rounds` rounds: each number of threads alone, then all those of one thread at once. Printed are medians of tokens/s,
p in "t threads are t**p times as fast as one", and what side by side trains over what one run with all threads does.
With --whole, `libmoe compare` itself is timed for so many steps, imports and data included, with `--jobs 1` and with
its default, in turns. Run it on a machine that does nothing else: `load` is what the others did when it began."""
import argparse, json, math, os, statistics, subprocess, sys, tempfile, time
from busy import CHILD, speed


def start(preset, threads, a):
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', CHILD, a.recipe, preset, str(threads), str(a.steps)],
                         env=dict(os.environ, OMP_NUM_THREADS=str(threads)), text=True, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
    assert p.stdout.readline().strip() == 'ready'
    return p


def together(children):
    "What all train in the same time, tokens/s"
    for p in children: p.stdin.write('go\n'); p.stdin.flush()
    return sum(float(p.stdout.readline()) for p in children)


def measure(preset, a):
    counts = [t for t in (1, 2, 4, 8) if t <= a.cores]
    alone = {t: start(preset, t, a) for t in counts}
    ones = [alone[1], *(start(preset, 1, a) for _ in range(a.cores - 1))]
    speeds = {n: [] for n in (*counts, 'together')}
    for _ in range(a.rounds):
        for t, p in alone.items(): speeds[t].append(speed(p))
        speeds['together'].append(together(ones))
    for p in {*alone.values(), *ones}: p.stdin.close(); p.wait()
    return speeds


def row(preset, a, speeds):
    "Ratios within rounds, then their median"
    most = max(t for t in speeds if t != 'together')
    over = lambda x, y: statistics.median(i / j for i, j in zip(speeds[x], speeds[y]))
    p = math.log(over(most, 1)) / math.log(most) if most > 1 else None
    return dict(preset=preset, recipe=a.recipe, cores=a.cores, load=round(os.getloadavg()[0], 2), rounds=a.rounds,
                tokens_per_second={str(t): round(statistics.median(v)) for t, v in speeds.items()},
                scaling=p and round(p, 2), side_by_side=round(over('together', most), 2))


def whole(steps, a):
    "Seconds of a whole command with one job and with as many as it takes by itself, in turns"
    seconds = {'1': [], 'default': []}
    for _ in range(a.rounds):
        for jobs, found in seconds.items():
            with tempfile.TemporaryDirectory() as out:
                args = [sys.executable, '-W', 'ignore', '-c', 'from libmoe_nb.cli import main; main()', 'compare',
                        '--out', out, '--steps', str(steps), *(['--jobs', '1'] if jobs == '1' else [])]
                began = time.perf_counter()
                subprocess.run(args, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found.append(time.perf_counter() - began)
    ratio = statistics.median(d / o for o, d in zip(*seconds.values()))
    return dict(command='compare', steps=steps, cores=a.cores, load=round(os.getloadavg()[0], 2),
                seconds={k: [round(s) for s in v] for k, v in seconds.items()}, ratio=round(ratio, 2))


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--presets', default='tiny,mini'); p.add_argument('--recipe', default='smoe')
    p.add_argument('--cores', type=int, default=os.cpu_count()); p.add_argument('--steps', type=int, default=10)
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--whole', type=int); p.add_argument('--json')
    a, rows = p.parse_args(), []
    for preset in a.presets.split(','):
        rows.append(r := row(preset, a, measure(preset, a)))
        print(f"{preset}: {r['tokens_per_second']} tokens/s, p {r['scaling']}, side by side {r['side_by_side']}",
              flush=True)
    if a.whole:
        rows.append(r := whole(a.whole, a))
        print(f"compare, {a.whole} steps: {r['seconds']} s, ratio {r['ratio']}")
    if a.json:
        with open(a.json, 'w', encoding='utf-8') as f: f.write('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')


if __name__ == '__main__': main()
