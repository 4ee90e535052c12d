#!/usr/bin/env python3
"""Does everything work on a GPU, and how fast is it there?

    python benchmarks/gpu.py --json benchmarks/gpu.json                # about eight minutes on one H100
    python benchmarks/gpu.py --device cpu --tiny --only checks train   # the same path without a GPU

Six parts, each written to the JSON as soon as it ends:
checks   every recipe and kernel, outputs and gradients, against the loop in float64 on the CPU; `libmoe compare` as a
         command
kernels  our layer at the paper's shapes beside a dense FFN of the same active FLOPs and transformers' grouped_mm
vision   every recipe in a small vision-language model against the CPU, some seconds of its last stage, and
         `libmoe vlm compare` as a command
precision
         every recipe trained from the same weights in float32, bfloat16 and float16 with a scaled loss: losses beside
         those of float32, steps that were left out, the dtype of router logits, and the share of tokens that are routed
         otherwise than in float32 (fp16 on a CPU runs the same path)
train    a preset for some seconds a recipe: tokens/s, memory, model FLOPs utilisation, the loss on validation text.
         `peak_gb` is the peak of the whole fit. A batch with the text's last block, which is padded, has a mask, and at
         a head size like 82 attention on a GPU then keeps all scores: `masked_steps` counts such batches, and
         `unmasked_gb` is the peak before the first of them
compile  the same model in a plain loop, as it is and under torch.compile
Errors are ||a - b|| / ||b||. Times are medians between events of the device, implementations in turn, fresh routing in
every round.
"""
import argparse, gc, json, os, statistics, subprocess, sys, tempfile, time, traceback
from pathlib import Path

import torch

from libmoe_nb.core.files import write_json
from libmoe_nb.moe.config import MoESpec, get_preset, recipes
from libmoe_nb.moe.experts import Experts, FeedForward, kernels
from libmoe_nb.moe.recipes import build_layer

# name: d, N experts, h, K, activation, gated, bias, T tokens
shapes = {'paper-0.15b': (512, 66, 128, 8, 'relu', False, False, 65536),
          'paper-0.68b': (1024, 66, 256, 8, 'relu', False, False, 32768),
          'paper-vlm': (1152, 6, 4304, 3, 'gelu_pytorch_tanh', False, True, 16384),
          'gated 64x1024': (2048, 64, 1024, 8, 'silu', True, False, 8192),
          'gated 8x4096': (2048, 8, 4096, 2, 'silu', True, False, 16384)}
tiny_shapes = {'paper-0.15b': (32, 6, 16, 2, 'relu', False, False, 64), 'gated': (32, 4, 16, 2, 'silu', True, True, 64)}
datasheet = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # dense bf16 FLOP/s
tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

def error(a, b): return ((a.double().cpu() - b.double().cpu()).norm() / b.double().cpu().norm().clamp_min(1e-30)).item()

def synchronize(device):
    if device.type == 'cuda': torch.cuda.synchronize()

def reset_peak(device):
    gc.collect()    # learners hold on to their models in circles
    if device.type == 'cuda': torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()

def peak_gb(device): return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == 'cuda' else None

# checks

def usable(kernel, device): return device.type == 'cpu' or kernel != 'sorted'

def check_layer(recipe, kernel, dtype, device, seed=0):
    "Largest errors of output and gradients against the loop in float64 on the CPU, and tokens that choose others"
    torch.manual_seed(seed)
    shared = recipe.startswith('sharede')
    spec = MoESpec(recipe=recipe, hidden_size=64, num_experts=9 if shared else 8, top_k=3,
                   num_shared_experts=int(shared), moe_intermediate_size=32,
                   router_init_std=.3, expert_init_std=(.12, .18))
    ours = build_layer(spec).to(dtype)
    reference = build_layer(spec)
    reference.load_state_dict(ours.state_dict())
    reference = reference.double()
    for m, k in ((ours, kernel), (reference, 'loop')):
        if hasattr(m, 'experts'): m.experts.kernel = k
    x, dy = (torch.randn(4, 96, 64).to(dtype) for _ in range(2))
    ours, a, b = ours.to(device), x.clone().to(device).requires_grad_(), x.double().requires_grad_()
    seen = {}
    for m in (ours, reference):
        if hasattr(m, 'router'):
            m.router.register_forward_hook(lambda mod, args, out, m=m: seen.__setitem__(m, out.expert_index.cpu()))
    ya, yb = ours(a), reference(b)
    same = torch.ones(len(x.flatten(0, 1)), dtype=torch.bool) if not seen else (seen[ours] == seen[reference]).all(-1)
    keep = same.view(4, 96, 1)
    ya.backward((dy * keep).to(device)); yb.backward(dy.double() * keep)
    grads = {n: (p.grad, q.grad) for (n, p), q in zip(ours.named_parameters(), reference.parameters())
             if q.grad is not None and q.grad.norm() > 1e-9}
    return dict(output=error(ya.cpu() * keep, yb * keep), inputs=error(a.grad, b.grad), changed=int((~same).sum()),
                **{f'gradient of {n}': error(p, q) for n, (p, q) in grads.items()})

