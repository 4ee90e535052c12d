"A plan of a run, against what torch counts, keeps and holds."
import dataclasses, json
from functools import lru_cache
from pathlib import Path

import pytest, torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from libmoe_nb.models.causal import from_scratch
from libmoe_nb.models.counting import count_flops, count_parameters
from libmoe_nb.models.towers import model_parts
from libmoe_nb.models.vision import VisionLanguageSize, llava_from_scratch, upcycle_parts
from libmoe_nb.moe.config import own_recipes, presets
from libmoe_nb.paper.plan import plan, routed
from libmoe_nb.paper.setup import Setup, gpus, precisions
from libmoe_nb.paper.work import kept_bytes, work_of

ROOT = Path(__file__).resolve().parents[2]
SIZE = VisionLanguageSize(
    name='small', image_size=32, patch_size=8, image_scales=(1, 3),
    tower=dict(model_type='siglip_vision_model', hidden_size=24, intermediate_size=48, num_hidden_layers=2,
               num_attention_heads=2),
    text=dict(model_type='phi3', vocab_size=200, hidden_size=32, intermediate_size=80, num_hidden_layers=2,
              num_attention_heads=2, pad_token_id=0))
SEEN = {'tower ': (160, 16), 'projector ': (16, 16), '': (50, 50)}
EVERYTHING = 'tower', 'projector', 'language_model'

def ids(shape, n=1000): return torch.randint(0, n, shape, generator=torch.Generator().manual_seed(0))

def with_kernel(model, kernel):
    for m in model.modules():
        if hasattr(m, 'stacked'): m.kernel = kernel
    return model.train()

def seeing(recipe, train, kernel):
    "A small vision-language model of two scales, some of its parts frozen, and its forward pass"
    model = llava_from_scratch(SIZE, seed=0)
    if recipe != 'dense': model = upcycle_parts(model, recipe, num_experts=6, top_k=3)
    for part, m in model_parts(model).items():
        for w in m.parameters(): w.requires_grad_(part in train)
    tokens = ids((2, 50), 190)
    tokens[:, :16] = model.config.image_token_index
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return with_kernel(model, kernel), lambda: model(input_ids=tokens, pixel_values=pixels, labels=tokens).loss

def counted(forward):
    with FlopCounterMode(display=False) as forth: loss = forward()
    with FlopCounterMode(display=False) as back: loss.backward()
    return forth.get_total_flops(), back.get_total_flops()

def planned(work, samples=2):
    return tuple(samples * sum(getattr(p, k) for p in work.products) for k in ('forward', 'backward'))

@lru_cache
def small(recipe): return plan('paper-0.15b', recipe)
def of(recipe='smoe', **setup): return dataclasses.replace(small(recipe), setup=Setup(**setup))

# operations

@pytest.mark.parametrize('recipe', own_recipes)
def test_operations_are_those_that_torch_counts(recipe):
    model = with_kernel(from_scratch(recipe, 'tiny', seed=0), 'loop')
    model.set_attn_implementation('eager')
    tokens = ids((2, 64))
    there, ours = counted(lambda: model(input_ids=tokens, labels=tokens).loss), planned(work_of(model, {'': (64, 64)}))
    if recipe == 'moe_plus_plus': assert all(1 < o / t < 1.06 for o, t in zip(ours, there))
    else: assert ours == there
    assert ours[0] == count_flops(model, 64) * 128

@pytest.mark.parametrize('train', [EVERYTHING, ('projector',), ('tower',), ('language_model',)], ids='+'.join)
@pytest.mark.parametrize('recipe', ['dense', 'smoe'])
def test_what_is_frozen_costs_no_gradient_of_its_weights(recipe, train):
    model, forward = seeing(recipe, train, 'loop')
    model.set_attn_implementation('eager')
    assert planned(work_of(model, SEEN)) == counted(forward)

# memory

