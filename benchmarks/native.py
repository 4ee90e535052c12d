#!/usr/bin/env python3
"""transformers' own mixtures on a CPU under `eager`, `grouped_mm` and our `libmoe`, with the sorted kernel and with the
fused one where it can be built: training, prefill and decoding.

    python benchmarks/native.py --json benchmarks/native.json   # rows of earlier runs that it does not measure stay
    python benchmarks/native.py --models OLMoE --parts train    # a part of it
    python benchmarks/native.py --tiny                          # the same path in seconds
    python benchmarks/native.py --show benchmarks/native.json   # the table again

The implementations of a model take turns in one process, in another order in every round. A ratio is taken inside of
a round; its median and quartiles over the rounds are the result. With one thread (the default) the clock counts the
process's own processor time, so that other work on the machine counts little. With more it is the clock on the wall.
"""
import argparse, json, os, platform, sys, time
from pathlib import Path
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
import libmoe_nb.models.dispatch  # noqa: F401  adds 'libmoe'
from libmoe_nb.moe.fused import use_fused

HOWS = 'libmoe', 'fused', 'grouped_mm', 'eager'
PARTS = 'train', 'prefill', 'decode 1', 'decode 4'
# name -> model type, fields of the configuration: layers of the shape of published models, two of them, a small
# vocabulary
SHAPES = {
    'OLMoE': ('olmoe', dict(hidden_size=512, intermediate_size=128, num_experts=64, num_experts_per_tok=8)),
    'Qwen3-MoE': ('qwen3_moe',
                  dict(hidden_size=512, moe_intermediate_size=96, num_experts=128, num_experts_per_tok=8, head_dim=64)),
    'DeepSeek-V3': ('deepseek_v3',
                    dict(hidden_size=512, moe_intermediate_size=128, n_routed_experts=64, num_experts_per_tok=8,
                         n_group=4, topk_group=2, n_shared_experts=1, first_k_dense_replace=0,
                         kv_lora_rank=32, q_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32)),
    'GLM-4 MoE': ('glm4_moe', dict(hidden_size=512, moe_intermediate_size=128, n_routed_experts=64,
                                   num_experts_per_tok=8, head_dim=64, first_k_dense_replace=0, n_shared_experts=1)),
    'gpt-oss': ('gpt_oss', dict(hidden_size=512, intermediate_size=256, num_local_experts=32, num_experts_per_tok=4,
                                head_dim=64)),
    'Nemotron-H': ('nemotron_h',
                   dict(hidden_size=512, moe_intermediate_size=128, n_routed_experts=64, num_experts_per_tok=6,
                        layers_block_type=['attention', 'moe', 'moe'], moe_shared_expert_intermediate_size=128)),
    'Granite MoE': ('granitemoe',
                    dict(hidden_size=512, intermediate_size=256, num_local_experts=40, num_experts_per_tok=8)),
    'Mixtral': ('mixtral', dict(hidden_size=512, intermediate_size=512, num_local_experts=8, num_experts_per_tok=2)),
    'Phi-MoE': ('phimoe', dict(hidden_size=512, intermediate_size=512, num_local_experts=16, num_experts_per_tok=2)),
}

def make(kind, fields, dtype):
    common = dict(vocab_size=1000, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, pad_token_id=0,
                  bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common | fields)).to(dtype)

def train(model, ids):
    "A forward and a backward pass over a batch of sequences"
    model.train().zero_grad()
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

@torch.no_grad()
def prefill(model, ids):
    "A prompt read at once"
    model.eval()
    return torch.no_grad()(lambda: model(input_ids=ids[:1], use_cache=True))

@torch.no_grad()
def decode(model, ids, steps):
    "One token after the other for each sequence of a batch whose first half is read already"
    out = model.eval()(input_ids=ids[:, :16], use_cache=True)
    def run():
        o = out
        for i in range(16, 16 + steps):
            cache = 'cache' if 'cache' in o else 'past_key_values'
            o = model(input_ids=ids[:, i:i+1], use_cache=True, **{cache: o[cache]})
    return torch.no_grad()(run)

def prepared(part, model, ids, tiny):
    "What one measurement runs, after what it needs has been computed"
    if part == 'train': return train(model, ids)
    if part == 'prefill': return prefill(model, ids)
    return decode(model, ids[:int(part[-1])], 2 if tiny else 16)

