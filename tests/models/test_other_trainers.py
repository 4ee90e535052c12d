"""The Trainer of transformers, TRL's SFT trainer and peft, as a user has them: equal losses however rows are laid out
and steps are cut, expert biases, and runs that go on to the bit where another stopped."""
import copy, json
import pytest, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback
from test_configuration import mixed
from test_trainers import IDS, arguments, llama, make, sft, tokenizer
from likeness import same_logits, same_weights
from libmoe_nb.analysis.tracing import record_routing
from libmoe_nb.models.balancing import document_places
from libmoe_nb.models.hosting import count_loads, watch_routers
from libmoe_nb.models.lora import lora_targets
from libmoe_nb.models.swapping import own_layers
from libmoe_nb.models.upcycling import upcycle
from libmoe_nb.moe.routing import tokens_per_expert
from libmoe_nb.training.trainer_callback import RouterCallback

transformers.logging.set_verbosity_error(); transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings('ignore')
LOSSES = dict(router_aux_loss_coef=.5, router_z_loss_coef=.1, router_init_std=.3)
BIASED = dict(recipe='sharede_v3', num_shared_experts=1, expert_bias=True, router_init_std=.3)

def close(a, b, tol=1e-6): torch.testing.assert_close(a, b, atol=tol, rtol=tol)
def rows(n=8, lengths=(10,)):
    g = torch.Generator().manual_seed(1)
    return [dict(input_ids=r, labels=r, attention_mask=torch.ones_like(r))
            for r in (torch.randint(1, 96, (lengths[i % len(lengths)],), generator=g) for i in range(n))]

def padded(rows):
    real = [torch.arange(10) < len(r['input_ids']) for r in rows]
    pad = lambda ids, fill: torch.nn.functional.pad(ids, (0, 10 - len(ids)), value=fill)
    at = lambda fill: torch.stack([pad(r['input_ids'], fill) for r in rows])
    return dict(input_ids=at(0), labels=at(-100), attention_mask=torch.stack(real).long())

def flat(rows, filler=0):
    "The rows end to end, and tokens that fill up"
    ids = torch.cat([r['input_ids'] for r in rows] + [torch.zeros(filler, dtype=torch.long)])
    positions = torch.cat([torch.arange(len(r['input_ids'])) for r in rows] + [torch.zeros(filler, dtype=torch.long)])
    return dict(input_ids=ids[None], position_ids=positions[None], labels=ids.masked_fill(positions == 0, -100)[None])

# ---- packed rows

@pytest.mark.parametrize('recipe', ['smoe', 'xmoe', 'tcmoe', 'moe_plus_plus'])
@pytest.mark.parametrize('step', [None, 60], ids=['alone', 'part of a step'])
def test_packed_or_padded_is_one(recipe, step):
    some, out = rows(4, (10, 4, 7)), []
    for batch in padded(some), flat(some, filler=3):
        m = make(recipe, **LOSSES).train()
        o = m(**batch, num_items_in_batch=step)
        o.loss.backward()
        out.append((o.loss, o.aux_loss, [p.grad for p in m.parameters()]))
    assert out[0][1] > .1
    close(*out, tol=1e-5)

def test_rows_of_one_document_are_left_alone():
    m = make('smoe', **LOSSES).train()
    positions = torch.arange(10).expand(4, 10)
    assert document_places(positions) is None and document_places(torch.stack([positions] * 3)) is None
    close(m(IDS, position_ids=positions, labels=IDS).loss, m(IDS, labels=IDS).loss)

# ---- expert biases

def biases(m): return torch.stack([l.router.expert_bias for l in own_layers(m).values()])
def sequential(trainer):
    trainer._get_train_sampler = lambda *a, **k: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer

def trained(folder, data, callbacks=(RouterCallback(.01),), **kw):
    m = make(**BIASED)
    trainer = sequential(Trainer(m, arguments(folder, **dict(learning_rate=.01) | kw), train_dataset=data,
                                 eval_dataset=data, callbacks=list(callbacks)))
    trainer.train()
    return m, [l for l in trainer.state.log_history if 'loss' in l]