def kept(work, precision, samples=2):
    res = {}
    for k in work.kept: res[k.part] = res.get(k.part, 0) + samples * k.bytes(precision)
    return res

@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('recipe', own_recipes)
def test_activations_are_what_torch_keeps_part_by_part(recipe, precision):
    model = with_kernel(from_scratch(recipe, 'paper-faithful', num_hidden_layers=2, seed=0), 'grouped_mm')
    tokens = ids((2, 96))
    def forward():
        with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
            return model(input_ids=tokens, labels=tokens).loss
    there, ours = kept_bytes(model, forward), kept(work_of(model, {'': (96, 96)}), precision)
    for part in ('attention', 'norm', 'logits', *(['experts'] if recipe != 'dense' else ['ffn'])):
        assert ours[part] == pytest.approx(there[part], rel=.02), part
    if recipe != 'dense': assert ours['router'] == pytest.approx(there['router'], rel=.15)
    assert sum(ours.values()) == pytest.approx(sum(there.values()), rel=.03)

@pytest.mark.parametrize('train', [EVERYTHING, ('projector',)], ids='+'.join)
@pytest.mark.parametrize('recipe', ['dense', 'smoe', 'tcmoe'])
def test_activations_of_a_model_that_sees(recipe, train):
    model, forward = seeing(recipe, train, 'grouped_mm')
    there, ours = kept_bytes(model, forward), kept(work_of(model, SEEN), 'fp32')
    assert sum(ours.values()) == pytest.approx(sum(there.values()), rel=.05)
    if train != EVERYTHING: assert not [p for p in ours if p.startswith('tower')]

def peak(run):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: run()
    most = now = 0
    events = [e for e in p.profiler.kineto_results.events() if e.name() == '[memory]']
    for e in sorted(events, key=lambda e: e.start_ns()):
        now += e.nbytes()
        most = max(most, now)
    return most

def train_part(model, tokens):
    out = model(input_ids=tokens, labels=tokens)   # keeps its logits, as the learner does
    out.loss.backward()

@pytest.mark.parametrize('recipe', ['dense', 'smoe', 'sharede_v3'])
def test_peak_memory_is_that_of_a_training_step(recipe):
    model = with_kernel(from_scratch(recipe, 'tiny', seed=0), 'grouped_mm')
    opt, tokens = torch.optim.AdamW(model.parameters()), ids((4, 128))
    def part(): train_part(model, tokens)
    part()
    opt.step()
    held = sum(t.numel() * 4 for p in model.parameters() for t in (p, p.grad, *opt.state[p].values()))
    p = plan('tiny', recipe, Setup(precision='fp32', grad_accum=2), batch_size=8)
    assert p.held('weight') + p.held('gradient') + p.held('optimiser') == pytest.approx(held, rel=1e-3)
    assert p.peak_memory() == pytest.approx(held + peak(part), rel=.08)

@pytest.mark.parametrize('recipe', ['dense', 'smoe'])
def test_checkpointing_measured(recipe):
    model, tokens = with_kernel(from_scratch(recipe, 'tiny', num_hidden_layers=8, seed=0), 'grouped_mm'), ids((4, 128))
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    train_part(model, tokens)
    held = 8 * sum(p.numel() for p in model.parameters())
    setup = Setup(precision='fp32', grad_accum=2, checkpointing=True)
    p = plan('tiny', recipe, setup, batch_size=8, num_hidden_layers=8)
    measured = held + peak(lambda: train_part(model, tokens))
    assert p.peak_memory() - p.held('optimiser') == pytest.approx(measured, rel=.08)
    full = dataclasses.replace(p, setup=dataclasses.replace(setup, checkpointing=False))
    assert full.peak_memory() - full.held('optimiser') > 1.2 * measured
    model.set_attn_implementation('eager')
    there = counted(lambda: with_kernel(model, 'loop')(input_ids=tokens, labels=tokens).loss)
    f = p.flops().values()
    ours = sum(r['forward'] for r in f) / 2, sum(r['backward'] + r['again'] for r in f) / 2
    if recipe == 'smoe': assert there == ours
    else: assert there[0] == ours[0] and .94 < there[1] / ours[1] < 1   # torch leaves out the last product of a layer