def times(part, model, ids, args):
    "{implementation: seconds in each round}, nan in rounds without it"
    clock, found = time.process_time if args.threads == 1 else time.perf_counter, []
    for r in range(-1, args.rounds):                               # one round to warm up
        row = dict.fromkeys(HOWS, float('nan'))
        for how in np.roll(HOWS, r).tolist():
            if how == 'eager' and r % 3: continue                  # slow, and not what we compare with
            if how == 'fused' and not use_fused(): continue
            use_fused(how == 'fused')
            model.set_experts_implementation('libmoe' if how == 'fused' else how)
            f = prepared(part, model, ids, args.tiny)
            start = clock(); f()
            row[how] = clock() - start
        if r >= 0: found.append(row)
    return {how: np.array([row[how] for row in found]) for how in HOWS}

def measured(name, dtype, args):
    kind, fields = SHAPES[name]
    model, g = make(kind, fields, getattr(torch, dtype)), torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (4, 32 if args.tiny else 256), generator=g)
    for part in args.parts:
        ts = times(part, model, ids, args)
        row = dict(model=name, part=part, dtype=dtype, threads=args.threads, rounds=args.rounds,
                   libmoe_ms=round(1000 * float(np.median(ts['libmoe'])), 2))
        quartiles = lambda x: [round(float(q), 3) for q in np.nanpercentile(x, (50, 25, 75))]
        for how in HOWS[2:]: row[how] = quartiles(ts[how] / ts['libmoe'])
        if use_fused(): row['fused'] = quartiles(ts['grouped_mm'] / ts['fused'])
        yield row | dict(load=[round(l, 1) for l in os.getloadavg()])

SHOWN = {'grouped_mm': 'grouped_mm / libmoe', 'fused': 'grouped_mm / fused', 'eager': 'eager / libmoe'}
HEAD = f'{"":12} {"":9} {"":9}  libmoe [ms]' + ''.join(f'{name:>23}' for name in SHOWN.values())

def line(row):
    spread = '   '.join('{:6.2f} ({:5.2f}-{:5.2f})'.format(*row[how]) if how in row else ' '*20 for how in SHOWN)
    return f"{row['model']:12} {row['part']:9} {row['dtype']:9} {row['libmoe_ms']:12.1f}   {spread}"

def save(path, rows):
    "Rows that were measured take the place of the same ones of an earlier run"
    key = lambda r: (r['model'], r['part'], r['dtype'], r['threads'])
    old = json.loads(path.read_text())['rows'] if path.exists() else []
    rows = {key(r): r for r in old} | {key(r): r for r in rows}
    order = lambda k: (k[3], list(SHAPES).index(k[0]), PARTS.index(k[1]), k[2] == 'bfloat16')
    machine = dict(torch=torch.__version__, transformers=transformers.__version__, machine=platform.machine(),
                   cores=os.cpu_count(), bfloat16=[f for f in ('amx_bf16', 'avx512_bf16') if f in cpu_flags()])
    lines = ',\n'.join('  ' + json.dumps(rows[k]) for k in sorted(rows, key=order))
    path.with_suffix('.part').write_text(f'{{"machine": {json.dumps(machine)},\n "rows": [\n{lines}\n]}}\n')
    path.with_suffix('.part').replace(path)

def cpu_flags():
    f = Path('/proc/cpuinfo')
    return f.read_text().split() if f.exists() else []

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', type=Path, help='where the rows go')
    p.add_argument('--show', type=Path, help='print the rows of this file, measure nothing')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--tiny', action='store_true', help='short sequences, one round: only to see that it runs')
    p.add_argument('--models', nargs='*', default=list(SHAPES), choices=list(SHAPES), metavar='MODEL')
    p.add_argument('--parts', nargs='*', default=list(PARTS), choices=PARTS, metavar='PART')
    p.add_argument('--dtypes', nargs='*', default=['float32', 'bfloat16'])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    if args.tiny: args.rounds = 1
    print(HEAD)
    if args.show: return print('\n'.join(map(line, json.loads(args.show.read_text())['rows'])))
    for name in args.models:
        for dtype in args.dtypes:
            rows = []
            for row in measured(name, dtype, args):
                rows.append(row); print(line(row), flush=True)
            if args.json: save(args.json, rows)

if __name__ == '__main__': sys.exit(main())
