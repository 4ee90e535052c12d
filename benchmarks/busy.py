"""Training with several threads on an idle and on a busy machine, under each way in which OpenMP's threads can wait.

python benchmarks/busy.py [--preset mini] [--recipe smoe] [--threads 2] [--steps 20] [--rounds 3] [--beside 1]
                          [--json benchmarks/busy.json]

One process a setting, since OpenMP reads it once, when torch is loaded. They take turns: each trains `--steps` steps
alone, then beside `--beside` processes that keep a core each busy, and so on for `--rounds` rounds. Printed are the
medians of tokens/s, the share of the best idle figure that each setting reaches idle, and busy over idle of the same
setting. Targets: idle at least 0.95 of the best, busy at least 0.5 of idle. Run it on a machine that does nothing
else: `load` in the result is what the others did when it began."""
import argparse, json, os, statistics, subprocess, sys

SETTINGS = dict(default={}, passive=dict(OMP_WAIT_POLICY='PASSIVE'),
                **{f'spin {n:,}': dict(GOMP_SPINCOUNT=str(n)) for n in (1_000, 10_000, 30_000, 100_000)})
CHILD = '''
import sys, time, torch
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.moe.config import get_preset
recipe, preset, threads, steps = sys.argv[1], get_preset(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
model = from_scratch(recipe, preset, seed=0)
opt = torch.optim.AdamW(model.parameters(), 1e-3)
ids = torch.randint(preset.vocab_size, (preset.batch_size, preset.sequence_length))
def step():
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward(); opt.step(); opt.zero_grad()
for _ in range(3): step()
print('ready', flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    for _ in range(steps): step()
    print(steps * ids.numel() / (time.perf_counter() - start), flush=True)
'''


def start(env, a):
    keep = {k: v for k, v in os.environ.items() if k not in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')}
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', CHILD, a.recipe, a.preset, str(a.threads), str(a.steps)],
                         env=keep | dict(OMP_NUM_THREADS=str(a.threads)) | env, text=True, stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE)
    assert p.stdout.readline().strip() == 'ready'
    return p


def speed(p):
    p.stdin.write('go\n'); p.stdin.flush()
    return float(p.stdout.readline())


def measure(a):
    settings = {n: SETTINGS[n] for n in a.settings.split(';')} if a.settings else SETTINGS
    children = {n: start(env, a) for n, env in settings.items()}
    idle, busy = ({n: [] for n in children} for _ in range(2))
    for _ in range(a.rounds):
        for n, p in children.items(): idle[n].append(speed(p))
        others = [subprocess.Popen([sys.executable, '-c', 'while True: pass']) for _ in range(a.beside)]
        for n, p in children.items(): busy[n].append(speed(p))
        for o in others: o.kill(); o.wait()
    for p in children.values(): p.stdin.close(); p.wait()
    return idle, busy


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='mini'); p.add_argument('--recipe', default='smoe')
    p.add_argument('--threads', type=int, default=2); p.add_argument('--steps', type=int, default=20)
    p.add_argument('--rounds', type=int, default=3); p.add_argument('--beside', type=int, default=1)
    p.add_argument('--settings', help='names with semicolons, as they are printed'); p.add_argument('--json')
    a = p.parse_args()
    load = os.getloadavg()[0]
    idle, busy = measure(a)
    best = max(statistics.median(v) for v in idle.values())
    rows = []
    print(f'{a.recipe} at {a.preset}, {a.threads} threads, load {load:.1f} before')
    print(f"{'':16}{'idle':>10}{'of best':>10}{'busy':>10}{'of idle':>10}")
    for n in idle:
        i, b = statistics.median(idle[n]), statistics.median(busy[n])
        of_idle = statistics.median(y / x for x, y in zip(idle[n], busy[n]))
        print(f'{n:16}{i:10,.0f}{i / best:10.2f}{b:10,.0f}{of_idle:10.2f}')
        rows.append(dict(setting=n, env=SETTINGS[n], preset=a.preset, recipe=a.recipe, threads=a.threads,
                         beside=a.beside, load=round(load, 2), idle=round(i), idle_of_best=round(i / best, 3),
                         busy=round(b), busy_of_idle=round(of_idle, 3)))
    if a.json:
        with open(a.json, 'w', encoding='utf-8') as f: f.write('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')


if __name__ == '__main__': main()