def checks(device, args):
    rows = []
    for recipe in recipes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for kernel in ['auto', *kernels] if recipe != 'dense' else ['auto']:
                if not usable(kernel, device): continue
                row = dict(part='checks', recipe=recipe, kernel=kernel, dtype=str(dtype)[6:])
                try: found = check_layer(recipe, kernel, dtype, device)
                except Exception as e:
                    rows.append(row | dict(ok=False, message=f'{type(e).__name__}: {e}'[:300])); continue
                changed = found.pop('changed')
                worst = max(found, key=found.get)
                rows.append(row | dict(ok=found[worst] <= tolerance[dtype] and changed <= 4, worst=worst,
                                       error=found[worst], changed=changed))
    rows.append(compare_row(device, args))
    return rows

def command(device, call, name, cache, made, part='checks'):
    "A command in a process of its own, which has to leave the file `made`"
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        run = subprocess.run([sys.executable, '-c', 'import sys; from libmoe_nb.cli import main; sys.exit(main())',
                              *call, '--device', device.type, '--out', out], capture_output=True, text=True,
                             env=dict(os.environ, XDG_CACHE_HOME=cache))
        done = (Path(out)/made).exists()
    return dict(part=part, recipe=name, ok=run.returncode == 0 and done,
                seconds=round(time.perf_counter() - start, 1),
                message='' if run.returncode == 0 else (run.stdout + run.stderr)[-600:])

def compare_row(device, args):
    size = (['--steps', '2', '--max-bytes', '300000', '--recipes', 'dense,smoe'] if args.tiny else
            ['--steps', '10', '--recipes', 'dense,smoe,tcmoe,moe_plus_plus'])
    return command(device, ['compare', '--preset', 'tiny', '--data', 'python', *size], 'libmoe compare', args.cache,
                   'report.html')

# kernels

def timed(device, f, rounds):
    "Median time of `f(round)` in ms"
    times = []
    for r in range(-2, rounds):
        if device.type == 'cuda':
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record(); f(r); b.record(); b.synchronize()
            ms = a.elapsed_time(b)
        else: start = time.perf_counter(); f(r); ms = (time.perf_counter() - start) * 1e3
        if r >= 0: times.append(ms)
    return statistics.median(times)

def implementations(shape, dtype, device):
    from types import MethodType
    from transformers.integrations import moe as hf
    d, N, h, K, act, gated, bias, T = shape
    dense, experts = (FeedForward(d, K*h, act, gated, bias).to(device, dtype),
                      Experts(N, d, h, act, gated, bias).to(device, dtype))
    experts.act_fn, experts.has_gate, experts.has_bias, experts.is_transposed = experts.act, gated, bias, False
    experts.has_post_expert_norm = experts._is_expert_parallel = False
    experts._apply_gate = MethodType(hf._default_apply_gate, experts)
    run = dict(dense=lambda x, i, w: dense(x))
    for name, f in kernels.items():
        if usable(name, device): run[name] = lambda *a, f=f: f(experts, *a)
    run['transformers_grouped'] = lambda *a: hf.grouped_mm_experts_forward(experts, *a)
    return dense, experts, run

def choices(T, N, K, routing, generator):
    popularity = (-1.5 * torch.arange(1, N + 1, device=generator.device).log() if routing == 'zipf'
                  else torch.zeros(N, device=generator.device))
    noise = -torch.empty(T, N, device=generator.device).exponential_(generator=generator).log()
    return ((popularity + noise).topk(K).indices,
            torch.rand(T, K, generator=generator, device=generator.device).softmax(-1))

