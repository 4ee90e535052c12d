#!/usr/bin/env python3
"""How close do the expert kernels come to a dense FFN of the same active FLOPs?

    python benchmarks/experts.py                         # everything, about ten minutes on two cores
    python benchmarks/experts.py --shapes A C --dtypes bfloat16 --routings zipf
    python benchmarks/experts.py --quick                 # one minute: fewer tokens and rounds, only to see that it runs
    python benchmarks/experts.py --json benchmarks/experts.json

Implementations take turns in one process, in another order and with fresh routing in every round. A ratio is the
median over the rounds of an implementation's time over the dense FFN's in the same round. Run it on an idle machine.
The fused kernel is measured too where it can be built.
`--json` keeps the rows of earlier runs that this run does not measure again (with `--no-memory`: their memory too).
"""
import argparse, json, os, re, statistics, subprocess, sys, time
from pathlib import Path
from types import MethodType

# name: d, N experts, h, K, activation, gated, bias, T tokens
shapes = dict(A=(512, 66, 128, 8, 'relu', False, False, 4096), B=(512, 8, 1024, 2, 'silu', True, False, 4096),
              C=(128, 16, 64, 4, 'relu', False, False, 2048),
              D=(1152, 6, 4304, 3, 'gelu_pytorch_tanh', False, True, 1024))
# time over the dense FFN's that the sorted kernel should not exceed: float32 forward, forward+backward, bfloat16 the
# same
targets = {('A', 'balanced'): (1.6, 1.7, 2.4, 2.7), ('B', 'balanced'): (1., 1., 1.2, 1.05),
           ('C', 'balanced'): (1.8, 1.8, 2.1, 1.9), ('D', 'balanced'): (1.07, 1.1, 1.15, 1.3),
           ('A', 'zipf'): (1.84, 1.96, 3., 3.), ('B', 'zipf'): (1.15, 1.15, 1.3, 1.2),
           ('C', 'zipf'): (2.07, 2.07, 3., 3.), ('D', 'zipf'): (1.23, 1.27, 1.2, 1.5)}
modes = 'forward', 'forward+backward'
slow = dict(loop=4, transformers_eager=4, transformers_batched=20, transformers_grouped=4)   # measured every n-th round

def target(shape, routing, dtype, mode): return targets[shape, routing][2*(dtype == 'bfloat16') + modes.index(mode)]

def choices(torch, T, N, K, routing, generator):
    "K different experts for each token: uniform, or with popularities falling as rank to the power of -1.5"
    popularity = -1.5 * torch.arange(1, N+1).log() if routing == 'zipf' else torch.zeros(N)
    noise = -torch.empty(T, N).exponential_(generator=generator).log()
    return (popularity + noise).topk(K).indices, torch.rand(T, K, generator=generator).softmax(-1)

def implementations(shape, dtype, tokens=1.):
    "name -> (module, function of tokens, choices and weights); all but the dense FFN share one set of weights"
    import torch
    import libmoe_nb.moe.kernels  # noqa: F401  (registers the fast ones)
    from libmoe_nb.moe.fused import use_fused
    from libmoe_nb.moe.experts import Experts, FeedForward, kernels
    from transformers.integrations import moe as hf
    d, N, h, K, act, gated, bias, T = shapes[shape]
    dtype = getattr(torch, dtype)
    dense, experts = FeedForward(d, K*h, act, gated, bias).to(dtype), Experts(N, d, h, act, gated, bias).to(dtype)
    experts.act_fn, experts.has_gate, experts.has_bias, experts.is_transposed = experts.act, gated, bias, False
    experts.has_post_expert_norm = experts._is_expert_parallel = False
    experts._apply_gate = MethodType(hf._default_apply_gate, experts)
    run = dict(dense=(dense, lambda x, index, w: dense(x)))
    ours = 'loop', 'sorted', *(('fused',) if use_fused() else ())
    use_fused(False)   # it is called by name here
    for name in ours: run[name] = experts, lambda *a, f=kernels[name]: f(experts, *a)
    run['transformers_grouped'] = experts, lambda *a: hf.grouped_mm_experts_forward(experts, *a)
    if gated:
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        run['transformers_eager'] = experts, lambda *a: MixtralExperts.forward.__wrapped__(experts, *a)
    if T*tokens*K*d*h*dtype.itemsize < 4e8:   # it copies a matrix per choice
        run['transformers_batched'] = experts, lambda *a: hf.batched_mm_experts_forward(experts, *a)
    return run

