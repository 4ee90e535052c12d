"""What our training costs beside a plain loop over the same model, the Hugging Face Trainer, and a dense model.

python benchmarks/training.py [--preset mini] [--recipes smoe,...] [--steps 10] [--rounds 5] [--threads 1] [--compile]
                              [--wall] [--json benchmarks/training.json]

For each recipe, in one process and in turn: `plain`, a loop of forward, backward, clip and AdamW; `ours`, the learner
of `libmoe compare` with its log, schedule and telemetry; `Trainer`, the Hugging Face one; `dense`, a plain loop over
a dense model of the same active parameters; `fused`, the plain loop with the fused kernel; with --compile,
`compiled`, the plain loop under `torch.compile`. All take the same sequences. A round is `--steps` steps of each and
one before them, in which an optimiser makes its state; a step is timed from the end of the one before, so loading of
data and callbacks count, and starting does not. Printed are the median step of `plain`, and medians over rounds of
each one's time over that of `plain`. Times are those of the processor, which another process on the machine does not
lengthen; with --wall, those that pass. Memory is the peak of a process of its own above what it held before the model
was made. Target: `ours` below 1.05 where a step takes 100 ms."""
import argparse, dataclasses, json, multiprocessing, os, statistics, tempfile, time, warnings
import torch
from libmoe_nb.core.files import write_json
from libmoe_nb.moe.config import get_preset


class Stamps:
    "The time at the end of each step, of one block of steps"
    def __init__(self, clock): self.clock, self.times = clock, []
    def __call__(self): self.times.append(self.clock())
    def steps(self):
        times, self.times = self.times[1:], []
        return [b - a for a, b in zip(times, times[1:])]


def plain(model, data, preset, stamps, compiled=False):
    run = torch.compile(model) if compiled else model
    opt = torch.optim.AdamW(model.parameters(), lr=preset.learning_rate, betas=preset.betas,
                            weight_decay=preset.weight_decay, fused=True)
    batches = data.train.batches(preset.batch_size, 0, 0)
    def block(steps):
        model.train(); stamps()
        for _ in range(steps):
            ids = next(batches)['input_ids']
            run(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), preset.grad_clip)
            opt.step(); opt.zero_grad(); stamps()
    return block


def ours(model, data, preset, stamps):
    from libmoe_nb.training.learner import Callback, moe_learner
    from libmoe_nb.training.log import RunLog
    from libmoe_nb.training.telemetry import RoutingTelemetry
    class Stamp(Callback):
        order = 99
        def before_train(self): stamps()
        def after_batch(self):
            if self.training: stamps()
    folder = tempfile.mkdtemp()
    def block(steps):
        learn = moe_learner(model, data, preset=preset, steps=steps, valid_steps=1, device='cpu',
                            cbs=[RunLog(os.path.join(folder, 'log.jsonl')), RoutingTelemetry(7), Stamp()])
        with learn.no_bar(), learn.no_logging(): learn.fit_cosine()
    return block


def trainer(model, data, preset, stamps):
    from transformers import Trainer, TrainerCallback, TrainingArguments
    batches = data.train.batches(preset.batch_size, 0, 0)
    rows = [r for _ in range(20) for r in next(batches)['input_ids']]
    rows = [dict(input_ids=r, labels=r) for r in rows]
    class Stamp(TrainerCallback):
        def on_train_begin(self, *args, **kwargs): stamps()
        def on_step_end(self, *args, **kwargs): stamps()
    folder = tempfile.mkdtemp()
    def block(steps):
        args = TrainingArguments(folder, max_steps=steps, per_device_train_batch_size=preset.batch_size, use_cpu=True,
                                 learning_rate=preset.learning_rate, weight_decay=preset.weight_decay,
                                 max_grad_norm=preset.grad_clip, lr_scheduler_type='cosine', report_to='none',
                                 save_strategy='no', logging_steps=5, disable_tqdm=True, optim='adamw_torch_fused')
        t = Trainer(model, args, train_dataset=rows, callbacks=[Stamp()])
        t.log = lambda *args, **kwargs: None
        t.train()
    return block


def fused(*args):
    from libmoe_nb.moe.fused import use_fused
    run = plain(*args)
    def block(steps):
        use_fused()
        try: run(steps)
        finally: use_fused(False)
    return block


ways = dict(plain=plain, ours=ours, Trainer=trainer, dense=plain, fused=fused,
            compiled=lambda *a: plain(*a, compiled=True))