def test_biases_move_by_the_loads_of_a_step(tmp_path):
    "Once, by all tokens but padding; the same under accumulation, recomputed activations, bfloat16 and validation"
    m, data = make(**BIASED).train(), rows()
    with record_routing(m) as records: m(**padded(data))
    want = torch.stack([(load.mean() - load).sign() * .01 for r, in records.values()
                        for load in [tokens_per_expert(r, choices=True)]])
    some = dict(max_steps=1, per_device_train_batch_size=8)
    for kw in (dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, gradient_checkpointing=True),
               dict(eval_strategy='steps', eval_steps=1, eval_on_start=True, bf16=True)):
        got, log = trained(tmp_path, data, **some | kw)
        close(biases(got), want)
        assert got.router_loads is None and {'loss', 'aux_loss', 'load_max_mean', 'dead_experts'} <= set(log[0])
        assert log[0]['load_max_mean'] > 1
    assert want.any() and not biases(trained(tmp_path, data, callbacks=(), **some)[0]).any()

def test_loads_are_counted_in_compiled_code():
    torch._dynamo.reset()
    m, x = make(**BIASED, num_hidden_layers=1).train(), torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    layer, = own_layers(m).values()
    def f(x):
        r = layer.router(x)
        count_loads(m, [(layer, r)], lambda layer: None, r.scores.sum(), True)
        return r.top_k_weights
    seen = []
    for call in f, torch.compile(f, backend='eager'):
        loads = watch_routers(m)
        for _ in range(2): call(x)
        seen.append((loads.step[id(layer)], loads.seen[id(layer)], loads.parts))
    close(*seen)
    assert seen[0][0].sum() == 2 * 7 * 2   # the third expert of a token is the shared one

def test_a_frozen_router_keeps_its_bias(tmp_path):
    peft = pytest.importorskip('peft', reason='pip install peft')
    for parts, moves in (['attention'], False), (['attention', 'routers'], True):
        m = make(**BIASED)
        model = peft.get_peft_model(m, peft.LoraConfig(r=2, task_type='CAUSAL_LM', **lora_targets(m, parts)))
        Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[RouterCallback(.01)]).train()
        assert biases(model).any() == moves
        model.save_pretrained(tmp_path/'adapter')
        back = peft.PeftModel.from_pretrained(make(**BIASED), tmp_path/'adapter').eval()
        assert same_weights(back, model)
        with torch.no_grad(): assert same_logits(back(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)

# ---- going on

class Stop(TrainerCallback):
    def on_save(self, args, state, control, **kwargs): control.should_training_stop = True

def goes_on(make_trainer, folder):
    "Four steps at once, and two and two from a checkpoint, have the same weights and losses"
    steps = dict(max_steps=4, save_strategy='steps', save_steps=2)
    whole = make_trainer(folder/'whole', max_steps=4)
    whole.train()
    first = make_trainer(folder/'cut', **steps)
    first.add_callback(Stop())
    first.train()
    second = make_trainer(folder/'cut', **steps)
    second.train(resume_from_checkpoint=True)
    told = [[l['loss'] for l in t.state.log_history if 'loss' in l] for t in (whole, second)]
    a, b = whole.model.state_dict(), second.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a) and told[0] == told[1] and len(told[0]) == 4

def test_the_trainer_goes_on_to_the_bit(tmp_path):
    def trainer(folder, **kw):
        return Trainer(make(**BIASED), arguments(folder, gradient_accumulation_steps=2, learning_rate=.01, **kw),
                       train_dataset=rows(12), callbacks=[RouterCallback(.01)])
    assert goes_on(trainer, tmp_path)

def test_sft_of_adapters_goes_on_to_the_bit(tmp_path):
    peft = pytest.importorskip('peft', reason='pip install peft')
    def trainer(folder, **kw):
        m = make()
        config = peft.LoraConfig(r=2, task_type='CAUSAL_LM', **lora_targets(m, ['attention', 'experts', 'routers']))
        return sft(m, folder, config, bf16=True, per_device_train_batch_size=2, learning_rate=.01, **kw)
    assert goes_on(trainer, tmp_path)

# ---- predictions of other classes