def test_checkpointing_keeps_inputs_of_layers_and_one_layer():
    p = of()
    few = of(checkpointing=True)
    assert few.activations() < .16 * p.activations() and few.step_flops() > 1.25 * p.step_flops()
    inside = sum(k.bytes('bf16') for k in p.work.kept if k.layer == ('', 3))
    outside = sum(k.bytes('bf16') for k in p.work.kept if k.layer is None and k.part != 'logits')
    assert few.activations() == p.micro * (16 * 4 * 512 * 1024 + inside + outside)

@pytest.mark.parametrize('recipe', ['dense', 'smoe', 'tcmoe', 'moe_plus_plus', 'sharede_v2'])
def test_an_h100_needs_what_the_plan_says_and_the_libraries_work_space(recipe):
    rows = json.loads((ROOT/'benchmarks'/'gpu.json').read_text())['rows']
    row = next(r for r in rows if r['part'] == 'train' and r['recipe'] == recipe)
    base = next(r for r in rows if r['part'] == 'train' and r['recipe'] == 'dense')
    need = {r: of(r, grad_accum=4).peak_memory() / 1e9 for r in ('dense', recipe)}
    assert need[recipe] - need['dense'] == pytest.approx(row['peak_gb'] - base['peak_gb'], abs=.15)
    for r in rows:
        if r['part'] == 'compile' and r['recipe'] == recipe and not r['compiled']:
            p = dataclasses.replace(of(recipe), batch_size=16)
            assert .84 < p.peak_memory() / 1e9 / r['peak_gb'] < 1

# sharding and traffic

def test_shares_of_parameters():
    n = of().work_parameters()
    assert n == 157_934_400
    experts = sum(w.number for w in of().work.weights if routed(w.part))
    assert of(gpus=4).held('gradient') == 4 * n and of(gpus=4, sharding='zero2').held('gradient') == n
    assert of(gpus=4, sharding='zero2').held('weight') == 4 * n and of(gpus=4, sharding='fsdp').held('weight') == n
    assert of(gpus=4, sharding='zero3').memory() == of(gpus=4, sharding='fsdp').memory()
    assert of(gpus=4, expert_parallel=2).held('weight') == pytest.approx(4 * (n - experts / 2))
    assert of(gpus=4, expert_parallel=2, sharding='fsdp').held('weight') == pytest.approx(n)

def test_traffic_by_hand():
    n, T = of().work_parameters(), 65536 / 4
    assert of().traffic() == {}
    assert of(gpus=4).traffic() == {'all-reduce': pytest.approx(2 * .75 * 4 * n)}
    assert of(gpus=4, sharding='fsdp', grad_accum=2).traffic() == {
        'reduce-scatter': pytest.approx(2 * .75 * 4 * n), 'all-gather': pytest.approx(2 * 2 * .75 * 2 * n)}
    sent = 16 * T * 8 * 512 * 2 * 3 / 4
    assert of(gpus=4, expert_parallel=4).traffic()['all-to-all'] == pytest.approx(4 * sent)
    assert of(gpus=4, expert_parallel=4, checkpointing=True).traffic()['all-to-all'] == pytest.approx(6 * sent)

def test_advice_fits():
    p = plan('paper-vlm', 'smoe', Setup(gpus=4))
    assert not p.fits() and 'It would with --sharding fsdp --grad-accum 4' in p.advice()
    assert plan('paper-vlm', 'smoe', Setup(gpus=4, sharding='fsdp', grad_accum=4)).fits()
    tight = plan('paper-0.68b', 'smoe')     # less than there is, and yet too much
    assert not tight.fits() and tight.peak_memory() < tight.setup.machine.memory
    assert 'some of which must stay free for what a plan leaves out. It would with --grad-accum 2' in tight.advice()
    long = plan('paper-0.15b', 'dense', Setup(gpu='laptop'), batch_size=1, sequence_length=400_000)
    assert 'nor 64 GPUs' in long.advice()