def prepared(way, recipe, preset, data, stamps):
    from libmoe_nb.models.causal import from_scratch
    return ways[way](from_scratch('dense' if way == 'dense' else recipe, preset, seed=0), data, preset, stamps)


def peak():
    "Kilobytes; on Linux, where a new process's `ru_maxrss` begins with its parent's"
    with open('/proc/self/status', encoding='utf-8') as f:
        return next(int(l.split()[1]) for l in f if l.startswith('VmHWM'))


def held(way, recipe, preset, data, steps, threads, answer):
    "Peak megabytes of this process above what it held before the model was made"
    torch.set_num_threads(threads)
    warnings.filterwarnings('ignore')
    import libmoe_nb.training.learner, transformers.trainer  # noqa: F401
    before = peak()
    prepared(way, recipe, preset, data, Stamps(time.perf_counter))(steps)
    answer.put((peak() - before) / 1024)


def memory(*args):
    new = multiprocessing.get_context('spawn')
    answer = new.Queue()
    p = new.Process(target=held, args=(*args, answer))
    p.start()
    res = answer.get(timeout=600)
    p.join()
    return round(res, 1)


def measure(recipe, preset, data, a, clock):
    from libmoe_nb.moe.fused import use_fused
    left_out = [*(() if a.compile else ('compiled',)), *(() if use_fused() else ('fused',)),
                *(('dense', 'fused') if recipe == 'dense' else ())]
    use_fused(False)
    stamps, names = Stamps(clock), [n for n in ways if n not in left_out]
    blocks = {n: prepared(n, recipe, preset, data, stamps) for n in names}
    for f in blocks.values(): f(3); stamps.steps()
    times = {n: [] for n in blocks}
    for _ in range(a.rounds):
        for n, f in blocks.items():
            f(a.steps + 1)
            times[n].append(statistics.mean(stamps.steps()))
    base = statistics.median(times['plain'])
    for n, t in times.items():
        ratios = [x / p for x, p in zip(t, times['plain'])]
        yield dict(recipe=recipe, way=n, milliseconds=round(base * 1e3 * statistics.median(ratios), 1),
                   ratio=round(statistics.median(ratios), 3), low=round(min(ratios), 3), high=round(max(ratios), 3),
                   tokens_per_second=round(preset.batch_size * preset.sequence_length
                                           / (base * statistics.median(ratios))),
                   megabytes=None if a.no_memory else memory(n, recipe, preset, data, 4, a.threads))


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--preset', default='mini'); p.add_argument('--recipes', default='smoe,tcmoe,sharede_v3')
    p.add_argument('--steps', type=int, default=10); p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--batch-size', type=int); p.add_argument('--threads', type=int, default=1)
    p.add_argument('--compile', action='store_true'); p.add_argument('--wall', action='store_true')
    p.add_argument('--no-memory', action='store_true', help='no processes that measure memory')
    p.add_argument('--json')
    a = p.parse_args()
    warnings.filterwarnings('ignore')
    from libmoe_nb.data.text import text_data
    preset = get_preset(a.preset)
    if a.batch_size: preset = dataclasses.replace(preset, batch_size=a.batch_size)
    data = text_data('python', vocab_size=preset.vocab_size, sequence_length=preset.sequence_length,
                     max_bytes=2_000_000)
    torch.set_num_threads(a.threads)
    clock, rows = time.perf_counter if a.wall else time.process_time, []
    print(f"{'recipe':14}{'way':10}{'ms':>9}{'over plain':>12}{'from':>8}{'to':>8}{'tokens/s':>11}{'MB':>9}")
    for recipe in a.recipes.split(','):
        for r in measure(recipe, preset, data, a, clock):
            print(f"{r['recipe']:14}{r['way']:10}{r['milliseconds']:9.1f}{r['ratio']:12.3f}{r['low']:8.3f}"
                  f"{r['high']:8.3f}{r['tokens_per_second']:11,}{r['megabytes'] or float('nan'):9.1f}", flush=True)
            rows.append(r)
    about = dict(preset=preset.name, batch_size=preset.batch_size, sequence_length=preset.sequence_length,
                 steps=a.steps,
                 rounds=a.rounds, threads=a.threads, clock='wall' if a.wall else 'processor', torch=torch.__version__,
                 load=os.getloadavg()[0])
    if a.json: write_json(a.json, dict(about=about, rows=rows))
    print(json.dumps(about))


if __name__ == '__main__': main()
