"Stages: what moves, what does not, and a batch of pictures and text in parts and on two processes."
import dataclasses, os, socket

import pytest, torch
from fastai.basics import Callback
from processes import Forked
from libmoe_nb.models.towers import model_parts
from libmoe_nb.training.batches import as_batch, take_rows
from libmoe_nb.training.stages import (PairData, Stage, StageData, paper_stages, part_parameters,
                                       trained_parameters, vision_learner, vision_presets, without_gradient)
from small_vision import Given, STAGE, fit, make_data, make_model, mixed_batch

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')

@pytest.fixture(scope='module')
def data(): return make_data()

@pytest.fixture(scope='module')
def mixed(): return make_data((1, 0, 2, 1, 0, 1))

class KeepGrads(Callback):
    "Keeps the gradients of the last step, before they are clipped"
    order = -20
    def before_step(self):
        self.grads = {n: None if p.grad is None else p.grad.clone() for n, p in self.learn.model.named_parameters()}

def grads_of(model, data, batch, **kwargs):
    keep = KeepGrads()
    stage = dataclasses.replace(STAGE, batch_size=len(batch['labels']), steps=1, warmup_steps=0)
    learn = fit(vision_learner(model, Given(data, [batch, batch]), stage, cbs=[keep], **kwargs))
    return keep.grads, learn

# what moves

@pytest.mark.parametrize('part', ['tower', 'projector', 'language_model'])
def test_a_stage_moves_its_part_and_nothing_else(data, part):
    model = make_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    learn = fit(vision_learner(model, data, dataclasses.replace(STAGE, train=(part,))))
    mine = {n for n, _ in part_parameters(model)[part]}
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= mine and not {n for n in mine - moved if 'embed' not in n and 'k_proj.bias' not in n}
    assert {n: bool(t) for n, (t, _) in trained_parameters(model).items()} == {
        n: n == part for n in ('tower', 'projector', 'language_model')}
    assert len(list(learn.opt.all_params())) == len(mine)                   # what is frozen is not even decayed

def test_what_is_frozen_stays_in_evaluation_mode(data):
    modes = []
    class Look(Callback):
        def after_pred(self): modes.append({n: next(m.children()).training for n, m in model_parts(model).items()})
    model = make_model()
    fit(vision_learner(model, data, dataclasses.replace(STAGE, train=('projector',)), cbs=Look()))
    assert modes[0] == modes[-2] == dict(tower=False, projector=True, language_model=False)

def test_a_frozen_part_that_moves_is_an_error(data):
    class Push(Callback):
        def after_step(self): model.lm_head.weight.data.mul_(1.0001)
    model = make_model()
    with pytest.raises(RuntimeError, match='frozen parameters have moved: lm_head'):
        fit(vision_learner(model, data, dataclasses.replace(STAGE, train=('tower', 'projector')), cbs=Push()))

def test_what_is_trained_is_what_the_stage_says(data):
    model = make_model()
    learn = vision_learner(model, data, dataclasses.replace(STAGE, train=('projector',)))
    next(model_parts(model)['tower'].parameters()).requires_grad_(True)
    with pytest.raises(ValueError, match='must be those of projector and no others'): fit(learn)

# trap: an unused last layer

def behind(model):
    "The model, whose features are taken before the last layer of its tower and before its last norm"
    from transformers import LlavaForConditionalGeneration
    config = model.config
    config.vision_feature_layer = -2
    return LlavaForConditionalGeneration(config)

def test_trap_unused_last_layer(data):
    batch = next(data.batches(4))
    assert without_gradient(make_model().train(), batch) == []
    lost = without_gradient(behind(make_model()).train(), batch)
    assert lost and all('encoder.layers.1.' in n or 'post_layernorm' in n for n in lost)
    assert {'encoder.layers.1', 'post_layernorm'} <= {p for n in lost
                                                      for p in ('encoder.layers.1', 'post_layernorm') if p in n}
    with pytest.raises(ValueError, match='without parameters that no loss reaches .*trim_tower.*encoder.layers.1'):
        fit(vision_learner(behind(make_model()), data, STAGE))

def test_trap_unused_last_layer_of_experts():
    model = make_model('smoe')
    assert without_gradient(model.train(), next(make_data(model=model).batches(4))) == []

# trap: labels

def test_trap_labels_are_asked_of_the_token_before(data):
    b = next(data.batches(4))
    x, labels = as_batch(b)
    at = (labels != -100)
    assert torch.equal(labels[:, :-1], b['labels'][:, 1:]) and (labels[:, -1] == -100).all()
    assert torch.equal(x['input_ids'][:, 1:][at[:, :-1]], labels[:, :-1][at[:, :-1]])
    out = make_model()(**{k: v for k, v in b.items()})                         # transformers shifts by itself
    learn_loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(out.loss, learn_loss)

# parts