# what it is a plan of

@pytest.mark.parametrize('preset, recipes', [('tiny', own_recipes), ('paper-0.68b', ['smoe'])])
def test_parameters_are_those_of_count_parameters(preset, recipes):
    for recipe in recipes:
        with torch.device('meta'): there = count_parameters(from_scratch(recipe, preset))
        p = plan(preset, recipe)
        assert (p.work_parameters(), p.work_parameters(active=True)) == (there['total'], there['active'])

def test_paper_vlm():
    p = plan('paper-vlm', 'smoe', Setup(gpus=4))
    assert (p.work_parameters(), p.work_parameters(active=True)) == (5_672_300_064, 4_819_064_784)
    pt = plan('paper-vlm', 'smoe', Setup(gpus=4), stage='pt').flops()      # experts come with the last stage
    assert not [n for n, r in pt.items() if 'experts' in n or n[:5] == 'tower' and r['backward']]
    ffn, scores = pt['ffn'], pt['attention scores']
    assert ffn['backward'] == ffn['forward'] and scores['backward'] == 2 * scores['forward']

def test_hours_of_table_11():
    for preset, hours, share in (('paper-0.15b', 6.25, 1.6), ('paper-0.68b', 42 + 11 / 60, 3.4)):
        p = plan(preset, 'smoe', Setup(gpus=4))
        rule = 6 * p.work_parameters(active=True) * p.tokens * p.steps / (hours * 3600 * 4 * gpus['h100'].peak)
        assert round(100 * rule, 1) == share and 1 < p.implied_utilisation(hours) / rule < 1.25
        assert p.implied_utilisation(p.hours()) == pytest.approx(p.setup.utilisation)

def test_everything_is_plain_json():
    for name in (*presets, 'tiny-vlm', 'mini-vlm'): json.dumps(plan(name, 'moe_plus_plus').to_dict(), allow_nan=False)
    assert set(precisions) == {'fp32', 'bf16', 'bf16-master', 'bf16-pure'}

@pytest.mark.parametrize('call, words', [
    (lambda: Setup(gpus=0), 'gpus must be a whole number of at least 1, got 0'),
    (lambda: Setup(gpus=4, expert_parallel=3), 'expert_parallel must be a divisor of gpus=4, got 3'),
    (lambda: Setup(sharding='fsdp2'), "did you mean 'fsdp'"),
    (lambda: Setup(precision='fp16'), "unknown precision 'fp16'"),
    (lambda: Setup(bandwidth=0), 'bandwidth must be'),
    (lambda: plan('paper-0.68'), "did you mean 'paper-0.68b'"),
    (lambda: plan('mini', 'smo'), "did you mean 'smoe'"),
    (lambda: plan('mini', stage='vit'), 'stage must be left out for mini'),
    (lambda: plan('paper-vlm', stage='tower'), "unknown stage 'tower'"),
    (lambda: plan('paper-vlm', num_experts=3), 'num_experts must be left out'),
    (lambda: plan('paper-vlm', sequence_length=100), 'sequence_length must be at least the 256 places of an image'),
    (lambda: plan('tiny', setup=Setup(gpus=3)), 'batch_size must be a multiple of gpus=3, got 16'),
    (lambda: plan('tiny', setup=Setup(grad_accum=32)), 'grad_accum must be at most 16'),
    (lambda: plan('tiny', batch_size=0), 'batch_size must be'),
    (lambda: plan('tiny').implied_utilisation(0), 'hours must be above 0')])
def test_mistakes_are_one_sentence(call, words):
    with pytest.raises(ValueError) as e: call()
    assert words in str(e.value) and '\n' not in str(e.value)