def step(module, f, x, index, w, dy=None):
    "One forward pass, with gradients where `dy` is given; the time in ms"
    import torch
    module.zero_grad()
    x, w = x.detach().requires_grad_(dy is not None), w.detach().requires_grad_(dy is not None)
    start = time.perf_counter()
    with torch.set_grad_enabled(dy is not None): y = f(x, index, w)
    if dy is not None: y.backward(dy)
    return (time.perf_counter() - start) * 1000

def saved_mb(f, x, index, w, params):
    "What autograd keeps between the passes, inputs and parameters not counted"
    import torch
    known, kept = {t.untyped_storage().data_ptr() for t in (x, index, w, *params)}, {}
    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in known: kept[s.data_ptr()] = s.nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(x.requires_grad_(), index, w.requires_grad_())
    return sum(kept.values()) / 1e6

def inputs(shape, routing, dtype, seed, tokens=1.):
    import torch
    d, N, h, K, *_, T = shapes[shape]
    g, T = torch.Generator().manual_seed(seed), int(T*tokens)
    x, dy = (torch.randn(T, d, generator=g).to(getattr(torch, dtype)) for _ in range(2))
    return x, *choices(torch, T, N, K, routing, g), dy

def peak(shape, routing, dtype, name):
    "Peak memory of a training step above what weights and inputs need, in MB; in a process of its own"
    module, f = implementations(shape, dtype)[name]
    *args, dy = inputs(shape, routing, dtype, 0)
    step(module, f, args[0][:64], args[1][:64], args[2][:64], dy[:64])
    module.zero_grad()
    status = lambda key: int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1e3 * 1.024
    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    step(module, f, *args, dy)
    return status('VmHWM') - before

def measure(shape, routing, dtype, repeats, tokens, memory, only=None):
    runs, rows = implementations(shape, dtype, tokens), []
    if only: runs = {n: f for n, f in runs.items() if n in ('dense', *only)}
    for mode in modes:
        times = {name: [] for name in runs}
        for r in range(-2, repeats):   # two rounds to warm up
            *args, dy = inputs(shape, routing, dtype, r+2, tokens)
            names = list(runs)
            for name in names[r % len(names):] + names[:r % len(names)]:
                if r > -2 and r % slow.get(name, 1): continue
                ms = step(*runs[name], *args, dy if mode == modes[1] else None)
                if r >= 0: times[name].append((r, ms))
        base = dict(times['dense'])
        for name, ts in times.items():
            row = dict(shape=shape, routing=routing, dtype=dtype, mode=mode, implementation=name,
                       ratio=round(statistics.median(t/base[r] for r, t in ts), 3),
                       milliseconds=round(statistics.median(t for _, t in ts), 3))
            if name == 'sorted' and tokens == 1: row['target'] = target(shape, routing, dtype, mode)
            if mode == modes[1] and memory:
                *args, _ = inputs(shape, routing, dtype, 0, tokens)
                row['saved_mb'] = round(saved_mb(runs[name][1], *args, runs[name][0].parameters()), 1)
                call = [sys.executable, __file__, '--peak', shape, routing, dtype, name, '--threads',
                        os.environ['OMP_NUM_THREADS']]
                out = subprocess.run(call, capture_output=True, text=True)
                row['peak_mb'] = round(float(out.stdout), 1) if out.returncode == 0 else None
            rows.append(row)
    return rows

