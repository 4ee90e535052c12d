"""What recording costs: a forward pass with `record_routing` over one without, interleaved in one process.

python benchmarks/recording.py [--preset mini] [--recipes smoe,...] [--batch 8] [--repeats 30] [--threads 1] [--wall]
                               [--json benchmarks/recording.json]

Medians over repeats of the processor time of this process, which another process on the machine does not lengthen;
with --wall, of the time that passes. Target: below 1.05. Beside it an intervention (drop_top1), which computes
something, and a trace, which also writes."""
import argparse, json, statistics, tempfile, time
import torch
from libmoe_nb.analysis.interventions import drop_top1
from libmoe_nb.models.causal import from_scratch
from libmoe_nb.analysis.traces import write_trace
from libmoe_nb.analysis.tracing import intervene, record_routing


def timed(f, clock):
    t = clock()
    f()
    return clock() - t


@torch.no_grad()
def measure(model, ids, repeats, folder, clock):
    def plain(): model(input_ids=ids)
    def recorded():
        with record_routing(model): model(input_ids=ids)
    def dropped():
        with intervene(model, drop_top1): model(input_ids=ids)
    def traced(): write_trace(model, [dict(input_ids=ids)], f'{folder}/t')
    runs = dict(plain=plain, record_routing=recorded, drop_top1=dropped, write_trace=traced)
    for f in runs.values(): f(); f()
    times = {n: [] for n in runs}
    for _ in range(repeats):
        for n, f in runs.items(): times[n].append(timed(f, clock))
    base = statistics.median(times['plain'])
    paired = {n: statistics.median(x / p for x, p in zip(t, times['plain'])) for n, t in times.items()}
    return base, paired


def main():
    a = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    a.add_argument('--preset', default='mini'); a.add_argument('--recipes', default='smoe,tcmoe,moe_plus_plus')
    a.add_argument('--batch', type=int, default=8)
    a.add_argument('--repeats', type=int, default=30); a.add_argument('--json')
    a.add_argument('--threads', type=int, default=1); a.add_argument('--wall', action='store_true')
    a = a.parse_args()
    rows, clock = [], time.perf_counter if a.wall else time.process_time
    torch.set_num_threads(a.threads)
    print(f"{'recipe':16}{'forward ms':>12}{'record':>10}{'drop_top1':>12}{'trace':>10}")
    for recipe in a.recipes.split(','):
        model = from_scratch(recipe, a.preset, seed=0).eval()
        ids = torch.randint(model.config.base_config.vocab_size,
                            (a.batch, model.config.base_config.max_position_embeddings))
        with tempfile.TemporaryDirectory() as folder: base, ratios = measure(model, ids, a.repeats, folder, clock)
        print(f"{recipe:16}{base * 1e3:12.1f}{ratios['record_routing']:10.3f}{ratios['drop_top1']:12.3f}"
              f"{ratios['write_trace']:10.3f}")
        rows += [dict(recipe=recipe, preset=a.preset, batch=a.batch, repeats=a.repeats, threads=a.threads,
                      clock='wall' if a.wall else 'processor', torch=torch.__version__,
                      what=n, ratio=round(r, 4), milliseconds=round(base * 1e3 * r, 2)) for n, r in ratios.items()]
    if a.json:
        with open(a.json, 'w', encoding='utf-8') as f:
            f.write('[\n' + ',\n'.join(json.dumps(r) for r in rows) + '\n]\n')


if __name__ == '__main__': main()