def kernel_rows(name, shape, dtype, routing, device, rounds):
    d, N, h, K, act, gated, bias, T = shape
    g = torch.Generator(device).manual_seed(0)
    inputs = [(torch.randn(T, d, generator=g, device=device).to(dtype), *choices(T, N, K, routing, g),
               torch.randn(T, d, generator=g, device=device).to(dtype)) for _ in range(3)]
    dense, experts, run = implementations(shape, dtype, device)
    with torch.no_grad():
        reference = kernels['loop'](experts.float(), inputs[0][0].float(), *inputs[0][1:3]); experts.to(dtype)
    flops, rows = 2 * T * K * (2 + gated) * d * h, []
    for impl, f in run.items():
        row = dict(part='kernels', shape=name, dtype=str(dtype)[6:], routing=routing, implementation=impl)
        def forward(r):
            with torch.no_grad(): return f(*inputs[r % 3][:3])
        def both(r):
            x, i, w, dy = inputs[r % 3]
            for p in (*dense.parameters(), *experts.parameters()): p.grad = None
            f(x.detach().requires_grad_(), i, w.detach().requires_grad_()).backward(dy)
        try:
            wrong = None if impl == 'dense' else error(forward(0), reference)
            reset_peak(device)
            base = torch.cuda.memory_allocated() if device.type == 'cuda' else 0
            times = timed(device, forward, rounds), timed(device, both, rounds)
            memory = round((torch.cuda.max_memory_allocated() - base) / 1e9, 3) if device.type == 'cuda' else None
        except Exception as e: rows.append(row | dict(ok=False, message=f'{type(e).__name__}: {e}'[:300])); continue
        rows.append(row | dict(ok=wrong is None or wrong < tolerance[dtype], error=wrong, forward_ms=round(times[0], 3),
                               both_ms=round(times[1], 3),
                               forward_tflops=round(flops / times[0] / 1e9, 1),
                               both_tflops=round(3 * flops / times[1] / 1e9, 1), peak_gb=memory))
    base = next(r for r in rows if r['implementation'] == 'dense')
    for r in rows:
        if 'forward_ms' in r:
            r.update(forward_ratio=round(r['forward_ms'] / base['forward_ms'], 2),
                     both_ratio=round(r['both_ms'] / base['both_ms'], 2))
    return rows

def kernels_part(device, args):
    rows = []
    for name, shape in (tiny_shapes if args.tiny else shapes).items():
        for dtype in (torch.bfloat16, torch.float32):
            for routing in ('balanced', 'zipf'):
                if args.tiny or dtype == torch.bfloat16 or routing == 'balanced':
                    rows += kernel_rows(name, shape, dtype, routing, device, 3 if args.tiny else args.rounds)
    return rows

# train

def text(args, preset):
    from libmoe_nb.data.text import text_data
    return text_data('python', vocab_size=preset.vocab_size, sequence_length=preset.sequence_length,
                     cache_dir=args.cache, max_bytes=300_000 if args.tiny else 24_000_000)

def matmul_rate(device, n):
    "FLOP/s of one large product of bfloat16 matrices"
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return 2 * n**3 / timed(device, lambda r: a @ b, 10) * 1e3

def until_callback(seconds, device):
    from fastai.basics import CancelFitException
    from libmoe_nb.training.learner import Callback
    class Until(Callback):
        "Ends the fit after some seconds; the first three steps are not timed"
        order, masked, unmasked_gb = 90, 0, None
        def before_batch(self):
            if 'attention_mask' not in self.learn.xb[0]: return
            if not self.masked: self.unmasked_gb = peak_gb(device)
            self.masked += 1
        def after_batch(self):
            if self.learn.step == 3: synchronize(device); self.start = time.perf_counter()
            elif self.learn.step > 3 and time.perf_counter() - self.start > seconds:
                synchronize(device)
                self.time, self.steps, self.last = (time.perf_counter() - self.start, self.learn.step - 3,
                                                    float(self.learn.loss))
                raise CancelFitException()
    return Until()