def table(rows):
    key = lambda r: (r['shape'], r['routing'], r['dtype'])
    lines = [f"{'':26}{'forward':>22}{'forward+backward':>28}   {'saved':>8} {'peak':>8}",
             f"{'':26}{'ratio':>8}{'ms':>10}{'':12}{'ratio':>8}{'ms':>10}{'':12}{'MB':>6}{'MB':>9}"]
    for k in dict.fromkeys(map(key, rows)):
        lines.append(' '.join(k))
        here = [r for r in rows if key(r) == k]
        for name in dict.fromkeys(r['implementation'] for r in here):
            line = f'    {name:22}'
            for mode in modes:
                r = next((r for r in here if r['implementation'] == name and r['mode'] == mode), None)
                if not r: line += ' '*30; continue
                t = r.get('target')
                note = '' if t is None else f"<= {t}" if r['ratio'] <= t else f"> {t} missed"
                line += f"{r['ratio']:8.2f}{r['milliseconds']:10.2f} {note:11}"
            if r and r.get('saved_mb') is not None: line += f"{r['saved_mb']:6.0f}"
            if r and r.get('peak_mb') is not None: line += f"{r['peak_mb']:9.0f}"
            lines.append(line.rstrip())
    ours = [r for r in rows if 'target' in r]
    missed = [r for r in ours if r['ratio'] > r['target']]
    lines.append(f"targets: {len(ours)-len(missed)} of {len(ours)} met" + ''.join(
        f"\n    missed: {r['shape']} {r['routing']} {r['dtype']} {r['mode']}: {r['ratio']:.2f} for {r['target']}"
        for r in missed))
    return '\n'.join(lines)

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--shapes', nargs='+', choices=list(shapes), default=list(shapes))
    p.add_argument('--routings', nargs='+', choices=['balanced', 'zipf'], default=['balanced', 'zipf'])
    p.add_argument('--dtypes', nargs='+', choices=['float32', 'bfloat16'], default=['float32', 'bfloat16'])
    p.add_argument('--only', nargs='+', metavar='NAME', help='of the implementations these, beside the dense FFN')
    p.add_argument('--repeats', type=int, default=11, help='rounds (median)')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--quick', action='store_true', help='an eighth of the tokens, three rounds, no peak memory')
    p.add_argument('--no-memory', action='store_true',
                   help='times only; peak memory takes a process for each implementation')
    p.add_argument('--json', type=Path, metavar='FILE',
                   help='write the rows there, beside those of other configurations')
    p.add_argument('--peak', nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.repeats < 1: p.error(f'--repeats {args.repeats}: expected at least 1')
    os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = str(args.threads)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import torch
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.peak: return print(peak(*args.peak))
    rows = []
    for shape in args.shapes:
        for routing in args.routings:
            for dtype in args.dtypes:
                new = measure(shape, routing, dtype, 3 if args.quick else args.repeats, .125 if args.quick else 1.,
                              not (args.quick or args.no_memory), args.only)
                rows += new
                print(table(new).rsplit('\ntargets', 1)[0], file=sys.stderr, flush=True)
    if args.json:
        key = lambda r: (r['shape'], r['routing'], r['dtype'])
        mine = {(*key(r), r['implementation']) for r in rows}
        old = json.loads(args.json.read_text()) if args.json.exists() else []
        memory = {(*key(r), r['implementation']): {n: r[n] for n in ('saved_mb', 'peak_mb') if n in r}
                  for r in old if r['mode'] == modes[1]}
        rows = [memory.get((*key(r), r['implementation']), {}) | r if r['mode'] == modes[1] else r for r in rows]
        rows = sorted([r for r in old if (*key(r), r['implementation']) not in mine] + rows, key=key)
        args.json.write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n')
    print(table(rows))

if __name__ == '__main__': main()