def test_predictions_hold_no_router_logits(tmp_path):
    from transformers import BertForSequenceClassification
    m = upcycle(BertForSequenceClassification(AutoConfig.for_model(
        'bert', vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)),
                'smoe', 4, 2)
    m.config.output_router_logits = True
    trainer = Trainer(m, arguments(tmp_path), callbacks=[RouterCallback()],
                      train_dataset=[dict(input_ids=r, labels=i % 2) for i, r in enumerate(IDS)])
    trainer.train()
    assert trainer.state.log_history[0]['aux_loss'] > 0
    assert trainer.predict(trainer.train_dataset).predictions.shape == (4, 2)

# ---- TRL

trl = pytest.importorskip('trl', reason='pip install trl')
PLAIN = dict(bf16=False, gradient_checkpointing=False)

def batch_of(trainer): return next(iter(sequential(trainer).get_train_dataloader()))
def loss_of(trainer, batch):
    trainer.current_gradient_accumulation_steps = 1
    return trainer.compute_loss(trainer.model.train(), dict(batch))

def test_sft_packs_and_pads_alike(tmp_path):
    a, b = (sft(make(**LOSSES), tmp_path, max_length=None, padding_free=f, **PLAIN) for f in (False, True))
    close(loss_of(a, batch_of(a)), loss_of(b, batch_of(b)), tol=1e-5)
    assert batch_of(b)['input_ids'].shape[0] == 1 and a._metrics['train']['aux_loss'][0] > .1

def test_sft_packs_at_its_default_settings(tmp_path):
    trainer = sft(make(**LOSSES), tmp_path, packing=True, max_length=32, bf16=True)
    trainer.train()
    assert trainer.state.log_history[0]['aux_loss'] > .1

@pytest.mark.parametrize('completions', [False, True], ids=['texts', 'completions'])
def test_sft_accumulates_exactly(completions, tmp_path):
    "But for means over tokens, since TRL weighs micro-batches alike: the router z-loss needs rows of one length"
    from datasets import Dataset
    texts, out = ['the cat sat', 'a dog barked', 'no', 'yes it is so'] * 2, []
    data = Dataset.from_dict(dict(prompt=texts, completion=texts[::-1]) if completions else dict(text=texts))
    losses = dict(router_aux_loss_coef=.5, router_z_loss_coef=.1 * completions)
    for B, k in (8, 1), (2, 4):
        args = trl.SFTConfig(str(tmp_path), max_steps=2, per_device_train_batch_size=B, gradient_accumulation_steps=k,
                             learning_rate=.1, optim='sgd', lr_scheduler_type='constant', max_grad_norm=0, report_to=[],
                             use_cpu=True, save_strategy='no', logging_steps=1, disable_tqdm=True, **PLAIN)
        m = make(**BIASED, **losses)
        trainer = sequential(trl.SFTTrainer(m, args, train_dataset=data, processing_class=tokenizer(),
                                            callbacks=[RouterCallback(.01)]))
        trainer.train()
        out.append((m.state_dict(), [l[n] for l in trainer.state.log_history[:2] for n in ('loss', 'aux_loss')]))
    assert biases(m).any()
    close(*(torch.tensor(o[1]) for o in out), tol=1e-4)
    for n in out[0][0]: close(out[0][0][n], out[1][0][n], tol=1e-5)

TEMPLATE = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
            "{% endgeneration %}{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}")

def test_sft_of_answers_alone_by_the_name_of_a_folder(tmp_path):
    from datasets import Dataset
    m, tok = make(**LOSSES), tokenizer()
    tok.chat_template = TEMPLATE
    for x in m, tok: x.save_pretrained(tmp_path/'model')
    talk = [[dict(role='user', content='who sat'), dict(role='assistant', content=a)] for a in ('the cat', 'a dog')]
    args = trl.SFTConfig(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, logging_steps=1, save_strategy='no',
                         disable_tqdm=True, assistant_only_loss=True)
    trainer = trl.SFTTrainer(str(tmp_path/'model'), args, train_dataset=Dataset.from_dict(dict(messages=talk)))
    assert [(l != -100).sum() for l in batch_of(trainer)['labels']] == [len('the cat') + 1, len('a dog') + 1]
    trainer.train()
    assert type(trainer.model) is type(m) and trainer.state.log_history[0]['aux_loss'] > .1
    trainer.save_model(tmp_path/'out')
    back = AutoModelForCausalLM.from_pretrained(tmp_path/'out').state_dict()
    assert all(torch.equal(back[n], t) for n, t in trainer.model.state_dict().items())

