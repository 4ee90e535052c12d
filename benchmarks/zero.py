#!/usr/bin/env python3
"""DeepSpeed's ZeRO-2 and ZeRO-3 against a copy of the model in each process: every recipe, on two CPU processes.

    pip install deepspeed
    python benchmarks/zero.py --json benchmarks/zero.json            # some minutes

`accelerate launch` starts two processes with `ddp.yaml`, `zero2.yaml` and `zero3.yaml` of `tools/accelerate`, of
which nothing is changed but the device and the precision (and, for a dense model, the line of leaves). Two cases.
`script`: ten steps of `tools/accelerate/trainer.py` at the preset `tiny`. `rare`: five steps of a model with 16
experts on four tokens in each process, so that by count no process has a token for more than half of the experts, and
ZeRO-3 gathers parameters that nothing will use. Held against `ddp` are the losses of the steps, as the Trainer tells
them (four digits), and all saved weights, in float32. The optimiser of `rare` is SGD: Adam, in `script`, makes a full
step of a difference in rounding where a gradient is almost zero. `bf16`: the script at the precision that the files
name, of which the loss is told and the saved weights are looked at for what is not finite.
A way that takes longer than `--limit` seconds is written down as hung. What the file has from these versions is not
run again."""
import argparse, json, os, re, subprocess, sys, tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from libmoe_nb.moe.config import recipes

ROOT = Path(__file__).resolve().parents[1]
RECIPES = list(recipes)
WAYS = 'ddp', 'zero2', 'zero3'
CASES = 'script', 'rare', 'bf16'


def rare(recipe, out):
    "On each process: a few steps on so few tokens that most experts get none"
    sys.path.insert(0, str(ROOT/'benchmarks'))
    import torch
    from transformers import Trainer, TrainingArguments
    from parity import build
    from libmoe_nb.training.trainer_callback import RouterCallback
    model = build(recipe, experts=16)
    ids = torch.randint(0, 50, (32, 4), generator=torch.Generator().manual_seed(0))
    how = TrainingArguments(out, per_device_train_batch_size=1, max_steps=5, learning_rate=.5, optim='sgd',
                            logging_steps=1, save_strategy='no', report_to='none', disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, how, train_dataset=[dict(input_ids=x, labels=x.clone()) for x in ids],
                      callbacks=[RouterCallback()] * (recipe != 'dense'))
    trainer.train()
    trainer.save_model(f'{out}/model')
    trainer.accelerator.end_training()


def launch(way, script, precision, limit, leaves=True):
    "What two processes said, or None if they took too long"
    text = (ROOT/'tools/accelerate'/f'{way}.yaml').read_text().replace('use_cpu: false', 'use_cpu: true')
    text = re.sub(r'mixed_precision: \S+', f"mixed_precision: '{precision}'", text)
    if not leaves: text = re.sub('.*deepspeed_moe_layer_cls_names.*\n', '', text)
    with tempfile.NamedTemporaryFile('w', suffix='.yaml') as f:
        f.write(text); f.flush()
        p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'accelerate.commands.launch', '--config_file',
                              f.name, *map(str, script)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             env=os.environ | dict(DS_ACCELERATOR='cpu', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)),
                             start_new_session=True)
        try: told = p.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, 9)
            return None
    if p.returncode: sys.exit(f'{way} ended with {p.returncode}:\n{told[-4000:]}')
    return told


def weights(folder):
    from safetensors.torch import load_file
    return {k: v.double() for f in sorted(folder.glob('*.safetensors')) for k, v in load_file(f).items()}


def run(case, recipe, way, box, limit):
    "Losses of the steps and weights at the end"
    out = box/f'{case}-{recipe}-{way}'
    script = [__file__, '--rare', recipe, out] if case == 'rare' else [
        ROOT/'tools/accelerate/trainer.py', recipe, '--preset', 'tiny', '--steps', 10, '--device', 'cpu', '--out', out]
    told = launch(way, script, 'bf16' if case == 'bf16' else 'no', limit, recipe != 'dense')
    return told and ([float(l) for l in re.findall(r"'loss': '?([-\d.einfa]+)", told)], weights(out/'model'))


def compare(case, recipe, box, limit):
    "One row for each way but the first, which is what they are held against"
    one = None if case == 'bf16' else run(case, recipe, 'ddp', box, limit)
    for way in WAYS[1:]:
        got, row = run(case, recipe, way, box, limit), dict(case=case, recipe=recipe, way=way)
        if got is None: yield row | dict(hung=True)
        elif case == 'bf16':
            finite = all(t.isfinite().all() for t in got[1].values())
            yield row | dict(steps=len(got[0]), losses=got[0][::9], finite=finite)
        else:
            assert one[1].keys() == got[1].keys() and len(one[0]) == len(got[0]) > 0, (case, recipe, way)
            yield row | dict(steps=len(got[0]), loss=max(abs(a - b) for a, b in zip(one[0], got[0])),
                             weights=max((one[1][k] - t).abs().max().item() for k, t in got[1].items()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--recipes', nargs='+', choices=RECIPES, default=RECIPES)
    p.add_argument('--cases', nargs='+', choices=CASES, default=CASES)
    p.add_argument('--limit', type=float, default=300); p.add_argument('--json', type=Path)
    p.add_argument('--rare', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.rare: return rare(*a.rare)
    try: about = {n: version(n) for n in ('deepspeed', 'torch', 'transformers', 'accelerate')}
    except PackageNotFoundError as e: p.error(f'{e.name} must be installed')
    place = lambda r: (CASES.index(r['case']), RECIPES.index(r['recipe']), WAYS.index(r['way']))
    kept = json.loads(a.json.read_text()) if a.json and a.json.exists() else {}
    rows = {place(r): r for r in kept.get('rows', [])} if all(kept.get(n) == v for n, v in about.items()) else {}
    with tempfile.TemporaryDirectory() as box:
        for case, recipe in ((c, r) for c in a.cases for r in a.recipes):
            if place(dict(case=case, recipe=recipe, way=WAYS[-1])) in rows: continue
            for row in compare(case, recipe, Path(box), a.limit):
                rows[place(row)] = row; print(json.dumps(row), flush=True)
            told = about | dict(rows=[rows[k] for k in sorted(rows)])
            if a.json: a.json.write_text(json.dumps(told, indent=1) + '\n')


if __name__ == '__main__': main()