def test_parts_take_the_images_of_their_own_sequences(mixed):
    b = StageData(mixed).counted(mixed_batch(mixed, range(6)))
    assert b['num_images'].tolist() == [1, 0, 2, 1, 0, 1]
    for rows in ([0, 1], [2], [4], [5, 2]):
        part, alone = take_rows(b, rows), mixed_batch(mixed, rows)
        assert ('pixel_values' in part) == ('pixel_values' in alone)
        if 'pixel_values' in part: assert torch.equal(part['pixel_values'], alone['pixel_values'])

@pytest.mark.parametrize('recipe, parts', [('dense', ()), ('smoe', ('language_model',)),
                                           ('smoe', ('tower', 'projector')), ('moe_plus_plus', ('tower', 'projector'))])
def test_accumulation_equals_one_part(mixed, recipe, parts):
    batch = mixed_batch(mixed, range(6))
    whole, _ = grads_of(make_model(recipe, parts), mixed, batch)
    for k in (2, 3, 6):
        parts_, _ = grads_of(make_model(recipe, parts), mixed, batch, grad_accum=k)
        for n in whole: assert torch.allclose(whole[n], parts_[n], atol=1e-6, rtol=1e-4), (k, n)

def test_text_alone_has_gradients_of_zero_and_no_image_in_any_statistic(mixed):
    model = make_model('smoe', ('tower',))
    seen = []
    class Look(Callback):
        uses_routing, order = True, 35
        def after_step(self): seen.append(sorted(self.learn.routings))
    text = mixed_batch(mixed, [1, 4])
    assert 'pixel_values' not in text
    grads, learn = grads_of(model, mixed, text, )
    tower = [n for n, _ in part_parameters(model)['tower']]
    assert all(grads[n] is not None and not grads[n].any() for n in tower)
    learn = fit(vision_learner(make_model('smoe', ('tower',)), Given(mixed, [text, mixed_batch(mixed, [0, 2])] * 2),
                               dataclasses.replace(STAGE, batch_size=2, steps=2), cbs=Look()))
    assert seen[0] == [] and len(seen[1]) == 2                                # two layers of the tower

