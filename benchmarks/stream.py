"""Memory while a corpus larger than it is read and trained on: a small and a large one, made for this and removed.

python benchmarks/stream.py [--gb .5 5] [--steps 200] [--folder DIR] [--json benchmarks/stream.json]

For each size, a process of its own goes once through the whole corpus (shards of JSON lines, 16 lanes), then trains the
preset `tiny` on it for some steps. Resident memory is noted at every twentieth of the pass, and around training."""
import argparse, json, os, random, shutil, subprocess, sys, tempfile, time
from pathlib import Path

SHARDS, LANES = 64, 16


def memory():
    "Resident MB now, and at most so far"
    told = dict(l.split(':') for l in Path('/proc/self/status').read_text().splitlines())
    return tuple(round(int(told[k].split()[0]) / 1024) for k in ('VmRSS', 'VmHWM'))


def write_corpus(folder, gb):
    "Documents of paragraphs that come again in another order, each document with a number of its own"
    rng, n = random.Random(0), 0
    words = [''.join(rng.choices('etaoinshrdlu', k=rng.randint(2, 9))) for _ in range(4000)]
    paragraphs = [' '.join(rng.choices(words, k=120)) for _ in range(3000)]
    for k in range(SHARDS):
        with open(folder / f'part-{k:05}-of-{SHARDS:05}.jsonl', 'w', encoding='ascii') as f:
            while f.tell() < gb * 1e9 / SHARDS:
                texts = [' '.join(rng.choices(paragraphs, k=rng.randint(1, 12))) for _ in range(20)]
                docs = [f'{{"text": "{n + i} {t}"}}\n' for i, t in enumerate(texts)]
                n += len(docs)
                f.write(''.join(docs))
    return n


def a_pass(data):
    "Once through all shards; memory on the way"
    told, at, tokens, t = [], time.process_time(), 0, time.perf_counter()
    total = data.train.shards
    sizes = sum(s.size for s in total)
    from libmoe_nb.data.lanes import deal_shards
    dealt = next(deal_shards([s.size for s in total], LANES, 0))
    for b, places in data.train.parts(LANES):
        tokens += b['labels'].numel()
        done = sum(sum(total[i].size for i in mine[:p[1]]) + p[3] if p[0] == 0 else sum(total[i].size for i in mine)
                   for mine, p in zip(dealt, places.tolist())) / sizes
        if done >= len(told) / 20: told.append(memory()[0])
        if (places[:, 0] > 0).all(): break
    return dict(tokens=tokens, resident_mb=told, cpu_seconds=round(time.process_time() - at),
                seconds=round(time.perf_counter() - t))


def training(data, steps):
    import torch
    from libmoe_nb.models.causal import from_scratch
    from libmoe_nb.training.learner import moe_learner
    torch.set_num_threads(1)
    model = from_scratch('smoe', 'tiny', vocab_size=data.vocab_size)
    learn = moe_learner(model, data, preset='tiny', batch_size=LANES, steps=steps // 2, device='cpu', valid_steps=1)
    told = [memory()[0]]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1); told.append(memory()[0]); learn.fit(1); told.append(memory()[0])
    return dict(steps=learn.step, resident_mb=told, first_loss=learn.recorder.losses[0].item(),
                last_loss=learn.recorder.losses[-1].item())


def measure(folder, steps):
    from libmoe_nb.data.text_streams import stream_data
    data = stream_data(str(folder), vocab_size=5000, sequence_length=128, cache_dir=folder.parent / 'cache')
    row = dict(before_mb=memory()[0], reading=a_pass(data), training=training(data, steps))
    print(json.dumps(dict(row, peak_mb=memory()[1])))


def main():
    p = argparse.ArgumentParser()
    p.add_argument('--gb', type=float, nargs='+', default=[.5, 5])
    p.add_argument('--steps', type=int, default=200)
    p.add_argument('--folder')
    p.add_argument('--json')
    p.add_argument('--measure', type=Path)
    a = p.parse_args()
    if a.measure: return measure(a.measure, a.steps)
    rows = []
    for gb in a.gb:
        with tempfile.TemporaryDirectory(dir=a.folder) as d:
            need, free = gb * 1.1e9, shutil.disk_usage(d).free
            if free < need: sys.exit(f'{gb} GB do not fit into {d}: {free / 1e9:.0f} GB are free')
            (folder := Path(d) / 'corpus').mkdir()
            n = write_corpus(folder, gb)
            size = sum(f.stat().st_size for f in folder.iterdir())
            command = [sys.executable, __file__, '--measure', str(folder), '--steps', str(a.steps)]
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True,
                                 env=dict(os.environ, OMP_NUM_THREADS='1'))
            rows.append(dict(gb=round(size / 1e9, 2), documents=n, shards=SHARDS, **json.loads(out.stdout)))
        print(json.dumps(rows[-1]), flush=True)
        if a.json: Path(a.json).write_text('[\n' + ',\n'.join(map(json.dumps, rows)) + '\n]\n', encoding='utf-8')


if __name__ == '__main__': main()