def test_sft_of_layers_with_budgets_of_their_own(tmp_path):
    m = mixed()
    trainer = sft(m, tmp_path, gradient_checkpointing=False)
    want = copy.deepcopy(m).train()
    batch = batch_of(trainer)
    loss = loss_of(trainer, batch)
    del want.forward
    out = want(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], labels=batch['labels'])
    close((loss, trainer._metrics['train']['aux_loss'][0]), (out.loss, out.aux_loss.item()), tol=1e-5)

def test_sft_of_an_upcycled_model_and_adapters(tmp_path):
    peft = pytest.importorskip('peft', reason='pip install peft')
    m = upcycle(AutoModelForCausalLM.from_config(llama()), 'smoe', 4, 2, seed=0)
    m.save_pretrained(tmp_path/'base')
    m = AutoModelForCausalLM.from_pretrained(tmp_path/'base')
    config = peft.LoraConfig(r=2, task_type='CAUSAL_LM', **lora_targets(m))
    trainer = sft(m, tmp_path, config, learning_rate=.1, **PLAIN)
    trainer.train()
    trainer.save_model(tmp_path/'adapter')
    back = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path/'adapter').eval()
    with torch.no_grad():
        now = trainer.model.eval()(input_ids=IDS).logits
        assert same_logits(back(input_ids=IDS).logits, now)
        with back.disable_adapter(): assert not torch.allclose(back(input_ids=IDS).logits, now, atol=1e-3)
    merged = back.merge_and_unload()
    merged.save_pretrained(tmp_path/'merged')
    with torch.no_grad():
        assert same_logits(AutoModelForCausalLM.from_pretrained(tmp_path/'merged')(IDS).logits, merged(IDS).logits)

# ---- a model that sees

@pytest.fixture(scope='module')
def seeing():
    from PIL import Image
    from datasets import Dataset
    from transformers import LlavaProcessor, SiglipImageProcessor
    from libmoe_nb.models.vision import llava_from_scratch
    tok = tokenizer()
    tok.add_special_tokens(dict(additional_special_tokens=['<image>']))
    template = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
                "{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}")
    processor = LlavaProcessor(SiglipImageProcessor(size=dict(height=32, width=32)), tok, patch_size=8,
                               vision_feature_select_strategy='full', chat_template=template)
    talk = [dict(role='user', content=[dict(type='image', text=None), dict(type='text', text='the cat')]),
            dict(role='assistant', content=[dict(type='text', text='a dog')])]
    data = Dataset.from_dict(dict(images=[[Image.new('RGB', (32, 32))]] * 2, messages=[talk] * 2))
    return llava_from_scratch('tiny-vlm', tok, seed=0), processor, data

@pytest.mark.parametrize('where', [['language_model'], ['tower', 'language_model']], ids='+'.join)
def test_sft_of_an_upcycled_llava(where, seeing, tmp_path):
    from libmoe_nb.models.vision import upcycle_parts
    dense, processor, data = seeing
    moe = upcycle_parts(dense, 'smoe', where, 4, 2, seed=0, router_aux_loss_coef=.5)
    args = trl.SFTConfig(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, logging_steps=1, save_strategy='no',
                         disable_tqdm=True, max_length=None, **PLAIN)
    trainer = trl.SFTTrainer(moe, args, train_dataset=data, processing_class=processor, callbacks=[RouterCallback()])
    batch = batch_of(trainer)
    loss = loss_of(trainer, batch)
    own = copy.deepcopy(moe).train()
    del own.forward
    out = own(**batch)
    assert out.aux_loss > .1
    close(loss, out.loss, tol=1e-5)
    before = [l.router.weight.clone() for l in own_layers(moe).values()]
    trainer.train()
    log = trainer.state.log_history[0]
    assert log['aux_loss'] == pytest.approx(out.aux_loss.item(), abs=1e-5) and log['load_max_mean'] > 1
    assert not any(torch.equal(l.router.weight, b) for l, b in zip(own_layers(moe).values(), before))
    moe.save_pretrained(tmp_path/'out')
    saved = json.loads((tmp_path/'out'/'config.json').read_text())
    assert not {'aux_loss_factor', 'auto_map', 'keys_to_ignore_at_inference'} & set(saved)
    assert not {'num_experts', 'router_aux_loss_coef'} & set(saved['text_config'])