TWO = '''
import os, sys, warnings; warnings.simplefilter('ignore')
import torch; torch.set_num_threads(1)
import small_vision as v, test_stages as t
import torch.distributed as dist
from libmoe_nb.training import distributed
from libmoe_nb.training.stages import vision_learner
from safetensors.torch import save_file
data = v.make_data((1, 0, 2, 1, 0, 1))
batches = [v.mixed_batch(data, rows) for rows in t.STEPS]
model = v.make_model('smoe', ('language_model',))
learn = v.fit(vision_learner(model, v.Given(data, batches), t.STAGE_OF_TWO).distribute(cpu=True))
save_file({n: p.detach().clone().contiguous() for n, p in learn.model.named_parameters()},
          sys.argv[1] + '/' + os.environ['RANK'])
dist.destroy_process_group()
'''
# pictures on one process and text on the other; text on both; one sequence, so that a process has none
STEPS = [0, 1, 2, 4], [1, 4], [2], [3, 5]
STAGE_OF_TWO = Stage(name='vit', sequence_length=128, batch_size=4, steps=4, learning_rate=5e-3)

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.mark.long
def test_trap_two_processes_with_a_batch_of_pictures_and_text(mixed, tmp_path):
    from safetensors.torch import load_file
    env = dict(os.environ, WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    two = [Forked(TWO, tmp_path, env=dict(env, RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]
    for p in two:
        _, err = p.communicate(120)
        assert p.returncode == 0, err[-2000:]
    a, b = (load_file(tmp_path/str(r)) for r in range(2))
    assert all(torch.equal(a[n], b[n]) for n in a)
    batches = [mixed_batch(mixed, rows) for rows in STEPS]
    model = fit(vision_learner(make_model('smoe', ('language_model',)), Given(mixed, batches), STAGE_OF_TWO)).model
    for n, p in model.named_parameters(): assert torch.allclose(p, a[n], atol=2e-3), n

# trap: gradient checkpointing with frozen parts

def test_trap_gradient_checkpointing_with_frozen_parts(data):
    stage, batch = dataclasses.replace(STAGE, train=('projector',)), next(data.batches(4))
    res = []
    for on in (False, True):
        model = make_model()
        if on: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        keep = KeepGrads()
        fit(vision_learner(model, Given(data, [batch, batch]), dataclasses.replace(stage, steps=1), cbs=keep))
        res.append({n: g for n, g in keep.grads.items() if g is not None})
    assert set(res[0]) == set(res[1]) == {n for n, _ in part_parameters(model)['projector']}
    assert all(torch.allclose(res[0][n], res[1][n], atol=1e-7) for n in res[0])

# the tower's own stage

def test_a_phrase_belongs_to_each_picture_whose_caption_has_it(data):
    s = data.samples[0]
    twice = type(data)([s, dataclasses.replace(s, id='again'), data.samples[1]], data.tokenizer,
                       data.image_tensor, 16, 128)
    x, pairs = PairData.as_batch(next(PairData(twice).batches(3)))
    said = {' '.join(data.tokenizer.convert_ids_to_tokens(i[m.bool()]))
            for i, m in zip(x['input_ids'], x['attention_mask'])}
    assert said == {p for s in twice.samples for p in s.turns[1][1].removesuffix(' .').split(' . ')}
    columns = sorted(map(tuple, pairs.T.tolist()))
    assert len(set(columns)) == 2 and all(sum(v == 1 for v in row) in (1, 2, 3) for row in pairs.tolist())
    assert {tuple(c) for c in columns} and pairs.shape == (len(said), 3)

def test_the_tower_learns_from_pairs_and_the_rest_does_not_move(data):
    model = make_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    learn = fit(vision_learner(model, data, dataclasses.replace(STAGE, train=('tower',), data='pairs', steps=40)))
    losses = torch.stack(learn.recorder.losses)
    assert losses[-5:].mean() < .8 * losses[:5].mean()
    tower = {n for n, _ in part_parameters(model)['tower']}
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} <= tower

def test_bfloat16(data):
    learn = fit(vision_learner(make_model('smoe'), data, STAGE, bf16=True))
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learn.model.parameters())

# names

def test_the_papers_numbers():
    pt, pft, vit = paper_stages
    assert [(s.learning_rate, s.batch_size, s.grad_clip)
            for s in paper_stages] == [(1e-3, 256, 0), (2e-6, 24, 1), (4e-6, 32, 1)]
    assert vit.steps == 20_791 and {s.weight_decay
                                    for s in paper_stages} == {s.final_lr_fraction for s in paper_stages} == {0}
    assert pt.train == ('projector',) and vit.experts == ('tower', 'projector') and not pft.experts
    assert all(abs(s.warmup_steps / s.steps - .03) < 1e-3 for s in paper_stages)

def test_commands_know_the_stages_of_all_presets():
    from libmoe_nb.vision_commands import vision_preset_names
    assert vision_preset_names == {n: tuple(s.name for s in p.stages) for n, p in vision_presets.items()}

# what the losses of experts weigh, and streams

def weights_of(model):
    from libmoe_nb.models.swapping import own_layers
    return {tuple((n, w) for n, (w, _) in l.losses.items()) for l in own_layers(model).values()}

def test_the_losses_of_experts_weigh_what_the_stage_says(data, tmp_path):
    from transformers import AutoModelForImageTextToText
    balance, both = (('load_balancing_loss', .01),), (('load_balancing_loss', .5), ('router_z_loss', .25))
    told = dict(experts=('tower', 'projector'), router_aux_loss_coef=.5, router_z_loss_coef=.25)
    plain, weighed = make_model('smoe'), make_model('smoe')
    before = fit(vision_learner(plain, data, dataclasses.replace(STAGE, experts=told['experts'])))
    assert weights_of(plain) == {balance}                              # the default is what a model has anyway
    after = fit(vision_learner(weighed, data, dataclasses.replace(STAGE, **told)))
    assert weights_of(weighed) == {both} and len(before.recorder.losses) == len(after.recorder.losses)
    assert any(not torch.equal(p, q) for (n, p), (_, q) in zip(plain.named_parameters(), weighed.named_parameters())
               if 'router' in n)
    weighed.save_pretrained(tmp_path)
    assert weights_of(AutoModelForImageTextToText.from_pretrained(tmp_path)) == {both}
    vision_learner(weighed, data, STAGE)
    assert weights_of(weighed) == {both}                               # a stage without experts has no say
    only = make_model('smoe')
    vision_learner(only, data, dataclasses.replace(STAGE, **told | dict(experts=('projector',))))
    assert weights_of(only) == {balance, both}

def test_a_stream_trains_as_the_same_samples_do_and_goes_on_where_it_stopped(data):
    from libmoe_nb.data.streaming import StreamedData
    from small_vision import PROCESSOR
    stream = StreamedData(data.samples, PROCESSOR.tokenizer, data.image_tensor, 16, 128, buffer=12)
    model, again = make_model(), make_model()
    learn = fit(vision_learner(model, stream, STAGE))
    assert learn.fingerprint == vision_learner(again, stream, STAGE).fingerprint
    other = StreamedData(data.samples[1:], PROCESSOR.tokenizer, data.image_tensor, 16, 128, buffer=12)
    assert learn.fingerprint != vision_learner(make_model(), other, STAGE).fingerprint
    given = Given(data, [next(stream.batches(4, 0, k)) for k in range(3)])
    for n, p in fit(vision_learner(again, given, STAGE)).model.named_parameters():
        assert torch.equal(p, model.get_parameter(n)), n
    with pytest.raises(ValueError, match='max_length of the stream, 128, got 64'):
        vision_learner(make_model(), stream, dataclasses.replace(STAGE, sequence_length=64))