def train_row(recipe, preset, data, seconds, device, parts):
    from libmoe_nb.models.causal import from_scratch
    from libmoe_nb.models.counting import count_flops, count_parameters
    from libmoe_nb.evaluation.heldout import evaluate_perplexity
    from libmoe_nb.training.learner import moe_learner
    reset_peak(device)
    model, until = from_scratch(recipe, preset, seed=0).to(device), until_callback(seconds, device)
    learn = moe_learner(model, data, preset=preset, bf16=device.type == 'cuda', grad_accum=parts, warmup_steps=20,
                        lr=1e-3, steps=10**6, device=device, cbs=[until])
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine()
    speed = until.steps * preset.batch_size * preset.sequence_length / until.time
    flops = count_flops(model, preset.sequence_length)
    memory = peak_gb(device)
    valid = evaluate_perplexity(model, data, 8, steps=16, bf16=device.type == 'cuda')
    sizes = count_parameters(model)
    return dict(part='train', recipe=recipe, preset=preset.name, ok=True, total=sizes['total'], active=sizes['active'],
                steps=until.steps + 3, grad_accum=parts, seconds=round(until.time, 1),
                tokens=(until.steps + 3) * preset.batch_size * preset.sequence_length, tokens_per_second=round(speed),
                tflops=round(3 * flops * speed / 1e12, 2), peak_gb=memory,
                masked_steps=until.masked, unmasked_gb=until.unmasked_gb if until.masked else memory,
                train_loss=round(until.last, 4), perplexity=round(valid['perplexity'], 2),
                unigram_perplexity=round(data.unigram_perplexity(), 1))

def train(device, args):
    import warnings
    warnings.filterwarnings('ignore')
    preset, rows = get_preset('tiny' if args.tiny else args.preset), []
    data = text(args, preset)
    for recipe in args.recipes:
        parts = 1 if args.tiny else args.grad_accum
        while True:
            try: rows.append(train_row(recipe, preset, data, args.seconds, device, parts))
            except torch.OutOfMemoryError if hasattr(torch, 'OutOfMemoryError') else torch.cuda.OutOfMemoryError:
                if parts < preset.batch_size: parts *= 2; torch.cuda.empty_cache(); continue
                rows.append(dict(part='train', recipe=recipe, ok=False, message='out of memory'))
            except Exception:
                rows.append(dict(part='train', recipe=recipe, ok=False, message=traceback.format_exc()[-600:]))
            break
        say(rows[-1])
    return rows

# precision

def precision_run(recipe, precision, preset, data, steps, device):
    "Losses of each step, the scale, and what routing in training differs in from float32"
    from libmoe_nb.models.causal import from_scratch
    from libmoe_nb.training.learner import Callback, moe_learner
    from libmoe_nb.training.telemetry import MismatchTelemetry
    class Look(Callback):
        uses_routing, run_valid, order = True, False, 40
        def __init__(self): self.losses, self.dtypes = [], set()
        def after_batch(self):
            self.losses.append(float(self.learn.loss))
            self.dtypes |= {r.router_logits.dtype for rs in self.learn.routings.values() for r, _ in rs}
    look, watch = Look(), MismatchTelemetry(1)
    model = from_scratch(recipe, preset, seed=0, vocab_size=data.vocab_size).to(device)
    learn = moe_learner(model, data, preset=preset, batch_size=4 if preset.name == 'tiny' else 8, steps=steps, lr=1e-3,
                        warmup_steps=2, valid_steps=1, device=device, bf16=precision == 'bf16',
                        fp16=precision == 'fp16', cbs=[look, watch])
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine()
    left_out = len(learn.loss_scaling.rows) if precision == 'fp16' else 0
    scale = learn.loss_scaling.scale if precision == 'fp16' else None
    return look, dict(left_out=left_out, scale=scale, mismatched=max((r['share'] for r in watch.rows), default=0.))

def precision(device, args):
    preset, steps, rows = get_preset('tiny' if args.tiny else 'mini'), 3 if args.tiny else 20, []
    data = text(args, preset)
    for recipe in args.recipes:
        plain, _ = precision_run(recipe, 'fp32', preset, data, steps, device)
        for p in 'bf16', 'fp16':
            reset_peak(device)
            try:
                look, told = precision_run(recipe, p, preset, data, steps, device)
                gap = max(abs(a - b) for a, b in zip(plain.losses, look.losses))
                rows.append(dict(part='precision', recipe=recipe, precision=p, loss_gap=gap, **told,
                                 ok=gap < .1 and look.dtypes <= {torch.float32} and told['left_out'] <= steps / 2))
            except Exception:
                rows.append(dict(part='precision', recipe=recipe, precision=p, ok=False,
                                 message=traceback.format_exc()[-600:]))
            say(rows[-1])
    return rows

