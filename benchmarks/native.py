"""transformers' own mixtures on a CPU: whole training steps and decoding under `eager`, `grouped_mm` and our `libmoe`.

    python benchmarks/native.py --json benchmarks/native.json      # about eight minutes on two cores
    python benchmarks/native.py --tiny                             # the same path in seconds

All implementations of one model run in one process, in turn, and their medians are compared: ratios, not seconds, are
the result.
"""
import argparse, json, platform, statistics, sys, time
from pathlib import Path
import torch, transformers
from transformers import AutoModelForCausalLM, CONFIG_MAPPING
import libmoe_nb.models.dispatch  # noqa: F401  adds 'libmoe'

HOWS = 'libmoe', 'grouped_mm', 'eager'
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
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common | fields))
    return model.to(dtype)

def timed(f):
    start = time.perf_counter(); f()
    return time.perf_counter() - start

def in_turn(jobs, rounds):
    "name -> median seconds of functions that run one after the other, `rounds` times"
    for f in jobs.values(): f()
    seen = {n: [] for n in jobs}
    for _ in range(rounds):
        for n, f in jobs.items(): seen[n].append(timed(f))
    return {n: statistics.median(v) for n, v in seen.items()}

def step(model, how, ids):
    def run():
        model.set_experts_implementation(how)
        model(input_ids=ids, labels=ids).loss.backward(); model.zero_grad()
    return run

def decode(model, how, ids, n):
    def run():
        model.set_experts_implementation(how)
        with torch.no_grad(): model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
    return run

def rows(name, args):
    kind, fields = SHAPES[name]
    for dtype in (torch.float32, torch.bfloat16):
        model, g = make(kind, fields, dtype), torch.Generator().manual_seed(0)
        ids = torch.randint(3, 1000, (4, 16 if args.tiny else 256), generator=g)
        what = dict(train={h: step(model.train(), h, ids) for h in HOWS}) if not args.decode else {}
        for part, jobs in what.items():
            yield dict(part=part, model=name, dtype=str(dtype)[6:], tokens=ids.numel(), **in_turn(jobs, args.rounds))
        model.eval()
        for B in (1, 4):
            jobs = {h: decode(model, h, ids[:B, :8], 2 if args.tiny else 16) for h in HOWS}
            yield dict(part='decode', model=name, dtype=str(dtype)[6:], tokens=B,
                       **in_turn(jobs, max(args.rounds // 2, 1)))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--json', help='where the result goes')
    p.add_argument('--rounds', type=int, default=7)
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--tiny', action='store_true')
    p.add_argument('--decode', action='store_true', help='decoding alone')
    p.add_argument('--models', nargs='*', default=list(SHAPES))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    if args.tiny: args.rounds = 1
    res = []
    print(f'{"":12} {"":8} {"":9} {"":>6}   libmoe   against grouped_mm   eager')
    for name in args.models:
        for r in rows(name, args):
            res.append({k: round(v, 5) if isinstance(v, float) else v for k, v in r.items()})
            print(f"{r['model']:12} {r['part']:8} {r['dtype']:9} {r['tokens']:6} {r['libmoe']*1000:7.1f} ms "
                  f"{r['grouped_mm']/r['libmoe']:14.2f} {r['eager']/r['libmoe']:12.2f}", flush=True)
    machine = dict(torch=torch.__version__, transformers=transformers.__version__, machine=platform.machine(),
                   threads=args.threads)
    if args.json: Path(args.json).write_text(json.dumps(dict(machine=machine, rows=res), indent=1) + '\n')

if __name__ == '__main__': sys.exit(main())