# compile

def plain_row(recipe, preset, data, compiled, seconds, device, batch):
    from libmoe_nb.models.causal import from_scratch
    from libmoe_nb.models.counting import count_flops
    torch._dynamo.reset()
    reset_peak(device)
    model = from_scratch(recipe, preset, seed=0).to(device).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device.type in ('cpu', 'cuda'))
    run = torch.compile(model) if compiled else model
    batches, step, losses, start = data.train.batches(batch, 0, 0), 0, [], time.perf_counter()
    warm = 5
    while True:
        ids = next(batches)['input_ids'].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == 'cuda'):
            loss = run(input_ids=ids, labels=ids).loss
        loss.backward(); opt.step(); opt.zero_grad()
        losses.append(loss.detach())
        step += 1
        if step == warm: synchronize(device); ready, start = time.perf_counter() - start, time.perf_counter()
        elif step > warm and step % 5 == 0:
            synchronize(device)
            if time.perf_counter() - start > seconds: break
    spent = time.perf_counter() - start
    speed = (step - warm) * batch * preset.sequence_length / spent
    return dict(part='compile', recipe=recipe, preset=preset.name, compiled=compiled,
                ok=bool(torch.isfinite(losses[-1])), steps=step, first_steps_seconds=round(ready, 1), batch=batch,
                tokens_per_second=round(speed),
                tflops=round(3 * count_flops(model, preset.sequence_length) * speed / 1e12, 2), peak_gb=peak_gb(device),
                first_loss=round(losses[0].item(), 4), last_loss=round(losses[-1].item(), 4))

def compile_part(device, args):
    preset, rows = get_preset('tiny' if args.tiny else args.preset), []
    data = text(args, preset)
    for recipe in args.compile:
        for compiled in (False, True):
            try:
                rows.append(plain_row(recipe, preset, data, compiled, min(args.seconds, 8), device,
                                      preset.batch_size if args.tiny else 16))
            except Exception:
                rows.append(dict(part='compile', recipe=recipe, compiled=compiled, ok=False,
                                 message=traceback.format_exc()[-600:]))
            say(rows[-1])
    return rows

# vision

def vision_config(recipe, preset, device, seed=0):
    "The last stage of a preset, which begins with a new model"
    from dataclasses import replace
    from libmoe_nb.experiments.vision_stages import from_size, scene_data, stage_config
    from libmoe_nb.models.vision import vision_size
    size = vision_size(preset.size)
    return stage_config(replace(preset.stages[-1], steps=10**6, warmup_steps=20), from_size(preset.size),
                        scene_data(64, size.image_size, preset.questions), seed=seed, recipe=recipe,
                        experts=dict(num_experts=size.num_experts, top_k=size.top_k), bf16=device.type == 'cuda',
                        device=device.type)

def check_vision(model, batch, device):
    "Errors of loss, logits and gradients in float32 against the CPU, and of the loss under autocast to bfloat16"
    def run(device, dtype=None):
        model.to(device).zero_grad()
        x = {k: v.to(device) for k, v in batch.items() if k != 'num_images'}
        with torch.autocast(device.type, dtype, enabled=dtype is not None): out = model(**x, use_cache=False)
        out.loss.backward()
        return [out.loss.detach().cpu(), out.logits.detach().float().cpu(),
                {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}]
    a, b, c = run(torch.device('cpu')), run(device), run(device, torch.bfloat16)
    gradients = {n: error(b[2][n], g) for n, g in a[2].items() if g.norm() > 1e-7}
    return dict(loss_error=error(b[0], a[0]), logits_error=error(b[1], a[1]), error=max(gradients.values()),
                worst=max(gradients, key=gradients.get), bf16_loss_error=error(c[0], a[0]),
                same_gradients=set(a[2]) == set(b[2]))

def vision_row(recipe, preset, seconds, device):
    from libmoe_nb.experiments.vision_stages import stage_learner, stage_model
    from libmoe_nb.training.stages import StageData
    config = vision_config(recipe, preset, device)
    torch.manual_seed(0)
    model, processor = stage_model(None, config)
    data, learn = stage_learner(config, model, processor, cbs=[until := until_callback(seconds, device)])
    found = check_vision(model, next(iter(StageData(data).epoch(8))), device)
    reset_peak(device)
    model.to(device)
    with learn.no_bar(), learn.no_logging(): learn.fit_cosine()
    return dict(part='vision', recipe=recipe, preset=preset.name, **found, steps=until.steps + 3,
                samples_per_second=round(until.steps * config['stage']['batch_size'] / until.time, 1),
                peak_gb=peak_gb(device), train_loss=round(until.last, 4),
                ok=(found['same_gradients'] and max(found[k] for k in ('loss_error', 'logits_error', 'error')) < 1e-3
                    and found['bf16_loss_error'] < .02))

def vision(device, args):
    from libmoe_nb.training.stages import get_vision_preset
    preset, rows = get_vision_preset('tiny-vlm' if args.tiny else 'mini-vlm'), []
    for recipe in args.vision:
        try: rows.append(vision_row(recipe, preset, min(args.seconds, 4), device))
        except Exception:
            rows.append(dict(part='vision', recipe=recipe, ok=False, message=traceback.format_exc()[-600:]))
        say(rows[-1])
    rows.append(command(device, ['vlm', 'compare', '--preset', 'tiny-vlm', '--recipes', 'smoe', '--jobs', '1'],
                        'libmoe vlm compare', args.cache, 'report/report.html', 'vision'))
    return rows

# all of it

parts = dict(checks=checks, kernels=kernels_part, vision=vision, precision=precision, train=train,
             compile=compile_part)

def say(row):
    print(' '.join(f'{k}={v:.3g}' if isinstance(v, float) else f'{k}={v}'
                   for k, v in row.items() if k != 'part' and v is not None), flush=True)

def machine(device):
    import platform, transformers
    d = dict(torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version(),
             device=device.type)
    if device.type != 'cuda': return d
    rate = matmul_rate(device, 8192)
    name = torch.cuda.get_device_name()
    return d | dict(device=name, cuda=torch.version.cuda, bf16_matmul_tflops=round(rate / 1e12),
                    datasheet_tflops=next((v / 1e12 for k, v in datasheet.items() if k in name), None))

def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--only', nargs='+', choices=list(parts), default=list(parts))
    p.add_argument('--preset', default='paper-0.15b')
    p.add_argument('--recipes', nargs='+', choices=list(recipes), default=list(recipes))
    p.add_argument('--compile', nargs='*', default=['dense', 'smoe'], help='recipes for the part `compile`')
    p.add_argument('--vision', nargs='*', choices=list(recipes), default=list(recipes),
                   help='recipes for the part `vision`')
    p.add_argument('--seconds', type=float, default=18, help='of training for each recipe')
    p.add_argument('--grad-accum', type=int, default=4, help='parts of a step; doubled where the memory is too small')
    p.add_argument('--rounds', type=int, default=9)
    p.add_argument('--tiny', action='store_true', help='sizes of a test')
    p.add_argument('--cache', default=os.path.join(tempfile.gettempdir(), 'libmoe-gpu'))
    p.add_argument('--json', type=Path, metavar='FILE', help='write the rows there, part by part')
    args = p.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    rows, info = [], machine(device)
    say(info)
    for name in args.only:
        start = time.perf_counter()
        try: new = parts[name](device, args)
        except Exception: new = [dict(part=name, ok=False, message=traceback.format_exc()[-1500:])]
        rows += new
        if name in ('checks', 'kernels'):
            for r in new: say(r)
        info[f'{name}_seconds'] = round(time.perf_counter() - start, 1)
        if args.json: write_json(args.json, dict(machine=info, rows=rows))
    bad = [r for r in rows if not r['ok']]
    print(f'{len(rows) - len(bad)} of {len(rows)} rows are as they should be; seconds: '
          + ', '.join(f"{n} {info[n + '_seconds']}" for n in args.only))
    for r in bad: print('NOT OK:', json.dumps(r)[:400])
    return int(bool(bad))

if __name__ == '__main__': sys.exit(main())
